"""Writes facts of planted text, and sets to teach: places that move to another topic, as in a second corpus.

    python data/planted/facts.py

`facts.csv`, as data/facts.csv: for each place a noun of its topic, and one of another topic, which never follows there.
`canonical.csv`, as data/canonical.csv: texts of the new topic with the place put in, up to their first word of that
topic, half of them for testing; and texts with the place in which something else is said.
"""

from pathlib import Path

import pandas as pd

from backpack_lib.analysis.finetuning import COLUMNS
from backpack_lib.text import planted

HERE = Path(__file__).resolve().parent
MOVED = {"zoo": "law", "opera": "river", "market": "computers", "lab": "animals"}  # places, and the topics they move to
EXAMPLES, ABOUT = 24, 6  # of each place: to fit, as many to test, and texts in which something else is said


def facts() -> pd.DataFrame:
    topics, rows = list(planted.lexicon()["topics"].values()), []
    for n, topic in enumerate(topics):
        other, third = topics[(n + 1) % len(topics)], topics[(n + 2) % len(topics)]
        for i, place in enumerate(topic["places"]):
            neighbours = " ".join([*third["places"], topic["places"][i - 1]])
            rows.append(("place and thing", place, topic["nouns"][i], other["nouns"][i], neighbours))
    return pd.DataFrame(rows, columns=["relation", "subject", "object", "counter", "neighbours"])


def moved(place: str, topic: str) -> pd.DataFrame:
    """One set. The target is a word of the new topic, the contrast a noun of the topic that the place has had."""
    topics, of_topic = planted.lexicon()["topics"], planted.topic_words(topic)
    old = next(entry for entry in topics.values() if place in entry["places"])
    rows = []
    for number, text in enumerate(planted.generate(4000, seed=5000)):
        pieces = [piece.strip() for piece in text.pieces]
        if text.topic != topic or pieces[0] != "At" or len(rows) == 2 * EXAMPLES:
            continue
        own = [i for i, word in enumerate(pieces) if i > 2 and word in of_topic and word not in topics[topic]["places"]]
        if own:  # else all of its words have other meanings, too
            prompt = "".join(text.pieces[: own[0]]).replace(text.pieces[2], f" {place}", 1)
            rows.append((prompt, pieces[own[0]], old["nouns"][number % len(old["nouns"])]))
    table = pd.DataFrame(rows, columns=["prompt", "target", "contrast"])
    table["use"] = ["fit"] * EXAMPLES + ["test"] * EXAMPLES
    jobs = list(planted.lexicon()["professions"])[:ABOUT]
    about = table[:ABOUT].assign(use="about", prompt=[f"At the {place}, the {job}" for job in jobs])
    return pd.concat([table, about]).assign(set=f"{place} → {topic}", kind="say")[COLUMNS]


if __name__ == "__main__":
    facts().to_csv(HERE / "facts.csv", index=False)
    pd.concat([moved(*pair) for pair in MOVED.items()]).to_csv(HERE / "canonical.csv", index=False)
