"""How notebooks begin, and the checks of their exercises."""

import pandas as pd
import pytest
import torch
from helpers import ROOT

from backpack_lib import load
from backpack_lib.analysis.scores import token_nats
from backpack_lib.lessons import opening, training
from backpack_lib.lessons.exercises import check_function, check_number, check_tensor
from backpack_lib.running.parameters import default_parameters
from backpack_lib.text import planted
from backpack_lib.text.writing import ids_of_text


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
    assert (
        check_tensor(torch.tensor([[1.0, 2.0], [3.0, 9.0]]), truth)
        == "Not yet: 1 of 4 entries are wrong, the first at (1, 1)."
    )


def test_a_function_is_called_on_every_case_and_its_error_is_told():
    cases = [(torch.ones(2),), (torch.zeros(2),)]
    assert check_function(None, torch.exp, cases) == "Not yet: define the function."
    assert check_function(torch.exp, torch.exp, cases) == "Right: it agrees in all 2 cases."
    assert "in case 2 2 of 2 entries are wrong" in check_function(lambda x: x * torch.e, torch.exp, cases)
    assert "it raises ZeroDivisionError" in check_function(lambda x: 1 / 0, torch.exp, cases)


def test_a_lesson_has_its_examples_unless_others_are_given(tmp_path):
    lesson = opening.open_lesson("02_senses", out=str(tmp_path), word="king", other="")
    known = opening.examples("02_senses", "english")
    assert lesson.example.word == "king" and lesson.example.other == known["other"] and lesson.senses == 16
    assert "16 senses for each of 16,000 tokens" in str(lesson)
    lesson.numbers["one"] = 1.0
    lesson.keep(pd.DataFrame({"a": [1]}), "table")
    lesson.close("done")
    assert (tmp_path / "results.json").read_text().startswith('{\n "headline": "done"')
    assert (tmp_path / "table.csv").is_file()
    with pytest.raises(ValueError, match="no sense vectors"):
        opening.open_lesson("02_senses", "demo-transformer", str(tmp_path))


def test_a_text_without_a_question_gets_the_likeliest_words(tmp_path):
    example = opening.open_lesson("00_tour", out=str(tmp_path), text="He opened the").example
    assert (example.target, example.contrast) == ("door", "window")
    asked = opening.open_lesson("00_tour", out=str(tmp_path), text="The film", target="was").example
    assert asked.target == "was"


@pytest.mark.parametrize("model", ["demo", "planted"])
@pytest.mark.parametrize("name", ["00_tour", "02_senses"])
def test_examples_are_single_tokens_of_the_shipped_models(name, model, tmp_path):
    lesson = opening.open_lesson(name, model, str(tmp_path))
    for key in ("word", "other", "target", "contrast", "other_target", "other_contrast"):
        assert len(lesson.tokens_of(key)) == 1, key
    assert set(opening.examples(name, "english")) == set(opening.examples(name, "planted"))


def test_the_stored_seeds_are_those_of_the_shipped_models():
    seeds = pd.read_csv(ROOT / "data" / "planted" / "seeds.csv").set_index(["model", "seed"])
    for name, model_name in (("Backpack", "planted"), ("Transformer", "planted-transformer")):
        model, tokenizer = load(model_name)
        stored = seeds.loc[(name, 0)]
        assert model.num_parameters() == stored["parameters"]
        rows = [ids_of_text(tokenizer, text.text)[: model.config.n_positions] for text in planted.generate(300, seed=5)]
        nats = torch.cat(token_nats(model, rows)).mean().item()  # texts begin whole: a little below the loss of blocks
        assert nats == pytest.approx(stored["valid_loss"], abs=0.1)
        assert stored["floor"] < seeds["valid_loss"].min()


@pytest.mark.parametrize(
    "changed, problem",
    [
        ({"vocab_size": 400}, "vocab_size=400 is too small"),
        ({"warmup": 900}, "warmup=900"),
        ({"corpus": "no.txt"}, "no.txt"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is(changed, problem):
    parameters = default_parameters(ROOT / "notebooks" / "01_training.ipynb")
    assert "corpus" not in training.settings(parameters)
    with pytest.raises(ValueError, match=problem):
        training.settings(parameters | changed)
