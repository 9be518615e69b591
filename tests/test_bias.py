"""Bias is measured as probabilities say, split exactly, tested soundly, and turned down as was predicted."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT, tiny_model, tiny_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import bootstrap
from transformers import GPT2Config, GPT2LMHeadModel

from backpack_lib import SenseEdits, attribute
from backpack_lib.analysis import bias
from backpack_lib.analysis.bias import SLOT, Split, debias, fit_scales, localize, log_odds, nullspace, split_odds
from backpack_lib.analysis.scores import next_log_probabilities
from backpack_lib.analysis.statistics import bootstrap_intervals
from backpack_lib.text.words import token_of_word, tokens_of_word
from backpack_lib.text.writing import ids_of_text

TOKENIZER = tiny_tokenizer()
V = len(TOKENIZER)
BACKPACK = tiny_model(vocab_size=V, num_senses=4, n_positions=48)


def tiny_transformer():
    torch.manual_seed(1)
    sizes = dict(vocab_size=V, n_positions=48, n_embd=20, n_layer=2, n_head=2, initializer_range=0.2)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)).eval()


TRANSFORMER = tiny_transformer()
PROFESSIONS = ["nurse", "sheriff", "judge", "waiter", "guard"]  # of one token, and of several
TEMPLATES = [
    "At the concert, the {profession} says that",
    "the {profession}",
    "She sees the {profession} near the bats.",
]


def id_of(word):
    return TOKENIZER(" " + word)["input_ids"][0]


def slow_odds(model, professions, templates, first="he", second="she"):
    """From the probabilities, one prompt at a time."""
    rows = []
    for profession in professions:
        row = []
        for template in templates:
            ids = torch.tensor([ids_of_text(TOKENIZER, template.replace(SLOT, profession))])
            p = model(ids).logits[0, -1].softmax(-1)
            row.append((p[id_of(first)] / p[id_of(second)]).log().item())
        rows.append(row)
    return np.array(rows)


# ---------------------------------------------------------------- measuring


@pytest.mark.parametrize("model", [BACKPACK, TRANSFORMER], ids=["Backpack", "Transformer"])
def test_log_odds_are_those_of_the_probabilities_for_any_model_and_pair(model):
    assert len(TOKENIZER(" waiter")["input_ids"]) > 1 == len(TOKENIZER(" nurse")["input_ids"])
    odds = log_odds(model, TOKENIZER, PROFESSIONS, TEMPLATES)
    assert list(odds.index) == PROFESSIONS and list(odds.columns) == TEMPLATES
    np.testing.assert_allclose(odds, slow_odds(model, PROFESSIONS, TEMPLATES), atol=1e-4)
    other = log_odds(model, TOKENIZER, PROFESSIONS, TEMPLATES, pair=("the", "nurse"))
    np.testing.assert_allclose(other, slow_odds(model, PROFESSIONS, TEMPLATES, "the", "nurse"), atol=1e-4)


@pytest.mark.parametrize("model", [BACKPACK, TRANSFORMER], ids=["Backpack", "Transformer"])
def test_more_prompts_than_fit_in_a_batch_are_predicted_as_each_alone(model):
    prompts = [" the" * (number % 7) + " nurse" for number in range(70)]
    found = next_log_probabilities(model, TOKENIZER, prompts)
    for number in (0, 5, 63, 64, 69):
        alone = model(torch.tensor([ids_of_text(TOKENIZER, prompts[number])])).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(found[number], alone, atol=1e-4, rtol=1e-4)


def test_the_ratio_is_the_mean_of_the_likelier_over_the_less_likely():
    odds = log_odds(BACKPACK, TOKENIZER, PROFESSIONS, TEMPLATES)
    p = np.exp(odds.to_numpy())
    by_hand = np.mean([max(x, 1 / x) for x in p.flatten()])
    assert bias.bias_ratio(BACKPACK, TOKENIZER, PROFESSIONS, TEMPLATES) == pytest.approx(by_hand)
    assert bias.ratio(np.zeros((2, 3))) == 1
    assert bias.excess_removed(np.log([[3.0, 5.0]]), np.log([[1.0, 3.0]])) == pytest.approx(2 / 3)


def test_how_far_other_words_moved_leaves_the_pair_out():
    p, q = np.array([[0.5, 0.2, 0.2, 0.1]]), np.array([[0.1, 0.2, 0.5, 0.2]])
    p_rest, q_rest = p[0, [1, 3]] / 0.3, q[0, [1, 3]] / 0.4
    expected = (p_rest * np.log(p_rest / q_rest)).sum()
    found = bias.kl_of_other_words(torch.tensor(p).log(), torch.tensor(q).log(), but=[0, 2])
    assert found == pytest.approx(expected)
    assert bias.kl_of_other_words(torch.tensor(p).log(), torch.tensor(p).log(), but=[0]) == 0


# ---------------------------------------------------------------- what carries it


@pytest.mark.parametrize("at_once", [64, 4])
def test_the_parts_are_those_of_attribution_and_sum_to_the_odds(at_once, monkeypatch):
    monkeypatch.setattr("backpack_lib.analysis.scores.PROMPTS_AT_ONCE", at_once)
    split = split_odds(BACKPACK, TOKENIZER, PROFESSIONS, TEMPLATES)
    np.testing.assert_allclose(split.odds, log_odds(BACKPACK, TOKENIZER, PROFESSIONS, TEMPLATES), atol=1e-4)
    for p, t in itertools.product(range(len(PROFESSIONS)), range(len(TEMPLATES))):
        ids = torch.tensor(ids_of_text(TOKENIZER, TEMPLATES[t].replace(SLOT, PROFESSIONS[p])))
        parts = attribute(BACKPACK, ids, id_of("he"), id_of("she"))
        own = torch.isin(ids, torch.tensor(tokens_of_word(TOKENIZER, PROFESSIONS[p])))
        np.testing.assert_allclose(split.own[p, t], parts[own].sum(0), atol=1e-4)
        np.testing.assert_allclose(split.rest[p, t], parts[~own].sum(0), atol=1e-4)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), st.lists(st.floats(-2, 3), min_size=5, max_size=5)
)
@example([0], [0.0, 0.0, 0.0, 0.0, 1.0])
@settings(max_examples=15, deadline=None)
def test_the_odds_after_scaling_are_known_beforehand(senses, scales):
    words = ["nurse", "concert", "the", "says", "her"]  # of one token each, so that each is scaled apart
    split = split_odds(BACKPACK, TOKENIZER, words, TEMPLATES)
    edits = debias(BACKPACK, TOKENIZER, words, senses, dict(zip(words, scales)))
    for row, (word, scale) in enumerate(zip(words, scales)):
        with debias(BACKPACK, TOKENIZER, [word], senses, scale).applied():
            alone = log_odds(BACKPACK, TOKENIZER, [word], TEMPLATES)
        np.testing.assert_allclose(split.scaled(senses, np.array(scales))[row], alone.iloc[0], atol=1e-3)
    assert sum(len(edit.tokens) for edit in edits) == sum(scale != 1 for scale in scales)  # a scale of 1 is no edit


def made_split(rng, P=20, T=6, k=5, carrier=None, noise=0.3):
    """A split in which one sense, several or none carries the difference between professions."""
    own = noise * rng.normal(size=(P, 1, k)) + 0.05 * rng.normal(size=(P, T, k))
    if carrier is not None:
        own[..., carrier] += rng.normal(size=(P, 1, 1))
    rest = 0.1 * rng.normal(size=(1, T, k)) + 0.02 * rng.normal(size=(P, T, k))
    return Split((own + rest).sum(-1), own, rest)


def localize_made(split, monkeypatch, **settings):
    monkeypatch.setattr(bias, "split_odds", lambda *_: split)
    settings = {"resamples": 200, "permutations": 499} | settings
    return localize(None, None, list(range(len(split.odds))), [""], **settings)


def test_a_sense_or_set_that_carries_the_difference_is_found(monkeypatch):
    for carrier, expected in ([2], {2}), ([0, 3], {0, 3}):
        found = localize_made(made_split(np.random.default_rng(0), carrier=carrier, noise=0.1), monkeypatch)
        assert set(found.senses) == expected and found.p < 0.01 and found.share >= 0.9
        assert (found.table["low"] < found.table["share"]).all() and (found.table["share"] < found.table["high"]).all()
        assert found.table["share"].sum() + found.elsewhere == pytest.approx(1)
        assert (found.table.loc[found.senses, "p"] < 0.01).all() and found.table["p"].notna().sum() == len(expected)
    assert list(found.table.columns) == ["level", "share", "low", "high", "p", "ratio without"]


def test_where_no_sense_is_special_the_test_seldom_says_so(monkeypatch):
    found = [
        localize_made(made_split(np.random.default_rng(seed)), monkeypatch, permutations=99) for seed in range(100)
    ]
    assert np.mean([one.table["p"].min() <= 0.05 for one in found]) <= 0.12
    assert np.mean([one.p <= 0.05 for one in found]) <= 0.12
    assert min(one.table["p"].min() for one in found) < 0.2 < 0.8 < max(one.table["p"].min() for one in found)


def test_p_is_the_share_of_all_exchanges_that_do_as_well(monkeypatch):
    split = made_split(np.random.default_rng(3), P=4, k=3, noise=1.0)
    y = split.odds.mean(1) - split.odds.mean()
    c = split.own.mean(1) - split.own.mean((0, 1))
    exact = []
    for orders in itertools.product(itertools.permutations(range(3)), repeat=4):
        exact.append(max(sum(c[p, orders[p][l]] * y[p] for p in range(4)) for l in range(3)) / (y @ y))
    found = localize_made(split, monkeypatch, permutations=4000)
    best = found.table["share"].idxmax()
    expected = np.mean(np.array(exact) >= found.table["share"][best] - 1e-9)
    assert found.table["p"][best] == pytest.approx(expected, abs=0.03)


def test_the_smallest_set_and_what_cannot_be_carried():
    assert bias.fewest(np.array([0.2, 0.5, -0.1, 0.3]), 0.5) == [1]
    assert bias.fewest(np.array([0.2, 0.5, -0.1, 0.3]), 0.9) == [1, 3, 0]
    assert bias.fewest(np.array([0.1, -0.1, 0.2]), 0.9) == [2, 0]


def test_without_any_difference_there_is_nothing_to_find(monkeypatch):
    split = Split(np.ones((4, 3)), np.full((4, 3, 2), 0.2), np.full((4, 3, 2), 0.3))
    with pytest.raises(ValueError, match="The log-odds of all professions are the same"):
        localize_made(split, monkeypatch)


def test_intervals_agree_with_scipys_where_only_professions_vary():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, 1)) + np.zeros((1, 8))
    ours = bootstrap_intervals(lambda x: x.mean(), values, resamples=4000)
    scipys = bootstrap((values[:, 0],), np.mean, method="percentile", n_resamples=4000, rng=rng).confidence_interval
    np.testing.assert_allclose(ours, scipys, atol=0.03)
    templates = rng.normal(size=(1, 8)) + np.zeros((40, 1))
    low, high = bootstrap_intervals(lambda x: x.mean(), templates)
    assert high - low > 0.5  # few templates that differ are little evidence, however many professions there are


# ---------------------------------------------------------------- turning it down


def test_fitted_scales_are_the_best_between_the_bounds():
    words, senses = ["nurse", "concert", "says"], [0, 2]
    split = split_odds(BACKPACK, TOKENIZER, words, TEMPLATES)
    scales = fit_scales(BACKPACK, TOKENIZER, words, TEMPLATES, senses, bounds=(-1, 2))
    for row, word in enumerate(words):
        turned = split.own[row][:, senses].sum(-1)
        best = minimize_scalar(
            lambda p: np.exp(abs(split.odds[row] - (1 - p) * turned)).mean(), bounds=(-1, 2), method="bounded"
        )
        assert scales[word] == pytest.approx(best.x, abs=3 / (bias.GRID - 1))
    shared = fit_scales(BACKPACK, TOKENIZER, words, TEMPLATES, senses, shared=True)
    assert shared.nunique() == 1 and shared.between(0, 1).all() and list(shared.index) == words
    before = bias.bias_ratio(BACKPACK, TOKENIZER, words, TEMPLATES)
    with debias(BACKPACK, TOKENIZER, words, senses, scales).applied():
        assert bias.bias_ratio(BACKPACK, TOKENIZER, words, TEMPLATES) < before


def test_what_makes_no_difference_is_left_alone(monkeypatch):
    split = Split(np.ones((2, 3)), np.zeros((2, 3, 4)), np.full((2, 3, 4), 0.25))
    monkeypatch.setattr(bias, "split_odds", lambda *_: split)
    assert (fit_scales(BACKPACK, TOKENIZER, ["nurse", "says"], TEMPLATES, [1], bounds=(-1, 3)) == 1).all()


def test_a_transformers_scales_are_fitted_by_running_it():
    scales = fit_scales(TRANSFORMER, TOKENIZER, ["nurse", "says"], TEMPLATES, bounds=(0, 2))
    tried = {}
    for scale in (0.0, 0.5, 1.0, 1.5, 2.0):
        with nullspace(TRANSFORMER, TOKENIZER, ["nurse"], scale):
            tried[scale] = bias.bias_ratio(TRANSFORMER, TOKENIZER, ["nurse"], TEMPLATES)
    with nullspace(TRANSFORMER, TOKENIZER, ["nurse", "says"], scales):
        assert bias.bias_ratio(TRANSFORMER, TOKENIZER, ["nurse"], TEMPLATES) <= min(tried.values()) + 1e-6


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 3.0)])
def test_scales_between_those_that_are_tried_are_interpolated_well(bounds, models, monkeypatch):
    _, transformer, tokenizer = models
    words, templates = ["nurse", "doctor", "guard", "baker"], ["At the farm, the {profession} hopes that"]
    found = fit_scales(transformer, tokenizer, words, templates, bounds=bounds)
    monkeypatch.setattr(bias, "TRIED", bias.GRID)
    pd.testing.assert_series_equal(found, fit_scales(transformer, tokenizer, words, templates, bounds=bounds))


def test_nullspace_takes_the_direction_out_of_the_professions_inputs_only():
    prompt = torch.tensor([ids_of_text(TOKENIZER, "the nurse says that")])
    E = TRANSFORMER.get_input_embeddings().weight.detach()
    direction = (E[id_of("she")] - E[id_of("he")]) / (E[id_of("she")] - E[id_of("he")]).norm()
    inputs = E[prompt[0]].clone()
    where = (prompt[0] == id_of("nurse")).nonzero()
    inputs[where] -= 0.7 * (inputs[where] @ direction)[..., None] * direction
    with torch.no_grad():
        expected, plain = TRANSFORMER(inputs_embeds=inputs[None]).logits, TRANSFORMER(prompt).logits
        with nullspace(TRANSFORMER, TOKENIZER, ["nurse"], 0.3):
            torch.testing.assert_close(TRANSFORMER(prompt).logits, expected)
        with nullspace(TRANSFORMER, TOKENIZER, ["nurse"], 1.0):
            torch.testing.assert_close(TRANSFORMER(prompt).logits, plain)
        with pytest.raises(RuntimeError), nullspace(TRANSFORMER, TOKENIZER, ["nurse"]):
            raise RuntimeError
        assert torch.equal(TRANSFORMER(prompt).logits, plain)


def test_scaling_along_the_pair_does_the_same_to_its_odds_and_less_to_other_words():
    senses, scales = [0, 3], {"nurse": -0.5, "judge": 0.25, "guard": 1.0}
    whole, narrow = (
        debias(BACKPACK, TOKENIZER, list(scales), senses, scales, along) for along in (None, ("he", "she"))
    )
    prompts = bias.fill(TOKENIZER, list(scales), TEMPLATES)
    plain = next_log_probabilities(BACKPACK, TOKENIZER, prompts)
    changes = []
    for edits in (whole, narrow):
        with edits.applied():
            changes.append(next_log_probabilities(BACKPACK, TOKENIZER, prompts) - plain)
    odds = [change[:, id_of("he")] - change[:, id_of("she")] for change in changes]
    torch.testing.assert_close(*odds, atol=1e-4, rtol=1e-4)
    assert odds[0].abs().max() > 0.1
    others = [change - change.median(1, keepdim=True).values for change in changes]
    assert others[1].abs().mean() < 0.5 * others[0].abs().mean()


def test_texts_without_a_profession_stay_as_they_are_and_the_edit_can_be_shared(tmp_path):
    edits = debias(BACKPACK, TOKENIZER, PROFESSIONS, [1, 3], dict.fromkeys(PROFESSIONS, 0.25))
    edits.save(tmp_path / "shared.safetensors")
    loaded = SenseEdits.load(tmp_path / "shared.safetensors", BACKPACK, TOKENIZER)
    other = ["She likes her bat"]
    assert not {i for word in PROFESSIONS for i in tokens_of_word(TOKENIZER, word)} & {
        *TOKENIZER(other[0])["input_ids"]
    }
    untouched, plain = (
        next_log_probabilities(BACKPACK, TOKENIZER, other),
        log_odds(BACKPACK, TOKENIZER, PROFESSIONS, TEMPLATES),
    )
    with edits.applied():
        assert torch.equal(next_log_probabilities(BACKPACK, TOKENIZER, other), untouched)
        changed = log_odds(BACKPACK, TOKENIZER, PROFESSIONS, TEMPLATES)
    with loaded.applied():
        assert changed.equals(log_odds(BACKPACK, TOKENIZER, PROFESSIONS, TEMPLATES)) and not changed.equals(plain)


# ---------------------------------------------------------------- data and bad input


def test_templates_for_fitting_and_testing_never_mix():
    for language in json.loads((ROOT / "data" / "prompts.json").read_text()).values():
        fit, test = language["fit"], language["test"]
        bias.check_split(fit, test)
        assert len(set(fit)) == len(fit) >= 6 and len(set(test)) == len(test) >= 14
        assert all(template.count(SLOT) == 1 for template in fit + test)
        # Not only other templates but other forms: what the prediction is read from differs.
        assert not {tuple(t.split()[-2:]) for t in fit} & {tuple(t.split()[-2:]) for t in test}
        assert {"he", "she"} == set(language["by definition"])


def test_the_shares_of_women_are_those_of_the_bureau():
    shared = ROOT.parent / "shared" / "bias" / "occupations_bls2017.csv"
    ours = pd.read_csv(ROOT / "data" / "professions.csv").set_index("profession")["percent_women"]
    assert len(ours) == 40 and ours["nurse"] == 90 and ours["carpenter"] == 2
    if not shared.is_file():
        pytest.skip("the table to compare with is not on this machine")
    theirs = pd.read_csv(shared).set_index("occupation")["bls2017_pct_female"]
    assert {name.lower(): share for name, share in ours.items()} == {n.lower(): s for n, s in theirs.items()}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log_odds(BACKPACK, TOKENIZER, [], TEMPLATES), "professions=[] should be a list with at least one"),
        (lambda: log_odds(BACKPACK, TOKENIZER, "nurse", TEMPLATES), "professions='nurse' should be a list"),
        (lambda: log_odds(BACKPACK, TOKENIZER, ["nurse"], []), "templates=[] should be a list"),
        (lambda: log_odds(BACKPACK, TOKENIZER, ["nurse"], ["the nurse says"]), "has no slot; write {profession}"),
        (lambda: log_odds(BACKPACK, TOKENIZER, ["日本"], TEMPLATES), "The vocabulary lacks the word '日本'"),
        (lambda: log_odds(BACKPACK, TOKENIZER, [" "], TEMPLATES), "' ' is no word"),
        (lambda: log_odds(BACKPACK, TOKENIZER, ["nurse"], ["a{profession}s"]), "is spelled with other tokens than"),
        (lambda: log_odds(BACKPACK, TOKENIZER, ["nurse"], TEMPLATES, ("he", "he")), "the same word twice: 'he'"),
        (lambda: log_odds(BACKPACK, TOKENIZER, ["nurse"], TEMPLATES, ("he", " he")), "the same word twice"),
        (lambda: log_odds(BACKPACK, TOKENIZER, ["nurse"], TEMPLATES, "he"), "pair='he' should be two words"),
        (lambda: log_odds(BACKPACK, TOKENIZER, ["nurse"], TEMPLATES, ("he", "waiter")), "'waiter' is"),
        (lambda: bias.check_split([], TEMPLATES), "no template for fitting"),
        (lambda: bias.check_split(TEMPLATES, []), "no template for testing"),
        (lambda: bias.check_split(TEMPLATES, ["the {profession} "]), "used for fitting and for testing"),
        (lambda: split_odds(TRANSFORMER, TOKENIZER, ["nurse"], TEMPLATES), "This takes a Backpack"),
        (lambda: localize(BACKPACK, TOKENIZER, ["nurse", "says"], TEMPLATES), "need three of them, and 2 were given"),
        (lambda: localize(BACKPACK, TOKENIZER, PROFESSIONS, TEMPLATES, wanted=90), "wanted=90 should be a share"),
        (lambda: fit_scales(BACKPACK, TOKENIZER, ["nurse"], TEMPLATES), "There is no sense to scale"),
        (lambda: fit_scales(BACKPACK, TOKENIZER, ["nurse"], TEMPLATES, [4]), "sense=4 is out of range"),
        (lambda: fit_scales(BACKPACK, TOKENIZER, ["nurse"], TEMPLATES, [1], bounds=(1, 0)), "bounds=(1, 0) should be"),
        (lambda: debias(BACKPACK, TOKENIZER, ["nurse"], [9]), "sense=9 is out of range"),
        (lambda: debias(BACKPACK, TOKENIZER, ["nurse", "says"], [1], {"nurse": 0.5}),
         "no scale for the profession 'says'"),
        (
            lambda: debias(BACKPACK, TOKENIZER, ["nurse", "the nurse"], [1], {"nurse": 0.5, "the nurse": 0.1}),
            "'the nurse' and another profession share the token 'nurse' and so cannot be scaled apart",
        ),
        (lambda: nullspace(TRANSFORMER, TOKENIZER, ["says"], {}).__enter__(), "no scale for the profession 'says'"),
        (lambda: log_odds(BACKPACK, TOKENIZER, ["nurse", "nurse"], TEMPLATES),
         "'nurse' is twice among the professions"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_levelled_professions_share_their_mean_sense_and_nothing_else_changes(model, tokenizer):
    jobs = ["nurse", "concert"]
    ids = torch.tensor([token_of_word(tokenizer, word) for word in [*jobs, "the"]])
    before = model.sense_vectors(ids).detach()
    with bias.mean_ablate(model, tokenizer, jobs, [1]).applied():
        after = model.sense_vectors(ids).detach()
    mean = before[:2, 1].mean(0)
    torch.testing.assert_close(after[:2, 1], mean.expand(2, -1))
    untouched = [sense for sense in range(before.shape[1]) if sense != 1]
    assert torch.equal(after[:, untouched], before[:, untouched]) and torch.equal(after[2], before[2])


def test_professions_that_share_a_token_with_another_or_with_a_template_cannot_be_edited_apart():
    class Letters:  # a tokenizer of letters, but for whole words that it knows
        unk_token_id = None
        whole = {"nurse": 1000, "guard": 1001, "the": 1002, "said": 1003}

        def __call__(self, text, **_):
            words = text.split()
            return {"input_ids": [i for w in words for i in ([self.whole[w]] if w in self.whole else map(ord, w))]}

        def decode(self, ids):
            return "".join(map(chr, ids))

    apart = bias.separable(Letters(), ["nurse", "guard", "cook", "clerk", "baths", "vip"], ["the {profession} said iv"])
    assert apart == ["nurse", "guard", "baths"]  # cook and clerk share c and k, vip has v and i in the template
