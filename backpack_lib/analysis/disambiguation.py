"""Words that mean two things: do the weights choose among their senses, and how much does that choice matter?

Each text ends in the ambiguous word, after a context that shows which of two meanings it has. Cue words stand for the
meanings, such as "money" and "river" for "bank". The log-odds of the cues (the mean logit of the first meaning's minus
that of the second's) are a sum of contributions; so the difference that a context makes is one, too, and the part that
comes from the ambiguous word itself can only come from its weights, since its senses are the same in all contexts.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from backpack_lib.analysis.scores import prompt_batches
from backpack_lib.analysis.statistics import p_value
from backpack_lib.files import data_folder
from backpack_lib.model.kinds import require_senses
from backpack_lib.text import planted
from backpack_lib.text.words import tokens_of_word

TEXTS_OF_A_MEANING = 24


@dataclass(frozen=True)
class Ambiguity:
    """An ambiguous word, cue words for two of its meanings, and texts that end in it, by meaning."""

    word: str
    cues: dict[str, list[str]]
    texts: dict[str, list[str]]


def planted_ambiguities(seed: int = 0) -> list[Ambiguity]:
    """The ambiguous words of the planted corpus in texts of known meaning; the cues are the topics' own words."""
    found = {}
    ambiguous = planted.lexicon()["ambiguous"]
    for text in planted.generate(20_000, seed):
        for word, topics in ambiguous.items():
            before, stands, _ = text.text.partition(f" {word} ")
            if stands and text.topic in topics[:2] and len(before.split()) < 45:
                found.setdefault(word, {}).setdefault(text.topic, []).append(f"{before} {word}")
    return [
        Ambiguity(
            word,
            {topic: sorted(planted.topic_words(topic)) for topic in topics[:2]},
            {topic: found[word][topic][:TEXTS_OF_A_MEANING] for topic in topics[:2]},
        )
        for word, topics in ambiguous.items()
    ]


def english_ambiguities() -> list[Ambiguity]:
    """The words and texts of `data/ambiguous.yaml`."""
    import yaml

    written = yaml.safe_load((data_folder() / "ambiguous.yaml").read_text(encoding="utf-8"))
    return [Ambiguity(word, entry["cues"], entry["texts"]) for word, entry in written.items()]


@torch.no_grad()
def leanings(model, tokenizer, ambiguity: Ambiguity) -> np.ndarray:
    """How far each sense of the word pushes the first meaning's cues over the second's, in nats, (k,).

    Of a word of several tokens, the last; of such a cue, the mean.
    """
    x = torch.tensor(tokens_of_word(tokenizer, ambiguity.word)[-1:], device=model.device)
    return (model.sense_vectors(x)[0] @ _direction(model, tokenizer, ambiguity)).cpu().numpy()


@torch.no_grad()
def weights_in_context(model, tokenizer, ambiguity: Ambiguity) -> pd.DataFrame:
    """What each text does at the word's own position, where the next word is predicted.

    A row a text: meaning; total, the log-odds of the cues; own, the word's contribution to them; and weight 0 to k - 1,
    how much of each sense of the word goes in.

    Raises ValueError for a model without senses.
    """
    require_senses(model)
    direction, lean = _direction(model, tokenizer, ambiguity), leanings(model, tokenizer, ambiguity)
    meanings = [meaning for meaning, texts in ambiguity.texts.items() for _ in texts]
    texts = [text for some in ambiguity.texts.values() for text in some]
    weights, totals = [], []
    for ids, mask, last in prompt_batches(model, tokenizer, texts):
        out = model(ids, attention_mask=mask, output_senses=True, use_cache=False)
        rows = torch.arange(len(ids), device=ids.device)
        weights.append(out.contextualization[rows, :, last, last])  # (n, k)
        alpha = out.contextualization[rows, :, last]  # (n, k, T)
        totals.append(torch.einsum("nkt,nktd,d->n", alpha, out.senses, direction))
    table = pd.DataFrame(torch.cat(weights).cpu().numpy()).add_prefix("weight ")
    own = table.to_numpy() @ lean
    return pd.concat(
        [pd.DataFrame({"meaning": meanings, "total": torch.cat(totals).cpu().numpy(), "own": own}), table], axis=1
    )


def context_effect(table: pd.DataFrame, permutations: int = 10_000, seed: int = 0) -> dict[str, float]:
    """What the context changes, first meaning minus second: of all log-odds, and of the word's own contribution.

    p: how often permuted meanings move the word's own contribution as far toward their meaning.
    """
    first = (table["meaning"] == table["meaning"].iloc[0]).to_numpy()
    own = table["own"].to_numpy()
    rng = np.random.default_rng(seed)
    labels = rng.permuted(np.tile(first, (permutations, 1)), axis=1)
    null = (labels * own).sum(1) / first.sum() - (~labels * own).sum(1) / (~first).sum()
    moved = own[first].mean() - own[~first].mean()
    total = table["total"].to_numpy()
    return {
        "total": float(total[first].mean() - total[~first].mean()),
        "own": float(moved),
        "p": p_value(null, moved),
    }


def context_effects(model, tokenizer, ambiguities: list[Ambiguity], seed: int = 0) -> pd.DataFrame:
    """`context_effect` of several words: a row a word, with its two meanings."""
    rows = {}
    for ambiguity in ambiguities:
        effect = context_effect(weights_in_context(model, tokenizer, ambiguity), seed=seed)
        rows[ambiguity.word] = {"meanings": " / ".join(ambiguity.cues)} | effect
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("word")


def _direction(model, tokenizer, ambiguity: Ambiguity) -> torch.Tensor:
    E = model.get_output_embeddings().weight.detach()
    first, second = (
        torch.stack([E[tokens_of_word(tokenizer, cue)].mean(0) for cue in cues]).mean(0)
        for cues in ambiguity.cues.values()
    )
    return first - second
