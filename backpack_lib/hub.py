"""The Hugging Face hub: asked once and briefly whether it answers, so that nothing hangs or warns offline."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import httpx
from huggingface_hub import constants

PATIENCE = 4  # seconds that the hub has to answer in
MEMORY = 30  # seconds after which it is asked again


@contextmanager
def reaching_hub(name) -> Iterator[None]:
    """For loading by name: folders without a network; from the hub, if it answers, else from what is cached."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or Path(str(name)).exists() or not hub_answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_answers() -> bool:
    """Whether the hub can be reached at all, as far as the last half minute knows."""
    return _ask(constants.ENDPOINT, int(time.monotonic() / MEMORY))


@lru_cache(maxsize=1)
def _ask(address: str, _when: int) -> bool:
    answers = []

    def ask():
        try:
            answers.append(httpx.head(address, timeout=PATIENCE))
        except httpx.HTTPError:
            pass

    # In a thread, since looking up a name can take longer than any timeout of the request.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return bool(answers)


def local_first(load, name, **settings):
    """What `load`, a `from_pretrained`, makes of a name: of a folder, of the hub's cache here, or of the hub."""
    try:
        return load(name, local_files_only=True, **settings)
    except (OSError, ValueError):
        if Path(name).exists():
            raise
        return load(name, **settings)
