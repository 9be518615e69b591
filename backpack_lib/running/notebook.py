"""Runs of notebooks by papermill, and stricter: an exception inside a widget's callback fails a run, too."""

import json
import logging
import multiprocessing
import os
import time
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

from backpack_lib.files import locked_folder, runs_folder, write_text
from backpack_lib.running.parameters import check_parameters, default_parameters, source_of

RESULTS = "results.json"  # written by each notebook beside its executed copy; `headline` is one line
Outcome = namedtuple("Outcome", "notebook minutes result copy failed")  # what became of one notebook


def run_notebook(
    name: str, given: dict | None = None, progress_bar: bool = True, environment: dict | None = None
) -> Outcome:
    """Executes one notebook, by name or path; its copy and results go to its parameter `out`, or to `runs/<name>`.

    environment: further variables for its kernel.

    Raises ValueError, before anything starts, for an unknown notebook, parameter name or type, or if another run
    is writing to the same folder; OSError if the folder cannot be written.
    """
    source = source_of(name)
    defaults = default_parameters(source)
    parameters = check_parameters(source.stem, defaults, given or {})
    folder = Path(parameters.get("out") or runs_folder() / source.stem).absolute()
    # A notebook that is told its folder writes there, whatever its file is called.
    told = parameters | {"out": str(folder)} if "out" in defaults else parameters
    copy, results = folder / source.name, folder / RESULTS
    with locked_folder(folder):
        results.unlink(missing_ok=True)
        began = time.monotonic()
        failure = _execute(source, copy, told, progress_bar, environment) or _widget_failure(copy)
        minutes = (time.monotonic() - began) / 60
        if failure is None and not results.is_file():
            failure = f"it wrote no {RESULTS}"
        result = f"FAILED: {failure}" if failure else _sign(results, defaults | parameters, minutes)
        return Outcome(source.stem, minutes, result, copy, failed=failure is not None)


def _execute(source: Path, copy: Path, parameters: dict, progress_bar: bool, environment: dict | None) -> str | None:
    """Runs a notebook into `copy`. Returns what went wrong in one line, or None."""
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)  # its warnings are of parameters, which are checked here
    # It takes paths as templates, in which braces stand for parameters.
    paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (source, copy)]
    flags = ["--IPKernelApp.log_level=CRITICAL"]  # what goes wrong in a cell comes as a message
    if environment:
        flags.append(f"--IPKernelApp.exec_lines=import os; os.environ.update({environment})")
    try:
        papermill.execute_notebook(
            *paths, parameters, kernel_name="python3", progress_bar=progress_bar, extra_arguments=flags
        )
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


def side_by_side(function: Callable, arguments: Iterable, at_once: int) -> Iterator:
    """Calls a function with each argument, so many at a time. -> what comes back, as the calls end

    Threads are enough, since a kernel is a process. Ctrl-C ends the waiting at once, and kernels end with this process.
    """
    with ThreadPool(max(1, at_once)) as pool:
        results = pool.imap_unordered(function, arguments)
        while True:
            try:
                yield results.next(timeout=1)  # without a timeout, Windows would not see Ctrl-C
            except multiprocessing.TimeoutError:
                continue
            except StopIteration:
                return


def share_of_cores(at_once: int) -> dict[str, str]:
    """For the kernels of so many runs at a time: as many threads each as there are cores for."""
    threads = str(max(1, os.cpu_count() // at_once))
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
