"""The study of topic control: what is written and judged, equal fluency, and what 03 computes of it in its cells."""

import ast
import json
import math

import nbformat
import numpy as np
import pandas as pd
import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from backpack_lib import load
from backpack_lib.analysis.scores import nats_per_token
from backpack_lib.analysis.statistics import paired
from backpack_lib.analysis.topic import TopicControl
from backpack_lib.lessons import topics as checks
from backpack_lib.lessons.opening import open_lesson
from backpack_lib.studies.text_quality import repeated_runs, words_of
from backpack_lib.studies.topic_study import TEMPERATURES, TopicStudy, next_temperature


@pytest.fixture(scope="module")
def cells():
    """The functions that stand in the notebook's cells, with its imports and constants in capitals."""
    space = {"seed": 0}
    for cell in nbformat.read(ROOT / "notebooks" / "03_topic_control.ipynb", as_version=4).cells:
        for line in ast.parse(cell.source).body if cell.cell_type == "code" else []:
            name = ast.unparse(line.targets[0]) if isinstance(line, ast.Assign) else ""
            constant = name.isupper() and len(name) > 1
            if constant or isinstance(line, ast.Import | ast.ImportFrom | ast.FunctionDef):
                exec(ast.unparse(line), space)
    return space


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    lesson = open_lesson("03_topic_control", "planted", str(tmp_path_factory.mktemp("study")))
    known = checks.read_topics(lesson)
    _, topics = checks.choose_topics(lesson, known, "", ["music", "law"])
    return TopicStudy(
        control=TopicControl(lesson.model, lesson.tokenizer, ["opera"]), transformer=load("planted-transformer")[0],
        topics=topics, judge=checks.planted_judge, prompts=checks.beginnings(lesson, "", 0), folder=lesson.folder,
        samples=6, tokens=20,
    )  # fmt: skip


# ---------------------------------------------------------------- texts


def test_rows_hold_what_a_slow_reading_of_the_texts_says(study, cells):
    (model, tokenizer), (transformer, _) = load("planted"), load("planted-transformer")
    rows = study.texts_at("Backpack", 3, 1.2)
    music, law = (rows[rows["topic"] == name] for name in ("music", "law"))
    prompts = study.prompts("music", 6)
    control = TopicControl(model, tokenizer, study.topics[0]["steer"], 3)
    written = control.generate(prompts, 20, 0, temperature=1.2)
    after = [text[len(prompt) :] for text, prompt in zip(written, prompts)]
    assert list(music["text"]) == after and len(law) == 6
    expected = math.exp(nats_per_token(transformer, tokenizer, written, prompts))
    assert cells["perplexity"](music) == pytest.approx(expected, rel=1e-4)
    assert list(music["on topic"]) == list(checks.planted_judge(after)["music"])
    assert list(music["words"]) == [len(words_of(text)) for text in after]
    assert list(zip(music["runs"], music["repeated runs"])) == [repeated_runs(text) for text in after]


def test_a_study_resumes_and_is_the_same(study, monkeypatch):
    settings = [("Backpack", 0, 1.0), ("Backpack", 3, 1.1), ("PPLM", 0, 1.0), ("PPLM", 0.3, 1.0)]
    before = [study.texts_at(*setting) for setting in settings]
    monkeypatch.setattr(study, "_continued", None)  # nothing is written anew
    for setting, texts in zip(settings, before):
        assert study.texts_at(*setting).equals(texts) and len(texts) == 12
        assert set(texts["model"]) == {study.prints[setting[0]]}


def test_texts_without_control_are_judged_on_every_topic_if_they_begin_alike(study, tmp_path):
    alike = TopicStudy(
        control=study.control, transformer=None, topics=study.topics, judge=checks.planted_judge,
        prompts=lambda topic, n: ["At the"] * n, folder=tmp_path, samples=3, tokens=12,
    )  # fmt: skip
    none = alike.texts_at("Backpack", 0, 1.0)
    assert len(none) == 12 and none["text"].nunique() <= 6 and len(alike.texts_at("Backpack", 2, 1.0)) == 6
    for topic in ("music", "law"):
        rows = none[none["topic"] == topic]
        assert list(rows["on topic"]) == list(checks.planted_judge(list(rows["text"]))[topic])


@given(st.floats(3, 9), st.floats(40, 400), st.floats(0.6, 1.4))
def test_the_temperature_of_equal_perplexity_is_found(slope, at_one, temperature):
    """Log-perplexity over temperature: a line with a bend, as measured."""

    def perplexity(t):
        return at_one * math.exp(slope * (t - 1) + (t - 1) ** 2)

    wanted, tried, t = perplexity(temperature), {}, 1.0
    while t not in tried and not any(abs(p / wanted - 1) <= 0.05 for p in tried.values()):
        tried[t] = perplexity(t)
        t = next_temperature(tried, wanted)
    assert tried[list(tried)[-1]] == pytest.approx(wanted, rel=0.05) and len(tried) <= 4


def test_a_perplexity_out_of_reach_is_sought_up_to_the_ends_and_not_twice():
    for wanted, end in ((2.0, TEMPERATURES[0]), (1e9, TEMPERATURES[1])):
        tried, t = {}, 1.0
        while t not in tried:
            tried[t] = 100.0 + t
            t = next_temperature(tried, wanted)
        assert end in tried and len(tried) < 5 and min(tried) >= TEMPERATURES[0] and max(tried) <= TEMPERATURES[1]


# ---------------------------------------------------------------- what the notebook's cells make of them


TOPICS = [f"topic {number}" for number in range(12)]
BASE = dict(zip(TOPICS, np.linspace(0.05, 0.75, 12)))


