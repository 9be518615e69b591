"""Edits change the senses they name, exactly as they say, for as long as they are applied, and nothing else."""

import copy

import numpy as np
import pytest
import torch
from helpers import random_ids, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from backpack_lib import BackpackLMHeadModel, SenseEdits, attribute
from backpack_lib.text.words import spell

TOKENIZER = tiny_tokenizer()
V, K, D = len(TOKENIZER), 4, 20
MODEL = tiny_model(vocab_size=V, num_senses=K)

words = st.none() | st.integers(1, V - 1) | st.lists(st.integers(1, V - 1), min_size=1, max_size=4)
some_senses = st.none() | st.integers(0, K - 1) | st.lists(st.integers(0, K - 1), min_size=1, max_size=K, unique=True)
numbers = st.floats(-3, 3)


def vector(seed):
    return torch.randn(D, generator=torch.Generator().manual_seed(seed))


@st.composite
def edits(draw, most=3):
    """A stack of one to `most` random edits."""
    made = SenseEdits(MODEL, TOKENIZER)
    for kind in draw(st.lists(st.sampled_from(["scale", "replace", "add", "project"]), min_size=1, max_size=most)):
        word, sense = draw(words), draw(some_senses)
        if kind == "scale":
            made.scale(word, sense, draw(numbers))
        elif kind == "project":
            made.project(word, draw(st.integers(1, V - 1)), draw(st.none() | st.integers(1, V - 1)), sense)
        else:
            getattr(made, kind)(word, sense, vector(draw(st.integers(0, 99))))
    return made


def table(*stacks):
    """The whole sense table with stacks of edits applied one inside the other."""
    if stacks:
        with stacks[0].applied(MODEL):
            return table(*stacks[1:])
    with torch.no_grad():
        return MODEL.sense_vectors(torch.arange(V))


def logits(ids, model=MODEL):
    with torch.no_grad():
        return model(ids).logits


# ---------------------------------------------------------------- each kind of edit


def test_each_kind_of_edit_is_its_formula():
    before, E = table(), MODEL.lm_head.weight.detach()
    v, r, a = vector(1), E[30], E[40]
    made = SenseEdits(MODEL, TOKENIZER).scale(5, 1, by=0.5).replace(6, [0, 2], v).add([7, 8], None, v)
    made.project(9, remove=30, add=40).project(10, remove=30, sense=3).replace(11, [1, 3], 12)
    made.project(13, remove=v, by=0.3)  # a direction, of which a share is left
    expected = before.clone()
    expected[5, 1] *= 0.5
    expected[6, 0] = expected[6, 2] = v
    expected[7] += v
    expected[8] += v
    for l in range(K):
        c = before[9, l] @ r / (r @ r)
        expected[9, l] = before[9, l] - c * r + c * a * (r @ r) / (a @ a)
    expected[10, 3] = before[10, 3] - (before[10, 3] @ r / (r @ r)) * r
    expected[11, [1, 3]] = before[12, [1, 3]]
    expected[13] = before[13] - 0.7 * (before[13] @ v / (v @ v))[:, None] * v
    torch.testing.assert_close(table(made), expected)


def test_no_word_or_sense_means_all_of_them():
    before = table()
    for made, chosen in (
        (SenseEdits(MODEL, TOKENIZER).scale(None, 2, 0), (slice(None), 2)),
        (SenseEdits(MODEL, TOKENIZER).scale(5, None, 0), (5, slice(None))),
        (SenseEdits(MODEL, TOKENIZER).scale(None, None, 0), (slice(None), slice(None))),
    ):
        expected = before.clone()
        expected[chosen] = 0
        assert torch.equal(table(made), expected)


def test_numbers_and_vectors_may_be_numpys_and_are_copied():
    given = vector(1).numpy()
    made = (
        SenseEdits(MODEL, TOKENIZER)
        .scale(np.int64(5), np.int64(1), np.float64(0.5))
        .replace(np.arange(6, 8), [0], given)
    )
    expected = table(SenseEdits(MODEL, TOKENIZER).scale(5, 1, 0.5).replace([6, 7], 0, vector(1)))
    given[:] = 0
    assert torch.equal(table(made), expected)


# ---------------------------------------------------------------- properties


