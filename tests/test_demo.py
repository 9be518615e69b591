"""How the demo models are made and measured, in small; and what is shipped."""

import importlib
import json
import shutil
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from helpers import ROOT
from safetensors import safe_open
from transformers import GPT2LMHeadModel

from backpack_lib import BackpackLMHeadModel, TrainingConfig, load
from backpack_lib.analysis import roles
from backpack_lib.analysis.scores import bits_per_byte
from backpack_lib.loading import fingerprint
from backpack_lib.text import planted
from backpack_lib.text.corpora import open_corpus
from backpack_lib.text.words import tokens_of_word

DEMO = ROOT / "data" / "demo"


@pytest.fixture
def scripts(monkeypatch):
    """The scripts beside the demo models, as modules."""
    monkeypatch.syspath_prepend(str(DEMO))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names = ("make", "cards", "evaluate")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name)


# ---------------------------------------------------------------- in small


TINY = """
both: {n_layer: 1, n_head: 2, n_embd: 16, num_senses: 2, vocab_size: 6000, block_size: 32, batch_size: 4,
       warmup: 1, eval_every: 4, eval_blocks: 4, learning_rate: 3.0e-3}
cpu:
  older: {steps: 8, optimizer: muon, schedule: wsd}
  plain: {steps: 4}
"""


@pytest.fixture
def make_small(scripts, tmp_path, monkeypatch):
    """Trains both models on planted texts by a recipe of seconds, into a demo folder of its own, which it returns."""
    folder = tmp_path / "data" / "demo"
    ignored = shutil.ignore_patterns(
        "backpack", "transformer", "__pycache__", "gender_bias", "knowledge", "topic_control"
    )
    shutil.copytree(DEMO, folder, ignore=ignored)
    for name in ("professions.csv", "topics.json", "prompts.json"):
        shutil.copy(ROOT / "data" / name, folder.parent)
    (folder / "recipe.yaml").write_text(TINY)
    (folder / "failures.csv").write_text('prompt,failure\nThe nurse,"It is small, and it shows."\n')
    for module in (scripts.make, scripts.cards, scripts.evaluate):
        monkeypatch.setattr(module, "HERE", folder)
    written = [text.text for text in planted.generate(1000)]
    for name, part in (("older", written[:550]), ("plain", written[550:850]), ("valid", written[850:])):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(part))
    texts = {name: (str(tmp_path / f"{name}.txt"), str(tmp_path / "valid.txt")) for name in ("older", "plain")}

    def make():
        scripts.make.make_demo(texts, tmp_path / "runs", "cpu")
        return folder

    return make


def test_making_trains_both_on_one_text_after_the_other_and_exports_half_precision(scripts, make_small, tmp_path):
    folder = make_small()
    for architecture, kind in (("backpack", BackpackLMHeadModel), ("transformer", GPT2LMHeadModel)):
        model, tokenizer = load(folder / architecture)
        assert isinstance(model, kind)
        assert all(len(tokens_of_word(tokenizer, word)) == 1 for word in scripts.make.studied_words())
        with safe_open(folder / architecture / "model.safetensors", "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
        runs = tmp_path / "runs" / architecture
        trained, _ = load(runs / "plain" / "model")
        for name, p in trained.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), p, atol=1e-4, rtol=1e-3)
        settings = json.loads((runs / "plain" / "settings.json").read_text())
        assert settings["init_from"] == str(runs / "older-exported")
        history = pd.read_csv(folder / architecture / "history.csv")
        assert list(zip(history["text"], history["step"])) == [("older", 4), ("older", 8), ("plain", 4)]
        read = scripts.evaluate.training_of(architecture)
        assert read["tokens_of"] == {"older": 8 * 4 * 32, "plain": 4 * 4 * 32} and read["tokens_seen"] == 12 * 4 * 32
        assert read["hours"] == pytest.approx((4 * 4 * 32 / history["tokens_per_second"]).sum() / 3600)
    before = (folder / "backpack" / "model.safetensors").read_bytes()
    make_small()  # nothing is left to do
    assert (folder / "backpack" / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_the_evaluation_fills_the_file_and_the_cards(scripts, make_small, monkeypatch, tmp_path):
    folder = make_small()
    architecture_of = scripts.cards.ARCHITECTURE_OF
    small = {name: folder / architecture for name, architecture in architecture_of.items()}
    monkeypatch.setattr(scripts.evaluate, "load", lambda name, *_: load(small.get(name, name)))
    monkeypatch.setattr(scripts.evaluate, "SAMPLE_SETTINGS", {"max_new_tokens": 4})
    (tmp_path / "WS353.csv").write_text("Word 1,Word 2,Human\nnurse,doctor,8\nking,queen,9\nbank,river,2\ncar,cat,1\n")
    pair = {"sentence_good": "He sleeps.", "sentence_bad": "He sleep.", "UID": "agreement"}
    (tmp_path / "set.jsonl").write_text(json.dumps(pair) + "\n")
    arguments = ["--text", tmp_path / "valid.txt", "--lexsim", tmp_path, "--blimp", tmp_path]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), "--before", str(tmp_path / "runs")])
    scripts.evaluate.main()
    figures = json.loads((folder / "evaluation.json").read_text())
    texts = (tmp_path / "valid.txt").read_text().split("\n\n")
    for name, architecture in architecture_of.items():
        measured, before = figures["models"][name], figures["before"][name]
        earlier = load(tmp_path / "runs" / architecture / "older-exported")
        for of_model, loaded in ((measured, load(small[name])), (before, earlier)):
            assert of_model["bits_per_byte"] == pytest.approx(bits_per_byte(*loaded, texts), rel=1e-4)
            assert of_model["weights"] == fingerprint(loaded[0])
        assert set(measured["similarity"]) == {"WS-353"} and set(measured["blimp"]["by_set"]) == {"agreement"}
        card = (folder / architecture / "README.md").read_text()
        assert f"{measured['bits_per_byte']:.3f}" in card and "{" not in card
    assert set(figures["models"]["demo"]["roles"]["auc"]) >= {"next word", "words nearby", "related word"}


