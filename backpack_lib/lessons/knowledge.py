"""What 05_knowledge alone needs: facts and texts that suit a model, stored tables, and checks of its exercises."""

import re
from importlib.util import find_spec

import pandas as pd
import torch

from backpack_lib.analysis import finetuning as ft
from backpack_lib.analysis.knowledge import Fact, known, read_facts, tokens_of_fact, usable
from backpack_lib.files import data_folder
from backpack_lib.lessons.exercises import check_function, check_number, random_cases
from backpack_lib.lessons.opening import PLANTED, Lesson
from backpack_lib.studies.knowledge_study import SETTINGS
from backpack_lib.text import planted
from backpack_lib.text.corpora import first_characters, open_corpus
from backpack_lib.text.writing import continue_texts

GENERAL_TEXTS, GENERAL_TOKENS, CHARACTERS = 12, 50, 600  # that each model writes; of a paragraph by people
NEEDED = {"fit": 2, "test": 1}  # examples of a set


def check_settings(facts_measured: int, sets_taught: int, methods: list[str], bounds: list[float], share: float):
    """Refuses settings that are out of range."""
    for name, number in (("facts_measured", facts_measured), ("sets_taught", sets_taught)):
        if number < 0:
            raise ValueError(f"{name}={number} is out of range; give a number above 0, or 0 for all.")
    if not bounds:
        raise ValueError("bounds=[] holds no bound; give at least one, such as 0.001.")
    for eps in bounds:
        ft.check_bound(eps)
    if not methods:
        raise ValueError(f"methods=[] names no method; choose from {', '.join(SETTINGS)}.")
    if unknown := {*methods} - {*SETTINGS}:
        raise ValueError(f"The method {min(unknown)!r} is unknown; choose from {', '.join(SETTINGS)}.")
    if "LoRA" in methods and find_spec("peft") is None:
        raise ValueError("The method 'LoRA' needs the package peft: pip install peft.")
    if not 0 < share <= 1:
        raise ValueError(f"share={share} should be above 0 and at most 1.")


def open_material(lesson: Lesson, facts="", relations="", examples="") -> tuple:
    """What a notebook's parameters ask for: the fact to begin with, all facts, and sets to be taught, a table."""
    example = example_fact(lesson)
    folder = data_folder() / "planted" if lesson.kind == PLANTED else data_folder()
    all_facts = read_facts(facts or folder / "facts.csv", relations or folder / "relations.yaml")
    sets = ft.read_examples(examples or folder / "canonical.csv")
    teachable = sets.groupby("set").filter(
        lambda table: all(len(ft.make_examples(lesson.tokenizer, table, use)) >= n for use, n in NEEDED.items())
    )
    if teachable.empty:
        raise ValueError(
            f"{examples or 'canonical.csv'!r} holds no set with two examples to fit and one to test that this "
            "vocabulary can say; give a file with others by the parameter `examples`."
        )
    return example, all_facts, teachable


def example_fact(lesson: Lesson) -> Fact:
    """The fact to begin with, from the lesson's examples; prompts of one's own take the place of its phrasings."""
    e = lesson.example
    uses = ("edit", "test", "about", "neighbours")
    phrasings = {"edit": e.prompts} if hasattr(e, "prompts") else {use: getattr(e, use) for use in uses}
    own = {use: tuple(text.replace("{subject}", e.subject) for text in texts) for use, texts in phrasings.items()}
    fact = Fact("example", e.subject, e.object, e.counter, **own)
    subject, _, _ = tokens_of_fact(lesson.tokenizer, fact)
    for text in fact.edit:
        if subject not in lesson.tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise ValueError(
                f"The prompt {text!r} lacks {fact.subject!r} as a word after a space; give prompts that have it."
            )
    return fact


def general_texts(lesson: Lesson, models: dict, sets: pd.DataFrame, reference: str, seed: int) -> tuple[list[str], str]:
    """Texts on anything, and what they are: people's, planted, or written by the models in turn."""
    if reference:
        paragraphs = (text[:CHARACTERS] for text in first_characters(open_corpus(reference).read(), 200_000))
        return [text for text in paragraphs if text.strip()][: 2 * GENERAL_TEXTS], "text by people"
    if lesson.kind == PLANTED:
        return unmoved_texts(sets, seed), "planted text"
    written = [
        continue_texts(model, lesson.tokenizer, [""] * GENERAL_TEXTS, GENERAL_TOKENS, seed, top_k=0)
        for model in models.values()
    ]
    return [text for pair in zip(*written) for text in pair], "texts that the models wrote"


def unmoved_texts(sets: pd.DataFrame, seed: int) -> list[str]:
    """Planted texts without the places that move in the sets ("zoo → law"), of which both corpora say the same."""
    moved = {name.split(" ")[0] for name in sets["set"]}
    texts = [text.text for text in planted.generate(600, seed=seed + 1000)]
    return [text for text in texts if moved.isdisjoint(re.findall(r"\w+", text))][: 2 * GENERAL_TEXTS]


# ---------------------------------------------------------------- exercises


def check_projection(answer) -> str:
    """answer: (C (k, d), e_r (d,), e_a (d,)) -> the projected senses (k, d)."""

    def reference(C, e_r, e_a):
        c = (C @ e_r / (e_r @ e_r))[:, None]
        return C - c * e_r + c * e_a * (e_r @ e_r) / (e_a @ e_a)

    return check_function(answer, reference, random_cases("kd d d", k=(4, 4), d=(6, 10)))


def check_prediction(answer, before: float, after: float) -> str:
    """The log-odds of counter-object to object after the edit."""
    hints = [(before, "these are the log-odds before the edit."), (-after, "the sign is turned.")]
    return check_number(answer, after, hints, 5e-3)


def check_dose(answer) -> str:
    """answer: (before, effect, wanted) -> the strength at which the margin is what is wanted."""
    cases = [(-3.0, 2.0, 0.7), (-1.0, 4.0, 0.0), (-0.5, 0.25, 0.7)]
    return check_function(answer, lambda before, effect, wanted: (wanted - before) / effect, cases)


def check_scores(answer) -> str:
    """answer: (here (T, k), general (T, k), weight, n) -> the n places of the highest scores, the highest first."""
    first, second = random_cases("Tk Tk", T=(5, 5), k=(3, 3))
    cases = [(*first, 0.1, 2), (*second, 10.0, 4)]
    return check_function(answer, lambda here, general, w, n: (here - w * general).flatten().topk(n).indices, cases)


def check_walk_back(answer) -> str:
    """answer: (losses (n,), eps) at shares 0, ..., 1 -> the largest share up to which all losses meet the bound."""

    def reference(losses, eps):
        meets = (losses <= (1 + eps) * losses[0]).int().cumprod(0)
        return (meets.sum().item() - 1) / (len(losses) - 1)

    losses = torch.tensor([4.0, 4.001, 4.003, 4.02, 4.1])
    return check_function(answer, reference, [(losses, eps) for eps in (1e-4, 1e-3, 1e-2, 1.0)])


def check_own_fact(answer, lesson: Lesson, facts: list[Fact]) -> str:
    """A fact that the model knows and that is not in the table."""
    if not isinstance(answer, Fact) or not usable([answer], lesson.tokenizer):
        return "Not yet: give a `knowledge.Fact` whose three words are one token each."
    if (answer.subject, answer.object) in {(fact.subject, fact.object) for fact in facts}:
        return "Not yet: that one is in the table."
    if not known(lesson.model, lesson.tokenizer, [answer]):
        return f"Not yet: after one of the prompts, the model finds {answer.counter!r} likelier than {answer.object!r}."
    return "Right: the model knows that."
