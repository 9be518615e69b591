"""How far a model leans to one of two words after a profession, which senses carry that, and turning them down.

    odds = log_odds(model, tokenizer, ["nurse", "guard"], ["The {profession} said that"])  # of "he" to "she"
    found = localize(model, tokenizer, professions, templates)
    scales = fit_scales(model, tokenizer, professions, templates, found.senses)
    edits = debias(model, tokenizer, professions, found.senses, scales)

The measure and the edit are those of Hewitt et al. (2023); there the sense was found by looking. Log-odds split
exactly into what each sense of each token contributes, so here all senses are compared, with statistics. And since
an edit of senses leaves the contextualisation weights as they are, the log-odds after scaling are known beforehand.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.interpolate import CubicSpline

from backpack_lib.analysis.edits import SenseEdits
from backpack_lib.analysis.scores import next_log_probabilities, prompt_batches
from backpack_lib.analysis.statistics import bootstrap_intervals, p_value
from backpack_lib.model.kinds import check_sense, has_senses, require_senses
from backpack_lib.text.words import known_tokens_of_word, spell, token_of_word

SLOT = "{profession}"
PAIR = ("he", "she")
GRID = 41  # scales between the bounds
TRIED, APART = 11, 0.2  # at how many of them at least, and how far apart at most, a Transformer is run


# ---------------------------------------------------------------- measuring


def log_odds(model, tokenizer, professions: list[str], templates: list[str], pair=PAIR) -> pd.DataFrame:
    """log p(first) - log p(second) of the next token in nats: a row for each profession, a column for each template.

    Raises ValueError for no professions or templates, a template without the slot `{profession}`, a profession that
    the vocabulary lacks or that is spelled with other tokens in a template, and a pair that is not two words of one
    token each.
    """
    tokens = tokens_of_pair(tokenizer, pair)
    odds = log_odds_after(model, tokenizer, fill(tokenizer, professions, templates), tokens)
    odds = odds.reshape(len(professions), len(templates))
    return pd.DataFrame(odds, index=pd.Index(professions, name="profession"), columns=templates)


def log_odds_after(model, tokenizer, prompts: list[str], tokens: tuple[int, int]) -> np.ndarray:
    """Log-odds of one token to another after each prompt, (n,)."""
    found = next_log_probabilities(model, tokenizer, prompts)
    return (found[:, tokens[0]] - found[:, tokens[1]]).cpu().double().numpy()


def ratio(odds) -> float:
    """The mean over professions and templates of how many times as likely the likelier word is; 1 is no bias."""
    return float(np.exp(np.abs(np.asarray(odds))).mean())


def bias_ratio(model, tokenizer, professions: list[str], templates: list[str], pair=PAIR) -> float:
    """The bias of a model: `ratio` of its `log_odds`, which says what it raises."""
    return ratio(log_odds(model, tokenizer, professions, templates, pair))


def excess_removed(before, after) -> float:
    """The share of what the ratio has above one that an edit takes away; below zero if it adds to it."""
    return 1 - (ratio(after) - 1) / (ratio(before) - 1)


def kl_of_other_words(before: torch.Tensor, after: torch.Tensor, but: list[int]) -> float:
    """How far the probabilities of all but some tokens moved: the mean KL divergence in nats, these tokens left out.

    before, after: log-probabilities of the next token after n prompts, (n, V).
    """
    return kl_of_other_words_each(before, after, but).mean().item()


def kl_of_other_words_each(before: torch.Tensor, after: torch.Tensor, but: list[int]) -> torch.Tensor:
    """`kl_of_other_words` of each prompt, (n,)."""
    before, after = (
        x.index_fill(1, torch.tensor(but, device=x.device), -torch.inf).log_softmax(-1) for x in (before, after)
    )
    return (before.exp() * (before - after).nan_to_num()).sum(-1)


def fill(tokenizer, professions: list[str], templates: list[str]) -> list[str]:
    """Each template with each profession in its slot, the templates of the first profession first.

    Raises ValueError as `log_odds` does.
    """
    for name, given in (("professions", professions), ("templates", templates)):
        if isinstance(given, str) or not len(given):
            raise ValueError(f"{name}={given!r} should be a list with at least one entry.")
        if twice := [one for number, one in enumerate(given) if one in given[:number]]:
            raise ValueError(f"{twice[0]!r} is twice among the {name}; leave one out.")
    for template in templates:
        if SLOT not in template:
            raise ValueError(f"The template {template!r} has no slot; write {SLOT} where the profession belongs.")
    prompts = []
    for profession in professions:
        ids = known_tokens_of_word(tokenizer, profession)
        for template in templates:
            prompts.append(template.replace(SLOT, profession))
            if not holds(tokenizer(prompts[-1], add_special_tokens=False)["input_ids"], ids):
                raise ValueError(
                    f"In the template {template!r} the profession {profession!r} is spelled with other tokens than "
                    "after a space; put the slot after a space, with nothing attached to it."
                )
    return prompts


def holds(ids: list[int], part: list[int]) -> bool:
    """Whether a text's ids hold a word's, one after the other."""
    return any(ids[start : start + len(part)] == part for start in range(len(ids)))


def tokens_of_pair(tokenizer, pair) -> tuple[int, int]:
    """The tokens of the two words. Raises ValueError if they are not two different words of one token."""
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
    """Those professions that can be edited without touching another's, or the templates', words: no token is shared.

    A profession of several tokens may share one of them. Of two that share one, neither is returned.
    """
    words = " ".join(templates).replace(SLOT, " ")
    of_templates = set(tokenizer(" " + words, add_special_tokens=False)["input_ids"])
    tokens = {name: set(known_tokens_of_word(tokenizer, name)) for name in professions}
    uses = Counter(token for of_one in (of_templates, *tokens.values()) for token in of_one)
    return [name for name in professions if all(uses[token] == 1 for token in tokens[name])]


# ---------------------------------------------------------------- what carries it


@dataclass(frozen=True)
class Split:
    """Log-odds over professions P and templates T, and the exact parts that they are the sum of.

    odds: (P, T). own: (P, T, k), from each sense of the profession's own tokens, wherever they stand in the prompt.
    rest: (P, T, k), from each sense of all other tokens.
    """

    odds: np.ndarray
    own: np.ndarray
    rest: np.ndarray

    def scaled(self, senses: list[int], scales: np.ndarray | float) -> np.ndarray:
        """The log-odds once these senses of the professions are scaled, by one number or one for each, (P, T)."""
        return self.odds - (1 - np.reshape(scales, (-1, 1))) * self.own[..., senses].sum(-1)


@torch.inference_mode()
def split_odds(model, tokenizer, professions: list[str], templates: list[str], pair=PAIR) -> Split:
    """The log-odds of a Backpack, split by sense. Raises ValueError as `log_odds` does, and for another model."""
    require_senses(model)
    direction = difference(model, tokenizer, pair)
    prompts = fill(tokenizer, professions, templates)
    of_prompt = iter([known_tokens_of_word(tokenizer, name) for name in professions for _ in templates])
    own, rest = [], []
    for ids, mask, last in prompt_batches(model, tokenizer, prompts):
        out = model.base_model(ids, attention_mask=mask, output_senses=True, use_cache=False)
        alpha = out.contextualization[torch.arange(len(ids)), :, last]  # (B, k, T)
        contributions = (alpha * (out.senses @ direction)).cpu().double()  # not every GPU has doubles
        here = torch.stack([torch.isin(row, torch.tensor(word)) for row, word in zip(ids.cpu(), of_prompt)])
        own.append((contributions * here[:, None]).sum(-1))
        rest.append((contributions * ~here[:, None]).sum(-1))
    shape = len(professions), len(templates), model.config.num_senses
    own, rest = (torch.cat(found).view(shape).numpy() for found in (own, rest))
    return Split((own + rest).sum(-1), own, rest)


@dataclass(frozen=True)
class Localization:
    """Which senses carry the differences between professions.

    table: a row for each sense. level: the mean of what it adds to the log-odds, in nats. share: its part of the
        differences, with its interval low, high. p: of the test of those in `senses`, corrected for the number of
        senses; the others are not tested. ratio without: the bias that is left if it is removed.
    elsewhere: the part of the differences that lies in all other tokens; it and the shares sum to one.
    senses: the fewest that together carry the wanted share, the largest first; if none can, all that carry any.
    share: what they carry together. p: of the test of that, corrected for the choice.
    """

    table: pd.DataFrame
    elsewhere: float
    senses: list[int]
    share: float
    p: float


def localize(
    model, tokenizer, professions: list[str], templates: list[str], pair=PAIR, wanted: float = 0.9,
    resamples: int = 2000, permutations: int = 9999, seed: int = 0,
) -> Localization:  # fmt: skip
    """Finds the senses that carry a Backpack's differences between professions.

    The share of a sense is cov(c, y) / var(y) over professions, where y are their log-odds and c what the sense of
    their own tokens contributes, both averaged over templates: since all contributions sum to y, all shares sum to
    one. Intervals: bootstrap over professions and over templates. Test: if no sense were special, the contributions
    (less their mean over professions) could be permuted within each profession; y would stay as it
    is. p is how often the greatest share under such exchanges is as great, which corrects for the number of senses.
    For the next sense of the set it is asked again among the senses that are left, and so on.

    Raises ValueError as `log_odds` does, for fewer than three professions or none that differ, and if `wanted` is no
    share.
    """
    if not 0 < wanted <= 1:
        raise ValueError(f"wanted={wanted} should be a share above 0 and up to 1.")
    if len(professions) < 3:
        raise ValueError(f"Differences between professions need three of them, and {len(professions)} were given.")
    split = split_odds(model, tokenizer, professions, templates, pair)
    if np.ptp(split.odds.mean(1)) < 1e-6:
        raise ValueError("The log-odds of all professions are the same, so there is no difference to find.")
    share = shares(split.odds, split.own)
    low, high = bootstrap_intervals(shares, split.odds, split.own, resamples=resamples, seed=seed)
    senses = fewest(share, wanted)
    together = permuted_shares(split, range(len(share)), permutations, seed)[:, : len(senses)].sum(1)
    table = pd.DataFrame(
        {
            "level": split.own.mean((0, 1)),
            "share": share,
            "low": low,
            "high": high,
            "p": step_down(split, share, senses, permutations, seed),
            "ratio without": [ratio(split.scaled([sense], 0.0)) for sense in range(len(share))],
        }
    ).rename_axis("sense")
    total = float(share[senses].sum())
    return Localization(table, float(shares(split.odds, split.rest).sum()), senses, total, p_value(together, total))


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


def permuted_shares(split: Split, senses: Iterable[int], permutations: int, seed: int) -> np.ndarray:
    """Shares when each profession's contributions are permuted among its senses.

    -> (permutations, senses), each row in falling order
    """
    y = split.odds.mean(1) - split.odds.mean()
    c = split.own.mean(1)[:, list(senses)]
    c = c - c.mean(0)
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.permuted(c, axis=1).T @ y for _ in range(permutations)]) / (y @ y)
    return -np.sort(-drawn, axis=1)


def step_down(split: Split, share: np.ndarray, senses: list[int], permutations: int, seed: int) -> np.ndarray:
    """p of each of some senses, the greatest share first, and NaN for all others, (k,)."""
    p, left, least = np.full(len(share), np.nan), list(np.argsort(-share)), 0.0
    for sense in senses:
        greatest = permuted_shares(split, left, permutations, seed)[:, 0]
        p[sense] = least = max(least, p_value(greatest, share[sense]))
        left.remove(sense)
    return p


# ---------------------------------------------------------------- turning it down


def debias(
    model, tokenizer, professions: list[str], senses: list[int], scales: float | Mapping[str, float] = 0.0, along=None
) -> SenseEdits:
    """Edits that scale senses of professions, by one number for all of them or by one for each.

    along: a pair of words; then only what the senses hold of E_first - E_second is scaled. For the log-odds of this
    pair that is the same, but other words move less.

    All tokens of a profession are scaled, wherever they occur; so pieces of a profession of several tokens are
    scaled in other words, too.

    Raises ValueError as `SenseEdits` does, for a profession without a scale, and if two professions with different
    scales share a token.
    """
    edits, tokens_of_scale = SenseEdits(model, tokenizer, "professions turned down"), {}
    for token, scale in scales_of_tokens(tokenizer, professions, scales).items():
        tokens_of_scale.setdefault(scale, []).append(token)
    tokens_of_scale.pop(1.0, None)  # these stay as they are
    for scale, tokens in sorted(tokens_of_scale.items()):
        if along is None:
            edits.scale(tokens, senses, scale)
        else:
            edits.project(tokens, difference(model, tokenizer, along), sense=senses, by=scale)
    return edits


def mean_ablate(model, tokenizer, professions: list[str], senses: Iterable[int]) -> SenseEdits:
    """Edits that give all professions the same of some senses: their mean.

    What the professions have in common stays, so unlike a scale of 0 this leaves the balance between a profession
    and the rest of its sentence as it was.
    """
    tokens = list(scales_of_tokens(tokenizer, professions, 0.0))
    mean = model.sense_vectors(torch.tensor(tokens, device=model.device)).detach().mean(0)  # (k, d)
    edits = SenseEdits(model, tokenizer, "professions levelled")
    for sense in senses:
        edits.replace(tokens, sense, mean[sense])
    return edits


def difference(model, tokenizer, pair) -> torch.Tensor:
    """E_first - E_second, the direction of senses that the log-odds of a pair are read along, (d,)."""
    first, second = tokens_of_pair(tokenizer, pair)
    E = model.get_output_embeddings().weight.detach()
    return E[first] - E[second]


def scales_of_tokens(tokenizer, professions: list[str], scales: float | Mapping[str, float]) -> dict[int, float]:
    """The scale of each token of the professions; see `debias` for what it raises."""
    found = {}
    for profession in professions:
        scale = scales
        if isinstance(scales, Mapping | pd.Series):
            if profession not in scales:
                raise ValueError(f"There is no scale for the profession {profession!r}; give one for each.")
            scale = scales[profession]
        if not math.isfinite(scale):
            raise ValueError(f"The scale {scale} of {profession!r} should be a finite number.")
        for token in known_tokens_of_word(tokenizer, profession):
            if found.setdefault(token, float(scale)) != scale:
                raise ValueError(
                    f"{profession!r} and another profession share the token {spell(tokenizer, [token])[0]!r} and so "
                    "cannot be scaled apart; leave one of them out, or give one scale for all."
                )
    return found


@contextmanager
def nullspace(
    model, tokenizer, professions: list[str], scales: float | Mapping[str, float] = 0.0, pair=PAIR
) -> Iterator:
    """A Transformer whose professions lose what their input embeddings hold of E_second - E_first.

    The baseline of Hewitt et al. (2023). Scale 0 takes all of that direction away, 1 nothing; output embeddings stay.

    Raises ValueError as `debias` does, and for a wrong pair.
    """
    direction = difference(model, tokenizer, pair)
    direction = direction / direction.norm()
    table = model.get_input_embeddings()
    remaining = torch.ones(len(table.weight), device=model.device, dtype=table.weight.dtype)
    for token, scale in scales_of_tokens(tokenizer, professions, scales).items():
        remaining[token] = scale

    def project(_module, inputs, embeddings):
        removed = (1 - remaining[inputs[0]])[..., None] * (embeddings @ direction)[..., None]
        return embeddings - removed * direction

    handle = table.register_forward_hook(project)
    try:
        yield model
    finally:
        handle.remove()


def fit_scales(
    model, tokenizer, professions: list[str], templates: list[str], senses: list[int] | None = None, pair=PAIR,
    bounds: tuple[float, float] = (0.0, 1.0), shared: bool = False,
) -> pd.Series:  # fmt: skip
    """The scale of each profession at which its mean ratio over the templates is least, or one scale for all.

    For a Backpack what is scaled are `senses`, and the ratio at each scale is known without running the model again;
    for a Transformer it is what `nullspace` takes away, and the log-odds between the scales that are tried, which are
    smooth, are interpolated. Of scales that do equally well, the one nearest to 1 is taken.

    Raises ValueError as `log_odds` does, for bounds that hold no number, and for a Backpack without senses to scale.
    """
    low, high = bounds if len(bounds) == 2 else (math.nan, math.nan)
    if not low < high:
        raise ValueError(f"bounds={tuple(bounds)} should be a lower and a higher number.")
    grid = np.linspace(low, high, GRID)
    grid = grid[np.argsort(np.abs(grid - 1), kind="stable")]
    if has_senses(model):
        if not senses:
            raise ValueError("There is no sense to scale; give at least one, such as those that `localize` finds.")
        senses = [check_sense(model, sense) for sense in senses]
        split = split_odds(model, tokenizer, professions, templates, pair)
        odds_at = [split.scaled(senses, scale) for scale in grid]
    else:
        prompts, tokens, odds_at = fill(tokenizer, professions, templates), tokens_of_pair(tokenizer, pair), []
        tried = np.linspace(low, high, max(TRIED, math.ceil((high - low) / APART) + 1))
        for scale in tried:
            with nullspace(model, tokenizer, professions, scale, pair):
                odds = log_odds_after(model, tokenizer, prompts, tokens)
            odds_at.append(odds.reshape(len(professions), len(templates)))
        odds_at = CubicSpline(tried, odds_at)(grid)
    ratios = np.exp(np.abs(np.array(odds_at))).mean(-1)  # (scales, P)
    best = np.full(len(professions), ratios.mean(1).argmin()) if shared else ratios.argmin(0)
    return pd.Series(grid[best], index=pd.Index(professions, name="profession"), name="scale")
