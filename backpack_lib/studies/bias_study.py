"""What takes a model's bias away, and what it costs: every method on the same professions and templates.

    study = BiasStudy(backpack, transformer, tokenizer, professions, fit, test, folder="runs/bias")
    rows = study.run()                    # a row for each method, profession and held-out template; resumes
    table = methods_table(rows)           # a row a method, with intervals
    compare(rows, ("Backpack", "removed"), ("Backpack", "all senses removed"))   # paired

Everything that is searched or fitted sees the fitting templates; everything in the rows is of the others.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from backpack_lib.analysis import bias
from backpack_lib.analysis.bias import PAIR, Localization, debias, excess_removed, fit_scales, ratio, split_odds
from backpack_lib.analysis.scores import next_log_probabilities
from backpack_lib.analysis.statistics import bootstrap_intervals
from backpack_lib.files import cached_json
from backpack_lib.loading import fingerprint

BACKPACK, TRANSFORMER, AS_IT_IS, OFFSET = "Backpack", "Transformer", "as it is", "constant offset"
RANDOM_DRAWS, FOLDS = 20, 5
AT_RANDOM = "senses at random"
KEYS = ["model", "method"]


@dataclass
class BiasStudy:
    """What is compared, and on what.

    found: from `bias.localize` on the fitting templates; wanted: the share of the differences that it was asked for.
    bounds: how far fitted scales may go, beside 0 to 1.
    """

    backpack: object
    transformer: object | None
    tokenizer: object
    professions: list[str]
    fit: list[str]
    test: list[str]
    found: Localization
    folder: Path
    pair: tuple[str, str] = PAIR
    bounds: tuple[float, float] = (-1.0, 3.0)
    wanted: float = 0.9
    seed: int = 0

    def __post_init__(self):
        bias.check_split(self.fit, self.test)
        self.tokens = bias.tokens_of_pair(self.tokenizer, self.pair)
        self.fitting, self.testing = (
            split_odds(self.backpack, self.tokenizer, self.professions, templates, self.pair)
            for templates in (self.fit, self.test)
        )
        self.senses = self.found.senses
        self.prints = {BACKPACK: fingerprint(self.backpack)}
        if self.transformer is not None:
            self.prints[TRANSFORMER] = fingerprint(self.transformer)

    # ------------------------------------------------------------ methods

    def edits_of_backpack(self) -> dict[str, Callable]:
        """Each edit of the Backpack by name, as a context in which it is applied."""
        fitted = {"fitted, 0 to 1": (0.0, 1.0), "fitted, wide": tuple(self.bounds)}
        scales = {"removed": 0.0} | {
            name: fit_scales(self.backpack, self.tokenizer, self.professions, self.fit, self.senses, self.pair, bounds)
            for name, bounds in fitted.items()
        }
        made = {name: self._scaled(self.senses, scale) for name, scale in scales.items()}
        made |= {f"{name}, along": self._scaled(self.senses, scale, self.pair) for name, scale in scales.items()}
        levelled = bias.mean_ablate(self.backpack, self.tokenizer, self.professions, self.senses)
        made["levelled"] = levelled.applied
        made["best 3 by search"] = self._scaled(self.best_subset(3), 0.0)
        made["all senses removed"] = self._scaled(range(self.fitting.own.shape[2]), 0.0)
        return made

    def edits_of_transformer(self) -> dict[str, Callable]:
        """The nullspace projection of the professions' input embeddings, whole and fitted."""
        fitted = {"nullspace, fitted, 0 to 1": (0.0, 1.0), "nullspace, fitted, wide": tuple(self.bounds)}
        scales = {"nullspace": 0.0} | {name: self._fitted_nullspace(bounds) for name, bounds in fitted.items()}
        return {
            name: lambda scale=scale: bias.nullspace(
                self.transformer, self.tokenizer, self.professions, scale, self.pair
            )
            for name, scale in scales.items()
        }

    def _fitted_nullspace(self, bounds) -> pd.Series:
        """The scale of each profession; kept, since each one tried takes a run of all prompts."""
        what = {
            "model": self.prints[TRANSFORMER], "professions": self.professions, "fit": self.fit,
            "pair": list(self.pair), "bounds": list(bounds),
        }  # fmt: skip

        def make():
            of = (self.transformer, self.tokenizer, self.professions, self.fit)
            return fit_scales(*of, pair=self.pair, bounds=bounds).to_dict()

        return pd.Series(cached_json(Path(self.folder) / "scales", what, make))

    def best_subset(self, size: int) -> list[int]:
        """The senses whose removal leaves the least ratio on the fitting templates, of all sets of this size."""
        k = self.fitting.own.shape[2]
        return list(min(combinations(range(k), min(size, k)), key=lambda s: ratio(self.fitting.scaled(list(s), 0.0))))

    def _scaled(self, senses, scale, along=None) -> Callable:
        edits = debias(self.backpack, self.tokenizer, self.professions, list(senses), scale, along)
        return edits.applied

    # ------------------------------------------------------------ measuring

    def run(self) -> pd.DataFrame:
        """-> a row for each method, profession and held-out template.

        Columns: model, method, profession, template; log-odds; and other words, how far all other probabilities moved
        (KL, nats; none for methods that are no edit).
        """
        plans = [(BACKPACK, self.backpack, self.edits_of_backpack)]
        if self.transformer is not None:
            plans.insert(0, (TRANSFORMER, self.transformer, self.edits_of_transformer))
        rows = []
        for name, net, edits_of in plans:
            edits = {AS_IT_IS: nullcontext} | edits_of()
            before = self._log_probs(net)
            for method, context in tqdm(edits.items(), desc=name, leave=False):
                rows.append(self._measured(name, net, method, context, before))
            plain, fitting = rows[-len(edits)], self._fitting_odds(name, net)
            rows.append(
                plain.assign(method=OFFSET, **{"log-odds": plain["log-odds"] - fitting.mean(), "other words": np.nan})
            )
        return pd.concat([*rows, *self._random_rows()], ignore_index=True)

    def _measured(self, name, net, method, context, before) -> pd.DataFrame:
        what = {
            "model": self.prints[name], "method": method, "professions": self.professions, "fit": self.fit,
            "test": self.test, "pair": list(self.pair), "bounds": list(self.bounds),
            "senses": list(map(int, self.senses)),
        }  # fmt: skip

        def make():
            with context():
                after = self._log_probs(net)
            odds = (after[:, self.tokens[0]] - after[:, self.tokens[1]]).cpu().double()
            moved = bias.kl_of_other_words_each(before, after, list(self.tokens)).cpu().double()
            return {"log-odds": odds.tolist(), "other words": moved.tolist()}

        return self._table(name, method, cached_json(Path(self.folder) / "methods", what, make))

    def _log_probs(self, net) -> torch.Tensor:
        return next_log_probabilities(net, self.tokenizer, bias.fill(self.tokenizer, self.professions, self.test))

    def _fitting_odds(self, name, net) -> np.ndarray:
        if name == BACKPACK:
            return self.fitting.odds
        return bias.log_odds(net, self.tokenizer, self.professions, self.fit, self.pair).to_numpy()

    def _random_rows(self) -> list[pd.DataFrame]:
        """As many senses as were found, at random: known from the split, without running the model."""
        rng, k, rows = np.random.default_rng(self.seed), self.testing.own.shape[2], []
        for draw in range(RANDOM_DRAWS):
            senses = rng.choice(k, len(self.senses), replace=False).tolist()
            values = {"log-odds": self.testing.scaled(senses, 0.0).flatten(), "other words": np.nan}
            rows.append(self._table(BACKPACK, f"{len(senses)} {AT_RANDOM}, {draw}", values))
        return rows

    def _table(self, name, method, values) -> pd.DataFrame:
        index = pd.MultiIndex.from_product([self.professions, self.test], names=["profession", "template"])
        table = pd.DataFrame(values, index=index).reset_index()
        return table.assign(model=name, method=method)[[*KEYS, "profession", "template", "log-odds", "other words"]]

    def held_out_professions(self) -> pd.DataFrame:
        """Senses chosen on some professions and removed from others, on held-out templates; the effect is known.

        -> a row for each profession and template: senses, before and after.
        """
        order = np.random.default_rng(self.seed).permutation(len(self.professions))
        rows = []
        for fold in np.array_split(order, min(FOLDS, len(order))):
            rest = np.setdiff1d(order, fold)
            share = bias.shares(self.fitting.odds[rest], self.fitting.own[rest])
            senses = bias.fewest(share, self.wanted)
            after = self.testing.scaled(senses, 0.0)
            for p in fold:
                rows += [
                    (self.professions[p], template, str(sorted(map(int, senses))), self.testing.odds[p, t], after[p, t])
                    for t, template in enumerate(self.test)
                ]
        return pd.DataFrame(rows, columns=["profession", "template", "senses", "before", "after"])


