"""Bits per byte and minimal pairs, against slow versions that look at one token at a time."""

import json
import math

import pandas as pd
import pytest
import torch
from helpers import tiny_model

from backpack_lib.analysis import scores
from backpack_lib.analysis.scores import (
    bits_per_byte,
    blimp_accuracy,
    log_probabilities,
    nats_per_token,
    read_blimp,
    token_nats,
)
from backpack_lib.text import planted
from backpack_lib.text.tokenizers import train_tokenizer

TEXTS = [text.text for text in planted.generate(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=400, n_positions=32)


def token_log_prob(model, ids, place):
    with torch.no_grad():
        return model(torch.tensor([ids[:place]])).logits[0, -1].log_softmax(-1)[ids[place]].item()


def test_long_texts_count_each_token_once_with_half_a_window_before_it(model, tokenizer):
    text = " ".join(TEXTS[:12])
    ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    assert len(ids) > 5 * 32
    nats = 0
    for place in range(1, len(ids)):
        # The first window that holds the token: windows begin at every multiple of half their size.
        start = 0 if place < 32 else 16 * math.ceil((place - 31) / 16)
        assert place < 32 or place - start >= 16
        nats -= token_log_prob(model, ids[start : start + 32], place - start)
    expected = nats / math.log(2) / len(text.encode())
    assert bits_per_byte(model, tokenizer, [text]) == pytest.approx(expected, rel=1e-5)


def test_a_sentence_has_the_log_probability_of_its_tokens_whatever_stands_beside_it(model, tokenizer):
    sentences = ["The band played.", "She said that she would come to the concert.", "No."]
    together = log_probabilities(model, tokenizer, sentences)
    for sentence, found in zip(sentences, together):
        ids = [tokenizer.eos_token_id, *tokenizer(sentence)["input_ids"]]
        expected = sum(token_log_prob(model, ids, place) for place in range(1, len(ids)))
        assert found.item() == pytest.approx(expected, rel=1e-4)


def test_accuracy_is_by_set_and_right_where_the_good_sentence_is_likelier(model, tokenizer):
    one, two = log_probabilities(model, tokenizer, ["The band played.", "The band the."]).tolist()
    better, worse = ("The band played.", "The band the.") if one > two else ("The band the.", "The band played.")
    rows = [("right", better, worse), ("wrong", worse, better), ("half", better, worse), ("half", worse, better)]
    pairs = pd.DataFrame(rows, columns=["UID", "sentence_good", "sentence_bad"], index=[3, 1, 7, 5])
    assert blimp_accuracy(model, tokenizer, pairs).to_dict() == {"right": 1.0, "wrong": 0.0, "half": 0.5}


def test_blimp_is_read_from_a_folder_and_a_wrong_place_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="no .jsonl file"):
        read_blimp(str(tmp_path))
    row = {"sentence_good": "He sleeps.", "sentence_bad": "He sleep.", "UID": "agreement"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    assert list(read_blimp(str(tmp_path))["UID"]) == ["agreement"] * 2
    with pytest.raises(ValueError, match="is no folder, and BLiMP could not be loaded by that name"):
        read_blimp(str(tmp_path / "nowhere"))


def test_the_published_sets_are_all_read(shared):
    pairs = read_blimp(str(shared / "blimp"))
    assert pairs["UID"].nunique() == 67 and len(pairs) == 6700


def test_evaluation_builds_no_cache(model, tokenizer, monkeypatch):
    monkeypatch.setattr("backpack_lib.model.backpack.DynamicCache", None)  # whoever makes one fails
    assert bits_per_byte(model, tokenizer, ["The nurse says."]) > 0
    assert len(log_probabilities(model, tokenizer, ["The nurse says.", "The concert."])) == 2


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


def test_nats_are_of_what_was_written_only(model, tokenizer):
    prompts, texts = ["the nurse", ""], ["the nurse said that", "the concert"]
    written = sum(len(tokenizer(t)["input_ids"]) - len(tokenizer(p)["input_ids"]) for t, p in zip(texts, prompts))
    nats = log_probabilities(model, tokenizer, prompts) - log_probabilities(model, tokenizer, texts)
    assert nats_per_token(model, tokenizer, texts, prompts) == pytest.approx(nats.sum().item() / written, rel=1e-5)


def test_each_token_has_its_loss_in_the_order_of_the_rows(model, monkeypatch):
    rows = [[0, 5, 9, 3, 7], [0, 4], [0, 8, 2]]
    monkeypatch.setitem(scores.MEMORY, "cpu", 6 * 400 * 4)
    for row, losses in zip(rows, token_nats(model, rows)):
        expected = -model(torch.tensor([row])).logits[0].log_softmax(-1)[range(len(row) - 1), row[1:]]
        torch.testing.assert_close(losses, expected.detach(), atol=1e-4, rtol=1e-4)
