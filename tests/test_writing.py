"""Texts into rows of ids, and continuations out. (A prompt without room is among the bad inputs.)"""

import torch
from helpers import tiny_model, tiny_tokenizer

from backpack_lib.text.writing import continue_text, ids_of_text, pad_rows

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model(vocab_size=len(TOKENIZER))


def test_rows_begin_after_an_end_of_text_and_are_padded_where_they_should_be():
    assert ids_of_text(TOKENIZER, "the nurse") == [TOKENIZER.eos_token_id, *TOKENIZER("the nurse")["input_ids"]]
    ids, mask = pad_rows([[5, 6, 7], [8]], pad=2)
    assert ids.tolist() == [[5, 6, 7], [8, 2, 2]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = pad_rows([[5, 6, 7], [8]], pad=2, left=True)
    assert ids.tolist() == [[5, 6, 7], [2, 2, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_continuation_is_the_same_for_the_same_seed():
    one, again, other = (continue_text(MODEL, TOKENIZER, "the nurse", 12, seed) for seed in (0, 0, 1))
    assert one == again != other and one.startswith("the nurse")


def test_settings_are_those_of_generate():
    prompt = torch.tensor([ids_of_text(TOKENIZER, "the nurse")])
    greedy = MODEL.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=5)
    written = continue_text(MODEL, TOKENIZER, "the nurse", 5, do_sample=False)
    assert written == TOKENIZER.decode(greedy[0], skip_special_tokens=True)
