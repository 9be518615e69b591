"""What 02_senses alone needs: what is stored of the demo model, texts to measure others on, and checks of exercises."""

import json
from itertools import islice

import pandas as pd
import torch

from backpack_lib.analysis.edits import SenseEdits
from backpack_lib.analysis.roles import PEOPLE
from backpack_lib.files import data_folder
from backpack_lib.lessons.bias import known_of_professions
from backpack_lib.lessons.exercises import check_function, check_number, check_strongest_push, random_cases  # noqa: F401
from backpack_lib.lessons.opening import PLANTED, Lesson
from backpack_lib.text import planted


def people(kind: str) -> list[str]:
    """Words for persons: professions, and of English some others."""
    return [*known_of_professions(kind)[1], *([] if kind == PLANTED else PEOPLE)]


def texts_for_roles(lesson: Lesson, corpus: str, seed: int) -> list[str]:
    """The first texts of a corpus; without one, planted texts, or texts that the model writes itself."""
    texts, _ = lesson.texts(corpus, planted.generate(2000, seed), [""] * 64, 160, seed)
    return list(islice(texts, 500 if corpus else None))


# ---------------------------------------------------------------- what `make evaluate` measured


def stored_roles(lesson: Lesson) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Of the demo model, as `roles.evidence` returns it."""
    stored = _evaluation()["models"]["demo"]
    lesson.check_stored([stored["weights"]], "make evaluate")
    auc, untrained = (pd.DataFrame(stored["roles"][name]).rename_axis("sense") for name in ("auc", "auc_untrained"))
    return auc, untrained, pd.DataFrame(stored["roles"]["consistency"]).T.dropna()


def stored_similarity() -> tuple[dict[str, pd.DataFrame], pd.DataFrame, pd.DataFrame]:
    """Held-out rho of each method, rho of each similarity of the demo Backpack, and paired differences."""
    stored = _evaluation()
    demo, transformer = stored["models"]["demo"], stored["models"]["demo-transformer"]
    methods = {"Backpack": demo, "Transformer": transformer, "word2vec": stored["word2vec"]}
    held_out = {name: pd.DataFrame(part["similarity_held_out"]).T.infer_objects() for name, part in methods.items()}
    differences = pd.DataFrame(stored["similarity_differences"]).set_index(["other", "set"])
    return held_out, pd.DataFrame(demo["similarity"]), differences


def _evaluation() -> dict:
    return json.loads((data_folder() / "demo" / "evaluation.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- exercises


def check_own_effect(answer) -> str:
    """From weights in two meanings, (n, k), (m, k), and leans, (k,): what the change of weights contributes."""
    cases = random_cases("nk mk k", n=(2, 5), m=(3, 5), k=(4, 1))
    return check_function(answer, lambda first, second, lean: (first.mean(0) - second.mean(0)) @ lean, cases)


def check_against(answer, contributions: torch.Tensor) -> str:
    """The sum of all that speaks against a word."""
    hints = [(contributions.min().item(), "that is the strongest pair alone; add up all that are below zero.")]
    return check_number(answer, contributions[contributions < 0].sum().item(), hints)


def check_even(answer, total: float, contribution: float) -> str:
    """By what a sense must be scaled so that two words are equally likely."""
    hints = [(-total / contribution, "that is by how much the scale changes; it is 1 before.")]
    return check_number(answer, 1 - total / contribution, hints)


def check_projection(answer, lesson: Lesson, word: int, other: int) -> str:
    """An edit after which no sense of a word pushes another one, and no more is changed than must be."""
    if not isinstance(answer, SenseEdits):
        return "Not yet: give a SenseEdits."
    model, E = lesson.model, lesson.embeddings
    both = torch.tensor([word, other], device=E.device)
    old, others = model.sense_vectors(both).detach()
    with answer.applied():
        new, others_now = model.sense_vectors(both).detach()
    left, moved, enough = (new @ E[other]).abs().max(), (new - old).norm(), (old @ E[other]).norm() / E[other].norm()
    if left > 1e-3:
        return f"Not yet: some sense still pushes the other word by {left:.3f}."
    if moved > 1.01 * enough or not torch.equal(others, others_now):
        return f"Not yet: more changes than must; the word's senses move by {moved:.2f}, and {enough:.2f} is enough."
    return f"Right: no sense pushes it any more, and they moved by {moved:.2f} only."


def check_luck(answer) -> str:
    """The expected largest of 20 correlations of 65 pairs that are luck."""
    typical, made = 1 / 64**0.5, torch.Generator().manual_seed(0)
    largest = typical * torch.randn(20_000, 20, generator=made).amax(1).mean().item()
    hints = [(0.0, "each is 0 on average, but the largest of them is not."), (typical, "that is a typical one.")]
    return check_number(answer, largest, hints, tolerance=0.02)
