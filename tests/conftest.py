"""What several tests read: a small random Backpack and its tokenizer, the planted models, and a run of seconds."""

import pytest
from helpers import tiny_model, tiny_tokenizer

from backpack_lib import TrainingConfig, load
from backpack_lib.text import planted


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), num_senses=4)


@pytest.fixture(scope="session")
def models():
    """The planted Backpack, its Transformer, and their tokenizer."""
    (backpack, tokenizer), (transformer, _) = load("planted"), load("planted-transformer")
    return backpack, transformer, tokenizer


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A small corpus of 400 planted texts in a file."""
    file = tmp_path_factory.mktemp("text") / "texts.txt"
    file.write_text("\n\n".join(text.text for text in planted.generate(400)))
    return str(file)


@pytest.fixture
def tiny(text, tmp_path):
    """A run of some seconds, with dropout, so that the random state matters."""
    sizes = dict(n_layer=1, n_head=2, n_embd=16, num_senses=2, vocab_size=400, block_size=16, batch_size=4)
    steps = dict(steps=12, warmup=2, eval_every=3, save_every=2, eval_blocks=8, valid_fraction=0.1)
    return TrainingConfig(corpus=text, out=str(tmp_path / "run"), dropout=0.1, learning_rate=1e-2, **sizes, **steps)
