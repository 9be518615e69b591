"""The project's files agree with each other, and the package works once it is installed."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from graphlib import CycleError, TopologicalSorter

import nbformat
import pandas as pd
import pytest
import yaml
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from backpack_lib.running.pages import pictures
from backpack_lib.running.parameters import default_parameters

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, LINE_LENGTH = PYPROJECT["project"], PYPROJECT["tool"]["ruff"]["line-length"]


def pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {pin.name.lower().replace("_", "-"): pin for pin in pins}


def requirements():
    extras = PROJECT["optional-dependencies"].values()
    everything = [Requirement(line) for line in sum(extras, PROJECT["dependencies"])]
    return [requirement for requirement in everything if requirement.name != PROJECT["name"]]


def test_every_requirement_is_pinned_to_a_version_that_it_allows():
    pins = pinned()
    for requirement in requirements():
        pin = pins[requirement.name]
        (version,) = [s.version for s in pin.specifier if s.operator == "=="]
        assert requirement.specifier.contains(version), requirement
    assert str(pins["torch"]) == "torch==2.13.0"


def test_pins_are_exact_and_for_every_platform():
    for name, pin in pinned().items():
        assert [s.operator for s in pin.specifier] == ["=="] and "+" not in str(pin), name


def test_oldest_supported_versions():
    supported = {r.name: r.specifier for r in requirements()}
    assert supported["torch"] == SpecifierSet(">=2.11")
    assert supported["transformers"] == SpecifierSet(">=5.17,<5.25")
    assert SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(">=3.11,<3.14")
    assert PROJECT["license"] == "Apache-2.0"


def test_conda_users_get_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in environment if isinstance(entry, dict)]
    assert pip == ["--constraint constraints.txt", "--editable .[test]"]
    python = next(entry for entry in environment if str(entry).startswith("python"))
    assert Requirement(python).specifier == SpecifierSet(PROJECT["requires-python"])


# The wings of the library, from the ground up; each imports only from those before it.
WINGS = "files hub figures model text loading training analysis studies display lessons running".split()
ALONE = {"running": {"files"}}  # what a wing may import besides itself, where that is not all before it


def imports_of(path, package):
    """The modules of the package that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: a relative import"
            # What is imported from a package may be a module of it.
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] == package.name}


def check_one_way(package):
    """Raises AssertionError where wings are out of order, or files import each other in a circle."""
    files = {".".join(p.relative_to(package.parent).with_suffix("").parts): p for p in package.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    assert {name.split(".")[1] for name in files if name != package.name} == set(WINGS)
    graph = {name: (imports_of(path, package) & set(files)) - {name} for name, path in files.items()}
    for name, imported in graph.items():
        if name == package.name:
            continue
        wing = name.split(".")[1]
        allowed = {wing, *ALONE.get(wing, WINGS[: WINGS.index(wing)])}
        for other in imported:
            assert other.split(".")[1:2] and other.split(".")[1] in allowed, f"{name} imports {other}"
    # A package is there once all that its __init__ imports is, so whoever imports it stands after those.
    TopologicalSorter({name: imported - {name.rpartition(".")[0]} for name, imported in graph.items()}).prepare()


def test_files_and_wings_import_one_way():
    check_one_way(ROOT / "backpack_lib")


@pytest.mark.parametrize(
    "file, line",
    {
        "a wing below": ("files.py", "from backpack_lib.model.kinds import has_senses"),
        "inside a function": ("model/kinds.py", "def late():\n    from backpack_lib.loading import load"),
        "a circle in a wing": ("model/mixing.py", "import backpack_lib.model.backpack"),
        "running on its own": ("running/pages.py", "from backpack_lib import figures"),
        "the whole package": ("analysis/topic.py", "import backpack_lib"),
    }.values(),
)
def test_a_planted_circle_is_found(file, line, tmp_path):
    package = shutil.copytree(ROOT / "backpack_lib", tmp_path / "backpack_lib")
    with open(package / file, "a") as target:
        target.write(f"\n\n{line}\n")
    with pytest.raises((AssertionError, CycleError)):
        check_one_way(package)


def test_lines_are_no_longer_than_the_formatter_makes_them():
    sources = [path for folder in ("backpack_lib", "data", "tests") for path in (ROOT / folder).rglob("*.py")]
    too_long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > LINE_LENGTH
    ]
    assert len(sources) > 100 and not too_long


def test_training_loads_nothing_that_a_bare_gpu_machine_lacks():
    code = "import backpack_lib, backpack_lib.training, sys; print([m for m in sys.modules])"
    loaded = eval(
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )
    assert not {"datasets", "pyarrow", "papermill", "ipywidgets", "IPython", "matplotlib", "seaborn", "pandas"} & set(
        loaded
    )


