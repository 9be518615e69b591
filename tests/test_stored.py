"""What is stored or shipped is of the models that are here, and a row of it is what the code gives."""

import pandas as pd
import pytest
from helpers import ROOT

from backpack_lib import load
from backpack_lib.analysis.knowledge import margins, project, read_facts
from backpack_lib.analysis.matching import compare_models
from backpack_lib.lessons.reading import professions_and_templates, small_models, stored_table, words_to_compare
from backpack_lib.lessons.topics import stored_texts
from backpack_lib.loading import fingerprint, is_planted, load_baseline
from backpack_lib.studies.reading_study import gender_table
from backpack_lib.studies.topic_study import at_equal_fluency, settings_table


def test_the_stored_texts_of_topic_control_are_of_the_demo_models_on_all_topics():
    stored = pd.read_csv(ROOT / "data" / "demo" / "topic_control" / "texts.csv.gz")
    models = stored.groupby("method")["model"].unique()
    assert list(models["Backpack"]) == [fingerprint(load("demo")[0])], "run: make topic-control"
    assert list(models["PPLM"]) == [fingerprint(load("demo-transformer")[0])]
    assert stored["topic"].nunique() == 17
    fair = at_equal_fluency(settings_table(stored))
    assert set(fair["strength"]) == {0, 1, 2, 3, 0.1, 0.3} and (fair["reached"] | (fair["why"] != "")).all()


def test_a_run_of_named_topics_or_of_another_model_speaks_of_its_own_texts():
    models = {"Backpack": fingerprint(load("demo")[0]), "PPLM": fingerprint(load("demo-transformer")[0])}
    own = pd.DataFrame({"method": [*models], "model": [*models.values()], "topic": "music"})
    assert stored_texts("demo", [], own)["topic"].nunique() == 17
    assert stored_texts("demo", ["music"], own) is own and stored_texts("planted", [], own) is own
    with pytest.raises(ValueError, match="written with other weights"):
        stored_texts("demo", [], own.assign(model="another"))


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
        assert set(stored_table(name)["weights"]) == {fingerprint(demo)}, "run: make reading"
    models, tokenizer = small_models()
    tokens, among = words_to_compare(tokenizer)
    found = compare_models(models["seed-0"], models["seed-1"], tokens, among)
    row = stored_table("seeds").query("what == 'senses' and one == 'seed-0' and other == 'seed-1'").iloc[0]
    assert found["matched"] == pytest.approx(row["matched"], abs=2e-3)
    gender = gender_table(
        models, tokenizer, *professions_and_templates(), {("seed-0", "seed-1"): found["partners"]}
    ).iloc[0]
    stored = stored_table("gender").query("one == 'seed-0' and other == 'seed-1'").iloc[0]
    assert (
        gender[["sense", "other sense", "partners"]].tolist() == stored[["sense", "other sense", "partners"]].tolist()
    )
    assert gender["share"] == pytest.approx(stored["share"], abs=2e-2)
    trained = stored_table("bigrams_over_training")
    assert trained["step"].is_monotonic_increasing and set(stored_table("senses")["senses"]) == {0, 1, 4, 16}


def test_planted_models_are_shipped_for_whoever_has_not_trained_them(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKPACK_RUNS", str(tmp_path))
    (model, tokenizer), (transformer, _) = load("planted"), load("planted-transformer")
    assert is_planted("planted") and model.config.num_senses == 8 and len(tokenizer) == transformer.config.vocab_size
    assert fingerprint(load_baseline("planted")[0]) == fingerprint(transformer)
