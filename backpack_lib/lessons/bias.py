"""What 04_gender_bias alone needs: professions, templates and texts that suit a model, and checks of its exercises."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from backpack_lib.analysis import bias
from backpack_lib.analysis.bias import PAIR, debias, log_odds
from backpack_lib.analysis.edits import SenseEdits
from backpack_lib.files import data_folder
from backpack_lib.lessons.exercises import check_function, check_number
from backpack_lib.lessons.opening import PLANTED, Lesson, read_json
from backpack_lib.text import planted
from backpack_lib.text.corpora import first_characters
from backpack_lib.text.words import spell, tokens_of_word

CHARACTERS = 400_000  # of a corpus, for the loss
WRITTEN = 40  # tokens of a text that the model writes


@dataclass
class Material:
    """Professions, templates, and what is known of the professions."""

    professions: list[str]
    fit: list[str]  # templates
    test: list[str]
    by_definition: dict[str, list[str]]  # for each pronoun, prompts in which it is the right one
    other_pairs: list[dict]  # pairs of words, and prompts for them
    truth: pd.Series  # of each profession, NaN where nothing is known
    what_is_true: str

    def __str__(self) -> str:
        counts = len(self.professions), len(self.fit), len(self.test)
        return "{} professions, {} templates for fitting, {} for testing".format(*counts)


def open_material(
    lesson: Lesson, professions: list[str] = (), prompts: str = "", whole_words: bool = False, pair=PAIR
) -> Material:
    """What a notebook's parameters ask for. Professions that share a token with another word are left out, and said."""
    entry, tokenizer = read_prompts(prompts, lesson.kind), lesson.tokenizer
    templates = entry["fit"] + entry["test"]
    what_is_true, truth = known_of_professions(lesson.kind)
    names = list(professions) or list(truth)
    several = {name: parts for name in names if len(parts := spell(tokenizer, tokens_of_word(tokenizer, name))) > 1}
    if whole_words:
        names = [name for name in names if name not in several]
    bias.fill(tokenizer, names, templates)  # says what is wrong with them
    bias.fill(tokenizer, [lesson.example.profession], templates)
    apart = bias.separable(tokenizer, names, templates)
    if left_out := [name for name in names if name not in apart]:
        print("left out, since they share a token with another word here:", ", ".join(left_out))
    for name in apart:
        if name in several:
            parts = " · ".join(several[name])
            print(f"“{name}” is {len(several[name])} tokens ({parts}): an edit touches them in other words, too")
    is_known = list(pair) == list(PAIR)
    return Material(
        professions=apart,
        fit=entry["fit"],
        test=entry["test"],
        by_definition={word: entry.get("by definition", {}).get(word, []) for word in PAIR},
        other_pairs=entry.get("other pairs", []),
        truth=pd.Series({name: truth.get(name, np.nan) if is_known else np.nan for name in apart}),
        what_is_true=what_is_true,
    )


def read_prompts(prompts: str, kind: str) -> dict:
    """The entry for a kind of model, "english" or "planted", of a file of templates; "" for the suite's own."""
    entries = read_json(prompts, "prompts.json")
    if not isinstance(entries, dict) or not isinstance(entries.get(kind), dict):
        raise ValueError(f"The file of templates {prompts!r} needs an entry {kind!r}, as data/prompts.json has it.")
    for name in ("fit", "test"):
        templates = entries[kind].get(name)
        if not isinstance(templates, list) or not all(isinstance(template, str) for template in templates):
            raise ValueError(f"In the file of templates {prompts!r}, {name!r} of {kind!r} should be a list of texts.")
    bias.check_split(entries[kind]["fit"], entries[kind]["test"])
    return entries[kind]


def known_of_professions(kind: str) -> tuple[str, dict[str, float]]:
    """What is known of professions for a kind of model, and its value for each of them."""
    if kind == PLANTED:
        return "probability of “he” in the planted text", planted.lexicon()["professions"]
    women = pd.read_csv(data_folder() / "professions.csv", index_col=0)["percent_women"]
    return "share of men in the job", (1 - women / 100).to_dict()


def rank_correlation(odds: np.ndarray, truth: np.ndarray) -> float:
    """Spearman's rho over professions of mean log-odds and what is true of them, both (P, T); NaN without a truth."""
    lean, known = odds.mean(1), truth[:, 0]
    if np.isnan(known).any() or np.ptp(lean) == 0 or np.ptp(known) == 0:
        return np.nan
    return spearmanr(lean, known).statistic


