"""Editing facts: the projection, what it is known to do beforehand, and the study that counts benefit and cost."""

import numpy as np
import pandas as pd
import pytest
import torch

from backpack_lib.analysis import knowledge
from backpack_lib.analysis.knowledge import Fact, dose, known, margins, project, projected_inputs, read_facts, usable
from backpack_lib.files import data_folder
from backpack_lib.lessons.knowledge import planted_facts
from backpack_lib.studies import knowledge_study
from backpack_lib.studies.knowledge_study import AS_IT_IS, DOSED, KnowledgeStudy, at_once, methods_table, paired
from backpack_lib.text import planted
from backpack_lib.text.writing import ids_of_text


@pytest.fixture(scope="module")
def facts(models):
    return known(models[0], models[2], planted_facts())


def test_every_fact_of_the_table_is_complete():
    table = pd.read_csv(data_folder() / "facts.csv", dtype=str)
    facts = read_facts()
    assert len(facts) == len(table) >= 60 and not table.duplicated(["relation", "subject"]).any()
    for fact in facts:
        assert len(fact.edit) == 2 and len(fact.test) == 3 and len(fact.neighbours) == 5 and len(fact.about) == 3
        assert len({fact.subject, fact.object, fact.counter}) == 3
        assert all(f" {fact.subject}" in text for text in fact.edit + fact.test + fact.about)
        assert not any(f" {fact.subject} " in f" {text} " for text in fact.neighbours)
        assert not any(word in text.split() for text in fact.edit + fact.test for word in (fact.object, fact.counter))


def test_the_projection_swaps_object_and_counter_object_in_the_senses(models, facts):
    model, _, tokenizer = models
    fact = facts[0]
    x, r, a = knowledge.tokens_of_fact(tokenizer, fact)
    E, C = model.get_output_embeddings().weight, model.sense_vectors(torch.tensor([x]))[0]
    slow = []
    for sense in C:
        c = torch.dot(sense, E[r]) / torch.dot(E[r], E[r])
        slow.append(sense - c * E[r] + c * E[a] * torch.dot(E[r], E[r]) / torch.dot(E[a], E[a]))
    with project(model, tokenizer, [fact]).applied():
        torch.testing.assert_close(model.sense_vectors(torch.tensor([x]))[0], torch.stack(slow), atol=1e-4, rtol=1e-4)
    with project(model, tokenizer, [fact], strengths=[2.5]).applied():
        stronger = model.sense_vectors(torch.tensor([x]))[0]
    torch.testing.assert_close(stronger, C + 2.5 * (torch.stack(slow) - C), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("number", [0, 5, 11])
def test_what_an_edit_does_is_known_beforehand(models, facts, number):
    model, _, tokenizer = models
    fact = facts[number]
    edits = project(model, tokenizer, [fact])
    before, predicted = knowledge.predict(model, tokenizer, fact.test[0], edits)
    ids = torch.tensor([ids_of_text(tokenizer, fact.test[0])])
    with torch.no_grad(), edits.applied():
        torch.testing.assert_close(model(ids).logits[0, -1], predicted, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[0, -1], before, atol=1e-4, rtol=1e-4)


def test_effects_of_single_senses_sum_to_that_of_all(models, facts):
    model, _, tokenizer = models
    fact = facts[3]
    effects = knowledge.sense_effects(model, tokenizer, fact, fact.edit)
    plain = margins(model, tokenizer, fact, fact.edit)
    with project(model, tokenizer, [fact]).applied():
        np.testing.assert_allclose(margins(model, tokenizer, fact, fact.edit), plain + effects.sum(1), atol=1e-3)
    with project(model, tokenizer, [fact], senses=[1, 4]).applied():
        np.testing.assert_allclose(
            margins(model, tokenizer, fact, fact.edit), plain + effects[:, [1, 4]].sum(1), atol=1e-3
        )


def test_a_dose_is_the_least_that_is_enough(models, facts):
    model, _, tokenizer = models
    dosed = 0
    for fact in facts[:8]:
        strength = dose(model, tokenizer, fact, wanted=0.7)
        with project(model, tokenizer, [fact], strengths=[strength]).applied():
            margin = margins(model, tokenizer, fact, fact.edit)
        if strength != 1.0:
            dosed += 1
            assert margin.min() == pytest.approx(0.7, abs=1e-3)
    assert dosed


def test_the_transformers_baseline_changes_the_input_of_one_word_alone(models, facts):
    backpack, model, tokenizer = models
    fact = facts[0]
    x, r, a = knowledge.tokens_of_fact(tokenizer, fact)
    E = model.get_input_embeddings().weight.detach().clone()
    c = E[x] @ E[r] / (E[r] @ E[r])
    ids = torch.tensor([[x, r, a, 5]])
    with projected_inputs(model, tokenizer, [fact], [1.5]):
        found = model.get_input_embeddings()(ids)[0]
        assert torch.equal(model.get_output_embeddings().weight, E)
    expected = E[ids[0]].clone()
    expected[0] += 1.5 * (c * E[a] * (E[r] @ E[r]) / (E[a] @ E[a]) - c * E[r])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.get_input_embeddings()(ids)[0], E[ids[0]])
    with pytest.raises(ValueError, match="for a Transformer"), projected_inputs(backpack, tokenizer, [fact]):
        pass


