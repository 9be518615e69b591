"""A grid of runs of one notebook: once for each combination of some values, several at a time, and a table at the end.

Each run has a folder of its own, named by its values and a digest of the notebook's code and all parameters, so that
grids do not mix. It is finished if its `results.json` has its parameters: a grid that was stopped, or killed, resumes.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from backpack_lib.files import digest, locked_folder, runs_folder, write_text
from backpack_lib.running.notebook import RESULTS, as_they_end, environments_of, run_notebook
from backpack_lib.running.parameters import code_of, default_parameters, read_grid, source_of

MOST = 8  # runs at a time, unless more are asked for: each is a kernel with a model


class Grid:
    """The runs of a notebook. given: parameters of all of them, checked before. axes: "name=v1,v2" for the others."""

    def __init__(self, name: str, given: dict, axes: list[str]):
        source = source_of(name)
        defaults, code = default_parameters(source), [cell.source for cell in code_of(source)]
        self.name, self.source = source.stem, source.read_text(encoding="utf-8")
        self.axes = read_grid(self.name, defaults, given, axes)
        self.folder = Path(given.get("out") or runs_folder() / f"{self.name}-grid").absolute()
        self.notebook, self.file = self.folder / source.name, self.folder / "table.csv"
        self.runs = {}  # the parameters of each by the name of its folder
        for values in product(*self.axes.values()):
            parameters = defaults | given | dict(zip(self.axes, values)) | {"out": ""}
            label = ",".join(f"{axis}={parameters[axis]}" for axis in self.axes)
            self.runs[f"{re.sub('[^a-zA-Z0-9_.,=+-]+', '_', label)[:80]}-{digest([code, parameters])[:8]}"] = parameters

    def results_of(self, run: str) -> dict | None:
        """The results of a run, or None if it is not finished."""
        try:
            results = json.loads((self.folder / run / RESULTS).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return results if results.get("parameters") == self.runs[run] else None

    def run(self, processes: int = 0, scheduler: str = "") -> list[str]:
        """Runs what is not finished yet, and returns which runs failed.

        processes: runs at a time; 0: one a GPU or one a core. scheduler: of a dask cluster that is used instead.
        """
        failed = []
        with locked_folder(self.folder):
            write_text(self.notebook, self.source)  # all runs are of this copy, whatever is edited meanwhile
            self.table()
            left = [run for run in self.runs if self.results_of(run) is None]
            ending = self._on_cluster(left, scheduler) if scheduler else self._on_this_machine(left, processes)
            with tqdm(total=len(self.runs), initial=len(self.runs) - len(left), desc=self.name, unit="run") as bar:
                for run, failure in ending:
                    if failure:
                        failed.append(run)
                        bar.write(f"{run}: {failure}", file=sys.stderr)
                    self.table()
                    bar.update()
        return failed

    def _on_this_machine(self, left: list[str], processes: int) -> Iterator[tuple]:
        """Each run as it ends, with what went wrong or None. Runs of the same time have a GPU each, if there is one."""
        on_gpu = any(parameters.get("device", "cpu") != "cpu" for parameters in self.runs.values())
        gpus = gpus_here() if on_gpu else []
        at_once = min(len(left), processes or len(gpus) or min(MOST, os.cpu_count()))
        return as_they_end(self.run_one, left, environments_of(max(1, at_once), gpus))

    def _on_cluster(self, left: list[str], scheduler: str) -> Iterator[tuple]:
        """Each run as it ends, with what went wrong or None. dask gives what was on a lost machine to another one."""
        from dask.distributed import Client, as_completed

        place = {"scheduler_file" if Path(scheduler).is_file() else "address": scheduler}
        with Client(**place, timeout=20) as client:
            run_of = dict(zip(client.map(self.run_one, left, pure=False), left))
            for future in as_completed(run_of):
                yield future.result() if future.status == "finished" else (run_of[future], future.exception())

    def run_one(self, run: str, environment: dict | None = None) -> tuple[str, str | None]:
        """Runs the notebook once. -> the run, and what went wrong, or None"""
        parameters = self.runs[run] | {"out": str(self.folder / run)}
        try:
            outcome = run_notebook(str(self.notebook), parameters, progress_bar=False, environment=environment)
        except (OSError, ValueError) as error:  # of this run's folder; the others go on
            return run, str(error)
        return run, outcome.result if outcome.failed else None

    def table(self) -> pd.DataFrame:
        """Writes a row for each finished run, its values and results, as `table.csv`, and returns the rows."""
        finished = {run: results for run in self.runs if (results := self.results_of(run))}
        rows = [{axis: self.runs[run][axis] for axis in self.axes} | finished[run] for run in finished]
        table = pd.DataFrame(rows).drop(columns="parameters", errors="ignore")
        write_text(self.file, table.to_csv(index=False))
        return table


def gpus_here() -> list[str]:
    """The names by which CUDA_VISIBLE_DEVICES knows the GPUs of this machine, or those of them that it allows."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
    return [name for name in allowed.split(",") if name.strip() not in ("", "-1")]
