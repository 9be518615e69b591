"""Topic control: text drawn toward a topic by giving its senses more weight (Hewitt et al., 2023, section 5).

    control = TopicControl(model, tokenizer, ["sports"], strength=2)
    texts = control.generate(["The team"] * 8, max_new_tokens=60)

A topic is a few words. The score of a sense is how far it pushes them, as a share of what it pushes most. The senses
of highest score get more weight. While a text is written, a sense is released again as soon as the text has said
what it pushes (annealing); otherwise it would say so forever.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from copy import copy

import torch

from backpack_lib.model.hooks import hooked
from backpack_lib.model.kinds import require_senses, used_tokens
from backpack_lib.text.words import known_tokens_of_word
from backpack_lib.text.writing import continue_texts

QUANTILES = (0.95, 0.80, 0.60)
# What senses above each quantile, and all the others, are multiplied by.
STRENGTHS = {0: (1.0, 1.0, 1.0, 1.0), 1: (1.5, 1.5, 1.3, 1.0), 2: (2.2, 2.2, 1.5, 1.0), 3: (3.3, 3.3, 3.0, 1.0)}
TOKENS_AT_ONCE = 32
READINESS = 6.0  # a sense that has said nothing yet is sigmoid(6) = 99.8 % on
GREATEST_RELEASE = 7.5  # the rate of release is the greatest delta divided by this, as in the paper's code
GROWTH = 100  # positions over which a factor grows by as much as it is


class TopicControl:
    """Steers the generation of a Backpack, or of a sense lens, toward a topic.

    words: the topic, one word or several. strength: 0 (nothing changes) to 3; deltas: other factors for senses above
        the quantiles .95, .80 and .60, and for all the others. annealing: release senses whose words the text has said.
    sampled: how many tokens' scores say where the quantiles lie, so that a large vocabulary takes no longer than a small
        one. With 2,000 their level is off by about .005, with 400 by .01. Other scores are computed, and kept, when
        their token is first met.

    Raises ValueError for no words, words that the vocabulary lacks, and an unknown strength.
    """

    def __init__(
        self,
        model,
        tokenizer,
        words: str | Iterable[str],
        strength: int = 2,
        deltas: Iterable[float] | None = None,
        annealing: bool = True,
        sampled: int = 2000,
    ):
        require_senses(model)
        self.model, self.tokenizer, self.annealing = model, tokenizer, annealing
        self.deltas, self.sampled = deltas_of(strength, deltas), sampled_tokens(model, sampled)  # ids
        size = model.config.vocab_size, model.config.num_senses
        self._largest = torch.full(size, torch.nan, device=model.device)  # of tokens met; shared by all topics
        self._set_topic(words)

    def _set_topic(self, words: str | Iterable[str]):
        self.words = [words] if isinstance(words, str) else list(words)
        self.direction = topic_direction(self.model, self.tokenizer, self.words)
        self._scores = torch.full_like(self._largest, torch.nan)
        scores = self.scores_of(self.sampled)
        self.thresholds = torch.quantile(scores, scores.new_tensor(QUANTILES))

    def toward(self, words: str | Iterable[str]) -> "TopicControl":
        """The same control toward another topic, at once, since the largest pushes are the same for all topics."""
        other = copy(self)
        other._set_topic(words)
        return other

    def at(self, strength: int) -> "TopicControl":
        """The same topic at another strength, at once, since the scores stay."""
        other = copy(self)
        other.deltas = deltas_of(strength)
        return other

    @torch.no_grad()
    def scores_of(self, ids: torch.Tensor) -> torch.Tensor:
        """How far each sense of tokens pushes the topic, as a share of its largest push. (...) -> (..., k)"""
        for new in ids[self._scores[ids, 0].isnan()].unique().split(TOKENS_AT_ONCE):
            senses = self.model.sense_vectors(new, patched=False).float()  # as they are without edits and control
            self._scores[new] = senses @ self.direction / self.largest_pushes(new)
        return self._scores[ids]

    @torch.no_grad()
    def largest_pushes(self, ids: torch.Tensor) -> torch.Tensor:
        """The largest entry of E C(x)_l for each sense of tokens, which is nearly all the work. (n,) -> (n, k)"""
        E = self.model.get_output_embeddings().weight[: len(used_tokens(self.model))]  # a view: no copy at each call
        for new in ids[self._largest[ids, 0].isnan()].unique().split(TOKENS_AT_ONCE):
            self._largest[new] = (self.model.sense_vectors(new, patched=False).to(E) @ E.T).amax(-1).float()
        return self._largest[ids]

    def factors_of(self, ids: torch.Tensor) -> torch.Tensor:
        """What each sense of tokens is multiplied by. (...) -> (..., k)"""
        scores = self.scores_of(ids)
        factors = torch.full_like(scores, self.deltas[-1])
        for threshold, delta in zip(self.thresholds.flip(0), self.deltas[-2::-1]):  # the highest last
            factors[scores > threshold] = delta
        return factors

    def applied(self) -> AbstractContextManager:
        """The model under this control, for as long as the `with` lasts. With annealing, for one `generate()` only."""
        if set(self.deltas) == {1.0}:
            return nullcontext()
        if self.annealing:
            annealing = Annealing(self.model, self.factors_of, max(self.deltas) / GREATEST_RELEASE)
            return hooked(self.model.weight_hooks, annealing)
        return hooked(self.model.patches, lambda ids, senses: senses * self.factors_of(ids).to(senses)[..., None])

    def generate(self, prompts: list[str], max_new_tokens: int = 100, seed: int = 0, **settings) -> list[str]:
        """Each prompt and its continuation under this control, by plain sampling unless settings say otherwise."""
        if self.annealing and settings.get("num_beams", 1) > 1:
            raise ValueError("Annealing follows one text at a time, so it does not go with num_beams; sample instead.")
        with self.applied():
            return continue_texts(self.model, self.tokenizer, prompts, max_new_tokens, seed, **{"top_k": 0} | settings)


def deltas_of(strength: int, deltas: Iterable[float] | None = None) -> tuple[float, ...]:
    """The factors of a strength, or those given, which should be four numbers."""
    if deltas is None:
        if strength not in STRENGTHS:
            choices = ", ".join(map(str, STRENGTHS))
            raise ValueError(f"strength={strength!r} is not in the table; choose one of {choices}.")
        return STRENGTHS[strength]
    deltas = tuple(float(delta) for delta in deltas)
    if len(deltas) != len(QUANTILES) + 1 or not all(map(math.isfinite, deltas)):
        raise ValueError(
            f"deltas={deltas} should be {len(QUANTILES) + 1} finite numbers, for {QUANTILES} and the rest."
        )
    return deltas


@torch.no_grad()
def topic_direction(model, tokenizer, words: list[str]) -> torch.Tensor:
    """b E, (d,): its product with a sense is what the first tokens of a topic's words get of it together."""
    if not words:
        raise ValueError("A topic needs at least one word, and none was given.")
    first = [known_tokens_of_word(tokenizer, word)[0] for word in words]
    return model.get_output_embeddings().weight[first].float().sum(0)


