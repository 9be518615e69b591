"""Runs notebooks from the command line."""

import argparse
import sys
from pathlib import Path

from backpack_lib.files import runs_folder, use_writable_home
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
    parser.add_argument("--processes", type=int, default=0, help="of a grid, at a time; 0: one a GPU, or one a core")
    parser.add_argument("--scheduler", default="", help="of a dask cluster to run a grid on: tcp://..., or its file")
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
    print(summary(outcomes))
    if not options.notebooks:
        from backpack_lib.running.pages import write_index

        print(f"All of them as pages: {write_index(outcomes, runs_folder())}")
    return int(any(outcome.failed for outcome in outcomes))


def _run_grid(options) -> int:
    from backpack_lib.running.grid import Grid

    if len(options.notebooks) != 1:
        raise ValueError(f"A grid is of one notebook; name one of {', '.join(ordered_notebooks())}.")
    name = Path(options.notebooks[0]).stem
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
