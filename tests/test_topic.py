"""Topic control is the paper's equations, inside `generate()`, for any model and batch."""

import json

import numpy as np
import pytest
import torch
from helpers import random_ids, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from backpack_lib import SenseEdits, load
from backpack_lib.analysis import topic
from backpack_lib.analysis.topic import Annealing, TopicControl
from backpack_lib.files import data_folder
from backpack_lib.text.writing import continue_texts

TOKENIZER = tiny_tokenizer()
V = len(TOKENIZER)
MODEL = tiny_model(vocab_size=V, num_senses=4)
GREEDY = {"do_sample": False, "eos_token_id": V + 1}


def slow_logits(model, ids, n_prompt, factors, rate):
    """Logits after a text, of which all but the first n_prompt tokens were generated, from the equations."""
    out = model(ids[None], output_senses=True)
    E, o = model.lm_head.weight, torch.zeros(model.config.n_embd)
    for j in range(len(ids)):
        for l in range(model.config.num_senses):
            sense = out.senses[0, l, j]
            a = sum(max((sense @ E[g]).item(), 0) for g in ids[n_prompt:])
            s = 1 / (1 + np.exp(-(6 - rate * a))) * (1 + j / 100)
            weight = s * factors[ids[j], l].item() + (1 - s)
            o = o + weight * out.contextualization[0, l, -1, j] * sense
    return E @ o


# ---------------------------------------------------------------- the factors


def test_scores_are_shares_of_the_largest_push():
    control = TopicControl(MODEL, TOKENIZER, ["nurse", "concert"], strength=3)
    nurse, concert = (TOKENIZER(" " + word)["input_ids"][0] for word in ("nurse", "concert"))
    for token in (3, 77, nurse):
        pushed = MODEL.sense_vectors(torch.tensor([token]))[0] @ MODEL.lm_head.weight.T
        expected = (pushed[:, nurse] + pushed[:, concert]) / pushed.max(-1).values
        torch.testing.assert_close(control.scores[token], expected, atol=1e-5, rtol=1e-4)


@given(st.sampled_from([1, 2, 3]), st.integers(1, 5))
def test_factors_follow_the_quantiles(strength, k):
    model = tiny_model(vocab_size=V, num_senses=k)
    control = TopicControl(model, TOKENIZER, "nurse", strength)
    high, middle, low = np.quantile(control.scores.numpy(), [0.95, 0.80, 0.60])
    d = topic.STRENGTHS[strength]
    for score, factor in zip(control.scores.flatten()[::97].tolist(), control.factors.flatten()[::97].tolist()):
        expected = d[0] if score > high else d[1] if score > middle else d[2] if score > low else d[3]
        assert factor == pytest.approx(expected)


def test_rows_that_no_token_uses_do_not_move_the_quantiles():
    model = tiny_model(vocab_size=V + 50, num_senses=2, used_vocab_size=V)
    control = TopicControl(model, TOKENIZER, "nurse", 1)
    used = control.scores[:V]
    assert (used > np.quantile(used.numpy(), 0.95)).sum() == (control.factors[:V] == 1.5).sum() - (
        (used > np.quantile(used.numpy(), 0.80)) & (used <= np.quantile(used.numpy(), 0.95))
    ).sum()


def test_of_a_word_of_several_tokens_counts_the_first_or_their_mean():
    pieces = TOKENIZER(" zebra")["input_ids"]
    E = MODEL.lm_head.weight.detach()
    nurse = E[TOKENIZER(" nurse")["input_ids"][0]]
    for choice, expected in (("first", E[pieces[0]]), ("mean", E[pieces].mean(0))):
        found = topic.topic_direction(MODEL, TOKENIZER, ["zebra", "nurse"], choice)
        torch.testing.assert_close(found, expected + nurse)
    control = TopicControl(MODEL, TOKENIZER, ["zebra"], multi_token="mean")
    torch.testing.assert_close(control.direction, E[pieces].mean(0))
    assert len(pieces) > 1


