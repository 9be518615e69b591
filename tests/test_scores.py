"""Losses and bits per byte, against slow versions that look at one token at a time."""

import math

import pytest
import torch
from helpers import tiny_model

from backpack_lib.analysis import scores
from backpack_lib.analysis.scores import bits_per_byte, nats_per_token, next_log_probabilities, token_nats
from backpack_lib.text import planted
from backpack_lib.text.tokenizers import train_tokenizer
from backpack_lib.text.writing import ids_of_text

TEXTS = [text.text for text in planted.generate(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=400, n_positions=32)


def log_probs(model, ids):
    """After a text, (V,)."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def test_long_texts_count_each_token_once_with_half_a_window_before_it(model, tokenizer):
    text = " ".join(TEXTS[:12])
    ids = ids_of_text(tokenizer, text)
    assert len(ids) > 5 * 32
    nats = 0
    for place in range(1, len(ids)):
        # The first window that holds the token: windows begin at every multiple of half their size.
        start = 0 if place < 32 else 16 * math.ceil((place - 31) / 16)
        assert place < 32 or place - start >= 16
        nats -= log_probs(model, ids[start:place])[ids[place]].item()
    expected = nats / math.log(2) / len(text.encode())
    assert bits_per_byte(model, tokenizer, [text]) == pytest.approx(expected, rel=1e-5)


def test_evaluation_builds_no_cache(model, tokenizer, monkeypatch):
    monkeypatch.setattr("backpack_lib.model.backpack.DynamicCache", None)  # whoever makes one fails
    assert bits_per_byte(model, tokenizer, ["The nurse says."]) > 0


@pytest.mark.parametrize("room", [5, 12, 40, 1000])
def test_as_many_texts_are_read_at_once_as_fit_the_memory(model, room, monkeypatch):
    rows = [list(range(n)) for n in (3, 3, 9, 1, 1, 1, 20, 2)]
    monkeypatch.setitem(scores.MEMORY, "cpu", room * 400 * 4)
    read = []
    for places, ids, mask in scores.batches(model, rows):
        assert len(places) == 1 or ids.numel() <= room
        assert [row[row_mask.bool()].tolist() for row, row_mask in zip(ids, mask)] == [rows[place] for place in places]
        read += places
    assert sorted(read) == list(range(len(rows)))


def test_each_token_has_its_loss_in_the_order_of_the_rows(model, monkeypatch):
    rows = [[0, 5, 9, 3, 7], [0, 4], [0, 8, 2]]
    monkeypatch.setitem(scores.MEMORY, "cpu", 6 * 400 * 4)
    for row, losses in zip(rows, token_nats(model, rows)):
        expected = [-log_probs(model, row[:place])[row[place]].item() for place in range(1, len(row))]
        assert losses.tolist() == pytest.approx(expected, abs=1e-4)


def test_nats_are_of_what_was_written_only(model, tokenizer):
    prompts, texts = ["the nurse", ""], ["the nurse said that", "the concert"]
    nats = []
    for prompt, text in zip(prompts, texts):
        ids = ids_of_text(tokenizer, text)
        written = range(len(ids_of_text(tokenizer, prompt)), len(ids))
        nats += [-log_probs(model, ids[:place])[ids[place]].item() for place in written]
    assert nats_per_token(model, tokenizer, texts, prompts) == pytest.approx(sum(nats) / len(nats), rel=1e-5)


def test_more_prompts_than_fit_in_a_batch_are_predicted_as_each_alone(model, tokenizer):
    prompts = [" the" * (number % 7) + " nurse" for number in range(70)]
    together = next_log_probabilities(model, tokenizer, prompts)
    for number in (0, 5, 63, 64, 69):
        alone = log_probs(model, ids_of_text(tokenizer, prompts[number]))
        torch.testing.assert_close(together[number], alone, atol=1e-4, rtol=1e-4)
