"""Strict runs: what papermill lets pass is refused before it starts, and a failure is never hidden."""

import json
import os
import socket
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest
from helpers import ROOT, Interruptible
from jupyter_client.connect import LocalPortCache

from backpack_lib.files import locked_folder
from backpack_lib.running.__main__ import main, summary
from backpack_lib.running.grid import FINISHED, Grid
from backpack_lib.running.notebook import Outcome, run_notebook
from backpack_lib.running.parameters import default_parameters

PARAMETERS = (
    "steps = 3\nrate = 0.5\nname = 'a'\nfast = False\nseed = None\nout = ''\ntopics = ['a', 'b']\nsizes = [1, 2]"
)
WRITE = (
    "import json, pathlib; folder = pathlib.Path(out or default)\n"
    "(folder / 'results.json').write_text(json.dumps({'headline': f'{steps} {rate} {name} {fast}'}))"
)


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A suite of two small notebooks; returns a function that writes one more."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setenv("BACKPACK_NOTEBOOKS", str(folder))
    monkeypatch.setenv("BACKPACK_RUNS", str(tmp_path / "runs"))

    def add(name, *cells):
        parameters = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
        default = nbformat.v4.new_code_cell(f"default = {str(tmp_path / 'runs' / name)!r}")
        title = nbformat.v4.new_markdown_cell(f"# {name}: $x_1$")
        notebook = nbformat.v4.new_notebook(cells=[title, parameters, default, *map(nbformat.v4.new_code_cell, cells)])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, folder / f"{name}.ipynb")

    add("01_first", WRITE)
    add("02_second", "steps += 1", WRITE)
    return add


def test_all_notebooks_in_order_and_a_table_of_results(suite, tmp_path, capfd):
    assert main([]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["notebook", "minutes", "result"]
    assert lines[1].startswith("01_first") and lines[1].endswith("3 0.5 a False")
    assert lines[2].strip() == str(tmp_path / "runs" / "01_first" / "01_first.ipynb")
    assert lines[3].endswith("4 0.5 a False")
    assert "[1/2] 01_first" in err and "[2/2] 02_second" in err and "cell" in err
    assert "WARNING" not in err


def test_parameters_from_flags_and_files_are_read_as_their_defaults_are(suite, tmp_path, capfd):
    file = tmp_path / "values.yaml"
    file.write_text("steps: 7\nname: b\n")
    assert main(["01_first", "-f", str(file), "-p", "name", "2024", "-p", "rate", "1e-3", "-p", "fast", "true"]) == 0
    assert "7 0.001 2024 True" in capfd.readouterr().out


def test_results_go_where_out_says(suite, tmp_path):
    outcome = run_notebook("01_first", {"out": str(tmp_path / "hère and there")})
    assert not outcome.failed and outcome.copy == tmp_path / "hère and there" / "01_first.ipynb"
    assert outcome.copy.is_file()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["-p", "step", "4"],
            "01_first has no parameter 'step'; it has: steps, rate, name, fast, seed, out, topics, sizes.",
        ),
        (["-p", "steps", "many"], "01_first: steps='many' should be of type int, like its default 3."),
        (["-p", "steps", "2.5"], "steps=2.5 should be of type int"),
        (["-p", "steps", "true"], "steps=True should be of type int"),
        (["-p", "rate", "high"], "rate='high' should be of type float"),
        (["-p", "fast", "1"], "fast=1 should be of type bool"),
        (["03_third"], "There is no notebook '03_third'; there are: 01_first, 02_second."),
        (["-f", "missing.yaml"], "missing.yaml"),
        (["-p", "topics", "[1, 2]"], "each entry of topics=[1, 2] should be of type str"),
        (["-p", "sizes", "1,two"], "each entry of sizes=[1, 'two'] should be of type int"),
        (["--grid", "step=1,2"], "has no parameter 'step'"),
        (["--grid", "steps=1,many"], "steps='many' should be of type int"),
        (["--grid", "steps=1,2.5"], "steps=2.5 should be of type int"),
        (["--grid", "steps="], "The grid gives no value for 'steps'; write for example --grid steps=1,2,3."),
        (["--grid", "steps= , "], "The grid gives no value for 'steps'"),
        (["--grid", "steps"], "The grid 'steps' should be written as name=v1,v2."),
        (["--grid", "steps=1,2,1"], "The grid gives 'steps' a value twice"),
        (["--grid", "steps=1", "--grid", "steps=2"], "'steps' is given twice"),
        (["-p", "steps", "1", "--grid", "steps=2"], "'steps' is given twice"),
        (["--grid", "out=a,b"], "`out` cannot be in a grid"),
        (["--grid", "steps=1,2", "--processes", "-1"], "processes=-1 should be at least 1"),
        (["01_first", "02_second", "--grid", "steps=1"], "A grid is of one notebook"),
    ],
)
def test_wrong_names_and_types_are_refused_before_anything_starts(suite, tmp_path, capfd, arguments, words):
    assert main(["01_first", *arguments] if arguments[0].startswith("-") else arguments) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_failing_cell_fails_the_run_and_the_others_go_on(suite, capfd):
    suite("01_a", "1 / 0", WRITE)
    assert main([]) == 1
    out = capfd.readouterr().out
    assert "FAILED: cell 3: ZeroDivisionError: division by zero" in out
    assert "4 0.5 a False" in out


