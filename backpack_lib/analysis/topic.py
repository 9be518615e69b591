"""Topic control: text drawn toward a topic by giving its senses more weight (Hewitt et al., 2023, section 5).

    control = TopicControl(model, tokenizer, ["sports"], strength=2)
    texts = control.generate(["The team"] * 8, max_new_tokens=60)

A topic is a few words. The score of a sense is how far it pushes them, as a share of what it pushes most. The senses
of highest score get more weight. While a text is written, a sense is released again as soon as the text has said
what it pushes (annealing); otherwise it would say so forever.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from copy import copy
from functools import cached_property

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from backpack_lib.analysis.edits import SenseEdits
from backpack_lib.files import cache_folder, written_whole
from backpack_lib.loading import fingerprint
from backpack_lib.model.hooks import hooked
from backpack_lib.model.kinds import require_senses, used_tokens
from backpack_lib.text.words import known_tokens_of_word
from backpack_lib.text.writing import continue_texts

QUANTILES = (0.95, 0.80, 0.60)
# What senses above each quantile, and all the others, are multiplied by.
STRENGTHS = {0: (1.0, 1.0, 1.0, 1.0), 1: (1.5, 1.5, 1.3, 1.0), 2: (2.2, 2.2, 1.5, 1.0), 3: (3.3, 3.3, 3.0, 1.0)}
TOKENS_AT_ONCE, LISTED_AT_ONCE = 32, 2048
SAMPLED, LISTED = 2000, 16_000  # tokens whose scores, and whose numerators, say where the quantiles lie
LARGE = 2**28  # numbers in all senses of a vocabulary; the released model's are 618 million
WORTH_KEEPING = 2**39  # multiplications, some seconds of two cores
READINESS = 6.0  # a sense that has said nothing yet is sigmoid(6) = 99.8 % on
GREATEST_RELEASE = 7.5  # the rate of release is the greatest delta divided by this, as in the paper's code
GROWTH = 100  # positions over which a factor grows by as much as it is


class LargestPushes:
    """The largest entry of E C(x)_l for each sense of a token, computed when the token is first asked for.

    It takes most of the time that a score takes, and is the same for all topics of a model, which therefore share it.
    Scores are those of the model's own senses, whatever edits are applied.
    """

    def __init__(self, model):
        require_senses(model)
        self.model = model
        size = model.config.vocab_size, model.config.num_senses
        self.values = torch.ones(size, device=model.device)
        self.known = torch.ones(size[0], dtype=torch.bool, device=model.device)
        self.known[used_tokens(model)] = False
        self.complete = False  # whether all of them are known
        self.listed, self.sampled = (_evenly(used_tokens(model), n) for n in (LISTED, SAMPLED))
        if model.device.type != "cpu":  # there all of them take a moment, and asking which are known would take longer
            self.find_all()

    def find_all(self):
        self(used_tokens(self.model))
        self.complete = True

    @cached_property
    @torch.no_grad()
    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sense vectors of the sampled tokens, (n, k, d), and their largest pushes, (n, k)."""
        senses = torch.cat([own_senses(self.model, ids).float() for ids in self.sampled.split(LISTED_AT_ONCE)])
        if not in_bf16(self.model):
            return senses, self(self.sampled)
        E = self.model.get_output_embeddings().weight[used_tokens(self.model)].bfloat16()
        rows = senses.flatten(0, 1).bfloat16().split(LISTED_AT_ONCE)
        return senses, torch.cat([(part @ E.T).amax(-1) for part in rows]).view(senses.shape[:2]).float()

    @cached_property
    @torch.no_grad()
    def listing(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sense vectors of the listed tokens, in half precision, (n, k, d), and their lengths, (n, k)."""
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=in_bf16(self.model)):
            parts = [own_senses(self.model, ids) for ids in self.listed.split(LISTED_AT_ONCE)]
        return torch.cat([part.half() for part in parts]), torch.cat([part.float().norm(dim=-1) for part in parts])

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """(n,) -> (n, k)"""
        if self.complete:
            return self.values[ids]
        new = ids[~self.known[ids]].unique()
        E = self.model.get_output_embeddings().weight[used_tokens(self.model)]
        for part in new.split(TOKENS_AT_ONCE):
            self.values[part] = (own_senses(self.model, part) @ E.T).amax(-1).float()
        self.known[new] = True
        return self.values[ids]


class TopicControl:
    """Steers a Backpack's generation toward a topic.

    words: the topic, one word or several. strength: 0 (nothing changes) to 3; deltas: other factors for senses above
        the quantiles .95, .80 and .60, and for all the others. annealing: release senses whose words the text has said.
    largest: a model's `LargestPushes`, to share among topics. Where it is complete (`largest_pushes`), the quantiles
        are those of all tokens, else they are estimated; see `estimated_quantiles`.
    multi_token: see `topic_direction`.

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
        largest: LargestPushes | None = None,
        multi_token: str = "first",
    ):
        require_senses(model)
        self.model, self.tokenizer, self.annealing = model, tokenizer, annealing
        self.words = [words] if isinstance(words, str) else list(words)
        self.deltas = deltas_of(strength, deltas)  # what is wrong is said before the scores take their time
        self.direction = topic_direction(model, tokenizer, self.words, multi_token)
        self.largest = LargestPushes(model) if largest is None else largest
        self._scores = torch.zeros_like(self.largest.values)
        self._known, self._complete = torch.zeros_like(self.largest.known), False
        tokens = used_tokens(model)
        if self.largest.complete or len(tokens) <= SAMPLED:
            self.thresholds = torch.quantile(self.scores_of(tokens), self._scores.new_tensor(QUANTILES))
            self._complete = True
        else:
            self.thresholds = estimated_quantiles(self)

    def at(self, strength: int = 2, deltas: Iterable[float] | None = None) -> "TopicControl":
        """The same topic at another strength, at once, since the scores stay."""
        other = copy(self)
        other.deltas = deltas_of(strength, deltas)
        return other

    @torch.no_grad()
    def scores_of(self, ids: torch.Tensor) -> torch.Tensor:
        """How far each sense of some tokens pushes the topic, as a share of its largest push. (n,) -> (n, k)"""
        if self._complete:
            return self._scores[ids]
        for part in ids[~self._known[ids]].unique().split(TOKENS_AT_ONCE):
            self._scores[part] = own_senses(self.model, part).float() @ self.direction / self.largest(part)
            self._known[part] = True
        return self._scores[ids]

    def factors_of(self, ids: torch.Tensor) -> torch.Tensor:
        """What each sense of some tokens is multiplied by. (n,) -> (n, k)"""
        scores = self.scores_of(ids)
        factors = torch.full_like(scores, self.deltas[-1])
        for threshold, delta in zip(self.thresholds.flip(0), self.deltas[-2::-1]):  # the highest last
            factors = torch.where(scores > threshold, delta, factors)
        return factors

    @property
    def scores(self) -> torch.Tensor:
        """`scores_of` all tokens, (V, k). At the released model's size it takes minutes."""
        return self.scores_of(torch.arange(len(self._known), device=self._known.device))

    @property
    def factors(self) -> torch.Tensor:
        """`factors_of` all tokens, (V, k), as `scores`."""
        return self.factors_of(torch.arange(len(self._known), device=self._known.device))

    @property
    def edits(self) -> SenseEdits:
        """The factors of all tokens as edits, without annealing; see `scores`."""
        return SenseEdits(self.model, self.tokenizer, f"topic {', '.join(self.words)}").scale_each(self.factors)

    def patch(self, token_ids: torch.Tensor, senses: torch.Tensor) -> torch.Tensor:
        """What `edits` does, for some tokens: (n,), (n, k, d) -> (n, k, d)"""
        return senses * self.factors_of(token_ids).to(senses)[..., None]

    @contextmanager
    def applied(self):
        """The model under this control, for as long as the `with` lasts. With annealing, for one `generate()` only."""
        if set(self.deltas) == {1.0}:
            yield self.model
            return
        if not self.annealing:
            with hooked(self.model.patches, self.patch):
                yield self.model
            return
        annealing = Annealing(self.model, self.factors_of, max(self.deltas) / GREATEST_RELEASE)
        with hooked(self.model.weight_hooks, annealing):
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
    if len(deltas) != len(QUANTILES) + 1 or not all(map(math.isfinite, deltas)):
        raise ValueError(
            f"deltas={deltas} should be {len(QUANTILES) + 1} finite numbers, for {QUANTILES} and the rest."
        )
    return deltas


