"""Runs notebooks from the command line."""

import argparse
import shlex
import shutil
import sys
from pathlib import Path

import yaml

from backpack_lib.files import notebooks_folder, runs_folder
from backpack_lib.running.notebook import Outcome, as_they_end, environments_of, run_notebook
from backpack_lib.running.parameters import ordered_notebooks, read_parameters, source_of


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m backpack_lib.running", description=__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="notebook", help="01_training, or mine/01_training.ipynb; none: all")
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    add("-f", metavar="FILE", help="parameters from a YAML file")
    add("--grid", action="append", default=[], metavar="NAME=V1,V2", help="a run for each value, or each combination")
    add("--processes", type=int, default=0, help="runs at a time; 0: of a grid one a GPU or one a core, else 1")
    add("--scheduler", default="", help="of a dask cluster to run a grid on: tcp://..., or its file")
    add("--notebooks", nargs="?", const="notebooks", metavar="FOLDER", help="only copy the notebooks to a folder")
    options = parser.parse_args(arguments)
    try:
        if options.notebooks:
            return _copy_notebooks(Path(options.notebooks))
        return _run_grid(options) if options.grid else _run_in_order(options)
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same line resumes from the last checkpoint, or from what is finished.", file=sys.stderr)
        return 130


def _copy_notebooks(folder: Path) -> int:
    """Copies the suite's notebooks to where a person works. What has been changed there is left as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in [*notebooks_folder().glob("*.ipynb"), *notebooks_folder().glob("README.md")]:
        target = folder / source.name
        if not target.exists():
            shutil.copyfile(source, target)
        elif target.read_bytes() != source.read_bytes():
            print(f"{target} is yours, and was left as it is; to renew it, move it away first.", file=sys.stderr)
    print(f"The notebooks are in {folder}; open them with: jupyter lab {shlex.quote(str(folder))}")
    return 0


def _run_in_order(options) -> int:
    # All are checked before any of them starts.
    sources = {name: source_of(name) for name in options.names or ordered_notebooks()}
    plans = {name: read_parameters(source, options.f, options.p) for name, source in sources.items()}
    if len(plans) > 1 and any("out" in given for given in plans.values()):
        raise ValueError("These notebooks would all write to one `out`; run them one by one.")
    at_once, order = max(1, min(options.processes, len(plans))), list(plans)

    def run(name: str, environment: dict) -> tuple[int, Outcome]:
        place = order.index(name)
        print(f"[{place + 1}/{len(order)}] {sources[name].stem}", file=sys.stderr, flush=True)
        return place, run_notebook(name, plans[name], progress_bar=at_once == 1, environment=environment)

    outcomes = [outcome for _, outcome in sorted(as_they_end(run, order, environments_of(at_once)))]
    for outcome in outcomes:
        print(f"{outcome.notebook}, {outcome.minutes:.1f} minutes: {outcome.result}\n    {outcome.copy}")
    if not options.names:
        from backpack_lib.running.pages import write_index

        print(f"All of them as pages: {write_index(outcomes, runs_folder())}")
    return int(any(outcome.failed for outcome in outcomes))


def _run_grid(options) -> int:
    from backpack_lib.running.grid import Grid

    if len(options.names) != 1:
        raise ValueError(f"A grid is of one notebook; name one of {', '.join(ordered_notebooks())}.")
    (name,) = options.names
    grid = Grid(name, read_parameters(source_of(name), options.f, options.p), options.grid)
    failed = grid.run(options.processes, options.scheduler)
    print(grid.table().reindex(columns=[*grid.axes, "minutes", "headline"]).to_string(index=False))
    print(f"All numbers: {grid.file}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
