"""Is a text on its topic, by judges that did not steer it, and is it good text: repetition, and MAUVE."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from backpack_lib.analysis.scores import batches
from backpack_lib.files import as_seen
from backpack_lib.hub import offline_without_hub
from backpack_lib.text.writing import ids_of_text


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def repeated_runs(text: str, n: int = 4) -> tuple[int, int]:
    """How many runs of n words a text has, and how many of them it has had before."""
    words = words_of(text)
    runs = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(runs), len(runs) - len(set(runs))


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


class WordJudge:
    """Finds a text's topic by lists of words: the topic of which it has most, if there is one such topic.

    topics: dictionaries with a name, the words that steer toward it, `steer`, and other words by which it is known,
    `words`. Steering words and their plurals or singulars never count, so no method is praised for repeating them.
    """

    def __init__(self, topics: list[dict]):
        if not topics:
            raise ValueError("There is no topic to judge by; give at least one.")
        self.words = {}
        for topic in topics:
            steer = {word.lower() for word in topic["steer"]}
            known = {word.lower() for word in topic["words"]}
            self.words[topic["name"]] = {w for w in known if not {w, w + "s", w.removesuffix("s")} & steer}

    def counts(self, texts: list[str]) -> pd.DataFrame:
        """How many words of each topic each text has: texts x topics."""
        rows = [Counter(words_of(text)) for text in texts]
        return pd.DataFrame(
            {name: [sum(row[word] for word in own) for row in rows] for name, own in self.words.items()}
        )

    def __call__(self, texts: list[str]) -> pd.DataFrame:
        """Whether each text is on each topic: texts x topics, at most one topic a text; a tie is none."""
        counts = self.counts(texts)
        most = counts.max(axis=1)
        first = counts.eq(most, axis=0) & most.gt(0).to_numpy()[:, None]
        return first & first.sum(axis=1).eq(1).to_numpy()[:, None]


class ClassifierJudge:
    """Finds a text's topics by a classifier of several labels: those of a probability above one half.

    name: a folder, or an id of the Hugging Face hub; Hewitt et al. (2023) took cardiffnlp/tweet-topic-21-multi.
    """

    def __init__(self, name: str):
        from transformers import pipeline

        where, settings = as_seen(name), {"top_k": None, "function_to_apply": "sigmoid"}
        if not Path(where).is_dir():
            offline_without_hub()
        self.classify = pipeline("text-classification", model=where, **settings)

    def __call__(self, texts: list[str]) -> pd.DataFrame:
        """Whether each text is on each topic: texts x topics, any number of topics a text."""
        scores = [{row["label"].replace("_", " "): row["score"] > 0.5 for row in rows} for rows in self.classify(texts)]
        return pd.DataFrame(scores)
