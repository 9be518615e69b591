"""The Hugging Face hub, asked only for what is not here, and only if it answers: nothing waits for a network in vain."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

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
    """Whether the hub can be reached; behind a proxy, which alone knows, it is taken to be."""
    if constants.HF_HUB_OFFLINE or getproxies():
        return not constants.HF_HUB_OFFLINE
    try:
        socket.create_connection((urlsplit(constants.ENDPOINT).hostname, 443), timeout=PATIENCE).close()
    except OSError:
        return False
    return True
