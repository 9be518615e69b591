"""Strict runs: what papermill lets pass is refused before it starts, and a failure is never hidden."""

import json

import nbformat
import pytest

from backpack_lib import running
from backpack_lib.running import default_parameters, main, run_notebook, table

PARAMETERS = "steps = 3\nrate = 0.5\nname = 'a'\nfast = False\nseed = None\nout = ''"
WRITE = "import json, pathlib; folder = pathlib.Path(out or default)\n(folder / 'results.json').write_text(json.dumps({'headline': f'{steps} {rate} {name} {fast}'}))"


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A suite of two small notebooks; returns a function that writes one more."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(running, "notebooks_folder", lambda: folder)
    monkeypatch.setenv("BACKPACK_RUNS", str(tmp_path / "runs"))

    def add(name, *cells):
        parameters = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
        default = nbformat.v4.new_code_cell(f"default = {str(tmp_path / 'runs' / name)!r}")
        notebook = nbformat.v4.new_notebook(cells=[parameters, default, *map(nbformat.v4.new_code_cell, cells)])
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
        (["-p", "step", "4"], "01_first has no parameter 'step'; it has: steps, rate, name, fast, seed, out."),
        (["-p", "steps", "many"], "01_first: steps='many' should be of type int, like its default 3."),
        (["-p", "steps", "2.5"], "steps=2.5 should be of type int"),
        (["-p", "steps", "true"], "steps=True should be of type int"),
        (["-p", "rate", "high"], "rate='high' should be of type float"),
        (["-p", "fast", "1"], "fast=1 should be of type bool"),
        (["03_third"], "There is no notebook '03_third'; there are: 01_first, 02_second."),
        (["-f", "missing.yaml"], "missing.yaml"),
    ],
)
def test_wrong_names_and_types_are_refused_before_anything_starts(suite, tmp_path, capfd, arguments, words):
    assert main(arguments) == 2
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


def test_old_results_are_not_taken_for_new_ones(suite):
    suite("03_once", WRITE)
    assert not run_notebook("03_once").failed
    suite("03_once", "pass")
    assert run_notebook("03_once").failed


def test_default_parameters_are_the_literals_of_the_tagged_cell(suite, tmp_path):
    values = default_parameters(tmp_path / "notebooks" / "01_first.ipynb")
    assert values == {"steps": 3, "rate": 0.5, "name": "a", "fast": False, "seed": None, "out": ""}


def test_table_is_aligned():
    from pathlib import Path

    outcomes = [
        running.Outcome("01_a", 0.5, "good", Path("x"), False),
        running.Outcome("02_longer", 12, "fine", Path("y"), False),
    ]
    lines = table(outcomes).splitlines()
    assert lines[1].index("good") == lines[3].index("fine") == lines[0].index("result")
    assert json.dumps(lines)