def sampled_tokens(model, n: int) -> torch.Tensor:
    """At most n token ids, evenly over the vocabulary, in which common tokens stand first."""
    ids = used_tokens(model)
    return ids if len(ids) <= n else ids[torch.linspace(0, len(ids) - 1, n, device=ids.device).long()]


def released(said: torch.Tensor, factors: torch.Tensor, rate: float, positions: torch.Tensor) -> torch.Tensor:
    """The weight that a sense has left when the text has said so much of what it pushes.

    said: the sum, over the tokens generated so far, of how far the sense pushes each, if up. positions: the sense's
    position in its text. With s = sigmoid(6 - rate said) (1 + position / 100), it is s factor + (1 - s).
    """
    s = torch.sigmoid(READINESS - rate * said) * (1 + positions / GROWTH)
    return s * factors + (1 - s)


class Annealing:
    """Weighs the senses of a text that is being written: (alpha, senses, input_ids, attention_mask) -> alpha.

    Follows one `generate()` with or without a cache: the first call brings the prompts, each later one what has been
    generated since, or, without a cache, the whole text. factors_of: of tokens, (...) -> (..., k).
    """

    def __init__(self, model, factors_of: Callable, rate: float):
        self.factors_of, self.rate = factors_of, rate
        self.embeddings = model.get_output_embeddings().weight.detach()
        self.ids = None

    def __call__(self, alpha, senses, input_ids, attention_mask=None):
        if self.ids is None:  # the prompts
            self.prompt = input_ids.shape[1]
        if alpha.shape[-1] == input_ids.shape[1]:
            self.ids = input_ids
            self.said = self._pushed(senses, input_ids[:, self.prompt :])
        else:
            n = input_ids.shape[1]
            earlier = self._pushed(senses[:, :, -n:], self.ids[:, self.prompt :])  # what new senses had said before
            self.ids = torch.cat([self.ids, input_ids], 1)
            self.said = torch.cat([self.said, earlier], 2) + self._pushed(senses, input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(self.ids)
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, None]  # padding takes no position
        factors = self.factors_of(self.ids).transpose(1, 2)  # (B, k, S)
        return alpha * released(self.said, factors, self.rate, positions)[:, :, None].to(alpha)

    def _pushed(self, senses, ids):
        """How far senses, (B, k, S, d), push tokens, (B, G), up, summed over the tokens. -> (B, k, S)"""
        E = self.embeddings[ids].transpose(1, 2)  # (B, d, G)
        return (senses.flatten(1, 2) @ E).relu().sum(-1).float().unflatten(1, senses.shape[1:3])
