"""Was a text on its topic, and was it good text? Judges that did not steer, and measures of fluency."""

import math
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch

from backpack_lib.evaluation import log_probabilities, parts
from backpack_lib.hub import reaching_hub
from backpack_lib.texts import ids_of_text, pad_rows

TEXTS_AT_ONCE = 32
CLASSIFIER = "cardiffnlp/tweet-topic-21-multi"  # the judge of Hewitt et al. (2023)


class WordJudge:
    """Finds a text's topic by lists of words: the one with the most words of its own, if there is one.

    topics: dictionaries with a name, the words that steer toward it, `steer`, and other words by which it is
    known, `words`. Words that steer are never counted, nor with an s more or less, so nobody is praised for
    saying them.
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
            with reaching_hub(name):
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


@torch.no_grad()
def mauve(model, tokenizer, texts: list[str], human: list[str], seeds: Iterable[int] = range(5)) -> list[float]:
    """MAUVE (Pillutla et al., 2021) of texts against what people wrote, one number for each seed of its clustering.

    0 to 1, higher is better. A text's features are the last hidden state of the given model, so numbers compare
    only with others of the same model, lengths and numbers of texts. Needs the extra `eval`.
    """
    from mauve import compute_mauve

    def features(texts):
        rows = [ids_of_text(tokenizer, text) for text in texts]
        found = []
        for part in parts(rows, TEXTS_AT_ONCE):
            ids, mask = pad_rows(part, tokenizer.eos_token_id)
            states = model.base_model(ids.to(model.device), attention_mask=mask.to(model.device)).last_hidden_state
            found.append(states[torch.arange(len(ids)), mask.sum(1) - 1].float().cpu().numpy())
        return np.concatenate(found)

    # The clustering wants about forty texts for each of its clusters.
    buckets = max(2, (len(texts) + len(human)) // 40)
    p, q = features(texts), features(human)
    return [
        float(compute_mauve(p_features=p, q_features=q, num_buckets=buckets, seed=seed, verbose=False).mauve)
        for seed in seeds
    ]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(text: str, n: int) -> list[tuple[str, ...]]:
    words = _words(text)
    return list(zip(*(words[start:] for start in range(n))))
