"""04_gender_bias under other parameters than its own, and its stored table."""

import json

import pandas as pd
import pytest
import torch
from helpers import ROOT

from backpack_lib import SenseEdits, load
from backpack_lib.analysis import bias
from backpack_lib.loading import fingerprint
from backpack_lib.running.notebook import run_notebook
from backpack_lib.text.writing import ids_of_text


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
    given |= {"reference": str(ROOT / "README.md")}
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
    assert set(loss["model"]) == {fingerprint(load("demo")[0])}, "run: make gender-bias"
    assert loss.loc["as it is", "rise, %"] == 0 and "removed, along" in loss.index