def test_known_facts_are_those_on_which_the_model_is_right(models):
    model, _, tokenizer = models
    kept, possible = known(model, tokenizer, planted_facts()), planted_facts()
    assert len(kept) > 20  # the model has learnt which things a place has
    turned = [Fact(f.relation, f.subject, f.counter, f.object, f.edit, f.test) for f in kept]
    assert not known(model, tokenizer, turned) and len(possible) == 32


# ---------------------------------------------------------------- the study


@pytest.fixture(scope="module")
def study(models, facts, tmp_path_factory):
    general = [text.text for text in planted.generate(6, seed=9)]
    of = {"Backpack": models[0], "Transformer": models[1]}
    folder = tmp_path_factory.mktemp("study")
    return KnowledgeStudy(of, models[2], facts[:3], general, folder, bounds=(0.001,), finetuned_facts=1)


@pytest.fixture(scope="module")
def rows(study):
    return study.run()


def test_rows_are_what_the_edited_models_say(study, rows, models, facts):
    model, _, tokenizer = models
    assert len(rows) == 3 * 4 + 3 * 3 + 1  # as it is and three edits; as it is and two edits; one finetuned
    fact = facts[1]
    row = rows[(rows["model"] == "Backpack") & (rows["method"] == DOSED) & (rows["subject"] == fact.subject)].iloc[0]
    with project(model, tokenizer, [fact], strengths=[dose(model, tokenizer, fact)]).applied():
        test = margins(model, tokenizer, fact, fact.test)
        changed = [
            model(torch.tensor([ids_of_text(tokenizer, text)])).logits[0, -1].log_softmax(-1) for text in fact.about
        ]
    assert row["paraphrases"] == (test > 0).mean() and row["margin, test"] == pytest.approx(test.mean(), abs=1e-3)
    plain = [model(torch.tensor([ids_of_text(tokenizer, text)])).logits[0, -1].log_softmax(-1) for text in fact.about]
    kl = np.mean([(p.exp() * (p - q)).sum().item() for p, q in zip(plain, changed)])
    assert row["about KL"] == pytest.approx(kl, abs=1e-4)
    assert row["neighbours unchanged"] == 1 and row["neighbours KL"] == pytest.approx(0, abs=1e-6)


def test_a_model_as_it_is_differs_from_itself_in_nothing(rows):
    plain = rows[rows["method"] == AS_IT_IS]
    assert (plain["efficacy"] == 0).all() and (plain[["about KL", "loss with the word, %"]].abs() < 1e-4).all(axis=None)