def made(strength, temperature, shares, nats=60.0, n=40, words=2):
    rows = [(topic, number < round(share * n)) for topic, share in shares.items() for number in range(n)]
    texts = pd.DataFrame(rows, columns=["topic", "on topic"])
    setting = {"method": "Backpack", "strength": float(strength), "temperature": temperature}
    counts = {"topic words": words, "steering words": 1, "repeated runs": 0, "runs": 17}
    return texts.assign(nats=nats, tokens=20, words=20, **setting, **counts)


def test_equal_fluency_takes_the_nearest_temperature_and_says_what_was_not_reached(cells):
    none = made(0, 1.0, BASE)
    near, far = (made(2, t, BASE, nats=60 + 20 * np.log(x)) for t, x in ((1.1, 1.03), (1.0, 0.6)))
    never = made(3, 1.4, BASE, nats=60 + 20 * np.log(0.8))
    table = cells["settings_table"](pd.concat([none, near, far, never]))
    fair = cells["at_equal_fluency"](table).set_index("strength")
    assert fair.loc[2, "temperature"] == 1.1 and fair.loc[2, "relative perplexity"] == pytest.approx(1.03)
    assert list(fair["reached"]) == [True, True, False]
    assert fair["topic words per 1,000"].tolist() == pytest.approx([100] * 3)


def test_a_strength_is_chosen_on_other_topics_than_it_is_scored_on(cells):
    """Strength 3 is best on one topic only, by far; there it is not chosen, since the others do not show it."""
    low, high = dict.fromkeys(TOPICS, 0.3), dict.fromkeys(TOPICS, 0.2) | {TOPICS[0]: 1.0}
    texts = pd.concat([made(0, 1.0, BASE), made(2, 1.0, low), made(3, 1.0, high)])
    cells |= {"measured": texts, "fair": cells["at_equal_fluency"](cells["settings_table"](texts))}
    ours = cells["chosen_elsewhere"]("Backpack")
    assert set(ours["strength"]) == {2} and len(ours) == 12 * 40 and ours["on topic"].mean() == pytest.approx(0.3)
    assert cells["chosen_elsewhere"]("PPLM").empty


def test_pairs_decide_where_intervals_of_the_two_overlap_and_scipy_says_the_same():
    one = pd.Series(BASE)
    other = one + 0.15 + np.random.default_rng(0).normal(0, 0.1, 12)
    difference = paired(one, other)
    test = stats.permutation_test((one - other,), np.mean, permutation_type="samples", n_resamples=9999, rng=0)
    t = stats.ttest_rel(one, other).confidence_interval()
    assert difference["difference"] == pytest.approx(test.statistic) and difference["high"] < 0
    assert difference["p"] == pytest.approx(test.pvalue, abs=3e-3)
    assert [difference["low"], difference["high"]] == pytest.approx([t.low, t.high], abs=0.02)
    assert 1.96 * one.std() / 12**0.5 > 0.1  # each method's own interval would hold the other's mean


def test_a_response_is_tested_by_permuted_texts_and_does_not_depend_on_how_much_was_written(cells):
    response = cells["response"]
    topic = {"a": 0.0}
    same = response(made(2, 1.0, topic, n=200), made(0, 1.0, topic, n=20))
    assert same["times"] == pytest.approx(1) and same["p"] > 0.3
    twice = response(made(2, 1.0, topic, n=200, words=4), made(0, 1.0, topic, n=20))
    assert twice["times"] == pytest.approx(2, rel=0.02) and twice["low"] > 1.5 and twice["p"] < 0.001
    none, lucky, responds = (made(strength, 1.0, topic, n=16, words=0) for strength in (0, 2, 2))
    lucky.loc[0, "topic words"] = 10  # ten words in one of 16 texts are one lucky text, however high the rate
    responds.loc[:11, "topic words"] = 1
    found = response(lucky, none)
    assert found["times"] > 10 and found["p"] == pytest.approx(0.5, abs=0.03)
    exact = stats.fisher_exact([[12, 4], [0, 16]], alternative="greater").pvalue  # the same question for 0 or 1 word
    assert response(responds, none)["p"] == pytest.approx(exact, abs=1e-3)
    # Ten topics, of which one responds.
    assert stats.false_discovery_control([0.001] + [1.0] * 9)[0] == pytest.approx(0.01)


# ---------------------------------------------------------------- topics of one's own


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "should be a list of topics"),
        ('[{"name": "a", "steer": [1984], "words": ["b"]}]', "a number such as 1984 needs quotes"),
        ('[{"name": "a", "steer": "bc", "words": ["b"]}]', "two lists of words"),
        ("topics", "own.json' cannot be read: "),
        (None, "own.json' cannot be read: "),
    ],
)
def test_a_file_of_topics_that_is_wrong_is_refused_in_one_sentence(content, message, tmp_path):
    lesson, file = open_lesson("03_topic_control", "planted", str(tmp_path / "out")), tmp_path / "own.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        checks.read_topics(lesson, str(file))
    assert len(str(refused.value).splitlines()) == 1


def test_topics_of_ones_own_are_words_as_they_are(tmp_path):
    lesson, file = open_lesson("03_topic_control", "planted", str(tmp_path / "out")), tmp_path / "own.json"
    own = [{"name": name, "steer": [name], "words": ["novel"]} for name in ("yes", "1984")]
    file.write_text("\N{BYTE ORDER MARK}" + json.dumps(own), encoding="utf-8")
    known = checks.read_topics(lesson, str(file))
    assert checks.choose_topics(lesson, known, "", ["1984"]) == (own[1], [own[1]])
    assert checks.choose_topics(lesson, known, "1984", ["all"]) == (own[1], own)
    with pytest.raises(ValueError, match=r"\['no'\] are no topics here; there are \['yes', '1984'\]"):
        checks.choose_topics(lesson, known, "no", [])
