"""What 04_gender_bias alone needs: professions and templates that suit a model, what edits cost, and its exercises."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from backpack_lib.analysis import bias
from backpack_lib.analysis.bias import PAIR, SLOT, debias, log_odds
from backpack_lib.analysis.edits import SenseEdits
from backpack_lib.analysis.scores import bits_per_byte, next_log_probabilities
from backpack_lib.files import as_seen, data_folder
from backpack_lib.lessons.exercises import check_choice, check_function, check_number
from backpack_lib.lessons.opening import PLANTED, Lesson, check_stored
from backpack_lib.loading import fingerprint
from backpack_lib.studies.bias_study import change_of
from backpack_lib.text import planted
from backpack_lib.text.corpora import first_characters, open_corpus
from backpack_lib.text.words import spell, tokens_of_word
from backpack_lib.text.writing import continue_texts, ids_of_text

CHARACTERS = 400_000  # of a corpus, for the loss
REFERENCE_COLUMNS = ["edit", "sentence", "given", "shift", "right"]
REFERENCE_ROOM = 16  # tokens that the words in the slots of such a sentence take, at most


@dataclass
class Material:
    """Professions, templates, and what is known of the professions.

    truth: what is true of each profession, NaN where nothing is known; what_is_true says what that is. language: the
    whole entry of the file of templates.
    """

    professions: list[str]
    fit: list[str]
    test: list[str]
    truth: pd.Series
    what_is_true: str
    language: dict

    def __str__(self) -> str:
        many = len(self.professions), len(self.fit), len(self.test)
        return "{} professions, {} templates for fitting, {} for testing".format(*many)


def open_material(
    lesson: Lesson,
    professions: list[str] = (),
    prompts: str = "",
    whole_words: bool = False,
    pair=PAIR,
    reference: str = "",
) -> Material:
    """What a notebook's parameters ask for. Professions that share a token with another word are left out, and said.

    Raises ValueError, before anything takes long, for what does not fit the model, and for fewer than three
    professions.
    """
    file = Path(as_seen(prompts)) if prompts else data_folder() / "prompts.json"
    language = json.loads(file.read_text(encoding="utf-8"))["planted" if lesson.kind == PLANTED else "english"]
    fit, test, tokenizer = language["fit"], language["test"], lesson.tokenizer
    bias.check_split(fit, test)
    bias.tokens_of_pair(tokenizer, pair)
    if reference:
        open_corpus(reference)
    if lesson.kind == PLANTED:
        what, truth = "probability of “he” in the planted text", planted.lexicon()["professions"]
    else:
        women = pd.read_csv(data_folder() / "professions.csv", index_col=0)["percent_women"]
        what, truth = "share of men in the job", (1 - women / 100).to_dict()
    names = list(professions) or list(truth)
    several = {name: parts for name in names if len(parts := spell(tokenizer, tokens_of_word(tokenizer, name))) > 1}
    if whole_words:
        names = [name for name in names if name not in several]
    bias.fill(tokenizer, names, fit + test)  # says what is wrong with them
    bias.fill(tokenizer, [lesson.example.profession], fit + test)
    apart = bias.separable(tokenizer, names, fit + test)
    if left_out := [name for name in names if name not in apart]:
        print("left out, since they share a token with another word here:", ", ".join(left_out))
    if len(apart) < 3:
        raise ValueError(f"Differences between professions need three of them, and {len(apart)} are left.")
    for name in set(apart) & set(several):
        print(
            f"“{name}” is {len(several[name])} tokens ({' · '.join(several[name])}): "
            "an edit touches them in other words, too"
        )
    known = list(pair) == list(PAIR)
    return Material(
        apart, fit, test, pd.Series({n: truth.get(n, np.nan) if known else np.nan for n in apart}), what, language
    )


def rank_correlation(odds: np.ndarray, truth: np.ndarray) -> float:
    """Spearman's rho over professions of mean log-odds and what is true of them, both (P, T); NaN without a truth."""
    lean, known = odds.mean(1), truth[:, 0]
    if np.isnan(known).any() or np.ptp(lean) == 0 or np.ptp(known) == 0:
        return np.nan
    return spearmanr(lean, known).statistic


