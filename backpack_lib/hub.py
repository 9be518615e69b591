"""The Hugging Face hub, asked only for what is not here, and only if it answers: nothing waits for a network in vain."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from huggingface_hub import constants, get_session

PATIENCE = 4  # seconds that the hub has to answer in


def local_first(load: Callable, name, **settings):
    """What `load`, a `from_pretrained`, makes of a name: of a folder, of the hub's cache here, or of the hub."""
    try:
        return load(name, local_files_only=True, **settings)
    except (OSError, ValueError):
        if Path(name).exists() or not hub_answers():
            raise
        return load(name, **settings)


@contextmanager
def offline_without_hub() -> Iterator[None]:
    """Where the hub does not answer, its libraries take what is cached, instead of asking it again and again."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not hub_answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@cache
def hub_answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # no network, a proxy that refuses, offline mode: each has errors of its own
        return False
    return True
