"""Teaching by examples: a few senses, against all weights and LoRA, at the same bound on the loss of general text.

    models = {"Backpack": backpack, "Transformer": transformer}
    study = TeachingStudy(models, tokenizer, read_examples(), general, folder)
    rows = study.run()                   # a row for each set, model, method, bound and held-out example; resumes
    success_table(rows)

A quarter of the fitting examples is not fitted: they choose between the settings of a method. Every second general text
bounds; the others are for measuring what general text loses.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
)  # fmt: skip
from backpack_lib.analysis.statistics import mean_interval
from backpack_lib.files import cached_json
from backpack_lib.loading import fingerprint
from backpack_lib.model.kinds import has_senses
from backpack_lib.studies.own_texts import written_by_each

AS_IT_IS, SENSES, ALL, LORA = "as it is", "senses", "all weights", "LoRA"
SETTINGS = {  # tried for each method
    SENSES: ({"chosen": 3}, {"chosen": 8}, {"chosen": 8, "background_weight": 10.0}),
    ALL: ({"learning_rate": 3e-5}, {"learning_rate": 1e-4}),
    LORA: ({"learning_rate": 3e-4, "lora": True}, {"learning_rate": 1e-3, "lora": True}),
}
KEYS = ["set", "model", "method", "bound"]
ABOUT_TOKENS = 24


def check_methods(methods):
    """Raises ValueError if there is none, or one that is unknown."""
    if not methods:
        raise ValueError(f"methods=[] holds no method to teach with; choose from {', '.join(SETTINGS)}.")
    if unknown := [method for method in methods if method not in SETTINGS]:
        raise ValueError(f"The method {unknown[0]!r} is unknown; choose from {', '.join(SETTINGS)}.")
    if LORA in methods and find_spec("peft") is None:
        raise ValueError(
            "LoRA needs the library peft, which is not installed; install the extra `lora`, or leave it out."
        )


@dataclass
class TeachingStudy:
    """What is taught, and how. models: "Backpack" and, if there is one, "Transformer", by name.

    sets: a table like `data/canonical.csv`. general: texts on anything. bounds: the loss on them rises by a share of at
    most each. methods: some of "senses" (of a Backpack), "all weights" and "LoRA" (needs the extra `lora`).
    """

    models: dict
    tokenizer: object
    sets: pd.DataFrame
    general: list[str]
    folder: Path
    methods: tuple[str, ...] = (SENSES,)
    bounds: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    sampling: dict | None = None
    seed: int = 0

    def __post_init__(self):
        check_methods(self.methods)
        rows = rows_of_texts(next(iter(self.models.values())), self.tokenizer, self.general)
        self.bounding, self.held_out = rows[::2], rows[1::2] or rows
        self.prints = {name: fingerprint(net) for name, net in self.models.items()}

    def examples(self, name: str) -> tuple[Examples, Examples, Examples]:
        """Those of a set to fit, to choose with, and to test on. Raises ValueError if there are too few."""
        table = self.sets[self.sets["set"] == name]
        fit, test = (make_examples(self.tokenizer, table, use) for use in ("fit", "test"))
        order = np.random.default_rng(self.seed).permutation(len(fit))
        cut = max(1, len(fit) // 4)
        if cut == len(fit):
            raise ValueError(f"The set {name!r} has one example to learn from that this vocabulary can say; give two.")
        return fit.part(sorted(order[cut:])), fit.part(sorted(order[:cut])), test

    def run(self) -> pd.DataFrame:
        """-> a row a set, model, method, bound and held-out example: success, and of the edit as a whole its setting,
        and the rise of the loss, in %, on other general text and on texts with the words of the set.
        """
        rows = []
        for name in dict.fromkeys(self.sets["set"]):
            for model, net in self.models.items():
                plain = {"bound": 0.0, "setting": "", "success": self._plain(name, model), "general": 0.0, "with": 0.0}
                rows.append(self._table(name, model, AS_IT_IS, plain))
                for method in tqdm(self.methods, desc=f"{name}, {model}", leave=False):
                    if method == SENSES and not has_senses(net):
                        continue
                    rows += [self._table(name, model, method, one) for one in self._taught(name, model, method)]
        return pd.concat(rows, ignore_index=True)

    def _table(self, name: str, model: str, method: str, found: dict) -> pd.DataFrame:
        table = pd.DataFrame({"success": found["success"]}).rename_axis("example").reset_index()
        told = {"set": name, "model": model, "method": method, "bound": found["bound"], "setting": found["setting"]}
        costs = {"general text, %": found["general"], "texts with the words, %": found["with"]}
        return table.assign(**told, **costs)[[*KEYS, "example", "success", "setting", *costs]]

    def _plain(self, name: str, model: str) -> list[bool]:
        return self.examples(name)[2].solved_by(self.models[model], self.tokenizer).tolist()

    def _taught(self, name: str, model: str, method: str) -> list[dict]:
        what = {
            "models": self.prints, "model": model, "method": method, "settings": SETTINGS[method],
            "bounds": self.bounds, "set": self.sets[self.sets["set"] == name].to_csv(), "general": self.general,
            "sampling": self.sampling, "seed": self.seed,
        }  # fmt: skip
        return cached_json(Path(self.folder) / "taught", what, lambda: self._teach(name, model, method))

    def _teach(self, name: str, model: str, method: str) -> list[dict]:
        net, (fit, choose, test) = self.models[model], self.examples(name)
        texts = rows_of_texts(net, self.tokenizer, self._texts_with(name))
        before = [general_loss(net, rows) for rows in (self.held_out, texts)]
        best: dict[float, dict] = {}
        for setting in SETTINGS[method]:
            measured = {}
            share_at, context_of = self._fitted(net, fit, method, setting)
            for bound in self.bounds:
                share = share_at(bound)
                if share not in measured:  # where a wider bound allows no more, nothing changes
                    with context_of(share):
                        after = [general_loss(net, rows) for rows in (self.held_out, texts)]
                        chosen_by, solved = (part.solved_by(net, self.tokenizer) for part in (choose, test))
                    rises = dict(zip(("general", "with"), (100 * (a / b - 1) for a, b in zip(after, before))))
                    measured[share] = {"chosen by": float(chosen_by.mean()), "success": solved.tolist()} | rises
                if bound not in best or measured[share]["chosen by"] > best[bound]["chosen by"]:
                    best[bound] = {"bound": bound, "setting": str(setting)} | measured[share]
        return list(best.values())

    def _fitted(self, net, fit: Examples, method: str, setting: dict) -> tuple[Callable, Callable]:
        """One fit: the share of it that a bound allows, and a context in which the model has a share of it."""
        if method == SENSES:
            taught = SenseTeaching(net, self.tokenizer, fit, self.bounding, **setting)
            return taught.bounded_share, lambda share: taught.edits(share=share).applied()
        change = finetune(net, self.tokenizer, fit, self.bounding, seed=self.seed, **setting)
        return (
            lambda bound: bounded_share(net, change, self.bounding, bound),
            lambda share: changed(net, change, share),
        )

    def _texts_with(self, name: str) -> list[str]:
        """Texts with the words of a set in which something else is said."""
        table = self.sets[(self.sets["set"] == name) & (self.sets["use"] == "about")]
        prompts = list(table["prompt"]) or [""]
        of = (self.models, self.prints, self.tokenizer, prompts, ABOUT_TOKENS)
        return written_by_each(*of, self.folder, self.sampling, self.seed)


# ---------------------------------------------------------------- what the rows show


def success_table(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """The share of held-out examples solved (95 % interval), and its cost: a row a set, model, method and bound."""
    found = {}
    for key, some in rows.groupby(KEYS, sort=False):
        mean, low, high = mean_interval(some["success"].to_numpy(dtype=float), seed)
        costs = some[["general text, %", "texts with the words, %"]].iloc[0].to_dict()
        found[key] = {"success": mean, "low": low, "high": high, "examples": len(some)} | costs
    return pd.DataFrame(found).T.rename_axis(KEYS)


def paired(
    rows: pd.DataFrame, name: str, bound: float, one: tuple[str, str], other: tuple[str, str], seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """How much more of a set one (model, method) solves than another at a bound: difference, low, high (95 %)."""
    some = rows[(rows["set"] == name) & (rows["bound"] == bound)]
    some = some.set_index(["model", "method", "example"])["success"].sort_index()
    difference = some.loc[one].astype(float) - some.loc[other].astype(float)
    mean, low, high = mean_interval(difference.to_numpy(), seed)
    return {"difference": mean, "low": low, "high": high}
