"""Facts that a model knows, and edits that change one: the sense projection, and the same on a Transformer's input.

    facts = known(model, tokenizer, usable(read_facts(), tokenizer))
    edits = project(model, tokenizer, facts[:1])
    with edits.applied():
        margins(model, tokenizer, facts[0], facts[0].test)   # counter-object over object, in nats

The projection is that of Hewitt et al. (2023), who show what a model writes after it. How such an edit is judged
(efficacy, paraphrases, neighbours) follows Meng et al. (2022), on facts of a Transformer.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from backpack_lib.analysis.attribution import read
from backpack_lib.analysis.edits import SenseEdits
from backpack_lib.analysis.scores import next_log_probabilities, prompt_batches
from backpack_lib.files import as_seen, data_folder, first_line
from backpack_lib.model.kinds import require_senses, require_transformer
from backpack_lib.text.words import token_of_word
from backpack_lib.text.writing import ids_of_text

COLUMNS = ["relation", "subject", "object", "counter", "neighbours"]
USES = ("edit", "test", "about")
SLOT = "{subject}"
WANTED = math.log(2)  # nats; the counter-object should become twice as likely as the object
STRONGEST = 5.0
STRENGTHS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, STRONGEST)  # tried where the effect is not known beforehand


@dataclass(frozen=True)
class Fact:
    """That an object belongs to a subject, and the counter-object of the same kind that an edit puts in its place.

    edit, test: phrasings that end where the object is expected, to edit with and to test with. about: texts on the
    subject in which something else is expected. neighbours: the editing phrasings' first with other subjects.
    """

    relation: str
    subject: str
    object: str
    counter: str
    edit: tuple[str, ...]
    test: tuple[str, ...] = ()
    about: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.subject}: {self.object} → {self.counter}"


# ---------------------------------------------------------------- facts, and which of them a model knows


def read_facts(facts: str | Path = "", relations: str | Path = "") -> list[Fact]:
    """The facts of a table like `data/facts.csv`, with the phrasings of a file like `data/relations.yaml`.

    Raises ValueError for a file that cannot be read, lacks a column, or names a relation without phrasings.
    """
    import yaml

    facts = as_seen(facts) or data_folder() / "facts.csv"
    relations = as_seen(relations) or data_folder() / "relations.yaml"
    try:
        table = pd.read_csv(facts, dtype=str, keep_default_na=False)
        phrasings = yaml.safe_load(Path(relations).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"The facts in {str(facts)!r} and {str(relations)!r} cannot be read: {first_line(error)}"
        ) from error
    if missing := [column for column in COLUMNS if column not in table]:
        raise ValueError(f"{str(facts)!r} lacks the column {missing[0]!r}; it should have {', '.join(COLUMNS)}.")
    return [_fact(row, phrasings) for row in table.itertuples()]


def _fact(row, phrasings: dict) -> Fact:
    uses = phrasings.get(row.relation)
    if not isinstance(uses, dict) or not uses.get("edit"):
        raise ValueError(f"There are no phrasings for the relation {row.relation!r}; give at least one under `edit`.")
    for text in [text for use in USES for text in uses.get(use, [])]:
        if f" {SLOT}" not in text:
            raise ValueError(
                f"In the phrasing {text!r} the slot {SLOT} should stand after a space, as a word in a sentence does."
            )
    own = {use: tuple(text.replace(SLOT, row.subject) for text in uses.get(use, [])) for use in USES}
    neighbours = tuple(uses["edit"][0].replace(SLOT, other) for other in row.neighbours.split())
    return Fact(row.relation, row.subject, row.object, row.counter, **own, neighbours=neighbours)


def tokens_of_fact(tokenizer, fact: Fact) -> tuple[int, int, int]:
    """The tokens of subject, object and counter-object.

    Raises ValueError for words of several tokens, and for a counter-object that is the object.
    """
    subject, object_, counter = (token_of_word(tokenizer, word) for word in (fact.subject, fact.object, fact.counter))
    if object_ == counter:
        raise ValueError(f"The counter-object is the object, {fact.object!r}; name another word of its kind.")
    return subject, object_, counter


def usable(facts: list[Fact], tokenizer) -> list[Fact]:
    """Those facts whose three words are one token each."""
    kept = []
    for fact in facts:
        try:
            tokens_of_fact(tokenizer, fact)
        except ValueError:
            continue
        kept.append(fact)
    return kept


def margins(model, tokenizer, fact: Fact, prompts) -> np.ndarray:
    """log p(counter-object) - log p(object) after each prompt, (n,); above zero, the edit has won."""
    _, object_, counter = tokens_of_fact(tokenizer, fact)
    found = next_log_probabilities(model, tokenizer, list(prompts))
    return (found[:, counter] - found[:, object_]).cpu().double().numpy()


def known(model, tokenizer, facts: list[Fact]) -> list[Fact]:
    """Facts on which the model is right: the object is likelier than its counter-object after every editing phrasing,
    and after most of those to test with.
    """
    found = (
        next_log_probabilities(model, tokenizer, [text for fact in facts for text in fact.edit + fact.test])
        if facts
        else None
    )
    kept, start = [], 0
    for fact in facts:
        _, object_, counter = tokens_of_fact(tokenizer, fact)
        stop = start + len(fact.edit + fact.test)
        wins = (found[start:stop, object_] > found[start:stop, counter]).tolist()
        edit, test, start = wins[: len(fact.edit)], wins[len(fact.edit) :], stop
        if all(edit) and (not test or sum(test) > len(test) / 2):
            kept.append(fact)
    return kept


# ---------------------------------------------------------------- edits


def project(model, tokenizer, facts: list[Fact], senses=None, strengths=None) -> SenseEdits:
    """Edits of the subjects' senses, all of them or some, that put each counter-object in its object's place.

    strengths: for each fact, how many times the projection's change is made; None: once, as in the paper.

    Raises ValueError as `tokens_of_fact` does, and for no facts.
    """
    if not facts:
        raise ValueError("There is no fact to edit; give at least one that the model knows.")
    edits = SenseEdits(model, tokenizer, ", ".join(map(str, facts)))
    for fact, strength in zip(facts, [1.0] * len(facts) if strengths is None else strengths, strict=True):
        subject, object_, counter = tokens_of_fact(tokenizer, fact)
        edits.project(subject, remove=object_, add=counter, sense=senses, by=1 - strength)
    return edits


def dose(model, tokenizer, fact: Fact, wanted: float = WANTED, limit: float = STRONGEST) -> float:
    """The least strength at which the projection brings the margin after each editing prompt to `wanted` nats.

    Known without an edit, since the margin is linear in the strength. Once, as in the paper, where no strength up to
    `limit` is enough, as of a subject whose senses do not speak for the object.
    """
    before, effect = margins(model, tokenizer, fact, fact.edit), sense_effects(model, tokenizer, fact, fact.edit).sum(1)
    needed = np.where(effect > 0, (wanted - before) / np.where(effect > 0, effect, 1), np.inf)
    return float(max(needed.max(), 0.0)) if needed.max() <= limit else 1.0


@contextmanager
def projected_inputs(model, tokenizer, facts: list[Fact], strengths=None) -> Iterator:
    """A Transformer with the same projection on its subjects' input embeddings; its output embeddings stay."""
    require_transformer(model)
    table = model.get_input_embeddings()
    E = table.weight.detach()
    new = {}
    for fact, strength in zip(facts, [1.0] * len(facts) if strengths is None else strengths, strict=True):
        subject, object_, counter = tokens_of_fact(tokenizer, fact)
        e_r, e_a, e_s = E[object_], E[counter], new.get(subject, E[subject])
        c = e_s @ e_r / (e_r @ e_r)
        new[subject] = e_s + strength * (c * e_a * (e_r @ e_r) / (e_a @ e_a) - c * e_r)
    tokens, rows = torch.tensor(list(new), device=E.device), torch.stack(list(new.values()))

    def replace(_module, inputs, embeddings):
        match = inputs[0][..., None] == tokens
        return torch.where(match.any(-1, keepdim=True), rows[match.int().argmax(-1)], embeddings)

    handle = table.register_forward_hook(replace)
    try:
        yield model
    finally:
        handle.remove()