def test_an_exception_inside_a_widget_fails_the_run(suite):
    widget = """
import ipywidgets
from IPython.display import display

def view(x):
    raise KeyError("in the callback")

display(ipywidgets.interactive(view, x=3))
"""
    suite("03_widget", widget, WRITE)
    outcome = run_notebook("03_widget")
    assert outcome.failed and "in a widget: KeyError" in outcome.result


def test_a_notebook_without_results_fails(suite):
    suite("03_silent", "pass")
    assert "it wrote no results.json" in run_notebook("03_silent").result


@pytest.mark.parametrize("kernels, result", [(1, "3 0.5 a False"), (3, "FAILED: RuntimeError: Kernel died before")])
def test_a_kernel_that_finds_its_port_taken_is_started_anew(suite, monkeypatch, kernels, result):
    find = LocalPortCache.find_available_port
    with socket.create_server(("127.0.0.1", 0)) as other:
        ports = [other.getsockname()[1]] * 5 * kernels  # a kernel has five
        monkeypatch.setattr(
            LocalPortCache, "find_available_port", lambda self, ip: ports.pop() if ports else find(self, ip)
        )
        outcome = run_notebook("01_first", progress_bar=False)
    assert outcome.result.startswith(result) and not ports


def test_a_cell_that_speaks_of_a_dead_kernel_is_not_run_again(suite, tmp_path):
    suite("03_once", "open(f'{default}/ran', 'a').write('x')", "raise RuntimeError('Kernel died before replying')")
    assert run_notebook("03_once").result == "FAILED: cell 4: RuntimeError: Kernel died before replying"
    assert (tmp_path / "runs" / "03_once" / "ran").read_text() == "x"


def test_old_results_are_not_taken_for_new_ones(suite):
    suite("03_once", WRITE)
    assert not run_notebook("03_once").failed
    suite("03_once", "pass")
    assert run_notebook("03_once").failed


def test_default_parameters_are_the_literals_of_the_tagged_cell(suite, tmp_path):
    values = default_parameters(tmp_path / "notebooks" / "01_first.ipynb")
    scalars = {"steps": 3, "rate": 0.5, "name": "a", "fast": False, "seed": None, "out": ""}
    assert values == scalars | {"topics": ["a", "b"], "sizes": [1, 2]}


def test_table_is_aligned():
    from pathlib import Path

    outcomes = [
        Outcome("01_a", 0.5, "good", Path("x"), False),
        Outcome("02_longer", 12, "fine", Path("y"), False),
    ]
    lines = summary(outcomes).splitlines()
    assert lines[1].index("good") == lines[3].index("fine") == lines[0].index("result")
    assert json.dumps(lines)


