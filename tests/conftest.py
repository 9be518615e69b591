"""What several tests read: a small random Backpack and its tokenizer, and the models of planted text."""

import pytest
from helpers import tiny_model, tiny_tokenizer

from backpack_lib import load


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
