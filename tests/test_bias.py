"""Bias is measured as probabilities say, split exactly, tested soundly, and turned down as was predicted."""

import itertools
import json

import numpy as np
import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from backpack_lib import attribute
from backpack_lib.analysis import bias
from backpack_lib.analysis.bias import SLOT, Split, debias, localize, log_odds, nullspace, split_odds
from backpack_lib.lessons.bias import read_prompts
from backpack_lib.model.lens import SenseLens, SenseLensConfig
from backpack_lib.text.words import tokens_of_word
from backpack_lib.text.writing import ids_of_text

TOKENIZER = tiny_tokenizer()
V = len(TOKENIZER)
BACKPACK = tiny_model(vocab_size=V, num_senses=4, n_positions=48)


def tiny_transformer():
    torch.manual_seed(1)
    sizes = dict(vocab_size=V, n_positions=48, n_embd=20, n_layer=2, n_head=2, initializer_range=0.2)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)).eval()


TRANSFORMER = tiny_transformer()
LENS = SenseLens(SenseLensConfig.of_base(TRANSFORMER, num_senses=4), TRANSFORMER).eval()
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


@pytest.mark.parametrize("model", [BACKPACK, TRANSFORMER, LENS], ids=["Backpack", "Transformer", "lens"])
def test_log_odds_are_those_of_the_probabilities_for_any_model_and_pair(model):
    assert len(TOKENIZER(" waiter")["input_ids"]) > 1 == len(TOKENIZER(" nurse")["input_ids"])
    odds = log_odds(model, TOKENIZER, PROFESSIONS, TEMPLATES)
    assert list(odds.index) == PROFESSIONS and list(odds.columns) == TEMPLATES
    np.testing.assert_allclose(odds, slow_odds(model, PROFESSIONS, TEMPLATES), atol=1e-4)
    other = log_odds(model, TOKENIZER, PROFESSIONS, TEMPLATES, pair=("the", "nurse"))
    np.testing.assert_allclose(other, slow_odds(model, PROFESSIONS, TEMPLATES, "the", "nurse"), atol=1e-4)
    assert bias.ratio(np.log([[3.0, 0.2]])) == pytest.approx(4)
    assert bias.excess_removed(np.log([[3.0, 5.0]]), np.log([[1.0, 3.0]])) == pytest.approx(2 / 3)


# ---------------------------------------------------------------- what carries it


@pytest.mark.parametrize(("model", "at_once"), [(BACKPACK, 64), (BACKPACK, 4), (LENS, 4)])
def test_the_parts_are_those_of_attribution_and_sum_to_the_odds(model, at_once, monkeypatch):
    monkeypatch.setattr("backpack_lib.analysis.scores.PROMPTS_AT_ONCE", at_once)
    split = split_odds(model, TOKENIZER, PROFESSIONS, TEMPLATES)
    np.testing.assert_allclose(split.odds, log_odds(model, TOKENIZER, PROFESSIONS, TEMPLATES), atol=1e-4)
    np.testing.assert_allclose(split.odds, split.own.sum(-1) + split.rest.sum(-1))
    for p, t in itertools.product(range(len(PROFESSIONS)), range(len(TEMPLATES))):
        ids = torch.tensor(ids_of_text(TOKENIZER, TEMPLATES[t].replace(SLOT, PROFESSIONS[p])))
        parts = attribute(model, ids, id_of("he"), id_of("she"))
        parts, residual = parts[: len(ids)], parts[len(ids) :]  # of a lens
        own = torch.isin(ids, torch.tensor(tokens_of_word(TOKENIZER, PROFESSIONS[p])))
        np.testing.assert_allclose(split.own[p, t], parts[own].sum(0), atol=1e-4)
        np.testing.assert_allclose(split.rest[p, t, :4], parts[~own].sum(0), atol=1e-4)
        np.testing.assert_allclose(split.rest[p, t, 4:].sum(), residual.sum(), atol=1e-4)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), st.floats(-2, 3))
@example([0], 0.0)
@settings(max_examples=10, deadline=None)
def test_the_odds_after_scaling_are_known_beforehand(senses, scale):
    for model in (BACKPACK, LENS):
        split = split_odds(model, TOKENIZER, PROFESSIONS[:3], TEMPLATES)
        with debias(model, TOKENIZER, PROFESSIONS[:3], senses, scale).applied():
            measured = log_odds(model, TOKENIZER, PROFESSIONS[:3], TEMPLATES)
        np.testing.assert_allclose(split.scaled(senses, scale), measured, atol=1e-3)


def made_split(rng, P=20, T=6, k=5, carrier=None, noise=0.3):
    """A split in which one sense, several or none carries the difference between professions."""
    own = noise * rng.normal(size=(P, 1, k)) + 0.05 * rng.normal(size=(P, T, k))
    if carrier is not None:
        own[..., carrier] += rng.normal(size=(P, 1, 1))
    rest = 0.1 * rng.normal(size=(1, T, k)) + 0.02 * rng.normal(size=(P, T, k))
    return Split((own + rest).sum(-1), own, rest)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bias, "RESAMPLES", 200)
    monkeypatch.setattr(bias, "PERMUTATIONS", 499)


