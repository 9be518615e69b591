"""Look-ups on the sense table, against slow versions of their definitions."""

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from backpack_lib.analysis import senses
from backpack_lib.analysis.senses import senses_of_words
from backpack_lib.text import words
from backpack_lib.text.words import spell, token_of_word, tokens_of_word

# ---------------------------------------------------------------- words and tokens


def test_a_word_has_the_senses_of_its_token_after_a_space(model, tokenizer):
    found = senses_of_words(model, tokenizer, ["nurse", "concert", "nurse"])
    for row, word in zip(found, ["nurse", "concert", "nurse"]):
        (token,) = tokenizer(" " + word)["input_ids"]
        torch.testing.assert_close(row, model.sense_vectors(torch.tensor([token]))[0])


def test_a_word_of_several_tokens_takes_their_mean_or_the_one_that_is_chosen(model, tokenizer):
    ids = tokens_of_word(tokenizer, "zebra")
    assert len(ids) > 1
    parts = model.sense_vectors(torch.tensor(ids))
    torch.testing.assert_close(senses_of_words(model, tokenizer, ["nurse", "zebra"])[1], parts.mean(0))
    for choice, part in (("first", parts[0]), ("last", parts[-1])):
        torch.testing.assert_close(senses_of_words(model, tokenizer, ["zebra"], choice)[0], part)


def test_a_transformer_lends_its_embeddings(tokenizer):
    baseline = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1))
    (nurse,) = tokens_of_word(tokenizer, "nurse")
    torch.testing.assert_close(
        senses_of_words(baseline, tokenizer, ["nurse"])[0, 0], baseline.transformer.wte.weight[nurse]
    )
    with pytest.raises(ValueError, match="takes a Backpack; a GPT2LMHeadModel has no sense vectors"):
        senses.sense_directions(baseline)


def test_tokens_show_where_words_begin_and_what_cannot_be_seen(tokenizer):
    def show(text):
        return spell(tokenizer, tokenizer(text)["input_ids"])

    assert show(" nurse") == ["nurse"] and show(" nurse.\n") == ["nurse", ".", "↵"]
    first, *rest = show(" zebra")
    assert not first.startswith("…") and all(part.startswith("…") for part in rest)
    assert spell(tokenizer, [tokenizer.eos_token_id]) == ["<|endoftext|>"]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(show("é"))


def test_in_a_text_only_what_continues_a_word_is_marked(tokenizer):
    ids = [tokenizer.eos_token_id, *tokenizer('nurse "nurse concertts')["input_ids"]]
    shown = words.spell_text(tokenizer, ids)
    assert "".join(shown[1:]).replace("…", "").replace("␣", "") == 'nurse"nurseconcertts'
    assert [name for name in shown if name.startswith("…")] == [
        name for name, before in zip(spell(tokenizer, ids)[1:], shown) if name.startswith("…") and before[-1].isalnum()
    ]
    assert not shown[1].startswith("…") and shown[-1] == "…ts"


def test_what_is_shown_can_be_typed(tokenizer):
    ids = tokenizer(" nurse, the concertts.")["input_ids"]
    assert "…ts" in spell(tokenizer, ids)
    assert [token_of_word(tokenizer, shown) for shown in spell(tokenizer, ids)] == ids
    assert token_of_word(tokenizer, " nurse ") == token_of_word(tokenizer, ids[0]) == ids[0]
    assert token_of_word(tokenizer, tokenizer.eos_token) == tokenizer.eos_token_id


def test_bad_words_and_choices_are_one_sentence(model, tokenizer):
    for word in (" ", "…"):
        with pytest.raises(ValueError, match=f"{word!r} is no word"):
            senses_of_words(model, tokenizer, ["nurse", word])
    with pytest.raises(ValueError, match=r"'zebra' is \d tokens here: .*; give one of these ids"):
        token_of_word(tokenizer, "zebra")


# ---------------------------------------------------------------- what senses push


def test_pushes_are_what_a_sense_adds_to_the_logits(model):
    ids = torch.tensor([[3, 9]])
    out = model(ids, output_senses=True)
    pushed = senses.pushes(model, out.senses[0])  # (k, T, V)
    logits = torch.einsum("kj,kjv->v", out.contextualization[0, :, -1], pushed)
    torch.testing.assert_close(logits, out.logits[0, -1], atol=1e-5, rtol=1e-4)


@given(st.integers(1, 30), st.sets(st.integers(0, 36), min_size=1), st.integers(0, 2**16))
def test_pushed_most_are_the_ends_of_the_sorted_pushes_among_the_tokens_asked_for(n, among, seed):
    model, among = tiny_model(vocab_size=40, used_vocab_size=37), torch.tensor(sorted(among))
    vectors = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed))
    for tokens in (among, None):
        up, up_scores, down, down_scores = senses.pushed_most(model, vectors, n, tokens)
        tokens = torch.arange(37) if tokens is None else tokens
        scores, order = senses.pushes(model, vectors)[:, tokens].sort(descending=True)
        assert torch.equal(up, tokens[order[:, :n]]) and torch.equal(up_scores, scores[:, :n])
        assert torch.equal(down, tokens[order.flip(1)[:, :n]]) and torch.equal(down_scores, scores.flip(1)[:, :n])


def test_the_nearest_words_are_nearest_of_those_that_are_used(monkeypatch):
    monkeypatch.setattr(senses, "TOKENS_AT_ONCE", 16)
    model = tiny_model(vocab_size=40, used_vocab_size=37)
    table = model.sense_vectors(torch.arange(37)).detach()
    directions = senses.sense_directions(model)
    assert directions.dtype == torch.half
    torch.testing.assert_close(directions.float(), F.normalize(table, dim=-1).transpose(0, 1), atol=1e-4, rtol=1e-3)
    ids, cosines = senses.neighbours(directions, table[12], n=5)
    for sense in range(3):
        slow = [F.cosine_similarity(table[12, sense], row, dim=0).item() for row in table[:, sense]]
        assert [slow[token] for token in ids[sense]] == pytest.approx(sorted(slow, reverse=True)[:5], abs=2e-4)
        assert cosines[sense].tolist() == pytest.approx(sorted(slow, reverse=True)[:5], abs=2e-4)
    assert (ids[:, 0] == 12).all()
