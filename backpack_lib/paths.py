"""Where data are read from, where runs and caches are written, and how a file is written whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_folder() -> Path:
    """The suite's `data/`: beside the package in a clone, inside it once installed from a wheel."""
    inside = _PACKAGE / "data"
    return inside if inside.is_dir() else _PACKAGE.parent / "data"


def notebooks_folder() -> Path:
    """$BACKPACK_NOTEBOOKS, else the suite's: beside the package in a clone, inside it once installed from a wheel."""
    inside = _PACKAGE / "notebooks"
    default = inside if inside.is_dir() else _PACKAGE.parent / "notebooks"
    return Path(os.environ.get("BACKPACK_NOTEBOOKS", default))


def runs_folder() -> Path:
    """Where notebooks write what they make: $BACKPACK_RUNS, else `runs/` in the clone or the current folder."""
    in_clone = (_PACKAGE.parent / "pyproject.toml").is_file()
    default = (_PACKAGE.parent if in_clone else Path.cwd()) / "runs"
    return Path(os.environ.get("BACKPACK_RUNS", default))


def home_folder() -> Path:
    """The home folder, or `.home` in the runs where there is none that can be written, as in some containers."""
    try:
        home = Path.home()
    except RuntimeError:  # no such user
        return runs_folder() / ".home"
    return home if os.access(home, os.W_OK) else runs_folder() / ".home"


def use_writable_home():
    """For kernels that this process starts: Jupyter, Matplotlib and others write into the home folder."""
    home = home_folder()
    home.mkdir(parents=True, exist_ok=True)
    os.environ["HOME"] = str(home)


def cache_folder() -> Path:
    """Where tokenised corpora are kept: $BACKPACK_CACHE, else `.cache/backpack_lib` in the home folder."""
    return Path(os.environ.get("BACKPACK_CACHE", home_folder() / ".cache" / "backpack_lib"))


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Another path to write to, renamed to `path` at the end, so that the file is there whole or not at all."""
    building = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield building
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)
