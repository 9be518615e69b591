"""Facts that a model knows, and edits that change one: the sense projection, and the same on a Transformer's input.

    facts = known(model, tokenizer, usable(read_facts(), tokenizer))
    with project(model, tokenizer, facts[:1]).applied():
        margins(model, tokenizer, facts[0], facts[0].test)   # counter-object over object, in nats

The projection is that of Hewitt et al. (2023), who show what a model writes after it. How such an edit is judged
(efficacy, paraphrases, neighbours) follows Meng et al. (2022), on facts of a Transformer.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from backpack_lib.analysis.edits import SenseEdits
from backpack_lib.analysis.scores import next_log_probabilities, readings
from backpack_lib.files import as_seen, data_folder, read_file
from backpack_lib.model.kinds import require_senses, require_transformer
from backpack_lib.text.words import token_of_word

COLUMNS = ["relation", "subject", "object", "counter", "neighbours"]
USES = ("edit", "test", "about")
SLOT = "{subject}"
WANTED = math.log(2)  # nats; the counter-object should become twice as likely as the object
STRONGEST = 5.0
STRENGTHS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, STRONGEST)  # tried where the effect is not known beforehand


@dataclass(frozen=True)
class Fact:
    """That an object belongs to a subject, and the counter-object of the same kind that an edit puts in its place."""

    relation: str
    subject: str
    object: str
    counter: str
    edit: tuple[str, ...]  # phrasings that end where the object is expected, to edit with
    test: tuple[str, ...] = ()  # and others, to test with
    about: tuple[str, ...] = ()  # texts on the subject in which something else is expected
    neighbours: tuple[str, ...] = ()  # the first phrasing with other subjects

    def __str__(self) -> str:
        return f"{self.subject}: {self.object} → {self.counter}"


# ---------------------------------------------------------------- facts, and which of them a model knows


def read_facts(facts: str | Path = "", relations: str | Path = "") -> list[Fact]:
    """The facts of a table like `data/facts.csv`, with the phrasings of a file like `data/relations.yaml`."""
    table = read_table(as_seen(facts) or data_folder() / "facts.csv", COLUMNS)
    relations = as_seen(relations) or data_folder() / "relations.yaml"
    phrasings = read_file(relations, lambda file: yaml.safe_load(Path(file).read_text(encoding="utf-8-sig")))
    if not isinstance(phrasings, dict):
        kind = "empty" if phrasings is None else f"a {type(phrasings).__name__}"
        raise ValueError(
            f"{str(relations)!r} is {kind}; it should name each relation with its phrasings, as data/relations.yaml does."
        )
    return [_fact(row, phrasings) for row in table.itertuples()]


def read_table(file: str | Path, columns: list[str]) -> pd.DataFrame:
    """A CSV file of texts that should have these columns."""
    table = read_file(file, lambda file: pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig"))
    if missing := [column for column in columns if column not in table]:
        raise ValueError(f"{str(file)!r} lacks the column {missing[0]!r}; it should have {', '.join(columns)}.")
    return table


def _fact(row, phrasings: dict) -> Fact:
    uses = phrasings.get(row.relation)
    if not isinstance(uses, dict) or not uses.get("edit"):
        raise ValueError(f"There are no phrasings for the relation {row.relation!r}; give at least one under `edit`.")
    own = {}
    for use in USES:
        texts = uses.get(use) or []
        if not isinstance(texts, list) or not all(isinstance(text, str) and f" {SLOT}" in text for text in texts):
            raise ValueError(
                f"The phrasings under {use!r} of {row.relation!r} are {texts!r:.200}; give a list of texts in which "
                f"{SLOT} stands after a space, as a word in a sentence does."
            )
        own[use] = tuple(text.replace(SLOT, row.subject) for text in texts)
    neighbours = tuple(uses["edit"][0].replace(SLOT, other) for other in row.neighbours.split())
    return Fact(row.relation, row.subject, row.object, row.counter, **own, neighbours=neighbours)


def tokens_of_fact(tokenizer, fact: Fact) -> tuple[int, int, int]:
    """The tokens of subject, object and counter-object, which should be one each."""
    subject, object_, counter = (token_of_word(tokenizer, word) for word in (fact.subject, fact.object, fact.counter))
    if object_ == counter:
        raise ValueError(f"The counter-object is the object, {fact.object!r}; name another word of its kind.")
    return subject, object_, counter


def usable(facts: list[Fact], tokenizer) -> list[Fact]:
    """Those facts whose three words are one token each."""
    kept = []
    for fact in facts:
        with suppress(ValueError):
            tokens_of_fact(tokenizer, fact)
            kept.append(fact)
    return kept


def margins(model, tokenizer, fact: Fact, prompts) -> np.ndarray:
    """log p(counter-object) - log p(object) after each prompt, (n,); above zero, the edit has won."""
    _, object_, counter = tokens_of_fact(tokenizer, fact)
    log_probs = next_log_probabilities(model, tokenizer, list(prompts))
    return (log_probs[:, counter] - log_probs[:, object_]).cpu().double().numpy()


def known(model, tokenizer, facts: list[Fact]) -> list[Fact]:
    """Facts whose object a model finds likelier than the counter-object: after all editing phrasings and most others."""
    if not facts:
        return []
    log_probs = next_log_probabilities(model, tokenizer, [text for fact in facts for text in fact.edit + fact.test])
    kept = []
    for fact, of_fact in zip(facts, log_probs.split([len(fact.edit + fact.test) for fact in facts])):
        _, object_, counter = tokens_of_fact(tokenizer, fact)
        right = (of_fact[:, object_] > of_fact[:, counter]).float()
        edit, test = right[: len(fact.edit)], right[len(fact.edit) :]
        if edit.all() and (not len(test) or test.mean() > 0.5):
            kept.append(fact)
    return kept


# ---------------------------------------------------------------- edits


def project(model, tokenizer, facts: list[Fact], senses=None, strengths=None) -> SenseEdits:
    """Edits of the subjects' senses, all of them or some, that put each counter-object in its object's place.

    strengths: for each fact, how many times the projection's change is made; None: once, as in the paper.
    """
    edits = SenseEdits(model, tokenizer, ", ".join(map(str, facts)))
    for fact, strength in zip(facts, [1.0] * len(facts) if strengths is None else strengths, strict=True):
        subject, object_, counter = tokens_of_fact(tokenizer, fact)
        edits.project(subject, remove=object_, add=counter, sense=senses, by=1 - strength)
    return edits


@torch.inference_mode()
def sense_effects(model, tokenizer, fact: Fact, prompts) -> np.ndarray:
    """How far the projection of each sense alone moves the margin after each prompt, exactly, in nats, (n, k).

    The margin is linear in the senses, so several senses together move it by their sum.
    """
    require_senses(model)
    subject, object_, counter = tokens_of_fact(tokenizer, fact)
    token = torch.tensor([subject], device=model.device)
    before = model.sense_vectors(token)[0]
    with project(model, tokenizer, [fact]).applied():
        change = (model.sense_vectors(token)[0] - before).float()  # (k, d)
    effects = []
    for ids, reading in readings(model, tokenizer, list(prompts)):
        push = change @ (reading.embeddings[counter] - reading.embeddings[object_]).float()  # (k,)
        weights = reading.weights[torch.tensor(ids) == subject].float().sum(0)  # (k,)
        effects.append(weights * push)
    return torch.stack(effects).cpu().double().numpy()


def dose(model, tokenizer, fact: Fact) -> float:
    """The least strength at which the projection brings the margin after each editing prompt to `WANTED` nats.

    Known without an edit, since the margin is linear in the strength. 1, as in the paper, if none to `STRONGEST` is.
    """
    before, effect = margins(model, tokenizer, fact, fact.edit), sense_effects(model, tokenizer, fact, fact.edit).sum(1)
    needed = max(np.where(effect > 0, (WANTED - before) / np.maximum(effect, 1e-9), np.inf))
    return float(max(needed, 0.0)) if needed <= STRONGEST else 1.0


@contextmanager
def projected_input(model, tokenizer, fact: Fact, strength: float = 1.0) -> Iterator:
    """A Transformer with the same projection on its subject's input embedding; its output embeddings stay."""
    require_transformer(model)
    tokens = tokens_of_fact(tokenizer, fact)
    e_s, e_r, e_a = model.get_input_embeddings().weight.detach()[list(tokens)]
    c = e_s @ e_r / (e_r @ e_r)
    change = strength * (c * e_a * (e_r @ e_r) / (e_a @ e_a) - c * e_r)

    def add(_module, inputs, embeddings):
        return torch.where((inputs[0] == tokens[0])[..., None], embeddings + change, embeddings)

    with model.get_input_embeddings().register_forward_hook(add):
        yield model


def search_strength(model, tokenizer, fact: Fact) -> float:
    """As `dose`, for the projection of a Transformer's input, whose effect is not known: strengths are tried."""
    for strength in STRENGTHS:
        with projected_input(model, tokenizer, fact, strength):
            if (margins(model, tokenizer, fact, fact.edit) >= WANTED).all():
                return strength
    return 1.0
