"""Is a text good text? Repetition, words of a topic, and MAUVE."""

import math
import re
from collections.abc import Iterable

import numpy as np
import torch

from backpack_lib.analysis.scores import batches
from backpack_lib.text.writing import ids_of_text


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def repeated_runs(text: str, n: int = 4) -> tuple[int, int]:
    """How many runs of n words a text has, and how many of them it has had before."""
    words = words_of(text)
    runs = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(runs), len(runs) - len(set(runs))


def repetition(texts: list[str], n: int = 4) -> float:
    """The share of runs of n words that the same text has had before; high where a text goes round in circles."""
    total, repeated = (sum(counts) for counts in zip(*(repeated_runs(text, n) for text in texts)))
    return repeated / total if total else math.nan


def count_among(text: str, words: Iterable[str]) -> int:
    """How many of a text's words are among others."""
    bag = {word.lower() for word in words}
    return sum(word in bag for word in words_of(text))


@torch.no_grad()
def mauve(model, tokenizer, texts: list[str], human: list[str], seed: int = 0) -> float:
    """MAUVE (Pillutla et al., 2021) of texts against what people wrote: 0 to 1, higher is better.

    A text's features are the model's last hidden state, so numbers compare only with others of the same model, and of
    as many texts of the same length. Needs the extra `eval`.
    """
    from mauve import compute_mauve

    def features(texts):
        rows = [ids_of_text(tokenizer, text) for text in texts]
        states = np.empty((len(rows), model.config.hidden_size), dtype=np.float32)
        for places, ids, mask in batches(model, rows):
            last = model.base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state
            states[places] = last[torch.arange(len(ids)), mask.sum(1) - 1].float().cpu().numpy()
        return states

    # The clustering wants about forty texts for each of its clusters.
    buckets = max(2, (len(texts) + len(human)) // 40)
    p, q = features(texts), features(human)
    return float(compute_mauve(p_features=p, q_features=q, num_buckets=buckets, seed=seed, verbose=False).mauve)
