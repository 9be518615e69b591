"""Notebooks run in this process: the same cells in the same order, without the seconds that a kernel takes."""

import ast
import json
import re
from types import SimpleNamespace

import matplotlib
import nbformat
from helpers import ROOT

from backpack_lib.running.notebook import RESULTS
from backpack_lib.running.parameters import default_parameters

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
FOLD = re.compile(r"<details><summary>Solution</summary>.*?```python\n(.*?)```.*?</details>", re.S)
CHECK = re.compile(r"^(\w+\.)?check_\w+\(answer_\d|^check_\d\(", re.M)
EMPTY = re.compile(r"^answer_\d = None\n")


def execute(name: str, parameters: dict, solved: bool = False) -> SimpleNamespace:
    """Runs a notebook's code. -> its variables, and what the cells with exercises answered.

    solved: with the folded solutions in place of the empty answers.
    """
    matplotlib.use("Agg")
    assert set(parameters) <= set(default_parameters(NOTEBOOKS[name]))
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    solutions = iter(folded_solutions(notebook))
    space, answers = {"__name__": "__main__", "display": lambda shown: None}, []  # as IPython has it
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        asks, source = CHECK.search(cell.source), cell.source
        if asks and solved:
            source, emptied = EMPTY.subn(lambda _: next(solutions), source)
            assert emptied == 1
        value = execute_cell(source, f"{name}: {cell.source[:40]!r}", space)
        if asks:
            answers.append(value)
        if "parameters" in cell.metadata.get("tags", []):
            space |= parameters
    return SimpleNamespace(space=space, answers=answers)


def execute_cell(source: str, name: str, space: dict):
    """Runs the code of a cell and returns the value of its last expression, which a notebook would show."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), space)
    return None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), space)


def folded_solutions(notebook) -> list[str]:
    folds = [FOLD.search(cell.source) for cell in notebook.cells if cell.cell_type == "markdown"]
    return [solution[1] for solution in folds if solution]


def results_of(folder) -> dict:
    return json.loads((folder / RESULTS).read_text())
