"""Editing facts: the projection, what it is known to do beforehand, and the study that counts benefit and cost."""

import numpy as np
import pandas as pd
import pytest
import torch

from backpack_lib.analysis import knowledge
from backpack_lib.analysis.knowledge import Fact, dose, known, margins, project, projected_input, read_facts, usable
from backpack_lib.files import data_folder
from backpack_lib.studies import knowledge_study
from backpack_lib.studies.knowledge_study import AS_IT_IS, DOSED, measure_facts
from backpack_lib.text import planted
from backpack_lib.text.writing import ids_of_text

PLANTED = read_facts(data_folder() / "planted" / "facts.csv", data_folder() / "planted" / "relations.yaml")


@pytest.fixture(scope="module")
def facts(models):
    return known(models[0], models[2], PLANTED)


def log_probs(model, tokenizer, text):
    with torch.no_grad():
        return model(torch.tensor([ids_of_text(tokenizer, text)])).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("facts", [read_facts(), PLANTED])
def test_every_fact_of_the_tables_is_complete(facts):
    assert len({(fact.relation, fact.subject) for fact in facts}) == len(facts) >= 32
    for fact in facts:
        assert len(fact.edit) == 2 and len(fact.test) == 3 and len(fact.neighbours) == 5 and len(fact.about) == 3
        assert len({fact.subject, fact.object, fact.counter}) == 3
        assert all(f" {fact.subject}" in text for text in fact.edit + fact.test + fact.about)
        assert not any(f" {fact.subject} " in f" {text} " for text in fact.neighbours)
        assert not any(word in text.split() for text in fact.edit + fact.test for word in (fact.object, fact.counter))


def test_effects_of_single_senses_sum_to_that_of_any_of_them_together(models, facts):
    model, _, tokenizer = models
    fact = facts[3]
    effects = knowledge.sense_effects(model, tokenizer, fact, fact.edit)
    plain = margins(model, tokenizer, fact, fact.edit)
    for senses in (None, [1, 4]):
        with project(model, tokenizer, [fact], senses).applied():
            after = margins(model, tokenizer, fact, fact.edit)
        expected = plain + (effects if senses is None else effects[:, senses]).sum(1)
        np.testing.assert_allclose(after, expected, atol=1e-3)


def test_the_transformers_baseline_changes_the_input_of_one_word_alone(models, facts):
    _, model, tokenizer = models
    x, r, a = knowledge.tokens_of_fact(tokenizer, facts[0])
    E = model.get_input_embeddings().weight.detach().clone()
    c = E[x] @ E[r] / (E[r] @ E[r])
    ids = torch.tensor([[x, r, a, 5]])
    with projected_input(model, tokenizer, facts[0], 1.5):
        edited = model.get_input_embeddings()(ids)[0]
        assert torch.equal(model.get_output_embeddings().weight, E)
    expected = E[ids[0]].clone()
    expected[0] += 1.5 * (c * E[a] * (E[r] @ E[r]) / (E[a] @ E[a]) - c * E[r])
    torch.testing.assert_close(edited, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.get_input_embeddings()(ids)[0], E[ids[0]])


def test_known_facts_are_those_on_which_the_model_is_right(models, facts):
    model, _, tokenizer = models
    assert len(facts) > 20  # the model has learnt which things a place has
    turned = [Fact(f.relation, f.subject, f.counter, f.object, f.edit, f.test) for f in facts]
    assert known(model, tokenizer, turned) == known(model, tokenizer, []) == []


# ---------------------------------------------------------------- the study


@pytest.fixture(scope="module")
def study(models, facts, tmp_path_factory):
    """The arguments of a small measurement."""
    general = [text.text for text in planted.generate(6, seed=9)]
    of = {"Backpack": models[0], "Transformer": models[1]}
    return of, models[2], facts[:2], general, tmp_path_factory.mktemp("study"), (0.001,)


@pytest.fixture(scope="module")
def rows(study):
    return measure_facts(*study)


