"""Notebooks under other parameters than their own, and their exercises."""

import copy
import json
import re

import nbformat
import pandas as pd
import pytest
import torch
from helpers import ROOT, tiny_classifier

from backpack_lib import SenseEdits, bias, load, planted, sweeps
from backpack_lib.lexical import SETS
from backpack_lib.loading import is_planted
from backpack_lib.running import run_notebook
from backpack_lib.texts import ids_of_text

FOLD = re.compile(r"<details><summary>Solution</summary>.*?```python\n(.*?)```.*?</details>", re.S)


@pytest.fixture(scope="session")
def planted_run():
    """01_training as it stands, in the tests' own folder for runs; it goes on from what is there."""
    outcome = run_notebook("01_training")
    assert not outcome.failed, outcome.result
    return outcome


def test_senses_of_the_trained_backpack_hold_the_planted_meanings(planted_run, tmp_path):
    for name, senses in (("planted", 8), ("planted-transformer", 0)):
        assert getattr(load(name)[0].config, "num_senses", 0) == senses and is_planted(name)
    folder = next(planted_run.copy.parent.glob("backpack-*")) / "model"
    for number, name in enumerate(("planted", str(folder))):
        outcome = run_notebook("02_senses", {"model": name, "out": str(tmp_path / str(number))})
        assert not outcome.failed, outcome.result
        results = json.loads((tmp_path / str(number) / "results.json").read_text())
        assert results["planted meanings found"] > 0.9 and results["residual"] < 1e-4
        assert f"planted meanings found {results['planted meanings found']:.0%}" in outcome.result


def test_senses_with_words_texts_and_sets_of_ones_own(tmp_path):
    pairs = [("king", "queen", 8), ("film", "movie", 9), ("river", "film", 1), ("music", "band", 7), ("city", "war", 2)]
    pairs = [(a, b, score + number / 10) for number in range(6) for a, b, score in pairs]
    pd.DataFrame(pairs).to_csv(tmp_path / SETS["RG-65"].file, sep=";", header=False, index=False)
    (tmp_path / "own.txt").write_text("The king and his wife moved to the city of London.\n\n" * 40)
    given = {"word": "king", "other": "queen", "text": "The king and his", "lexsim": str(tmp_path)}
    given |= {"corpus": str(tmp_path / "own.txt"), "out": str(tmp_path / "out")}
    outcome = run_notebook("02_senses", given)
    assert not outcome.failed, outcome.result
    made = {file.name for file in (tmp_path / "out").iterdir()}
    assert made >= {"contributions.csv", "silenced.csv", "roles.csv", "similarity.csv", "edits.safetensors"}
    assert (
        pd.read_csv(tmp_path / "out" / "similarity.csv").shape[0] == 2
    )  # the Backpack and its Transformer, on one set


def test_without_a_trained_model_or_with_an_unknown_word_the_notebook_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKPACK_RUNS", str(tmp_path))
    outcome = run_notebook("02_senses", {"model": "planted"})
    assert outcome.failed and "run the notebook 01_training first" in outcome.result
    outcome = run_notebook("02_senses", {"word": "…"})
    assert outcome.failed and "'…' is no word" in outcome.result


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
    assert models["Backpack"] == sweeps.fingerprint(load("demo")[0]), "run: make topic-control"
    assert models["PPLM"] == sweeps.fingerprint(load("demo-transformer")[0])
    assert topics["topic"].nunique() == 17
    keys = ["method", "strength", "fluency"]
    rows = topics.set_index(keys)
    for row in summary.to_dict("records"):
        mine, none = (rows.loc[(row["method"], strength, row["fluency"])] for strength in (row["strength"], 0))
        for name, value in sweeps.success(mine, none).items():
            assert row[name] == pytest.approx(value), (row["method"], row["strength"], name)


def test_the_bias_search_finds_what_was_planted_and_the_edit_takes_it_away(planted_run, tmp_path):
    outcome = run_notebook("04_gender_bias", {"model": "planted", "out": str(tmp_path)})
    assert not outcome.failed, outcome.result
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["rho"] >= 0.9 and results["p"] < 0.01 and results["share"] >= 0.9
    # What other words of a template carry is left, whichever senses of the profession are removed.
    assert results["excess removed, removed"] > max(0.9, results["excess removed, all senses"] - 0.02)
    assert results["ratio, levelled"] < 1.3  # without what differs between professions
    assert results["rise of the loss, removed, %"] < 1
    assert results["excess removed, held-out professions"] > 0.8
    made = {file.name for file in tmp_path.iterdir()}
    assert made >= {"professions.csv", "localization.csv", "held_out.csv", "scales.csv", "loss.csv", "moved_words.csv"}
    localization = pd.read_csv(tmp_path / "localization.csv", index_col="sense")
    assert localization["share"].sum() + results["elsewhere"] == pytest.approx(1)
    model, tokenizer = load("planted")
    words, templates = ["nurse", "guard"], ["At the farm, the {profession} hopes that"]
    before = bias.bias_ratio(model, tokenizer, words, templates)
    with SenseEdits.load(tmp_path / "debiased.safetensors", model, tokenizer).applied():
        assert bias.bias_ratio(model, tokenizer, words, templates) < before


