"""What changes when facts are edited, or sets of examples taught, and what else does: every method on the same.

    models = {"Backpack": backpack, "Transformer": transformer}
    rows = measure_facts(models, tokenizer, facts, general, folder)           # a row for each fact and method
    rows = teach_sets(models, tokenizer, read_examples(), general, folder)    # a row for each held-out example

Both resume. Of examples, a few senses are compared with all weights and LoRA, at the same bound on the loss of general
text. A quarter of the fitting examples is not fitted: they choose between the settings of a method. Every second
general text bounds; the others are for measuring what general text loses.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from backpack_lib.analysis.bias import fewest
from backpack_lib.analysis.finetuning import (
    Examples,
    SenseTeaching,
    bounded_share,
    changed,
    finetune,
    general_loss,
    make_examples,
    rows_of_texts,
)
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
from backpack_lib.model.lens import SenseLens
from backpack_lib.text.writing import continue_texts

AS_IT_IS, PROJECTION, DOSED = "as it is", "projection", "projection, dosed"
FEWEST, FINETUNED = "fewest senses", "finetuned"
MEASURES = ["efficacy", "paraphrases", "about unchanged", "about KL", "loss with the word, %", "neighbours unchanged",
            "neighbours KL"]  # fmt: skip
ABOUT_TOKENS = 30  # of a text about a subject


# ---------------------------------------------------------------- facts


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


# ---------------------------------------------------------------- examples

SENSES, ALL, LORA = "senses", "all weights", "LoRA"
SETTINGS = {  # tried for each method
    SENSES: ({"chosen": 3}, {"chosen": 8}, {"chosen": 8, "background_weight": 10.0}),
    ALL: ({"learning_rate": 3e-5}, {"learning_rate": 1e-4}),
    LORA: ({"learning_rate": 3e-4, "lora": True}, {"learning_rate": 1e-3, "lora": True}),
}
KEYS, COSTS = ["set", "model", "method", "bound"], ["general text, %", "texts with the words, %"]
TAUGHT_TOKENS = 24  # of a text with a set's words


def teach_sets(
    models: dict, tokenizer, sets: pd.DataFrame, general: list[str], folder: Path, methods=(SENSES,),
    bounds=(1e-4, 1e-3, 1e-2), sampling: dict | None = None, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Teaches each set to each model by each method, up to each bound.

    -> a row a set, model, method, bound and held-out example: success, and of the change as a whole its setting, and
    the rise of the loss, in %, on other general text and on texts with the words of the set. At bound 0: as it is.

    models: "Backpack" and, if there is one, "Transformer", by name. sets: a table like `data/canonical.csv`. general:
    texts on anything. bounds: the loss on them may rise by these shares. What is measured is kept in the folder.
    """
    first = next(iter(models.values()))
    rows_of_general = rows_of_texts(first, tokenizer, general)
    prints = {name: fingerprint(model) for name, model in models.items()}
    settings = {"models": prints, "general": general, "bounds": list(bounds), "sampling": sampling, "seed": seed}
    tables = []
    for name, of_set in sets.groupby("set", sort=False):
        parts = split_examples(tokenizer, of_set, seed)
        about = list(of_set.loc[of_set["use"] == "about", "prompt"]) or [""]
        written = written_by_each(models, tokenizer, about, TAUGHT_TOKENS, sampling, seed)
        texts = rows_of_texts(first, tokenizer, written)
        for model_name, model in models.items():
            solved = parts[-1].solved_by(model, tokenizer)
            by_method = {AS_IT_IS: [_row(0.0, "", solved, (0.0, 0.0))]}
            for method in tqdm(methods, f"{name}, {model_name}", leave=False):
                if can_be_taught(model, method):
                    what = settings | {"set": of_set.to_csv(), "model": model_name, "method": SETTINGS[method]}
                    work = partial(_teach, model, tokenizer, parts, method, rows_of_general, texts, bounds, seed)
                    by_method[method] = cached_json(Path(folder) / "taught", what, work)
            for method, rows in by_method.items():
                for row in rows:
                    table = pd.DataFrame(row).rename_axis("example").reset_index()
                    tables.append(table.assign(set=name, model=model_name, method=method))
    return pd.concat(tables, ignore_index=True)[[*KEYS, "example", "success", "setting", *COSTS]]


def _row(bound: float, setting: str, solved: np.ndarray, rises) -> dict:
    """A change by its bound: which examples it solves, and by how many % the two losses rise."""
    return {"bound": bound, "setting": setting, "success": solved.tolist()} | dict(zip(COSTS, rises))


def can_be_taught(model, method: str) -> bool:
    """Senses are for a model that has some; finetuning a lens would change nothing that its base says."""
    return has_senses(model) if method == SENSES else not isinstance(model, SenseLens)


def split_examples(tokenizer, table: pd.DataFrame, seed: int) -> tuple[Examples, Examples, Examples]:
    """The examples of a set to fit, to choose a setting with, and to test on."""
    fit, test = (make_examples(tokenizer, table, use) for use in ("fit", "test"))
    order = np.random.default_rng(seed).permutation(len(fit))
    cut = max(1, len(fit) // 4)
    return fit.part(sorted(order[cut:])), fit.part(sorted(order[:cut])), test


def _teach(model, tokenizer, parts, method: str, general, texts, bounds, seed: int) -> list[dict]:
    """For each bound, what the setting that solved most of the examples to choose with does."""
    fit, choose, test = parts
    bounding, held_out = general[::2], general[1::2] or general
    before = [general_loss(model, rows) for rows in (held_out, texts)]
    best = {}
    for setting in SETTINGS[method]:
        if method == SENSES:
            applied = SenseTeaching(model, tokenizer, fit, bounding, **setting).applied
        else:
            applied = partial(changed, model, finetune(model, tokenizer, fit, bounding, seed=seed, **setting))
        measured = {}  # by share: where a wider bound allows no more, nothing changes
        for bound in bounds:
            share = bounded_share(model, applied, bounding, bound)
            if share not in measured:
                with applied(share):
                    after = [general_loss(model, rows) for rows in (held_out, texts)]
                    chosen_by, solved = (part.solved_by(model, tokenizer) for part in (choose, test))
                rises = [100 * (a / b - 1) for a, b in zip(after, before)]
                measured[share] = chosen_by.mean(), solved, rises
            chosen_by, *outcome = measured[share]
            if bound not in best or chosen_by > best[bound][0]:
                best[bound] = chosen_by, _row(bound, str(setting), *outcome)
    return [row for _, row in best.values()]
