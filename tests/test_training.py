"""What training learns and leaves behind, and what it says when something does not fit."""

import os
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import RESULTS, assert_same_weights, run_command
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from backpack_lib import BackpackLMHeadModel, load, train
from backpack_lib.training.build import make_model, make_optimizers
from backpack_lib.training.checkpoints import RunFolder
from backpack_lib.training.loss import LanguageModelLoss
from backpack_lib.training.run import Run

# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("architecture, kind", [("backpack", BackpackLMHeadModel), ("transformer", GPT2LMHeadModel)])
def test_training_learns_and_leaves_model_tokenizer_and_history(tiny, architecture, kind, recwarn):
    config = replace(tiny, architecture=architecture, steps=60, eval_every=20, dropout=0.0)
    history = train(config)
    assert list(history["step"]) == [20, 40, 60] and list(history["tokens"]) == [20 * 64, 40 * 64, 60 * 64]
    assert history["valid_loss"].is_monotonic_decreasing
    assert history["valid_loss"].iloc[-1] < np.log(400) - 1  # a nat better than guessing
    assert (history["tokens_per_second"] > 0).all() and history["learning_rate"].iloc[-1] == 0
    pd.testing.assert_frame_equal(history, pd.read_csv(f"{config.out}/history.csv"))
    model, tokenizer = load(f"{config.out}/model")
    assert type(model) is kind and not model.training
    assert sorted(os.listdir(config.out)) == [".lock", "history.csv", "model", "settings.json"]

    # The loss in the history is that of the saved model on the validation blocks.
    from backpack_lib.training.build import prepare_blocks

    rows = prepare_blocks(config).valid[:8]["input_ids"]
    assert model(rows, labels=rows).loss.item() == pytest.approx(history["valid_loss"].iloc[-1], abs=1e-5)
    assert not [w for w in recwarn if "loss_type" in str(w.message)]


def test_baseline_sees_the_same_batches_and_has_the_same_trunk(tiny):
    from backpack_lib.training.build import prepare_blocks

    tokenizer = prepare_blocks(tiny).tokenizer
    backpack = make_model(tiny, tokenizer)
    baseline = make_model(replace(tiny, architecture="transformer"), tokenizer)
    shapes = {name: p.shape for name, p in baseline.transformer.named_parameters()}
    assert shapes == {name: p.shape for name, p in backpack.backpack.gpt2_model.named_parameters()}


class FakeTokenizer:
    """All that a new model needs to know of its tokenizer."""

    eos_token_id = 0

    def __len__(self):
        return 400


