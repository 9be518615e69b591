"""Was a text on its topic? Judges that did not steer it."""

from collections import Counter

import pandas as pd

from backpack_lib.files import as_seen
from backpack_lib.hub import offline_without_hub
from backpack_lib.studies.text_quality import words_of


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

    name: a folder, or an id of the Hugging Face hub; Hewitt et al. (2023) took cardiffnlp/tweet-topic-21-multi. Raises
    ValueError if it cannot be loaded.
    """

    def __init__(self, name: str):
        from transformers import pipeline

        where = as_seen(name)
        offline_without_hub()
        try:
            self.classify = pipeline("text-classification", model=where, top_k=None, function_to_apply="sigmoid")
        except OSError as error:
            raise ValueError(
                f"The classifier {name!r} could not be loaded; give a folder, or use the words."
            ) from error

    def __call__(self, texts: list[str]) -> pd.DataFrame:
        """Whether each text is on each topic: texts x topics, any number of topics a text."""
        scores = [{row["label"].replace("_", " "): row["score"] > 0.5 for row in rows} for rows in self.classify(texts)]
        return pd.DataFrame(scores)
