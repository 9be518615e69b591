"""The tools that people use with other language models take a Backpack as it is."""

import pytest
import torch
from helpers import random_ids, tiny_model
from transformers import AutoModel, DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments, pipeline
from transformers.integrations.executorch import register_dynamic_cache_export_support

from backpack_lib.text.tokenizers import train_tokenizer

TEXTS = [[5, 9, 2, 7], [7, 3, 11], [20, 4, 1, 1, 8]]
SETTINGS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def model():
    return tiny_model()


def test_texts_packed_in_a_row_are_read_alone(model):
    batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": text} for text in TEXTS])
    alone = [model(torch.tensor([text]), labels=torch.tensor([text])) for text in TEXTS]
    expected = torch.cat([out.logits[0] for out in alone])
    for output_senses in (False, True):
        out = model(**batch, output_senses=output_senses)
        torch.testing.assert_close(out.logits[0], expected, atol=1e-5, rtol=1e-4)
    n_labels = [len(text) - 1 for text in TEXTS]
    nats = sum(out.loss * n for out, n in zip(alone, n_labels))
    torch.testing.assert_close(out.loss, nats / sum(n_labels))


@torch.no_grad()
def test_embeddings_are_read_as_their_tokens(model):
    ids = random_ids(2, 9)
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(ids).logits)
    written = model.generate(inputs_embeds=embeddings, **SETTINGS)
    assert torch.equal(written, model.generate(ids, **SETTINGS)[:, 9:])
    beams = dict(inputs_embeds=embeddings, num_beams=2, **SETTINGS)
    assert torch.equal(model.generate(**beams, use_cache=False), model.generate(**beams))


def test_embeddings_and_ids_at_once_are_refused(model):
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))


@pytest.mark.parametrize(
    "settings",
    [
        {"neftune_noise_alpha": 5.0, "label_smoothing_factor": 0.1},
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_transformers_own_trainer_trains_it(model, settings, tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(8, 12)]
    before = model.lm_head.weight.clone()
    arguments = TrainingArguments(tmp_path, max_steps=3, report_to=[], use_cpu=True, save_strategy="no", **settings)
    assert Trainer(model, arguments, train_dataset=rows).train().global_step == 3
    assert not torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("layers", [{}, {"target_modules": ["c_attn"]}, {"target_modules": "all-linear"}], ids=str)
def test_adapters_of_low_rank_train_and_come_back(model, layers, tmp_path):
    peft = pytest.importorskip("peft")
    ids = random_ids(2, 9)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **layers)
    adapted = peft.get_peft_model(model, config)
    adapted(input_ids=ids, labels=ids).loss.backward()
    names = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("sense_weight_net" in name for name in names) and any(".attn.c_attn" in name for name in names)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits)


@torch.no_grad()
def test_a_prefix_of_keys_takes_no_part_in_the_sum_of_senses(model):
    """As prefix tuning has it: keys and values of the trunk that belong to no token."""
    ids, cache = random_ids(2, 6), DynamicCache()
    for layer in range(model.config.n_layer):
        cache.update(torch.randn(2, 2, 3, 10), torch.randn(2, 2, 3, 10), layer)
    out = model(ids, attention_mask=torch.ones(2, 9), cache=cache, output_senses=True)
    assert out.contextualization.shape == (2, 3, 6, 6)
    assert torch.allclose(out.contextualization.sum(-1), torch.ones(()))


@pytest.mark.parametrize("use_cache", [False, True])
def test_it_is_exported(model, use_cache):
    register_dynamic_cache_export_support()
    model.config.use_cache = use_cache
    exported = torch.export.export(model, (), {"input_ids": random_ids(1, 9)}, strict=False).module()
    others = random_ids(1, 9, seed=1)
    torch.testing.assert_close(exported(input_ids=others).logits, model(others).logits, atol=1e-5, rtol=1e-4)


def test_more_tokens_and_a_helper_that_writes_ahead(model):
    ids = random_ids(1, 6)
    written = model.generate(ids, **SETTINGS)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=2, **SETTINGS), written)
    assert torch.equal(model.generate(ids, assistant_model=tiny_model(seed=1), **SETTINGS), written)
    before = model(ids).logits
    model.resize_token_embeddings(70)
    out = model(ids, labels=ids)
    assert out.logits.shape[-1] == 70 and out.loss.isfinite()
    torch.testing.assert_close(out.logits[..., :61], before)


def test_pipelines_read_and_write_by_the_names_that_others_use(tmp_path):
    tokenizer = train_tokenizer(["one two three four"] * 10, 270)
    tokenizer.save_pretrained(tmp_path)
    model = tiny_model(vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    ids = tokenizer("one two", return_tensors="pt")["input_ids"]
    features = model.base_model(ids).last_hidden_state
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state, features)
    extracted = pipeline("feature-extraction", str(tmp_path), device="cpu")("one two", return_tensors=True)
    torch.testing.assert_close(extracted, features.detach())
    write = pipeline("text-generation", str(tmp_path))
    text = write("one two", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("one two") and len(text) > len("one two")
