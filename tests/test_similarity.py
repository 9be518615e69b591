"""Word similarity, and what senses do, against slow versions, and on tables where the answer is known."""

import re

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
from backpack_lib.text.words import tokens_of_word

# ---------------------------------------------------------------- the sets

FILES = {
    "SimLex-999.txt": "word1\tword2\tPOS\tSimLex999\tconc\r\nold\tnew\tA\t1.58\t2\r\nsmart\tintelligent\tA\t9.2\t2\r\n",
    "SimVerb-3500.txt": "take\tremove\tV\t6.81\tSYNONYMS\nfeed\tstarve\tV\t1.49\tANTONYMS\n",
    "RG65.csv": "cord;smile;0.02  \r\nnoon;string;0.04  \r\n",
    "WS353.csv": "Word 1,Word 2,Human (mean)\r\nlove,sex,6.77\r\ntiger,cat,7.35\r\n",
}


def test_the_sets_are_read_as_they_are_published_and_a_missing_one_is_left_out(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    for source in (tmp_path, f"file://{tmp_path}"):
        sets = similarity.read_sets(source)
        assert list(sets) == list(similarity.SETS)
        scores = [tuple(pairs["score"]) for pairs in sets.values()]
        assert scores == [(1.58, 9.2), (6.81, 1.49), (0.02, 0.04), (6.77, 7.35)]
        assert all(len(pairs) == 2 and pairs["score"].dtype == float for pairs in sets.values())
    (tmp_path / "RG65.csv").unlink()
    assert "RG-65" not in similarity.read_sets(tmp_path)


def test_all_pairs_of_the_published_sets_are_kept(shared, recwarn):
    sizes = {name: len(pairs) for name, pairs in similarity.read_sets(shared / "lexsim").items()}
    assert sizes == {"SimLex-999": 999, "SimVerb-3500": 3500, "RG-65": 65, "WS-353": 353}
    assert not recwarn


RG, WS = "cord;smile;0.02\nnoon;string;0.04\n", "love,sex,6.77\ntiger,cat,7.35\n"
OF_RG, OF_WS = [("cord", "smile", 0.02), ("noon", "string", 0.04)], [("love", "sex", 6.77), ("tiger", "cat", 7.35)]
ODD = "null;NA;1\nnan;None;2\nyes;1984;3\n"
AS_PEOPLE_HAVE_THEM = [  # file, what is in it, the pairs that are read, and words of the warning or refusal
    ("RG65.csv", RG + "gem;jewel;n/a\n", OF_RG, "1 of 3 rows .* the first of them: 3"),
    ("RG65.csv", RG + "gem;jewel\n", OF_RG, "1 of 3 rows"),
    ("RG65.csv", RG + "gem;jewel;inf\n", OF_RG, "1 of 3 rows"),
    ("RG65.csv", " ;gem;3.1\n" + RG, OF_RG, "1 of 3 rows .* the first of them: 1"),
    ("RG65.csv", "word;other;score\n" + RG, OF_RG, "the first of them: 1"),
    ("RG65.csv", "\ufeff" + RG.replace("smile", " smile "), OF_RG, None),
    ("RG65.csv", ODD, [("null", "NA", 1), ("nan", "None", 2), ("yes", "1984", 3)], None),
    ("WS353.csv", WS, OF_WS, None),  # without its header
    ("RG65.csv", "cord,smile,0.02\n", None, "is not RG-65 as it is published"),
    ("RG65.csv", "cord;smile;0,02\n", None, "no row with two words and a score"),
    ("unknown.csv", WS, None, "holds none of SimLex-999.txt, SimVerb-3500.txt, RG65.csv, WS353.csv"),
]


@pytest.mark.parametrize(("file", "content", "pairs", "message"), AS_PEOPLE_HAVE_THEM)
def test_a_row_without_a_word_or_a_number_is_never_ranked(file, content, pairs, message, tmp_path, recwarn):
    (tmp_path / file).write_text(content, encoding="utf-8")
    if pairs is None:
        with pytest.raises(ValueError, match=message):
            similarity.read_sets(tmp_path)
        return
    (read,) = similarity.read_sets(tmp_path).values()
    assert [tuple(row) for row in read.itertuples(index=False)] == pairs
    assert not recwarn if message is None else re.search(message, str(recwarn.pop().message))


# ---------------------------------------------------------------- similarities


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**16))
def test_similarities_are_those_of_the_definitions(k, n, seed):
    a, b = torch.randn(2, n, k, 6, generator=torch.Generator().manual_seed(seed))
    values = similarity.similarities(a, b)
    for row in range(n):
        crossed = np.array([[1 - cosine(a[row, i], b[row, j]) for j in range(k)] for i in range(k)])
        expected = {f"sense {l}": crossed[l, l] for l in range(k)}
        if k > 1:
            expected |= {
                "least, matched": crossed.diagonal().min(),
                "greatest, matched": crossed.diagonal().max(),
                "least, all pairs": crossed.min(),
                "greatest, all pairs": crossed.max(),
                "all senses end to end": 1 - cosine(a[row].flatten(), b[row].flatten()),
            }
        assert {name: of_pairs[row] for name, of_pairs in values.items()} == pytest.approx(expected, abs=1e-5)


