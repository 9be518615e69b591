"""How far a model leans to one of two words after a profession, which senses carry that, and turning them down.

    odds = log_odds(model, tokenizer, ["nurse", "guard"], ["The {profession} said that"])  # of "he" to "she"
    split = split_odds(model, tokenizer, professions, templates)  # into what each sense contributes
    senses = localize(split).senses
    edits = debias(model, tokenizer, professions, senses)

The measure and the edit are those of Hewitt et al. (2023); there the sense was found by looking. Log-odds split
exactly into what each sense of each token contributes, so here all senses are compared, with statistics. And since
an edit of senses leaves the contextualisation weights as they are, the log-odds after scaling are known beforehand.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from backpack_lib.analysis.edits import SenseEdits
from backpack_lib.analysis.scores import next_log_probabilities, readings
from backpack_lib.analysis.statistics import bootstrap, p_value
from backpack_lib.text.words import known_tokens_of_word, token_of_word

SLOT = "{profession}"
PAIR = ("he", "she")
RESAMPLES, PERMUTATIONS = 2000, 9999


# ---------------------------------------------------------------- measuring


def log_odds(model, tokenizer, professions: list[str], templates: list[str], pair=PAIR) -> pd.DataFrame:
    """log p(first) - log p(second) of the next token in nats: a row for each profession, a column for each template.

    Raises ValueError for a template without `{profession}`, a profession that it would spell with other tokens, and a
    pair that is not two words of one token.
    """
    first, second = tokens_of_pair(tokenizer, pair)
    log_probs = next_log_probabilities(model, tokenizer, fill(tokenizer, professions, templates))
    odds = (log_probs[:, first] - log_probs[:, second]).cpu().double().view(len(professions), len(templates))
    return pd.DataFrame(odds.numpy(), index=pd.Index(professions, name="profession"), columns=templates)


def ratio(odds) -> float:
    """The mean over professions and templates of how many times as likely the likelier word is; 1 is no bias."""
    return float(np.exp(np.abs(np.asarray(odds))).mean())


def excess_removed(before, after) -> float:
    """The share of what the ratio has above one that an edit takes away; below zero if it adds to it."""
    return 1 - (ratio(after) - 1) / (ratio(before) - 1)


def fill(tokenizer, professions: list[str], templates: list[str]) -> list[str]:
    """Each template with each profession in its slot, the templates of the first profession first."""
    for name, entries in (("professions", professions), ("templates", templates)):
        if isinstance(entries, str) or not len(entries):
            raise ValueError(f"{name}={entries!r} should be a list with at least one entry.")
        for entry, times in Counter(entries).items():
            if times > 1:
                raise ValueError(f"{entry!r} is twice among the {name}; leave one out.")
    for template in templates:
        if SLOT not in template:
            raise ValueError(f"The template {template!r} has no slot; write {SLOT} where the profession belongs.")
    prompts = []
    for profession in professions:
        ids = known_tokens_of_word(tokenizer, profession)
        for template in templates:
            prompts.append(template.replace(SLOT, profession))
            in_prompt = tokenizer(prompts[-1], add_special_tokens=False)["input_ids"]
            if not any(in_prompt[start : start + len(ids)] == ids for start in range(len(in_prompt))):
                raise ValueError(
                    f"In the template {template!r} the profession {profession!r} is spelled with other tokens than "
                    "after a space; put the slot after a space, with nothing attached to it."
                )
    return prompts


def tokens_of_pair(tokenizer, pair) -> tuple[int, int]:
    """The tokens of two different words of one token each."""
    if isinstance(pair, str) or len(pair) != 2:
        raise ValueError(f"pair={pair!r} should be two words, such as {PAIR}.")
    first, second = (token_of_word(tokenizer, word) for word in pair)
    if first == second:
        raise ValueError(f"The pair holds the same word twice: {pair[0]!r}; give two different ones.")
    return first, second


def check_split(fit: list[str], test: list[str]):
    """Raises ValueError if a split is empty, or if a template is in both."""
    for name, templates in (("fitting", fit), ("testing", test)):
        if not templates:
            raise ValueError(f"There is no template for {name}; give at least one.")
    if both := sorted({*map(str.strip, fit)} & {*map(str.strip, test)}):
        raise ValueError(
            f"The template {both[0]!r} is used for fitting and for testing; what is fitted must be tested elsewhere."
        )


def separable(tokenizer, professions: list[str], templates: list[str]) -> list[str]:
    """Those professions of which no token is another's or a template's, so that they can be edited apart."""
    words = " ".join(templates).replace(SLOT, " ")
    of_templates = set(tokenizer(" " + words, add_special_tokens=False)["input_ids"])
    tokens = {name: set(known_tokens_of_word(tokenizer, name)) for name in professions}
    uses = Counter(token for of_one in (of_templates, *tokens.values()) for token in of_one)
    return [name for name in professions if all(uses[token] == 1 for token in tokens[name])]


# ---------------------------------------------------------------- what carries it


@dataclass(frozen=True)
class Split:
    """Log-odds over professions P and templates T, and the exact parts that they are the sum of."""

    odds: np.ndarray  # (P, T)
    own: np.ndarray  # (P, T, k), from each sense of the profession's own tokens, wherever they stand in the prompt
    rest: np.ndarray  # (P, T, k), from all other tokens; of a sense lens (P, T, k + 1), the residual's part last

    def scaled(self, senses: list[int], scale: float) -> np.ndarray:
        """The log-odds once these senses of all professions are multiplied by the scale, (P, T)."""
        return self.odds - (1 - scale) * self.own[..., senses].sum(-1)


def split_odds(model, tokenizer, professions: list[str], templates: list[str], pair=PAIR) -> Split:
    """The log-odds of a model with senses, split by sense."""
    first, second = tokens_of_pair(tokenizer, pair)
    prompts = fill(tokenizer, professions, templates)
    words = [known_tokens_of_word(tokenizer, name) for name in professions for _ in templates]
    own, rest = [], []
    for word, (ids, reading) in zip(words, readings(model, tokenizer, prompts), strict=True):
        parts = reading.contributions(first, second).cpu().double()  # (T, k), and a lens' residual in another row
        of_word = np.isin(ids, word)
        senses, residual = parts[: len(ids)].numpy(), parts[len(ids) :, 0].numpy()
        own.append(senses[of_word].sum(0))
        rest.append(np.concatenate([senses[~of_word].sum(0), residual]))
    shape = len(professions), len(templates), -1
    own, rest = np.reshape(own, shape), np.reshape(rest, shape)
    return Split(own.sum(-1) + rest.sum(-1), own, rest)


@dataclass(frozen=True)
class Localization:
    """Which senses carry the differences between professions.

    table: a row for each sense. level: the mean of what it adds to the log-odds, in nats. share: its part of the
        differences, with its interval low, high. p: of the test of those in `senses`, corrected for the number of
        senses; the others are not tested.
    """

    table: pd.DataFrame
    elsewhere: float  # the part of the differences that lies in all other tokens; it and the shares sum to one
    senses: list[int]  # the fewest that carry the wanted share, the largest first; if none can, all that carry any
    share: float  # what they carry together
    p: float  # of the test of that, corrected for the choice


def localize(split: Split, wanted: float = 0.9, seed: int = 0) -> Localization:
    """Finds the senses that carry a model's differences between professions.

    The share of a sense is cov(c, y) / var(y) over professions, where y are their log-odds and c what the sense of
    their own tokens contributes, both averaged over templates: since all contributions sum to y, all shares sum to
    one. Intervals: bootstrap over professions and over templates. Test: if no sense were special, the contributions
    (less their mean over professions) could be permuted within each profession; y would stay as it is. p is how often
    the greatest share under such permutations is as great, which corrects for the number of senses. For the next
    sense of the set it is asked again among the senses that are left, and so on.
    """
    if not 0 < wanted <= 1:
        raise ValueError(f"wanted={wanted} should be a share above 0 and up to 1.")
    if len(split.odds) < 3:
        raise ValueError(f"Differences between professions need three of them, and {len(split.odds)} were given.")
    if np.ptp(split.odds.mean(1)) < 1e-6:
        raise ValueError("The log-odds of all professions are the same, so there is no difference to find.")
    share = shares(split.odds, split.own)
    low, high = bootstrap(shares, split.odds, split.own, axes=2, resamples=RESAMPLES, seed=seed)
    senses = fewest(share, wanted)
    together = permuted_shares(split, range(len(share)), seed)[:, : len(senses)].sum(1)
    columns = {"level": split.own.mean((0, 1)), "share": share, "low": low, "high": high}
    table = pd.DataFrame(columns | {"p": step_down(split, share, senses, seed)}).rename_axis("sense")
    total, elsewhere = share[senses].sum(), shares(split.odds, split.rest).sum()
    return Localization(table, float(elsewhere), senses, float(total), p_value(together, total))


def shares(odds: np.ndarray, contributions: np.ndarray) -> np.ndarray:
    """The part of each sense in the differences between professions, (P, T), (P, T, k) -> (k,); NaN without any."""
    y = odds.mean(1) - odds.mean()
    c = contributions.mean(1)
    return (c - c.mean(0)).T @ y / (y @ y or np.nan)


def fewest(share: np.ndarray, wanted: float) -> list[int]:
    """The fewest senses that together have the wanted share, the largest first; if none have, all above zero."""
    order = np.argsort(-share)
    able = order[share[order] > 0]
    reached = np.flatnonzero(share[able].cumsum() >= wanted)
    return able[: reached[0] + 1 if len(reached) else None].tolist()


def permuted_shares(split: Split, senses: Iterable[int], seed: int) -> np.ndarray:
    """Shares when each profession's contributions are permuted, (permutations, senses), each row in falling order."""
    y = split.odds.mean(1) - split.odds.mean()
    c = split.own.mean(1)[:, list(senses)]
    c = c - c.mean(0)
    rng = np.random.default_rng(seed)
    null = np.stack([rng.permuted(c, axis=1).T @ y for _ in range(PERMUTATIONS)]) / (y @ y)
    return -np.sort(-null, axis=1)


