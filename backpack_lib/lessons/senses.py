"""What 02_senses alone needs: evidence that is stored for the demo model and measured for others, and its exercises."""

import json
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pandas as pd
import torch

from backpack_lib.analysis import roles, similarity
from backpack_lib.analysis.attribution import read
from backpack_lib.analysis.disambiguation import Ambiguity, english_ambiguities, planted_ambiguities
from backpack_lib.analysis.edits import SenseEdits
from backpack_lib.analysis.senses import vectors_of_tokens
from backpack_lib.files import data_folder
from backpack_lib.lessons.exercises import (
    NO_NUMBER,
    check_choice,
    check_function,
    check_number,
    check_strongest_push,  # noqa: F401, for the notebook
    finite_number,
)
from backpack_lib.lessons.opening import PLANTED, Lesson
from backpack_lib.loading import load, load_baseline
from backpack_lib.text import planted
from backpack_lib.text.corpora import open_corpus
from backpack_lib.text.words import spell_text, tokens_of_word
from backpack_lib.text.writing import continue_texts

DOCUMENTS, PLANTED_TEXTS = 500, 2000  # that roles are measured on
OWN_TEXTS, OWN_LENGTH = 64, 160  # texts that a model writes where no other text is given


# ---------------------------------------------------------------- evidence


def ambiguities(lesson: Lesson) -> list[Ambiguity]:
    """Words that mean two things, and texts in which it is known which."""
    return planted_ambiguities() if lesson.kind == PLANTED else english_ambiguities()


def stored_evaluation(model: str) -> dict | None:
    """What `make evaluate` found of the demo models, if this is one of them."""
    if model != "demo":
        return None
    return json.loads((data_folder() / "demo" / "evaluation.json").read_text(encoding="utf-8"))


def people_of(lesson: Lesson) -> list[str]:
    """Words for persons: professions that suit the model."""
    if lesson.kind == PLANTED:
        return list(planted.lexicon()["professions"])
    return list(pd.read_csv(data_folder() / "professions.csv")["profession"])


def role_evidence(lesson: Lesson, model: str, corpus: str = "", seed: int = 0):
    """`roles.evidence` on a corpus; without one, what is stored (demo), or on planted or the model's own texts."""
    stored = stored_evaluation(model)
    if stored and not corpus:
        found = stored["models"]["demo"]["roles"]
        auc, untrained = (pd.DataFrame(found[name]).rename_axis("sense") for name in ("auc", "auc_untrained"))
        return auc, untrained, pd.DataFrame(found["consistency"]).T.dropna()
    if corpus:
        texts = islice(open_corpus(corpus).read(), DOCUMENTS)
    elif lesson.kind == PLANTED:
        texts = (text.text for text in planted.generate(PLANTED_TEXTS, seed=seed))
    else:
        length = min(OWN_LENGTH, lesson.model.config.n_positions - 1)
        texts = continue_texts(lesson.model, lesson.tokenizer, [""] * OWN_TEXTS, length, seed, top_k=0)
    pairs = roles.relations_of_text(lesson.tokenizer, texts)
    return roles.evidence(lesson.model, lesson.tokenizer, pairs, people_of(lesson), seed)


@torch.no_grad()
def pronoun_spread(lesson: Lesson, pair=("he", "she")) -> np.ndarray:
    """How far each sense's push of one word over the other differs between professions (standard deviation, (k,))."""
    ids = [tokens_of_word(lesson.tokenizer, name)[-1] for name in people_of(lesson)]
    a, b = (tokens_of_word(lesson.tokenizer, word)[0] for word in pair)
    senses = vectors_of_tokens(lesson.model, torch.tensor(ids, device=lesson.model.device))
    return (senses @ (lesson.embeddings[a] - lesson.embeddings[b])).float().std(0).cpu().numpy()


@dataclass
class SimilarityResults:
    """Word similarity: of which model; held-out rho with intervals by method; rho by peeking; paired differences."""

    whose: str
    held_out: dict[str, pd.DataFrame]
    peeked: pd.DataFrame
    differences: pd.DataFrame


