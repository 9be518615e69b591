"""Words that mean two things: do the weights choose among their senses, and how much does that choice matter?

Each text ends in the ambiguous word, after a context that shows which of two meanings it has. Cue words stand for the
meanings, such as "money" and "river" for "bank". The log-odds of the cues (the mean logit of the first meaning's minus
that of the second's) are a sum of contributions; so the difference that a context makes is one, too. The part of it
that comes from the ambiguous word itself is due to its weights alone: its senses are the same in all contexts.
"""

from dataclasses import dataclass

import pandas as pd
import torch

from backpack_lib.analysis.scores import readings
from backpack_lib.analysis.senses import pushes
from backpack_lib.files import data_folder
from backpack_lib.text import planted
from backpack_lib.text.words import tokens_of_word

TEXTS_OF_A_MEANING = 24
LONGEST_PLANTED = 45  # words


@dataclass(frozen=True)
class Ambiguity:
    """An ambiguous word, cue words for two of its meanings, and texts that end in it, by meaning."""

    word: str
    cues: dict[str, list[str]]
    texts: dict[str, list[str]]


def planted_ambiguities() -> list[Ambiguity]:
    """The ambiguous words of the planted corpus in texts of known meaning; the cues are the topics' own words."""
    meanings = {word: topics[:2] for word, topics in planted.lexicon()["ambiguous"].items()}
    texts = {word: {topic: [] for topic in topics} for word, topics in meanings.items()}
    for text in planted.generate():
        for word, topics in meanings.items():
            before, stands, _ = text.text.partition(f" {word} ")
            if stands and text.topic in topics and len(before.split()) < LONGEST_PLANTED:
                texts[word][text.topic].append(f"{before} {word}")
    ambiguities = []
    for word, topics in meanings.items():
        cues = {topic: sorted(planted.topic_words(topic)) for topic in topics}
        ambiguities.append(Ambiguity(word, cues, {topic: texts[word][topic][:TEXTS_OF_A_MEANING] for topic in topics}))
    return ambiguities


def english_ambiguities() -> list[Ambiguity]:
    """The words and texts of `data/ambiguous.yaml`."""
    import yaml

    entries = yaml.safe_load((data_folder() / "ambiguous.yaml").read_text(encoding="utf-8"))
    return [Ambiguity(word, entry["cues"], entry["texts"]) for word, entry in entries.items()]


def first_over_second(tokenizer, values: torch.Tensor, cues: dict[str, list[str]]) -> torch.Tensor:
    """The mean over the first meaning's cues less the mean over the second's, of logits or pushes, (..., V) -> (...)."""
    means = []
    for words in cues.values():
        of_cues = [values[..., tokens_of_word(tokenizer, cue)].mean(-1) for cue in words]
        means.append(torch.stack(of_cues).mean(0))
    return means[0] - means[1]


@torch.no_grad()
def leanings(model, tokenizer, ambiguity: Ambiguity) -> torch.Tensor:
    """How far each sense of the word's last token pushes the first cues over the second's, in nats, (k,)."""
    x = torch.tensor(tokens_of_word(tokenizer, ambiguity.word)[-1:], device=model.device)
    return first_over_second(tokenizer, pushes(model, model.sense_vectors(x)[0]), ambiguity.cues)


@torch.no_grad()
def weights_in_context(model, tokenizer, ambiguity: Ambiguity) -> pd.DataFrame:
    """What each text, a row, does at the word's own position, where the next word is predicted.

    Columns: meaning; total, the log-odds of the cues; own, the word's contribution to them; and 0 to k - 1, how much of
    each sense of the word goes in.
    """
    meanings = [meaning for meaning, texts in ambiguity.texts.items() for _ in texts]
    texts = [text for texts in ambiguity.texts.values() for text in texts]
    weights, logits = [], []
    for _, reading in readings(model, tokenizer, texts):
        weights.append(reading.weights[-1])
        logits.append(reading.logits)
    weights = torch.stack(weights)  # (texts, k)
    table = pd.DataFrame(weights.cpu().numpy())
    table.insert(0, "own", (weights @ leanings(model, tokenizer, ambiguity)).cpu().numpy())
    table.insert(0, "total", first_over_second(tokenizer, torch.stack(logits), ambiguity.cues).cpu().numpy())
    table.insert(0, "meaning", meanings)
    return table
