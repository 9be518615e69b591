"""Was a text on its topic, and was it good text? Judges that did not steer, and measures of fluency."""

import math
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pandas as pd

from backpack_lib.evaluation import log_probabilities
from backpack_lib.texts import ids_of_text

CLASSIFIER = "cardiffnlp/tweet-topic-21-multi"  # the judge of Hewitt et al. (2023)


class WordJudge:
    """Finds a text's topic by lists of words: the one with the most words of its own, if there is one.

    topics: dictionaries with a name, the words that steer toward it, `steer`, and other words by which it is
    known, `words`. Words that steer are never counted, so nobody is praised for saying them.
    """

    def __init__(self, topics: list[dict]):
        self.words = {t["name"]: {w.lower() for w in t["words"]} - {w.lower() for w in t["steer"]} for t in topics}

    def counts(self, texts: list[str]) -> pd.DataFrame:
        """How many words of each topic each text has: texts x topics."""
        rows = [Counter(_words(text)) for text in texts]
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

    name: a folder, or an id of the Hugging Face hub. Raises ValueError if it cannot be loaded.
    """

    def __init__(self, name: str = CLASSIFIER):
        from transformers import pipeline

        try:
            self.classify = pipeline("text-classification", model=name, top_k=None, function_to_apply="sigmoid")
        except OSError as error:
            raise ValueError(
                f"The classifier {name!r} could not be loaded; give a folder, or use the words."
            ) from error

    def __call__(self, texts: list[str]) -> pd.DataFrame:
        """Whether each text is on each topic: texts x topics, any number of topics a text."""
        found = [{row["label"].replace("_", " "): row["score"] > 0.5 for row in rows} for rows in self.classify(texts)]
        return pd.DataFrame(found)


# ---------------------------------------------------------------- fluency


def perplexity(model, tokenizer, texts: list[str], prompts: list[str]) -> float:
    """The perplexity of what was written behind the prompts, all tokens together, under a model that did not write it."""
    nats = log_probabilities(model, tokenizer, prompts) - log_probabilities(model, tokenizer, texts)
    tokens = sum(len(ids_of_text(tokenizer, t)) - len(ids_of_text(tokenizer, p)) for t, p in zip(texts, prompts))
    return math.exp(nats.sum().item() / max(tokens, 1))


def distinct(texts: list[str], n: int) -> float:
    """The share of different ones among all runs of n words of the texts; low where texts are all alike."""
    runs = [run for text in texts for run in _runs(text, n)]
    return len(set(runs)) / len(runs) if runs else math.nan


def repetition(texts: list[str], n: int = 4) -> float:
    """The share of runs of n words that the same text has had before; high where a text goes round in circles."""
    runs = [_runs(text, n) for text in texts]
    total = sum(map(len, runs))
    return 1 - sum(len(set(rows)) for rows in runs) / total if total else math.nan


def bag_share(texts: list[str], words: Iterable[str]) -> float:
    """The share of the texts' words that are among the given ones."""
    bag, said = {word.lower() for word in words}, [word for text in texts for word in _words(text)]
    return float(np.mean([word in bag for word in said])) if said else math.nan


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(text: str, n: int) -> list[tuple[str, ...]]:
    words = _words(text)
    return list(zip(*(words[start:] for start in range(n))))