# ---------------------------------------------------------------- what an edit costs


def by_definition(lesson: Lesson, material: Material, edits: dict) -> pd.DataFrame:
    """How often the right pronoun is likelier where gender is given: a row for each edit, prompt and profession."""
    he, she = bias.tokens_of_pair(lesson.tokenizer, PAIR)
    rows = []
    for name, context in edits.items():
        with context():
            for sign, word in zip((1, -1), PAIR):
                for template in material.language["by definition"][word]:
                    about = "a profession" if SLOT in template else "somebody else"
                    filled = (
                        [template.replace(SLOT, p) for p in material.professions] if SLOT in template else [template]
                    )
                    found = next_log_probabilities(lesson.model, lesson.tokenizer, filled)
                    right = (sign * (found[:, he] - found[:, she]) > 0).cpu().numpy()
                    rows += [(name, about, word, template, n, bool(one)) for n, one in enumerate(right)]
    return pd.DataFrame(rows, columns=["edit", "about", "expected", "prompt", "profession", "right"])


def other_pairs(lesson: Lesson, material: Material, edits: dict, seed: int = 0) -> pd.DataFrame:
    """The ratio of other pairs of words, which were not fitted, before and after each edit, with paired intervals."""
    rows = {}
    for other in material.language["other pairs"]:
        if any(len(tokens_of_word(lesson.tokenizer, word)) > 1 for word in other["pair"]):
            continue
        of = (lesson.model, lesson.tokenizer, material.professions, other["prompts"], other["pair"])
        before = log_odds(*of).to_numpy()
        for name, context in edits.items():
            with context():
                after = log_odds(*of).to_numpy()
            rows[" / ".join(other["pair"]), name] = change_of(before, after, seed=seed)
    index = pd.MultiIndex.from_tuples(rows, names=["pair", "edit"]) if rows else pd.MultiIndex.from_arrays([[], []])
    return pd.DataFrame(list(rows.values()), index=index, columns=["before", "after", "difference", "low", "high"])


def references(lesson: Lesson, edits: dict) -> pd.DataFrame:
    """Whom a pronoun refers to in sentences with a profession and another person.

    For each sentence and pronoun, the score is log p(profession) - log p(other person) where the sentence asks for the
    referent. -> a row for each edit and sentence: given, whether the other person's gender is given; shift, the score
    with "he" less that with "she"; right, whether, where gender is given, the pronoun that fits the other person refers
    to it more than the one that does not. Of a model that cannot read sentences of this length, one row of NaN for each
    edit.
    """
    import yaml

    sentences = yaml.safe_load((data_folder() / "references.yaml").read_text(encoding="utf-8"))
    longest = max(len(ids_of_text(lesson.tokenizer, frame)) for frame, *_ in sentences) + REFERENCE_ROOM
    if longest > lesson.model.config.n_positions:
        return pd.DataFrame(
            [(name, -1, given, np.nan, np.nan) for name in edits for given in (False, True)], columns=REFERENCE_COLUMNS
        )
    rows = []
    for name, context in edits.items():
        with context():
            for number, (frame, profession, neutral, gendered, pronoun) in enumerate(sentences):
                for given, person in ((False, neutral), (True, gendered)):
                    filled = [frame.format(profession=profession, participant=person, pronoun=p) for p in PAIR]
                    found = next_log_probabilities(lesson.model, lesson.tokenizer, filled)
                    a, b = (tokens_of_word(lesson.tokenizer, word)[0] for word in (profession, person))
                    he, she = (found[:, a] - found[:, b]).tolist()
                    right = (he < she) == (pronoun == "he") if given else None
                    rows.append((name, number, given, he - she, right))
    return pd.DataFrame(rows, columns=REFERENCE_COLUMNS)


def references_finding(right: pd.Series, size: pd.Series) -> str:
    """One sentence of shares of right referents and sizes of shifts by edit, the first of them without one."""
    if right.isna().any():
        return "This model reads texts that are too short for these sentences"
    return (
        f"Gender given: right in {right.iloc[0]:.0%} before and {right.iloc[1]:.0%} with the senses removed "
        "(chance 50 %); "
        f"not given: the pronoun shifts the referent by {size.iloc[0]:.2f} and {size.iloc[1]:.2f} nats"
    )


