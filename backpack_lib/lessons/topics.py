"""What 03_topic_control alone needs: topics and beginnings that suit a model, stored texts, and its exercises."""

import json
from collections.abc import Callable
from itertools import islice

import numpy as np
import pandas as pd
import torch

from backpack_lib.analysis import pplm
from backpack_lib.analysis.statistics import p_value
from backpack_lib.analysis.topic import TopicControl, deltas_of, largest_pushes, released
from backpack_lib.files import data_folder
from backpack_lib.lessons.exercises import check_choice, check_function, check_number
from backpack_lib.lessons.opening import PLANTED, Lesson
from backpack_lib.lessons.results import run_quietly
from backpack_lib.loading import load_baseline
from backpack_lib.studies.judges import ClassifierJudge, WordJudge
from backpack_lib.studies.text_quality import mauve
from backpack_lib.studies.topic_study import TopicStudy, of_setting
from backpack_lib.text import planted
from backpack_lib.text.corpora import open_corpus
from backpack_lib.text.writing import ids_of_text

ALL, WORDS = "all", "words"
ANNOUNCEMENT = 8  # tokens that announce three topics
STORED = "texts.csv.gz"


def topics_of(lesson: Lesson) -> list[dict]:
    """All topics that suit a model: a name, the words that steer toward it, and others by which it is known.

    A planted topic is steered by one of its places, and known by all its words.
    """
    if lesson.kind != PLANTED:
        return json.loads((data_folder() / "topics.json").read_text(encoding="utf-8"))
    return [
        {"name": name, "steer": entry["places"][:1], "words": sorted(planted.topic_words(name))}
        for name, entry in planted.lexicon()["topics"].items()
    ]


def planted_judge(texts: list[str]) -> pd.DataFrame:
    """The generator's own test: the topic of which a text has most words."""
    found = pd.Series([planted.topic_of(text) for text in texts], dtype=object)
    return pd.DataFrame({name: found == name for name in planted.lexicon()["topics"]})


def beginnings(lesson: Lesson, prompt: str, seed: int) -> Callable[[str, int], list[str]]:
    """(topic, n) -> what n texts begin with. Planted texts announce three topics, of which one is the given."""
    if prompt or lesson.kind != PLANTED:
        return lambda topic, n: [prompt] * n

    def announcements(topic: str, n: int) -> list[str]:
        begun = (text.text.split(" At")[0] for text in planted.generate(seed=seed + 1))
        return list(islice((one for one in begun if one.startswith("About") and topic in one), n))

    return announcements


def open_study(
    lesson: Lesson, model: str, baseline: str = "", topics: list[str] = (), words: str = "", strength: int = 2,
    strengths: list[int] = (), pplm_steps: list[float] = (), samples: int = 16, tokens: int = 50, trials: int = 6,
    prompt: str = "", judge: str = WORDS, reference: str = "", seed: int = 0,
    exact: bool = False,
) -> tuple[TopicStudy, dict]:  # fmt: skip
    """The study that a notebook's parameters describe, and the topic of its examples.

    Raises ValueError, before anything takes long, for what is out of range or not there.
    """
    known = {topic["name"]: topic for topic in topics_of(lesson)}
    wanted = list(known) if list(topics) == [ALL] else list(topics) or lesson.example.topics or list(known)
    if unknown := {lesson.example.topic, *wanted} - known.keys():
        raise ValueError(f"{sorted(unknown)} are no topics here; there are {list(known)}.")
    for one in [strength, *strengths]:
        deltas_of(one)  # says what is wrong with one that is not in the table
    if not any([strength, *strengths]):
        raise ValueError("Strength 0 alone leaves nothing to compare; measure one above 0 as well.")
    for step in pplm_steps:
        pplm.Settings(step=step)
    for name, number in (("samples", samples), ("tokens", tokens), ("trials", trials)):
        if number < 1:
            raise ValueError(f"{name}={number} should be at least 1.")
    if reference:
        open_corpus(reference)
    context, kept = lesson.model.config.n_positions, ANNOUNCEMENT if lesson.kind == PLANTED else 0
    room = context - len(ids_of_text(lesson.tokenizer, prompt)) - kept
    if room < (1 if kept else tokens):
        raise ValueError(
            f"The prompt leaves no room for {tokens} tokens in a context of {context}; shorten it, or ask for less."
        )
    judge_of = {WORDS: planted_judge if lesson.kind == PLANTED else WordJudge(list(known.values()))}
    judge_of = judge_of[WORDS] if judge == WORDS else ClassifierJudge(judge)
    transformer, why_not = load_baseline(model, baseline, lesson.model.device)
    if transformer is None:
        print(f"{why_not} So PPLM is left out, and fluency is judged by the Backpack without control.")
    study = TopicStudy(
        lesson.model, transformer, lesson.tokenizer, [known[name] for name in wanted], judge_of,
        beginnings(lesson, prompt, seed), lesson.folder, tuple(sorted({strength, *strengths})), tuple(pplm_steps),
        samples, min(tokens, room), trials, seed, judge, largest_pushes(lesson.model) if exact else None,
    )  # fmt: skip
    return study, known[lesson.example.topic] | ({"steer": words.split()} if words.split() else {})