def texts_for_the_loss(lesson: Lesson, material: Material, reference: str, seed: int) -> tuple[list[str], str]:
    """Texts to measure the loss on, and what they are; those that the model writes are about professions."""
    generated, beginnings = planted.generate(400, seed + 1000), [f"The {name}" for name in material.professions]
    texts, source = lesson.texts(reference, generated, beginnings, WRITTEN, seed)
    return list(first_characters(texts, CHARACTERS)), source


# ---------------------------------------------------------------- exercises


def check_halved(answer, lesson: Lesson, template: str, pair, senses: list[int]) -> str:
    """The log-odds of the example in a template when the senses found are halved: tried on the model."""
    names = [lesson.example.profession]
    with debias(lesson.model, lesson.tokenizer, names, senses, 0.5).applied():
        truth = log_odds(lesson.model, lesson.tokenizer, names, [template], pair).iloc[0, 0]
    with debias(lesson.model, lesson.tokenizer, names, senses, 0.0).applied():
        removed = log_odds(lesson.model, lesson.tokenizer, names, [template], pair).iloc[0, 0]
    return check_number(answer, truth, [(removed, "that is with the senses removed.")], tolerance=2e-3)


def check_share(answer) -> str:
    """answer: (contributions (P,), log-odds (P,)) -> the share of the differences."""
    rng = np.random.default_rng(0)
    cases = [rng.normal(size=(2, n)) for n in (5, 12, 40)]
    return check_function(answer, lambda c, y: float(np.cov(c, y)[0, 1] / y.var(ddof=1)), cases)


def check_permutation(answer) -> str:
    """answer: (found, null (m,)) -> p."""
    rng = np.random.default_rng(0)
    cases = [(float(found), rng.normal(size=200)) for found in (0.0, 1.5, 9.0)]
    return check_function(answer, lambda found, null: bias.p_value(null, found), cases, tolerance=1e-3)


def check_paired(answer) -> str:
    """answer: (one (n,), other (n,), rows (m, n)) -> low and high of the mean difference over resampled rows."""

    def reference(one, other, rows):
        return torch.tensor(np.quantile((one - other)[rows].mean(1), [0.025, 0.975]))

    def as_tensor(*case):
        return torch.as_tensor(np.array(answer(*case), dtype=float))

    rng = np.random.default_rng(0)
    cases = []
    for n in (8, 40):
        one = rng.normal(size=n)
        cases.append((one, one - 0.3 + 0.1 * rng.normal(size=n), rng.integers(n, size=(400, n))))
    return check_function(as_tensor if callable(answer) else None, reference, cases, tolerance=1e-3)


def check_subset(answer, held_out: bias.Split) -> str:
    """A list of senses whose removal leaves less ratio on the held-out templates than removing all of them."""
    k = held_out.own.shape[2]
    if not isinstance(answer, list) or not all(sense in range(k) for sense in answer):
        return f"Not yet: give a list of senses between 0 and {k - 1}."
    mine, of_all = (bias.ratio(held_out.scaled(senses, 0.0)) for senses in (answer, list(range(k))))
    if mine >= of_all:
        return f"Not yet: removing these leaves a ratio of {mine:.2f}, removing all {of_all:.2f}."
    return (
        f"Right: {mine:.2f}, and {of_all:.2f} when all are removed: "
        "what a sense adds may balance the rest of the sentence."
    )


def check_zero(answer, lesson: Lesson, material: Material, template: str, pair) -> str:
    """An edit that brings the first profession's log-odds in a template to zero and touches no other."""
    if not isinstance(answer, SenseEdits) or not len(answer):
        return "Not yet: give SenseEdits with at least one edit."
    names = material.professions
    before = log_odds(lesson.model, lesson.tokenizer, names, [template], pair)[template]
    with answer.applied():
        after = log_odds(lesson.model, lesson.tokenizer, names, [template], pair)[template]
    changed = list(before.index[(before - after).abs() > 1e-6])
    if changed != [names[0]]:
        return f"Not yet: what changes is {changed}, and it should be {names[0]!r} alone."
    if abs(after[names[0]]) > 0.05:
        return f"Not yet: the log-odds of {names[0]!r} are {after[names[0]]:+.2f} now."
    return f"Right: {before[names[0]]:+.2f} before, {after[names[0]]:+.2f} after."
