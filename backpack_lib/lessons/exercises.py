"""Checks of a reader's answers: each answers at once, says what is wrong, and does not give the answer away.

A check returns one sentence. It begins with "Right" or with "Not yet".
"""

import math
from collections.abc import Callable, Iterable
from numbers import Real

import torch

from backpack_lib.text.words import token_of_word

NO_NUMBER = "Not yet: give one finite number."


def finite_number(answer) -> float | None:
    """The number that an answer is, also as a tensor of one; None if it is none."""
    if isinstance(answer, torch.Tensor) and answer.numel() == 1:
        answer = answer.item()
    usable = isinstance(answer, Real) and not isinstance(answer, bool) and math.isfinite(answer)
    return float(answer) if usable else None


def check_number(answer, truth: float, hints: Iterable[tuple[float, str]] = (), tolerance: float = 1e-3) -> str:
    """hints: what wrong numbers say about the mistake."""
    answer = finite_number(answer)
    if answer is None:
        return NO_NUMBER
    if abs(answer - truth) <= tolerance * max(1.0, abs(truth)):
        return f"Right: {truth:.4g}."
    for wrong, hint in hints:
        if abs(answer - wrong) <= tolerance * max(1.0, abs(wrong)):
            return f"Not yet: {hint}"
    return f"Not yet: {answer:.4g} is too {'high' if answer > truth else 'low'}."


def check_tensor(answer, truth: torch.Tensor, hints: Iterable[tuple[torch.Tensor, str]] = (), tolerance=1e-4) -> str:
    """As `check_number`, for all entries of a tensor."""
    if not isinstance(answer, torch.Tensor):
        return f"Not yet: give a tensor of shape {tuple(truth.shape)}."
    if answer.shape != truth.shape:
        return f"Not yet: the shape should be {tuple(truth.shape)}, and it is {tuple(answer.shape)}."
    answer, truth = answer.detach().float().cpu(), truth.detach().float().cpu()
    if torch.allclose(answer, truth, atol=tolerance):
        return "Right: all entries agree."
    for wrong, hint in hints:
        if torch.allclose(answer, wrong.detach().float().cpu(), atol=tolerance):
            return f"Not yet: {hint}"
    apart = ((answer - truth).abs() > tolerance) | answer.isnan()
    place = tuple(apart.nonzero()[0].tolist())
    return f"Not yet: {int(apart.sum())} of {truth.numel()} entries are wrong, the first at {place}."


def check_function(answer, reference: Callable, cases: Iterable[tuple], tolerance: float = 1e-4) -> str:
    """Calls a function of the reader's on each case, a tuple of arguments, and compares it with the reference."""
    if not callable(answer):
        return "Not yet: define the function."
    for number, case in enumerate(cases, start=1):
        try:
            found = answer(*case)
        except Exception as error:  # whatever the reader's code does, the notebook goes on
            return f"Not yet: in case {number} it raises {type(error).__name__}: {error}"
        truth = reference(*case)
        check = check_tensor if isinstance(truth, torch.Tensor) else check_number
        verdict = check(found, truth, tolerance=tolerance)
        if not verdict.startswith("Right"):
            return verdict.replace("Not yet:", f"Not yet: in case {number}", 1)
    return f"Right: it agrees in all {number} cases."


def random_cases(shapes: str, **sizes: tuple[int, ...]) -> list[list[torch.Tensor]]:
    """Cases of random tensors: `random_cases("Tk kd", T=(1, 2), k=(3, 4), d=(5, 6))` makes two, of two tensors each."""
    draw, cases = torch.Generator().manual_seed(0), []
    for numbers in zip(*sizes.values()):
        size_of = dict(zip(sizes, numbers))
        cases.append([torch.randn([size_of[name] for name in shape], generator=draw) for shape in shapes.split()])
    return cases


def check_strongest_push(answer, lesson, target: str | int) -> str:
    """A pair (sense, push): the sense of a lesson's `word` that pushes a word, or a token, up most."""
    if not (isinstance(answer, tuple) and len(answer) == 2):
        return "Not yet: give a pair (sense, push)."
    x = torch.tensor(lesson.tokens_of("word")[-1:], device=lesson.embeddings.device)
    with torch.no_grad():
        pushed = lesson.model.sense_vectors(x)[0] @ lesson.embeddings[token_of_word(lesson.tokenizer, target)]
    sense, push = answer
    hints = [(pushed.argmin().item(), "that sense pushes it down most.")]
    said = check_number(sense, pushed.argmax().item(), hints, 0.1)
    return said if said.startswith("Not") else check_number(push, pushed.max().item())
