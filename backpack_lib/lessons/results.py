"""Where a notebook's results go, and the file by which a run of it is judged."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from backpack_lib.files import runs_folder, write_text


def open_results(name: str, out: str = "") -> Path:
    """The folder for a notebook's results, made if need be: its parameter `out`, or `runs/<name>`."""
    folder = Path(out) if out else runs_folder() / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_quietly(work: Callable):
    """What a long piece of work returns; its progress bars go when it is done."""
    from IPython.display import clear_output

    result = work()
    clear_output()
    return result


@dataclass
class Results:
    """A notebook's folder, and the numbers that a sweep needs."""

    folder: Path
    numbers: dict[str, float] = field(default_factory=dict)

    def keep(self, table, name: str):
        """Writes a DataFrame beside the notebook's results, as `name`.csv, and returns it."""
        write_text(self.folder / f"{name}.csv", table.to_csv())
        return table

    def close(self, headline: str):
        """Writes `results.json`, the headline and the numbers, and prints the headline.

        NaN and infinity, which JSON does not have, are written as null.
        """
        numbers = {name: float(value) if math.isfinite(value) else None for name, value in self.numbers.items()}
        text = json.dumps({"headline": headline, **numbers}, indent=1, allow_nan=False)
        write_text(self.folder / "results.json", text)
        print(headline)
