"""A grid of runs of one notebook: once for each combination of some values, several at a time, and a table at the end.

Each run has a folder of its own, named by its values and a digest of the notebook's code and all parameters, so that
grids do not mix. It is finished if its `results.json` has its parameters: a grid that was stopped, or killed, resumes.
"""

import hashlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice, product
from pathlib import Path

import pandas as pd
from dask import config
from dask.distributed import Client, KilledWorker, as_completed, get_worker
from tqdm import tqdm

from backpack_lib.files import locked_folder, runs_folder, write_text
from backpack_lib.running.notebook import RESULTS, run_notebook
from backpack_lib.running.parameters import code_of, default_parameters, read_grid, source_of

MOST = 8  # processes, unless more are asked for: each is a kernel with a model
# What takes memory is the kernel, another process, so dask's limit of it would say nothing.
PROCESS = {"threads_per_worker": 1, "memory_limit": 0, "dashboard_address": "127.0.0.1:0", "silence_logs": "CRITICAL"}


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
            digest = hashlib.sha256(json.dumps([code, parameters], sort_keys=True).encode()).hexdigest()
            self.runs[f"{re.sub('[^a-zA-Z0-9_.,=+-]+', '_', label)[:80]}-{digest[:8]}"] = parameters

    def results_of(self, run: str) -> dict | None:
        """The results of a run, or None if it is not finished."""
        try:
            results = json.loads((self.folder / run / RESULTS).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return results if results.get("parameters") == self.runs[run] else None

    def run(self, processes: int = 0, scheduler: str = "") -> list[str]:
        """Runs what is not finished yet, and returns which runs failed.

        processes: of this machine; 0: one a GPU or one a core. scheduler: of a dask cluster that is used instead.
        """
        with locked_folder(self.folder):
            write_text(self.notebook, self.source)  # all runs are of this copy, whatever is edited meanwhile
            self.table()
            left = [run for run in self.runs if self.results_of(run) is None]
            return self._run_each(left, processes, scheduler) if left else []

    def _run_each(self, left: list[str], processes: int, scheduler: str) -> list[str]:
        gpus = [] if scheduler or all(p.get("device", "cpu") == "cpu" for p in self.runs.values()) else gpus_here()
        if scheduler:
            at_once = len(left)  # a cluster may grow with its work
            place = {"scheduler_file" if Path(scheduler).is_file() else "address": scheduler, "timeout": 20}
            connected = Client(**place)
        else:
            # No process of this machine is given a second run, which would be killed with it.
            at_once = min(len(left), processes or len(gpus) or min(MOST, os.cpu_count()))
            connected = processes_here(at_once)
        failed, again = [], []
        with (
            connected as client,
            tqdm(total=len(self.runs), initial=len(self.runs) - len(left), desc=self.name, unit="run") as bar,
        ):
            run_one = partial(self.run_one, gpus=gpus)
            # A process that is killed takes with it what waits there, too: those have a second try, one at a time.
            for run, failure in chain(
                as_they_end(client, run_one, left, at_once), as_they_end(client, run_one, again, 1)
            ):
                if isinstance(failure, KilledWorker) and run not in again:
                    again.append(run)
                    continue
                if failure:
                    failed.append(run)
                    bar.write(f"{run}: {failure}", file=sys.stderr)
                self.table()
                bar.update()
        return failed

    def run_one(self, run: str, gpus: list[str]) -> str | None:
        """Runs the notebook once, on another GPU than this machine's other processes. Returns what went wrong."""
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[int(get_worker().name) % len(gpus)]
        outcome = run_notebook(str(self.notebook), self.runs[run] | {"out": str(self.folder / run)}, progress_bar=False)
        return outcome.result if outcome.failed else None

    def table(self) -> pd.DataFrame:
        """Writes a row for each finished run, its values and results, as `table.csv`, and returns the rows."""
        found = {run: self.results_of(run) for run in self.runs}
        rows = [
            {axis: self.runs[run][axis] for axis in self.axes} | results for run, results in found.items() if results
        ]
        table = pd.DataFrame(rows).drop(columns="parameters", errors="ignore")
        write_text(self.file, table.to_csv(index=False))
        return table


def as_they_end(client: Client, function: Callable, arguments: list, at_once: int) -> Iterator[tuple]:
    """Calls a function with each argument, so many at once. -> each with what came back or was raised, as they end"""
    waiting, argument_of = iter(arguments), {}

    def start(count: int) -> list:
        started = {client.submit(function, argument, pure=False): argument for argument in islice(waiting, count)}
        argument_of.update(started)
        return list(started)

    ending = as_completed(start(at_once))
    for future in ending:
        yield argument_of.pop(future), future.exception() or future.result()
        ending.update(start(1))


def processes_here(number: int) -> Client:
    """So many processes of this machine, which share its cores and leave Ctrl-C to this one, which stops them."""
    threads = str(max(1, os.cpu_count() // number))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # for processes that start meanwhile, too
    try:
        with config.set({"distributed.scheduler.allowed-failures": 0}):  # who calls decides what is tried again
            return Client(n_workers=number, env={"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}, **PROCESS)
    finally:
        signal.signal(signal.SIGINT, before)


def gpus_here() -> list[str]:
    """The names by which CUDA_VISIBLE_DEVICES knows the GPUs of this machine, or those of them that it allows."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
    return [name for name in allowed.split(",") if name.strip() not in ("", "-1")]