# ---------------------------------------------------------------- what the rows show


def odds_of(rows: pd.DataFrame, model: str, method: str) -> np.ndarray:
    """The log-odds of a method, professions x templates, (P, T)."""
    found = rows[(rows["model"] == model) & (rows["method"] == method)]
    return found.pivot(index="profession", columns="template", values="log-odds").to_numpy()


def methods_table(rows: pd.DataFrame, seed: int = 0, resamples: int = 1000) -> pd.DataFrame:
    """A row a method: ratio and excess removed with 95 % intervals, from professions and templates drawn together;
    spread, the standard deviation between professions; and other words, in millinats. Draws of random senses are one
    row, their mean.
    """
    found = {}
    for model, method in rows[KEYS].drop_duplicates().itertuples(index=False):
        y, y0 = odds_of(rows, model, method), odds_of(rows, model, AS_IT_IS)
        moved = rows.loc[(rows["model"] == model) & (rows["method"] == method), "other words"].mean()
        row = {
            "ratio": ratio(y),
            "excess removed": excess_removed(y0, y),
            "spread": y.mean(1).std(),
            "other words": 1000 * moved,
        }
        if AT_RANDOM not in method:
            row["low"], row["high"] = bootstrap_intervals(ratio, y, seed=seed, resamples=resamples)
            taken = bootstrap_intervals(excess_removed, y0, y, seed=seed, resamples=resamples)
            row["removed low"], row["removed high"] = taken
        found.setdefault(
            (model, method.split(f"{AT_RANDOM},")[0] + AT_RANDOM if AT_RANDOM in method else method), []
        ).append(row)
    return pd.DataFrame({key: pd.DataFrame(some).mean() for key, some in found.items()}).T.rename_axis(KEYS)


