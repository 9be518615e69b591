"""What 00_tour alone needs: small counts and sentences, and the checks of its exercises."""

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch

from backpack_lib.analysis.scores import nats_per_token
from backpack_lib.analysis.statistics import p_value
from backpack_lib.lessons.exercises import (
    check_choice,
    check_function,
    check_number,
    check_strongest_push,  # noqa: F401, for the notebook
)
from backpack_lib.studies.text_quality import bag_share, count_among
from backpack_lib.text.words import spell, spell_text

SHOWN = 6  # of the contributions, one by one


def named_parts(contributions: pd.DataFrame, reading, embeddings: torch.Tensor, tokenizer, ids) -> pd.Series:
    """The largest contributions, each named by word, sense, and what the sense pushes up; and the sum of the others."""
    flat = contributions.to_numpy().flatten()
    order = np.abs(flat).argsort()[::-1][:SHOWN]
    words, parts = spell_text(tokenizer, ids), {}
    for place, sense in (divmod(int(index), contributions.shape[1]) for index in order):
        pushed = reading.senses[place, sense] @ embeddings[: len(tokenizer)].T
        names = ", ".join(spell(tokenizer, pushed.topk(3).indices))
        parts[f"{place} {words[place]}, sense {sense} ({names} …)"] = flat[place * contributions.shape[1] + sense]
    if len(order) < len(flat):
        parts[f"the other {len(flat) - len(order)} pairs"] = flat.sum() - flat[order].sum()
    return pd.Series(parts)


def topic_words_in(texts: list[str], words: Iterable[str]) -> list[int]:
    """How many of the words each text has."""
    return [count_among(text, words) for text in texts]


def steering_table(model, tokenizer, texts: dict[str, list[str]], prompts: list[str], words: Iterable[str]):
    """For each kind of texts: their perplexity under the model, and how many of 1,000 words are of the topic."""
    words = list(words)
    rows = {
        name: {
            "perplexity": math.exp(nats_per_token(model, tokenizer, some, prompts)),
            "topic words per 1,000": 1000 * bag_share(some, words),
        }
        for name, some in texts.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def permutation_p(plain: list[int], steered: list[int], seed: int = 0, permutations: int = 10_000) -> float:
    """How often permuted labels give as many topic words to the steered texts as they have."""
    counts, rng = np.array([*plain, *steered]), np.random.default_rng(seed)
    permuted = rng.permuted(np.tile(counts, (permutations, 1)), axis=1)[:, len(plain) :].sum(1)
    return p_value(permuted, sum(steered))


def odds_in_words(log_odds: float, pair: list[str]) -> str:
    likelier, other = pair if log_odds > 0 else pair[::-1]
    return f"{likelier} is {np.exp(abs(log_odds)):.2f} times as likely as {other}"


# ---------------------------------------------------------------- exercises


def check_sum_of_weights(answer, reading) -> str:
    return check_number(answer, reading.weights.sum(0).mean().item())


def check_contributions(answer) -> str:
    def reference(weights, senses, E_a, E_b):
        return weights * (senses @ (E_a - E_b))

    made = torch.Generator().manual_seed(0)
    sizes = [(1, 2, 3), (4, 3, 5), (6, 1, 2)]
    cases = [
        (torch.rand(T, k, generator=made), *(torch.randn(s, generator=made) for s in ((T, k, d), (d,), (d,))))
        for T, k, d in sizes
    ]
    return check_function(answer, reference, cases)


def check_halved(answer, log_odds: float, contribution: float) -> str:
    hints = [
        (log_odds - contribution, "that is the sense silenced; half of its contribution stays."),
        (log_odds / 2, "that halves all contributions; only one sense of one word is halved."),
        (log_odds + contribution / 2, "mind the sign: the contribution becomes smaller."),
    ]
    return check_number(answer, log_odds - contribution / 2, hints)


def check_criticism(answer) -> str:
    return check_choice(
        answer,
        "c",
        {
            "a": "they are exact: their sum was the model's own number.",
            "b": "in a Transformer the values that attention weights go with are mixtures of words; "
            "here they are senses.",
            "c": "only differences between logits change a probability.",
            "d": "the weights are all that the Transformer has to say in a Backpack.",
        },
    )