def test_only_matrices_decay(tiny):
    model = make_model(tiny, FakeTokenizer())
    (adamw,) = make_optimizers(model, tiny, torch.device("cpu"))
    decayed, free = adamw.param_groups
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("bias" in names[id(p)] or re.search(r"\bln", names[id(p)]) for p in free["params"])


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(tiny):
    for architecture in ("backpack", "transformer"):
        model = make_model(replace(tiny, architecture=architecture), FakeTokenizer())
        adamw, muon = make_optimizers(model, replace(tiny, optimizer="muon"), torch.device("cpu"))
        names = {id(p): name for name, p in model.named_parameters()}
        taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
        left = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
        assert taken | left == set(names.values()) and not taken & left
        trunk = {f"h.0.{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
        assert {name.partition("_model.")[2] or name.removeprefix("transformer.") for name in taken} >= trunk
        assert not any("wte" in name or "wpe" in name or "bias" in name for name in taken)
    assert "transformer.wte.weight" in left


@pytest.mark.parametrize("architecture", ["backpack", "transformer"])
def test_a_run_with_muon_learns_and_resumes_exactly(tiny, architecture, monkeypatch):
    config = replace(tiny, architecture=architecture, optimizer="muon", schedule="wsd")
    whole = train(replace(config, out=config.out + "-whole"))
    assert whole["valid_loss"].iloc[-1] < whole["valid_loss"].iloc[0]
    monkeypatch.setattr(Run, "save", save_then_stop_at(Run.save, 6))
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    train(config)
    assert_same_weights(config.out, config.out + "-whole")


def save_then_stop_at(save, step):
    def stopping(self):
        save(self)
        if self.step == step:
            raise KeyboardInterrupt

    return stopping


@pytest.mark.parametrize("architecture", ["backpack", "transformer"])
@pytest.mark.parametrize("logits_at_once", [1, 400 * 7, 2**24])
def test_the_loss_in_parts_is_the_models_own_with_its_gradients(tiny, architecture, logits_at_once, monkeypatch):
    monkeypatch.setattr("backpack_lib.model.output.LOGITS_AT_ONCE", {"cpu": logits_at_once})
    model = make_model(replace(tiny, architecture=architecture, dropout=0.0), FakeTokenizer())
    ids = torch.randint(400, (3, 16))
    own, parts = model(ids, labels=ids).loss, LanguageModelLoss(model)(ids)
    torch.testing.assert_close(parts, own)
    names, parameters = zip(*((name, p) for name, p in model.named_parameters()))
    for name, a, b in zip(names, torch.autograd.grad(3 * parts, parameters), torch.autograd.grad(3 * own, parameters)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(LanguageModelLoss(model)(ids), own)
    with torch.autocast("cpu", torch.bfloat16):
        low = LanguageModelLoss(model)(ids)
    assert low.dtype == torch.float32 and abs(low - own) < 0.01


def test_learning_rate_rises_then_falls(tiny):
    for schedule, middle in (("linear", 0.5), ("cosine", 0.5), ("constant", 1.0), ("wsd", 1.0)):
        config = replace(tiny, out=f"{tiny.out}-{schedule}", schedule=schedule, warmup=4, steps=12, eval_every=1)
        rates = train(config)["learning_rate"] / config.learning_rate
        assert rates[0] == pytest.approx(0.25) and rates[3] == pytest.approx(1.0)
        assert rates[7] == pytest.approx(middle) and (rates[11] == 0) == (schedule != "constant")


def test_accumulation_equals_a_larger_batch(tiny):
    whole = train(replace(tiny, out=tiny.out + "-1", batch_size=8, dropout=0.0))
    parts = train(replace(tiny, out=tiny.out + "-2", batch_size=2, accumulate=4, dropout=0.0))
    np.testing.assert_allclose(whole[RESULTS], parts[RESULTS], atol=1e-5)


def test_finetuning_starts_from_the_given_weights(tiny):
    first = train(tiny)
    config = replace(
        tiny, out=tiny.out + "-2", init_from=f"{tiny.out}/model", learning_rate=1e-9, eval_every=1, steps=2, warmup=0
    )
    again = train(config)
    assert again["valid_loss"][0] == pytest.approx(first["valid_loss"].iloc[-1], abs=1e-4)
    with pytest.raises(ValueError, match="holds a BackpackLMHeadModel.*'transformer' was asked for"):
        train(replace(config, out=tiny.out + "-3", architecture="transformer"))
    with pytest.raises(ValueError, match="block_size=32 is longer than the n_positions=16"):
        train(replace(config, out=tiny.out + "-4", block_size=32))


def test_finetuning_uses_the_dropout_that_is_asked_for(tiny):
    train(replace(tiny, dropout=0.3))
    config = replace(tiny, init_from=f"{tiny.out}/model", dropout=0.2)
    model = make_model(config, None)
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.2}


@pytest.mark.slow
def test_another_number_of_processes_is_refused(tiny, monkeypatch):

    monkeypatch.setattr(RunFolder, "write_model", lambda *args: None)  # as if killed just before
    monkeypatch.setattr(RunFolder, "finish", lambda *args: None)
    train(tiny)
    result = run_command(tiny, ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29618"])
    assert result.returncode != 0
    assert "holds a run with sequences_per_step=4, which is now 8" in result.stderr


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


# ---------------------------------------------------------------- what can go wrong


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_checkpoint(tiny, monkeypatch):
    forward, calls = LanguageModelLoss.forward, []

    def broken(self, *batch):
        calls.append(1)
        return forward(self, *batch) * (float("nan") if len(calls) == 7 else 1.0)

    monkeypatch.setattr(LanguageModelLoss, "forward", broken)
    with pytest.raises(FloatingPointError, match="The loss of step 7 is nan.*checkpoint-00000006"):
        train(replace(tiny, eval_every=100))
    monkeypatch.undo()
    whole = replace(tiny, out=tiny.out + "-whole", eval_every=100)
    train(whole)
    train(replace(tiny, eval_every=100))
    assert_same_weights(tiny.out, whole.out)


@pytest.mark.parametrize("step, kept", [(12, 10), (5, 4), (2, None)])
def test_weights_that_are_not_finite_are_never_saved_over_finite_ones(tiny, monkeypatch, step, kept):
    one_step = Run.train_one_step

    def diverge(self, batch):
        one_step(self, batch)
        if self.step == step:
            next(self.loss.parameters()).data[0] = float("nan")

    monkeypatch.setattr(Run, "train_one_step", diverge)
    with pytest.raises(FloatingPointError, match="smaller learning_rate") as error:
        train(tiny)
    assert f"step {step if step % 2 == 0 else step + 1} " in str(error.value)
    checkpoints = sorted(name for name in os.listdir(tiny.out) if name.startswith("checkpoint-"))
    assert checkpoints == ([f"checkpoint-{kept:08d}"] if kept else [])
    assert (checkpoints[-1] if kept else "no checkpoint") in str(error.value)
    assert not os.path.exists(f"{tiny.out}/model")
    if os.path.exists(f"{tiny.out}/history.csv"):
        assert pd.read_csv(f"{tiny.out}/history.csv").notna().all(axis=None)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(n_head=3), "n_embd=16 does not divide into n_head=3"),
        (dict(num_senses=17), "num_senses=17"),
        (dict(architecture="lstm"), "architecture='lstm' is unknown; choose one of backpack, transformer"),
        (dict(schedule="step"), "schedule='step' is unknown"),
        (dict(precision="int8"), "precision='int8' is unknown"),
        (dict(device="tpu"), "device='tpu' is unknown"),
        (dict(steps=0), "steps=0 is out of range"),
        (dict(batch_size=-1), "batch_size=-1 is out of range"),
        (dict(block_size=1), "block_size=1 is out of range; it must be at least 2"),
        (dict(learning_rate=float("nan")), "learning_rate=nan is out of range"),
        (dict(dropout=1.0), "dropout=1.0 is out of range"),
        (dict(weight_decay=-0.1), "weight_decay=-0.1 is out of range"),
        (dict(warmup=13), "warmup=13 is out of range"),
        (dict(schedule="wsd", decay=1.1), "decay=1.1 is out of range"),
        (dict(schedule="wsd", warmup=11, decay=0.5), "warmup=11 is out of range; of steps=12, 6 decay"),
        (dict(optimizer="sgd"), "optimizer='sgd' is unknown; choose one of adamw, muon"),
        (dict(optimizer="muon", precision="fp16"), "optimizer='muon' does not go with precision='fp16'"),
        (dict(learning_rate=float("inf")), "learning_rate=inf is out of range"),
        (dict(warmup=-1), "warmup=-1 is out of range"),
        (dict(seed=-1), "seed=-1 is out of range"),
        (dict(valid_fraction=0.0), "valid_fraction=0.0"),
        (dict(corpus=""), "The corpus is empty"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_settings_that_do_not_fit_are_one_sentence(tiny, changes, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        replace(tiny, **changes)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_sentence(tiny):
    with pytest.raises(ValueError, match="device='cuda' is no device of this machine"):
        train(replace(tiny, device="cuda"))


def test_the_command_line_says_errors_in_one_line(tiny):
    result = run_command(replace(tiny, corpus="missing.txt"))
    assert result.returncode == 1
    assert result.stderr.startswith("error: No file matches 'missing.txt'") and len(result.stderr.splitlines()) == 1


# ---------------------------------------------------------------- loading what was trained


def test_incomplete_weights_are_one_sentence(tiny):
    from safetensors.torch import load_file, save_file

    train(tiny)
    file = f"{tiny.out}/model/model.safetensors"
    tensors = load_file(file)
    tensors.pop("backpack.sense_weight_net.c_attn.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match="lack 1 of the model's tensors, such as backpack.sense_weight_net.c_attn.weight"
    ):
        load(f"{tiny.out}/model")


@pytest.mark.parametrize("name", ["no/such-model", "."])
def test_a_name_without_a_model_is_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no folder with a model"):
        load(name)


def test_load_knows_which_rows_of_the_vocabulary_are_tokens(tiny):
    train(tiny)
    folder = f"{tiny.out}/model"
    model, tokenizer = load(folder)
    model.resize_token_embeddings(len(tokenizer) + 9)
    model.save_pretrained(folder)
    assert load(folder)[0].config.used_vocab_size == len(tokenizer)


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


def test_a_small_vocabulary_has_a_row_a_token(tiny):
    train(tiny)
    model, tokenizer = load(f"{tiny.out}/model")
    assert model.config.vocab_size == len(tokenizer)
