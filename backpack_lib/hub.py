"""The Hugging Face hub, asked only for what is not here: so nothing that is here waits for a network."""

from collections.abc import Callable
from pathlib import Path


def local_first(load: Callable, name, **settings):
    """What `load`, a `from_pretrained`, makes of a name: of a folder, of the hub's cache here, or of the hub."""
    try:
        return load(name, local_files_only=True, **settings)
    except (OSError, ValueError):
        if Path(name).exists():
            raise
        return load(name, **settings)
