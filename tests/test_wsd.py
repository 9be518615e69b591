"""Meanings told apart by likeness: descriptions from the model's own equations, and no credit for order."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny_model, tiny_tokenizer

from backpack_lib.analysis import wsd


@pytest.fixture(scope="module")
def model_and_tokenizer():
    tokenizer = tiny_tokenizer()
    return tiny_model(vocab_size=len(tokenizer), n_positions=64), tokenizer


def test_a_word_is_described_by_what_the_model_makes_of_it(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    ids, begin, end = wsd.place_of(tokenizer, ["the", "nurse", "of", "concert"], 1, n=2)
    assert tokenizer.decode(ids[begin:end]) == " nurse of"
    rows = [wsd.place_of(tokenizer, "At the concert the nurse waits".split(), place) for place in (2, 4)]
    rows.append(wsd.place_of(tokenizer, ["nurse:", "a", "person"], 0))
    described = wsd.describe(model, rows)
    for number, (ids, begin, end) in enumerate(rows):
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_senses=True, output_hidden_states=True)
        o, own, weights = 0, 0, 0
        for place in range(begin, len(ids)):
            for sense in range(model.config.num_senses):
                for earlier in range(place + 1):
                    alpha, vector = out.contextualization[0, sense, place, earlier], out.senses[0, sense, earlier]
                    o = o + alpha * vector
                    if begin <= earlier < end:
                        own = own + alpha * vector
                        weights = weights + alpha * torch.eye(model.config.num_senses)[sense]
        n = len(ids) - begin
        truth = {"weighted senses": o / n, "own senses": own / n, "own weights": weights / n}
        truth["last state"] = out.hidden_states[-1][0, begin:].mean(0)
        for way, value in truth.items():
            assert np.allclose(described[way][number], value.numpy(), atol=1e-5), way


def test_likeness_finds_the_meaning_that_reads_as_the_sentence_does(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    words = {"lemma": "nurse", "pos": "n"}
    instances = pd.DataFrame([words | {"id": "one", "place": 0, "gold": "b c", "words": "nurse: he sees the concert"}])
    glosses = {"a": "the zoo", "b": "he sees the concert", "d": "she likes"}
    rows = [words | {"key": key, "number": n, "gloss": gloss} for n, (key, gloss) in enumerate(glosses.items(), 1)]
    unused = [words | {"lemma": "unused", "key": "e", "number": 1, "gloss": "nothing"}]
    unlisted = instances.assign(lemma="unlisted")
    both = pd.concat([instances, unlisted], ignore_index=True)
    alike, nothing = wsd.similarities(model, tokenizer, both, pd.DataFrame(unused + rows))
    assert not any(wsd.answers(nothing, np.random.default_rng(0)).values())
    assert alike["right"].tolist() == [False, True, False]
    for way in wsd.WAYS:
        assert alike[way].argmax() == 1 and alike[way][1] == pytest.approx(1, abs=1e-4)


def test_answers_that_are_equal_get_no_credit_for_their_order():
    equal = {way: np.ones(4) for way in wsd.WAYS} | {"right": np.array([True, False, False, False])}
    rng = np.random.default_rng(0)
    rates = pd.DataFrame([wsd.answers(equal, rng) for _ in range(2000)]).mean()
    assert rates["first meaning"] == 1 and rates["own senses, prior 0.3"] == 1
    assert 0.2 < rates["chance"] < 0.3 and 0.2 < rates["own senses"] < 0.3


def test_the_prior_is_weighed_against_the_standardised_likeness():
    alike = {way: np.array([0.0, 1.0, 0.1]) for way in wsd.WAYS} | {"right": np.array([False, True, False])}
    said = wsd.answers(alike, np.random.default_rng(0))
    z = (1.0 - 1.1 / 3) / np.std([0.0, 1.0, 0.1]) - (0.0 - 1.1 / 3) / np.std([0.0, 1.0, 0.1])
    for share in wsd.PRIORS:
        assert said[f"last state, prior {share:g}"] == (share * z > np.log(2))
    assert said["last state"] and not said["first meaning"]