def test_a_sense_or_set_that_carries_the_difference_is_found(quick):
    for carrier, expected in ([2], {2}), ([0, 3], {0, 3}):
        found = localize(made_split(np.random.default_rng(0), carrier=carrier, noise=0.1))
        assert set(found.senses) == expected and found.p < 0.01 and found.share >= 0.9
        assert (found.table["low"] < found.table["share"]).all() and (found.table["share"] < found.table["high"]).all()
        assert found.table["share"].sum() + found.elsewhere == pytest.approx(1)
        assert (found.table.loc[found.senses, "p"] < 0.01).all() and found.table["p"].notna().sum() == len(expected)
    assert list(found.table.columns) == ["level", "share", "low", "high", "p"]


def test_where_no_sense_is_special_the_test_seldom_says_so(monkeypatch):
    monkeypatch.setattr(bias, "PERMUTATIONS", 99)
    monkeypatch.setattr(bias, "RESAMPLES", 20)
    found = [localize(made_split(np.random.default_rng(seed))) for seed in range(100)]
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
    monkeypatch.setattr(bias, "PERMUTATIONS", 4000)
    found = localize(split)
    best = found.table["share"].idxmax()
    expected = np.mean(np.array(exact) >= found.table["share"][best] - 1e-9)
    assert found.table["p"][best] == pytest.approx(expected, abs=0.03)


def test_the_smallest_set_and_what_cannot_be_carried():
    assert bias.fewest(np.array([0.2, 0.5, -0.1, 0.3]), 0.5) == [1]
    assert bias.fewest(np.array([0.2, 0.5, -0.1, 0.3]), 0.9) == [1, 3, 0]
    assert bias.fewest(np.array([0.1, -0.1, 0.2]), 0.9) == [2, 0]


# ---------------------------------------------------------------- turning it down


def test_nullspace_takes_the_direction_out_of_the_professions_inputs_only():
    prompt = torch.tensor([ids_of_text(TOKENIZER, "the nurse says that")])
    E = TRANSFORMER.get_input_embeddings().weight.detach()
    direction = (E[id_of("she")] - E[id_of("he")]) / (E[id_of("she")] - E[id_of("he")]).norm()
    inputs = E[prompt[0]].clone()
    where = (prompt[0] == id_of("nurse")).nonzero()
    inputs[where] -= (inputs[where] @ direction)[..., None] * direction
    with torch.no_grad():
        expected, plain = TRANSFORMER(inputs_embeds=inputs[None]).logits, TRANSFORMER(prompt).logits
        with nullspace(TRANSFORMER, TOKENIZER, ["nurse"]):
            torch.testing.assert_close(TRANSFORMER(prompt).logits, expected)
        with pytest.raises(RuntimeError), nullspace(TRANSFORMER, TOKENIZER, ["nurse"]):
            raise RuntimeError
        assert torch.equal(TRANSFORMER(prompt).logits, plain)


# ---------------------------------------------------------------- data and bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log_odds(BACKPACK, TOKENIZER, ["nurse"], ["a{profession}s"]), "is spelled with other tokens than"),
        (lambda: log_odds(BACKPACK, TOKENIZER, ["nurse"], TEMPLATES, ("he", " he")), "the same word twice"),
        (lambda: bias.check_split(TEMPLATES, ["the {profession} "]), "used for fitting and for testing"),
        (lambda: localize(made_split(np.random.default_rng(0), P=2)), "need three of them, and 2 were given"),
        (lambda: localize(made_split(np.random.default_rng(0)), wanted=90), "wanted=90 should be a share"),
        (lambda: localize(Split(np.ones((4, 3)), *np.ones((2, 4, 3, 2)))), "of all professions are the same"),
    ],
)  # fmt: skip
def test_what_would_be_silently_wrong_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\ufeff{}".encode("utf-16"), "own.json' cannot be read: "),
        ("[]", "needs an entry 'english', as data/prompts.json has it"),
        ('{"english": {"fit": [1], "test": ["b"]}}', "'fit' of 'english' should be a list of texts"),
        ('{"english": {"fit": [], "test": ["b"]}}', "There is no template for fitting"),
        (None, "own.json' cannot be read: "),
    ],
)
def test_what_is_wrong_with_a_file_of_templates_is_one_sentence(content, message, tmp_path):
    file = tmp_path / "own.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        read_prompts(str(file), "english")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_templates_may_begin_with_a_byte_order_mark(tmp_path):
    entry = {"fit": ["The {profession} said"], "test": ["If the {profession}"]}
    (tmp_path / "own.json").write_text(json.dumps({"english": entry}), encoding="utf-8-sig")
    assert read_prompts(str(tmp_path / "own.json"), "english") == entry