@pytest.mark.slow
def test_a_wheel_holds_the_data_and_the_notebooks(tmp_path):
    source = tmp_path / "source"  # a copy, since building leaves files behind
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "from backpack_lib import load; from backpack_lib.text import planted; import backpack_lib;"
        "from backpack_lib.running.parameters import ordered_notebooks;"
        "senses = [getattr(load(name)[0].config, 'num_senses', 0) for name in ('demo', 'demo-transformer')];"
        "import importlib, pkgutil;"
        "modules = [m.name for m in pkgutil.walk_packages(['backpack_lib'], 'backpack_lib.')];"
        "[importlib.import_module(name) for name in modules if not name.endswith('__main__')];"
        "from backpack_lib.running.__main__ import main; main(['--notebooks', 'mine']);"
        "print(next(planted.generate(1)).topic, ordered_notebooks()[0], *senses, len(modules), backpack_lib.__file__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, check=True
    )
    copied = tmp_path / "site" / "mine"
    assert {path.name for path in copied.iterdir()} == {path.name for path in (ROOT / "notebooks").glob("*.*")}
    *found, modules, file = result.stdout.splitlines()[-1].split()
    assert found == ["kitchen", "00_tour", "16", "0"] and file.startswith(str(tmp_path))
    sources = [*(ROOT / "backpack_lib").rglob("*.py")]
    assert (
        int(modules) == len(sources) - 1
    )  # all files of all wings, and each can be imported; without the package itself


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


