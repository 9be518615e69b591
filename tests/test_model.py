"""The model equals its equations, and behaves like any other language model of transformers."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import random_ids, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from backpack_lib import BackpackConfig, BackpackLMHeadModel
from backpack_lib.model import mixing, output
from backpack_lib.model.cache import CACHE
from backpack_lib.model.hooks import hooked
from backpack_lib.training.batches import make_batch
from backpack_lib.training.loss import LanguageModelLoss


def gelu_new(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def slow_senses(model, token):
    """Sense vectors (k, d) of one token, from the equations, with no module called."""
    w = dict(model.backpack.sense_network.named_parameters())
    eps = model.config.layer_norm_epsilon

    def norm(x, name):
        x = x - x.mean()
        return x / torch.sqrt((x**2).mean() + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]

    activation = {"gelu_pytorch_tanh": gelu_new, "gelu": F.gelu}[model.config.activation_function]

    def mlp(x, name):
        hidden = activation(x @ w[f"{name}.c_fc.weight"] + w[f"{name}.c_fc.bias"])
        return hidden @ w[f"{name}.c_proj.weight"] + w[f"{name}.c_proj.bias"]

    e = model.lm_head.weight[token]
    r = norm(e, "ln") + e
    h = norm(r, "block.ln_1")
    r = mlp(h, "block.mlp") + r
    return mlp(norm(r, "block.ln_2"), "final_mlp").reshape(model.config.num_senses, -1)


def slow_logits(model, ids):
    """Logits (T, V) of one text (T,), summed word by word and sense by sense."""
    k, d_s = model.config.num_senses, model.config.n_embd // model.config.num_senses
    hidden = model.backpack.gpt2_model(ids[None], use_cache=False).last_hidden_state[0]
    both = model.backpack.sense_weight_net.c_attn(hidden)
    queries, keys = both[:, : k * d_s], both[:, k * d_s :]
    outputs = []
    for i in range(len(ids)):
        o = torch.zeros(model.config.n_embd)
        for l in range(k):
            part = slice(l * d_s, (l + 1) * d_s)
            scores = torch.stack([queries[i, part] @ keys[j, part] / math.sqrt(d_s) for j in range(i + 1)])
            alpha = scores.exp() / scores.exp().sum()
            for j in range(i + 1):
                o = o + alpha[j] * slow_senses(model, ids[j])[l]
        outputs.append(model.lm_head.weight @ o)
    return torch.stack(outputs)


VARIANTS = [
    dict(num_senses=1),
    dict(num_senses=4, activation_function="gelu"),
    dict(num_senses=7, scale_attn_by_inverse_layer_idx=True),  # 7 does not divide 20
    dict(sense_intermediate_scale=2, n_layer=1),
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_logits_and_gradients_equal_the_equations(changes):
    model = tiny_model(**changes)
    ids = random_ids(2, 7)
    ids[1, 3:5] = ids[0, 0]  # repeated tokens, within a text and across texts
    fast = model(ids).logits
    slow = torch.stack([slow_logits(model, row) for row in ids])
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)

    names, parameters = zip(*model.named_parameters())
    weights = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1))
    of_fast = torch.autograd.grad((fast * weights).sum(), parameters)
    of_slow = torch.autograd.grad((slow * weights).sum(), parameters)
    for name, a, b in zip(names, of_fast, of_slow):
        scale = b.abs().max().clamp(min=1.0)
        torch.testing.assert_close(a / scale, b / scale, atol=2e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")


def test_outputs_are_the_parts_of_the_sum():
    model = tiny_model()
    ids = random_ids(2, 9)
    out = model(ids, output_senses=True)
    B, T, k, d = 2, 9, 3, 20
    assert out.contextualization.shape == (B, k, T, T) and out.senses.shape == (B, k, T, d)
    torch.testing.assert_close(out.contextualization.sum(-1), torch.ones(B, k, T))
    assert out.contextualization.triu(1).abs().max() == 0
    total = torch.einsum("blij,bljd->bid", out.contextualization, out.senses) @ model.lm_head.weight.T
    torch.testing.assert_close(out.logits, total, atol=1e-5, rtol=1e-4)
    # The senses at a position are the token's own, whatever stands around it.
    torch.testing.assert_close(out.senses[1, :, 4], model.sense_vectors(ids[1, 4:5])[0])
    assert model(ids).senses is None and model(ids).contextualization is None
    model.set_attn_implementation("eager")
    trunk = model(ids, output_attentions=True, output_hidden_states=True)
    assert [len(trunk.attentions), len(trunk.hidden_states)] == [2, 3]


class Sizes(TorchDispatchMode):
    """Notes how many numbers each tensor holds that an operation returns, unless it is a view."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.seen.append(out.numel())
        return out