@settings(deadline=None)
@given(words, some_senses, st.integers(1, V - 1), st.integers(0, 99))
def test_an_identity_changes_nothing_bitwise(word, sense, other, seed):
    same = SenseEdits(MODEL, TOKENIZER).scale(word, sense, 1).add(word, sense, torch.zeros(D))
    same.project(word, remove=other, add=other, sense=sense)
    ids = random_ids(2, 9, seed=seed, vocab_size=V)
    before = logits(ids)
    with same.applied(MODEL):
        assert torch.equal(logits(ids), before)


@settings(deadline=None)
@given(st.data())
def test_edits_of_different_words_or_of_different_senses_commute(data):
    if data.draw(st.booleans()):
        kinds = [{"word": 5, "sense": data.draw(some_senses)}, {"word": 6, "sense": data.draw(some_senses)}]
    else:
        kinds = [{"word": data.draw(words), "sense": [0, 1]}, {"word": data.draw(words), "sense": [2, 3]}]
    one, two = (SenseEdits(MODEL, TOKENIZER) for _ in range(2))
    for made, where in zip((one, two), kinds):
        made.scale(**where, by=data.draw(numbers)).add(**where, vector=vector(3)).project(**where, remove=30, add=31)
    assert torch.equal(table(one, two), table(two, one))


@settings(deadline=None)
@given(edits(), edits())
def test_nested_blocks_compose_as_one_stack_does(outer, inner):
    both = SenseEdits(MODEL, TOKENIZER)
    both._edits = [*outer, *inner]
    assert torch.equal(table(outer, inner), table(both))


@settings(deadline=None)
@given(edits())
def test_saved_and_loaded_edits_act_the_same(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("edits") / "made.safetensors"
    made.description = "a try"
    made.save(path)
    loaded = SenseEdits.load(path, MODEL, TOKENIZER)
    assert loaded.description == "a try" and repr(loaded) == repr(made)
    torch.testing.assert_close(table(loaded), table(made), rtol=1e-6, atol=1e-6)
    assert [file.name for file in path.parent.iterdir()] == ["made.safetensors"]


@settings(deadline=None)
@given(st.integers(1, V - 1), st.integers(0, K - 1), numbers, st.integers(0, 99))
def test_a_scaled_sense_moves_each_logit_by_its_contribution(word, sense, by, seed):
    ids = random_ids(8, seed=seed, vocab_size=V)
    ids[3] = word
    share = attribute(MODEL, ids, target=7)[ids == word, sense].sum()
    before = logits(ids[None])[0, -1, 7]
    with SenseEdits(MODEL, TOKENIZER).scale(word, sense, by).applied(MODEL):
        after = logits(ids[None])[0, -1, 7]
    assert (after - before).item() == pytest.approx(((by - 1) * share).item(), abs=1e-4)


# ---------------------------------------------------------------- where they reach


def test_generation_with_and_without_a_cache_in_a_padded_batch():
    made = SenseEdits(MODEL, TOKENIZER).scale([*range(1, V, 2)], 1, -2).add(None, 0, vector(0))
    ids = random_ids(2, 6, vocab_size=V)
    mask = torch.ones_like(ids)
    ids[0, :2] = mask[0, :2] = 0
    arguments = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=V + 1)
    plain = MODEL.generate(ids, **arguments)
    with made.applied(MODEL):
        cached, slow = (MODEL.generate(ids, use_cache=use_cache, **arguments) for use_cache in (True, False))
        alone = MODEL.generate(ids[:1, 2:], **arguments | {"attention_mask": mask[:1, 2:]})
    assert torch.equal(cached, slow) and not torch.equal(cached, plain)
    assert torch.equal(alone[0], cached[0, 2:])
    assert torch.equal(MODEL.generate(ids, **arguments), plain)


def test_weights_stay_and_leaving_restores_also_after_an_exception():
    made = SenseEdits(MODEL, TOKENIZER).scale(None, None, 0)
    weights, before = copy.deepcopy(MODEL.state_dict()), table()
    with pytest.raises(RuntimeError, match="inside"):
        with made.applied(MODEL):
            assert table().abs().max() == 0
            with made.applied(MODEL):
                raise RuntimeError("inside")
    assert torch.equal(table(), before) and not MODEL.backpack.patches
    assert all(torch.equal(value, weights[name]) for name, value in MODEL.state_dict().items())


