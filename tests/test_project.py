"""The project's files agree with each other, and the package works once it is installed."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from graphlib import TopologicalSorter

import nbformat
import pytest
import yaml
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from backpack_lib.running.pages import pictures
from backpack_lib.running.parameters import default_parameters

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_requirement_is_pinned_to_a_version_that_it_allows():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {pin.name.lower().replace("_", "-"): str(pin.specifier).removeprefix("==") for pin in pins}
    for line in sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"]):
        requirement = Requirement(line)
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(versions[requirement.name]), requirement


def test_one_version_is_named_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert f"\n## {PROJECT['version']} ({citation['date-released']})\n" in (ROOT / "CHANGELOG.md").read_text()
    smollm2 = re.search(r"^SMOLLM2 = (.+)$", (ROOT / "Makefile").read_text(), re.M)[1]
    assert smollm2 in (ROOT / "README.md").read_text()


def test_conda_users_get_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in environment if isinstance(entry, dict)]
    assert pip == ["--constraint constraints.txt", "--editable .[test]"]
    python = next(entry for entry in environment if str(entry).startswith("python"))
    assert Requirement(python).specifier == SpecifierSet(PROJECT["requires-python"])


# The wings of the library, from the ground up; each imports only from those before it.
WINGS = "files hub model text loading training analysis studies display lessons running".split()
ALONE = {"running": {"files"}}  # what a wing may import besides itself, where that is not all before it


def imports_of(path) -> set[str]:
    """The modules that a file imports, wherever the import stands; what is imported from a package may be one."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_files_and_wings_import_one_way():
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / "backpack_lib").rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items() if name != "backpack_lib.__init__"}
    assert {name.split(".")[1] for name in files} == set(WINGS)
    graph = {name: imports_of(path) & {"backpack_lib", *files} - {name} for name, path in files.items()}
    for name, imported in graph.items():
        wing = name.split(".")[1]
        allowed = {wing, *ALONE.get(wing, WINGS[: WINGS.index(wing)])}
        assert {other.removeprefix("backpack_lib.").split(".")[0] for other in imported} <= allowed, name
    # A package is there once all that its __init__ imports is, so whoever imports it stands after those.
    TopologicalSorter({name: imported - {name.rpartition(".")[0]} for name, imported in graph.items()}).prepare()


def run_python(code: str, folder) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_training_loads_nothing_that_a_bare_gpu_machine_lacks():
    loaded = run_python("import backpack_lib, backpack_lib.training, sys; print(*sys.modules)", ROOT).split()
    lacking = {"datasets", "pyarrow", "papermill", "ipywidgets", "IPython", "matplotlib", "seaborn", "pandas"}
    assert not lacking & set(loaded)


WITH_THE_WHEEL = """
import importlib, pkgutil
import backpack_lib
from backpack_lib.running.__main__ import main
from backpack_lib.text import planted
for module in pkgutil.walk_packages(["backpack_lib"], "backpack_lib."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in ("demo", "demo-transformer"):
    backpack_lib.load(name)
next(planted.generate(1))
main(["--notebooks", "mine"])
print(backpack_lib.__file__)
"""


@pytest.mark.slow
def test_a_wheel_holds_the_data_and_the_notebooks(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"  # a copy, since building leaves files behind
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert run_python(WITH_THE_WHEEL, site).splitlines()[-1].startswith(str(site))
    assert {path.name for path in (site / "mine").iterdir()} == {path.name for path in (ROOT / "notebooks").glob("*.*")}
    for file in (ROOT / "backpack_lib").rglob("*.py"):
        assert (site / file.relative_to(ROOT)).is_file()


# ---------------------------------------------------------------- the notebooks as a visitor sees them

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text())


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_notebook_opens_with_text_and_literal_parameters(notebook):
    assert notebook["cells"][0]["cell_type"] == "markdown"
    first = code_cells(notebook)[0]
    tagged = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    assert tagged == [first]
    for statement in ast.parse("".join(first["source"])).body:
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


def test_stored_outputs_are_there_and_hold_nothing_of_this_machine(notebook):
    for number, cell in enumerate(code_cells(notebook), start=1):
        assert cell["execution_count"] == number, "run the notebook from top to bottom (make notebooks)"
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr"
            text = json.dumps({k: v for k, v in output.get("data", output).items() if not k.startswith("image/")})
            assert not re.search(r"/(home|root|tmp|work|Users)/|tokens/s\b", text), text[:200]


def test_widgets_are_stored_with_their_state_and_a_page_to_show_without_it(notebook):
    kind, views = "application/vnd.jupyter.widget-state+json", "application/vnd.jupyter.widget-view+json"
    shown = [o["data"] for cell in code_cells(notebook) for o in cell["outputs"] if views in o.get("data", {})]
    state = notebook["metadata"].get("widgets", {}).get(kind, {}).get("state", {})
    for data in shown:
        assert data[views]["model_id"] in state
        assert "answer in a running notebook" in "".join(data["text/html"])
    # Widgets of ipywidgets itself, which every front end brings along: nothing has to be fetched for them.
    assert {widget["model_module"] for widget in state.values()} <= {
        "@jupyter-widgets/base",
        "@jupyter-widgets/controls",
    }


# ---------------------------------------------------------------- the README


README = (ROOT / "README.md").read_text()


def test_the_readme_lists_every_notebook_and_only_parameters_that_they_have():
    rows = dict(re.findall(r"^\| \[(\d\d_\w+)\]\(notebooks/\1\.ipynb\) \|.*\| ([^|]+) \|$", README, re.M))
    assert list(rows) == [path.stem for path in NOTEBOOKS]
    for path in NOTEBOOKS:
        named = re.findall(r"`(\w+)`", rows[path.stem])
        assert named and set(named) <= set(default_parameters(path)), path.stem


def test_links_of_the_readmes_lead_somewhere():
    others = (ROOT / name / "README.md" for name in ("backpack_lib", "notebooks"))
    for file in (ROOT / "README.md", *(ROOT / "data").glob("**/README.md"), *others):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", file.read_text()):
            assert (file.parent / link).exists(), (file, link)


def test_the_readmes_picture_is_the_one_that_the_tour_shows():
    tour = nbformat.read(ROOT / "notebooks" / "00_tour.ipynb", as_version=4)
    assert (ROOT / "data" / "tour.png").read_bytes() == pictures(tour)[0], "run: make notebooks"
