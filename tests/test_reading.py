"""Reading senses: explanations and what simulates a sense from them, bigrams, matching of seeds, stored tables."""

import runpy

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny_model

from backpack_lib import load
from backpack_lib.analysis import explanations as ex
from backpack_lib.analysis import similarity
from backpack_lib.analysis.bigrams import DISCOUNT, Bigrams, losses_by_part
from backpack_lib.analysis.matching import compare_models, likeness, match, match_null, profiles
from backpack_lib.lessons import reading
from backpack_lib.text import planted
from backpack_lib.text.writing import ids_of_text


@pytest.fixture(scope="module")
def trained():
    return load("planted")


@pytest.fixture(scope="module")
def words(trained):
    return torch.tensor(planted.tokens_in_use(trained[1]))


# ---------------------------------------------------------------- said in words


def test_a_simulator_sees_words_alone_and_learns_from_them(trained, words):
    model = trained[0]
    said = ex.explain(model, words, 10, words)
    fit = torch.arange(len(words)) % 3 > 0
    simulator = ex.Simulator.fit(model, said.rows(fit), words[fit])
    with torch.no_grad():
        true = model.sense_vectors(words[~fit])
        mean = model.sense_vectors(words[fit]).mean(0)
    errors = ((simulator(said.rows(~fit)) - true) ** 2).sum((0, 2)) / ((mean - true) ** 2).sum((0, 2))
    assert errors.mean() < 0.9  # better than the mean sense on words that it has not seen
    same = ex.Explanations(said.up[:1].expand(2, -1, -1), said.down[:1].expand(2, -1, -1))
    assert torch.equal(simulator(same)[0], simulator(same)[1])


def test_a_ridge_is_that_of_its_equation():
    draw = torch.Generator().manual_seed(0)
    X, Y = torch.randn(30, 4, generator=draw).double(), torch.randn(30, 3, generator=draw).double()
    X[:, -1] = 1
    _, weights = ex._ridge(X, Y, (3.0, 0.1))
    penalty = 0.1 * 30 * X[:, :-1].var(0).mean()
    x, y = X[:, :-1] - X[:, :-1].mean(0), Y - Y.mean(0)
    slow = torch.linalg.inv(x.T @ x + penalty * torch.eye(3).double()) @ x.T @ y
    torch.testing.assert_close(weights[:-1], slow)
    torch.testing.assert_close((X @ weights).mean(0), Y.mean(0))


def test_no_word_is_simulated_by_what_has_seen_it():
    """Other senses for one word would change its own simulation if the map that makes it had seen them."""
    model = tiny_model(num_senses=3, n_embd=6)
    tokens, others, among = torch.arange(10), torch.arange(10, 30), torch.arange(30, 60)
    said, said_of_others = (ex.explain(model, part, 3, among) for part in (tokens, others))

    def simulated(changed: int = -1):
        sense_vectors = model.sense_vectors
        model.sense_vectors = lambda ids: sense_vectors(ids) + 100.0 * (ids == changed)[:, None, None]
        try:
            return torch.cat(ex.cross_fitted(model, said, tokens, said_of_others, others), -1)
        finally:
            del model.sense_vectors

    plain = simulated()
    assert plain.shape == (10, 3, 12)
    for token in range(10):
        moved = (simulated(token) - plain).abs().amax((1, 2)) > 1e-3
        assert not moved[token] and moved.sum() == 5  # the half that its own is not in


# ---------------------------------------------------------------- bigrams


def test_bigrams_are_probabilities_and_what_their_equation_says():
    bigrams = Bigrams([[0, 1, 2, 1, 3], [0, 1, 2, 2], [3]], 6)
    every = np.arange(6)
    for x in range(6):
        assert np.exp(bigrams.log_probs(np.full(6, x), every)).sum() == pytest.approx(1)
    after_1 = {2: 2, 3: 1}  # of three
    unigram = (np.bincount([1, 2, 1, 3, 1, 2, 2], minlength=6) + 1) / 13
    for y in range(6):
        slow = max(after_1.get(y, 0) - DISCOUNT, 0) / 3 + DISCOUNT * 2 / 3 * unigram[y]
        assert bigrams.log_probs(np.array([1]), np.array([y]))[0] == pytest.approx(np.log(slow))
    np.testing.assert_allclose(np.exp(bigrams.log_probs(np.full(6, 5), every)), unigram)  # never met