def test_another_strength_keeps_the_scores_and_leaves_the_first_as_it_was():
    one = TopicControl(MODEL, TOKENIZER, ["nurse"], 1)
    factors = one.factors.clone()
    three = one.at(3)
    assert torch.equal(three.factors, TopicControl(MODEL, TOKENIZER, ["nurse"], 3).factors)
    assert three.scores.equal(one.scores) and torch.equal(one.factors, factors) and max(three.deltas) == 3.3


def test_parts_of_the_vocabulary_give_the_whole(monkeypatch):
    whole = topic.largest_pushes(MODEL)
    monkeypatch.setattr(topic, "TOKENS_AT_ONCE", 7)
    torch.testing.assert_close(topic.largest_pushes(MODEL).values, whole.values)


def test_scores_of_few_tokens_are_those_of_all_and_are_not_touched_by_edits():
    control = TopicControl(MODEL, TOKENIZER, ["nurse"], 2)
    whole = TopicControl(MODEL, TOKENIZER, ["nurse"], 2, largest=topic.largest_pushes(MODEL)).scores
    ids = torch.tensor([[3, 9, 3], [77, 9, 0]])
    with SenseEdits(MODEL, TOKENIZER).scale(None, by=0).applied():
        torch.testing.assert_close(control.scores_of(ids), whole[ids])
    torch.testing.assert_close(control.factors_of(ids), control.factors[ids])


@pytest.mark.slow
@pytest.mark.parametrize("large", [topic.LARGE, 0], ids=["as it is", "as a large model"])
def test_quantiles_from_a_sample_are_those_of_all_tokens(large, monkeypatch):
    monkeypatch.setattr(topic, "LARGE", large)
    model, tokenizer = load("demo")
    largest = topic.largest_pushes(model)
    for entry in json.loads((data_folder() / "topics.json").read_text()):
        sampled = TopicControl(model, tokenizer, entry["steer"])
        scores = TopicControl(model, tokenizer, entry["steer"], largest=largest).scores
        for threshold, quantile in zip(sampled.thresholds, topic.QUANTILES):
            assert (scores <= threshold).float().mean().item() == pytest.approx(quantile, abs=0.002), entry["name"]


def test_the_largest_pushes_of_all_tokens_are_kept_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKPACK_CACHE", str(tmp_path))
    model = tiny_model(vocab_size=V, num_senses=2)
    plain = topic.largest_pushes(model)
    assert plain.complete and not list(tmp_path.iterdir())  # at once, and so not worth it
    monkeypatch.setattr(topic, "WORTH_KEEPING", 0)
    made = topic.largest_pushes(model)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(topic, "own_senses", None)
    again = topic.largest_pushes(model)
    assert made.values.equal(again.values) and again.complete and made.values.equal(plain.values)
    monkeypatch.undo()
    other = tiny_model(seed=1, vocab_size=V, num_senses=2)
    assert not topic.largest_pushes(other).values.equal(made.values)


# ---------------------------------------------------------------- generation


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([1, 3, 4]), st.sampled_from([1, 2, 3]), st.booleans(), st.integers(0, 99))
def test_annealed_generation_is_the_equations_step_by_step(k, strength, use_cache, seed):
    model = tiny_model(seed, vocab_size=V, num_senses=k)
    control = TopicControl(model, TOKENIZER, ["nurse"], strength)
    prompt = random_ids(1, 4, seed=seed, vocab_size=V)
    with control.applied():
        out = model.generate(
            prompt, max_new_tokens=7, do_sample=True, use_cache=use_cache, output_logits=True,
            return_dict_in_generate=True, eos_token_id=V + 1, pad_token_id=0,
        )  # fmt: skip
    ids = out.sequences[0]
    for step, logits in enumerate(out.logits):
        expected = slow_logits(model, ids[: 4 + step], 4, control.factors, max(control.deltas) / 7.5)
        torch.testing.assert_close(logits[0], expected, atol=1e-3, rtol=1e-3)


def test_a_padded_batch_writes_what_each_prompt_writes_alone():
    control = TopicControl(MODEL, TOKENIZER, ["nurse"], 3)
    prompts = ["the nurse said that", "", "the concert"]
    together = control.generate(prompts, 12, **GREEDY)
    assert together == [control.generate([prompt], 12, **GREEDY)[0] for prompt in prompts]
    assert together != continue_texts(MODEL, TOKENIZER, prompts, 12, top_k=0, **GREEDY)


