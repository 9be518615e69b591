"""Removed meanings, texts that show meanings, and what people use beside contributions: against slow versions."""

import numpy as np
import pytest
import torch

from backpack_lib import SenseEdits, load
from backpack_lib.analysis import disambiguation, meanings, substitutes
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


def test_the_texts_end_in_their_word_and_words_of_several_tokens_are_taken(trained):
    for one in [*disambiguation.english_ambiguities(), *disambiguation.planted_ambiguities()]:
        assert len(one.cues) == len(one.texts) == 2 and set(one.cues) == set(one.texts)
        assert all(text.split()[-1] == one.word for texts in one.texts.values() for text in texts)
        assert all(len(set(texts)) == len(texts) >= 8 for texts in one.texts.values())
    cues, texts = {"a": ["lion", "antelope"], "b": ["loan"]}, {"a": ["the zebra"], "b": ["a zebra"]}
    strange = disambiguation.Ambiguity("zebra", cues, texts)
    assert len(disambiguation.weights_in_context(*trained, strange)) == 2


# ---------------------------------------------------------------- substitutes


def test_attention_sums_to_one_and_the_transformer_stays_as_it_was(transformer, trained):
    ids = ids_of_text(trained[1], "At the zoo, the nurse says that")
    attention = substitutes.attention_of_tokens(transformer, ids)
    assert attention.shape == (len(ids),) and attention.sum().item() == pytest.approx(1, abs=1e-4)
    assert transformer.config._attn_implementation != "eager"
    with pytest.raises(ValueError, match="a Backpack"):
        substitutes.attention_of_tokens(trained[0], ids)


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