def step_down(split: Split, share: np.ndarray, senses: list[int], seed: int) -> np.ndarray:
    """p of each of the senses, which begin with the greatest share, and NaN for all others, (k,)."""
    p, left, least = np.full(len(share), np.nan), list(np.argsort(-share)), 0.0
    for sense in senses:
        greatest = permuted_shares(split, left, seed)[:, 0]
        p[sense] = least = max(least, p_value(greatest, share[sense]))
        left.remove(sense)
    return p


# ---------------------------------------------------------------- turning it down


def debias(model, tokenizer, professions: list[str], senses: Iterable[int], scale: float = 0.0) -> SenseEdits:
    """Edits that scale senses of all tokens of professions, wherever they occur; 0 removes them."""
    tokens = tokens_of_professions(tokenizer, professions)
    return SenseEdits(model, tokenizer, "professions turned down").scale(tokens, list(senses), scale)


def tokens_of_professions(tokenizer, professions: list[str]) -> list[int]:
    return sorted({token for name in professions for token in known_tokens_of_word(tokenizer, name)})


@contextmanager
def nullspace(model, tokenizer, professions: list[str], pair=PAIR) -> Iterator:
    """A Transformer whose professions lose what their input embeddings hold of E_second - E_first.

    The baseline of Hewitt et al. (2023); output embeddings stay.
    """
    first, second = tokens_of_pair(tokenizer, pair)
    E = model.get_output_embeddings().weight.detach()
    direction = torch.nn.functional.normalize(E[second] - E[first], dim=0)
    edited = torch.tensor(tokens_of_professions(tokenizer, professions), device=model.device)

    def project(_module, inputs, embeddings):
        along = (embeddings @ direction)[..., None] * direction
        return torch.where(torch.isin(inputs[0], edited)[..., None], embeddings - along, embeddings)

    with model.get_input_embeddings().register_forward_hook(project):
        yield model
