"""What 03_topic_control alone needs: topics and beginnings that suit a model, stored texts, checks of its exercises."""

import math
from collections.abc import Callable
from itertools import islice

import numpy as np
import pandas as pd
import torch

from backpack_lib.analysis.statistics import p_value
from backpack_lib.analysis.topic import TopicControl, deltas_of, released
from backpack_lib.lessons.exercises import check_function, check_number
from backpack_lib.lessons.opening import PLANTED, Lesson, read_json
from backpack_lib.text import planted


def read_topics(lesson: Lesson, file: str = "") -> dict[str, dict]:
    """Topics by name, each with its `name`, the words that steer toward it, `steer`, and others of its own, `words`.

    file: one like `data/topics.json`; "" for those that suit the model. A planted topic is steered by one of its places.
    """
    if lesson.kind == PLANTED and not file:
        places = {name: entry["places"][:1] for name, entry in planted.lexicon()["topics"].items()}
        return {n: {"name": n, "steer": steer, "words": sorted(planted.topic_words(n))} for n, steer in places.items()}
    topics = read_json(file, "topics.json")
    if not isinstance(topics, list) or not topics or not all(isinstance(topic, dict) for topic in topics):
        raise ValueError(f"The file of topics {file!r} should be a list of topics, as data/topics.json is.")
    for topic in topics:
        if not isinstance(topic.get("name"), str) or not all(_is_words(topic.get(key)) for key in ("steer", "words")):
            raise ValueError(
                f"In the file of topics {file!r}, {topic.get('name')!r} should have a name and two lists of words, "
                "'steer' and 'words', as in data/topics.json; a number such as 1984 needs quotes."
            )
    return {topic["name"]: topic for topic in topics}


def _is_words(entry) -> bool:
    return isinstance(entry, list) and len(entry) > 0 and all(isinstance(word, str) for word in entry)


def planted_judge(texts: list[str]) -> pd.DataFrame:
    """The generator's own test: the topic of which a text has most words."""
    topic = pd.Series([planted.topic_of(text) for text in texts], dtype=object)
    return pd.DataFrame({name: topic == name for name in planted.lexicon()["topics"]})


def beginnings(lesson: Lesson, prompt: str, seed: int) -> Callable[[str, int], list[str]]:
    """(topic, n) -> what n texts begin with. Planted texts announce three topics, of which one is theirs."""

    def begin(topic: str, n: int) -> list[str]:
        if prompt or lesson.kind != PLANTED or topic not in planted.lexicon()["topics"]:
            return [prompt] * n
        begun = (text.text.split(" At")[0] for text in planted.generate(seed=seed + 1))
        return list(islice((text for text in begun if text.startswith("About") and topic in text), n))

    return begin


def choose_topics(lesson: Lesson, known: dict[str, dict], topic: str, topics: list[str]) -> tuple[dict, list[dict]]:
    """The topic of the examples, and those to be measured: ["all"], or those named, or those that suit the model."""
    suits = [name for name in lesson.example.topics if name in known] or list(known)
    names = list(known) if topics == ["all"] else topics or suits
    if not topic:
        topic = lesson.example.topic if lesson.example.topic in known else names[0]
    if unknown := {topic, *names} - known.keys():
        raise ValueError(f"{sorted(unknown)} are no topics here; there are {list(known)}.")
    return known[topic], [known[name] for name in dict.fromkeys(names)]


def check_settings(strengths: list[int], pplm_steps: list[float], **counts: int):
    """Refuses, before anything takes long, a setting that is out of range."""
    for strength in strengths:
        deltas_of(strength)
    for step in pplm_steps:
        if not 0 <= step < math.inf:
            raise ValueError(f"The step {step} of PPLM is out of range; it should be at least 0.")
    if not any(strengths):
        raise ValueError("Strength 0 alone leaves nothing to compare; measure one above 0 as well.")
    for name, number in counts.items():
        if number < 1:
            raise ValueError(f"{name}={number} should be at least 1.")


# ---------------------------------------------------------------- exercises


def check_narrow_control(answer, steer: list[str]) -> str:
    """A control of the highest 5 % by 4, and of no other sense, without annealing."""
    if not isinstance(answer, TopicControl):
        return "Not yet: give a TopicControl."
    if answer.words != steer or answer.annealing:
        return f"Not yet: it should steer toward {', '.join(steer)}, without annealing."
    ids = answer.sampled
    high, factors = answer.scores_of(ids) > answer.thresholds[0], answer.factors_of(ids)
    if not (factors[high] == 4).all() or not (factors[~high] == 1).all():
        return "Not yet: the senses above the highest threshold should be multiplied by 4, and all others by 1."
    return f"Right: {high.float().mean():.0%} of the senses are multiplied by 4, and no other."


def check_half_released(answer, control: TopicControl) -> str:
    hints = [(6.0, "that is the argument's constant; the rate f still divides it.")]
    return check_number(answer, 6 * 7.5 / max(control.deltas), hints)


def check_annealing(answer) -> str:
    """answer: (said, delta, f, j) -> what a sense is multiplied by."""
    numbers = [(0.0, 3.3, 0.44, 0), (20.0, 2.2, 0.3, 10), (100.0, 3.3, 0.44, 80), (12.0, 1.0, 0.2, 50)]
    return check_function(answer, released, [tuple(torch.tensor(float(x)) for x in case) for case in numbers])


def check_late_word(answer) -> str:
    truth = released(torch.tensor(0.0), torch.tensor(3.3), 3.3 / 7.5, torch.tensor(80)).item()
    hints = [(3.3, "that would be so at position 0."), (3.3 * 1.8, "what is 1 - sigma there?")]
    return check_number(answer, truth, hints, 5e-3)


def check_sign_flips(answer) -> str:
    """answer: (differences (n,), signs (m, n)) -> two-sided p."""
    rng = np.random.default_rng(0)
    cases = [(rng.normal(mean, 1, 17), rng.choice([-1, 1], (500, 17))) for mean in (0.0, 0.5, 2.0)]
    return check_function(answer, lambda d, s: p_value(np.abs((s * d).mean(1)), abs(d.mean())), cases, 2.5e-3)