def test_finetuning_meets_its_bound(rows):
    (row,) = rows[rows["method"] == "finetuned, 0.1%"].to_dict("records")
    assert row["loss without, %"] <= 0.1 + 1e-3 or row["neighbours KL"] > 0


def test_a_knowledge_study_resumes_and_is_the_same(study, rows, monkeypatch):
    monkeypatch.setattr(knowledge_study, "compare_states", None)  # nothing is measured anew
    pd.testing.assert_frame_equal(study.run(), rows)


def test_tables_are_means_over_facts_and_differences_are_paired(rows):
    table = methods_table(rows)
    of = rows[(rows["model"] == "Backpack") & (rows["method"] == DOSED)]
    assert table.loc[("Backpack", DOSED), ("paraphrases", "mean")] == pytest.approx(of["paraphrases"].mean())
    other = rows[(rows["model"] == "Transformer") & (rows["method"] == DOSED)]
    found = paired(rows, "about KL", ("Backpack", DOSED), ("Transformer", DOSED))
    assert found["difference"] == pytest.approx(of["about KL"].mean() - other["about KL"].mean())
    assert found["facts"] == 3 and found["low"] <= found["difference"] <= found["high"]


def test_edits_of_different_words_add_up_exactly(models, facts):
    apart = {fact.subject: fact for fact in facts}  # one fact a subject
    found = at_once(models[0], models[2], list(apart.values()), numbers=(1, 5))
    by_number = found.pivot(index="fact", columns="edits at once", values="margin")
    np.testing.assert_allclose(by_number[1], by_number[5], atol=1e-3)


# ---------------------------------------------------------------- bad input


def wrong(tokenizer, **changes):
    fields = {
        "relation": "x",
        "subject": "zoo",
        "object": "lion",
        "counter": "drum",
        "edit": ("At the zoo, the",),
    } | changes
    return Fact(**fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counter": "lion"}, "The counter-object is the object, 'lion'"),
        ({"subject": "zookeeper"}, "tokens here"),
        ({"object": "日本"}, "tokens here"),
        ({"subject": " "}, "is no word"),
    ],
)
def test_words_that_cannot_be_edited_are_named_in_one_sentence(models, changes, message):
    model, _, tokenizer = models
    with pytest.raises(ValueError, match=message) as refused:
        project(model, tokenizer, [wrong(tokenizer, **changes)])
    assert len(str(refused.value).splitlines()) == 1
    assert usable([wrong(tokenizer, **changes)], tokenizer) == []


def test_no_facts_are_refused(models, tmp_path):
    model, _, tokenizer = models
    with pytest.raises(ValueError, match="There is no fact to edit"):
        project(model, tokenizer, [])
    with pytest.raises(ValueError, match="know none of the facts"):
        KnowledgeStudy({"Backpack": model}, tokenizer, [], ["a"], tmp_path)


@pytest.mark.parametrize(
    ("table", "phrasings", "message"),
    [
        ("relation,subject\na,b\n", "a: {edit: [x]}", "lacks the column 'object'"),
        ("relation,subject,object,counter,neighbours\na,b,c,d,e\n", "b: {}", "no phrasings for the relation 'a'"),
        (
            "relation,subject,object,counter,neighbours\na,b,c,d,e\n",
            "a: {edit: ['{subject} is']}",
            "should stand after a space",
        ),
        ("relation,subject,object,counter,neighbours\na,b,c,d,e\n", "a: [", "cannot be read"),
    ],
)
def test_files_of_facts_that_do_not_fit_are_named(table, phrasings, message, tmp_path):
    (tmp_path / "facts.csv").write_text(table)
    (tmp_path / "relations.yaml").write_text(phrasings)
    with pytest.raises(ValueError, match=message):
        read_facts(tmp_path / "facts.csv", tmp_path / "relations.yaml")
    with pytest.raises(ValueError, match="cannot be read"):
        read_facts(tmp_path / "nothing.csv")