def own_prompts(folder, **changes):
    """A file of templates that can be changed to be wrong."""
    english = {
        "fit": ["The {profession} said that", "When the {profession} came,"],
        "test": ["If the {profession} is late,"],
    }
    english |= {"by definition": {"he": ["The king said that"], "she": []}, "other pairs": []} | changes
    (folder / "own.json").write_text(json.dumps({"english": english}))
    return str(folder / "own.json")


def test_bias_of_another_pair_with_professions_and_templates_of_ones_own(tmp_path):
    given = {"pair": ["he", "they"], "professions": ["nurse", "guard", "construction worker", "teacher", "cook"]}
    given |= {"prompts": own_prompts(tmp_path), "wanted": 0.5, "out": str(tmp_path / "out")}
    outcome = run_notebook("04_gender_bias", given)
    assert not outcome.failed, outcome.result
    model, tokenizer = load("demo")
    measured = pd.read_csv(tmp_path / "out" / "professions.csv", index_col="profession")["log-odds"]
    template = "If the {profession} is late,"
    for name, value in measured.items():
        ids = torch.tensor([ids_of_text(tokenizer, template.replace("{profession}", name))])
        log_probs = model(ids).logits[0, -1].log_softmax(-1)
        he, they = (tokenizer(" " + word)["input_ids"][0] for word in ("he", "they"))
        assert value == pytest.approx((log_probs[he] - log_probs[they]).item(), abs=1e-3)
    assert len(measured) == 5


@pytest.mark.parametrize(
    ("given", "prompts", "message"),
    [
        ({"professions": ["nurse", "guard", "日本"]}, {}, "The vocabulary lacks the word '日本'"),
        ({}, {"fit": ["The nurse said that"]}, "The template 'The nurse said that' has no slot"),
        ({}, {"test": []}, "There is no template for testing"),
    ],
)
def test_the_bias_notebook_says_what_is_wrong(given, prompts, message, tmp_path):
    given = given | {"prompts": own_prompts(tmp_path, **prompts), "out": str(tmp_path / "out")}
    outcome = run_notebook("04_gender_bias", given)
    assert outcome.failed and message in outcome.result


def test_the_stored_losses_of_debiasing_are_of_the_demo_model():
    loss = pd.read_csv(ROOT / "data" / "demo" / "gender_bias" / "loss.csv", index_col="method")
    assert set(loss["model"]) == {sweeps.fingerprint(load("demo")[0])}, "run: make gender-bias"
    assert loss.loc["as it is", "rise, %"] == 0 and "removed, along" in loss.index


def folded_solutions(notebook):
    found = [FOLD.search(cell.source) for cell in notebook.cells if cell.cell_type == "markdown"]
    return [solution[1] for solution in found if solution]


def exercise_cells(notebook):
    """The code cells in which a reader answers."""
    return [c for c in notebook.cells if c.cell_type == "code" and re.search(r"^check_\d\(", c.source, re.M)]


NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
SHORT = {
    "03_topic_control": {"topics": ["music"], "strengths": [2], "samples": 2, "tokens": 16},
    "04_gender_bias": {"professions": ["nurse", "guard", "teacher", "cook", "writer", "farmer"]},
}
WITH_EXERCISES = [name for name, notebook in NOTEBOOKS.items() if folded_solutions(notebook)]


@pytest.mark.parametrize("name", WITH_EXERCISES)
def test_exercises_say_what_is_missing_and_accept_their_solutions(name, planted_run, tmp_path, monkeypatch):
    notebook = copy.deepcopy(NOTEBOOKS[name])
    solutions, cells = folded_solutions(notebook), exercise_cells(notebook)
    assert len(solutions) == len(cells) >= 2
    for cell, solution in zip(cells, solutions):
        assert "Not yet" in cell.outputs[0]["data"]["text/plain"]
        cell.source, emptied = re.subn(r"^answer_\d = None\n", lambda _: solution, cell.source)
        assert emptied == 1
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.setenv("BACKPACK_NOTEBOOKS", str(tmp_path / "notebooks"))
    # 01 finds the models that it has trained already.
    given = {} if name == "01_training" else {"out": str(tmp_path / "out")}
    outcome = run_notebook(name, given | SHORT.get(name, {}))
    assert not outcome.failed, outcome.result
    answers = [c.outputs[0]["data"]["text/plain"] for c in exercise_cells(nbformat.read(outcome.copy, as_version=4))]
    assert all(answer[1:].startswith("Right") for answer in answers), answers
