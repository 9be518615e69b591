"""The parameters of notebooks: their names and defaults, how they are written, and a check before anything starts."""

import ast
from pathlib import Path

import nbformat
import yaml

from backpack_lib.files import notebooks_folder


def ordered_notebooks() -> list[str]:
    """Names of the suite's notebooks, in reading order."""
    return sorted(path.stem for path in notebooks_folder().glob("[0-9][0-9]_*.ipynb"))


def source_of(name: str) -> Path:
    """The file of a notebook: one of the suite's by its name, or any by its path, such as `mine/02_senses.ipynb`."""
    source = Path(name).absolute() if name.endswith(".ipynb") else notebooks_folder() / f"{name}.ipynb"
    if not source.is_file():
        raise ValueError(f"There is no notebook {name!r}; there are: {', '.join(ordered_notebooks())}.")
    return source


def code_of(notebook: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


def default_parameters(notebook: Path) -> dict:
    """Names and default values in a notebook's cell tagged `parameters`."""
    # papermill's own inspection loses a parameter that has a "=" or "#" in its text or comment.
    tagged = [cell.source for cell in code_of(notebook) if "parameters" in cell.metadata.get("tags", [])]
    assignments = [line for line in ast.parse("\n".join(tagged)).body if isinstance(line, ast.Assign)]
    return {line.targets[0].id: ast.literal_eval(line.value) for line in assignments}


def check_parameters(name: str, defaults: dict, given: dict) -> dict:
    """The given parameters, checked against the defaults. Raises ValueError for unknown names and wrong types."""
    for key, value in given.items():
        if key not in defaults:
            raise ValueError(f"{name} has no parameter {key!r}; it has: {', '.join(defaults) or 'none'}.")
        if not _fits(value, defaults[key]):
            raise ValueError(f"{name}: {key}={value!r} should be of the same type as its default, {defaults[key]!r}.")
    return given


def _fits(value, default) -> bool:
    if isinstance(default, list) and isinstance(value, list):
        return not default or all(_fits(entry, default[0]) for entry in value)
    return default is None or type(value) is type(default) or (type(value), type(default)) == (int, float)


def read_parameters(source: Path, file: str | None, pairs: list[tuple[str, str]]) -> dict:
    """A notebook's parameters from a YAML file of lines `name: value` and from pairs of both, the pairs last; checked."""
    defaults, words = default_parameters(source), {}
    if file:
        with open(file, encoding="utf-8") as lines:
            words = yaml.load(lines, yaml.BaseLoader) or {}
        if not isinstance(words, dict):
            raise ValueError(f"{file} should hold lines of the form `name: value`.")
    given = {name: _read_value(text, defaults.get(name)) for name, text in (words | dict(pairs)).items()}
    return check_parameters(source.stem, defaults, given)


def read_grid(name: str, defaults: dict, given: dict, axes: list[str]) -> dict[str, list]:
    """The values of each parameter of a grid, written `name=0,1,2`, or of lists `name=[a, b],[c]`; checked."""
    grid = {}
    for axis in axes:
        key, _, text = axis.partition("=")
        if key in {"out", *given, *grid}:
            raise ValueError(f"{key!r} is given twice; a grid gives each run an `out` of its own.")
        default = defaults.get(key)
        entries = _read_list(f"[{text}]" if isinstance(default, list) else text)
        grid[key] = [check_parameters(name, defaults, {key: _read_value(entry, default)})[key] for entry in entries]
        if not grid[key]:
            raise ValueError(f"The grid gives no value for {key!r}; write for example --grid {key}=1,2,3.")
    return grid


def _read_value(text: str | list, default):
    """A parameter read as the type of its default, or unchanged. Entries of a list that is empty by default are words."""
    if isinstance(default, str):
        return text
    if isinstance(default, list) and isinstance(text, str | list):
        entries = _read_list(text) if isinstance(text, str) else text
        return [_read_value(entry, default[0] if default else "") for entry in entries]
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (SyntaxError, TypeError, ValueError):
        return text


def _read_list(text: str) -> list:
    if text.startswith("["):
        return yaml.load(text, yaml.BaseLoader)  # which leaves "yes", "null" and "12:30" as they are written
    return [part.strip() for part in text.split(",") if part.strip()]