# ---------------------------------------------------------------- grids


def test_lists_are_written_with_commas_or_as_in_python(suite, capfd):
    suite("03_lists", WRITE.replace("{fast}", "{topics} {sizes}"))
    assert main(["03_lists", "-p", "topics", "sports, music", "-p", "sizes", "7"]) == 0
    assert "['sports', 'music'] [7]" in capfd.readouterr().out
    assert main(["03_lists", "-p", "topics", "[film, tv]", "-p", "sizes", "[]"]) == 0
    assert "['film', 'tv'] []" in capfd.readouterr().out


@pytest.mark.parametrize("names", [["b c"], pytest.param(["a", "b c"], marks=pytest.mark.slow)], ids=len)
def test_a_grid_runs_each_combination_once_and_gathers_a_table(suite, tmp_path, capfd, names):
    suite(
        "01_first",
        "assert steps != 2, 'two is not allowed'",
        WRITE.replace("'headline'", "'double': 2 * steps, 'headline'"),
    )
    line = ["01_first", "-p", "rate", "0.25", "--grid", "steps=1,2", "--grid", f"name={','.join(names)}"]
    assert main(line) == 1
    out, err = capfd.readouterr()
    assert "two is not allowed" in err and f"{2 * len(names)}/{2 * len(names)}" in err
    assert all(f"steps=2,name={name.replace(' ', '_')}" in err for name in names)
    folder = tmp_path / "runs" / "01_first-grid"
    made = pd.read_csv(folder / "table.csv")
    assert list(made["steps"]) == [1] * len(names) and list(made["name"]) == names
    assert (made["double"] == 2 * made["steps"]).all() and made["headline"].str.contains("0.25").all()
    assert str(folder / "table.csv") in out and "b c" in out
    copies = {copy: copy.stat().st_mtime_ns for copy in folder.glob("*/01_first.ipynb")}
    assert len(copies) == 2 * len(names)

    suite(
        "01_first",
        "assert steps != 2, 'two is not allowed'",
        WRITE.replace("'headline'", "'double': 2 * steps, 'headline'"),
    )
    main([*line, "--processes", "1"])  # the same notebook again: only what failed is tried again
    again = {copy for copy, written in copies.items() if copy.stat().st_mtime_ns != written}
    assert len(again) == len(names) and all("steps=2" in copy.parent.name for copy in again)
    suite("01_first", WRITE.replace("'headline'", "'double': 2 * steps, 'headline'"))
    assert main([*line, "--processes", "1"]) == 0  # other code: all of them
    assert len(pd.read_csv(folder / "table.csv")) == 2 * len(names)


def test_values_of_a_grid_can_be_lists_and_get_folders_that_any_disk_takes(suite, tmp_path):
    grid = Grid("01_first", {}, ["topics=[a, b], [c]", "name=x/y,x:y,x_y"])
    points = list(grid.points())
    assert [point["topics"] for point in points[::3]] == [["a", "b"], ["c"]]
    folders = {grid.folder_of(point).name for point in points}
    assert len(folders) == 6 and not any(set(name) & set("/:[] '\"") for name in folders)


