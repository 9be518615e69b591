"""The sense lens: with no edit its base, bit for bit; with one, exactly the difference that the senses make."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_same_weights, random_ids, stop_before, tiny_tokenizer, weights
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
)

from backpack_lib import SenseEdits, attribute, load, train
from backpack_lib.analysis.attribution import read
from backpack_lib.analysis.topic import TopicControl
from backpack_lib.model.cache import CACHE
from backpack_lib.model.hooks import hooked
from backpack_lib.model.lens import SenseLens, SenseLensConfig
from backpack_lib.text.writing import ids_of_text
from backpack_lib.training.lens import LensLoss

SIZES = dict(vocab_size=500, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64)
IDS = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
GROUPED = dict(**SIZES, **IDS, intermediate_size=48, num_key_value_heads=2)
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=500, n_embd=32, n_layer=3, n_head=4, n_positions=64, **IDS),
    "llama": LlamaConfig(**GROUPED),
    "llama, untied": LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "neox": GPTNeoXConfig(**SIZES, **IDS, intermediate_size=48),
    "gemma2": Gemma2Config(**GROUPED, head_dim=8, sliding_window=8, final_logit_softcapping=None),
    "granite, a logit scale": GraniteConfig(**GROUPED, logits_scaling=4.0),
    "phi, a bias": PhiConfig(**SIZES, **IDS, intermediate_size=48),
    "opt": OPTConfig(**SIZES, **IDS, ffn_dim=48, word_embed_proj_dim=32),
}
GREEDY = dict(max_new_tokens=10, do_sample=False)


def make_base(name="llama", seed=0):
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for parameter in base.parameters():  # large weights, so that mistakes show
        torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 0.5)
    return base


def make_lens(name="llama", **sizes):
    base = make_base(name)
    torch.manual_seed(1)
    lens = SenseLens(SenseLensConfig.of_base(base, num_senses=4, **sizes), base).eval()
    torch.nn.init.normal_(lens.sense_weight_net.c_attn.weight, std=0.3)
    lens.constant.normal_()
    lens.state_std.uniform_(0.5, 2)
    return lens


@pytest.fixture
def lens():
    return make_lens()


def padded_ids():
    ids, mask = random_ids(2, 16, vocab_size=500), torch.ones(2, 16, dtype=torch.long)
    ids[0, :5], mask[0, :5] = 0, 0
    return ids, mask


def add_to_every_other_token(token_ids, senses):
    return senses + 0.5 * (token_ids % 2)[:, None, None] * torch.linspace(-1, 1, senses.shape[-1])


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_without_edits_it_is_its_base_and_an_edit_makes_exactly_the_predicted_difference(name):
    lens = make_lens(name)
    ids, mask = padded_ids()
    plain = lens.base(ids, attention_mask=mask, labels=ids)
    out = lens(ids, attention_mask=mask, labels=ids)
    assert torch.equal(out.logits, plain.logits) and torch.equal(out.loss, plain.loss)
    assert torch.equal(
        lens.generate(ids, attention_mask=mask, **GREEDY), lens.base.generate(ids, attention_mask=mask, **GREEDY)
    )

    seen = lens(ids, attention_mask=mask, output_senses=True)
    senses = torch.stack([lens.sense_vectors(row) for row in ids]).transpose(1, 2)
    torch.testing.assert_close(seen.senses, senses)
    said = torch.einsum("bkts,bksd->btd", seen.contextualization, senses)
    real = mask.bool()
    torch.testing.assert_close(lens.logits_of(said + seen.residual)[real], plain.logits[real], rtol=1e-4, atol=1e-5)

    lens.patches.append(add_to_every_other_token)
    change = torch.stack([lens.sense_vectors(row) for row in ids]).transpose(1, 2) - senses
    moved = torch.einsum("bkts,bksd->btd", seen.contextualization, change)
    head = lens.get_output_embeddings().weight
    predicted = plain.logits + lens.logit_scale * moved @ head.T
    edited = lens(ids, attention_mask=mask).logits
    torch.testing.assert_close(edited[real], predicted[real], rtol=1e-4, atol=2e-5)
    assert (edited - plain.logits).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name, beams", [("gpt2", 3), ("llama", 1), ("gemma2", 1)])
def test_edited_generation_is_the_same_cached_batched_and_padded(name, beams):
    lens = make_lens(name)
    ids, mask = padded_ids()
    lens.patches.append(add_to_every_other_token)
    cached = lens.generate(ids, attention_mask=mask, num_beams=beams, **GREEDY)
    whole = lens.generate(ids, attention_mask=mask, num_beams=beams, use_cache=False, **GREEDY)
    alone = lens.generate(ids[:1, 5:], num_beams=beams, **GREEDY)
    assert torch.equal(cached, whole) and torch.equal(alone[0], cached[0, 5:])
    lens.patches.clear()
    assert not torch.equal(cached, lens.generate(ids, attention_mask=mask, num_beams=beams, **GREEDY))


@torch.no_grad()
def test_texts_in_one_row_are_edited_as_if_they_stood_alone(lens):
    texts = random_ids(1, 7, vocab_size=500), random_ids(1, 9, seed=1, vocab_size=500)
    places = torch.cat([torch.arange(7), torch.arange(9)])[None]
    lens.patches.append(add_to_every_other_token)
    together = lens(torch.cat(texts, 1), position_ids=places, use_cache=False).logits
    alone = torch.cat([lens(text, use_cache=False).logits for text in texts], 1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_cache_filled_without_the_edit_is_refused(lens):
    ids = random_ids(1, 8, vocab_size=500)
    cache = lens(ids, use_cache=True).get(CACHE)
    lens.patches.append(add_to_every_other_token)
    with pytest.raises(ValueError, match="read the text anew"):
        lens(ids[:, :1], **{CACHE: cache})


@pytest.mark.parametrize("name", ["granite, a logit scale", "phi, a bias"])
def test_contributions_and_the_residual_sum_to_the_logit_and_to_log_odds(name):
    lens, ids = make_lens(name), random_ids(12, vocab_size=500)
    reading = read(lens, ids)
    for target, contrast in ((7, None), (7, 9)):
        shares = attribute(lens, ids, target, contrast)
        assert shares.shape == (13, 4) and not shares[-1, 1:].any()
        assert shares.sum().item() == pytest.approx(reading.total(target, contrast), abs=1e-4)
    assert torch.equal(reading.logits, lens.base(ids[None], logits_to_keep=1).logits[0, -1])


def test_edits_and_topic_control_work_as_on_a_backpack(lens):
    tokenizer = tiny_tokenizer()
    ids = torch.tensor(tokenizer(" The nurse says that the concert", add_special_tokens=False)["input_ids"])
    before = read(lens, ids)
    edits = SenseEdits(lens, tokenizer).scale("nurse", sense=2, by=0.25)
    with edits.applied():
        after = read(lens, ids)
    here = ids == tokenizer(" nurse", add_special_tokens=False)["input_ids"][0]
    expected = before.total(5, 6) - 0.75 * before.contributions(5, 6)[:-1][here][:, 2].sum().item()
    assert after.total(5, 6) == pytest.approx(expected, abs=1e-4)
    assert read(lens, ids).total(5, 6) == before.total(5, 6)

    control = TopicControl(lens, tokenizer, ["concert"], strength=3)
    texts = control.generate(["The nurse", "The"], max_new_tokens=8, use_cache=True)
    assert texts == control.generate(["The nurse", "The"], max_new_tokens=8, use_cache=False)


@torch.no_grad()
def test_centring_moves_the_mean_senses_of_a_text_into_the_constant_and_changes_no_prediction(lens):
    ids = random_ids(4, 16, vocab_size=500)
    states = lens.states(ids)
    before = lens.explain(ids, states)
    LensLoss(lens, lens.states, torch.bincount(ids.flatten(), minlength=500)).centre()
    torch.testing.assert_close(lens.explain(ids, states), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lens.sense_vectors(ids.flatten()).mean(0), torch.zeros(4, 32), rtol=0, atol=1e-5)


def test_it_is_saved_without_its_base_and_goes_onto_no_other(lens, tmp_path):
    lens.base.save_pretrained(tmp_path / "base")
    lens.config.base = str(tmp_path / "base")
    lens.save_pretrained(tmp_path / "lens")
    saved = load_file(tmp_path / "lens" / "model.safetensors")
    assert not any(name.startswith("base") for name in saved)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "lens")
    ids = random_ids(1, 8, vocab_size=500)
    a, b = (net(ids, output_senses=True) for net in (lens, again))
    assert torch.equal(a.logits, b.logits) and torch.equal(a.residual, b.residual)

    rounded = make_base()
    rounded.model.embed_tokens.weight.data.add_(torch.randn(500, 32) * 0.02)  # as quantisation does
    SenseLens.from_pretrained(tmp_path / "lens", base=rounded)
    with pytest.raises(ValueError, match="mean cosine"):
        SenseLens.from_pretrained(tmp_path / "lens", base=make_base(seed=3))


def test_a_base_of_another_width_is_refused(lens):
    sizes = dict(vocab_size=500, n_embd=16, n_layer=3, n_head=4, n_positions=64)
    with pytest.raises(ValueError, match="another model than this lens was trained on"):
        lens.attach(AutoModelForCausalLM.from_config(GPT2Config(**sizes, **IDS)))


def test_an_edit_of_embeddings_without_tokens_is_refused(lens):
    with SenseEdits(lens, tiny_tokenizer()).scale(None, by=0).applied(), pytest.raises(ValueError, match="token ids"):
        lens(inputs_embeds=torch.zeros(1, 3, 32))


def test_what_cannot_be_a_base_is_refused():
    capped = AutoModelForCausalLM.from_config(Gemma2Config(**GROUPED, head_dim=8))
    with pytest.raises(ValueError, match="not linear in its last state"):
        SenseLens(SenseLensConfig.of_base(capped, num_senses=4), capped)
    with pytest.raises(ValueError, match="num_senses=33 is out of range"):
        SenseLensConfig.of_base(make_base(), num_senses=33)


# ---------------------------------------------------------------- training


@pytest.fixture
def lens_run(tiny, tmp_path):
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return replace(tiny, lens_of=str(tmp_path / "base"), num_senses=4, dropout=0.0, max_blocks=20)


def test_training_brings_the_senses_near_the_base_and_writes_a_lens(lens_run, monkeypatch):
    monkeypatch.setattr("backpack_lib.training.lens.START_STEPS", 20)
    history = train(replace(lens_run, steps=40, eval_every=10))
    assert history.valid_loss.iloc[-1] < history.valid_loss.iloc[0]
    lens, tokenizer = load(f"{lens_run.out}/model")
    assert isinstance(lens, SenseLens) and lens.config.base == lens_run.lens_of
    assert not any(parameter.requires_grad for parameter in lens.base.parameters())


def test_a_run_that_breaks_off_resumes_bit_for_bit(lens_run, monkeypatch):
    monkeypatch.setattr("backpack_lib.training.lens.START_STEPS", 3)
    whole = replace(lens_run, out=lens_run.out + "-whole")
    train(whole)
    stop_before(monkeypatch, lens_run, step=8)
    train(lens_run)
    assert_same_weights(lens_run.out, whole.out)


def test_states_beyond_the_bound_are_computed_and_give_the_same_lens(lens_run, monkeypatch):
    monkeypatch.setattr("backpack_lib.training.lens.START_STEPS", 3)
    train(lens_run)
    other = replace(lens_run, out=lens_run.out + "-unkept", states_gb=0.0)
    train(other)
    a, b = weights(lens_run.out), weights(other.out)
    for name in a:  # what is computed beside other rows rounds otherwise
        torch.testing.assert_close(a[name], b[name], rtol=1e-2, atol=1e-3)


def test_the_shipped_lens_of_the_demo_explains_more_than_shuffled_senses_do():
    lens, tokenizer = load("demo-lens")
    assert lens.num_parameters() < 3e6
    ids = torch.tensor([ids_of_text(tokenizer, "The old king lived in a castle with his three daughters.")])
    states = lens.states(ids)
    dealt = torch.randperm(lens.config.vocab_size, generator=torch.Generator().manual_seed(0))

    def nats():
        logits = lens.logits_of(lens.explain(ids, states))[0, :-1]
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()

    with torch.no_grad():
        own = nats()
        with hooked(lens.patches, lambda tokens, senses: lens.sense_vectors(dealt[tokens], patched=False)):
            assert own < nats() - 1


def test_a_lens_on_a_backpack_is_refused(lens_run):
    with pytest.raises(ValueError, match="the model given is a Backpack"):
        train(replace(lens_run, lens_of="planted"))
