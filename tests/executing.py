"""Notebooks run in this process: the same cells in the same order, without the seconds that a kernel takes."""

import ast
import json
import math
import re
from contextlib import contextmanager
from types import SimpleNamespace

import matplotlib
import nbformat
import pytest
import torch
from helpers import ROOT

from backpack_lib.analysis import topic
from backpack_lib.loading import fingerprint
from backpack_lib.running.notebook import RESULTS
from backpack_lib.running.parameters import default_parameters

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
FOLD = re.compile(r"<details><summary>Solution</summary>.*?```python\n(.*?)```.*?</details>", re.S)
CHECK = re.compile(r"^(\w+\.)?check_\w+\(answer_\d|^check_\d\(", re.M)
EMPTY = re.compile(r"^answer_\d = None\n")


# ---------------------------------------------------------------- how they are run


def execute(name: str, parameters: dict, solved: bool = False, share: float = 1.0) -> SimpleNamespace:
    """Runs a notebook's code. -> its variables, and what the cells with exercises answered.

    solved: with the folded solutions in place of the empty answers. share: of the cells, from the first on.
    """
    matplotlib.use("Agg")
    assert set(parameters) <= set(default_parameters(NOTEBOOKS[name]))
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    solutions = iter(folded_solutions(notebook))
    space, answers = {"__name__": "__main__", "display": lambda shown: None}, []  # as IPython has it
    for cell in notebook.cells[: math.ceil(share * len(notebook.cells))]:
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
    found = [FOLD.search(cell.source) for cell in notebook.cells if cell.cell_type == "markdown"]
    return [solution[1] for solution in found if solution]


def results_of(folder) -> dict:
    return json.loads((folder / RESULTS).read_text())


@pytest.fixture(autouse=True, scope="module")
def computed_once():
    """What takes these runs most of their time, and is the same for most of them: 03's scores."""
    known = {}

    def remembered(function):
        def call(*given, **named):
            values = (*given, *named.values())
            key = (function, *map(weights_or_value, values))
            if key not in known:
                known[key] = function(*given, **named)
            return known[key]

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topic, "largest_pushes", remembered(topic.largest_pushes))
        yield


def weights_or_value(given):
    if isinstance(given, torch.Tensor):
        return given.sum().item()
    return fingerprint(given) if isinstance(given, torch.nn.Module) else given


@contextmanager
def refusal(words: str):
    """What is inside fails with one sentence that has these words."""
    with pytest.raises((ValueError, OSError)) as refused:
        yield
    message = str(refused.value)
    assert words in message and len(message.splitlines()) == 1 and len(message) < 500, message