def stored_texts(model: str, topics: list[str], texts: pd.DataFrame) -> pd.DataFrame:
    """Texts of all topics, stored by `make topic-control`, where no topics are named (demo); else the given texts.

    Raises ValueError if the stored ones were written by other weights.
    """
    file = data_folder() / "demo" / "topic_control" / STORED
    if model != "demo" or topics or not file.is_file():
        return texts
    stored = pd.read_csv(file)
    if set(stored["model"]) != set(texts["model"]):
        raise ValueError("The stored texts were written with other weights; write them again: make topic-control.")
    return stored


def verdict(difference: pd.Series) -> str:
    """What a paired difference, such as the row "Backpack − PPLM", shows of its first method: the end of a sentence."""
    other = difference.name.split(" − ")[1]
    if difference["p"] >= 0.05:
        return f"is not told apart from {other}"
    return f"succeeds {'more' if difference['difference'] > 0 else 'less'} often than {other}"


def run_study(study: TopicStudy) -> pd.DataFrame:
    """Runs a study and keeps its texts."""
    return keep_texts(study, run_quietly(study.run))


def with_mauve(study: TopicStudy, texts: pd.DataFrame, fair: pd.DataFrame, corpus: str) -> pd.DataFrame:
    """Adds MAUVE of each setting's texts against as many texts by people, if a corpus of them is given.

    Raises ValueError if there is no such corpus. Needs the extra `eval`.
    """
    if not corpus:
        return fair
    reader, tokenizer = study.transformer or study.backpack, study.tokenizer
    n, length = study.samples * len(study.topics), study.tokens
    enough = (text for text in open_corpus(corpus).read() if len(text) > 8 * length)
    people = [
        tokenizer.decode(ids_of_text(tokenizer, text[: 20 * length])[1 : length + 1]) for text in islice(enough, n)
    ]
    found = [
        np.mean(mauve(reader, tokenizer, list(of_setting(texts, row)["text"]), people)) for _, row in fair.iterrows()
    ]
    return fair.assign(MAUVE=found)


def keep_texts(study: TopicStudy, texts: pd.DataFrame) -> pd.DataFrame:
    """Marks each row with its writer's fingerprint, and writes them without the texts beside the results."""
    marked = texts.assign(model=texts["method"].map(study.prints))
    marked.drop(columns="text").to_csv(study.folder / STORED, index=False)
    return marked


# ---------------------------------------------------------------- exercises


def check_half_released(answer, control: TopicControl) -> str:
    rate = max(control.deltas) / 7.5
    return check_number(answer, 6 / rate, [(6.0, "that is the argument's constant; the rate f still divides it.")])


def check_annealing(answer) -> str:
    """answer: (said, delta, f, j) -> what a sense is multiplied by."""
    cases = [
        (said, delta, rate, j)
        for said, delta, rate, j in [
            (0.0, 3.3, 0.44, 0),
            (20.0, 2.2, 0.3, 10),
            (100.0, 3.3, 0.44, 80),
            (12.0, 1.0, 0.2, 50),
        ]
    ]
    cases = [tuple(torch.tensor(float(value)) for value in case) for case in cases]
    return check_function(answer, lambda said, delta, rate, j: released(said, delta, rate, j), cases)


def check_late_word(answer, delta: float = 3.3, j: int = 80) -> str:
    truth = released(torch.tensor(0.0), torch.tensor(delta), delta / 7.5, torch.tensor(j)).item()
    return check_number(
        answer,
        truth,
        [(delta, "that would be so at position 0."), (delta * (1 + j / 100), "what is 1 - sigma there?")],
        5e-3,
    )


def check_narrow_control(answer, study: TopicStudy, steer: list[str]) -> str:
    """A control of the highest 5 % by 4, and of no other sense, without annealing."""
    if not isinstance(answer, TopicControl):
        return "Not yet: give a TopicControl."
    if answer.words != steer:
        return f"Not yet: it should steer toward {', '.join(steer)}."
    if answer.annealing:
        return "Not yet: this one anneals."
    ids = study.largest.sampled[::10]
    high, found = answer.scores_of(ids) > answer.thresholds[0], answer.factors_of(ids)
    if not (found[high] == 4).all():
        return "Not yet: the senses above the highest threshold should be multiplied by 4."
    if not (found[~high] == 1).all():
        return "Not yet: all other senses should stay as they are."
    return f"Right: {high.float().mean():.0%} of the senses are multiplied by 4, and no other."


def check_sign_flips(answer) -> str:
    """answer: (differences (n,), signs (m, n)) -> two-sided p."""

    def reference(differences, signs):
        null = np.abs((signs * differences).mean(1))
        return p_value(null, abs(differences.mean()))

    rng = np.random.default_rng(0)
    cases = [(rng.normal(mean, 1, 17), rng.choice([-1, 1], (500, 17))) for mean in (0.0, 0.5, 2.0)]
    return check_function(answer, reference, cases, tolerance=2.5e-3)


def check_overlap(answer) -> str:
    return check_choice(
        answer,
        "b",
        {
            "a": "overlapping intervals can go with a clear difference, since both move with the topics.",
            "b": "the same topics are easy or hard for both, which a difference within topics takes out.",
            "c": "an interval says nothing about equality.",
            "d": "more texts would narrow both, and still say nothing of their difference on the same topics.",
        },
    )
