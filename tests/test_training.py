"""What training learns and leaves behind, and what it says when something does not fit."""

import os
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import RESULTS, assert_same_weights, run_command, stop_before
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from backpack_lib import BackpackLMHeadModel, load, train
from backpack_lib.training.build import make_model, make_optimizers, make_scheduler, prepare_blocks
from backpack_lib.training.loss import LanguageModelLoss
from backpack_lib.training.run import Run

# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("architecture, kind", [("backpack", BackpackLMHeadModel), ("transformer", GPT2LMHeadModel)])
def test_training_learns_and_leaves_model_tokenizer_and_history(tiny, architecture, kind):
    config = replace(tiny, architecture=architecture, steps=60, eval_every=20, dropout=0.0)
    history = train(config)
    assert list(history["step"]) == [20, 40, 60] and list(history["tokens"]) == [20 * 64, 40 * 64, 60 * 64]
    assert history["valid_loss"].is_monotonic_decreasing
    assert history["valid_loss"].iloc[-1] < np.log(400) - 1  # a nat better than guessing
    assert (history["tokens_per_second"] > 0).all() and history["learning_rate"].iloc[-1] == 0
    pd.testing.assert_frame_equal(history, pd.read_csv(f"{config.out}/history.csv"))
    assert sorted(os.listdir(config.out)) == [".lock", "history.csv", "model", "settings.json"]

    # The loss in the history is that of the saved model on the validation blocks.
    model, tokenizer = load(f"{config.out}/model")
    assert type(model) is kind and not model.training
    assert model.config.vocab_size == len(tokenizer)  # a small vocabulary has a row a token
    rows = prepare_blocks(config).valid[:8]["input_ids"]
    assert model(rows, labels=rows).loss.item() == pytest.approx(history["valid_loss"].iloc[-1], abs=1e-5)


class FakeTokenizer:
    eos_token_id = 0

    def __len__(self):
        return 400


def test_the_baseline_has_the_trunk_of_the_backpack(tiny):
    backpack = make_model(tiny, FakeTokenizer())
    baseline = make_model(replace(tiny, architecture="transformer"), FakeTokenizer())
    shapes = {name: p.shape for name, p in baseline.transformer.named_parameters()}
    assert shapes == {name: p.shape for name, p in backpack.backpack.gpt2_model.named_parameters()}


