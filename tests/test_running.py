"""Strict runs: what papermill lets pass is refused before it starts, a failure is never hidden, sweeps resume."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from dask.distributed import LocalCluster
from helpers import ROOT, Interruptible

from backpack_lib.files import locked_folder
from backpack_lib.running.__main__ import main
from backpack_lib.running.grid import Grid
from backpack_lib.running.notebook import run_notebook
from backpack_lib.running.parameters import read_parameters

PARAMETERS = """
steps = 3
rate = 0.5  # = a half
name = 'a # b'
fast = False
seed = None
out = ''
topics = []
words = ['a', 'b']
bounds = [0.1]
"""
WRITE = (
    "import json, pathlib; folder = pathlib.Path(out)\n"
    "results = {'headline': f'{steps} {name}', 'double': 2 * steps, 'nothing': float('nan')}\n"
    "(folder / 'results.json').write_text(json.dumps(results))"
)


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A suite of two small notebooks; returns a function that writes one more."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setenv("BACKPACK_NOTEBOOKS", str(folder))
    monkeypatch.setenv("BACKPACK_RUNS", str(tmp_path / "runs"))

    def add(name, *cells, parameters=PARAMETERS):
        tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
        title = nbformat.v4.new_markdown_cell(f"# {name}: $x_1$")
        notebook = nbformat.v4.new_notebook(cells=[title, tagged, *map(nbformat.v4.new_code_cell, cells)])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, folder / f"{name}.ipynb")
        return folder / f"{name}.ipynb"

    add("01_first", WRITE)
    add("02_second", "steps += 1", WRITE)
    return add


def strict_json(file):
    return json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in {file}"))


# ---------------------------------------------------------------- runs


def test_all_notebooks_run_in_order_and_a_failure_does_not_stop_the_others(suite, tmp_path, capfd):
    suite("01_a", "1 / 0", WRITE)
    assert main([]) == 1
    out, err = capfd.readouterr()
    assert "FAILED: cell 3: ZeroDivisionError: division by zero" in out
    assert "3 a # b" in out and "4 a # b" in out and str(tmp_path / "runs" / "01_first" / "01_first.ipynb") in out
    assert "[1/3] 01_a" in err and "[3/3] 02_second" in err
    assert (tmp_path / "runs" / "index.html").is_file()


MEET = """
import pathlib, time
place, since = pathlib.Path(out).parent, time.monotonic()
(place / f'here-{steps}').touch()
while len(list(place.glob('here-*'))) < 2:
    assert time.monotonic() < since + 60, 'the other does not run at the same time'
    time.sleep(0.05)
"""


def test_notebooks_run_side_by_side_and_are_listed_in_their_order(suite, tmp_path, capfd):
    suite("01_first", MEET, WRITE)
    suite("02_second", "steps += 1", MEET, WRITE)
    assert main(["--processes", "2"]) == 0
    out, err = capfd.readouterr()
    assert "[1/2] 01_first" in err and "[2/2] 02_second" in err
    assert out.index("01_first, ") < out.index("02_second, ") and (tmp_path / "runs" / "index.html").is_file()


def test_a_renamed_and_moved_copy_runs_and_its_results_are_strict_json(suite, tmp_path, capfd, monkeypatch):
    source = suite("03_third", WRITE)
    copy = tmp_path / "my {notes} 1" / "third {2}.ipynb"
    copy.parent.mkdir()
    source.rename(copy)
    monkeypatch.chdir(copy.parent)
    assert main(["third {2}.ipynb", "-p", "rate", "1e-3", "-p", "name", "1984"]) == 0
    assert main([str(copy), "-p", "out", "new {x}"]) == 0
    assert "3 1984" in capfd.readouterr().out
    results = strict_json(tmp_path / "runs" / "third {2}" / "results.json")
    assert results["nothing"] is None and results["double"] == 6
    assert results["parameters"]["rate"] == 0.001 and results["parameters"]["name"] == "1984"
    assert strict_json(copy.parent / "new {x}" / "results.json")["parameters"]["name"] == "a # b"
    assert (copy.parent / "new {x}" / "third {2}.ipynb").is_file()


def test_an_exception_inside_a_widget_fails_the_run(suite):
    widget = """
import ipywidgets
from IPython.display import display

def view(x):
    raise KeyError("in the callback")

