"""How notebooks begin, and the checks of their exercises."""

import pytest
import torch

from backpack_lib.lessons import opening
from backpack_lib.lessons.exercises import check_choice, check_function, check_number, check_tensor


def test_a_number_is_right_wrong_with_a_hint_or_too_high():
    hints = [(2.0, "that is in bits.")]
    assert check_number(None, 1.5) == check_number(float("nan"), 1.5) == "Not yet: give one finite number."
    assert check_number(torch.tensor(1.5), 1.5, hints) == "Right: 1.5."
    assert check_number(2.0, 1.5, hints) == "Not yet: that is in bits."
    assert check_number(1.8, 1.5, hints) == "Not yet: 1.8 is too high."


def test_a_tensor_is_compared_by_shape_and_entry_and_its_truth_is_not_told():
    truth = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert "shape (2, 2)" in check_tensor(None, truth)
    assert "it is (4,)" in check_tensor(truth.flatten(), truth)
    assert check_tensor(truth, truth).startswith("Right")
    assert check_tensor(truth.T, truth, [(truth.T, "transposed.")]) == "Not yet: transposed."
    assert check_tensor(torch.tensor([[1.0, 2.0], [3.0, 9.0]]), truth) == "Not yet: 1 of 4 entries are wrong, the first at (1, 1)."


def test_a_function_is_called_on_every_case_and_its_error_is_told():
    cases = [(torch.ones(2),), (torch.zeros(2),)]
    assert check_function(None, torch.exp, cases) == "Not yet: define the function."
    assert check_function(torch.exp, torch.exp, cases) == "Right: it agrees in all 2 cases."
    assert "in case 2 2 of 2 entries are wrong" in check_function(lambda x: x * torch.e, torch.exp, cases)
    assert "it raises ZeroDivisionError" in check_function(lambda x: 1 / 0, torch.exp, cases)


def test_a_choice_is_explained():
    why = {"a": "yes.", "b": "no."}
    assert check_choice(None, "a", why) == "Not yet: choose one of 'a', 'b'."
    assert check_choice("a", "a", why) == "Right: yes." and check_choice("b", "a", why) == "Not yet: no."


def test_a_lesson_has_its_examples_unless_others_are_given(tmp_path):
    lesson = opening.open_lesson("02_senses", out=str(tmp_path), word="king", texts=[])
    assert lesson.example.word == "king" and lesson.example.texts == opening.examples("02_senses", "english")["texts"]
    lesson.numbers["one"] = 1.0
    lesson.close("done")
    assert (tmp_path / "results.json").read_text().startswith('{\n "headline": "done"')
    with pytest.raises(ValueError, match="no sense vectors"):
        opening.open_lesson("02_senses", "demo-transformer", str(tmp_path))
