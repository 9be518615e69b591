"""For all tests, notebooks included: no network, and folders of their own."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Libraries read these when they are imported. The processes that share the tests, and kernels, inherit them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    folder = tempfile.mkdtemp(prefix="backpack-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    folders = {"BACKPACK_RUNS": f"{folder}/runs", "BACKPACK_CACHE": f"{folder}/cache", "HF_HOME": f"{folder}/hf"}
    threads = {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "passive"}
    os.environ.update(folders | threads | {"HF_HUB_OFFLINE": "1"})
processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))

import hypothesis
import pytest

# Checkpoints and word lists that some tests compare with; they are not part of the project.
SHARED = Path(os.environ.get("BACKPACK_SHARED", Path(__file__).resolve().parent.parent / "shared"))

# The same examples each time, so that a change alone can break a test; `make test-slow` draws others, and more.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.register_profile("drawn", deadline=None, print_blob=True)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip(f"reference files are not on this machine ({SHARED})")
    return SHARED


def pytest_collection_modifyitems(items):
    """The longest first."""
    items.sort(key=lambda item: (item.path.suffix != ".ipynb", item.path.name != "test_notebooks.py"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Processes share the tests by file, but those of test_notebooks.py, each a whole notebook, one by one."""
    from xdist.scheduler import LoadScopeScheduling

    class OneByOne(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "test_notebooks.py" in nodeid else super()._split_scope(nodeid)

    return OneByOne(config, log)