def test_rows_are_what_the_edited_models_say(rows, models, facts):
    model, _, tokenizer = models
    assert len(rows) == 2 * (4 + 4)  # as it is and three edits of senses; as it is, two of the input, and finetuned
    fact = facts[1]
    row = rows[(rows["model"] == "Backpack") & (rows["method"] == DOSED) & (rows["subject"] == fact.subject)].iloc[0]
    plain = [log_probs(model, tokenizer, text) for text in fact.about]
    with project(model, tokenizer, [fact], strengths=[dose(model, tokenizer, fact)]).applied():
        test = margins(model, tokenizer, fact, fact.test)
        changed = [log_probs(model, tokenizer, text) for text in fact.about]
    assert row["paraphrases"] == pytest.approx((test > 0).mean())
    assert row["margin, test"] == pytest.approx(test.mean(), abs=1e-3)
    kl = np.mean([(p.exp() * (p - q)).sum().item() for p, q in zip(plain, changed)])
    assert row["about KL"] == pytest.approx(kl, abs=1e-4)
    assert row["neighbours unchanged"] == 1 and row["neighbours KL"] == pytest.approx(0, abs=1e-6)
    plain = rows[rows["method"] == AS_IT_IS]
    assert (plain["efficacy"] == 0).all() and (plain[["about KL", "loss with the word, %"]].abs() < 1e-4).all(axis=None)


def test_a_knowledge_study_resumes_and_is_the_same(study, rows, monkeypatch):
    monkeypatch.setattr(knowledge_study, "compare", None)  # nothing is measured anew
    pd.testing.assert_frame_equal(measure_facts(*study), rows)


# ---------------------------------------------------------------- what a user writes


@pytest.mark.parametrize("words", [("zoo", "lion", "lion"), ("zookeeper", "lion", "drum"), ("zoo", "日本", "drum")])
def test_facts_whose_words_cannot_be_edited_are_refused_and_left_out(models, words):
    fact = Fact("x", *words, edit=("At the zoo",))
    with pytest.raises(ValueError, match="counter-object is the object|tokens here"):
        project(models[0], models[2], [fact])
    assert usable([fact], models[2]) == []


TABLE = "relation,subject,object,counter,neighbours\na,Paris,France,Spain,Rome\n"
PHRASINGS = 'a: {edit: ["The city of {subject} is in"]}'


@pytest.mark.parametrize(
    ("table", "phrasings", "message"),
    [
        ("relation,subject\na,b\n", PHRASINGS, "lacks the column 'object'"),
        ("", PHRASINGS, "facts.csv' cannot be read: No columns"),
        (TABLE, "a: {test: ['of {subject}']}", "no phrasings for the relation 'a'; give at least one under `edit`"),
        (TABLE, "a: {edit: ['{subject} is']}", "stands after a space"),
        (TABLE, "a: {edit: ['in {subject}', 3]}", "give a list of texts"),
        (TABLE, "- a", "relations.yaml' is a list; it should name each relation"),
        (TABLE, "", "relations.yaml' is empty; it should name each relation"),
        (TABLE, "a: [", "relations.yaml' cannot be read: while parsing"),
        (None, PHRASINGS, "facts.csv' cannot be read: .*No such file"),
    ],
)
def test_files_of_facts_say_in_one_sentence_what_is_wrong(table, phrasings, message, tmp_path):
    for name, text in (("facts.csv", table), ("relations.yaml", phrasings)):
        if text is not None:
            (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as refused:
        read_facts(tmp_path / "facts.csv", tmp_path / "relations.yaml")
    assert len(str(refused.value).splitlines()) == 1


def test_files_that_begin_with_a_byte_order_mark_are_read(tmp_path):
    (tmp_path / "facts.csv").write_text(TABLE, encoding="utf-8-sig")
    (tmp_path / "relations.yaml").write_text(PHRASINGS, encoding="utf-8-sig")
    (fact,) = read_facts(tmp_path / "facts.csv", tmp_path / "relations.yaml")
    assert fact.edit == ("The city of Paris is in",) and fact.neighbours == ("The city of Rome is in",)
