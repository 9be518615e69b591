"""Shared by all tests: small random models, and folders that no test shares with a user's work."""

import os
from pathlib import Path

# Read when the library is imported, so set before anything else is.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
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


def tiny_config(**changes):
    from backpack_lib import BackpackConfig

    sizes = dict(vocab_size=61, n_positions=24, n_embd=20, n_layer=2, n_head=2, num_senses=3)
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    tokens = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    # Large weights, so that softmaxes are far from uniform and mistakes show.
    return BackpackConfig(**{**sizes, **dropout, **tokens, "initializer_range": 0.2, **changes})


def tiny_model(seed=0, **changes):
    from backpack_lib import BackpackLMHeadModel

    torch.manual_seed(seed)
    return BackpackLMHeadModel(tiny_config(**changes)).eval()


def random_ids(*shape, seed=0, vocab_size=61):
    """Token ids above 0, which stands for padding and for the end of text."""
    return torch.randint(1, vocab_size, shape, generator=torch.Generator().manual_seed(seed))
