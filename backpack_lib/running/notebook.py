"""Runs of notebooks by papermill, and stricter: an exception inside a widget's callback fails a run, too."""

import json
import logging
import multiprocessing
import os
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

from backpack_lib.files import locked_folder, runs_folder, write_text
from backpack_lib.running.parameters import check_parameters, default_parameters, source_of

RESULTS = "results.json"  # written by each notebook beside its executed copy; `headline` is one line
Outcome = namedtuple("Outcome", "notebook minutes result copy failed")  # what became of one notebook


def run_notebook(name: str, given: dict, progress_bar: bool = True, environment: dict | None = None) -> Outcome:
    """Executes one notebook, by name or path; its copy and results go to its parameter `out`, or to `runs/<name>`.

    environment: further variables for its kernel. Raises ValueError, before anything starts, for an unknown notebook,
    parameter name or type, or if another run is writing to the same folder.
    """
    source = source_of(name)
    defaults = default_parameters(source)
    parameters = check_parameters(source.stem, defaults, given)
    folder = Path(parameters.get("out") or runs_folder() / source.stem).absolute()
    # A notebook that is told its folder writes there, whatever its file is called.
    told = parameters | {"out": str(folder)} if "out" in defaults else parameters
    copy, results = folder / source.name, folder / RESULTS
    with locked_folder(folder):
        results.unlink(missing_ok=True)
        began = time.monotonic()
        failure = _execute(source, copy, told, progress_bar, environment or {}) or _widget_failure(copy)
        minutes = (time.monotonic() - began) / 60
        if failure is None and not results.is_file():
            failure = f"it wrote no {RESULTS}"
        result = f"FAILED: {failure}" if failure else _sign(results, defaults | parameters, minutes)
        return Outcome(source.stem, minutes, result, copy, failed=failure is not None)


def _execute(source: Path, copy: Path, parameters: dict, progress_bar: bool, environment: dict) -> str | None:
    """Runs a notebook into `copy`. Returns what went wrong in one line, or None."""
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)  # its warnings are of parameters, which are checked here
    # It takes paths as templates, in which braces stand for parameters.
    paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (source, copy)]
    settings = {"log_level": "CRITICAL", "exec_lines": f"import os; os.environ.update({environment})"}
    flags = [f"--IPKernelApp.{name}={value}" for name, value in settings.items()]
    kernel = {"kernel_name": "python3", "extra_arguments": flags}
    try:
        papermill.execute_notebook(*paths, parameters, progress_bar=progress_bar, **kernel)
    except papermill.PapermillExecutionError as error:
        return f"cell {error.exec_count}: {error.ename}: {error.evalue}".splitlines()[0]
    except Exception as error:  # the kernel died, or could not start
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def saved_widgets(metadata: dict) -> dict:
    """The state of each widget that a notebook's metadata keep, by its model's id."""
    return metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})


def _widget_failure(copy: Path) -> str | None:
    """The first exception that a widget's callback left in the saved widget state, or None."""
    saved = saved_widgets(json.loads(copy.read_text(encoding="utf-8"))["metadata"])
    outputs = [output for widget in saved.values() for output in widget.get("state", {}).get("outputs", ())]
    errors = [output for output in outputs if output["output_type"] == "error"]
    return f"in a widget: {errors[0]['ename']}: {errors[0]['evalue']}" if errors else None


def _sign(file: Path, parameters: dict, minutes: float) -> str:
    """Adds to the results of a run that ended well its parameters and minutes. Returns the headline."""
    results = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)  # NaN is no JSON
    results |= {"minutes": round(minutes, 2), "parameters": parameters | {"out": ""}}
    write_text(file, json.dumps(results, indent=1, allow_nan=False) + "\n")
    return results.get("headline", "")


def as_they_end(run: Callable, names: Iterable[str], environments: list[dict]) -> Iterator:
    """Calls `run(name, environment)` for each name, one at a time in each environment. -> what comes back, as runs end

    Threads are enough, since a kernel is a process. Ctrl-C ends the waiting, and kernels end with this process.
    """
    own, not_taken = threading.local(), iter(environments)

    def begin():
        own.environment = next(not_taken)

    with ThreadPool(len(environments), begin) as pool:
        ending = pool.imap_unordered(lambda name: run(name, own.environment), names)
        while True:
            try:
                yield ending.next(timeout=1)  # without a timeout, Windows would not see Ctrl-C
            except multiprocessing.TimeoutError:
                continue
            except StopIteration:
                return


def environments_of(at_once: int, gpus: list[str] = ()) -> list[dict]:
    """What the kernels of so many runs at a time need: a share of the cores, and a GPU each where there are some."""
    threads = str(max(1, os.cpu_count() // at_once))
    cores = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} if at_once > 1 else {}
    return [cores | ({"CUDA_VISIBLE_DEVICES": gpus[n % len(gpus)]} if gpus else {}) for n in range(at_once)]