# ---------------------------------------------------------------- what the senses do


def test_persons_are_paired_with_every_pronoun_and_so_are_as_many_other_words(scripts, tokenizer):
    true, false = roles.persons_and_pronouns(tokenizer, ["nurse", "teacher", "no single token"])
    persons = {tokens_of_word(tokenizer, "nurse")[0], *tokens_of_word(tokenizer, "teacher")[:1]}
    assert set(true[:, 0]) <= persons and not set(false[:, 0]) & persons and len(true) == len(false)
    assert sorted(true[:, 1]) == sorted(false[:, 1])
    assert set(true[:, 1]) >= {tokens_of_word(tokenizer, word)[0] for word in ("he", "she")}


# ---------------------------------------------------------------- as shipped


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture(scope="module")
def baseline():
    return load("demo-transformer")


@pytest.fixture(scope="module")
def evaluation():
    return json.loads((DEMO / "evaluation.json").read_text())


def test_the_models_are_small_and_have_what_the_notebooks_need(demo, baseline, scripts):
    model, tokenizer = demo
    assert not [word for word in scripts.make.studied_words() if len(tokens_of_word(tokenizer, word)) > 1]
    assert sum(p.numel() for p in model.parameters()) <= 16e6
    assert model.config.num_senses == 16 and model.config.n_positions >= 256
    assert baseline[0].config.n_positions == model.config.n_positions and 15_000 <= len(tokenizer) <= 17_000
    assert tokenizer.get_vocab() == baseline[1].get_vocab()
    for folder, megabytes in (("backpack", 30), ("transformer", 20)):
        assert sum(file.stat().st_size for file in (DEMO / folder).iterdir()) <= megabytes * 1e6


def test_the_recipe_is_the_models(demo, baseline, scripts):
    for settings in (part for device in ("cpu", "cuda") for part in scripts.make.recipe(device).values()):
        TrainingConfig(corpus="x", out="x", **settings)
        for model, _ in (demo, baseline):
            for name in ("n_layer", "n_head", "n_embd", "vocab_size"):
                assert getattr(model.config, name) == settings[name]


def test_the_cards_say_what_the_evaluation_found(scripts, evaluation):
    for name, architecture in (("demo", "backpack"), ("demo-transformer", "transformer")):
        assert (DEMO / architecture / "README.md").read_text() == scripts.cards.card(evaluation, name)


def test_the_backpack_is_as_good_as_its_baseline_and_the_plain_text_made_both_better(evaluation):
    backpack, transformer = (evaluation["models"][name] for name in ("demo", "demo-transformer"))
    assert backpack["tokens_seen"] == transformer["tokens_seen"]
    assert backpack["bits_per_byte"] <= 1.01 * transformer["bits_per_byte"]
    for name, now in evaluation["models"].items():
        before = evaluation["before"][name]
        assert now["bits_per_byte"] < before["bits_per_byte"] and now["blimp"]["mean"] > before["blimp"]["mean"]


def test_the_evaluation_is_of_these_weights_and_prompts(demo, baseline, evaluation):
    prompts = (DEMO / "prompts.txt").read_text().splitlines()
    for name, (model, _) in (("demo", demo), ("demo-transformer", baseline)):
        measured = evaluation["models"][name]
        assert measured["weights"] == fingerprint(model), "run: make evaluate"
        assert all(map(str.startswith, measured["samples"], prompts)) and len(measured["samples"]) == len(prompts)


@pytest.mark.slow
def test_figures_of_the_evaluation_come_out_again(demo, evaluation, shared, scripts):
    """BLiMP's first sets, and bits per byte of a tenth of the text, since all of it takes minutes."""
    measured = evaluation["models"]["demo"]
    texts = list(open_corpus(str(shared / "corpus" / "simple-valid.txt.xz")).read())
    assert len(texts) == evaluation["text"]["documents"]
    assert bits_per_byte(*demo, texts[::10]) == pytest.approx(measured["bits_per_byte_of_a_tenth"], rel=1e-3)
    pairs = scripts.evaluate.read_blimp(str(shared / "blimp"))
    assert len(pairs) == evaluation["blimp_pairs"]
    first = pairs[pairs["UID"].isin(sorted(set(pairs["UID"]))[:8])]
    for uid, accuracy in scripts.evaluate.blimp_accuracy(*demo, first).items():
        assert accuracy == pytest.approx(measured["blimp"]["by_set"][uid], abs=0.011)  # a pair may be a tie
