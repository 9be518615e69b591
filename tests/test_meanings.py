"""Whether senses learnt what was planted, and whether contexts choose among them: against slow versions and truths."""

import numpy as np
import pandas as pd
import pytest
import torch

from backpack_lib import SenseEdits, load
from backpack_lib.analysis import disambiguation, meanings, substitutes
from backpack_lib.analysis.attribution import attribute
from backpack_lib.analysis.disambiguation import Ambiguity, context_effect, leanings, weights_in_context
from backpack_lib.text import planted
from backpack_lib.text.words import token_of_word
from backpack_lib.text.writing import ids_of_text


@pytest.fixture(scope="module")
def trained():
    return load("planted")


@pytest.fixture(scope="module")
def transformer():
    return load("planted-transformer")[0]


# ---------------------------------------------------------------- planted meanings


def test_planted_meanings_stand_out(trained):
    auc, is_meaning = meanings.planted_meanings(*trained)
    best, share = auc.max(axis=1), meanings.separation(auc, is_meaning)
    slow = np.mean([x > y for x in best[is_meaning] for y in best[~is_meaning]])
    assert share == pytest.approx(slow) and share > 0.9


def test_a_removed_sense_costs_what_the_edited_model_says(trained):
    model, tokenizer = trained
    costs = meanings.removal_costs(model, tokenizer)
    texts = meanings.texts_of_meanings()["bat", "sport"]
    own = {token_of_word(tokenizer, word) for word in planted.topic_words("sport")}
    x, sense = token_of_word(tokenizer, "bat"), 4

    def cost():
        nats = []
        for text in texts:
            ids = ids_of_text(tokenizer, text)[: model.config.n_positions]
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            nats += [-log_probs[i - 1, ids[i]].item() for i in range(1, len(ids)) if ids[i] in own and x in ids[:i]]
        return np.mean(nats)

    with torch.no_grad():
        before = cost()
        with SenseEdits(model, tokenizer).scale("bat", sense, by=0).applied():
            after = cost()
    assert costs.loc[("bat", "sport"), sense] == pytest.approx(after - before, abs=1e-4)


# ---------------------------------------------------------------- words that mean two things


def test_a_words_own_part_and_the_total_are_sums_of_contributions(trained):
    model, tokenizer = trained
    one = disambiguation.planted_ambiguities()[0]
    table, lean = weights_in_context(model, tokenizer, one), leanings(model, tokenizer, one)
    text = one.texts[list(one.texts)[1]][3]
    row = table.iloc[len(list(one.texts.values())[0]) + 3]
    ids, own, total = ids_of_text(tokenizer, text), 0.0, 0.0
    for sign, cues in zip((1, -1), one.cues.values()):
        for cue in cues:
            shares = attribute(model, ids, token_of_word(tokenizer, cue))
            own, total = (
                own + sign * shares[-1].sum().item() / len(cues),
                total + sign * shares.sum().item() / len(cues),
            )
    assert row["own"] == pytest.approx(own, abs=1e-3) and row["total"] == pytest.approx(total, abs=1e-3)
    assert table["own"].iloc[0] == pytest.approx(table.filter(like="weight").iloc[0].to_numpy() @ lean, abs=1e-5)


def test_the_effect_of_contexts_and_its_p():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"meaning": ["a"] * 20 + ["b"] * 20, "total": np.r_[np.full(20, 3.0), np.full(20, 1.0)]})
    chooses = context_effect(table.assign(own=np.r_[np.full(20, 0.5), np.zeros(20)] + rng.normal(0, 0.1, 40)))
    assert chooses["total"] == 2 and chooses["own"] == pytest.approx(0.5, abs=0.1) and chooses["p"] < 0.001
    assert context_effect(table.assign(own=rng.normal(0, 0.1, 40)))["p"] > 0.05
    against = context_effect(table.assign(own=np.r_[np.zeros(20), np.full(20, 0.5)] + rng.normal(0, 0.1, 40)))
    assert against["p"] > 0.99  # to move toward the other meaning is no choice


def test_the_texts_end_in_their_word_and_words_of_several_tokens_are_taken():
    for one in [*disambiguation.english_ambiguities(), *disambiguation.planted_ambiguities()]:
        assert len(one.cues) == len(one.texts) == 2 and set(one.cues) == set(one.texts)
        assert all(text.split()[-1] == one.word for texts in one.texts.values() for text in texts)
        assert all(len(set(texts)) == len(texts) >= 8 for texts in one.texts.values())
    model, tokenizer = load("planted")
    strange = Ambiguity("zebra", {"a": ["lion", "antelope"], "b": ["loan"]}, {"a": ["the zebra"], "b": ["a zebra"]})
    assert len(weights_in_context(model, tokenizer, strange)) == 2


# ---------------------------------------------------------------- substitutes


def test_exact_contributions_find_the_word_that_decides_and_gradients_miss_it(trained, transformer):
    found = substitutes.compare_on_planted(trained[0], transformer, trained[1], n=40)
    methods = found.groupby("method")[["found", "share", "chance"]].mean()
    assert (
        methods.loc["contributions (exact)", "found"]
        > 0.9
        > 0.6
        > methods.loc["Transformer: gradient × input", "found"]
    )
    assert methods.loc["contributions (exact)", "share"] == methods["share"].max()
    assert transformer.config._attn_implementation != "eager"  # as it was before


def test_each_method_gives_a_number_for_each_token(trained, transformer):
    model, tokenizer = trained
    text, person = substitutes.planted_pronoun_texts(1)[0]
    scores = substitutes.token_scores(model, transformer, tokenizer, text)
    ids = ids_of_text(tokenizer, text)
    assert person in text and {len(values) for values in scores.values()} == {len(ids)}
    he, she = (token_of_word(tokenizer, word) for word in ("he", "she"))
    logits = model(torch.tensor([ids])).logits[0, -1]
    assert scores["contributions (exact)"].sum().item() == pytest.approx((logits[he] - logits[she]).item(), abs=1e-4)
    for name in ("weights alone", "Transformer: attention"):
        assert scores[name].sum().item() == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="a Backpack"):
        substitutes.attention_of_tokens(model, ids)


def test_gradient_times_input_is_the_slope_along_the_embedding(transformer, trained):
    ids = ids_of_text(trained[1], "At the zoo, the nurse says that")
    slope = substitutes.gradient_times_input(transformer, ids, 5, 9)
    E, place, step = transformer.get_input_embeddings().weight, 6, 1e-2

    def odds(scale):
        inputs = E[torch.tensor([ids])].clone()
        inputs[0, place] = inputs[0, place] * scale
        logits = transformer(inputs_embeds=inputs).logits[0, -1]
        return (logits[5] - logits[9]).item()

    with torch.no_grad():
        assert slope[place].item() == pytest.approx((odds(1 + step) - odds(1 - step)) / (2 * step), abs=2e-2)
