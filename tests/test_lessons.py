"""How notebooks begin, and the checks of their exercises."""

import pandas as pd
import pytest
import torch

from backpack_lib.lessons import opening, tour
from backpack_lib.lessons import senses as of_senses
from backpack_lib.lessons import training as of_training
from backpack_lib.lessons.exercises import check_choice, check_function, check_number, check_tensor
from backpack_lib.lessons.results import Results
from backpack_lib.text import planted


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


def test_a_choice_is_explained():
    why = {"a": "yes.", "b": "no."}
    assert check_choice(None, "a", why) == "Not yet: choose one of 'a', 'b'."
    assert check_choice("a", "a", why) == "Right: yes." and check_choice("b", "a", why) == "Not yet: no."


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


def test_numbers_are_noted_under_their_labels(tmp_path):
    results = Results(tmp_path)
    results.note({"loss": 1.5})
    results.note(pd.Series({("Backpack", "removed"): 0.25}), "excess, {} {}")
    table = pd.DataFrame({"low": [1.0, 2.0], "high": [3.0, 4.0]}, index=["a", "b"])
    results.note(table, "{1} of {0}")
    by_pair = table.set_axis(pd.MultiIndex.from_tuples([("he", "she"), ("he", "they")]))
    results.note(by_pair[["low"]], "{2}, {0} and {1}")
    assert results.numbers == {
        "loss": 1.5, "excess, Backpack removed": 0.25, "low of a": 1.0, "low of b": 2.0, "high of a": 3.0,
        "high of b": 4.0, "low, he and she": 1.0, "low, he and they": 2.0,
    }  # fmt: skip


def test_a_text_without_a_question_gets_the_likeliest_words(tmp_path):
    example = opening.open_lesson("00_tour", out=str(tmp_path), text="He opened the").example
    assert (example.target, example.contrast) == ("door", "window")
    asked = opening.open_lesson("00_tour", out=str(tmp_path), text="The film", target="was").example
    assert asked.target == "was"


@pytest.mark.parametrize("kind", ["english", "planted"])
@pytest.mark.parametrize("name", ["00_tour", "02_senses"])
def test_examples_are_single_tokens_of_the_shipped_models(name, kind, tmp_path):
    lesson = opening.open_lesson(name, {"english": "demo", "planted": "planted"}[kind], str(tmp_path))
    assert lesson.kind == kind
    for key in ("word", "other", "target", "contrast", "other_target", "other_contrast"):
        assert len(lesson.tokens_of(key)) == 1, key
    assert set(opening.examples(name, "english")) == set(opening.examples(name, "planted"))


def test_the_count_of_parameters_is_the_models():
    for name in ("demo", "planted"):
        model, _ = opening.load(name)
        assert of_training.parameter_counts(model.config).sum() == model.num_parameters()


def test_seeds_are_compared_within_a_seed():
    rows = [
        (m, 1, s, 1.0 + 0.1 * s - d, 0.9) for s in range(4) for m, d in (("Backpack", 0.01), ("Transformer", 0.001 * s))
    ]
    table = pd.DataFrame(rows, columns=["model", "parameters", "seed", "valid_loss", "floor"])
    found = of_training.differences_over_seeds(table, "Transformer")
    assert found["difference"] == pytest.approx(0.01 - 0.0015) and found["low"] > 0 and found["p"] < 0.05


def test_the_stored_seeds_are_those_of_the_shipped_models():
    table = of_training.seeds_table().set_index(["model", "seed"])
    (model, tokenizer), floor = opening.load("planted"), table["floor"].iloc[0]
    assert model.num_parameters() == table.loc[("Backpack", 0), "parameters"]
    texts = [text.text for text in planted.generate(300, seed=5)]  # whole texts, so a little below the loss of blocks
    assert of_training.mean_loss(model, tokenizer, texts) == pytest.approx(
        table.loc[("Backpack", 0), "valid_loss"], abs=0.1
    )
    assert floor < table["valid_loss"].min()


@pytest.mark.parametrize(
    "check, wrong",
    [
        (lambda a: tour.check_halved(a, 2.0, 1.0), {1.0: "silenced", 2.5: "mind the sign", None: "finite number"}),
        (lambda a: of_training.check_count(a), {4 * 768 * 768: "k of them", "many": "finite number"}),
        (lambda a: of_training.check_chance(a, 8), {0.875: "three topics"}),
        (lambda a: of_senses.check_luck(a), {0.0: "the largest of them is not", 0.125: "typical one"}),
        (lambda a: of_training.check_why_lower(a), {"a": "reverses the order", "x": "choose one of"}),
        (lambda a: of_senses.check_strongest_push(a, None, "x"), {3: "a pair"}),
    ],
)
def test_wrong_answers_are_told_why(check, wrong):
    for answer, hint in wrong.items():
        said = check(answer)
        assert said.startswith("Not yet") and hint in said, said