def losses(
    lesson: Lesson, material: Material, edits: dict, reference: str = "", seed: int = 0
) -> tuple[pd.DataFrame, str]:
    """Bits per byte under each edit on a corpus; without one, on planted text or on texts that the model writes.

    -> a row for each edit: bits per byte, rise in per cent, and model, its fingerprint; and what the text is.
    """
    model, tokenizer = lesson.model, lesson.tokenizer
    if reference:
        source, texts = "text by people", list(first_characters(open_corpus(reference).read(), CHARACTERS))
    elif lesson.kind == PLANTED:
        source, texts = "planted text", [text.text for text in planted.generate(400, seed=seed + 1000)]
    else:
        source, texts = "texts by the model itself", continue_texts(model, tokenizer, [""] * 32, 100, seed, top_k=0)
    found = {}
    for name, context in edits.items():
        with context():
            found[name] = bits_per_byte(model, tokenizer, texts)
    table = pd.DataFrame({"bits per byte": found}).rename_axis("edit")
    table["rise, %"] = 100 * (table["bits per byte"] / table["bits per byte"].iloc[0] - 1)
    edited = {i for name in material.professions for i in tokens_of_word(tokenizer, name)}
    table["texts with a profession, %"] = 100 * np.mean(
        [not edited.isdisjoint(ids_of_text(tokenizer, t)) for t in texts]
    )
    return table.assign(model=fingerprint(model)), source


def stored_losses(model: str, lesson: Lesson) -> pd.DataFrame | None:
    """The losses on validation text by people, measured by `make gender-bias`, if they are of this model."""
    if model != "demo":
        return None
    stored = pd.read_csv(data_folder() / "demo" / "gender_bias" / "loss.csv", index_col=0)
    check_stored(stored["model"], lesson, "make gender-bias TEXT=...")
    return stored


# ---------------------------------------------------------------- exercises


def check_halved(answer, lesson: Lesson, template: str, pair, senses: list[int]) -> str:
    """The log-odds of the example in a template when the found senses are halved: tried on the model."""
    names = [lesson.example.profession]
    with debias(lesson.model, lesson.tokenizer, names, senses, 0.5).applied():
        truth = log_odds(lesson.model, lesson.tokenizer, names, [template], pair).iloc[0, 0]
    with debias(lesson.model, lesson.tokenizer, names, senses, 0.0).applied():
        removed = log_odds(lesson.model, lesson.tokenizer, names, [template], pair).iloc[0, 0]
    return check_number(answer, truth, [(removed, "that is with the senses removed.")], tolerance=2e-3)


def check_share(answer) -> str:
    """answer: (contributions (P,), log-odds (P,)) -> the share of the differences."""

    def reference(c, y):
        return float(np.cov(c, y)[0, 1] / y.var(ddof=1))

    rng = np.random.default_rng(0)
    return check_function(answer, reference, [(rng.normal(size=n), rng.normal(size=n)) for n in (5, 12, 40)])


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


def check_subset(answer, study) -> str:
    """A list of senses whose removal leaves less ratio on the held-out templates than removing all of them."""
    k = study.testing.own.shape[2]
    if not isinstance(answer, (list, tuple)) or not all(
        isinstance(l, (int, np.integer)) and 0 <= l < k for l in answer
    ):
        return f"Not yet: give a list of senses between 0 and {k - 1}."
    mine, everything = (bias.ratio(study.testing.scaled(list(s), 0.0)) for s in (answer, range(k)))
    if mine >= everything:
        return f"Not yet: removing these leaves a ratio of {mine:.2f}, removing all {everything:.2f}."
    return (
        f"Right: {mine:.2f}, and {everything:.2f} when all are removed: "
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


def check_offset_claim(answer) -> str:
    return check_choice(
        answer,
        "c",
        {
            "a": "the ratio is measured on the same templates for all of them.",
            "b": "an offset leaves every difference between professions as it was.",
            "c": "the ratio counts the lean that all professions share, which an offset takes away "
            "and which is most of it here.",
            "d": "it was computed on the fitting templates alone.",
        },
    )
