"""Contributions of (token, sense) pairs sum to what the model says, for any model and any text."""

import pytest
import torch
from helpers import random_ids, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from backpack_lib import BackpackLMHeadModel, attribute
from backpack_lib.analysis.attribution import read


@settings(deadline=None)
@given(
    st.sampled_from([1, 3, 4, 7]), st.integers(1, 24), st.integers(0, 60), st.none() | st.integers(0, 60), st.integers()
)
def test_contributions_sum_to_the_logit_or_the_log_odds(k, length, target, contrast, seed):
    model = tiny_model(seed % 1000, num_senses=k)
    ids = random_ids(length, seed=seed % 1000)
    found = attribute(model, ids, target, contrast)
    assert found.shape == (length, k)
    log_probs = model(ids[None]).logits[0, -1].log_softmax(-1)
    expected = model(ids[None]).logits[0, -1, target] if contrast is None else log_probs[target] - log_probs[contrast]
    assert found.sum().item() == pytest.approx(expected.item(), abs=1e-4)
    assert read(model, ids).total(target, contrast) == pytest.approx(expected.item(), abs=1e-4)


def test_contributions_sum_to_the_logits_of_the_released_code(shared):
    model = BackpackLMHeadModel.from_pretrained(shared / "golden" / "tiny")
    expected = load_file(shared / "golden" / "tiny" / "expected.safetensors")
    for ids, logits in zip(expected["input_ids"], expected["logits"]):
        for target in (0, 7, len(logits[0]) - 1):
            for position in (0, len(ids) // 2, -1):
                found = attribute(model, ids, target, position=position)
                assert found.sum().item() == pytest.approx(logits[position, target].item(), abs=1e-4)


@pytest.mark.parametrize("position", [0, 3, -2, -1])
def test_a_position_is_read_as_if_the_text_ended_there(position):
    model, ids = tiny_model(), random_ids(6)
    end = range(6)[position] + 1
    found = read(model, ids, position)
    torch.testing.assert_close(found.contributions(5), attribute(model, ids[:end][None].tolist(), 5))
    torch.testing.assert_close(found.logits, model(ids[None]).logits[0, position], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.log_probs().exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(found.weights.sum(0), torch.ones(3))


def test_half_precision_sums_to_its_own_logit_up_to_rounding():
    model, ids = tiny_model().bfloat16(), random_ids(9)
    found = read(model, ids)
    assert found.contributions(5).dtype == torch.float32
    assert found.contributions(5).sum().item() == pytest.approx(found.total(5), rel=0.02, abs=0.02)


def test_a_position_before_the_text_an_empty_text_and_a_transformer_are_refused():
    model, ids = tiny_model(), random_ids(6)
    with pytest.raises(ValueError, match=r"no position -7 in a text of 6 tokens \(0 to 5\)"):
        attribute(model, ids, 5, position=-7)
    with pytest.raises(ValueError, match="no position -1 in a text of 0 tokens"):
        attribute(model, [], 5)
    with pytest.raises(ValueError, match="takes a Backpack; a GPT2LMHeadModel has no sense vectors"):
        attribute(GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)), ids, 5)


def test_each_contribution_is_its_weight_times_its_push():
    model, ids = tiny_model(), random_ids(5)
    out = model(ids[None], output_senses=True)
    contributions = attribute(model, ids, target=7, contrast=9)
    pushes = model.sense_vectors(ids) @ (model.lm_head.weight[7] - model.lm_head.weight[9])  # (T, k)
    torch.testing.assert_close(contributions, out.contextualization[0, :, 4].T * pushes, atol=1e-5, rtol=1e-4)