def test_only_matrices_decay_and_muon_takes_the_hidden_ones(tiny):
    model = make_model(tiny, FakeTokenizer())
    names = {id(p): name for name, p in model.named_parameters()}

    def names_in(group):
        return {names[id(p)] for p in group["params"]}

    (adamw,) = make_optimizers(model, tiny, torch.device("cpu"))
    decayed, free = adamw.param_groups
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    assert names_in(decayed) | names_in(free) == set(names.values())
    assert all("bias" in name or re.search(r"\bln", name) for name in names_in(free))

    adamw, muon = make_optimizers(model, replace(tiny, optimizer="muon"), torch.device("cpu"))
    (hidden,), rest = map(names_in, muon.param_groups), names_in(adamw.param_groups[0])
    assert hidden | rest == names_in(decayed) and not hidden & rest
    trunk = {f"h.0.{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert {name.partition("_model.")[2] for name in hidden} >= trunk
    assert not any("wte" in name or "wpe" in name for name in hidden)


@pytest.mark.parametrize("architecture", ["backpack", "transformer"])
def test_a_run_with_muon_learns_and_resumes_bit_for_bit(tiny, architecture, monkeypatch):
    config = replace(tiny, architecture=architecture, optimizer="muon", schedule="wsd")
    whole = train(replace(config, out=config.out + "-whole"))
    assert whole["valid_loss"].iloc[-1] < whole["valid_loss"].iloc[0]
    stop_before(monkeypatch, config, step=8)
    pd.testing.assert_frame_equal(train(config)[RESULTS], whole[RESULTS], check_exact=True)
    assert_same_weights(config.out, config.out + "-whole")


@pytest.mark.parametrize("architecture, logits_at_once", [("backpack", 400 * 7), ("transformer", 2**24)])
def test_the_loss_in_parts_is_the_models_own_with_its_gradients(tiny, architecture, logits_at_once, monkeypatch):
    monkeypatch.setattr("backpack_lib.model.output.LOGITS_AT_ONCE", {"cpu": logits_at_once})
    model = make_model(replace(tiny, architecture=architecture, dropout=0.0), FakeTokenizer())
    ids = torch.randint(400, (3, 16))
    own, parts = model(ids, labels=ids).loss, LanguageModelLoss(model)(ids)
    torch.testing.assert_close(parts, own)
    names, parameters = zip(*model.named_parameters())
    for name, a, b in zip(names, torch.autograd.grad(3 * parts, parameters), torch.autograd.grad(3 * own, parameters)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4, msg=name)
    with torch.autocast("cpu", torch.bfloat16):
        low = LanguageModelLoss(model)(ids)
    assert low.dtype == torch.float32 and abs(low - own) < 0.01


def test_the_learning_rate_rises_then_falls(tiny):
    for schedule, middle, end in (("linear", 0.5, 0), ("cosine", 0.5, 0), ("constant", 1, 1), ("wsd", 1, 0)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = make_scheduler(optimizer, replace(tiny, schedule=schedule, warmup=4, steps=12))
        rates = []
        for _ in range(12):
            optimizer.step()
            scheduler.step()
            rates += scheduler.get_last_lr()
        assert [rates[0], rates[3], rates[7], rates[11]] == pytest.approx([0.25, 1, middle, end])


def test_accumulation_equals_a_larger_batch(tiny):
    whole = train(replace(tiny, out=tiny.out + "-1", batch_size=8, dropout=0.0))
    parts = train(replace(tiny, out=tiny.out + "-2", batch_size=2, accumulate=4, dropout=0.0))
    np.testing.assert_allclose(whole[RESULTS], parts[RESULTS], atol=1e-5)


def test_finetuning_starts_from_the_given_weights_with_the_dropout_asked_for(tiny):
    first = train(tiny)
    config = replace(tiny, out=tiny.out + "-2", init_from=f"{tiny.out}/model", dropout=0.2, steps=1, warmup=0)
    again = train(replace(config, learning_rate=1e-9))
    assert again["valid_loss"][0] == pytest.approx(first["valid_loss"].iloc[-1], abs=1e-4)
    dropouts = [module for module in make_model(config, None).modules() if isinstance(module, torch.nn.Dropout)]
    assert {module.p for module in dropouts} == {0.2}
    for changes, message in (
        ({"architecture": "transformer"}, "holds a BackpackLMHeadModel.*'transformer' was asked for"),
        ({"block_size": 32}, "block_size=32 is longer than the n_positions=16"),
    ):
        with pytest.raises(ValueError, match=message):
            train(replace(config, out=tiny.out + "-3", **changes))


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(tiny, monkeypatch):
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self: setattr(self, "_compiled_call_impl", torch.compile(self._call_impl, backend="aot_eager")),
    )
    plain = train(replace(tiny, out=tiny.out + "-1", dropout=0.0))
    compiled = train(replace(tiny, out=tiny.out + "-2", dropout=0.0, compile=True))
    np.testing.assert_allclose(plain[RESULTS], compiled[RESULTS], atol=1e-4)


@pytest.mark.parametrize("architecture", ["backpack", "transformer"])
def test_a_large_vocabulary_has_rows_for_a_gpu_which_are_never_generated(tiny, architecture, monkeypatch):
    monkeypatch.setattr("backpack_lib.training.build.LARGE_VOCABULARY", 1)
    train(replace(tiny, architecture=architecture))
    model, tokenizer = load(f"{tiny.out}/model")
    used = len(tokenizer)
    assert used % 64 and model.config.vocab_size == -(-used // 64) * 64 and model.config.used_vocab_size == used
    for net in (model, AutoModelForCausalLM.from_pretrained(f"{tiny.out}/model")):
        with torch.no_grad():
            net.get_output_embeddings().weight[used:] *= 1000  # so that they would be chosen
        ids = torch.tensor([[tokenizer.eos_token_id, 5, 6]] * 16)
        assert net.generate(ids, do_sample=True, max_new_tokens=8, eos_token_id=None).max() < used


# ---------------------------------------------------------------- what can go wrong


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_checkpoint(tiny, monkeypatch):
    forward, calls = LanguageModelLoss.forward, []

    def broken(self, *batch):
        calls.append(1)
        return forward(self, *batch) * (float("nan") if len(calls) == 7 else 1.0)

    config = replace(tiny, eval_every=100)
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelLoss, "forward", broken)
        with pytest.raises(FloatingPointError, match="The loss of step 7 is nan.*rate below 0.01.*checkpoint-00000006"):
            train(config)
    whole = replace(config, out=tiny.out + "-whole")
    train(whole)
    train(config)
    assert_same_weights(config.out, whole.out)


def test_weights_that_are_not_finite_are_never_saved_over_finite_ones(tiny, monkeypatch):
    one_step = Run.train_one_step

    def diverge(self):
        one_step(self)
        if self.step == 12:
            next(self.loss.parameters()).data[0] = float("nan")

    monkeypatch.setattr(Run, "train_one_step", diverge)
    with pytest.raises(FloatingPointError, match="After step 12 a weight is not finite.*checkpoint-00000010"):
        train(tiny)
    assert [name for name in os.listdir(tiny.out) if name.startswith("checkpoint-")] == ["checkpoint-00000010"]
    assert not os.path.exists(f"{tiny.out}/model")
    assert pd.read_csv(f"{tiny.out}/history.csv").notna().all(axis=None)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(n_head=3), "n_embd=16 does not divide into n_head=3"),
        (dict(architecture="lstm"), "architecture='lstm' is unknown; choose one of backpack, transformer"),
        (dict(architecture="lens"), "name it by lens_of"),
        (dict(learning_rate=float("nan")), "learning_rate=nan is out of range"),
        (dict(dropout=1.0), "dropout=1.0 is out of range"),
        (dict(schedule="wsd", warmup=11, decay=0.5), "warmup=11 is out of range; of steps=12, 6 decay"),
        (dict(optimizer="muon", precision="fp16"), "optimizer='muon' does not go with precision='fp16'"),
        (dict(lens_of="demo-transformer", streaming=True), "A lens takes all from its base"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_settings_that_do_not_fit_are_one_sentence(tiny, changes, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        replace(tiny, **changes)
    assert len(str(error.value).splitlines()) == 1


def test_the_command_line_says_errors_in_one_line(tiny):
    result = run_command(replace(tiny, corpus="missing.txt"))
    assert result.returncode == 1
    assert result.stderr.startswith("error: No file matches 'missing.txt'") and len(result.stderr.splitlines()) == 1


def test_incomplete_weights_are_refused_and_rows_without_a_token_are_known(tiny):
    train(tiny)
    folder = f"{tiny.out}/model"
    model, tokenizer = load(folder)
    model.resize_token_embeddings(len(tokenizer) + 9)
    model.save_pretrained(folder)
    assert load(folder)[0].config.used_vocab_size == len(tokenizer)
    tensors = load_file(f"{folder}/model.safetensors")
    tensors.pop("backpack.sense_weight_net.c_attn.weight")
    save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lack 1 of the model's tensors, such as backpack.sense_weight_net.c_attn"):
        load(folder)
