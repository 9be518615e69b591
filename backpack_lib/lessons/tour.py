"""The checks of 00_tour's exercises."""

from backpack_lib.lessons.exercises import check_function, check_number, check_strongest_push, random_cases  # noqa: F401


def check_sum_of_weights(answer, reading) -> str:
    return check_number(answer, reading.weights.sum(0).mean().item())


def check_contributions(answer) -> str:
    """answer: (weights (T, k), senses (T, k, d), two embeddings (d,)) -> contributions (T, k)."""
    cases = random_cases("Tk Tkd d d", T=(1, 4, 6), k=(2, 3, 1), d=(3, 5, 2))
    return check_function(answer, lambda weights, senses, E_a, E_b: weights * (senses @ (E_a - E_b)), cases)


def check_halved(answer, log_odds: float, contribution: float) -> str:
    hints = [
        (log_odds - contribution, "that is the sense silenced; half of its contribution stays."),
        (log_odds / 2, "that halves all contributions; only one sense of one word is halved."),
        (log_odds + contribution / 2, "mind the sign: the contribution becomes smaller."),
    ]
    return check_number(answer, log_odds - contribution / 2, hints)
