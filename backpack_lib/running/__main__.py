"""Runs notebooks from the command line."""

import argparse
import shlex
import shutil
import sys
from pathlib import Path

from backpack_lib.files import notebooks_folder, runs_folder
from backpack_lib.running.notebook import Outcome, run_notebook
from backpack_lib.running.parameters import (
    check_parameters,
    default_parameters,
    ordered_notebooks,
    read_file,
    read_value,
    source_of,
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m backpack_lib.running", description=__doc__.split("\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="notebook", help="01_training, or mine/01_training.ipynb; none: all"
    )
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    parser.add_argument("-f", metavar="FILE", help="parameters from a YAML file")
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=V1,V2",
        help="run once for each value; several: for each pair",
    )
    parser.add_argument("--processes", type=int, default=0, help="of a grid, at a time; 0: one a GPU, or one a core")
    parser.add_argument("--scheduler", default="", help="of a dask cluster to run a grid on: tcp://..., or its file")
    parser.add_argument(
        "--notebooks",
        nargs="?",
        const="notebooks",
        metavar="FOLDER",
        help="run nothing: copy the notebooks to a folder",
    )
    options = parser.parse_args(arguments)
    try:
        if options.notebooks:
            return _copy_notebooks(Path(options.notebooks))
        return _run_grid(options) if options.grid else _run_in_order(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        resumes = "The same line resumes: training from its last checkpoint, studies from what they have finished."
        print(str(interrupt) or f"Stopped. {resumes}", file=sys.stderr)
        return 130


def _copy_notebooks(folder: Path) -> int:
    """Copies the suite's notebooks to where a person works. What has been changed there is left as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [source_of(name) for name in ordered_notebooks()]
    for source in [*sources, *notebooks_folder().glob("README.md")]:
        target = folder / source.name
        if not target.exists():
            shutil.copyfile(source, target)
        elif target.read_bytes() != source.read_bytes():
            print(f"{target} is yours, and was left as it is; to renew it, move it away first.", file=sys.stderr)
    first = folder / sources[0].name
    print(f"{len(sources)} notebooks are in {folder}; open them with: jupyter lab {shlex.quote(str(first))}")
    return 0


def _run_in_order(options) -> int:
    names = options.names or ordered_notebooks()
    # All are checked before any of them starts.
    plans = {name: _parameters_for(name, options) for name in names}
    outcomes = []
    for number, (name, parameters) in enumerate(plans.items(), start=1):
        print(f"[{number}/{len(plans)}] {Path(name).stem}", file=sys.stderr, flush=True)
        outcomes.append(run_notebook(name, parameters))
    print(summary(outcomes))
    if not options.names:
        from backpack_lib.running.pages import write_index

        print(f"All of them as pages: {write_index(outcomes, runs_folder())}")
    return int(any(outcome.failed for outcome in outcomes))


def _run_grid(options) -> int:
    from backpack_lib.running.grid import Grid

    if len(options.names) != 1:
        raise ValueError(f"A grid is of one notebook; name one of {', '.join(ordered_notebooks())}.")
    (name,) = options.names
    grid = Grid(name, _parameters_for(name, options), options.grid)
    outcomes = grid.run(options.processes, options.scheduler)
    print(grid.table()[[*grid.axes, "minutes", "headline"]].to_string(index=False))
    print(f"All numbers: {grid.file}")
    return int(any(outcome.failed for outcome in outcomes))


def _parameters_for(name: str, options) -> dict:
    """A notebook's parameters from the file and the flags, the flags last."""
    defaults = default_parameters(source_of(name))
    given = read_file(options.f) if options.f else {}
    given |= {key: read_value(text, defaults.get(key)) for key, text in options.p}
    return check_parameters(name, defaults, given)


def summary(outcomes: list[Outcome]) -> str:
    """One line a notebook: name, minutes, result; and below each the path of the executed copy."""
    width = max(len(outcome.notebook) for outcome in outcomes)
    lines = [f"{'notebook':{width}}  minutes  result"]
    for o in outcomes:
        lines.append(f"{o.notebook:{width}}  {o.minutes:7.1f}  {o.result}")
        lines.append(f"{'':{width}}           {o.copy}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
