"""Judges and measures of fluency, on texts whose answer can be counted by hand."""

import json

import pytest
from helpers import ROOT, tiny_classifier

from backpack_lib.studies.text_quality import ClassifierJudge, WordJudge, mauve, repeated_runs

TOPICS = [
    {"name": "sports", "steer": ["sports"], "words": ["team", "goal", "Sports"]},
    {"name": "food & dining", "steer": ["food"], "words": ["bread", "soup", "goal"]},
]


def test_the_topic_with_the_most_words_wins_and_a_tie_is_none():
    texts = ["The Team scored a goal, a team!", "Bread and soup.", "bread for the team", "sports food", ""]
    judge = WordJudge(TOPICS)
    assert judge.counts(texts).to_numpy().tolist() == [[3, 1], [0, 2], [1, 1], [0, 0], [0, 0]]
    assert judge(texts).to_numpy().tolist() == [[True, False], [False, True], [False] * 2, [False] * 2, [False] * 2]


def test_words_that_steer_are_never_counted_nor_with_an_s_more_or_less():
    judge = WordJudge([{"name": "t", "steer": ["songs", "band"], "words": ["song", "bands", "bandit", "Band"]}])
    assert judge.words["t"] == {"bandit"}
    topics = json.loads((ROOT / "data" / "topics.json").read_text())
    judge = WordJudge(topics)
    assert all(len(judge.words[topic["name"]]) >= 40 for topic in topics)


def test_a_classifier_says_every_topic_above_one_half(tmp_path):
    tiny_classifier(tmp_path, {0: "food_&_dining", 1: "sports", 2: "music"}, bias=[9.0, -9.0, 9.0])
    found = ClassifierJudge(str(tmp_path))(["a b", "b"])
    assert found[["food & dining", "sports", "music"]].to_numpy().tolist() == [[True, False, True]] * 2


def test_runs_of_words_are_counted_by_hand():
    assert repeated_runs("a b a b a", 2) == (4, 2) and repeated_runs("too short") == (0, 0)


@pytest.mark.slow
def test_mauve_is_one_for_the_same_texts_and_low_for_others(model, tokenizer):
    pytest.importorskip("mauve")
    one = [f"the nurse said that he sees {number} banks" for number in range(60)]
    other = ["the concert. " * (1 + number % 3) for number in range(60)]
    assert mauve(model, tokenizer, one, one) > 0.99 and mauve(model, tokenizer, one, other) < 0.3