@torch.no_grad()
def topic_direction(model, tokenizer, words: list[str], multi_token: str = "first") -> torch.Tensor:
    """b E: what the logits of a topic's words sum to is the product of this with a sense; (d,).

    multi_token: of a word of several tokens counts the "first", as in the paper, or their "mean".
    """
    if not words:
        raise ValueError("A topic needs at least one word, and none was given.")
    E = model.get_output_embeddings().weight
    rows = []
    for word in words:
        ids = known_tokens_of_word(tokenizer, word)
        rows.append(E[ids if multi_token == "mean" else ids[:1]].float().mean(0))
    return torch.stack(rows).sum(0)


def largest_pushes(model) -> LargestPushes:
    """The largest push of each sense of all tokens, V k V d multiplications: minutes at the released size, with a bar.

    Those of a model that takes long are kept in the cache folder by its weights' fingerprint.
    """
    found, tokens = LargestPushes(model), used_tokens(model)
    if found.complete or len(tokens) ** 2 * found.values.shape[1] * model.config.n_embd < WORTH_KEEPING:
        found.find_all()
        return found
    file = cache_folder() / f"largest-pushes-{fingerprint(model)}.safetensors"
    if not file.is_file():
        for part in tqdm(tokens.split(LISTED_AT_ONCE), desc="largest pushes", leave=False):
            found(part)
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as building:
            save_file({"largest pushes": found.values.cpu()}, building)
    found.values, found.complete = load_file(file)["largest pushes"].to(model.device), True
    return found