def search_strength(model, tokenizer, fact: Fact, wanted: float = WANTED) -> float:
    """As `dose`, for the projection of a Transformer's input, whose effect is not known: strengths are tried."""
    for strength in STRENGTHS:
        with projected_inputs(model, tokenizer, [fact], [strength]):
            if (margins(model, tokenizer, fact, fact.edit) >= wanted).all():
                return strength
    return 1.0


# ---------------------------------------------------------------- what an edit does, known beforehand


@torch.no_grad()
def predict(model, tokenizer, prompt: str, edits: SenseEdits) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits after a prompt, before an edit and as they must be after it, (V,) each, without running the edited model.

    Weights are read off the trunk, which sees no senses: alpha stays, and the new logits are the sum of alpha times the
    new senses.
    """
    ids = torch.tensor(ids_of_text(tokenizer, prompt), device=model.device)
    reading = read(model, ids)
    with edits.applied(model):
        senses = model.sense_vectors(ids)  # (T, k, d)
    moved = (reading.weights.float()[..., None] * (senses - reading.senses).float()).sum((0, 1))  # (d,)
    return reading.logits, reading.logits + reading.embeddings.float() @ moved


@torch.inference_mode()
def sense_effects(model, tokenizer, fact: Fact, prompts) -> np.ndarray:
    """How far the projection of each sense alone moves the margin after each prompt, exactly, in nats, (n, k).

    The margin is linear in the senses, so several senses together move it by their sum.
    """
    require_senses(model)
    subject, object_, counter = tokens_of_fact(tokenizer, fact)
    one = torch.tensor([subject], device=model.device)
    before = model.sense_vectors(one)[0]
    with project(model, tokenizer, [fact]).applied():
        change = model.sense_vectors(one)[0] - before  # (k, d)
    E = model.get_output_embeddings().weight
    push = change @ (E[counter] - E[object_])  # (k,)
    found = []
    for ids, mask, last in prompt_batches(model, tokenizer, list(prompts)):
        out = model.base_model(ids, attention_mask=mask, output_senses=True, use_cache=False)
        alpha = out.contextualization[torch.arange(len(ids)), :, last]  # (n, k, T)
        found.append((alpha * (ids == subject)[:, None]).sum(-1) * push)
    return torch.cat(found).cpu().double().numpy()
