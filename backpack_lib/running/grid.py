"""A grid of runs of one notebook: once for each combination of some values, several at a time, and a table at the end.

Each run has a folder of its own, named by its values and by a digest of the notebook's code and all parameters, so
that other grids in the same folder leave it alone. A run is finished if its `results.json` has its parameters: a grid
that was stopped, or killed, resumes when the same line is typed again.
"""

import hashlib
import json
import logging
import os
import re
import sys
from itertools import islice, product
from pathlib import Path

import pandas as pd
from dask import config
from dask.distributed import Client, as_completed, get_worker
from tqdm import tqdm

from backpack_lib.files import locked_folder, runs_folder, write_text
from backpack_lib.running.notebook import RESULTS, Outcome, run_notebook
from backpack_lib.running.parameters import code_of, default_parameters, read_grid, source_of

MOST = 8  # processes, unless more are asked for: each is a kernel with a model


class Grid:
    """The combinations of some parameters' values, and the runs of a notebook with them.

    given: parameters that are the same for all, checked before. axes: "name=v1,v2" for each parameter of the grid.

    Raises ValueError for unknown names, wrong types, a name without values, and one that is given twice.
    """

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
            digest = hashlib.sha256(json.dumps([code, parameters], sort_keys=True).encode()).hexdigest()
            self.runs[f"{re.sub('[^a-zA-Z0-9_.,=+-]+', '_', label)[:80]}-{digest[:8]}"] = parameters

    def results_of(self, run: str) -> dict | None:
        """The results of a run, or None if it is not finished."""
        try:
            results = json.loads((self.folder / run / RESULTS).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return results if results.get("parameters") == self.runs[run] else None

    def run(self, processes: int = 0, scheduler: str = "") -> list[Outcome]:
        """Runs what is not finished yet, and returns what became of it. A run that fails does not stop the others.

        processes: of this machine; 0: one a GPU that the runs may use, or else one a core. scheduler: address or file
            of a dask cluster whose workers are used instead.

        Raises ValueError if another grid is in the same folder, OSError if there is no such scheduler.
        """
        with locked_folder(self.folder):
            write_text(self.notebook, self.source)  # all runs are of this copy, whatever is edited meanwhile
            left = [run for run in self.runs if self.results_of(run) is None]
            self.write_table()
            return self._run_all(left, processes, scheduler) if left else []

    def _run_all(self, left: list[str], processes: int, scheduler: str) -> list[Outcome]:
        gpus = [] if scheduler or all(p.get("device", "cpu") == "cpu" for p in self.runs.values()) else gpus_here()
        # A cluster may grow with its work. No process here is given a second run, which would be killed with it.
        at_once = len(left) if scheduler else min(len(left), processes or len(gpus) or min(MOST, os.cpu_count()))
        where = {"scheduler_file" if Path(scheduler).is_file() else "address": scheduler, "timeout": 20}
        waiting, outcomes = iter(left), []
        with (
            config.set({"distributed.scheduler.allowed-failures": 1}),  # what is killed is tried once more
            Client(**where if scheduler else processes_here(at_once)) as client,
            tqdm(total=len(self.runs), initial=len(self.runs) - len(left), desc=self.name, unit="run") as bar,
        ):

            def start(count: int) -> list:
                runs = list(islice(waiting, count))
                return client.map(self.run_one, runs, gpus=gpus, key=runs)

            ending = as_completed(start(at_once))
            for future in ending:
                try:
                    outcome = future.result()
                except Exception as error:  # of the run, or of a process that was killed: the others go on
                    outcome = Outcome(self.name, 0.0, f"FAILED: {error}", self.folder / future.key, failed=True)
                if outcome.failed:
                    bar.write(f"{future.key}: {outcome.result}", file=sys.stderr)
                outcomes.append(outcome)
                self.write_table()
                bar.update()
                ending.update(start(1))
        return outcomes

    def run_one(self, run: str, gpus: list[str]) -> Outcome:
        """Runs the notebook once, on another GPU than this machine's other processes."""
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(get_worker().name) % len(gpus)]
        return run_notebook(str(self.notebook), self.runs[run] | {"out": str(self.folder / run)}, progress_bar=False)

    def table(self) -> pd.DataFrame:
        """One row a finished run: the grid's parameters, and its results."""
        finished = [(self.runs[run], self.results_of(run)) for run in self.runs if self.results_of(run) is not None]
        rows = [{axis: parameters[axis] for axis in self.axes} | results for parameters, results in finished]
        return pd.DataFrame(rows, columns=list(rows[0]) if rows else [*self.axes, "minutes", "headline", "parameters"])

    def write_table(self):
        write_text(self.file, self.table().drop(columns="parameters").to_csv(index=False))


def processes_here(count: int) -> dict:
    """A dask client's settings for processes of this machine, each with its share of the cores."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(max(1, os.cpu_count() // count)))
    quiet = {"dashboard_address": None, "silence_logs": logging.CRITICAL}
    # What takes memory is the kernel, another process, so dask's limit of it would say nothing.
    return {"n_workers": count, "threads_per_worker": 1, "env": threads, "memory_limit": 0} | quiet


def gpus_here() -> list[str]:
    """The names by which CUDA_VISIBLE_DEVICES knows the GPUs of this machine, or those of them that it allows."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
    return [name for name in allowed.split(",") if name.strip() not in ("", "-1")]
