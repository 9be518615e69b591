"""What is stored or shipped is of the models that are here, and a row of it is what the code gives."""

import runpy

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT

from backpack_lib import load
from backpack_lib.analysis.knowledge import margins, project, read_facts
from backpack_lib.analysis.matching import compare_models
from backpack_lib.lessons import lens as checks_of_lens
from backpack_lib.lessons.opening import open_lesson
from backpack_lib.lessons.reading import STORED, stored_table, words_to_compare
from backpack_lib.lessons.topics import stored_texts
from backpack_lib.loading import fingerprint, is_planted, load_baseline


def test_the_stored_texts_of_topic_control_are_of_the_demo_models_on_all_topics(tmp_path):
    lesson = open_lesson("03_topic_control", "demo", str(tmp_path))
    stored = stored_texts("demo", lesson)
    assert set(stored.loc[stored["method"] == "PPLM", "model"]) == {fingerprint(load("demo-transformer")[0])}
    sizes = stored.groupby(["method", "strength", "temperature"])["topic"].nunique()
    assert set(sizes) == {17} and set(stored["strength"]) == {0, 1, 2, 3, 0.1, 0.3}
    perplexity = stored.groupby(["method", "strength", "temperature"])[["nats", "tokens"]].sum()
    perplexity = np.exp(perplexity["nats"] / perplexity["tokens"]).groupby("method")
    gaps = (perplexity.transform(lambda p: p / p.xs(0.0, level="strength").iloc[0]) - 1).abs()
    assert (gaps.groupby(["method", "strength"]).min() <= 0.05).all()  # each method at equal fluency
    assert stored_texts("planted", lesson) is None
    with pytest.raises(ValueError, match="run: make topic-control"):
        stored_texts("demo", open_lesson("03_topic_control", "planted", str(tmp_path)))


def test_the_stored_losses_of_debiasing_are_of_the_demo_model():
    loss = pd.read_csv(ROOT / "data" / "demo" / "gender_bias" / "loss.csv", index_col="edit")
    assert set(loss["model"]) == {fingerprint(load("demo")[0])}, "run: make gender-bias"
    assert loss.loc["as it is", "rise, %"] == 0 and list(loss.index) == ["as it is", "removed"]


@pytest.mark.parametrize("name", ["facts", "taught"])
def test_the_stored_tables_of_knowledge_are_of_the_demo_model(name):
    stored = pd.read_csv(ROOT / "data" / "demo" / "knowledge" / f"{name}.csv.gz")
    assert set(stored["weights"]) == {fingerprint(load("demo")[0])}, "run: make knowledge"
    if name == "facts":
        assert stored.groupby(["model", "method"]).size().nunique() == 1  # all methods on the same facts
    else:
        assert {*stored["method"]} == {"as it is", "senses", "all weights", "LoRA"} and stored["set"].nunique() == 3


def test_what_planted_models_learn_of_moved_places_is_of_the_shipped_ones():
    stored = pd.read_csv(ROOT / "data" / "planted" / "new_facts.csv")
    assert {*stored["weights"]} == {fingerprint(load("planted")[0])}, "run: make knowledge"
    assert len(stored) == stored["place"].nunique() * 3 * 3  # numbers of examples, and methods


def test_a_stored_row_of_knowledge_is_what_the_code_gives():
    model, tokenizer = load("demo")
    stored = pd.read_csv(ROOT / "data" / "demo" / "knowledge" / "facts.csv.gz")
    row = stored[(stored["model"] == "Backpack") & (stored["method"] == "projection")].iloc[3]
    (fact,) = [f for f in read_facts() if (f.relation, f.subject) == (row["relation"], row["subject"])]
    with project(model, tokenizer, [fact]).applied():
        assert margins(model, tokenizer, fact, fact.test).mean() == pytest.approx(row["margin, test"], abs=2e-3)


def test_the_stored_tables_of_reading_are_of_these_models():
    demo = load("demo")[0]
    for name in ("explanations", "bigrams_of_demo"):
        assert set(pd.read_csv(STORED / f"{name}.csv")["weights"]) == {fingerprint(demo)}, "run: make reading"
    models = {name: load(STORED / name)[0] for name in ("seed-0", "seed-1")}
    tokenizer = load(STORED / "seed-0")[1]
    pairs, partners = compare_models(models, *words_to_compare(tokenizer))
    row = stored_table("seeds").query("what == 'senses' and one == 'seed-0' and other == 'seed-1'").iloc[0]
    assert pairs.loc[0, "matched"] == pytest.approx(row["matched"], abs=2e-3)
    make = runpy.run_path(str(STORED / "make.py"))
    (best,) = make["gender_of"](models, tokenizer, partners).to_dict("records")
    stored = stored_table("gender").query("one == 'seed-0' and other == 'seed-1'").iloc[0]
    assert all(best[name] == stored[name] for name in ("sense", "other sense", "partners"))
    assert best["share"] == pytest.approx(stored["share"], abs=2e-2)
    assert set(stored_table("senses")["senses"]) == {0, 1, 4, 16}


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
