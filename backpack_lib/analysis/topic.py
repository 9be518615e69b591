"""Topic control: text drawn toward a topic by turning up the senses that speak of it (Hewitt et al., 2023, section 5).

    control = TopicControl(model, tokenizer, ["sports"], strength=2)
    texts = control.generate(["The team"] * 8, max_new_tokens=60)

A topic is a few words. The score of a sense is how far it pushes them, as a share of what it pushes most. The senses
of highest score are weighed more. While a text is written, a sense is released again as soon as the text has said
what it pushes (annealing); otherwise it would say so forever.
"""

from collections.abc import Iterable
from contextlib import contextmanager
from copy import copy

import torch

from backpack_lib.analysis.edits import SenseEdits
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
    """Steers a Backpack's generation toward a topic.

    words: the topic, one word or several. strength: 0 (nothing changes) to 3; deltas: other factors for senses above
        the quantiles .95, .80 and .60, and for all the others. annealing: release senses that have had their say.
    largest: (V, k) from `largest_pushes`, which takes most of the time and is the same for all topics of a model.

    scores, factors: (V, k), of every sense of every token. edits: the factors as edits, without annealing.

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
        largest: torch.Tensor | None = None,
    ):
        require_senses(model)
        self.model, self.tokenizer, self.annealing = model, tokenizer, annealing
        self.words = [words] if isinstance(words, str) else list(words)
        deltas = deltas_of(strength, deltas)  # what is wrong is said before the scores take their time
        direction = topic_direction(model, tokenizer, self.words)
        self.scores = topic_scores(model, direction, largest_pushes(model) if largest is None else largest)
        self._set_deltas(deltas)

    def at(self, strength: int = 2, deltas: Iterable[float] | None = None) -> "TopicControl":
        """The same topic at another strength, at once, since the scores stay."""
        other = copy(self)
        other._set_deltas(deltas_of(strength, deltas))
        return other

    def _set_deltas(self, deltas: tuple[float, ...]):
        self.deltas = deltas
        self.factors = factors_of(self.scores[used_tokens(self.model)], self.scores, deltas)
        self.edits = SenseEdits(self.model, self.tokenizer, f"topic {', '.join(self.words)}").scale_each(self.factors)

    @contextmanager
    def applied(self):
        """The model under this control, for as long as the `with` lasts. With annealing, for one `generate()` only."""
        if set(self.deltas) == {1.0}:
            yield self.model
            return
        if not self.annealing:
            with self.edits.applied() as model:
                yield model
            return
        annealing = Annealing(self.model, self.factors, max(self.deltas) / GREATEST_RELEASE)
        with hooked(self.model.backpack.weight_hooks, annealing):
            yield self.model

    def generate(self, prompts: list[str], max_new_tokens: int = 100, seed: int = 0, **settings) -> list[str]:
        """Each prompt and its continuation under this control, by plain sampling unless settings say otherwise.

        Raises ValueError for no prompts, and for one that leaves no room in the context.
        """
        if self.annealing and settings.get("num_beams", 1) > 1:
            raise ValueError("Annealing follows one text at a time, so it does not go with num_beams; sample instead.")
        with self.applied():
            return continue_texts(self.model, self.tokenizer, prompts, max_new_tokens, seed, **{"top_k": 0} | settings)


def deltas_of(strength: int, deltas: Iterable[float] | None = None) -> tuple[float, ...]:
    """The factors of a strength, or those given. Raises ValueError for no such strength, or not four numbers."""
    if deltas is None:
        if strength not in STRENGTHS:
            choices = ", ".join(map(str, STRENGTHS))
            raise ValueError(f"strength={strength!r} is not in the table; choose one of {choices}.")
        return STRENGTHS[strength]
    deltas = tuple(float(delta) for delta in deltas)
    if len(deltas) != len(QUANTILES) + 1:
        raise ValueError(f"deltas={deltas} should be {len(QUANTILES) + 1} numbers, for {QUANTILES} and the rest.")
    return deltas


@torch.no_grad()
def topic_direction(model, tokenizer, words: list[str]) -> torch.Tensor:
    """b E: what the logits of a topic's words sum to is the product of this with a sense; (d,).

    A word of several tokens counts as the mean of them, and so as much as any other word.
    """
    if not words:
        raise ValueError("A topic needs at least one word, and none was given.")
    E = model.get_output_embeddings().weight
    rows = []
    for word in words:
        rows.append(E[known_tokens_of_word(tokenizer, word)].float().mean(0))
    return torch.stack(rows).sum(0)


@torch.no_grad()
def largest_pushes(model) -> torch.Tensor:
    """The largest entry of E C(x)_l for each sense of each token, (V, k), a part of the vocabulary at a time."""
    require_senses(model)
    found = torch.ones(model.config.vocab_size, model.config.num_senses, device=model.device)
    used = used_tokens(model)
    E = model.get_output_embeddings().weight[used]
    for ids in used.split(TOKENS_AT_ONCE):
        found[ids] = (model.sense_vectors(ids) @ E.T).amax(-1).float()
    return found


@torch.no_grad()
def topic_scores(model, direction: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """How far each sense of each token pushes a topic, as a share of its largest push, (V, k)."""
    tokens = torch.arange(model.config.vocab_size, device=model.device)
    parts = [model.sense_vectors(ids).float() @ direction for ids in tokens.split(TOKENS_AT_ONCE)]
    return torch.cat(parts) / largest


def factors_of(used: torch.Tensor, scores: torch.Tensor, deltas: tuple[float, ...]) -> torch.Tensor:
    """Each score's factor, by the quantiles of the scores of tokens in use that it lies above. Same shape as scores."""
    factors = torch.full_like(scores, deltas[-1])
    for quantile, delta in sorted(zip(QUANTILES, deltas)):  # the highest last
        factors[scores > torch.quantile(used, quantile)] = delta
    return factors


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
    generated since, or, without a cache, the whole text.
    """

    def __init__(self, model, factors: torch.Tensor, rate: float):
        self.factors, self.rate = factors.to(model.device), rate
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
        factors = self.factors[self.ids].transpose(1, 2)  # (B, k, S)
        return alpha * released(self.said, factors, self.rate, positions)[:, :, None].to(alpha)

    def _pushed(self, senses, ids):
        """How far senses, (B, k, S, d), push tokens, (B, G), up, summed over the tokens. -> (B, k, S)"""
        E = self.embeddings[ids].transpose(1, 2)  # (B, d, G)
        return (senses.flatten(1, 2) @ E).relu().sum(-1).float().unflatten(1, senses.shape[1:3])