def compare(
    rows: pd.DataFrame, one: tuple[str, str], other: tuple[str, str], seed: int = 0, resamples: int = 2000
) -> dict[str, float]:
    """How much more of the excess one method removes than another, on the same drawn professions and templates.

    -> difference, low, high (95 %). Each method is held to its own model as it is.
    """
    arrays = [odds_of(rows, *of) for of in ((one[0], AS_IT_IS), one, (other[0], AS_IT_IS), other)]

    def difference(a0, a, b0, b):
        return excess_removed(a0, a) - excess_removed(b0, b)

    low, high = bootstrap_intervals(difference, *arrays, seed=seed, resamples=resamples)
    return {"difference": difference(*arrays), "low": float(low), "high": float(high)}


def change_of(
    before: np.ndarray, after: np.ndarray, statistic=ratio, seed: int = 0, resamples: int = 2000
) -> dict[str, float]:
    """A statistic before and after an edit, (P, T) each, and the paired difference with its 95 % interval."""
    low, high = bootstrap_intervals(
        lambda b, a: statistic(a) - statistic(b), before, after, seed=seed, resamples=resamples
    )
    found = {"before": statistic(before), "after": statistic(after)}
    return found | {"difference": found["after"] - found["before"], "low": float(low), "high": float(high)}
