"""What is stored or shipped is of the models that are here, and a row of it is what the code gives."""

import runpy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT

from backpack_lib import load
from backpack_lib.analysis.knowledge import margins, project, read_facts
from backpack_lib.analysis.matching import compare_models
from backpack_lib.lessons import lens as checks_of_lens
from backpack_lib.lessons.opening import open_lesson
from backpack_lib.lessons.reading import STORED, words_to_compare
from backpack_lib.loading import fingerprint, is_planted, load_baseline


def test_the_stored_texts_of_topic_control_are_of_the_demo_models_on_all_topics(tmp_path):
    lesson = open_lesson("03_topic_control", "demo", str(tmp_path))
    asked = "demo/topic_control/texts.csv.gz", "make topic-control", "model", "method == 'Backpack'"
    stored = lesson.stored(*asked)
    assert set(stored.loc[stored["method"] == "PPLM", "model"]) == {fingerprint(load("demo-transformer")[0])}
    sizes = stored.groupby(["method", "strength", "temperature"])["topic"].nunique()
    assert set(sizes) == {17} and set(stored["strength"]) == {0, 1, 2, 3, 0.1, 0.3}
    perplexity = stored.groupby(["method", "strength", "temperature"])[["nats", "tokens"]].sum()
    perplexity = np.exp(perplexity["nats"] / perplexity["tokens"]).groupby("method")
    gaps = (perplexity.transform(lambda p: p / p.xs(0.0, level="strength").iloc[0]) - 1).abs()
    assert (gaps.groupby(["method", "strength"]).min() <= 0.05).all()  # each method at equal fluency
    planted = open_lesson("03_topic_control", "planted", str(tmp_path))
    assert planted.stored(*asked) is None
    with pytest.raises(ValueError, match="run: make topic-control"):
        replace(planted, name="demo").stored(*asked)


MEASURED = [
    ("demo/gender_bias/loss.csv", "model", "demo", "gender-bias"),
    ("demo/knowledge/facts.csv.gz", "weights", "demo", "knowledge"),
    ("demo/knowledge/taught.csv.gz", "weights", "demo", "knowledge"),
    ("planted/new_facts.csv", "weights", "planted", "knowledge"),
    ("reading/explanations.csv", "weights", "demo", "reading"),
    ("reading/bigrams_of_demo.csv", "weights", "demo", "reading"),
]


@pytest.mark.parametrize("file, column, model, target", MEASURED)
def test_a_stored_table_is_of_the_model_that_is_shipped(file, column, model, target):
    assert set(pd.read_csv(ROOT / "data" / file)[column]) == {fingerprint(load(model)[0])}, f"run: make {target}"


def test_stored_tables_compare_all_methods_on_the_same():
    loss, facts, taught, new_facts = (pd.read_csv(ROOT / "data" / file) for file, *_ in MEASURED[:4])
    assert list(loss["edit"]) == ["as it is", "removed"] and loss.loc[0, "rise, %"] == 0
    assert facts.groupby(["model", "method"]).size().nunique() == 1
    assert {*taught["method"]} == {"as it is", "senses", "all weights", "LoRA"} and taught["set"].nunique() == 3
    assert len(new_facts) == new_facts["place"].nunique() * 3 * 3  # numbers of examples, and methods


def test_a_stored_row_of_knowledge_is_what_the_code_gives():
    model, tokenizer = load("demo")
    stored = pd.read_csv(ROOT / "data" / "demo" / "knowledge" / "facts.csv.gz")
    row = stored[(stored["model"] == "Backpack") & (stored["method"] == "projection")].iloc[3]
    (fact,) = [f for f in read_facts() if (f.relation, f.subject) == (row["relation"], row["subject"])]
    with project(model, tokenizer, [fact]).applied():
        assert margins(model, tokenizer, fact, fact.test).mean() == pytest.approx(row["margin, test"], abs=2e-3)


def test_the_stored_tables_of_reading_are_of_these_models():
    models = {name: load(STORED / name)[0] for name in ("seed-0", "seed-1")}
    tokenizer = load(STORED / "seed-0")[1]
    pairs, partners = compare_models(models, *words_to_compare(tokenizer))
    row = pd.read_csv(STORED / "seeds.csv").query("what == 'senses' and one == 'seed-0' and other == 'seed-1'").iloc[0]
    assert pairs.loc[0, "matched"] == pytest.approx(row["matched"], abs=2e-3)
    make = runpy.run_path(str(STORED / "make.py"))
    (best,) = make["gender_of"](models, tokenizer, partners).to_dict("records")
    stored = pd.read_csv(STORED / "gender.csv").query("one == 'seed-0' and other == 'seed-1'").iloc[0]
    assert all(best[name] == stored[name] for name in ("sense", "other sense", "partners"))
    assert best["share"] == pytest.approx(stored["share"], abs=2e-2)
    assert set(pd.read_csv(STORED / "senses.csv")["senses"]) == {0, 1, 4, 16}


@pytest.mark.parametrize("name", ["demo", "demo-lens", "smollm2-lens"])
def test_the_stored_answers_on_meanings_are_of_these_models(name):
    stored = checks_of_lens.stored(name, "wsd")
    assert len(stored) == 7253 and stored.index.is_unique
    assert 0.64 < stored["first meaning"].mean() < 0.66 and stored["chance"].mean() < 0.45
    try:
        model, _ = load(name)
    except ValueError:
        pytest.skip("SmolLM2 is not installed here")
    assert set(stored["weights"]) == {fingerprint(model)}, "run: make wsd"


def test_the_stored_texts_of_a_lens_are_paired_and_at_equal_fluency():
    stored = checks_of_lens.stored("smollm2-lens", "topics")
    of_setting = stored.groupby(["topic", "method", "strength"])
    assert set(of_setting.size()) == {16} and stored["topic"].nunique() == 5
    wanted = stored.loc[stored["method"] == "no control", "perplexity"].iloc[0]
    assert (np.log(of_setting["perplexity"].first() / wanted).abs() < 0.2).mean() > 0.9


def test_planted_models_are_a_pair():
    (model, tokenizer), (transformer, _) = load("planted"), load("planted-transformer")
    assert is_planted("planted") and model.config.num_senses == 8 and len(tokenizer) == transformer.config.vocab_size
    assert fingerprint(load_baseline("planted")[0]) == fingerprint(transformer)
