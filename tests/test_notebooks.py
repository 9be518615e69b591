"""Every notebook under other parameters than its own: planted text, exercises solved, words of one's own.

All run in this process: the same cells in the same order, without the seconds that a kernel takes. (As a reader runs
them, with kernels, nbval runs them.)
"""

import json

import nbformat
import pandas as pd
import pytest
import torch
from executing import CHECK, NOTEBOOKS, execute, folded_solutions, results_of
from helpers import ROOT, tiny_classifier, tiny_model, tokenizer_with_words

from backpack_lib import SenseEdits, load, loading
from backpack_lib.analysis import bias
from backpack_lib.lessons.opening import Lesson
from backpack_lib.text import planted
from backpack_lib.text.writing import ids_of_text

# ---------------------------------------------------------------- exercises, and the models that 01 trained


def assert_solved(answers: list[str], at_least: int = 2):
    assert len(answers) >= at_least and all(answer.startswith("Right") for answer in answers), answers


@pytest.mark.parametrize("name", [n for n in NOTEBOOKS if folded_solutions(nbformat.read(NOTEBOOKS[n], as_version=4))])
def test_empty_exercises_say_what_is_missing(name):
    cells = [cell for cell in nbformat.read(NOTEBOOKS[name], as_version=4).cells if cell.cell_type == "code"]
    cells = [cell for cell in cells if CHECK.search(cell.source)]
    assert len(cells) == len(folded_solutions(nbformat.read(NOTEBOOKS[name], as_version=4))) >= 2
    assert all("Not yet" in cell.outputs[0]["data"]["text/plain"] for cell in cells)


@pytest.fixture
def without_smollm2(tmp_path, monkeypatch):
    """As where it is not installed: nbval reads it, and unpacking it takes half a minute."""
    monkeypatch.setattr(loading, "SMOLLM2_PACKAGE", "not_installed")
    monkeypatch.setenv("BACKPACK_CACHE", str(tmp_path / "cache"))


def test_the_tour_and_its_exercises(without_smollm2, tmp_path, capsys):
    assert_solved(execute("00_tour", {"model": "planted", "out": str(tmp_path)}, solved=True).answers, 4)
    results = results_of(tmp_path)
    assert results["rounding"] < 1e-3 and results["p after the edit"] != results["p"]
    assert "So this page shows the lens on the demo's Transformer (demo-lens)." in capsys.readouterr().out


