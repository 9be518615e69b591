"""Teaching by examples: a few senses, against all weights and LoRA, at the same bound on the loss of general text.

    models = {"Backpack": backpack, "Transformer": transformer}
    rows = teach_sets(models, tokenizer, read_examples(), general, folder)   # a row for each held-out example; resumes

A quarter of the fitting examples is not fitted: they choose between the settings of a method. Every second general text
bounds; the others are for measuring what general text loses.
"""

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

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
from backpack_lib.files import cached_json
from backpack_lib.loading import fingerprint
from backpack_lib.model.kinds import has_senses
from backpack_lib.model.lens import SenseLens
from backpack_lib.studies.knowledge_study import written_by_each

AS_IT_IS, SENSES, ALL, LORA = "as it is", "senses", "all weights", "LoRA"
SETTINGS = {  # tried for each method
    SENSES: ({"chosen": 3}, {"chosen": 8}, {"chosen": 8, "background_weight": 10.0}),
    ALL: ({"learning_rate": 3e-5}, {"learning_rate": 1e-4}),
    LORA: ({"learning_rate": 3e-4, "lora": True}, {"learning_rate": 1e-3, "lora": True}),
}
KEYS, COSTS = ["set", "model", "method", "bound"], ["general text, %", "texts with the words, %"]
ABOUT_TOKENS = 24  # of a text with a set's words


def check_methods(methods):
    """Raises ValueError if there is none, or one that is unknown or cannot be had."""
    if not methods:
        raise ValueError(f"methods=[] holds no method to teach with; choose from {', '.join(SETTINGS)}.")
    if unknown := [method for method in methods if method not in SETTINGS]:
        raise ValueError(f"The method {unknown[0]!r} is unknown; choose from {', '.join(SETTINGS)}.")
    if LORA in methods and find_spec("peft") is None:
        raise ValueError(
            "LoRA needs the library peft, which is not installed; install the extra `lora`, or leave it out."
        )


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
        written = written_by_each(models, tokenizer, about, ABOUT_TOKENS, sampling, seed)
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
