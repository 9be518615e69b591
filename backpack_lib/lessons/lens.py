"""What 07_lens alone needs: which lens and which texts, and the checks of its exercises."""

import json
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from backpack_lib.analysis.disambiguation import english_ambiguities
from backpack_lib.display import tables
from backpack_lib.files import data_folder, first_line
from backpack_lib.lessons.exercises import check_function, check_number, random_cases
from backpack_lib.lessons.opening import Lesson, open_lesson
from backpack_lib.loading import SMOLLM2, SMOLLM2_ON_HUB, load, unpack_smollm2
from backpack_lib.model.lens import SenseLens
from backpack_lib.text.corpora import first_characters, open_corpus

CHARACTERS = 6_000  # of a reference text that are read
RUNGS = {"own senses alone": "own senses", "shuffled senses": "dealt senses", "senses": "senses", "base": "Transformer"}


def available(name: str) -> str:
    """The name of a lens, or of the demo's where its Transformer cannot be had; says so."""
    if name == "smollm2-lens" and unpack_smollm2() == SMOLLM2_ON_HUB:
        try:
            load(SMOLLM2)
        except (OSError, ValueError) as error:
            print(f"{first_line(error)} So this page shows the lens on the demo's Transformer (demo-lens).")
            return "demo-lens"
    return name


def open_lens(model: str, out: str = "", device: str = "cpu", **given) -> tuple[Lesson, str]:
    """The lesson of an available lens, and the lens' name. Raises ValueError for a model that is no lens."""
    name = available(model)
    lesson = open_lesson("07_lens", name, out, device, **given)
    if not isinstance(lesson.model, SenseLens):
        raise ValueError(
            f"This page takes a sense lens, and {model!r} is a {type(lesson.model).__name__}; see its last section."
        )
    return lesson, name


def read_texts(reference: str) -> list[str]:
    """The passages written for this page, or the beginning of text of one's own."""
    source = reference or str(data_folder() / "lens" / "passages.txt")
    return list(first_characters(open_corpus(source).read(), CHARACTERS))


def stored_ladder(model: str):
    """What `make lens` measured of a shipped lens on 8,192 tokens of held-out text; a sentence for other lenses."""
    file = data_folder() / "lens" / model.removesuffix("-lens") / "evaluation.json"
    if not file.is_file():
        return "There are no stored figures of this lens."
    table = pd.DataFrame(json.loads(file.read_text(encoding="utf-8"))["T=256"])[list(RUNGS)].rename(columns=RUNGS).T
    table.columns = [column.replace("_", " ") for column in table.columns]
    return tables.shaded(table, 3, "stored: 8,192 tokens of held-out text, 256 at a time", shade=[])


def stored(model: str, name: str) -> pd.DataFrame | None:
    """What was measured once of a shipped model by `make lens-tables` or `make wsd`; None of others."""
    file = data_folder() / "lens" / f"{name}-{model}.csv.gz"
    return pd.read_csv(file, index_col=0) if file.is_file() else None


def sentences_and_glosses(glosses: dict[str, dict[str, str]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The texts of `data/ambiguous.yaml` as questions, and the meanings to choose among, as `wsd.read_tables` has them.

    glosses: of each word, for each of its meanings. A text ends in its word.
    """
    questions, meanings = [], []
    for ambiguity in english_ambiguities():
        word = {"lemma": ambiguity.word, "pos": ""}
        for meaning, texts in ambiguity.texts.items():
            meanings.append(word | {"key": meaning, "gloss": glosses[ambiguity.word][meaning]})
            for text in texts:
                questions.append(word | {"id": text, "place": len(text.split()) - 1, "gold": meaning, "words": text})
    return pd.DataFrame(questions), pd.DataFrame(meanings)


# ---------------------------------------------------------------- exercises


def check_edited_state(answer) -> str:
    """answer: (h (T, d), alpha (k, T, T), C (k, T, d), new (k, T, d)) -> the state under the edit."""
    cases = random_cases("Td kTT kTd kTd", k=(2, 3), T=(3, 5), d=(4, 8))
    return check_function(answer, lambda h, alpha, C, new: h + (alpha @ (new - C)).sum(0), cases)


def check_held_out_auc(answer, auc: Callable) -> str:
    """answer: pushed (k, n, n) -> the AUC, on the second half of the pairs, of the best sense of the first."""

    def reference(pushed):
        half = pushed.shape[1] // 2
        best = auc(pushed[:, :half, :half], np.arange(half)).argmax()
        rest = pushed[:, half:, half:]
        return float(auc(rest, np.arange(rest.shape[1]))[best])

    rng = np.random.default_rng(0)
    return check_function(answer, reference, [(rng.normal(size=(k, n, n)),) for k, n in ((4, 10), (16, 21))])


def check_without_the_largest(answer, contributions: torch.Tensor) -> str:
    """The log-odds without the largest contribution of a token."""
    of_tokens = contributions[:-1]
    largest = of_tokens.flatten()[of_tokens.abs().argmax()]
    hints = [((contributions.sum() + largest).item(), "it is taken away, so it has to be subtracted.")]
    return check_number(answer, (contributions.sum() - largest).item(), hints)


def check_ties(answer) -> str:
    """answer: (scores (m,), right (m,)) -> the chance to be right if one of the highest is chosen at random."""
    cases = [
        ([1.0, 1.0, 0.5], [True, False, False]),
        ([0.2, 0.7, 0.7, 0.7], [True, False, True, True]),
        ([3.0], [True]),
    ]
    cases = [(np.array(scores), np.array(right)) for scores, right in cases]
    return check_function(answer, lambda scores, right: float(right[scores == scores.max()].mean()), cases)
