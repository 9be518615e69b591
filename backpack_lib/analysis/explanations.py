"""How much of a sense can be said in words? Senses replaced by what their explanation says, and what this costs.

    texts = Replacement(model, rows)                         # runs the model once
    said = explain(model, tokens, n=10)                      # the 10 highest and lowest words of each token's senses
    simulator = Simulator.fit(model, said, tokens)           # from explanations to sense vectors
    texts.losses({3: simulator(said)[:, 3]})                 # sense 3 of all words, as its explanations say

An explanation is a list of words that a sense pushes up and of words that it pushes down. A simulator sees these words
and never the sense, and returns a sense vector. It is fitted on other words than it is used for. After Paulo and
Belrose (2025), who replaced parts of a Transformer by what explanations of them predict, and found that no better than
deleting them.

Weights do not see senses. So what a replacement does to every prediction is a sum that is known without running the
model.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from backpack_lib.analysis.scores import batches
from backpack_lib.analysis.statistics import MIDDLE
from backpack_lib.model.kinds import require_senses, used_tokens

TOKENS_AT_ONCE = 64
RIDGES = (0.01, 0.1, 1.0, 10.0)  # tried, in units of the mean variance of a feature
FOLDS = 2


@dataclass(frozen=True)
class Explanations:
    """The words that each sense of each token pushes up and down, (tokens, k, n) each, the strongest first."""

    up: torch.Tensor
    down: torch.Tensor

    def first(self, n: int) -> "Explanations":
        """The n strongest of each."""
        return Explanations(self.up[..., :n], self.down[..., :n])

    def features(self, E: torch.Tensor) -> torch.Tensor:
        """What a simulator sees: the mean embedding of the words up, and of those down, (tokens, k, 2 d)."""
        words = (self.up.flatten(0, 1), self.down.flatten(0, 1))
        means = [F.embedding_bag(of, E, mode="mean").view(*self.up.shape[:2], -1) for of in words]
        return torch.cat(means, -1)

    def rows(self, numbers) -> "Explanations":
        """Those of some of the tokens."""
        return Explanations(self.up[numbers], self.down[numbers])


@torch.inference_mode()
def explain(model, tokens: torch.Tensor, n: int = 10, among: torch.Tensor | None = None) -> Explanations:
    """The n highest and n lowest words of each sense of some tokens, by their pushes. among: words to choose from."""
    require_senses(model)
    among = used_tokens(model) if among is None else among.to(model.device)
    E, up, down = model.get_output_embeddings().weight[among], [], []
    n = min(n, len(among))
    for part in tokens.split(TOKENS_AT_ONCE):
        pushes = model.sense_vectors(part) @ E.T  # (tokens, k, words)
        up.append(among[pushes.topk(n).indices])
        down.append(among[pushes.topk(n, largest=False).indices])
    return Explanations(torch.cat(up), torch.cat(down))


@dataclass(frozen=True)
class Simulator:
    """From explanations to sense vectors, by one linear map for each sense.

    weights: (k, features + 1, d); E: the embeddings by which words are seen. kind: "ridge", or "size" (the words up
    less the words down, of fitted size).
    """

    weights: torch.Tensor
    E: torch.Tensor
    kind: str

    @classmethod
    def fit(cls, model, said: Explanations, tokens: torch.Tensor, kind: str = "ridge") -> "Simulator":
        """Fitted on explanations of tokens, (n,), whose senses are looked up. Raises ValueError for fewer than ten."""
        if len(tokens) < 10:
            raise ValueError(f"A simulator needs at least 10 words to be fitted on, and {len(tokens)} were given.")
        E = model.get_output_embeddings().weight.detach().float()
        with torch.no_grad():
            C = model.sense_vectors(tokens).float()  # (n, k, d)
        X = _with_one(_seen(said.features(E), kind))
        solve = _fit_size if kind == "size" else _fit_ridge
        return cls(torch.stack([solve(X[:, l], C[:, l]) for l in range(C.shape[1])]), E, kind)

    def __call__(self, said: Explanations) -> torch.Tensor:
        """Sense vectors as explanations say, (n, k, d)."""
        X = _with_one(_seen(said.features(self.E), self.kind))
        return torch.einsum("nkf,kfd->nkd", X, self.weights)


def cross_fitted(
    model, said: Explanations, tokens: torch.Tensor, others: Explanations, other_tokens: torch.Tensor,
    kind: str = "ridge", seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Simulated senses of tokens, each by a simulator that has not seen its own: two folds, and other words for both.

    -> as simulated, and the mean sense of the words that were fitted, (n, k, d) each.
    """
    fold = torch.tensor(np.random.default_rng(seed).permutation(len(tokens)) % FOLDS, device=tokens.device)
    simulated, means = None, None
    for one in range(FOLDS):
        fit, use = fold != one, fold == one
        seen = Explanations(*(torch.cat(pair) for pair in ((said.up[fit], others.up), (said.down[fit], others.down))))
        seen_tokens = torch.cat([tokens[fit], other_tokens])
        made = Simulator.fit(model, seen, seen_tokens, kind)(said.rows(use))
        with torch.no_grad():
            mean = model.sense_vectors(seen_tokens).float().mean(0)
        if simulated is None:
            simulated = made.new_zeros(len(tokens), *made.shape[1:])
            means = torch.zeros_like(simulated)
        simulated[use], means[use] = made, mean
    return simulated, means