def outputs_of(name):
    """All text that a notebook shows."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    shown = [output for cell in cells for output in cell.get("outputs", ())]
    return "\n".join("".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/plain", "")) for o in shown)


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


def test_the_readmes_figures_are_those_that_were_measured():
    measured = json.loads((ROOT / "data" / "demo" / "evaluation.json").read_text())
    ours, theirs = (measured["models"][name] for name in ("demo", "demo-transformer"))

    def similarity(part):
        return sum(row["rho"] for row in part["similarity_held_out"].values()) / len(part["similarity_held_out"])

    millions = [model["parameters"] / 1e6 for model in (ours, theirs)]
    bench = {
        (r["key"], r["size"]): r["against"] for r in json.loads((ROOT / "data/benchmark/cpu.json").read_text())["rows"]
    }
    ratios = {key: {name: f"{found['ratio']:.2f}" for name, found in row.items()} for key, row in bench.items()}
    generated = {("generation", "demo"), ("generation", "small")}
    training, small = ratios["training", "demo"], ratios["memory-1024", "small"]
    bias = re.search(
        r"removing them takes (\d+)% of the excess, all senses (\d+)%, a constant offset (\d+)%",
        outputs_of("04_gender_bias"),
    )
    topics = re.search(
        r"at equal fluency no control ([\d.]+)%, Backpack ([\d.]+)%, PPLM ([\d.]+)% on topic",
        outputs_of("03_topic_control"),
    )
    edited = re.search(
        r"(\d+) facts known; dosed projection: efficacy \d+%, paraphrases (\d+)%, KL about the subject ([\d.]+); "
        r".*finetuned, 1.0% (\d+)% and ([\d.]+);",
        outputs_of("05_knowledge"),
    )
    taught = pd.read_csv(ROOT / "data" / "demo" / "knowledge" / "taught.csv.gz")
    taught = taught[(taught["bound"] == 0.001) & (taught["model"] == "Backpack")]
    solved = (100 * taught.groupby(["set", "method"])["success"].mean()).round().astype(int)
    reading = {
        name: pd.read_csv(ROOT / "data" / "reading" / f"{name}.csv") for name in ("seeds", "gender", "explanations")
    }
    whole = reading["explanations"].query("sense == 'all'").set_index(["replaced by", "words"])["share"]
    senses, embeddings = (
        some.mean(numeric_only=True) for _, some in reading["seeds"].groupby(reading["seeds"]["what"] != "senses")
    )
    assert not reading["gender"]["partners"].any()
    exchanged = 100 * whole["another word's words", 100]
    for said in (
        f"a mean correlation of {senses['matched']:.2f} ({senses['null (95 %)']:.2f} by chance)",
        f"agree far better, {embeddings['matched']:.2f}",
        f"keep {100 * whole['said in words', 10]:.0f} % of their worth ({100 * whole['mean sense', 0]:.0f} % by a mean "
        f"sense, {exchanged:.0f} % by another word's words)",
        f"Of {edited[1]} facts that both models know",
        f"likelier in {edited[2]} % of paraphrases and hardly touches other texts about the subject "
        f"(KL {edited[3]} nats)",
        f"reaches {edited[4]} % at a KL of {edited[5]}",
        f"({solved['capitals', 'senses']} % and {solved['capitals', 'all weights']} % of held-out examples)",
        f"({solved['agreement', 'senses']} % and {solved['agreement', 'all weights']} %, "
        f"{solved['pronouns', 'senses']} % and {solved['pronouns', 'all weights']} %)",
        f"on topic in {topics[2]} % of texts ({topics[1]} % without control, {topics[3]} % by PPLM)",
        f"a Backpack of {millions[0]:.0f} million parameters",
        f"({millions[1]:.0f} million)",
        f"{millions[0] - millions[1]:.0f} million parameters less",
        f"{ours['bits_per_byte']:.3f} and {theirs['bits_per_byte']:.3f} bits per byte",
        f"BLiMP {100 * ours['blimp']['mean']:.1f} % and {100 * theirs['blimp']['mean']:.1f} %",
        f"mean ρ {similarity(ours):.2f} and {similarity(measured['word2vec']):.2f}",
        f"take {bias[1]} % of the excess",
        f"all 16 senses {bias[2]} %",
        f"an offset that edits nothing {bias[3]} %",
        f"| {training['plain']} | {training['GPT-2']} ({training['GPT-2, our loss']} against",
        *(f"| {row['plain']} | {row['GPT-2']} |" for key, row in ratios.items() if key in generated),
        f"| {small['plain']} | {small['GPT-2']} |",
    ):
        assert said in README, said


def test_the_course_asks_each_exercise_of_each_notebook_once_and_rates_it_as_the_notebook_does():
    rows = re.findall(r"^\| \d \| (.*) \|$", (ROOT / "notebooks" / "README.md").read_text(), re.M)
    asked = {path.stem: [] for path in NOTEBOOKS}
    for notebook, _, in_class, at_home, _ in (row.split(" | ") for row in rows):
        for cell in (in_class, at_home):
            parts = re.split(r"(\d\d): ", cell)  # a week of two notebooks says which is meant
            for number, part in zip(parts[1::2], parts[2::2]) if len(parts) > 1 else [(notebook[1:3], cell)]:
                (name,) = (name for name in asked if name.startswith(number))
                asked[name] += re.findall(r"\b(\d) ([emh])\b", part)
    for path in NOTEBOOKS:
        text = "".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
        assert sorted(asked[path.stem]) == re.findall(r"\*\*Exercise (\d)\*\* \(([emh])", text), path.stem


# ---------------------------------------------------------------- the notebooks as lessons

REWRITTEN = tuple(path.stem for path in NOTEBOOKS)
PLUMBING = re.compile(
    r"^(from |import |(lesson|results)\.(keep|note|numbers|close)|\"[^\"]*\", model, out|\)$|E, k = |"
    r"backpack, tokenizer)"
)


@pytest.mark.parametrize("name", REWRITTEN)
def test_cells_are_short_and_most_lines_are_the_idea(name):
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    code = [
        [line for line in "".join(c["source"]).splitlines() if line.strip()] for c in cells if c["cell_type"] == "code"
    ]
    assert len(code[1]) <= 12 and max(map(len, code[1:])) <= 25
    assert not [line for cell in code for line in cell if len(line) > LINE_LENGTH]
    lines = [line.strip() for cell in code[1:] for line in cell]
    plumbing = [line for line in lines if PLUMBING.match(line)]
    assert len(plumbing) <= 0.4 * len(lines), f"{len(plumbing)} of {len(lines)}"
    assert not any(re.search(r"\bif (is_planted|on_planted|is_demo|model ==)", line) for line in lines)


@pytest.mark.parametrize("name", REWRITTEN)
def test_exercises_stand_in_place_from_easy_to_hard(name):
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    found = [
        (n, re.search(r"\*\*Exercise (\d)\*\* \((easy|medium|hard)", "".join(c["source"]))) for n, c in enumerate(cells)
    ]
    found = [(n, match) for n, match in found if match]
    assert 5 <= len(found) <= 8 and [match[1] for _, match in found] == [str(i + 1) for i in range(len(found))]
    assert {match[2] for _, match in found} == {"easy", "medium", "hard"}
    places = [n for n, _ in found]
    assert max(places) - min(places) > len(cells) // 3  # not all together at the end


@pytest.mark.slow
def test_what_is_not_begun_in_time_is_skipped_and_says_so():
    arguments = ["-m", "pytest", "-q", "-n", "0", "-rs", "--minutes", "0", "tests/test_statistics.py"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "BACKPACK"))}
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert re.search(r"^\d+ skipped", result.stdout, re.M) and "the 0 minutes of --minutes were over" in result.stdout
