"""Strict runs of the notebooks by papermill.

    python -m backpack_lib.running                                   all of them, in order
    python -m backpack_lib.running 01_training -p steps 2000         one, with another parameter
    python -m backpack_lib.running 01_training -f parameters.yaml

What papermill lets pass is refused here before anything starts: a parameter that the notebook does not
have, and a value of another type. And an exception inside a widget's callback, which leaves no trace
in papermill's exit status, fails the run. Each executed copy lies in its folder under `runs/`, with
the notebook's results beside it.
"""

import argparse
import ast
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from backpack_lib.errors import first_line
from backpack_lib.paths import notebooks_folder, runs_folder

RESULTS = "results.json"  # written by each notebook beside its executed copy; `headline` is one line


@dataclass
class Outcome:
    """What became of one notebook."""

    notebook: str
    minutes: float
    result: str
    copy: Path
    failed: bool


def ordered_notebooks() -> list[str]:
    """Names of the suite's notebooks, in reading order."""
    return sorted(path.stem for path in notebooks_folder().glob("[0-9][0-9]_*.ipynb"))


def default_parameters(notebook: Path) -> dict:
    """Names and default values in a notebook's cell tagged `parameters`."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if "parameters" in cell["metadata"].get("tags", []):
            assignments = ast.parse("".join(cell["source"])).body
            return {a.targets[0].id: ast.literal_eval(a.value) for a in assignments if isinstance(a, ast.Assign)}
    return {}


def check_parameters(name: str, defaults: dict, given: dict) -> dict:
    """The given parameters, checked against the defaults. Raises ValueError for unknown names and wrong types."""
    unknown = [key for key in given if key not in defaults]
    if unknown:
        known = ", ".join(defaults) or "none"
        raise ValueError(f"{name} has no parameter {', '.join(map(repr, unknown))}; it has: {known}.")
    for key, value in given.items():
        default = defaults[key]
        fits = default is None or type(value) is type(default) or (type(value), type(default)) == (int, float)
        if not fits:
            raise ValueError(
                f"{name}: {key}={value!r} should be of type {type(default).__name__}, like its default {default!r}."
            )
    return given


def read_value(text: str, default):
    """A parameter from the shell, read as the type of its default; as it stands where that fails."""
    if isinstance(default, str):
        return text
    try:
        return float(text) if isinstance(default, float) else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text


def source_of(name: str) -> Path:
    source = notebooks_folder() / f"{name}.ipynb"
    if not source.is_file():
        raise ValueError(f"There is no notebook {name!r}; there are: {', '.join(ordered_notebooks())}.")
    return source


def run_notebook(name: str, given: dict | None = None) -> Outcome:
    """Executes one notebook; its copy and results go to its parameter `out`, or to `runs/<name>`.

    Raises ValueError, before anything starts, for an unknown notebook, parameter name or type.
    """
    source = source_of(name)
    parameters = check_parameters(name, default_parameters(source), given or {})
    folder = Path(parameters.get("out") or runs_folder() / name)
    folder.mkdir(parents=True, exist_ok=True)
    copy, results = folder / f"{name}.ipynb", folder / RESULTS
    results.unlink(missing_ok=True)
    started = time.monotonic()
    failure = _execute(source, copy, parameters) or _widget_failure(copy)
    minutes = (time.monotonic() - started) / 60
    if failure is None and not results.is_file():
        failure = f"it wrote no {RESULTS}"
    result = f"FAILED: {failure}" if failure else json.loads(results.read_text(encoding="utf-8"))["headline"]
    return Outcome(name, minutes, result, copy, failed=failure is not None)


def _execute(source: Path, copy: Path, parameters: dict) -> str | None:
    """Runs a notebook into `copy`. Returns what went wrong in one line, or None."""
    import papermill

    try:
        papermill.execute_notebook(
            str(source), str(copy), parameters, kernel_name="python3", extra_arguments=["--IPKernelApp.log_level=ERROR"]
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
    options = parser.parse_args(arguments)
    try:
        names = [Path(name).stem for name in options.notebooks] or ordered_notebooks()
        # All are checked before any of them starts.
        plans = {name: _parameters_for(name, options) for name in names}
        outcomes = []
        for number, (name, parameters) in enumerate(plans.items(), start=1):
            print(f"[{number}/{len(plans)}] {name}", file=sys.stderr, flush=True)
            outcomes.append(run_notebook(name, parameters))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. Training goes on from its last checkpoint when this is run again.", file=sys.stderr)
        return 130
    print(table(outcomes))
    return int(any(outcome.failed for outcome in outcomes))


def _parameters_for(name: str, options) -> dict:
    """A notebook's parameters from the file and the flags, the flags last."""
    defaults = default_parameters(source_of(name))
    given = {}
    if options.f:
        given = yaml.safe_load(Path(options.f).read_text(encoding="utf-8")) or {}
        if not isinstance(given, dict):
            raise ValueError(f"{options.f} should hold lines of the form `name: value`.")
    given |= {key: read_value(text, defaults.get(key)) for key, text in options.p}
    return check_parameters(name, defaults, given)


if __name__ == "__main__":
    sys.exit(main())