def test_the_best_of_many_that_know_nothing_scores_nothing_and_one_that_knows_is_found():
    peeked, honest = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        scores, noise = rng.random(120), {f"noise {i}": rng.random(120) for i in range(20)}
        peeked.append(max(spearmanr(values, scores).statistic for values in noise.values()))
        honest.append(spearmanr(similarity.held_out(noise, scores, seed=seed)[0], scores).statistic)
    assert np.mean(peeked) > 0.15 and np.mean(honest) < 0.06
    true = 1e3 * (scores + 0.3 * rng.random(120))  # of another scale
    predicted, chosen = similarity.held_out({"constant": np.ones(120)} | noise | {"true": true}, scores)
    assert chosen == ["true"] * 10 and 0 <= predicted.min() <= predicted.max() <= 1
    assert spearmanr(predicted, scores).statistic == pytest.approx(spearmanr(true, scores).statistic, abs=0.02)


def test_a_paired_difference_is_of_the_same_pairs_and_knows_who_is_ahead():
    rng = np.random.default_rng(0)
    words = [f"w{number}" for number in range(120)]
    pairs = pd.DataFrame({"word1": words[:60], "word2": words[60:], "score": rng.normal(size=60)})
    angles = dict.fromkeys(words[:60], 0.0) | dict(zip(words[60:], 1.5 - 0.4 * pairs["score"]))

    def knows(noise, seed):
        shifts = dict(zip(words, np.random.default_rng(seed).normal(0, noise, len(words))))
        turned = {word: angles[word] + shifts[word] for word in words}
        return lambda asked: torch.tensor([[[np.cos(turned[word]), np.sin(turned[word])]] for word in asked])

    methods = {"good": knows(0.05, 1), "as good": knows(0.05, 2), "poor": knows(1.5, 3)}
    sets = {"one": pairs, "two": pairs}
    table = similarity.paired_differences(methods, sets)
    assert list(table.index) == [(name, of) for name in ("as good", "poor") for of in ("one", "two", "mean")]
    assert table.loc[("poor", "mean"), "low"] > 0.1
    assert table.loc[("as good", "mean"), "low"] < 0 < table.loc[("as good", "mean"), "high"]
    held_out = {name: similarity.held_out_table(methods[name], {"one": pairs}).loc["one"] for name in methods}
    assert table.loc[("poor", "one"), "difference"] == pytest.approx(held_out["good"]["rho"] - held_out["poor"]["rho"])
    assert held_out["poor"]["low"] < held_out["poor"]["rho"] < held_out["poor"]["high"] < held_out["good"]["low"]


# ---------------------------------------------------------------- roles


