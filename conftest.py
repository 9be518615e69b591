"""For all tests, notebooks included: no network, folders of their own, and who runs what when.

Tests run in several processes that share one folder of runs, so that what several need is trained once. The long
ones go first. Cells of a notebook stay together, and so do tests that share what a module prepared.
"""

import atexit
import os
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path

# Libraries read these when they are imported, so they are set before anything else is; kernels inherit them.
if "PYTEST_XDIST_WORKER" not in os.environ:  # the process that starts the others, which inherit them, too
    _FOLDER = tempfile.mkdtemp(prefix="backpack-tests-")
    atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
    os.environ["BACKPACK_CACHE"] = f"{_FOLDER}/cache"
    os.environ["BACKPACK_RUNS"] = f"{_FOLDER}/runs"
    os.environ["HF_HOME"] = f"{_FOLDER}/huggingface"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["OMP_WAIT_POLICY"] = "passive"  # several processes share the cores
    os.environ["BACKPACK_TESTS_BEGAN"] = str(time.time())
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _CORES = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, _CORES))

import hypothesis
import pytest
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

# Checkpoints and word lists that some tests compare with; they are not part of the project.
SHARED = Path(os.environ.get("BACKPACK_SHARED", Path(__file__).resolve().parent.parent / "shared"))
LONGEST_FIRST = (
    "03_topic_control.ipynb",
    "04_gender_bias.ipynb",
    "01_training.ipynb",
    ".ipynb",
    "test_notebooks.py",
    "test_released_size.py",
    "test_places.py",
    "test_edges.py",
)

# The same examples each time, so that a change alone can break a test; `make test-all` draws others.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("drawn", deadline=None, print_blob=True)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip(f"reference files are not on this machine ({SHARED})")
    return SHARED


RUNS = os.environ["BACKPACK_RUNS"]


@cache
def train_planted() -> Path:
    """The folder of the notebook 01 as it stands, executed once for all processes."""
    from backpack_lib.running.notebook import run_notebook

    folder = Path(RUNS) / "01_training"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "results.json").is_file():
            outcome = run_notebook("01_training", progress_bar=False)
            assert not outcome.failed, outcome.result
    return folder


@pytest.fixture(scope="session")
def planted_run() -> Path:
    return train_planted()


def pytest_addoption(parser):
    help = "start no test later than so many minutes after the beginning; those left are skipped, and say so"
    parser.addoption("--minutes", type=float, default=float("inf"), help=help)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Starts a test only while there is time for it, and with the models that it is meant to have.

    "planted" is the shipped models to all but the notebooks and the tests that ask for `planted_run`: what is trained
    here rounds as this machine does, and after some thousand steps is another model than elsewhere.
    """
    minutes = item.config.getoption("--minutes")
    if time.time() - float(os.environ["BACKPACK_TESTS_BEGAN"]) > 60 * minutes:
        pytest.skip(f"the {minutes:g} minutes of --minutes were over")
    notebook = item.path.suffix == ".ipynb"
    os.environ["BACKPACK_RUNS"] = RUNS if notebook or "planted_run" in item.fixturenames else f"{RUNS}-of-tests"
    if item.path.name == "01_training.ipynb":  # its cells then find their models trained
        train_planted()


def pytest_collection_modifyitems(items):
    def rank(item):
        return next((n for n, name in enumerate(LONGEST_FIRST) if item.path.name.endswith(name)), len(LONGEST_FIRST))

    items.sort(key=rank)


class ByNeed(LoadScopeScheduling):
    """Hands out tests one by one, but a notebook's cells and tests with fixtures of a module together."""

    def _split_scope(self, nodeid):
        file = nodeid.split("::", 1)[0]
        return file if file.endswith(".ipynb") or _shares_fixtures(file) else nodeid


@cache
def _shares_fixtures(file: str) -> bool:
    return 'scope="module"' in (Path(__file__).parent / file).read_text(encoding="utf-8")


def pytest_xdist_make_scheduler(config, log):
    return ByNeed(config, log)
