"""What changes when one fact is edited, and what else does: every method on the same facts.

models = {"Backpack": backpack, "Transformer": transformer}
rows = measure_facts(models, tokenizer, facts, general, folder)   # a row for each fact and method; resumes
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from backpack_lib.analysis.bias import fewest
from backpack_lib.analysis.finetuning import Examples, bounded_share, changed, finetune, rows_of_texts
from backpack_lib.analysis.knowledge import (
    WANTED,
    Fact,
    dose,
    project,
    projected_input,
    search_strength,
    sense_effects,
    tokens_of_fact,
)
from backpack_lib.analysis.scores import nats_per_token, next_log_probabilities
from backpack_lib.files import cached_json
from backpack_lib.loading import fingerprint
from backpack_lib.model.kinds import has_senses
from backpack_lib.text.writing import continue_texts

AS_IT_IS, PROJECTION, DOSED = "as it is", "projection", "projection, dosed"
FEWEST, FINETUNED = "fewest senses", "finetuned"
MEASURES = ["efficacy", "paraphrases", "about unchanged", "about KL", "loss with the word, %", "neighbours unchanged",
            "neighbours KL"]  # fmt: skip
ABOUT_TOKENS = 30  # of a text about a subject


def measure_facts(
    models: dict, tokenizer, facts: list[Fact], general: list[str], folder: Path, bounds=(), share: float = 0.9,
    sampling: dict | None = None, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Edits facts one by one, by each method of each model, and measures. -> a row a fact, model and method: `MEASURES`

    models: "Backpack" and, if there is one, "Transformer", by name. general: texts on anything. bounds: the Transformer
    is finetuned on each fact, too, and may raise the loss on these texts by such shares; (): it is not. share: of the
    effect, that the fewest senses should have. What is measured is kept in the folder.
    """
    settings = {
        "models": {name: fingerprint(model) for name, model in models.items()}, "general": general, "share": share,
        "bounds": list(bounds), "sampling": sampling, "seed": seed,
    }  # fmt: skip
    background = rows_of_texts(next(iter(models.values())), tokenizer, general)

    def measure(fact: Fact) -> list[dict]:
        texts = written_by_each(models, tokenizer, list(fact.about or fact.edit), ABOUT_TOKENS, sampling, seed)
        rows = []
        for name, model in models.items():
            before = state(model, tokenizer, fact, texts)
            for method, edited in methods(model, tokenizer, fact, share, background, bounds, seed):
                with edited:
                    after = state(model, tokenizer, fact, texts)
                rows.append({"model": name, "method": method} | compare(tokenizer, fact, before, after))
        return rows

    rows = []
    for fact in tqdm(facts, leave=False):
        named = {"relation": fact.relation, "subject": fact.subject, "object": fact.object, "counter": fact.counter}
        of_fact = cached_json(Path(folder) / "facts", settings | {"fact": repr(fact)}, partial(measure, fact))
        rows += [named | row for row in of_fact]
    return pd.DataFrame(rows)


def methods(
    model, tokenizer, fact: Fact, share: float, background: list, bounds, seed: int
) -> Iterator[tuple[str, AbstractContextManager]]:
    """The ways to edit a fact in a model, by name: contexts in which it is edited, to be entered one after the other."""
    yield AS_IT_IS, nullcontext()
    if has_senses(model):
        yield PROJECTION, project(model, tokenizer, [fact]).applied()
        yield DOSED, project(model, tokenizer, [fact], strengths=[dose(model, tokenizer, fact)]).applied()
        yield FEWEST, project(model, tokenizer, [fact], fewest_senses(model, tokenizer, fact, share)).applied()
        return
    yield PROJECTION, projected_input(model, tokenizer, fact)
    yield DOSED, projected_input(model, tokenizer, fact, search_strength(model, tokenizer, fact))
    if bounds:
        _, object_, counter = tokens_of_fact(tokenizer, fact)
        n = len(fact.edit)
        examples = Examples("say", list(fact.edit), torch.full((n,), counter), torch.full((n, 1), object_))
        change = finetune(model, tokenizer, examples, background, until=WANTED, seed=seed)
        applied = partial(changed, model, change)
        for eps in bounds:
            yield f"{FINETUNED}, {eps:.1%}", applied(bounded_share(model, applied, background, eps))


def fewest_senses(model, tokenizer, fact: Fact, share: float) -> list[int]:
    """The fewest senses whose projections together reach a share of the effect on the editing prompts."""
    effect = sense_effects(model, tokenizer, fact, fact.edit).mean(0)
    return fewest(effect / max(effect.sum(), 1e-9), share) or [int(effect.argmax())]


def state(model, tokenizer, fact: Fact, texts: list[str]) -> dict:
    """What a model says now: log-probabilities after each kind of the fact's prompts, (n, V), and its loss on texts."""
    prompts = {use: list(getattr(fact, use)) for use in ("edit", "test", "about", "neighbours")}
    log_probs = next_log_probabilities(model, tokenizer, sum(prompts.values(), [])).cpu()
    by_use = log_probs.split([len(texts_of_use) for texts_of_use in prompts.values()])
    return dict(zip(prompts, by_use)) | {"loss": nats_per_token(model, tokenizer, texts)}


def compare(tokenizer, fact: Fact, before: dict, after: dict) -> dict:
    """What an edit did to a fact and to all else: `MEASURES`, and the margins in nats. NaN where there is no prompt."""
    _, object_, counter = tokens_of_fact(tokenizer, fact)
    row = {}
    for use, measure in (("edit", "efficacy"), ("test", "paraphrases")):
        margin = after[use][:, counter] - after[use][:, object_]
        row |= {measure: (margin > 0).float().mean().item(), f"margin, {use}": margin.mean().item()}
    for use in ("about", "neighbours"):
        p, q = before[use], after[use]
        row[f"{use} unchanged"] = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
        row[f"{use} KL"] = (p.exp() * (p - q)).sum(-1).mean().item()
    return row | {"loss with the word, %": 100 * (after["loss"] / before["loss"] - 1)}


def written_by_each(models: dict, tokenizer, prompts: list[str], tokens: int, sampling, seed: int) -> list[str]:
    """Each prompt continued by each of the models, so that none is judged on its own texts alone."""
    texts = []
    for model in models.values():
        texts += continue_texts(model, tokenizer, prompts, tokens, seed, **sampling or {})
    return texts
