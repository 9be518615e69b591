"""What 01_training alone needs: settings from its parameters, small tables, and the checks of its exercises."""

from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student
from scipy.stats import ttest_rel

from backpack_lib.analysis.meanings import planted_meanings
from backpack_lib.analysis.scores import log_probabilities
from backpack_lib.files import data_folder
from backpack_lib.lessons.exercises import check_choice, check_function, check_number, check_tensor
from backpack_lib.loading import load, load_model
from backpack_lib.model.backpack import BackpackConfig
from backpack_lib.model.kinds import require_senses
from backpack_lib.text import planted
from backpack_lib.text.corpora import open_corpus
from backpack_lib.text.words import spell, tokens_of_word
from backpack_lib.text.writing import continue_texts, ids_of_text
from backpack_lib.training.config import TrainingConfig

SHORTEST = 16  # tokens that the sentences need with which the models are asked
LEAST_VOCABULARY = 1050  # in which every planted word is one token


# ---------------------------------------------------------------- settings


def settings(parameters: dict) -> dict:
    """Those of a notebook's parameters that `TrainingConfig` has.

    Raises ValueError, before anything takes long, for values that are out of range, for blocks that are too short for
    the sentences that the models are asked with, and for a corpus or a model to start from that is not there.
    """
    found = {field.name: parameters[field.name] for field in fields(TrainingConfig) if field.name in parameters}
    TrainingConfig(**found | {"out": ""})
    TrainingConfig(corpus=found["corpus"], out="", steps=parameters["finetune_steps"], warmup=0)
    if found["vocab_size"] < LEAST_VOCABULARY:
        raise ValueError(
            f"vocab_size={found['vocab_size']} is too small for every planted word to be one token; "
            f"choose at least {LEAST_VOCABULARY}."
        )
    open_corpus(found["corpus"])
    require_senses(load_model(parameters["start"]))
    if found["block_size"] < SHORTEST:
        raise ValueError(
            f"block_size={found['block_size']} is too short for the sentences that the models are asked with; "
            f"choose at least {SHORTEST}."
        )
    return {name: value for name, value in found.items() if name not in ("corpus", "out")} | {"keep_models": True}


def configure(folder, settings: dict, architecture: str, **changes) -> TrainingConfig:
    """A run on planted text in a folder of its own: other settings, another folder."""
    config = TrainingConfig(**{"corpus": "planted", "out": "", **settings, "architecture": architecture} | changes)
    config.out = str(folder / config.key())
    return config


# ---------------------------------------------------------------- tables


def parameter_counts(config: BackpackConfig) -> pd.Series:
    """How many numbers each part of a Backpack of these sizes learns."""
    d, k, d_s = config.n_embd, config.num_senses, config.n_embd // config.num_senses
    layer = 12 * d * d + 13 * d  # attention 4 d^2, MLP 8 d^2, and their biases and norms
    block = 8 * d * d + 5 * d + 6 * d
    hidden = config.sense_intermediate_scale * d
    return pd.Series(
        {
            "embeddings": (config.vocab_size + config.n_positions) * d,
            "trunk": config.n_layer * layer + 2 * d,
            "sense network": block + hidden * (d + 1) + k * d * (hidden + 1),
            "queries and keys": 2 * k * d_s * (d + 1),
        }
    )


def planted_rows(tokenizer, rows: int, length: int) -> torch.Tensor:
    """Planted texts, one after the other, cut into rows of tokens. (rows, length)"""
    ids = []
    for text in planted.generate():
        ids += ids_of_text(tokenizer, text.text)
        if len(ids) >= rows * length:
            return torch.tensor(ids[: rows * length]).view(rows, length)
    raise ValueError(f"The planted corpus has no {rows} rows of {length} tokens; ask for fewer.")


def seeds_table() -> pd.DataFrame:
    """The losses of five seeds, measured by `data/planted/make.py`."""
    return pd.read_csv(data_folder() / "planted" / "seeds.csv")


def differences_over_seeds(table: pd.DataFrame, other: str) -> dict[str, float]:
    """How much lower the Backpack's loss is than another model's, paired over seeds: mean, 95 % t interval, p."""
    losses = table.pivot(index="seed", columns="model", values="valid_loss")
    difference = losses[other] - losses["Backpack"]
    half = student.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / len(difference) ** 0.5
    p = ttest_rel(losses[other], losses["Backpack"]).pvalue
    return {"difference": difference.mean(), "low": difference.mean() - half, "high": difference.mean() + half, "p": p}


def while_training(run, word: str) -> tuple[pd.DataFrame, dict[int, list[str]]]:
    """The best AUC of a word's senses for each topic, and the words that its strongest sense pushes up, on the way.

    run: the folder of a run that kept its models.

    -> AUCs, steps x topics, with the means over planted meanings of all words and over other topics; and words by step.
    """
    rows, said = {}, {}
    for folder in sorted(Path(run).glob("model-*")):
        step, (model, tokenizer) = int(folder.name.removeprefix("model-")), load(folder)
        auc, is_meaning = planted_meanings(model, tokenizer)
        best = auc.max(axis=1)
        rows[step] = best.loc[word].to_dict() | {
            "mean of planted": best[is_meaning].mean(),
            "mean of others": best[~is_meaning].mean(),
        }
        in_use = torch.tensor(planted.tokens_in_use(tokenizer))
        with torch.no_grad():
            pushed = (
                model.sense_vectors(torch.tensor(tokens_of_word(tokenizer, word)))[0]
                @ model.get_output_embeddings().weight.T
            )
        strongest = pushed[:, in_use].max(-1).values.argmax()
        said[step] = spell(tokenizer, in_use[pushed[strongest, in_use].topk(5).indices])
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("step"), said