display(ipywidgets.interactive(view, x=3))
"""
    suite("03_widget", widget, WRITE)
    outcome = run_notebook("03_widget", {})
    assert outcome.failed and "in a widget: KeyError" in outcome.result


def test_old_results_are_not_taken_for_new_ones(suite, tmp_path):
    folder = tmp_path / "runs" / "03_silent"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"headline": "old"}')
    suite("03_silent", "pass")
    assert "it wrote no results.json" in run_notebook("03_silent", {}).result


def test_two_runs_do_not_write_to_one_folder(suite, tmp_path, capfd):
    with locked_folder(tmp_path / "runs" / "01_first"):
        with pytest.raises(ValueError, match="Another run is writing to"):
            run_notebook("01_first", {})
    assert main(["01_first", "02_second", "-p", "out", str(tmp_path / "one")]) == 2
    assert "would all write to one `out`" in capfd.readouterr().err


# ---------------------------------------------------------------- parameters

WORDS = ["yes", "no", "on", "null", "1984", "12:30"]


def test_the_type_of_the_default_decides_what_was_written(suite, tmp_path):
    source, file = tmp_path / "notebooks" / "01_first.ipynb", tmp_path / "values.yaml"
    lists = f"[{', '.join(WORDS)}]"
    file.write_text(
        f"rate: 1e-3\nname: 12:30\ntopics: {lists}\nwords: {lists}\nbounds: [1e-3, 2]\nfast: true\nsteps: 7\n"
    )
    expected = {"rate": 0.001, "name": "12:30", "topics": WORDS, "words": WORDS, "bounds": [0.001, 2], "fast": True}
    assert read_parameters(source, str(file), []) == expected | {"steps": 7}
    pairs = [("words", lists), ("topics", ",".join(WORDS)), ("bounds", "[1e-3]"), ("name", "null"), ("seed", "5")]
    expected = {"words": WORDS, "topics": WORDS, "bounds": [0.001], "name": "null", "seed": 5}
    assert read_parameters(source, None, pairs) == expected
    assert read_parameters(source, str(file), [("name", "on"), ("words", "[]")])["name"] == "on"
    grid = Grid("01_first", {}, ["rate=1e-3,1", "name=yes,1984", "topics=[no, on],[null]", "words=a"])
    assert grid.axes == {
        "rate": [0.001, 1],
        "name": ["yes", "1984"],
        "topics": [["no", "on"], ["null"]],
        "words": [["a"]],
    }


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["-p", "step", "4"], "no parameter 'step'; it has: steps, rate, name, fast, seed, out, topics, words, bounds."),
        (["-p", "steps", "many"], "01_first: steps='many' should be of the same type as its default, 3."),
        (["-p", "bounds", "[1, two]"], "bounds=[1, 'two'] should be"),
        (["-f", "mapping.yaml"], "words={'a': 'b'} should be"),
        (["03_third"], "There is no notebook '03_third'; there are: 01_first, 02_second."),
        (["--grid", "steps=1,many"], "steps='many' should be"),
        (["-p", "steps", "1", "--grid", "steps=2"], "'steps' is given twice"),
    ],
)  # fmt: skip
def test_wrong_names_and_types_are_refused_before_anything_starts(
    suite, tmp_path, capfd, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    Path("mapping.yaml").write_text("words: {a: b}", encoding="utf-8")
    assert main(["01_first", *arguments] if arguments != ["03_third"] else arguments) == 2
    err = capfd.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ") and words in err
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- grids


def test_a_grid_runs_what_is_not_finished_and_a_kernel_that_dies_costs_its_run_only(suite, tmp_path, capfd):
    fail = "import os\nassert steps != 2, 'two is not allowed'\nif steps == 3: os.kill(os.getpid(), 9)"
    suite("01_first", fail, WRITE)
    axes = ["steps=1,2,3,4", "name=b {c}"]
    grid = Grid("01_first", {"rate": 0.25}, axes)
    first = next(iter(grid.runs))
    finished = {"headline": "done before", "double": -1, "minutes": 1.0, "parameters": grid.runs[first]}
    (grid.folder / first).mkdir(parents=True)
    (grid.folder / first / "results.json").write_text(json.dumps(finished))
    line = ["01_first", "-p", "rate", "0.25", "--processes", "1", "--grid", axes[0], "--grid", axes[1]]
    assert main(line) == 1
    out, err = capfd.readouterr()
    assert "two is not allowed" in err and "DeadKernelError" in err and "4/4" in err and str(grid.file) in out
    table = pd.read_csv(tmp_path / "runs" / "01_first-grid" / "table.csv")
    assert table[["steps", "name", "double"]].values.tolist() == [[1, "b {c}", -1], [4, "b {c}", 8]]


def test_a_run_is_finished_if_its_results_have_its_parameters(suite):
    def finished(grid):
        return [grid.results_of(run) is not None for run in grid.runs]

    grid = Grid("01_first", {"rate": 0.25}, ["steps=1,2"])
    run, other = grid.runs
    for name in grid.runs:
        (grid.folder / name).mkdir(parents=True)
    results = grid.folder / run / "results.json"
    results.write_text(json.dumps({"headline": "of the notebook, before its last cell"}))
    (grid.folder / other / "results.json").write_text('{"headline": "cut o')
    assert finished(grid) == [False, False]
    results.write_text(json.dumps({"headline": "done", "parameters": grid.runs[run]}))
    assert finished(grid) == [True, False]
    assert not any(
        set(name) & set("/:[] '\"") for name in Grid("01_first", {}, ["topics=[a, b],[c]", "name=x/y,x:y"]).runs
    )
    # Grids with other parameters or other code, in the same folder, have runs of their own.
    assert not set(Grid("01_first", {"rate": 0.75}, ["steps=1,2"]).runs) & set(grid.runs)
    suite("01_first", "steps *= 2", WRITE)
    assert not set(Grid("01_first", {"rate": 0.25}, ["steps=1,2"]).runs) & set(grid.runs)


def test_runs_at_the_same_time_have_a_gpu_each(suite, tmp_path, monkeypatch):
    write = WRITE.replace("'nothing'", "'gpu': os.environ['CUDA_VISIBLE_DEVICES'], 'nothing'")
    suite("03_gpu", MEET, f"import os; {write}", parameters=f"{PARAMETERS}device = 'auto'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    grid = Grid("03_gpu", {}, ["steps=1,2"])
    assert grid.run() == [] and set(grid.table()["gpu"]) == {"3", "5"}


def test_a_cluster_runs_a_grid_and_a_failure_is_told(suite, tmp_path):
    suite("01_first", "assert steps != 2, 'two is not allowed'", WRITE)
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        grid = Grid("01_first", {}, ["steps=1,2"])
        (failed,) = grid.run(scheduler=cluster.scheduler_address)
    assert failed.startswith("steps=2") and list(grid.table()["steps"]) == [1]


@pytest.mark.slow
def test_a_grid_that_is_interrupted_resumes_and_keeps_another_out(suite, tmp_path):
    wait = "import os, time; time.sleep(0 if steps < 3 or os.path.exists('fast') else 600)"
    suite("01_first", wait, WRITE)
    command = [sys.executable, "-m", "backpack_lib.running", "01_first", "--grid", "steps=1,2,3,4", "--processes", "2"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = Interruptible(command, cwd=tmp_path, env=env)
    grid = Grid("01_first", {}, ["steps=1,2,3,4"])
    while sum(grid.results_of(name) is not None for name in grid.runs) < 2:
        assert run.poll() is None
        time.sleep(0.1)
    with pytest.raises(ValueError, match="Another run is writing to"):
        grid.run()
    err = run.interrupt()
    assert run.returncode == 130 and "The same line resumes" in err and "Traceback" not in err
    (tmp_path / "fast").touch()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "2/4" in done.stderr, done.stderr
    assert list(pd.read_csv(grid.file)["steps"]) == [1, 2, 3, 4]


# ---------------------------------------------------------------- notebooks of one's own


def test_notebooks_are_copied_to_where_a_person_works_and_what_was_changed_there_is_kept(suite, tmp_path, capfd):
    (tmp_path / "notebooks" / "README.md").write_text("A course.")
    mine = tmp_path / "my work"
    assert main(["--notebooks", str(mine)]) == 0
    assert sorted(path.name for path in mine.iterdir()) == ["01_first.ipynb", "02_second.ipynb", "README.md"]
    (mine / "01_first.ipynb").write_text("changed")
    (mine / "02_second.ipynb").unlink()
    assert main(["--notebooks", str(mine)]) == 0
    assert "01_first.ipynb is yours, and was left as it is" in capfd.readouterr().err
    assert (mine / "01_first.ipynb").read_text() == "changed" and (mine / "02_second.ipynb").is_file()
