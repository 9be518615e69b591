"""Everything that a training run depends on, checked before it starts."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field

import torch

from backpack_lib.loading import DEVICES, pick_device
from backpack_lib.model.backpack import check_sizes

ARCHITECTURES = ("backpack", "transformer")  # trained from nothing; a lens is trained on a model
LENS = "lens"
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}

AUTO = -1
CHOICES = {
    "architecture": (*ARCHITECTURES, LENS),
    "schedule": tuple(SCHEDULES),
    "optimizer": ("adamw", "muon"),
    "precision": ("auto", *PRECISIONS),
    "device": DEVICES,
}
RANGES = {  # lowest and highest
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "num_senses", "vocab_size", "batch_size"), (1, math.inf)),
    **dict.fromkeys(("accumulate", "steps", "eval_every", "save_every", "eval_blocks"), (1, math.inf)),
    **dict.fromkeys(("max_blocks", "warmup", "states_gb"), (0, math.inf)),
    "block_size": (2, math.inf),  # a token needs one before it
    "learning_rate": (1e-12, 1e3),
    "clip": (1e-12, 1e12),
    "dropout": (0, 0.99),
    "weight_decay": (0, 1e3),
    "decay": (0, 1),
    "valid_fraction": (1e-9, 0.5),
    "workers": (AUTO, math.inf),
    "seed": (0, 2**32 - 1),
}
# What may change between a run's start and its resumption without changing its result.
HOW_NOT_WHAT = ("out", "device", "compile", "save_every", "keep_models", "workers", "states_gb")


def option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class TrainingConfig:
    """The settings of a training run; also the flags of `python -m backpack_lib.training`.

    Raises ValueError for values that are out of range or do not fit each other.
    """

    corpus: str = field(
        metadata={"help": "'planted', text files (paths, globs, commas between), or a data set of the Hugging Face hub"}
    )
    out: str = field(metadata={"help": "folder of the run"})
    architecture: str = option("backpack", "'backpack', or 'transformer': GPT-2 with the same trunk, the baseline")
    lens_of: str | None = option(None, "folder or hub id of a Transformer to train a sense lens on; its sizes are kept")
    states_gb: float = option(20.0, "disk for the states of a lens' base; those beyond it are computed when needed")
    init_from: str | None = option(None, "folder or hub id of a model to start from; its sizes and tokenizer are kept")
    n_layer: int = option(4, "layers of the trunk")
    n_head: int = option(4, "attention heads of the trunk")
    n_embd: int = option(192, "width; a multiple of n_head")
    num_senses: int = option(16, "sense vectors per word (Backpack only)")
    vocab_size: int = option(16_000, "size of the tokenizer that is trained on the corpus")
    tokenizer: str | None = option(None, "folder or hub id of a tokenizer to use instead of training one")
    block_size: int = option(256, "tokens per sequence, and the longest text that the model will read")
    batch_size: int = option(16, "sequences that a process takes at once")
    accumulate: int = option(1, "batches per step; a step sees batch_size x accumulate x processes sequences")
    max_blocks: int = option(0, "train on so many sequences of the corpus, in several passes; 0: on all")
    steps: int = option(1000, "optimiser steps")
    learning_rate: float = option(1e-3, "highest learning rate")
    warmup: int = option(100, "steps over which the learning rate rises")
    schedule: str = option("linear", "'linear' or 'cosine' decay to zero, 'constant', or 'wsd': constant, then linear")
    decay: float = option(0.2, "share of the steps at the end over which 'wsd' decays to zero")
    optimizer: str = option("adamw", "'adamw', or 'muon': Muon for the hidden matrices, AdamW for the rest")
    weight_decay: float = option(0.1, "on matrices only, not on biases and norms")
    clip: float = option(1.0, "largest norm of the gradient")
    dropout: float = option(0.0, "everywhere in the model")
    precision: str = option("auto", "'fp32', 'bf16' or 'fp16'; 'auto': bf16 on a GPU that has it, else fp32")
    device: str = option("auto", "'cpu', 'cuda' or 'mps'; 'auto': a CUDA GPU where there is one, else the CPU")
    compile: bool = option(False, "use torch.compile")
    workers: int = option(AUTO, "processes that prepare batches ahead (of a stream always 1); -1: 2 for a GPU, else 0")
    seed: int = option(0, "of the weights, the order of the data and dropout")
    eval_every: int = option(100, "steps between evaluations")
    save_every: int = option(500, "steps between checkpoints")
    keep_models: bool = option(False, "also keep the model of each checkpoint, as out/model-STEP")
    eval_blocks: int = option(256, "validation sequences per evaluation, at most")
    valid_corpus: str | None = option(None, "text to validate on, instead of a part of the corpus")
    valid_fraction: float = option(0.02, "share of the documents that is set aside for validation")
    per_file: bool = option(False, "each file is one document; else blank lines separate documents")
    streaming: bool = option(False, "read a hub data set as it is needed, instead of downloading it first")

    def __post_init__(self):
        self.out = str(self.out)
        if self.lens_of:
            self.architecture = LENS
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}.")
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                allowed = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise ValueError(f"{name}={getattr(self, name)} is out of range; it must be {allowed}.")
        if self.architecture == LENS and not self.lens_of:
            raise ValueError(f"architecture={LENS!r} needs a Transformer to train on; name it by lens_of.")
        if self.lens_of and (self.init_from or self.tokenizer or self.streaming):
            raise ValueError("A lens takes all from its base; give lens_of without init_from, tokenizer and streaming.")
        if self.optimizer == "muon" and self.precision == "fp16":
            raise ValueError("optimizer='muon' does not go with precision='fp16'; choose 'bf16' or 'fp32', or 'adamw'.")
        decaying = round(self.steps * self.decay) if self.schedule == "wsd" else 0
        if self.warmup > self.steps - decaying:
            raise ValueError(f"warmup={self.warmup} is out of range; of steps={self.steps}, {decaying} decay.")
        if not (self.init_from or self.lens_of):
            check_sizes(self.n_embd, self.n_head, self.num_senses if self.architecture == "backpack" else 1)

    def resolved_precision(self) -> str:
        """The precision itself where "auto" was asked for: bf16 on a GPU that computes in it, else fp32."""
        if self.precision != "auto":
            return self.precision
        on_gpu = pick_device(self.device).type == "cuda"
        return "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"

    def identity(self) -> dict:
        """What the result of a run depends on: all settings but those that only say how it is run.

        The device does not belong to it but the precision does, so a run is not continued in another one unasked.
        """
        settings = asdict(self) | {"precision": self.resolved_precision()}
        return {name: value for name, value in settings.items() if name not in HOW_NOT_WHAT}

    def key(self) -> str:
        """A short name that differs for runs that differ: "backpack-1f0c2a9e"."""
        digest = hashlib.blake2b(json.dumps(self.identity(), sort_keys=True).encode(), digest_size=4)
        return f"{self.architecture}-{digest.hexdigest()}"
