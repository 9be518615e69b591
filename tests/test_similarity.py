"""Senses of words, their similarities, and what the senses do, on tables where the answer is known."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cosine
from scipy.stats import spearmanr

from backpack_lib.analysis import roles, similarity
from backpack_lib.analysis.senses import senses_of_words
from backpack_lib.text.words import tokens_of_word

# ---------------------------------------------------------------- similarity


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**16))
def test_similarities_are_those_of_the_definitions(k, n, seed):
    a, b = torch.randn(2, n, k, 6, generator=torch.Generator().manual_seed(seed))
    found = similarity.similarities(a, b)
    for row in range(n):
        crossed = np.array([[1 - cosine(a[row, i], b[row, j]) for j in range(k)] for i in range(k)])
        for sense in range(k):
            assert found[f"sense {sense}"][row] == pytest.approx(crossed[sense, sense], abs=1e-5)
        if k == 1:
            assert list(found) == ["sense 0"]
            continue
        expected = {
            "least, matched": crossed.diagonal().min(),
            "greatest, matched": crossed.diagonal().max(),
            "least, all pairs": crossed.min(),
            "greatest, all pairs": crossed.max(),
            "all senses end to end": 1 - cosine(a[row].flatten(), b[row].flatten()),
        }
        for name, value in expected.items():
            assert found[name][row] == pytest.approx(value, abs=1e-5)


FILES = {
    "SimLex-999.txt": "word1\tword2\tPOS\tSimLex999\tconc\r\nold\tnew\tA\t1.58\t2\r\nsmart\tintelligent\tA\t9.2\t2\r\n",
    "SimVerb-3500.txt": "take\tremove\tV\t6.81\tSYNONYMS\nfeed\tstarve\tV\t1.49\tANTONYMS\n",
    "RG65.csv": "cord;smile;0.02  \r\nnoon;string;0.04  \r\n",
    "WS353.csv": "Word 1,Word 2,Human (mean)\r\nlove,sex,6.77\r\ntiger,cat,7.35\r\n",
}


def test_the_sets_are_read_as_they_are_published(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    sets = similarity.read_sets(tmp_path)
    for name, pairs in similarity.read_sets(f"file://{tmp_path}").items():
        assert pairs.equals(sets[name])
    assert list(sets) == list(similarity.SETS)
    assert all(list(s.columns) == ["word1", "word2", "score"] and s["score"].dtype == float for s in sets.values())
    firsts = [tuple(s.iloc[0]) for s in sets.values()]
    assert firsts == [("old", "new", 1.58), ("take", "remove", 6.81), ("cord", "smile", 0.02), ("love", "sex", 6.77)]


def test_a_missing_set_is_left_out_and_a_wrong_place_or_file_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="holds none of SimLex-999.txt, SimVerb-3500.txt, RG65.csv, WS353.csv"):
        similarity.read_sets(tmp_path)
    (tmp_path / "RG65.csv").write_text(FILES["RG65.csv"])
    assert list(similarity.read_sets(tmp_path)) == ["RG-65"]
    (tmp_path / "SimVerb-3500.txt").write_text("take,remove\n")
    with pytest.raises(ValueError, match="SimVerb-3500.txt is not SimVerb-3500 as it is published"):
        similarity.read_sets(tmp_path)


def test_all_pairs_of_the_published_sets_are_kept(shared):
    sizes = {name: len(pairs) for name, pairs in similarity.read_sets(shared / "lexsim").items()}
    assert sizes == {"SimLex-999": 999, "SimVerb-3500": 3500, "RG-65": 65, "WS-353": 353}


def test_the_table_has_the_rank_correlation_of_each_similarity(model, tokenizer):
    pairs = pd.DataFrame([("nurse", "concert", 1.0), ("band", "song", 2.0), ("bank", "river", 3.0), ("he", "she", 1.5)])
    pairs.columns = ["word1", "word2", "score"]
    table = similarity.similarity_table(similarity.of_model(model, tokenizer), {"some": pairs})
    one, two = (senses_of_words(model, tokenizer, list(pairs[c])) for c in ("word1", "word2"))
    for sense in range(4):
        values = [1 - cosine(a[sense], b[sense]) for a, b in zip(one, two)]
        expected = spearmanr(values, pairs["score"]).statistic
        assert table.at[f"sense {sense}", "some"] == pytest.approx(expected)


def test_the_best_of_many_that_know_nothing_scores_nothing_on_average():
    peeked, without = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        scores, noise = rng.random(120), {f"noise {i}": rng.random(120) for i in range(20)}
        peeked.append(max(spearmanr(values, scores).statistic for values in noise.values()))
        without.append(spearmanr(similarity.held_out(noise, scores, seed=seed)[0], scores).statistic)
    assert np.mean(peeked) > 0.15 and np.mean(without) < 0.06


def test_the_one_that_knows_is_found_on_every_fold():
    rng = np.random.default_rng(0)
    scores, noise = rng.random(120), {f"noise {i}": rng.random(120) for i in range(40)}
    true = scores + 0.3 * rng.random(120)
    predicted, chosen = similarity.held_out({"constant": np.ones(120)} | noise | {"true": true}, scores)
    assert chosen == ["true"] * 10
    assert spearmanr(predicted, scores).statistic == pytest.approx(spearmanr(true, scores).statistic, abs=0.02)


def test_similarities_of_other_scales_are_mixed_fairly():
    rng = np.random.default_rng(1)
    scores = rng.random(200)
    found = {"small": scores + 0.2 * rng.random(200), "large": 1e3 * (scores + 0.2 * rng.random(200))}
    predicted, chosen = similarity.held_out(found, scores)
    least = min(spearmanr(values, scores).statistic for values in found.values())
    assert 0 <= predicted.min() and predicted.max() <= 1
    assert spearmanr(predicted, scores).statistic > least - 0.02


def test_the_held_out_table_has_an_interval_for_each_set(model, tokenizer):
    rng = np.random.default_rng(0)
    vocabulary = ["nurse", "concert", "band", "song", "bank", "river", "he", "she", "bat", "chip"]
    pairs = pd.DataFrame({"word1": rng.choice(vocabulary, 60), "word2": rng.choice(vocabulary, 60)})
    sums = {word: number for number, word in enumerate(vocabulary)}
    vectors = {word: torch.full((1, 2), 1.0) + torch.tensor([[0.0, sums[word] ** 1.5]]) for word in vocabulary}

    def of_one_vector(words):
        return torch.stack([vectors[word] for word in words])

    (similar,) = similarity.similarities(of_one_vector(pairs["word1"]), of_one_vector(pairs["word2"])).values()
    pairs["score"] = similar
    row = similarity.held_out_table(of_one_vector, {"some": pairs}, resamples=99).loc["some"]
    assert row["rho"] == pytest.approx(1) and row["low"] > 0.99 and row["chosen"] == "sense 0"
    row = similarity.held_out_table(similarity.of_model(model, tokenizer), {"some": pairs}, resamples=99).loc["some"]
    assert row["low"] < row["rho"] < row["high"] and "of 10 folds" in row["chosen"]


def test_pairs_of_each_relation_are_those_of_the_text(tokenizer):
    (known,) = {word for word in ("concert",) if len(tokens_of_word(tokenizer, word)) == 1}
    text = f"x the {known} nurse played a {known}, she said"
    found = roles.relations_of_text(tokenizer, [text], verbs=["play"])
    spell = tokenizer.convert_ids_to_tokens
    words = [tuple(spell(row.tolist())) for row in found["next word"]]
    assert ("Ġthe", "Ġconcert") in words and ("Ġconcert", "Ġnurse") in words
    objects = [tuple(spell(row.tolist())) for row in found.get("object of the verb", [])]
    assert objects == ([("Ġplayed", "Ġconcert")] if len(tokens_of_word(tokenizer, "played")) == 1 else [])
    assert all(x == y for x, y in found["itself"])
    assert set(spell(found["itself"][:, 0].tolist())) >= {"Ġthe", "Ġconcert", "Ġnurse", "Ġshe"}
    for x, y in found.get("rest of the word", np.zeros((0, 2), int)):
        assert spell(int(x)).startswith("Ġ") and not spell(int(y)).startswith("Ġ")


def test_a_planted_relation_is_found_in_its_sense_and_in_no_other(model):
    partner = torch.roll(torch.arange(500), 7)  # the partner of x is x - 7
    pairs = np.stack([np.arange(100, 400), partner[100:400].numpy()], 1)
    vectors = torch.randn(500, 4, 20, generator=torch.Generator().manual_seed(0))
    vectors[:, 2] = model.lm_head.weight.detach()[partner]

    class Planted:
        device = "cpu"
        sense_vectors = staticmethod(vectors.__getitem__)
        get_output_embeddings = staticmethod(lambda: model.lm_head)

    auc = roles.relation_auc(Planted(), pairs)
    assert auc[2] > 0.95 and np.all(np.abs(np.delete(auc, 2) - 0.5) < 0.1)


def test_the_auc_is_the_share_of_true_and_false_pairs_in_order(model):
    pairs = np.array([(3, 9), (4, 9), (5, 11), (6, 12)])
    true = roles._scores(model, pairs[:, 0], pairs[:, 1])
    shuffled = np.random.default_rng(0).permutation(pairs[:, 1])
    false = roles._scores(model, pairs[:, 0], shuffled)
    slow = [np.mean([(t > f) + (t == f) / 2 for t in true[:, l] for f in false[:, l]]) for l in range(4)]
    np.testing.assert_allclose(roles.relation_auc(model, pairs), slow)


def test_given_false_pairs_are_the_ones_compared_with(model):
    true, false = np.array([(3, 9), (4, 9), (5, 11)]), np.array([(7, 9), (8, 11)])
    pairs = [(roles._scores(model, *t[:, None]), roles._scores(model, *f[:, None])) for t in true for f in false]
    slow = np.mean([(a > b)[0] for a, b in pairs], axis=0)
    np.testing.assert_allclose(roles.relation_auc(model, true, false), slow)
    with pytest.raises(ValueError, match="no pairs to tell from false ones"):
        roles.relation_auc(model, true[:0])


def test_a_role_needs_a_high_auc_and_a_lead():
    auc = pd.DataFrame({"a": [0.9, 0.6, 0.6, 0.6], "b": [0.5, 0.52, 0.5, 0.51], "c": [0.8, 0.8, 0.81, 0.8]})
    assert list(roles.find_roles(auc)["role"]) == ["a", "no clear role", "c", "no clear role"]
    down = pd.DataFrame({"a": [0.2, 0.6, 0.6, 0.6], "b": [0.5, 0.5, 0.5, 0.65]})
    found = roles.find_roles(down)
    assert list(found["role"]) == ["against a", "no clear role", "no clear role", "b"]
    assert found["auc"][0] == 0.2 and found["lead"][0] < -1 < 1 < found["lead"][3]


def test_a_model_in_bfloat16_has_similarities_and_relations_too(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer)).to(torch.bfloat16)
    vectors = similarity.of_model(model, tokenizer)(["nurse", "concert"])
    found = similarity.similarities(vectors[:1], vectors[1:])
    assert all(np.isfinite(values).all() for values in found.values())
    assert roles.relation_auc(model, np.array([[5, 6], [7, 8]])).shape == (model.config.num_senses,)


def test_a_paired_difference_is_of_the_same_pairs_and_knows_who_is_ahead():
    rng = np.random.default_rng(0)
    words = [f"w{number}" for number in range(120)]
    pairs = pd.DataFrame({"word1": words[:60], "word2": words[60:], "score": rng.normal(size=60)})
    angle = {}
    for one, two, score in pairs.itertuples(index=False):
        angle[one], angle[two] = 0.0, 1.5 - 0.4 * score

    def knows(noise, seed):
        shifts = dict(zip(words, np.random.default_rng(seed).normal(0, noise, len(words))))
        return lambda some: torch.tensor([[[np.cos(angle[w] + shifts[w]), np.sin(angle[w] + shifts[w])]] for w in some])

    methods = {"good": knows(0.05, 1), "as good": knows(0.05, 2), "poor": knows(1.5, 3)}
    found = similarity.paired_differences(methods, {"one": pairs, "two": pairs}, resamples=200)
    assert list(found.index) == [(name, of) for name in ("as good", "poor") for of in ("one", "two", "mean")]
    assert found.loc[("poor", "mean"), "low"] > 0.1
    assert found.loc[("as good", "mean"), "low"] < 0 < found.loc[("as good", "mean"), "high"]
    rho = {name: similarity.similarity_table(of, {"one": pairs})["one"]["sense 0"] for name, of in methods.items()}
    assert found.loc[("poor", "one"), "difference"] == pytest.approx(rho["good"] - rho["poor"])


def test_input_embeddings_stand_in_as_one_sense(model, tokenizer):
    vectors = similarity.of_input_embeddings(model, tokenizer)(["nurse", "zebra"])
    E = model.get_input_embeddings().weight
    pieces = tokenizer(" zebra")["input_ids"]
    torch.testing.assert_close(
        vectors, torch.stack([E[tokenizer(" nurse")["input_ids"][0]], E[pieces].mean(0)])[:, None]
    )


def test_a_sense_number_that_does_the_same_for_all_words_is_consistent(monkeypatch):
    rng, pairs = np.random.default_rng(0), np.array([(x, y) for x in range(30) for y in range(8)])
    role = np.array([2.0, 0.0, -1.0, 0.5])

    def scores(same):
        def of(model, x, y):
            by_word = np.array([rng.permutation(role) for _ in range(30)])
            return (role if same else by_word[x]) * (y % 8 == x % 8)[:, None] + rng.normal(0, 0.1, (len(x), 4))

        return of

    pairs[:, 1] = pairs[:, 0]  # true pairs; permuted ones mostly are not
    monkeypatch.setattr(roles, "_scores", scores(same=True))
    same = roles.consistency(None, pairs)
    monkeypatch.setattr(roles, "_scores", scores(same=False))
    other = roles.consistency(None, pairs)
    assert same["words"] == 30 and same["share"] > 0.8 > other["share"] and same["null"] < 0.2
    assert np.isnan(roles.consistency(None, pairs[:4])["share"])