def test_pairs_of_each_relation_are_those_of_the_text(tokenizer):
    text = "x the concert nurse played a concert, she said"
    relations = roles.relations_of_text(tokenizer, [text, "the nurse said", "x", ""], verbs=["play"])
    pairs = {
        relation: {tuple(tokenizer.convert_ids_to_tokens(row.tolist())) for row in rows}
        for relation, rows in relations.items()
    }
    assert {("Ġthe", "Ġconcert"), ("Ġconcert", "Ġnurse")} <= pairs["next word"]
    assert pairs["itself"] >= {(word, word) for word in ("Ġthe", "Ġconcert", "Ġnurse", "Ġshe")}
    played = len(tokens_of_word(tokenizer, "played")) == 1
    assert pairs.get("object of the verb", set()) == ({("Ġplayed", "Ġconcert")} if played else set())
    assert all(x[0] == "Ġ" != y[0] for x, y in pairs.get("rest of the word", ()))


def test_the_auc_is_the_share_of_true_and_false_pairs_in_order(model):
    true, false = np.array([(3, 9), (4, 9), (5, 11), (5, 11)]), np.array([(7, 9), (8, 11), (5, 11)])  # with a tie
    E = model.get_output_embeddings().weight

    def push(x, y):
        return (model.sense_vectors(torch.tensor([x]))[0] @ E[y]).detach().numpy()

    slow = [(push(*t) > push(*f)) + (push(*t) == push(*f)) / 2 for t in true for f in false]
    np.testing.assert_allclose(roles.relation_auc(model, true, false), np.mean(slow, axis=0))
    with pytest.raises(ValueError, match="no pairs to tell from false ones"):
        roles.relation_auc(model, true[:0])
    half = tiny_model(vocab_size=500).to(torch.bfloat16)
    assert roles.relation_auc(half, true).shape == (half.config.num_senses,)


class Planted:
    """A model whose sense vectors are a table, (V, k, d), and whose E is another model's."""

    device = "cpu"

    def __init__(self, vectors, model):
        self.sense_vectors = vectors.__getitem__
        self.get_output_embeddings = model.get_output_embeddings


def test_a_planted_relation_is_found_in_its_sense_and_is_a_role_of_its_number(model):
    partner = torch.roll(torch.arange(500), 7)  # the partner of x is x - 7
    pairs = np.stack([np.arange(100, 400), partner[100:400].numpy()], 1)
    vectors = torch.randn(500, 4, 20, generator=torch.Generator().manual_seed(0))
    vectors[:, 2] = model.lm_head.weight.detach()[partner]
    auc = roles.relation_auc(Planted(vectors, model), pairs)
    assert auc[2] > 0.95 and np.all(np.abs(np.delete(auc, 2) - 0.5) < 0.1)
    several = np.concatenate([pairs] * roles.PAIRS_OF_A_WORD)
    same = roles.consistency(Planted(vectors, model), several)
    order = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(x)) for x in range(500)])
    dealt = Planted(vectors[torch.arange(500)[:, None], order], model)  # each word has the role in another sense
    other = roles.consistency(dealt, several)
    assert same["words"] == 300 and same["share"] > 5 * same["null"] and other["share"] < 3 * other["null"]
    assert np.isnan(roles.consistency(dealt, pairs)["share"])  # too few pairs of each word


def test_a_role_needs_a_high_auc_and_a_lead():
    auc = pd.DataFrame({"a": [0.9, 0.6, 0.6, 0.6], "b": [0.5, 0.52, 0.5, 0.51], "c": [0.8, 0.8, 0.81, 0.8]})
    assert list(roles.find_roles(auc)["role"]) == ["a", "no clear role", "c", "no clear role"]
    down = pd.DataFrame({"a": [0.2, 0.6, 0.6, 0.6], "b": [0.5, 0.5, 0.5, 0.65]})
    named = roles.find_roles(down)
    assert list(named["role"]) == ["against a", "no clear role", "no clear role", "b"]
    assert named["auc"][0] == 0.2 and named["lead"][0] < -1 < 1 < named["lead"][3]
