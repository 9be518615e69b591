"""The study of topic control: resumable, and its conclusions are those of slow versions and planted differences."""

import math

import numpy as np
import pandas as pd
import pytest

from backpack_lib import load
from backpack_lib.analysis.scores import nats_per_token
from backpack_lib.analysis.topic import TopicControl
from backpack_lib.lessons import topics as of_topics
from backpack_lib.lessons.opening import open_lesson
from backpack_lib.studies import topic_study
from backpack_lib.studies.text_quality import repetition, words_of
from backpack_lib.studies.topic_study import (
    at_equal_fluency,
    chosen_elsewhere,
    of_setting,
    paired_difference,
    responses,
    settings_table,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    lesson = open_lesson("03_topic_control", "planted", str(tmp_path_factory.mktemp("study")))
    given = {"topics": ["music", "law"], "strengths": [3], "pplm_steps": [0.3], "samples": 6, "tokens": 20, "trials": 2}
    return of_topics.open_study(lesson, "planted", **given)[0]


@pytest.fixture(scope="module")
def texts(study):
    return study.run()


def test_rows_hold_what_a_slow_reading_of_the_texts_finds(study, texts):
    (model, tokenizer), (transformer, _) = load("planted"), load("planted-transformer")
    setting = texts[texts["strength"] == 3].iloc[0]
    rows = of_setting(texts, setting)
    music, law = (rows[rows["topic"] == name] for name in ("music", "law"))
    prompts = study.prompts("music", 6)
    written = TopicControl(model, tokenizer, study.topics[0]["steer"], 3).generate(
        prompts, 20, 0, temperature=setting["temperature"]
    )
    assert list(music["text"]) == [text[len(prompt) :] for text, prompt in zip(written, prompts)] and len(law) == 6
    found = topic_study.perplexity_of(music)
    assert found == pytest.approx(math.exp(nats_per_token(transformer, tokenizer, written, prompts)), rel=1e-4)
    behind = [text[len(prompt) :] for text, prompt in zip(written, prompts)]
    assert list(music["on topic"]) == list(of_topics.planted_judge(behind)["music"])
    assert list(music["words"]) == [len(words_of(text)) for text in behind]
    assert settings_table(music)["repetition"].iloc[0] == pytest.approx(repetition(behind))


def test_a_study_resumes_and_is_the_same(study, texts, monkeypatch):
    monkeypatch.setattr(study, "_write", None)  # nothing is written anew
    assert study.run().equals(texts)
    assert set(texts["method"]) == {"Backpack", "PPLM"} and (texts.groupby("method")["strength"].min() == 0).all()
    with pytest.raises(ValueError, match="samples=0 should be at least 1"):
        type(study)(
            study.backpack, None, study.tokenizer, study.topics, study.judge, study.prompts, study.folder, samples=0
        )


def made(method, strength, temperature, shares, nats=60.0, n=40):
    rows = []
    for topic, share in shares.items():
        hits = round(share * n)
        rows += [(method, float(strength), temperature, topic, number < hits, nats) for number in range(n)]
    table = pd.DataFrame(rows, columns=["method", "strength", "temperature", "topic", "on topic", "nats"])
    return table.assign(
        tokens=20, words=20, **{"topic words": 2, "steering words": 1, "runs": 17, "repeated runs": 0, "seconds": 1.0}
    )


TOPICS = [f"topic {number}" for number in range(12)]
BASE = dict(zip(TOPICS, np.linspace(0.05, 0.75, 12)))


def test_equal_fluency_takes_the_nearest_temperature_and_says_what_was_not_reached():
    none = made("Backpack", 0, 1.0, BASE, nats=60)
    near, far = (made("Backpack", 2, t, BASE, nats=60 + 20 * np.log(x)) for t, x in ((1.1, 1.03), (1.0, 0.6)))
    never = made("Backpack", 3, 1.4, BASE, nats=60 + 20 * np.log(0.8))
    fair = at_equal_fluency(settings_table(pd.concat([none, near, far, never]))).set_index("strength")
    assert fair.loc[2, "temperature"] == 1.1 and fair.loc[2, "relative perplexity"] == pytest.approx(1.03)
    assert (
        list(fair["reached"]) == [True, True, False] and fair.loc[3, "why"] == "1 temperatures gave 0.80 to 0.80 times"
    )


def test_pairs_decide_where_intervals_of_the_two_overlap():
    one, other = made("Backpack", 2, 1.0, BASE), made("PPLM", 0.3, 1.0, {t: s + 0.15 for t, s in BASE.items()})
    found = paired_difference(one, other)
    assert found["difference"] == pytest.approx(-0.15, abs=0.01) and found["high"] < 0 and found["p"] < 0.01
    spread = [np.std(list(BASE.values())) / len(BASE) ** 0.5 * 1.96]
    assert 2 * spread[0] > 0.15  # each method's own interval over topics would hold the other's mean
    same = paired_difference(one, made("PPLM", 0.3, 1.0, dict(zip(TOPICS, list(BASE.values())[::-1]))))
    assert same["low"] < 0 < same["high"] and same["p"] > 0.5
    assert same["high"] - same["low"] > same["high here"] - same["low here"]  # topics like these vary more than these


def test_a_strength_is_chosen_on_other_topics_than_it_is_scored_on():
    """Strength 3 is best on one topic only, by far; there it is not chosen, since the others do not show it."""
    low, high = dict.fromkeys(TOPICS, 0.3), dict.fromkeys(TOPICS, 0.2) | {TOPICS[0]: 1.0}
    texts = pd.concat([made("Backpack", 0, 1.0, BASE), made("Backpack", 2, 1.0, low), made("Backpack", 3, 1.0, high)])
    ours, chosen = chosen_elsewhere(texts, at_equal_fluency(settings_table(texts)), "Backpack")
    assert (chosen == 2).all() and len(ours) == 12 * 40 and ours["on topic"].mean() == pytest.approx(0.3)
    assert chosen_elsewhere(texts, at_equal_fluency(settings_table(texts)), "PPLM")[0].empty


def test_responses_do_not_depend_on_how_much_was_written():
    rate = made("Backpack", 2, 1.0, {"a": 0.5, "b": 0.5}, n=200)
    few = made("Backpack", 0, 1.0, {"a": 0.5, "b": 0.5}, n=20)
    rate.loc[rate["topic"] == "b", "topic words"] = 0
    few.loc[few["topic"] == "b", "topic words"] = 0
    found = responses(rate, few)
    assert list(found["times"]) == pytest.approx([1, 1]) and (found["p"] > 0.3).all()  # b: no word on either side
    twice = responses(rate.assign(**{"topic words": 4}), few.assign(**{"topic words": 2}))
    assert twice.loc["a", "times"] == pytest.approx(2, rel=0.02) and twice.loc["a", "low"] > 1.5
    assert (twice["p"] < 0.001).all()


def test_a_response_is_tested_by_permuted_texts_and_for_as_many_topics_as_there_are():
    """Ten words in one of 16 texts are one lucky text, however high the rate; one word in 12 of 16 are a response."""
    topics = dict.fromkeys(["lucky", "responds", *TOPICS[:8]], 0.0)
    ours, none = (made("Backpack", strength, 1.0, topics, n=16).assign(**{"topic words": 0}) for strength in (2, 0))
    ours.loc[ours.index[ours["topic"] == "lucky"][0], "topic words"] = 10
    ours.loc[ours.index[ours["topic"] == "responds"][:12], "topic words"] = 1
    found = responses(ours, none)
    assert found.loc["lucky", "times"] > 10 and found.loc["lucky", "p"] == pytest.approx(0.5, abs=0.03)
    assert found.loc["responds", "p"] < 0.001
    assert found.loc["responds", "adjusted p"] == pytest.approx(10 * found.loc["responds", "p"])  # ten topics, the best
    assert (found.loc[TOPICS[:8], "p"] == 1).all()


def test_texts_without_control_are_judged_on_every_topic_if_they_begin_alike(tmp_path):
    lesson = open_lesson("03_topic_control", "planted", str(tmp_path))
    given = {"topics": ["music", "law"], "strengths": [], "samples": 3, "tokens": 12, "trials": 1, "prompt": "At the"}
    study, _ = of_topics.open_study(lesson, "planted", "none", **given)
    texts = study.run()
    none, controlled = (texts[(texts["strength"] > 0) == under] for under in (False, True))
    assert len(controlled) == 6 and len(none) == 12 and none["text"].nunique() <= 6
    for topic in ("music", "law"):
        rows = none[none["topic"] == topic]
        assert list(rows["on topic"]) == list(of_topics.planted_judge(list(rows["text"]))[topic])


@pytest.mark.parametrize(
    ("difference", "p", "said"),
    [(0.1, 0.2, "is not told apart from PPLM"), (0.1, 0.01, "succeeds more often than PPLM"),
     (-0.1, 0.01, "succeeds less often than PPLM")],
)  # fmt: skip
def test_a_verdict_says_no_more_than_its_test(difference, p, said):
    assert of_topics.verdict(pd.Series({"difference": difference, "p": p}, name="Backpack − PPLM")) == said
