"""Strict runs of the notebooks by papermill.

    python -m backpack_lib.running                                   all of them, in order
    python -m backpack_lib.running 01_training -p steps 2000         one, with another parameter
    python -m backpack_lib.running 01_training -f parameters.yaml
    python -m backpack_lib.running 03_topic_control --grid strength=0,1,2,3 --grid seed=0,1,2

What papermill lets pass is refused here before anything starts: a parameter that the notebook does not
have, and a value of another type. And an exception inside a widget's callback, which leaves no trace
in papermill's exit status, fails the run. Each executed copy lies in its folder under `runs/`, with
the notebook's results beside it; running all of them ends with an `index.html`.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from backpack_lib.errors import first_line
from backpack_lib.parameters import (
    check_parameters,
    default_parameters,
    ordered_notebooks,
    read_file,
    read_value,
    source_of,
)
from backpack_lib.paths import runs_folder, use_writable_home

RESULTS = "results.json"  # written by each notebook beside its executed copy; `headline` is one line


@dataclass
class Outcome:
    """What became of one notebook."""

    notebook: str
    minutes: float
    result: str
    copy: Path
    failed: bool


def run_notebook(name: str, given: dict | None = None, progress_bar: bool = True) -> Outcome:
    """Executes one notebook; its copy and results go to its parameter `out`, or to `runs/<name>`.

    Raises ValueError, before anything starts, for an unknown notebook, parameter name or type, or if another run
    is writing to the same folder; OSError if the folder cannot be written.
    """
    source = source_of(name)
    parameters = check_parameters(name, default_parameters(source), given or {})
    folder = Path(parameters.get("out") or runs_folder() / name)
    with alone_in(folder):
        copy, results = folder / f"{name}.ipynb", folder / RESULTS
        results.unlink(missing_ok=True)
        started = time.monotonic()
        failure = _execute(source, copy, parameters, progress_bar) or _widget_failure(copy)
        minutes = (time.monotonic() - started) / 60
        if failure is None and not results.is_file():
            failure = f"it wrote no {RESULTS}"
        result = f"FAILED: {failure}" if failure else json.loads(results.read_text(encoding="utf-8"))["headline"]
        return Outcome(name, minutes, result, copy, failed=failure is not None)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps other runs out of it. Raises ValueError if one is in it, OSError if it can't be written."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise ValueError(f"Another run is writing to {str(folder)!r}; wait for it, or choose another `out`.") from None
    except OSError as error:
        raise OSError(
            f"The folder {str(folder)!r} cannot be written ({error.strerror}); choose another `out`, or set BACKPACK_RUNS."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _execute(source: Path, copy: Path, parameters: dict, progress_bar: bool) -> str | None:
    """Runs a notebook into `copy`. Returns what went wrong in one line, or None."""
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


def table(outcomes: list[Outcome]) -> str:
    """One line a notebook: name, minutes, result; and below each the path of the executed copy."""
    width = max(len(outcome.notebook) for outcome in outcomes)
    lines = [f"{'notebook':{width}}  minutes  result"]
    for o in outcomes:
        lines.append(f"{o.notebook:{width}}  {o.minutes:7.1f}  {o.result}")
        lines.append(f"{'':{width}}           {o.copy}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m backpack_lib.running", description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="*", help="names such as 01_training; none: all, in order")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    parser.add_argument("-f", metavar="FILE", help="parameters from a YAML file")
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=V1,V2",
        help="run once for each value; several: for each pair",
    )
    parser.add_argument("--processes", type=int, default=0, help="of a grid, at a time; 0: as many as the cores allow")
    options = parser.parse_args(arguments)
    try:
        use_writable_home()
        return _run_grid(options) if options.grid else _run_in_order(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        stopped = str(interrupt) or "Stopped. Training goes on from its last checkpoint when this is run again."
        print(stopped, file=sys.stderr)
        return 130


def _run_in_order(options) -> int:
    names = [Path(name).stem for name in options.notebooks] or ordered_notebooks()
    # All are checked before any of them starts.
    plans = {name: _parameters_for(name, options) for name in names}
    outcomes = []
    for number, (name, parameters) in enumerate(plans.items(), start=1):
        print(f"[{number}/{len(plans)}] {name}", file=sys.stderr, flush=True)
        outcomes.append(run_notebook(name, parameters))
    print(table(outcomes))
    if not options.notebooks:
        from backpack_lib.pages import write_index

        print(f"All of them as pages: {write_index(outcomes, runs_folder())}")
    return int(any(outcome.failed for outcome in outcomes))


def _run_grid(options) -> int:
    from backpack_lib.grids import Grid

    if len(options.notebooks) != 1:
        raise ValueError(f"A grid is of one notebook; name one of {', '.join(ordered_notebooks())}.")
    name = Path(options.notebooks[0]).stem
    grid = Grid(name, _parameters_for(name, options), options.grid)
    outcomes = grid.run(options.processes)
    print(grid.table()[[*grid.axes, "minutes", "headline"]].to_string(index=False))
    print(f"All numbers: {grid.file}")
    return int(any(outcome.failed for outcome in outcomes))


def _parameters_for(name: str, options) -> dict:
    """A notebook's parameters from the file and the flags, the flags last."""
    defaults = default_parameters(source_of(name))
    given = read_file(options.f) if options.f else {}
    given |= {key: read_value(text, defaults.get(key)) for key, text in options.p}
    return check_parameters(name, defaults, given)


if __name__ == "__main__":
    sys.exit(main())