def test_training_and_its_exercises(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKPACK_RUNS", str(tmp_path))
    short = {"n_layer": 1, "num_senses": 4, "optimizer": "muon", "learning_rate": 0.02, "steps": 120, "warmup": 20}
    short |= {"eval_every": 60, "save_every": 60, "eval_blocks": 64, "strict": False}
    taught = {"start": "planted", "corpus": str(ROOT / "README.md"), "finetune_steps": 20}
    assert_solved(execute("01_training", short | taught, solved=True).answers, 6)
    results = results_of(tmp_path / "01_training")
    assert results["excess"] < 0.2 and results["meanings"] > 0.9
    assert results["professions"] > 0.4  # so short a run has only begun to rank them; 0.34 is the 95 % point of chance
    assert results["meanings, Backpack, meanings permuted (mean)"] < 0.6
    assert results["finetuning, new text"] < 0 < results["finetuning, old text"]


def test_contexts_decide_between_planted_meanings_and_the_exercises_on_senses_are_solved(tmp_path):
    assert_solved(execute("02_senses", {"model": "planted", "out": str(tmp_path)}, solved=True).answers, 6)
    results = results_of(tmp_path)
    assert results["rounding"] < 1e-4 and results["ambiguous words"] == 18
    assert results["effect of context"] > 5 > abs(results["by the word's own senses"])
    methods = pd.read_csv(tmp_path / "substitutes.csv", index_col=0)
    exact, gradient = methods.loc["contributions (exact)"], methods.loc["Transformer: gradient × input"]
    assert exact["largest"] > 0.9 > 0.5 > gradient["largest"] and exact["low"] > gradient["high"]


def test_control_reaches_planted_topics_and_the_exercises_on_topics_are_solved(tmp_path):
    given = {"model": "planted", "topics": ["music", "law", "money"], "strengths": [], "pplm_steps": [0.3]}
    given |= {"samples": 16, "tokens": 40, "trials": 2, "out": str(tmp_path)}
    assert_solved(execute("03_topic_control", given, solved=True).answers, 5)
    live = pd.read_csv(tmp_path / "live.csv").set_index(["method", "strength"])["success"]
    # Three topics are announced, of which one is the text's own.
    assert live["Backpack", 2].max() > 0.5 > 0.4 > live["Backpack", 0].max()


def test_the_bias_search_finds_what_was_planted_and_the_edit_takes_it_away(tmp_path):
    assert_solved(execute("04_gender_bias", {"model": "planted", "out": str(tmp_path)}, solved=True).answers, 5)
    results = results_of(tmp_path)
    assert results["rho"] >= 0.9 and results["p"] < 0.01 and results["share"] >= 0.9
    methods = pd.read_csv(tmp_path / "methods.csv", index_col="method")
    assert methods.loc["removed", "spread"] < 0.05 * methods.loc["as it is", "spread"]
    removed = methods["excess removed"]
    # What other words of a template carry is left, whichever senses of the profession are removed.
    assert removed["removed"] > removed["all senses removed"] - 0.02 and removed["removed"] > 0.8
    assert removed["removed"] > removed["random senses removed"] + 0.1
    assert abs(removed["offset"]) < 0.1  # the planted professions share no lean
    assert results["rise of the loss, %"] < 1 and results["by definition, largest loss"] == 0
    assert results["excess removed, held-out professions"] > 0.8 and results["excess removed, unseen words"] > 0.8
    localization = pd.read_csv(tmp_path / "localization.csv", index_col="sense")
    assert localization["share"].sum() + results["elsewhere"] == pytest.approx(1)
    model, tokenizer = load("planted")
    words, templates = ["nurse", "guard"], ["At the farm, the {profession} hopes that"]
    before = bias.ratio(bias.log_odds(model, tokenizer, words, templates))
    with SenseEdits.load(tmp_path / "debiased.safetensors", model, tokenizer).applied():
        assert bias.ratio(bias.log_odds(model, tokenizer, words, templates)) < before


def test_planted_facts_are_edited_and_taught_and_the_exercises_are_solved(tmp_path):
    given = {"model": "planted", "out": str(tmp_path), "facts_measured": 2, "finetune_facts": True}
    assert_solved(execute("05_knowledge", given, solved=True).answers, 5)
    results = results_of(tmp_path)
    assert results["facts known"] >= 28 and results["largest error of the prediction"] < 1e-3
    assert results["efficacy, dosed"] == 1 and results["paraphrases, dosed"] > 0.9
    assert results["efficacy, one at a time, predicted"] == results["efficacy, twenty at once"]
    assert results["new facts, Backpack, senses"] > 0.9 > 0.1 > results["new facts elsewhere, Backpack, senses"]


def test_planted_senses_are_read_and_the_exercises_are_solved(tmp_path):
    given = {"model": "planted", "out": str(tmp_path), "numbers": [1, 10, 30], "steps": 100}
    assert_solved(execute("06_reading", given, solved=True).answers, 5)
    results = results_of(tmp_path)
    assert results["all senses, 30 words"] > 0.5 > results["all senses, mean sense"]
    assert results["all senses, 30 words"] > results["all senses, another word's words"]
    assert results["loss, counted bigrams"] > results["loss, model"]
    assert 0 <= results["place moves the weights most, k = 8, seed 1"] <= 1
    assert results["matched, planted text"] > results["null, planted text"]


def test_a_lens_explains_its_transformer_and_the_exercises_are_solved(tmp_path):
    assert_solved(execute("07_lens", {"model": "demo-lens", "out": str(tmp_path)}, solved=True).answers, 4)
    results = results_of(tmp_path)
    bits = {name: results[f"bits per byte, {name}"] for name in ("Transformer", "senses", "one prediction")}
    assert bits["Transformer"] < bits["senses"] < bits["one prediction"] < results["bits per byte, dealt senses"]
    assert results["variance explained, senses"] > 0.8 > 0.5 > results["variance explained, dealt senses"]
    assert results["error of the prediction"] < 1e-5 and results["fact, after"] > results["fact, before"]
    relations = pd.read_csv(tmp_path / "relations.csv", index_col=0)
    assert (relations["AUC"] > relations["null, 95 %"]).all() and (relations["p"] < 0.01).all()


# ---------------------------------------------------------------- a model that nobody has a Transformer for


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A small random Backpack in the released format, with a vocabulary of its own."""
    folder = tmp_path_factory.mktemp("released")
    words = "film movie screenwriting time money family music driver nurse he she her his him man woman sports".split()
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "data" / "README.md")]
    tokenizer = tokenizer_with_words([*texts, " ".join(words)], 1200, words)
    model = tiny_model(vocab_size=len(tokenizer) + 8, n_positions=128, num_senses=16, n_embd=32, initializer_range=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "gpt2", "auto_map": {"AutoModelForCausalLM": "nowhere.Backpack"}}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


RELEASED = {
    "00_tour": {},
    "04_gender_bias": {
        "professions": ["nurse", "driver", "sports", "man", "construction worker", "cook"],
        "profession": "driver",
    },
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_model_of_another_vocabulary_goes_through_without_a_transformer(
    name, released, without_smollm2, tmp_path, capsys
):
    execute(name, RELEASED[name] | {"model": released, "out": str(tmp_path)})
    assert results_of(tmp_path)["headline"]
    no_transformer = f"No Transformer that belongs to {released!r} is known; name one by the parameter `baseline`."
    assert name == "00_tour" or no_transformer in capsys.readouterr().out


def test_a_transformer_of_another_vocabulary_is_refused(released, tmp_path):
    given = {"model": released, "baseline": "demo-transformer", "out": str(tmp_path)}
    with pytest.raises(ValueError, match="baseline='demo-transformer' reads other tokens than"):
        execute("04_gender_bias", given)


# ---------------------------------------------------------------- words, texts and files of one's own


@pytest.mark.slow
def test_senses_with_words_texts_and_sets_of_ones_own(tmp_path):
    pairs = [("king", "queen", 8), ("film", "movie", 9), ("river", "film", 1), ("music", "band", 7), ("city", "war", 2)]
    pairs = [(a, b, score + number / 10) for number in range(6) for a, b, score in pairs]
    pd.DataFrame(pairs).to_csv(tmp_path / "RG65.csv", sep=";", header=False, index=False)
    (tmp_path / "own.txt").write_text("The king and his wife moved to the city of London.\n\n" * 40)
    given = {"word": "king", "other": "queen", "text": "The king and his", "lexsim": str(tmp_path)}
    execute("02_senses", given | {"corpus": str(tmp_path / "own.txt"), "out": str(tmp_path / "out")})
    made = {file.name for file in (tmp_path / "out").iterdir()}
    assert made >= {"contributions.csv", "silenced.csv", "roles.csv", "similarity.csv", "edits.safetensors"}
    found = pd.read_csv(tmp_path / "out" / "similarity.csv")
    assert len(found) == 3  # the Backpack, its input embedding, and its Transformer, on one set
    # Two others, on the set and on the mean.
    assert len(pd.read_csv(tmp_path / "out" / "similarity_differences.csv")) == 4


@pytest.mark.slow
def test_topic_control_with_a_judge_a_beginning_and_words_of_ones_own(tmp_path):
    pytest.importorskip("mauve")
    tiny_classifier(tmp_path / "judge", {0: "music", 1: "law"}, bias=[9.0, -9.0])
    (tmp_path / "own.txt").write_text("\n\n".join(text.text for text in planted.generate(300)))
    given = {
        "model": "planted",
        "topics": ["music", "law"],
        "strengths": [2],
        "words": "prison bridge",
        "samples": 4,
        "trials": 2,
    }
    given |= {"judge": str(tmp_path / "judge"), "reference": str(tmp_path / "own.txt"), "prompt": "At the"}
    execute("03_topic_control", given | {"out": str(tmp_path / "out")})
    texts = pd.read_csv(tmp_path / "out" / "texts.csv.gz")
    assert (
        texts.loc[texts["topic"] == "music", "on topic"].all()
        and not texts.loc[texts["topic"] == "law", "on topic"].any()
    )
    assert pd.read_csv(tmp_path / "out" / "equal_fluency.csv")["MAUVE"].between(0, 1).all()


def own_prompts(folder, **changes) -> str:
    """A file of templates that can be changed to be wrong."""
    english = {
        "fit": ["The {profession} said that", "When the {profession} came,"],
        "test": ["If the {profession} is late,"],
    }
    english |= {"by definition": {"he": ["The king said that"], "she": []}, "other pairs": []} | changes
    (folder / "own.json").write_text(json.dumps({"english": english}))
    return str(folder / "own.json")


@pytest.mark.slow
def test_bias_of_another_pair_with_professions_and_templates_of_ones_own(tmp_path, monkeypatch):
    given = {"pair": ["he", "they"], "professions": ["nurse", "guard", "construction worker", "teacher", "cook"]}
    given |= {"prompts": own_prompts(tmp_path), "wanted": 0.5, "out": str(tmp_path / "out")}
    monkeypatch.setattr(Lesson, "stored", None)  # with text of one's own, nothing stored is asked for
    execute("04_gender_bias", given | {"reference": str(ROOT / "README.md")})
    model, tokenizer = load("demo")
    measured = pd.read_csv(tmp_path / "out" / "professions.csv", index_col="profession")["log-odds"]
    template = "If the {profession} is late,"
    for name, value in measured.items():
        ids = torch.tensor([ids_of_text(tokenizer, template.replace("{profession}", name))])
        log_probs = model(ids).logits[0, -1].log_softmax(-1)
        he, they = (tokenizer(" " + word)["input_ids"][0] for word in ("he", "they"))
        assert value == pytest.approx((log_probs[he] - log_probs[they]).item(), abs=1e-3)
    assert len(measured) == 5
