"""PPLM moves keys and values along a gradient that a slow version finds by finite differences."""

import pytest
import torch
from helpers import random_ids, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from backpack_lib.analysis import pplm
from backpack_lib.analysis.scores import bits_per_byte

TOKENIZER = tiny_tokenizer()
V = len(TOKENIZER)
BAG = torch.tensor([7, 30])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, n_positions=32, n_embd=8, n_layer=2, n_head=2, initializer_range=0.5)
    made = GPT2LMHeadModel(
        GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    )
    return made.double().eval()  # for finite differences


@pytest.fixture
def text(model):
    """A text of six tokens: its last, the mask, the past, and the plain distribution."""
    ids, mask = random_ids(1, 6, vocab_size=V), torch.ones(1, 6, dtype=torch.long)
    with torch.no_grad():
        _, past = pplm._read(model, ids[:, :-1], mask[:, :-1], [])
        logits, _ = pplm._read(model, ids[:, -1:], mask, past)
    return ids[:, -1:], mask, past, logits.softmax(-1)


def loss_of(model, last, mask, past, plain, kl_scale):
    with torch.no_grad():
        return pplm.topic_loss(pplm._read(model, last, mask, past)[0], BAG, plain, kl_scale).item()


def test_the_loss_is_minus_the_log_probability_of_the_bag_and_the_divergence():
    logits, plain = torch.randn(2, 2, 20, generator=torch.Generator().manual_seed(0))
    p, q = logits.softmax(-1), plain.softmax(-1)
    expected = sum(-torch.log(row[[3, 5]].sum()) for row in p) + 0.1 * (p * (p / q).log()).sum()
    torch.testing.assert_close(pplm.topic_loss(logits, torch.tensor([3, 5]), q, 0.1), expected)


def test_the_mix_is_the_geometric_mean():
    steered, plain = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))
    expected = steered.softmax(-1) ** 0.9 * plain.softmax(-1) ** 0.1
    torch.testing.assert_close(pplm.mixed(steered, plain, 0.9), expected / expected.sum(-1, keepdim=True))
    sharper = expected**2 / (expected**2).sum(-1, keepdim=True)
    torch.testing.assert_close(pplm.mixed(steered, plain, 0.9, temperature=0.5), sharper)


def test_one_step_follows_the_gradient_by_hand(model, text):
    last, mask, past, plain = text
    settings = pplm.Settings(step=0.02, iterations=1, gamma=1.5, kl_scale=0.0, window=3)
    moved, norms = pplm.perturbed(model, last, mask, past, BAG, plain, None, settings)
    for layer in range(2):
        slow = [torch.zeros_like(part) for part in past[layer]]
        for kind in range(2):
            for place in torch.cartesian_prod(torch.tensor([0]), torch.arange(2), torch.arange(2, 5), torch.arange(4)):
                ends = []
                for sign in (1, -1):
                    nudged = [list(pair) for pair in past]
                    nudged[layer][kind] = nudged[layer][kind].clone()
                    nudged[layer][kind][tuple(place)] += sign * 1e-3
                    ends.append(loss_of(model, last, mask, [tuple(pair) for pair in nudged], plain, 0.0))
                slow[kind][tuple(place)] = (ends[0] - ends[1]) / 2e-3
        norm = torch.cat([part.flatten() for part in slow]).norm()
        assert norms[layer, 0].item() == pytest.approx(norm.item(), rel=1e-2)
        for kind in range(2):
            expected = past[layer][kind] - 0.02 * slow[kind] / norm**1.5
            torch.testing.assert_close(moved[layer][kind], expected, atol=1e-4, rtol=1e-2)
            assert torch.equal(moved[layer][kind][:, :, :2], past[layer][kind][:, :, :2])  # outside the window


def test_a_row_of_a_batch_moves_as_it_does_alone(model):
    ids, mask = random_ids(3, 6, vocab_size=V), torch.ones(3, 6, dtype=torch.long)
    mask[1, :3] = 0
    settings = pplm.Settings(step=0.5)

    def moved(rows):
        _, past = pplm._read(model, ids[rows, :-1], mask[rows, :-1], [])
        plain = pplm._read(model, ids[rows, -1:], mask[rows], past)[0].softmax(-1)
        return pplm.perturbed(model, ids[rows, -1:], mask[rows], past, BAG, plain, None, settings)

    with torch.no_grad():
        together, norms = moved(slice(None))
        for row in range(3):
            alone, norm = moved(slice(row, row + 1))
            torch.testing.assert_close(norms[:, row], norm[:, 0])
            for pair, single in zip(together, alone):
                torch.testing.assert_close(pair[0][row], single[0][0])
                torch.testing.assert_close(pair[1][row], single[1][0])


def test_without_a_step_it_samples_from_the_plain_model(model):
    prompts = ["the nurse said", "the"]
    still = pplm.generate(model, TOKENIZER, ["nurse"], prompts, 8, seed=1, settings=pplm.Settings(step=0.0))
    assert still == pplm.generate(model, TOKENIZER, ["nurse"], prompts, 8, seed=1, settings=pplm.Settings(gm_scale=0.0))
    assert all(text.startswith(prompt) for text, prompt in zip(still, prompts))
    assert still != pplm.generate(model, TOKENIZER, ["nurse"], prompts, 8, seed=2, settings=pplm.Settings(step=0.0))


def test_steered_text_says_the_word_more_often_and_the_weights_stay(model):
    before = {name: p.clone() for name, p in model.named_parameters()}

    def count(step):
        texts = pplm.generate(model, TOKENIZER, ["nurse"], [""] * 24, 12, settings=pplm.Settings(step=step, gamma=1.0))
        return sum(text.count("nurse") for text in texts)

    assert count(20.0) > 3 * count(0.0) + 5
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_a_transformer_of_another_architecture_is_steered_and_measured():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=V, max_position_embeddings=32, initializer_range=0.5, **sizes)
    ).eval()
    plain, steered = (
        pplm.generate(llama, TOKENIZER, ["nurse"], ["The nurse", "At"], 8, settings=pplm.Settings(step=step))
        for step in (0.0, 2.0)
    )
    assert plain != steered
    assert bits_per_byte(llama, TOKENIZER, [" ".join(plain * 3)]) > 0