def test_the_last_tokens_part_is_the_sum_of_its_own_contributions(trained):
    model, tokenizer = trained
    rows = [ids_of_text(tokenizer, text.text)[:size] for text, size in zip(planted.generate(2, seed=31), (50, 30))]
    bigrams = Bigrams(rows, model.config.vocab_size)
    table, E = losses_by_part(model, rows, bigrams), model.get_output_embeddings().weight
    slow = []
    for row in sorted(rows, key=len):
        ids = torch.tensor([row])
        with torch.no_grad():
            out = model(ids, output_senses=True)
        for i, target in enumerate(row[1:]):
            own = sum(out.contextualization[0, l, i, i] * out.senses[0, l, i] for l in range(8))
            states = (E @ own, E @ out.senses[0, :, i].sum(0))
            nats = [-logits.log_softmax(-1)[target].item() for logits in (out.logits[0, i], *states)]
            slow.append([*nats, row[i], target])
    parts = ["model", "last token", "last token, renormalised", "last", "next"]
    np.testing.assert_allclose(table[parts], slow, atol=2e-3)
    counted = -bigrams.log_probs(table["last"].to_numpy(), table["next"].to_numpy())
    np.testing.assert_allclose(table["counted bigrams"], counted)


# ---------------------------------------------------------------- matching


def test_a_model_with_its_senses_in_another_order_is_matched_to_itself():
    model, tokens, among = tiny_model(num_senses=5), torch.arange(5, 40), torch.arange(5, 60)
    one = profiles(model, tokens, among)
    order = [3, 0, 4, 1, 2]
    partners, mean = match(likeness(one, one[order]))
    assert [order[p] for p in partners] == [0, 1, 2, 3, 4] and mean == pytest.approx(1, abs=1e-5)
    assert match_null(one, one[order]).max() < 0.6


def test_pairs_of_random_models_are_not_above_the_null():
    models = {name: tiny_model(seed, num_senses=5) for seed, name in enumerate("abc")}
    pairs, partners = compare_models(models, torch.arange(5, 40), torch.arange(5, 60))
    assert list(zip(pairs["one"], pairs["other"])) == list(partners) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs["p"].min() > 0.01 and pairs["random pairs"].abs().max() < 0.1
    assert (pairs["matched"] > pairs["random pairs"]).all()
    one_sense = {name: tiny_model(seed, num_senses=1) for seed, name in enumerate("ab")}
    (row,) = compare_models(one_sense, torch.arange(5, 40), torch.arange(5, 60))[0].to_dict("records")
    assert row["matched"] == row["random pairs"] and np.isnan(row["p"])


# ---------------------------------------------------------------- the tables that are stored


@pytest.fixture(scope="module")
def make():
    return runpy.run_path(str(reading.STORED / "make.py"))


@pytest.mark.slow
def test_a_row_of_stored_tables_of_text_is_what_the_code_gives(shared, make):
    valid, corpus = (str(shared / "corpus" / name) for name in ("simple-valid.txt.xz", "simple-[0-3].txt.xz"))
    stored = {file.stem: pd.read_csv(file) for file in reading.STORED.glob("*.csv")}
    model, tokenizer = load(str(reading.STORED / "seed-0"))
    bigrams = make["bigrams_of"](tokenizer, corpus)
    nats = losses_by_part(model, reading.rows_of_corpus(model, tokenizer, valid), bigrams)
    for name, value in stored["bigrams_over_training"].iloc[-1].drop("step").items():
        assert nats[name].mean() == pytest.approx(value, abs=1e-2), name
    by_sense = make["bigram_correlations"](model, bigrams, *reading.words_to_compare(tokenizer))["own bigrams"]
    np.testing.assert_allclose(by_sense, stored["bigrams_by_sense"]["own bigrams"], atol=5e-3)
    auc = make["auc_of_roles"]({"seed-0": model}, tokenizer, valid).groupby("relation")["auc"].max()
    for row in stored["returning"].query("one == 'seed-0' and other == 'seed-1'").itertuples():
        assert auc[row.relation] == pytest.approx(row.auc, abs=5e-3), row.relation
    sets = similarity.read_sets(shared / "lexsim")
    held_out = similarity.held_out_table(similarity.of_model(model, tokenizer), sets)
    similar = stored["senses"].set_index("model").loc["seed-0", "similarity"]
    assert held_out["rho"].mean() == pytest.approx(similar, abs=5e-3)
