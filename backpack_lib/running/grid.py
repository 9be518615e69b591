"""A grid of runs of one notebook: once for each combination of some values, several at a time, and a table at the end.

Each run has a folder of its own below `out`. One that is finished is not run again, as long as its parameters and
the notebook's code are the same; so a grid that was stopped, or killed, resumes when the same line is typed again.
Where the runs take place, here or on a cluster, is the matter of `cluster.py`.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from dask.distributed import KilledWorker
from tqdm import tqdm

from backpack_lib.files import locked_folder, runs_folder, written_whole
from backpack_lib.running.cluster import claim_gpu, workers
from backpack_lib.running.notebook import RESULTS, Outcome, run_notebook
from backpack_lib.running.parameters import check_parameters, code_of, default_parameters, read_values, source_of

FINISHED = "finished.json"  # what a run was of, written once it has ended well


class Grid:
    """The combinations of some parameters' values, and the runs of a notebook with them.

    given: parameters that are the same for all, checked before. axes: "name=v1,v2" for each parameter of the grid.

    Raises ValueError for unknown names, wrong types, a name without values, and one that is given twice.
    """

    def __init__(self, name: str, given: dict, axes: list[str]):
        source = source_of(name)
        # One of the suite's is asked for by its name, since it may lie elsewhere on another machine.
        self.notebook = str(source) if name.endswith(".ipynb") else name
        self.name, self.defaults = source.stem, default_parameters(source)
        self.code = _digest_of_code(source)
        self.axes = self._read(axes, given)
        self.given = {key: value for key, value in given.items() if key != "out"}
        self.folder = Path(given.get("out") or runs_folder() / f"{self.name}-grid").absolute()
        self.file = self.folder / "table.csv"

    def _read(self, axes: list[str], given: dict) -> dict[str, list]:
        read = {}
        for axis in axes:
            name, equals, values = axis.partition("=")
            if not equals:
                raise ValueError(f"The grid {axis!r} should be written as name=v1,v2.")
            if name == "out":
                raise ValueError("`out` cannot be in a grid; each run has a folder of its own.")
            if name in given or name in read:
                raise ValueError(f"{name!r} is given twice.")
            read[name] = read_values(name, values, self.defaults.get(name))
            for value in read[name]:
                check_parameters(self.name, self.defaults, {name: value})
        return read

    def points(self) -> Iterator[dict]:
        """The combinations, the last parameter changing first."""
        return (dict(zip(self.axes, values)) for values in product(*self.axes.values()))

    def folder_of(self, point: dict) -> Path:
        label = ",".join(f"{name}={value}" for name, value in point.items())
        safe = re.sub(r"[^\w.,=+-]+", "_", label)
        if safe != label or len(safe) > 100:  # another label could look the same
            safe = f"{safe[:80]}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"
        return self.folder / safe

    def identity(self, point: dict) -> dict:
        return {
            "notebook": self.name,
            "code": self.code,
            "parameters": self.defaults | self.given | point | {"out": ""},
        }

    def is_finished(self, point: dict) -> bool:
        file = self.folder_of(point) / FINISHED
        return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["identity"] == self.identity(point)

    def run(self, processes: int = 0, scheduler: str = "") -> list[Outcome]:
        """Runs what is not finished yet, and returns what became of it. A run that fails does not stop the others.

        processes, scheduler: see `cluster.workers`.

        Raises ValueError if another grid is in the same folder, or if there is no such scheduler; KeyboardInterrupt
        says what is left to do.
        """
        if processes < 0:
            raise ValueError(f"processes={processes} should be at least 1, or 0 for as many as the cores allow.")
        with locked_folder(self.folder):
            points = list(self.points())
            left = [point for point in points if not self.is_finished(point)]
            self.write_table()
            outcomes = []
            with (
                workers(processes, len(left), scheduler, self.may_use_gpus()) as hired,
                tqdm(total=len(points), initial=len(points) - len(left), desc=self.name, unit="run") as bar,
            ):
                try:
                    for point, done in hired.each(self.run_point, left):
                        outcomes.append(self.outcome_of(done, point))
                        bar.update()
                        if outcomes[-1].failed:
                            bar.write(f"{self.folder_of(point).name}: {outcomes[-1].result}", file=sys.stderr)
                        self.write_table()
                except KeyboardInterrupt:
                    finished = sum(map(self.is_finished, points))
                    raise KeyboardInterrupt(
                        f"Stopped with {finished} of {len(points)} runs finished; "
                        "the same line goes on with the others."
                    ) from None
        return outcomes

    def may_use_gpus(self) -> bool:
        """Whether any of the runs asks for a GPU, or takes one where there is one."""
        devices = self.axes.get("device") or [self.given.get("device", self.defaults.get("device", "cpu"))]
        return any(device != "cpu" for device in devices)

    def run_point(self, point: dict, gpus: list[str]) -> Outcome:
        """Runs the notebook once, wherever this is called, and notes it if it ended well.

        Raises ValueError if the notebook is another one here than where the grid was begun.
        """
        if _digest_of_code(source_of(self.notebook)) != self.code:
            raise ValueError(f"{self.name} has other code on this machine than where the grid was begun.")
        claim_gpu(gpus)
        folder = self.folder_of(point)
        (folder / FINISHED).unlink(missing_ok=True)
        outcome = run_notebook(self.notebook, self.given | point | {"out": str(folder)}, progress_bar=False)
        if not outcome.failed:
            with written_whole(folder / FINISHED) as building:
                building.write_text(json.dumps({"identity": self.identity(point), "minutes": outcome.minutes}))
        return outcome

    def outcome_of(self, done, point: dict) -> Outcome:
        """What became of a run, from its future."""
        try:
            outcome = done.result()
        except KilledWorker:
            message = "its process was killed, and again when it was tried once more"
        except Exception as error:  # of the run, whatever it is: the others go on
            message = str(error) or type(error).__name__
        else:
            if outcome.failed or self.is_finished(point):
                return outcome
            message = f"it ended, but left nothing in {str(self.folder)!r}, which has to lie on a disk that all share"
        return Outcome(self.name, 0.0, f"FAILED: {message}", self.folder_of(point), failed=True)

    def table(self):
        """One row a finished run: the grid's parameters, minutes, and the numbers of its results, as a DataFrame."""
        import pandas as pd

        rows = []
        for point in filter(self.is_finished, self.points()):
            read = {
                file: json.loads((self.folder_of(point) / file).read_text(encoding="utf-8"))
                for file in (FINISHED, RESULTS)
            }
            shown = {name: str(value) if isinstance(value, list) else value for name, value in point.items()}
            rows.append(shown | {"minutes": round(read[FINISHED]["minutes"], 2)} | read[RESULTS])
        return pd.DataFrame(rows, columns=None if rows else [*self.axes, "minutes", "headline"])

    def write_table(self):
        with written_whole(self.file) as building:
            self.table().to_csv(building, index=False)


def _digest_of_code(source: Path) -> str:
    return hashlib.sha256(json.dumps([cell["source"] for cell in code_of(source)]).encode()).hexdigest()[:16]