def test_a_block_keeps_the_edits_that_it_began_with():
    made = SenseEdits(MODEL, TOKENIZER).scale(5, 1, 0)
    with made.applied(MODEL):
        inside = table()
        made.scale(6, 1, 0)
        assert torch.equal(table(), inside)


def test_edits_also_act_on_a_copy_of_the_model(tmp_path):
    made = SenseEdits(MODEL, TOKENIZER).scale(5, 1, 0)
    MODEL.save_pretrained(tmp_path)
    again = BackpackLMHeadModel.from_pretrained(tmp_path).bfloat16()
    with made.applied(again):
        assert again.sense_vectors(torch.tensor([5]))[0, 1].abs().max() == 0
    assert again.sense_vectors(torch.tensor([5]))[0, 1].abs().max() > 0


# ---------------------------------------------------------------- the stack


def test_edits_are_listed_undone_and_cleared():
    made = SenseEdits(MODEL, TOKENIZER)
    assert repr(made) == "no edits"
    assert repr(SenseEdits(MODEL, TOKENIZER).scale((w for w in (5, 6)), [1, 2], 0.5)) == (
        f"1. scale senses 1, 2 of “{spell(TOKENIZER, [5])[0]}”, “{spell(TOKENIZER, [6])[0]}” by 0.5"
    )
    made.scale("nurse", 3, by=0).project("concert", remove="nurse", add="he").add([1, 2, 3, 4], None, vector(0))
    assert [line.split(" ", 1)[1] for line in repr(made).splitlines()] == [
        "scale sense 3 of “nurse” by 0",
        "take “nurse” out of all senses of “concert” and put “he” in",
        f"add a vector to all senses of {', '.join(f'“{name}”' for name in spell(TOKENIZER, [1, 2, 3]))} and 1 more",
    ]
    assert len(made.undo()) == 2 and [edit.by for edit in made] == [0.0, 1.0]
    assert len(made.clear()) == 0 and torch.equal(table(made), table())
    with pytest.raises(ValueError, match="There is no edit to undo"):
        made.undo()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda e: e.scale([], 0), "no word to edit in an empty list"),
        (lambda e: e.scale("nurse", K), "sense=4 is out of range; this model has the senses 0 to 3"),
        (lambda e: e.project("nurse", remove=torch.ones(D + 1)), r"shape \(21,\); this takes"),
    ],
)
def test_a_bad_edit_is_one_sentence_and_leaves_the_stack_as_it_was(edit, message):
    made = SenseEdits(MODEL, TOKENIZER).scale(5, 1, 0)
    with pytest.raises(ValueError, match=message):
        edit(made)
    assert len(made) == 1


# ---------------------------------------------------------------- files


def test_edits_for_another_vocabulary_or_number_of_senses_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    SenseEdits(MODEL, TOKENIZER).scale("nurse", 3, by=0).save(path)
    with pytest.raises(ValueError, match="a.safetensors' .*holds edits for another vocabulary"):
        SenseEdits.load(path, MODEL, tiny_tokenizer(480))
    with pytest.raises(ValueError, match="made for a model whose senses are others"):
        SenseEdits.load(path, tiny_model(vocab_size=V, num_senses=3), TOKENIZER)


def test_a_foreign_file_or_one_whose_numbers_do_not_fit_is_one_sentence(tmp_path):
    good = tmp_path / "good.safetensors"
    SenseEdits(MODEL, TOKENIZER).add("nurse", 3, vector(0)).save(good)
    with safe_open(good, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    for changed, message in (
        ({"0.senses": torch.tensor([9])}, "names the tokens or senses \\[9\\], but there are only 4"),
        ({"0.tokens": torch.tensor([-1])}, "names the tokens or senses"),
        ({"0.plus": torch.full((D,), torch.inf)}, "not finite"),
        ({"0.plus": torch.zeros(3)}, "has shape"),
    ):
        save_file(tensors | changed, tmp_path / "changed.safetensors", metadata)
        with pytest.raises(ValueError, match=message):
            SenseEdits.load(tmp_path / "changed.safetensors", MODEL, TOKENIZER)
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="holds no sense edits"):
        SenseEdits.load(tmp_path / "foreign.safetensors", MODEL, TOKENIZER)
