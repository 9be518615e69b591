"""The Hugging Face hub, asked only for what is not here, and only if it answers: nothing waits for a network in vain."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from huggingface_hub import constants, get_session

PATIENCE = 4  # seconds that the hub has to answer in


def local_first(load: Callable, name, **settings):
    """What `load`, a `from_pretrained`, makes of a name: of a folder, of the hub's cache here, or of the hub."""
    try:
        return load(name, local_files_only=True, **settings)
    except (OSError, ValueError):
        if Path(name).exists():
            raise
        offline_without_hub()
        return load(name, **settings)


@cache
def offline_without_hub():
    """Has the hub's libraries take what is cached where the hub does not answer, which they would ask for 24 seconds.

    For as long as this process lasts.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # no network, a proxy that refuses, offline mode: each has errors of its own
        constants.HF_HUB_OFFLINE = True
