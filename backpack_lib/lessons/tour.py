"""The checks of 00_tour's exercises."""

import torch

from backpack_lib.lessons.exercises import check_function, check_number, check_strongest_push  # noqa: F401


def check_sum_of_weights(answer, reading) -> str:
    return check_number(answer, reading.weights.sum(0).mean().item())


def check_contributions(answer) -> str:
    """answer: (weights (T, k), senses (T, k, d), two embeddings (d,)) -> contributions (T, k)."""

    def reference(weights, senses, E_a, E_b):
        return weights * (senses @ (E_a - E_b))

    made, cases = torch.Generator().manual_seed(0), []
    for T, k, d in [(1, 2, 3), (4, 3, 5), (6, 1, 2)]:
        cases.append([torch.randn(size, generator=made) for size in ((T, k), (T, k, d), (d,), (d,))])
    return check_function(answer, reference, cases)


def check_halved(answer, log_odds: float, contribution: float) -> str:
    hints = [
        (log_odds - contribution, "that is the sense silenced; half of its contribution stays."),
        (log_odds / 2, "that halves all contributions; only one sense of one word is halved."),
        (log_odds + contribution / 2, "mind the sign: the contribution becomes smaller."),
    ]
    return check_number(answer, log_odds - contribution / 2, hints)
