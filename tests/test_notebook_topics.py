"""03_topic_control under other parameters than its own, and its stored tables."""

import json

import pandas as pd
import pytest
from helpers import ROOT, tiny_classifier

from backpack_lib import load
from backpack_lib.loading import fingerprint
from backpack_lib.running.notebook import run_notebook
from backpack_lib.studies.fluency import success
from backpack_lib.text import planted


def test_topic_control_finds_planted_topics_and_goes_on_where_it_was(planted_run, tmp_path):
    outcome = run_notebook("03_topic_control", {"model": "planted", "out": str(tmp_path)})
    assert not outcome.failed, outcome.result
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["planted success"] > 0.5 > 0.4 > results["planted success without control"]
    summary = pd.read_csv(tmp_path / "summary.csv")
    plain = summary[(summary["method"] == "Backpack") & (summary["fluency"] == "temperature 1")]
    assert plain["success"].is_monotonic_increasing and list(plain["strength"]) == [0, 1, 2, 3]
    assert {file.name for file in tmp_path.iterdir()} >= {
        "topics.csv",
        "turned_up.csv",
        "annealing.csv",
        "response.csv",
    }
    texts = {file: file.stat().st_mtime_ns for file in (tmp_path / "texts").iterdir()}
    next(iter(texts)).unlink()  # as if the run had been killed before this one
    again = run_notebook("03_topic_control", {"model": "planted", "out": str(tmp_path)})
    assert not again.failed and pd.read_csv(tmp_path / "summary.csv").equals(summary)
    kept = [file for file, written in texts.items() if file.stat().st_mtime_ns == written]
    assert len(kept) == len(texts) - 1


def test_topic_control_with_a_judge_a_beginning_and_words_of_ones_own(planted_run, tmp_path):
    pytest.importorskip("mauve")
    tiny_classifier(tmp_path / "judge", {0: "music", 1: "law"}, bias=[9.0, -9.0])
    (tmp_path / "own.txt").write_text("\n\n".join(text.text for text in planted.generate(300)))
    given = {"model": "planted", "topics": ["music", "law"], "strengths": [2], "words": "prison bridge", "samples": 4}
    given |= {"judge": str(tmp_path / "judge"), "reference": str(tmp_path / "own.txt"), "prompt": "At the"}
    outcome = run_notebook("03_topic_control", given | {"out": str(tmp_path / "out")})
    assert not outcome.failed, outcome.result
    topics = pd.read_csv(tmp_path / "out" / "topics.csv").set_index("topic")
    assert (topics.loc["music", "on topic"] == topics.loc["music", "texts"]).all()
    assert not topics.loc["law", "on topic"].any()
    assert pd.read_csv(tmp_path / "out" / "summary.csv")["MAUVE"].between(0, 1).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"topic": "weather"}, "['weather'] are no topics here; there are ['arts & culture'"),
        ({"strengths": [1, 7]}, "strength=7 is not in the table; choose one of 0, 1, 2, 3"),
        ({"prompt": "the film " * 300}, "leaves no room for 50 tokens"),
        ({"samples": 0}, "samples=0 should be at least 1"),
    ],
)
def test_topic_control_says_what_is_wrong_before_it_starts(given, message, tmp_path):
    outcome = run_notebook("03_topic_control", given | {"out": str(tmp_path)})
    assert outcome.failed and message in outcome.result


def test_the_stored_tables_of_topic_control_are_of_the_demo_models_and_hold_what_they_should():
    folder = ROOT / "data" / "demo" / "topic_control"
    summary, topics = (pd.read_csv(folder / f"{name}.csv") for name in ("summary", "topics"))
    models = summary.groupby("method")["model"].first()
    assert models["Backpack"] == fingerprint(load("demo")[0]), "run: make topic-control"
    assert models["PPLM"] == fingerprint(load("demo-transformer")[0])
    assert topics["topic"].nunique() == 17
    keys = ["method", "strength", "fluency"]
    rows = topics.set_index(keys)
    for row in summary.to_dict("records"):
        mine, none = (rows.loc[(row["method"], strength, row["fluency"])] for strength in (row["strength"], 0))
        for name, value in success(mine, none).items():
            assert row[name] == pytest.approx(value), (row["method"], row["strength"], name)