@pytest.mark.slow
def test_a_grid_that_is_stopped_says_what_is_left_and_goes_on(suite, tmp_path):
    suite(
        "01_first",
        "import time; time.sleep(2 if steps < 3 else 600 * (not __import__('os').path.exists('fast')))",
        WRITE,
    )
    command = [sys.executable, "-m", "backpack_lib.running", "01_first", "--grid", "steps=1,2,3,4", "--processes", "2"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = Interruptible(command, cwd=tmp_path, env=env)
    folder = tmp_path / "runs" / "01_first-grid"
    for _ in range(600):
        if len(list(folder.glob(f"*/{FINISHED}"))) == 2:
            break
        time.sleep(0.1)
    other = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert other.returncode == 2 and "Another run is writing to" in other.stderr
    err = run.interrupt()
    assert run.returncode == 130
    assert "Stopped with 2 of 4 runs finished; the same line goes on with the others." in err and "Traceback" not in err
    (tmp_path / "fast").touch()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(pd.read_csv(folder / "table.csv")) == 4


KILL_THE_WORKER = """
import os, pathlib, signal, time
killed = pathlib.Path(out).parent / f'killed-{steps}'
if steps == 2 or (steps == 1 and not killed.exists()):
    killed.touch()
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_its_run_only_which_is_tried_once_more(suite, tmp_path, capfd):
    suite("01_first", KILL_THE_WORKER, WRITE)
    assert main(["01_first", "--grid", "steps=1,2,3,4,5", "--processes", "2"]) == 1
    err = capfd.readouterr().err
    assert "steps=2: FAILED: its process was killed, and again when it was tried once more" in err
    assert "Traceback" not in err
    assert sorted(pd.read_csv(tmp_path / "runs" / "01_first-grid" / "table.csv")["steps"]) == [1, 3, 4, 5]


@pytest.fixture
def cluster(tmp_path):
    """The address file of a scheduler with two workers, each a process as it would be on another machine."""
    file, env = tmp_path / "scheduler.json", os.environ | {"PYTHONPATH": str(ROOT)}
    started = []

    def start(what, *flags):
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", "--no-dashboard", "--scheduler-file", file]
        with open(tmp_path / f"{len(started)}.log", "w") as log:
            started.append(subprocess.Popen([*command, *flags], cwd=tmp_path, env=env, stderr=log, stdout=log))

    start("scheduler", "--host", "127.0.0.1", "--port", "0")
    for _ in range(2):
        start("worker", "--nthreads", "1", "--no-nanny", "--local-directory", str(tmp_path))
    yield file
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_grid_on_a_cluster_survives_a_machine_that_is_lost(suite, cluster, tmp_path, capfd):
    suite("01_first", KILL_THE_WORKER, WRITE.replace("'headline'", "'worker': os.getppid(), 'headline'"))
    for _ in range(600):
        if cluster.is_file():
            break
        time.sleep(0.1)
    assert main(["01_first", "--grid", "steps=1,3,4,5", "--scheduler", str(cluster)]) == 0
    made = pd.read_csv(tmp_path / "runs" / "01_first-grid" / "table.csv")
    assert list(made["steps"]) == [1, 3, 4, 5] and made["worker"].nunique() <= 2


def test_a_scheduler_that_does_not_answer_is_named(suite, capfd, monkeypatch):
    monkeypatch.setattr("backpack_lib.running.cluster.SECONDS_TO_ANSWER", 1)
    assert main(["01_first", "--grid", "steps=1,2", "--scheduler", "tcp://127.0.0.1:9"]) == 2
    err = capfd.readouterr().err.splitlines()[-1]
    assert err.startswith("error: No scheduler of dask's answers at 'tcp://127.0.0.1:9'; start one by `dask scheduler`")


def test_runs_of_a_cluster_need_a_disk_that_all_share_and_the_same_notebook(suite, tmp_path):
    grid = Grid("01_first", {}, ["steps=1,2"])
    point = {"steps": 1}

    class Done:  # a future of a run that ended well, elsewhere
        def result(self):
            return Outcome("01_first", 0.1, "fine", tmp_path, failed=False)

    assert "which has to lie on a disk that all share" in grid.outcome_of(Done(), point).result
    suite("01_first", "pass", WRITE)
    with pytest.raises(ValueError, match="01_first has other code on this machine than where the grid was begun"):
        grid.run_point(point, [])


@pytest.mark.slow
def test_each_run_of_a_grid_has_a_gpu_to_itself(suite, tmp_path, monkeypatch):
    suite("01_first", "device = 'auto'")  # makes it a run that may use one
    notebook = nbformat.read(tmp_path / "notebooks" / "01_first.ipynb", 4)
    notebook.cells[1].source += "\ndevice = 'auto'"
    start = "import os, time; began = time.time(); time.sleep(1); seen = os.environ.get('CUDA_VISIBLE_DEVICES')"
    end = WRITE.replace("'headline'", "'gpu': seen, 'began': began, 'ended': time.time(), 'headline'")
    notebook.cells[-1:] = [nbformat.v4.new_code_cell(start), nbformat.v4.new_code_cell(end)]
    nbformat.write(notebook, tmp_path / "notebooks" / "01_first.ipynb")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    outcomes = Grid("01_first", {}, ["steps=1,2,3,4"]).run()
    assert not any(outcome.failed for outcome in outcomes)
    made = pd.read_csv(tmp_path / "runs" / "01_first-grid" / "table.csv").sort_values("began")
    assert set(made["gpu"]) == {3, 5}
    for _, of_one in made.groupby("gpu"):
        assert (of_one["began"].iloc[1:].to_numpy() >= of_one["ended"].iloc[:-1].to_numpy()).all()
    Grid("01_first", {"device": "cpu"}, ["steps=1"]).run()


# ---------------------------------------------------------------- notebooks of one's own


def test_notebooks_are_copied_to_where_a_person_works_and_what_was_changed_there_is_kept(suite, tmp_path, capfd):
    (tmp_path / "notebooks" / "README.md").write_text("A course.")
    mine = tmp_path / "my work"
    assert main(["--notebooks", str(mine)]) == 0
    assert "2 notebooks are in" in capfd.readouterr().out
    assert sorted(path.name for path in mine.iterdir()) == ["01_first.ipynb", "02_second.ipynb", "README.md"]
    (mine / "01_first.ipynb").write_text("changed")
    (mine / "02_second.ipynb").unlink()
    assert main(["--notebooks", str(mine)]) == 0
    err = capfd.readouterr().err
    assert "01_first.ipynb is yours, and was left as it is" in err and len(err.splitlines()) == 1
    assert (mine / "01_first.ipynb").read_text() == "changed" and (mine / "02_second.ipynb").is_file()


def test_a_notebook_of_ones_own_is_run_by_its_path_and_not_the_suites_of_that_name(suite, tmp_path, capfd):
    mine = tmp_path / "mine" / "01_first.ipynb"
    mine.parent.mkdir()
    notebook = nbformat.read(tmp_path / "notebooks" / "01_first.ipynb", 4)
    notebook.cells[-1:-1] = [nbformat.v4.new_code_cell("name = 'mine'")]
    nbformat.write(notebook, mine)
    assert main([str(mine), "-p", "steps", "9"]) == 0
    assert "9 0.5 mine False" in capfd.readouterr().out
    grid = Grid(str(mine), {}, ["steps=8"])
    assert grid.folder == tmp_path / "runs" / "01_first-grid"
    assert grid.run_point({"steps": 8}, []).result == "8 0.5 mine False"
    assert main(["01_first", "-p", "steps", "9"]) == 0
    assert "9 0.5 a False" in capfd.readouterr().out
    assert main([str(tmp_path / "mine" / "02_second.ipynb")]) == 2
    assert "There is no notebook" in capfd.readouterr().err


# ---------------------------------------------------------------- folders


def test_two_runs_do_not_write_to_one_folder(suite, tmp_path):
    with locked_folder(tmp_path / "runs" / "01_first"):
        with pytest.raises(ValueError, match="Another run is writing to .*; wait for it, or choose another `out`"):
            run_notebook("01_first")
        assert not run_notebook("01_first", {"out": str(tmp_path / "other")}).failed
    assert not run_notebook("01_first").failed


def test_a_folder_that_cannot_be_written_is_named(suite, tmp_path, capfd):
    (tmp_path / "file").write_text("no folder")
    assert main(["01_first", "-p", "out", str(tmp_path / "file" / "runs")]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: The folder") and "cannot be written (Not a directory)" in last