def similarity_results(
    lesson: Lesson, model: str, baseline: str = "", lexsim: str = "", seed: int = 0
) -> SimilarityResults:
    """Measured on the sets of a folder or URL. The sets are not part of the project: without them, the demo model's."""
    if not lexsim:
        return _stored_similarity()
    sets = similarity.read_sets(lexsim)
    backpack, tokenizer = lesson.model, lesson.tokenizer
    methods = {
        "Backpack": similarity.of_model(backpack, tokenizer),
        "Backpack's input embedding": similarity.of_input_embeddings(backpack, tokenizer),
    }
    transformer, why_not = load_baseline(model, baseline, backpack.device)
    if transformer is None:
        print(why_not)
    else:
        methods["Transformer"] = similarity.of_model(transformer, tokenizer)
    return SimilarityResults(
        "this model",
        {name: similarity.held_out_table(senses_of, sets, seed) for name, senses_of in methods.items()},
        similarity.similarity_table(methods["Backpack"], sets),
        similarity.paired_differences(methods, sets, seed),
    )


def _stored_similarity() -> SimilarityResults:
    stored = stored_evaluation("demo")
    parts = {"Backpack": stored["models"]["demo"], "Transformer": stored["models"]["demo-transformer"]}
    parts["word2vec"] = stored["word2vec"]
    numbers = {"rho": float, "low": float, "high": float}
    held_out = {name: pd.DataFrame(part["similarity_held_out"]).T.astype(numbers) for name, part in parts.items()}
    differences = pd.DataFrame(stored["similarity_differences"]).set_index(["other", "set"])
    return SimilarityResults("the demo model", held_out, pd.DataFrame(parts["Backpack"]["similarity"]), differences)


def planted_pair(device):
    """The small models of planted text and their tokenizer, on which the truth is known."""
    (backpack, tokenizer), (transformer, _) = load("planted", device), load("planted-transformer", device)
    return backpack, transformer, tokenizer


# ---------------------------------------------------------------- exercises


def check_own_effect(answer) -> str:
    """From weights in two meanings, (n, k), (m, k), and leanings, (k,): what the change of weights contributes."""

    def reference(first, second, lean):
        return ((first.mean(0) - second.mean(0)) * lean).sum()

    made = torch.Generator().manual_seed(0)
    cases = [
        tuple(torch.rand(size, generator=made) for size in ((n, k), (m, k), (k,))) for n, m, k in [(2, 3, 4), (5, 5, 1)]
    ]
    return check_function(answer, reference, cases)


def check_role_claim(answer) -> str:
    return check_choice(
        answer,
        "c",
        {
            "a": "the false pairs have the same pronouns, so how frequent they are cannot explain it.",
            "b": "an AUC of .69 is far from chance for thousands of pairs.",
            "c": "the largest effect decides what a sense does most, and a sign belongs to it.",
            "d": "a sense number is the same for all words here; whether it does the same is another question.",
        },
    )


def check_most_against(answer, contributions, tokenizer, ids) -> str:
    T, k = contributions.shape
    if not (isinstance(answer, tuple) and len(answer) == 2):
        return "Not yet: give a pair (position, sense)."
    if not (0 <= answer[0] < T and 0 <= answer[1] < k):
        return f"Not yet: positions run from 0 to {T - 1}, senses from 0 to {k - 1}."
    mine, worst = contributions[answer].item(), contributions.min().item()
    if mine > worst + 1e-6:
        return f"Not yet: that pair contributes {mine:+.3f}, and another one less."
    return f"Right: sense {answer[1]} of “{spell_text(tokenizer, ids)[answer[0]]}” contributes {mine:+.3f}."


def check_even(answer, lesson: Lesson, ids, token: int, sense: int, a: int, b: int) -> str:
    """By what a sense must be scaled so that two words are equally likely: tried on the model."""
    scale = finite_number(answer)
    if scale is None:
        return NO_NUMBER
    with SenseEdits(lesson.model, lesson.tokenizer).scale(token, sense, by=scale).applied():
        left = read(lesson.model, ids).total(a, b)
    if abs(left) > 1e-3:
        return f"Not yet: at that scale the log-odds are {left:+.3f} nats; they should be 0."
    return f"Right: scaled by {scale:.3f}, both are equally likely."


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
    if not torch.equal(others, others_now):
        return "Not yet: the senses of the other word changed as well; edit one word only."
    if moved > 1.01 * enough:
        return f"Not yet: the senses moved by {moved:.2f} in all, but {enough:.2f} is enough."
    return f"Right: no sense pushes it any more, and they moved by {moved:.2f} only."


def check_luck(answer, pairs: int = 65, choices: int = 20) -> str:
    """The expected largest of several correlations by luck."""
    draws = np.random.default_rng(0).normal(size=(20_000, choices)) / (pairs - 1) ** 0.5
    hints = [
        (0.0, "each is 0 on average, but the largest of them is not."),
        (1 / (pairs - 1) ** 0.5, "that is the size of a typical one."),
    ]
    return check_number(answer, draws.max(1).mean(), hints, tolerance=0.02)
