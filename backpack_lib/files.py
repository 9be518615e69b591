"""Where data are read from, where runs and caches are written, and how a file is written whole."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

_PACKAGE = Path(__file__).resolve().parent


def _shipped(name: str) -> Path:
    """A folder of the suite: beside the package in a clone, inside it once installed from a wheel."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def data_folder() -> Path:
    return _shipped("data")


def notebooks_folder() -> Path:
    """$BACKPACK_NOTEBOOKS, else the suite's."""
    return Path(os.environ.get("BACKPACK_NOTEBOOKS", _shipped("notebooks")))


def project_folder() -> Path:
    """Where one works: the clone; with the wheel, the current folder, or the parent of the `notebooks` one is in."""
    if (_PACKAGE.parent / "pyproject.toml").is_file():
        return _PACKAGE.parent
    here = Path.cwd()
    return here.parent if here.name == "notebooks" else here


def as_seen(path: str | Path) -> str | Path:
    """A path as given, or, where nothing is there, as seen from the project: a notebook runs in its own folder."""
    beside = project_folder() / path
    return str(beside) if path and not os.path.exists(path) and beside.exists() else path


def runs_folder() -> Path:
    """Where notebooks write what they make: $BACKPACK_RUNS, else `runs/` in the project."""
    return Path(os.environ.get("BACKPACK_RUNS", project_folder() / "runs"))


def cache_folder() -> Path:
    """Where tokenised corpora are kept: $BACKPACK_CACHE, else `.cache/backpack_lib` in the home folder."""
    return Path(os.environ.get("BACKPACK_CACHE", Path.home() / ".cache" / "backpack_lib"))


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Another path to write to, renamed to `path` at the end, so that the file is there whole or not at all."""
    building = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield building
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)


def write_text(path: Path, text: str):
    """Writes a text file, whole or not at all."""
    with written_whole(path) as building:
        building.write_text(text, encoding="utf-8")


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps other runs out. Raises ValueError if one is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout:
        raise ValueError(f"Another run is writing to {str(folder)!r}; wait for it, or choose another `out`.") from None
    with lock:
        yield


def digest(what) -> str:
    """A name for anything that JSON can write: 64 letters, others for other content."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def cached_json(folder: Path, what: dict, make: Callable):
    """What `make()` returns, made once: it is kept as JSON in the folder, in a file named by all that `what` says."""
    file = Path(folder) / f"{digest(what)[:16]}.json"
    if not file.is_file():
        value = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"what": what, "value": value}, ensure_ascii=False))
    return json.loads(file.read_text(encoding="utf-8"))["value"]


def read_file(file: str | Path, read: Callable):
    """What `read` makes of a user's file; why it cannot be read is said in one sentence."""
    try:
        return read(file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{str(file)!r} cannot be read: {' '.join(str(error).split())}") from error


def first_line(error: BaseException) -> str:
    """What an error of another library says in its first line, or its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
