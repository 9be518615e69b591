"""For all tests, notebooks included: folders that none of them shares with a user's work, and no network."""

import os
from pathlib import Path

# Read when the library is imported, so set before anything else is.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

ROOT = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("BACKPACK_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session", autouse=True)
def folders_of_their_own(tmp_path_factory):
    """Caches and runs of the tests, notebooks included, go to a temporary folder; no network is tried."""
    before = dict(os.environ)
    os.environ["BACKPACK_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["BACKPACK_RUNS"] = str(tmp_path_factory.mktemp("runs"))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def shared():
    if not SHARED.is_dir():
        pytest.skip(f"reference files are not on this machine ({SHARED})")
    return SHARED