def test_mixing_makes_neither_all_weights_nor_all_senses(monkeypatch):
    """Of the tensors of k x T x T and k x T x d numbers there is never more than a part, backward neither."""
    B, k, T, d, n = 2, 8, 96, 64, 10
    queries, keys = (torch.rand(B, k, T, d // k) for _ in range(2))
    table, place, allowed = torch.rand(n, k, d), torch.randint(n, (B, T)), torch.ones(T, T, dtype=torch.bool).tril()
    monkeypatch.setattr(mixing, "SMALL", 0)
    with Sizes() as sizes:
        leaves = [tensor.requires_grad_() for tensor in (queries, keys, table)]
        mixing.mix_senses(*leaves, place, allowed).sum().backward()
    assert max(sizes.seen) < B * k * T * min(T, d) / 4


def test_mixing_in_bf16_loses_no_more_than_its_rounding(monkeypatch):
    B, k, T, d, n = 2, 3, 7, 6, 4
    queries, keys, table = torch.randn(B, k, T, 2), torch.randn(B, k, T, 2), torch.randn(n, k, d)
    place, allowed = torch.randint(n, (B, T)), torch.ones(T, T, dtype=torch.bool).tril()
    results = []
    for dtype, small in ((torch.float32, 2**22), (torch.bfloat16, 0)):
        monkeypatch.setattr(mixing, "SMALL", small)
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (queries, keys, table)]
        mixed = mixing.mix_senses(*leaves, place, allowed)
        assert mixed.dtype == dtype
        mixed.sum().backward()
        results.append([mixed.float(), *(leaf.grad.float() for leaf in leaves)])
    torch.testing.assert_close(*results, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("vocab_size", [61, 64])
def test_output_embedding_is_a_product_with_e(vocab_size):
    head = tiny_model(vocab_size=vocab_size).lm_head
    for shape in ((1, 1), (1, 3)):
        hidden = torch.randn(*shape, 20)
        with torch.no_grad():
            torch.testing.assert_close(head(hidden), hidden @ head.weight.T)
        assert head(hidden).requires_grad


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_gives_the_unpadded_logits(side):
    model = tiny_model()
    texts = [random_ids(n, seed=n) for n in (3, 8, 5)]
    padded, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(8 - len(text), None) if side == "left" else slice(len(text))
        padded[row, place], mask[row, place] = text, 1
    logits = model(padded, attention_mask=mask).logits
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row][mask[row].bool()], model(text[None]).logits[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [dict(do_sample=True, top_k=0), dict(num_beams=3)], ids=str)
def test_cached_generation_equals_uncached(options):
    model, ids = tiny_model(), random_ids(3, 6)
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 0, 0  # left padding
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        settings = dict(max_new_tokens=15, eos_token_id=None, use_cache=use_cache, **options)
        texts.append(model.generate(ids, attention_mask=mask, **settings))
    assert texts[0].shape == (3, 21)
    assert torch.equal(*texts)


def test_caches_of_every_make_hold_the_senses():
    model = tiny_model()
    ids = random_ids(2, 10)
    whole = model(ids).logits
    for cache in (None, DynamicCache(), DynamicCache(config=model.config)):
        first = model(ids[:, :4], cache=cache, use_cache=True)
        assert len(first[CACHE].layers) == model.config.n_layer + 1
        rest = [model(ids[:, i : i + 2], cache=first[CACHE]).logits for i in (4, 6, 8)]
        torch.testing.assert_close(torch.cat([first.logits, *rest], 1), whole, atol=1e-5, rtol=1e-4)
    settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(static, model.generate(ids, **settings))


@torch.no_grad()
def test_with_a_cache_the_senses_of_each_token_are_computed_once():
    model = tiny_model()
    seen = []
    model.backpack.sense_network.register_forward_hook(lambda module, args, out: seen.extend(range(len(args[0]))))
    ids = torch.tensor([[5, 6, 5, 7, 6, 5, 9, 9, 7, 5], [9, 9, 9, 7, 8, 8, 5, 6, 7, 9]])
    whole = model(ids, use_cache=False).logits
    seen.clear()
    cache, logits = DynamicCache(), []
    for start, stop in ((0, 3), (3, 4), (4, 5), (5, 9), (9, 10)):
        logits.append(model(ids[:, start:stop], cache=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, atol=1e-5, rtol=1e-4)
    assert len(seen) == len({*ids.flatten().tolist()})


@torch.no_grad()
def test_a_cache_keeps_tokens_and_no_senses():
    model, ids = tiny_model(), random_ids(2, 10)
    cache = model(ids, use_cache=True)[CACHE]
    assert {type(layer) for layer in cache.layers} == {DynamicLayer}  # which other tools know
    layer = cache.layers[model.config.n_layer]
    assert layer.values.unique().tolist() == ids.unique().tolist()
    assert layer.keys.numel() + layer.values.numel() < 2 * cache.layers[0].keys.numel()
    del cache.senses  # as when a cache went through a file or another process
    torch.testing.assert_close(
        model(ids[:, :2], cache=cache).logits, model(torch.cat([ids, ids[:, :2]], 1)).logits[:, 10:]
    )


@torch.no_grad()
def test_an_edit_in_the_midst_of_a_text_holds_for_all_of_it():
    """A text in a cache is read as one without a cache would be: by the senses of now."""
    model, ids = tiny_model(), torch.tensor([[5, 6, 7, 5, 6]])
    cache = DynamicCache()
    model(ids[:, :3], cache=cache)
    with hooked(model.backpack.patches, lambda tokens, senses: 2 * senses):
        edited = model(ids[:, 3:4], cache=cache, output_senses=True)
        plain = tiny_model().sense_vectors(ids[0, :4])
        torch.testing.assert_close(edited.senses[0].transpose(0, 1), 2 * plain)
        torch.testing.assert_close(edited.logits, model(ids[:, :4]).logits[:, 3:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(ids[:, 4:], cache=cache).logits, model(ids).logits[:, 4:], atol=1e-5, rtol=1e-4)


def test_gradients_reach_a_text_that_is_read_with_a_cache():
    model, ids = tiny_model(), random_ids(2, 8)
    cache = DynamicCache()
    first = model(ids[:, :5], cache=cache, use_cache=True).logits
    torch.cat([first, model(ids[:, 5:], cache=cache).logits], 1).square().sum().backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    model(ids, use_cache=False).logits.square().sum().backward()
    torch.testing.assert_close(gradient, model.lm_head.weight.grad, atol=1e-3, rtol=1e-3)


def test_gradients_reach_a_soft_prompt_of_a_frozen_model_through_several_cached_steps():
    model, ids = tiny_model().requires_grad_(False), random_ids(1, 4)
    gradients = []
    for steps in ([[1, 2, 3, 4]], [[1], [2], [3], [4]]):
        soft = model.get_input_embeddings()(random_ids(1, 3, seed=1)).detach().requires_grad_()
        cache, logits = DynamicCache(), []
        logits.append(model(inputs_embeds=soft, cache=cache, use_cache=True).logits)
        for places in steps:
            logits.append(model(ids[:, [place - 1 for place in places]], cache=cache, use_cache=True).logits)
        torch.cat(logits, 1).square().sum().backward()
        gradients.append(soft.grad)
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)


def test_a_text_is_read_sense_by_sense(monkeypatch):
    model, ids = tiny_model(), random_ids(2, 19)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    results = []
    for small in (2**22, 0):
        monkeypatch.setattr(mixing, "SMALL", small)
        model.zero_grad()
        logits = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        logits.square().sum().backward()
        results.append([logits, *(parameter.grad.clone() for parameter in model.parameters())])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_unused_rows_of_the_vocabulary_are_never_generated():
    model = tiny_model(used_vocab_size=50)
    with torch.no_grad():
        model.lm_head.weight[50:] *= 10  # so that they would be chosen
    free = tiny_model()
    free.load_state_dict(model.state_dict())
    ids = random_ids(4, 3, vocab_size=50)
    options = dict(max_new_tokens=20, do_sample=True, eos_token_id=None)
    assert (free.generate(ids, **options) >= 50).any()
    assert model.generate(ids, **options)[:, 3:].max() < 50


@pytest.mark.parametrize("n_items, logits_at_once", [(None, 2**22), (7, 61 * 4), (torch.tensor(7), 2**22)])
def test_labels_give_the_cross_entropy_and_its_gradients(n_items, logits_at_once, monkeypatch):
    monkeypatch.setitem(output.LOGITS_AT_ONCE, "cpu", logits_at_once)
    model = tiny_model()
    ids = random_ids(2, 9)
    labels = ids.clone()
    labels[0, :5] = -100
    out = model(ids, labels=labels, num_items_in_batch=n_items)
    logits = model(ids).logits
    torch.testing.assert_close(out.logits, logits)
    reduction = dict(reduction="mean" if n_items is None else "sum")
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **reduction) / (n_items or 1)
    torch.testing.assert_close(out.loss, expected)
    # The logits may be part of somebody's own loss, too.
    parameters = list(model.parameters())
    for ours, plain in (
        (out.loss + out.logits.square().mean(), expected + logits.square().mean()),
        (model(ids, labels=labels).logits.square().mean(), model(ids).logits.square().mean()),
    ):
        torch.testing.assert_close(
            torch.autograd.grad(ours, parameters), torch.autograd.grad(plain, parameters), atol=1e-4, rtol=1e-4
        )


def test_a_loss_function_of_ones_own_takes_the_place_of_the_models():
    model, ids = tiny_model(), random_ids(2, 9)
    model.loss_function = lambda logits, labels, **kwargs: logits.sum() * 0 + 3
    assert model(ids, labels=ids).loss == 3


def test_saved_model_comes_back(tmp_path):
    model = tiny_model(used_vocab_size=50, num_senses=7)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is BackpackLMHeadModel and again.config.used_vocab_size == 50
    ids = random_ids(2, 9)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.lm_head.weight is again.backpack.gpt2_model.wte.weight


@pytest.mark.slow
def test_compiled_training_meets_few_sizes(monkeypatch):
    """Batches with other numbers of distinct tokens, but about as many, need no compilation of their own."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = tiny_model()
    loss, compiled = LanguageModelLoss(model), torch.compile(LanguageModelLoss(model), backend=counter)
    for n_distinct in (20, 18, 22, 17):
        ids = torch.arange(64).remainder(n_distinct).view(4, 16)
        batch = make_batch([{"input_ids": row} for row in ids], padded=True)
        torch.testing.assert_close(compiled(*batch), loss(ids))
        compiled(*batch).backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled(ids), loss(ids))  # which looks for the distinct tokens itself, and first
    assert counter.frame_count == 2


# ---------------------------------------------------------------- the released format


def assert_is_golden(model, folder):
    expected = load_file(folder / "expected.safetensors")
    out = model(expected["input_ids"], output_senses=True)
    for name in ("logits", "contextualization", "senses"):
        torch.testing.assert_close(getattr(out, name), expected[name], atol=1e-5, rtol=0, msg=lambda m: f"{name}: {m}")


def test_released_format_loads_and_agrees_without_warnings(shared, tmp_path, caplog):
    folder = shared / "golden" / "tiny"
    logging.enable_propagation()
    try:
        assert_is_golden(BackpackLMHeadModel.from_pretrained(folder), folder)
    finally:
        logging.disable_propagation()
    assert not [record for record in caplog.records if record.levelname != "INFO"]

    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(folder / "config.json", tmp_path)
    assert_is_golden(BackpackLMHeadModel.from_pretrained(tmp_path), folder)


def test_padding_rows_of_the_released_vocabulary_are_known(tmp_path):
    released = {"model_type": "gpt2", "num_senses": 16, "vocab_size": 50264, "auto_map": {"AutoConfig": "x.Y"}}
    (tmp_path / "config.json").write_text(json.dumps(released))
    config = BackpackConfig.from_pretrained(tmp_path)
    assert config.used_vocab_size == 50257 and config.model_type == "backpack" and not hasattr(config, "auto_map")


# ---------------------------------------------------------------- bad input


def test_too_long_text_names_both_lengths():
    with pytest.raises(ValueError, match="25 tokens.*n_positions=24"):
        tiny_model()(random_ids(1, 25))


@pytest.mark.parametrize("wrong", [61, -1])
def test_ids_outside_the_vocabulary_are_named(wrong):
    with pytest.raises(ValueError, match="vocabulary has 61 rows"):
        tiny_model()(torch.tensor([[3, wrong]]))


@pytest.mark.parametrize(
    "changes, words", [(dict(n_head=3), "n_embd=20.*n_head=3"), (dict(num_senses=21), "senses=21")]
)
def test_sizes_that_do_not_fit_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_config(**changes)