def mean_loss(model, tokenizer, texts: list[str]) -> float:
    """Nats per token of texts, each read alone."""
    room = model.config.n_positions
    texts = [tokenizer.decode(ids_of_text(tokenizer, text)[1:room]) for text in texts]
    tokens = sum(len(ids_of_text(tokenizer, text)) - 1 for text in texts)
    return -log_probabilities(model, tokenizer, texts).sum().item() / tokens


def own_texts(model, tokenizer, n: int = 32, length: int = 100, seed: int = 0) -> list[str]:
    """Texts that a model writes from nothing: what it knew before it was taught something else."""
    return continue_texts(model, tokenizer, [""] * n, min(length, model.config.n_positions - 1), seed, top_k=0)


def documents(corpus: str, n: int = 64) -> list[str]:
    """The first texts of a corpus."""
    return list(islice(open_corpus(corpus).read(), n))


@torch.no_grad()
def moved_senses(before, after, tokenizer, texts: list[str], n: int = 8) -> pd.DataFrame:
    """The (word, sense) pairs of some texts that moved most between two models: 1 - cosine, and new words pushed up."""
    ids = torch.tensor(sorted({i for text in texts for i in tokenizer(text)["input_ids"]}))
    old, new = (model.sense_vectors(ids) for model in (before, after))
    moved = 1 - torch.cosine_similarity(old, new, dim=-1)
    rows = []
    for place in moved.flatten().topk(n).indices.tolist():
        x, l = divmod(place, moved.shape[1])
        said = [
            " · ".join(spell(tokenizer, (model.get_output_embeddings().weight @ senses[x, l]).topk(4).indices))
            for model, senses in ((before, old), (after, new))
        ]
        rows.append((*spell(tokenizer, [ids[x]]), l, moved[x, l].item(), *said))
    return pd.DataFrame(rows, columns=["word", "sense", "1 - cosine", "pushed up before", "pushed up after"])


# ---------------------------------------------------------------- exercises


def check_weights(answer) -> str:
    """Against the softmax of each sense over the positions up to each one."""

    def reference(queries, keys):
        scores = torch.einsum("blid,bljd->blij", queries, keys) / queries.shape[-1] ** 0.5
        allowed = torch.ones(scores.shape[-2:]).tril().bool()
        return torch.where(allowed, scores, -torch.inf).softmax(-1)

    made = torch.Generator().manual_seed(0)
    sizes = [(1, 1, 3, 4), (2, 3, 5, 2), (1, 4, 1, 8)]
    cases = [tuple(torch.randn(size, generator=made) for _ in range(2)) for size in sizes]
    return check_function(answer, reference, cases)


def check_sum(answer) -> str:
    def reference(alpha, C):
        return sum(alpha[:, l] @ C[:, :, l] for l in range(alpha.shape[1]))

    made = torch.Generator().manual_seed(0)
    cases = [
        (torch.rand(B, k, T, T, generator=made), torch.randn(B, T, k, d, generator=made))
        for B, k, T, d in [(1, 1, 2, 3), (2, 3, 4, 5)]
    ]
    return check_function(answer, reference, cases)


def check_silenced(answer, alpha, C, E) -> str:
    o = torch.einsum("lj,jld->d", alpha, C)
    hints = [(E @ o, "these are the logits before; what has sense 1 of word 0 added to them?")]
    return check_tensor(answer, E @ (o - alpha[1, 0] * C[0, 1]), hints)


def check_count(answer, d: int = 768, k: int = 16) -> str:
    """The weights of the matrix from the hidden layer to the senses."""
    hints = [
        (4 * d * d, "that makes one vector of width d; k of them are needed."),
        (k * d, "each of these outputs has 4 d inputs."),
    ]
    return check_number(answer, 4 * d * k * d, hints, tolerance=1e-6)


def check_entropy(answer) -> str:
    p = np.array(list(planted.lexicon()["professions"].values()))
    truth = -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()
    hints = [
        (truth / np.log(2), "that is in bits; the losses here are in nats."),
        (-truth, "a cost is positive; mind the sign."),
    ]
    return check_number(answer, truth, hints)


def check_chance(answer, k: int) -> str:
    """The share of words that would have another best sense for each of their topics, were it chosen at random."""
    sizes = [len(topics) for topics in planted.lexicon()["ambiguous"].values()]
    truth = float(np.mean([np.prod([(k - i) / k for i in range(size)]) for size in sizes]))
    two = (k - 1) / k
    return check_number(
        answer,
        truth,
        [(two, "some words have three topics."), (1 - truth, "that is the chance that two coincide.")],
        2e-3,
    )


def check_why_lower(answer) -> str:
    return check_choice(
        answer,
        "b",
        {
            "a": "another seed reverses the order, and size differs, too.",
            "b": "a difference that another seed reverses is no finding, and more than senses differs.",
            "c": "all models were trained on the same batches in the same order, for as many steps.",
            "d": "a model that has learnt nothing has a loss near log V, far above these.",
        },
    )
