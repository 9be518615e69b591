"""The exercises of all notebooks."""

import copy
import re

import nbformat
import pytest
from helpers import ROOT

from backpack_lib.running.notebook import run_notebook

FOLD = re.compile(r"<details><summary>Solution</summary>.*?```python\n(.*?)```.*?</details>", re.S)


def folded_solutions(notebook):
    found = [FOLD.search(cell.source) for cell in notebook.cells if cell.cell_type == "markdown"]
    return [solution[1] for solution in found if solution]


def exercise_cells(notebook):
    """The code cells in which a reader answers."""
    return [c for c in notebook.cells if c.cell_type == "code" and re.search(r"^check_\d\(", c.source, re.M)]


NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
SHORT = {
    "03_topic_control": {"topics": ["music"], "strengths": [2], "samples": 2, "tokens": 16},
    "04_gender_bias": {"professions": ["nurse", "guard", "teacher", "cook", "writer", "farmer"]},
}
WITH_EXERCISES = [name for name, notebook in NOTEBOOKS.items() if folded_solutions(notebook)]


@pytest.mark.parametrize("name", WITH_EXERCISES)
def test_exercises_say_what_is_missing_and_accept_their_solutions(name, planted_run, tmp_path, monkeypatch):
    notebook = copy.deepcopy(NOTEBOOKS[name])
    solutions, cells = folded_solutions(notebook), exercise_cells(notebook)
    assert len(solutions) == len(cells) >= 2
    for cell, solution in zip(cells, solutions):
        assert "Not yet" in cell.outputs[0]["data"]["text/plain"]
        cell.source, emptied = re.subn(r"^answer_\d = None\n", lambda _: solution, cell.source)
        assert emptied == 1
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.setenv("BACKPACK_NOTEBOOKS", str(tmp_path / "notebooks"))
    # 01 finds the models that it has trained already.
    given = {} if name == "01_training" else {"out": str(tmp_path / "out")}
    outcome = run_notebook(name, given | SHORT.get(name, {}))
    assert not outcome.failed, outcome.result
    answers = [c.outputs[0]["data"]["text/plain"] for c in exercise_cells(nbformat.read(outcome.copy, as_version=4))]
    assert all(answer[1:].startswith("Right") for answer in answers), answers
