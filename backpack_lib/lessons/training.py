"""What 01_training alone needs: its parameters, checked before anything takes long, and the checks of its exercises."""

from dataclasses import fields

import numpy as np
import torch
from scipy.stats import entropy

from backpack_lib.lessons.exercises import check_function, check_number, check_tensor, random_cases
from backpack_lib.loading import load_model
from backpack_lib.model.kinds import require_senses
from backpack_lib.text import planted
from backpack_lib.text.corpora import open_corpus
from backpack_lib.training.config import TrainingConfig

# Every planted word is one token then, and the sentences that the models are asked with fit.
LEAST = {"vocab_size": 1050, "block_size": 16}


def settings(parameters: dict) -> dict:
    """Those of a notebook's parameters that a training run on planted text has, checked with all others."""
    names = [field.name for field in fields(TrainingConfig) if field.name in parameters]
    chosen = {name: parameters[name] for name in names if name not in ("corpus", "out")}
    TrainingConfig(corpus="planted", out="", **chosen)
    TrainingConfig(corpus=parameters["corpus"], out="", steps=parameters["finetune_steps"], warmup=0)
    for name, least in LEAST.items():
        if chosen[name] < least:
            raise ValueError(f"{name}={chosen[name]} is too small for the planted text; choose at least {least}.")
    open_corpus(parameters["corpus"])
    require_senses(load_model(parameters["start"]))
    return chosen


# ---------------------------------------------------------------- exercises


def check_silenced(answer, alpha, C, E) -> str:
    o = torch.einsum("lj,jld->d", alpha, C)
    hints = [(E @ o, "these are the logits before; what has sense 1 of word 0 added to them?")]
    return check_tensor(answer, E @ (o - alpha[1, 0] * C[0, 1]), hints)


def check_weights(answer) -> str:
    def reference(queries, keys):
        scores = torch.einsum("blid,bljd->blij", queries, keys) / queries.shape[-1] ** 0.5
        allowed = torch.ones(scores.shape[-2:]).tril().bool()
        return torch.where(allowed, scores, -torch.inf).softmax(-1)

    cases = random_cases("blid blid", b=(1, 2, 1), l=(1, 3, 4), i=(3, 5, 1), d=(4, 2, 8))
    return check_function(answer, reference, cases)


def check_sum(answer) -> str:
    def reference(alpha, C):
        return sum(alpha[:, l] @ C[:, :, l] for l in range(alpha.shape[1]))

    return check_function(answer, reference, random_cases("BkTT BTkd", B=(1, 2), k=(1, 3), T=(2, 4), d=(3, 5)))


def check_count(answer, d: int = 768, k: int = 16) -> str:
    one_vector = (4 * d * d, "that makes one vector of width d; k of them are needed.")
    outputs = (k * d, "each of these outputs has 4 d inputs.")
    return check_number(answer, 4 * d * k * d, [one_vector, outputs], tolerance=1e-6)


def check_entropy(answer) -> str:
    p = np.array(list(planted.lexicon()["professions"].values()))
    nats = entropy([p, 1 - p]).mean()
    in_bits = (nats / np.log(2), "that is in bits; the losses here are in nats.")
    return check_number(answer, nats, [in_bits, (-nats, "a cost is positive; mind the sign.")])


def check_chance(answer, k: int) -> str:
    """The share of words that would have another best sense for each of their topics, were it chosen at random."""
    sizes = [len(topics) for topics in planted.lexicon()["ambiguous"].values()]
    chance = float(np.mean([np.prod([(k - i) / k for i in range(size)]) for size in sizes]))
    hints = [((k - 1) / k, "some words have three topics."), (1 - chance, "that is the chance that two coincide.")]
    return check_number(answer, chance, hints, 2e-3)
