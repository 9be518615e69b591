"""Strict runs of the notebooks by papermill.

    python -m backpack_lib.running                                   all of them, in order
    python -m backpack_lib.running 01_training -p steps 2000         one, with another parameter
    python -m backpack_lib.running 01_training -f parameters.yaml
    python -m backpack_lib.running 03_topic_control --grid strength=0,1,2,3 --grid seed=0,1,2
    python -m backpack_lib.running --notebooks mine                  copies them to a folder, to be changed there,
    python -m backpack_lib.running mine/02_senses.ipynb              and runs one of those

What papermill lets pass is refused here before anything starts: a parameter that the notebook does not
have, and a value of another type. And an exception inside a widget's callback, which leaves no trace
in papermill's exit status, fails the run. Each executed copy lies in its folder under `runs/`, with
the notebook's results beside it; running all of them ends with an `index.html`.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from backpack_lib.files import first_line, locked_folder, runs_folder
from backpack_lib.running.parameters import (
    check_parameters,
    default_parameters,
    source_of,
)

RESULTS = "results.json"  # written by each notebook beside its executed copy; `headline` is one line
STARTS = 3  # of a kernel that dies before its first cell, at most
DIED_AT_START = "RuntimeError: Kernel died before replying"  # jupyter_client's; what a cell raises begins with "cell"


@dataclass
class Outcome:
    """What became of one notebook."""

    notebook: str
    minutes: float
    result: str
    copy: Path
    failed: bool


def run_notebook(name: str, given: dict | None = None, progress_bar: bool = True) -> Outcome:
    """Executes one notebook, by name or path; its copy and results go to its parameter `out`, or to `runs/<name>`.

    Raises ValueError, before anything starts, for an unknown notebook, parameter name or type, or if another run
    is writing to the same folder; OSError if the folder cannot be written.
    """
    source = source_of(name)
    name = source.stem
    parameters = check_parameters(name, default_parameters(source), given or {})
    folder = Path(parameters.get("out") or runs_folder() / name)
    with locked_folder(folder):
        copy, results = folder / f"{name}.ipynb", folder / RESULTS
        results.unlink(missing_ok=True)
        started = time.monotonic()
        failure = _execute(source, copy, parameters, progress_bar) or _widget_failure(copy)
        minutes = (time.monotonic() - started) / 60
        if failure is None and not results.is_file():
            failure = f"it wrote no {RESULTS}"
        result = f"FAILED: {failure}" if failure else json.loads(results.read_text(encoding="utf-8"))["headline"]
        return Outcome(name, minutes, result, copy, failed=failure is not None)


def _execute(source: Path, copy: Path, parameters: dict, progress_bar: bool) -> str | None:
    """Runs a notebook into `copy`. Returns what went wrong in one line, or None.

    A kernel's ports are chosen before it takes them, and of kernels that start at the same time one can find its
    port taken by another. It dies then, before the first cell, and another kernel is started.
    """
    for _ in range(STARTS):
        failure = _execute_once(source, copy, parameters, progress_bar)
        if failure is None or not failure.startswith(DIED_AT_START):
            break
    return failure


def _execute_once(source: Path, copy: Path, parameters: dict, progress_bar: bool) -> str | None:
    import papermill

    try:
        papermill.execute_notebook(
            str(source),
            str(copy),
            parameters,
            kernel_name="python3",
            progress_bar=progress_bar,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # what goes wrong in a cell comes as a message
        )
    except papermill.PapermillExecutionError as error:
        return f"cell {error.exec_count}: {error.ename}: {error.evalue}".splitlines()[0]
    except Exception as error:  # the kernel died, or could not start
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _widget_failure(copy: Path) -> str | None:
    """The first exception that a widget's callback left in the saved widget state, or None."""
    metadata = json.loads(copy.read_text(encoding="utf-8"))["metadata"]
    saved = metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    for widget in saved.values():
        for output in widget.get("state", {}).get("outputs", ()):
            if output.get("output_type") == "error":
                return f"in a widget: {output.get('ename')}: {output.get('evalue')}"
    return None
