"""Small random models and inputs."""

import os
import runpy
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from backpack_lib import BackpackConfig, BackpackLMHeadModel, train
from backpack_lib.text import planted
from backpack_lib.text.tokenizers import train_tokenizer
from backpack_lib.training.run import Run

ROOT = Path(__file__).resolve().parent.parent


def tiny_config(**changes):
    sizes = dict(vocab_size=61, n_positions=24, n_embd=20, n_layer=2, n_head=2, num_senses=3)
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    tokens = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    # Large weights, so that softmaxes are far from uniform and mistakes show.
    return BackpackConfig(**{**sizes, **dropout, **tokens, "initializer_range": 0.2, **changes})


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    return BackpackLMHeadModel(tiny_config(**changes)).eval()


def random_ids(*shape, seed=0, vocab_size=61):
    """Token ids above 0, which stands for padding and for the end of text."""
    return torch.randint(1, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@cache
def tiny_tokenizer(vocab_size=500):
    """A tokenizer of planted text, in which "nurse" and "concert" are single tokens."""
    return tokenizer_with_words([text.text for text in planted.generate(300)], vocab_size, ["nurse", "concert"])


def tokenizer_with_words(texts, vocab_size, words):
    """A tokenizer made as the demo's is."""
    script = runpy.run_path(str(ROOT / "data" / "demo" / "whole_words.py"))
    return script["guarantee_words"](train_tokenizer(texts, vocab_size), words, vocab_size)


def tiny_classifier(folder, labels, bias):
    """Saves a classifier of texts that says what its bias says, whatever it reads."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    sizes = dict(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**sizes, id2label=labels))
    model.classifier.bias.data = torch.tensor(bias)
    model.save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


class Interruptible(subprocess.Popen):
    """A command as if typed at a terminal: Ctrl-C stops it, even if these tests run in the background."""

    def __init__(self, command, **settings):
        def heed():  # a shell has what it starts in the background ignore interrupts, and all below that inherits it
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        super().__init__(
            command, start_new_session=True, preexec_fn=heed, stderr=subprocess.PIPE, text=True, **settings
        )

    def interrupt(self, timeout: float = 60) -> str:
        """Interrupts it with all that it has started; returns what it wrote to stderr."""
        os.killpg(self.pid, signal.SIGINT)
        return self.communicate(timeout=timeout)[1]


# ---------------------------------------------------------------- runs of the training loop

RESULTS = ["step", "tokens", "train_loss", "valid_loss", "learning_rate"]  # of a history, but for its times


def command(config, launcher=(), program=("-m", "backpack_lib.training")):
    flags = [f"--{name}={value}" for name, value in vars(config).items() if value is not None]
    return [sys.executable, *launcher, *program, *flags]


def run_command(*parts):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*parts), cwd=ROOT, env=env, capture_output=True, text=True)


def stop_before(monkeypatch, config, step):
    """Trains until a step, at which the process might have been killed."""
    one_step = Run.train_one_step

    def breaking(run):
        if run.step == step - 1:
            raise InterruptedError
        one_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_one_step", breaking)
        with pytest.raises(InterruptedError):
            train(config)


def weights(out):
    return load_file(f"{out}/model/model.safetensors")


def assert_same_weights(out, other):
    a, b = weights(out), weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
