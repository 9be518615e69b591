"""Topic control is the paper's equations, inside `generate()`, for any model and batch."""

import numpy as np
import pytest
import torch
from helpers import random_ids, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from backpack_lib import SenseEdits
from backpack_lib.analysis import topic
from backpack_lib.analysis.topic import TopicControl
from backpack_lib.model.lens import SenseLens, SenseLensConfig
from backpack_lib.text.writing import continue_texts

TOKENIZER = tiny_tokenizer()
V = len(TOKENIZER)
ALL = torch.arange(V)
MODEL = tiny_model(vocab_size=V, num_senses=4)
GREEDY = {"do_sample": False, "eos_token_id": V + 1}


def tiny_lens(seed: int, k: int):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=V, n_positions=24, n_embd=20, n_layer=2, n_head=2, initializer_range=0.2)
    base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0))
    lens = SenseLens(SenseLensConfig.of_base(base.eval(), num_senses=k), base).eval()
    torch.nn.init.normal_(lens.sense_weight_net.c_attn.weight, std=0.3)
    lens.state_std.uniform_(0.5, 2)
    return lens


@torch.no_grad()
def slow_logits(model, ids, n_prompt, factors, rate):
    """Logits after a text, of which all but the first n_prompt tokens were generated, from the equations."""
    out = model(ids[None], output_senses=True)
    E, added = model.get_output_embeddings().weight, torch.zeros(20)
    for j in range(len(ids)):
        for l in range(model.config.num_senses):
            sense = out.senses[0, l, j]
            a = sum(max((sense @ E[g]).item(), 0) for g in ids[n_prompt:])
            s = 1 / (1 + np.exp(-(6 - rate * a))) * (1 + j / 100)
            weight = s * factors[ids[j], l].item() + (1 - s)
            added += (weight - 1) * out.contextualization[0, l, -1, j] * sense
    return out.logits[0, -1] + E @ added


# ---------------------------------------------------------------- the factors


def test_scores_are_shares_of_the_largest_push_whatever_edits_are_applied():
    control = TopicControl(MODEL, TOKENIZER, ["nurse", "concert"], strength=3)
    nurse, concert = (TOKENIZER(" " + word)["input_ids"][0] for word in ("nurse", "concert"))
    ids = torch.tensor([[3, 77], [nurse, 3]])
    pushed = MODEL.sense_vectors(ids.flatten()) @ MODEL.lm_head.weight.T
    expected = (pushed[..., nurse] + pushed[..., concert]) / pushed.amax(-1)
    with SenseEdits(MODEL, TOKENIZER).scale(None, by=0).applied():
        scores = TopicControl(MODEL, TOKENIZER, ["nurse", "concert"]).scores_of(ids)
    for found in (scores, control.scores_of(ids)):
        torch.testing.assert_close(found.flatten(0, 1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("strength", "sampled"), [(1, 2000), (2, 50), (3, 2000)])
def test_factors_follow_the_quantiles_of_used_tokens(strength, sampled):
    model = tiny_model(vocab_size=V + 50, num_senses=2, used_vocab_size=V)
    control = TopicControl(model, TOKENIZER, "nurse", strength, sampled=sampled)
    tokens = control.sampled
    assert len(tokens) == min(sampled, V) and tokens[0] == 0 and tokens[-1] == V - 1
    high, middle, low = np.quantile(control.scores_of(tokens).numpy(), [0.95, 0.80, 0.60])
    scores, factors = control.scores_of(ALL).flatten().tolist(), control.factors_of(ALL).flatten().tolist()
    d = topic.STRENGTHS[strength]
    for score, factor in zip(scores, factors):
        expected = d[0] if score > high else d[1] if score > middle else d[2] if score > low else d[3]
        assert factor == pytest.approx(expected)


def test_another_strength_or_topic_is_that_of_a_control_of_its_own():
    control = TopicControl(MODEL, TOKENIZER, ["nurse"], 1)
    before = control.factors_of(ALL)
    for words, strength in ((["nurse"], 3), (["concert"], 1)):
        derived = control.at(3) if strength == 3 else control.toward(words)
        own = TopicControl(MODEL, TOKENIZER, words, strength)
        assert torch.equal(derived.factors_of(ALL), own.factors_of(ALL)) and derived.words == words
    assert torch.equal(control.factors_of(ALL), before)


def test_of_a_word_of_several_tokens_counts_the_first():
    pieces = TOKENIZER(" zebra")["input_ids"]
    nurse = TOKENIZER(" nurse")["input_ids"][0]
    expected = MODEL.lm_head.weight[pieces[0]] + MODEL.lm_head.weight[nurse]
    torch.testing.assert_close(topic.topic_direction(MODEL, TOKENIZER, ["zebra", "nurse"]), expected)
    assert len(pieces) > 1


# ---------------------------------------------------------------- generation


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([1, 3, 4]), st.sampled_from([1, 2, 3]), st.booleans(), st.booleans(), st.integers(0, 99))
def test_annealed_generation_is_the_equations_step_by_step(k, strength, use_cache, of_a_lens, seed):
    model = tiny_lens(seed, k) if of_a_lens else tiny_model(seed, vocab_size=V, num_senses=k)
    control = TopicControl(model, TOKENIZER, ["nurse"], strength)
    prompt = random_ids(1, 4, seed=seed, vocab_size=V)
    with control.applied():
        out = model.generate(
            prompt, max_new_tokens=7, do_sample=True, use_cache=use_cache, output_logits=True,
            return_dict_in_generate=True, eos_token_id=V + 1, pad_token_id=0,
        )  # fmt: skip
    ids, factors = out.sequences[0], control.factors_of(ALL)
    for step, logits in enumerate(out.logits):
        expected = slow_logits(model, ids[: 4 + step], 4, factors, max(control.deltas) / 7.5)
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


def test_without_annealing_senses_are_multiplied_by_their_factors():
    control = TopicControl(MODEL, TOKENIZER, ["nurse"], 3, annealing=False)
    with torch.no_grad():
        expected = MODEL.sense_vectors(ALL) * control.factors_of(ALL)[..., None]
        with control.applied():
            torch.testing.assert_close(MODEL.sense_vectors(ALL), expected)


def test_leaving_restores_the_model_also_after_an_error():
    control = TopicControl(MODEL, TOKENIZER, ["nurse"], 3)
    with pytest.raises(RuntimeError, match="inside"), control.applied():
        raise RuntimeError("inside")
    assert not MODEL.backpack.weight_hooks and not MODEL.backpack.patches
