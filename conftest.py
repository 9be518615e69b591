"""For all tests, notebooks included: no network, and folders that none of them shares with a user's work.

Tests run in several processes, each with folders and cores of its own; the cells of a notebook stay together.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Libraries read these when they are imported, so they are set before anything else is; kernels inherit them.
_FOLDER = tempfile.mkdtemp(prefix="backpack-tests-")
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
os.environ["BACKPACK_CACHE"] = f"{_FOLDER}/cache"
os.environ["BACKPACK_RUNS"] = f"{_FOLDER}/runs"
os.environ["HF_HOME"] = f"{_FOLDER}/huggingface"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _CORES = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, _CORES))

import pytest

# Checkpoints and word lists that some tests compare with; they are not part of the project.
SHARED = Path(os.environ.get("BACKPACK_SHARED", Path(__file__).resolve().parent.parent / "shared"))


@pytest.fixture
def shared():
    if not SHARED.is_dir():
        pytest.skip(f"reference files are not on this machine ({SHARED})")
    return SHARED