@torch.no_grad()
def estimated_quantiles(control: TopicControl) -> torch.Tensor:
    """The quantiles of all tokens' scores, from the scores of some, as a difference estimator has them.

    What a sense pushes most goes roughly with its length. So a score is guessed for each listed token from its
    numerator and the sense's length, and the share of scores up to a threshold is that of the guesses, corrected by how
    far guesses and scores differ in a sample. On the demo model's topics the level of a quantile is off by .0006.
    """
    (senses, most), (listed, lengths) = control.largest.sample, control.largest.listing
    pushed, length = senses @ control.direction, senses.norm(dim=-1)
    scores, rate = pushed / most, (most / length).mean(0)
    in_sample = pushed / (length * rate)
    parts = zip(listed.split(LISTED_AT_ONCE), lengths.split(LISTED_AT_ONCE))
    in_list = torch.cat([(part.float() @ control.direction) / (length * rate) for part, length in parts])

    thresholds = scores.flatten().sort().values
    levels = share_up_to(thresholds, in_list) + share_up_to(thresholds, scores) - share_up_to(thresholds, in_sample)
    rising = levels.cummax(0).values
    wanted = torch.searchsorted(rising, rising.new_tensor(QUANTILES))
    return thresholds[wanted.clamp(max=len(thresholds) - 1)]


def share_up_to(thresholds: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The share of the values that do not exceed each threshold."""
    return torch.searchsorted(values.flatten().sort().values, thresholds, right=True) / values.numel()


def in_bf16(model) -> bool:
    """Whether what is only estimated is computed in bf16: of a large model, by a CPU on which that is faster."""
    size = model.config.vocab_size * model.config.num_senses * model.config.n_embd
    return model.device.type == "cpu" and size > LARGE and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _evenly(ids: torch.Tensor, n: int) -> torch.Tensor:
    """At most n ids, evenly over the vocabulary, in which the common tokens stand first."""
    return ids if len(ids) <= n else ids[torch.linspace(0, len(ids) - 1, n, device=ids.device).long()]


def own_senses(model, ids: torch.Tensor) -> torch.Tensor:
    """Sense vectors as the model has them, without what edits and control do to them. (n,) -> (n, k, d)"""
    return model.sense_vectors(ids, patched=False)


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

    factors_of: the factors of tokens, (...) -> (..., k).
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
