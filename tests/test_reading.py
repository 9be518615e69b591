"""Reading senses: explanations and what simulates a sense from them, bigrams, matching of seeds, stored tables."""

import runpy
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny_model
from scipy.stats import spearmanr

from backpack_lib import load
from backpack_lib.analysis import explanations as ex
from backpack_lib.analysis import similarity
from backpack_lib.analysis.bigrams import DISCOUNT, Bigrams, bigram_correlations, losses_by_part
from backpack_lib.analysis.matching import compare_models, likeness, match, match_null, profiles
from backpack_lib.analysis.scores import bits_per_byte
from backpack_lib.lessons import reading
from backpack_lib.text import planted
from backpack_lib.text.corpora import open_corpus
from backpack_lib.text.writing import ids_of_text


@pytest.fixture(scope="module")
def trained():
    return load("planted")


@pytest.fixture(scope="module")
def words(trained):
    return torch.tensor(planted.tokens_in_use(trained[1]))


# ---------------------------------------------------------------- said in words


def test_an_explanation_is_the_highest_and_lowest_words(trained, words):
    model, tokens = trained[0], words[[3, 40]]
    said = ex.explain(model, tokens, 4, words)
    with torch.no_grad():
        pushes = model.sense_vectors(tokens) @ model.get_output_embeddings().weight[words].T
    for n in range(2):
        for l in range(model.config.num_senses):
            order = words[pushes[n, l].argsort(descending=True)].tolist()
            assert said.up[n, l].tolist() == order[:4] and said.down[n, l].tolist() == order[::-1][:4]
    assert torch.equal(said.first(2).up, said.up[..., :2]) and torch.equal(said.rows([1]).down, said.down[1:])


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
    with pytest.raises(ValueError, match="at least 10 words"):
        ex.Simulator.fit(model, said.rows(slice(3)), words[:3])


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


def test_correlations_with_bigrams_are_spearmans(trained, words):
    model, tokenizer = trained
    bigrams = Bigrams([ids_of_text(tokenizer, text.text) for text in planted.generate(200)], model.config.vocab_size)
    tokens, among = words[10:14], words[20:60]
    table = bigram_correlations(model, bigrams, tokens, among)
    E, y = model.get_output_embeddings().weight[among], among.numpy().copy()
    slow = np.zeros((4, 4, 8))
    for i, x in enumerate(tokens):
        for j, other in enumerate(tokens):
            counts = bigrams.log_probs(np.full(40, int(other)), y) - np.log(bigrams.unigram[y])
            for l in range(8):
                pushes = (E @ model.sense_vectors(x[None])[0, l]).detach().numpy()
                slow[i, j, l] = spearmanr(pushes, counts).statistic
    np.testing.assert_allclose(table["own bigrams"], np.mean([slow[i, i] for i in range(4)], axis=0), atol=1e-6)
    np.testing.assert_allclose(table["another word"], np.mean([slow[i, i - 1] for i in range(4)], axis=0), atol=1e-6)


# ---------------------------------------------------------------- matching


def test_matching_is_the_best_of_all_assignments():
    table = np.random.default_rng(3).normal(size=(5, 5))
    best = max(permutations(range(5)), key=lambda order: table[range(5), order].sum())
    partners, mean = match(table)
    assert tuple(partners) == best and mean == pytest.approx(table[range(5), best].mean())


def test_profiles_are_correlations_beyond_what_all_words_share():
    model, tokens, among = tiny_model(), torch.arange(5, 12), torch.arange(20, 50)
    with torch.no_grad():
        pushes = (model.sense_vectors(tokens) @ model.get_output_embeddings().weight[among].T).double().numpy()
    pushes = pushes - pushes.mean(-1, keepdims=True)
    pushes = pushes - pushes.mean(0)
    slow = np.mean([np.corrcoef(pushes[n, 0], pushes[n, 2])[0, 1] for n in range(7)])
    of_model = profiles(model, tokens, among)
    assert likeness(of_model, of_model)[0, 2] == pytest.approx(slow, abs=1e-5)


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


def test_returning_roles_ask_whether_the_best_senses_are_partners(make):
    rows = [("a", "r", 0, 0.6), ("a", "r", 1, 0.9), ("b", "r", 0, 0.8), ("b", "r", 1, 0.5)]
    roles = pd.DataFrame(rows, columns=["model", "relation", "sense", "auc"])
    (row,) = make["returning_roles"](roles, {("a", "b"): np.array([1, 0])}).to_dict("records")
    assert (row["sense"], row["other sense"], row["auc"], row["partners"]) == (1, 0, 0.9, True)
    assert not make["returning_roles"](roles, {("a", "b"): np.array([0, 1])})["partners"].iloc[0]


def test_losses_are_divided_by_how_often_the_last_token_is_met(make):
    bigrams = Bigrams([[1, 2] * 150, [3, 2] * 20], 6)
    nats = pd.DataFrame({name: [1.0, 2.0, 4.0] for name in make["PARTS"]}).assign(last=[1, 3, 3])
    table = make["by_frequency"](nats, bigrams).set_index("last token is met")
    assert table["model"].to_dict() == {"below 100": 3, "100 to 1,000": 1} and list(table["tokens"]) == [2, 1]


@pytest.mark.slow
def test_a_row_of_each_stored_table_is_what_the_code_gives(shared, make):
    valid, corpus = (str(shared / "corpus" / name) for name in ("simple-valid.txt.xz", "simple-[0-3].txt.xz"))
    stored = {file.stem: pd.read_csv(file) for file in reading.STORED.glob("*.csv")}
    model, tokenizer = load(str(reading.STORED / "seed-0"))
    bigrams = make["bigrams_of"](tokenizer, corpus)
    nats = losses_by_part(model, reading.rows_of_corpus(model, tokenizer, valid), bigrams)
    for name, value in stored["bigrams_over_training"].iloc[-1].drop("step").items():
        assert nats[name].mean() == pytest.approx(value, abs=1e-2), name
    by_frequency = make["by_frequency"](nats, bigrams)["counted bigrams"]
    np.testing.assert_allclose(by_frequency, stored["bigrams_by_frequency"]["counted bigrams"], atol=1e-3)
    by_sense = bigram_correlations(model, bigrams, *reading.words_to_compare(tokenizer))["own bigrams"]
    np.testing.assert_allclose(by_sense, stored["bigrams_by_sense"]["own bigrams"], atol=5e-3)
    auc = make["auc_of_roles"]({"seed-0": model}, tokenizer, valid).groupby("relation")["auc"].max()
    for row in stored["returning"].query("one == 'seed-0' and other == 'seed-1'").itertuples():
        assert auc[row.relation] == pytest.approx(row.auc, abs=5e-3), row.relation
    texts = [text for text in open_corpus(valid).read() if len(text) > 200][:200]
    by_k = stored["senses"].set_index("model").loc["seed-0"]
    assert bits_per_byte(model, tokenizer, texts) == pytest.approx(by_k["bits per byte"], abs=3e-3)
    sets = similarity.read_sets(shared / "lexsim")
    held_out = similarity.held_out_table(similarity.of_model(model, tokenizer), sets)
    assert held_out["rho"].mean() == pytest.approx(by_k["similarity"], abs=5e-3)