def _seen(features: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "size":
        up, down = features.chunk(2, -1)
        return up - down
    return features


def _with_one(X: torch.Tensor) -> torch.Tensor:
    return torch.cat([X, torch.ones_like(X[..., :1])], -1)


def _fit_size(X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """(n, d + 1), (n, d) -> (d + 1, d): one size for all, and a mean."""
    x, y = X[:, :-1] - X[:, :-1].mean(0), Y - Y.mean(0)
    size = (x * y).sum() / (x * x).sum().clamp(min=1e-12)
    offset = Y.mean(0) - size * X[:, :-1].mean(0)
    return torch.cat([size * torch.eye(Y.shape[1], device=Y.device), offset[None]])


def _fit_ridge(X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """(n, f + 1), (n, d) -> (f + 1, d). The strength is chosen on every fifth word, which is then fitted, too."""
    held = torch.arange(len(X), device=X.device) % 5 == 0
    tried = _ridge(X[~held], Y[~held], RIDGES)
    errors = [((X[held] @ weights - Y[held]) ** 2).mean().item() for weights in tried]
    return _ridge(X, Y, [RIDGES[int(np.argmin(errors))]])[0]


def _ridge(X: torch.Tensor, Y: torch.Tensor, strengths: Iterable[float]) -> list[torch.Tensor]:
    """The weights at each strength, (f + 1, d). The last column of X is the constant, which is not penalised."""
    mean = X.mean(0, keepdim=True)
    mean[:, -1] = 0  # the constant stays
    x = X - mean
    products, targets = x.T @ x, x.T @ Y
    penalty = len(X) * x[:, :-1].var(0).mean() * torch.eye(X.shape[1], device=X.device)
    penalty[-1, -1] = 0
    found = []
    for strength in strengths:
        weights = torch.cholesky_solve(targets, torch.linalg.cholesky(products + strength * penalty))
        weights[-1] -= mean[0, :-1] @ weights[:-1]
        found.append(weights)
    return found


# ---------------------------------------------------------------- what a replacement costs


class Replacement:
    """Texts in which senses can be replaced: the loss on each, without running the model again.

    rows: token ids, each beginning with an end-of-text token. tokens: the distinct tokens of all rows, (n,); senses:
    theirs, (n, k, d); counts: predicted tokens of each row.
    """

    @torch.inference_mode()
    def __init__(self, model, rows: list[list[int]]):
        require_senses(model)
        self.E = model.get_output_embeddings().weight.detach().float()
        self.tokens = torch.tensor(sorted({token for row in rows for token in row[:-1]}), device=model.device)
        self.senses = model.sense_vectors(self.tokens).float()
        self.texts, self.counts = [], []
        for _, ids, mask in batches(model, rows):
            out = model.base_model(ids, attention_mask=mask, output_senses=True, use_cache=False)
            for n, size in enumerate(mask.sum(1).tolist()):
                place = torch.searchsorted(self.tokens, ids[n, : size - 1])
                alpha = out.contextualization[n, :, : size - 1, : size - 1].float()
                self.texts.append((alpha, out.last_hidden_state[n, : size - 1].float(), place, ids[n, 1:size]))
                self.counts.append(size - 1)

    @torch.inference_mode()
    def losses(self, changes: dict[int, torch.Tensor] | None = None) -> np.ndarray:
        """Nats of each text, in sum, where senses are replaced: by index, vectors for each of `tokens`, (n, d)."""
        found = []
        for alpha, o, place, targets in self.texts:
            for sense, vectors in (changes or {}).items():
                o = o + alpha[sense] @ (vectors - self.senses[:, sense])[place]
            found.append(F.cross_entropy(o @ self.E.T, targets, reduction="sum").item())
        return np.array(found)

    def zero(self, senses) -> dict[int, torch.Tensor]:
        """Some senses of all words taken away."""
        return {sense: torch.zeros_like(self.senses[:, sense]) for sense in senses}


def recovered(zero: np.ndarray, replaced: np.ndarray, original: np.ndarray) -> float:
    """The share of what taking away costs that the replacement wins back: 1 is all, 0 is no better than nothing."""
    return float((zero.sum() - replaced.sum()) / (zero.sum() - original.sum()))


def recovered_with_interval(
    zero: np.ndarray, replaced: np.ndarray, original: np.ndarray, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """`recovered` and its 95 % interval, texts drawn again with replacement, the same for all three."""
    rng, n = np.random.default_rng(seed), len(zero)
    rows = rng.integers(n, size=(resamples, n))
    drawn = (zero - replaced)[rows].sum(1) / (zero - original)[rows].sum(1)
    low, high = np.quantile(drawn, MIDDLE)
    return recovered(zero, replaced, original), float(low), float(high)
