"""Where a notebook's results go, and the file by which a run of it is judged."""

import json
from collections.abc import Mapping
from pathlib import Path

from backpack_lib.files import runs_folder, write_text


def open_results(name: str, out: str = "") -> Path:
    """The folder for a notebook's results, made if need be: its parameter `out`, or `runs/<name>`."""
    folder = Path(out) if out else runs_folder() / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_results(folder: Path, headline: str, numbers: Mapping[str, float]):
    """Writes `results.json`, one line and the numbers behind it, and prints the line."""
    numbers = {name: float(value) for name, value in numbers.items()}
    write_text(folder / "results.json", json.dumps({"headline": headline, **numbers}, indent=1))
    print(headline)