def test_strength_zero_is_the_uncontrolled_model_bitwise():
    control = TopicControl(MODEL, TOKENIZER, ["nurse"], 0)
    ids = random_ids(1, 9, vocab_size=V)
    with torch.no_grad():
        before = MODEL(ids).logits
        with control.applied():
            assert torch.equal(MODEL(ids).logits, before)
    prompts = ["the nurse", "the"]
    assert control.generate(prompts, 9, seed=3) == continue_texts(MODEL, TOKENIZER, prompts, 9, seed=3, top_k=0)


def test_without_annealing_it_is_an_edit():
    control = TopicControl(MODEL, TOKENIZER, ["nurse"], 3, annealing=False)
    ids = torch.arange(V)
    with torch.no_grad():
        expected = MODEL.sense_vectors(ids) * control.factors[..., None]
        with control.applied():
            torch.testing.assert_close(MODEL.sense_vectors(ids), expected)
    with control.edits.applied():
        edited = continue_texts(MODEL, TOKENIZER, ["the"], 9, top_k=0)
    assert control.generate(["the"], 9) == edited


def test_a_sense_that_has_had_its_say_is_released():
    said = torch.tensor([0.0, 5.0, 10.0, 30.0, 1000.0])
    weights = topic.released(said, torch.tensor(3.3), 3.3 / 7.5, torch.tensor(0))
    assert weights[0] == pytest.approx(3.3, abs=0.01) and weights[-1] == pytest.approx(1.0)
    assert (weights.diff() < 0).all()


def test_leaving_restores_the_model_also_after_an_error():
    control = TopicControl(MODEL, TOKENIZER, ["nurse"], 3)
    with pytest.raises(ValueError, match="leaves room for"):
        control.generate(["the nurse " * 20], 9)
    with pytest.raises(RuntimeError, match="inside"), control.applied():
        raise RuntimeError("inside")
    assert not MODEL.backpack.weight_hooks and not MODEL.backpack.patches


def test_the_weights_in_force_are_shown():
    control = TopicControl(MODEL, TOKENIZER, ["nurse"], 3)
    ids = random_ids(1, 6, vocab_size=V)
    plain = MODEL(ids, output_senses=True).contextualization
    with control.applied():
        weighed = MODEL(ids, output_senses=True).contextualization
    factors = control.factors[ids[0]].T  # (k, T)
    expected = plain * topic.released(torch.zeros(1), factors, 1.0, torch.arange(6))[:, None]
    torch.testing.assert_close(weighed[0], expected[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopicControl(MODEL, TOKENIZER, []), "A topic needs at least one word, and none was given"),
        (lambda: TopicControl(MODEL, TOKENIZER, ["nurse", " "]), "' ' is no word"),
        (lambda: TopicControl(MODEL, TOKENIZER, ["日本"]), "The vocabulary lacks the word '日本'"),
        (lambda: TopicControl(MODEL, TOKENIZER, ["nurse"], 4), "strength=4 is not in the table; choose one of 0, 1, 2"),
        (lambda: TopicControl(MODEL, TOKENIZER, ["nurse"], deltas=[2, 1]), "should be 4 finite numbers"),
        (lambda: TopicControl(MODEL, TOKENIZER, ["nurse"], deltas=[2, 1, 1, np.inf]), "finite numbers"),
        (lambda: TopicControl(MODEL, TOKENIZER, ["nurse"]).generate(["a"], 9, num_beams=2),
         "does not go with num_beams"),
        (lambda: TopicControl(GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)), TOKENIZER, "a"),
         "takes a Backpack"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_annealing_alone_counts_from_the_first_call():
    annealing = Annealing(MODEL, lambda ids: torch.full((*ids.shape, 4), 2.0), rate=1.0)
    ids = random_ids(2, 3, vocab_size=V)
    senses = MODEL(ids, output_senses=True).senses
    alpha = torch.ones(2, 4, 3, 3)
    s = torch.sigmoid(torch.tensor(6.0)) * (1 + torch.arange(3) / 100)
    torch.testing.assert_close(annealing(alpha, senses, ids), (alpha * (s * 2 + 1 - s)).expand(2, 4, 3, 3))
