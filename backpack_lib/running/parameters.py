"""The parameters of the suite's notebooks: their names, their defaults, and checks before anything starts."""

import ast
import json
from pathlib import Path

import yaml

from backpack_lib.files import notebooks_folder


def ordered_notebooks() -> list[str]:
    """Names of the suite's notebooks, in reading order."""
    return sorted(path.stem for path in notebooks_folder().glob("[0-9][0-9]_*.ipynb"))


def source_of(name: str) -> Path:
    """The file of a notebook: one of the suite's by its name, or any by its path, such as `mine/02_senses.ipynb`.

    Raises ValueError if there is none.
    """
    source = Path(name).absolute() if name.endswith(".ipynb") else notebooks_folder() / f"{name}.ipynb"
    if not source.is_file():
        raise ValueError(f"There is no notebook {name!r}; there are: {', '.join(ordered_notebooks())}.")
    return source


def code_of(notebook: Path) -> list[dict]:
    """The code cells of a notebook's file."""
    return [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def default_parameters(notebook: Path) -> dict:
    """Names and default values in a notebook's cell tagged `parameters`."""
    for cell in code_of(notebook):
        if "parameters" in cell["metadata"].get("tags", []):
            assignments = ast.parse("".join(cell["source"])).body
            return {a.targets[0].id: ast.literal_eval(a.value) for a in assignments if isinstance(a, ast.Assign)}
    return {}


def check_parameters(name: str, defaults: dict, given: dict) -> dict:
    """The given parameters, checked against the defaults. Raises ValueError for unknown names and wrong types."""
    unknown = [str(key) for key in given if key not in defaults]
    if unknown:
        known = ", ".join(defaults) or "none"
        raise ValueError(f"{name} has no parameter {', '.join(map(repr, unknown))}; it has: {known}.")
    for key, value in given.items():
        default = defaults[key]
        if not _fits(value, default):
            raise ValueError(
                f"{name}: {key}={value!r} should be of type {type(default).__name__}, like its default {default!r}."
            )
        if isinstance(default, list) and default and not all(_fits(item, default[0]) for item in value):
            raise ValueError(
                f"{name}: each entry of {key}={value!r} should be of type {type(default[0]).__name__}, "
                f"like those of its default {default!r}."
            )
    return given


def _fits(value, default) -> bool:
    return default is None or type(value) is type(default) or (type(value), type(default)) == (int, float)


def read_value(text: str, default):
    """A parameter from the shell, read as the type of its default; as it stands where that fails.

    A list is written `a,b,c`, or as in Python.
    """
    if isinstance(default, str):
        return text
    try:
        value = float(text) if isinstance(default, float) else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text
    if isinstance(default, list) and not isinstance(value, list):
        entry = default[0] if default else None
        return [read_value(part.strip(), entry) for part in text.split(",") if part.strip()]
    return value


def read_values(name: str, text: str, default) -> list:
    """The values of a grid's parameter: `0,1,2`; of lists, `[a, b], [c]`. Raises ValueError if there is none."""
    if isinstance(default, list):
        try:
            values = yaml.safe_load(f"[{text}]")
        except yaml.YAMLError:
            values = [text]
    else:
        values = [read_value(part.strip(), default) for part in text.split(",") if part.strip()]
    if not values:
        raise ValueError(f"The grid gives no value for {name!r}; write for example --grid {name}=1,2,3.")
    if any(value in values[:index] for index, value in enumerate(values)):
        raise ValueError(f"The grid gives {name!r} a value twice: {text}.")
    return values


def read_file(path: str) -> dict:
    """Parameters from a YAML file with a line `name: value` for each. Raises ValueError if it holds anything else."""
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path} should hold lines of the form `name: value`.")
    return given
