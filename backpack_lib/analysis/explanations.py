"""How much of a sense can be said in words? From an explanation of a sense to a sense vector.

    said = explain(model, tokens, n=10)                 # the 10 highest and lowest words of each token's senses
    simulator = Simulator.fit(model, said, tokens)      # from explanations to sense vectors
    simulator(said)                                     # (tokens, k, d), what the explanations alone say

An explanation is a list of words that a sense pushes up and of words that it pushes down. A simulator sees these words
and never the sense. It is fitted on other words than it is used for. After Paulo and Belrose (2025), who replaced parts
of a Transformer by what explanations of them predict, and found that no better than deleting them.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from backpack_lib.model.kinds import require_senses

TOKENS_AT_ONCE = 64
RIDGES = (0.01, 0.1, 1.0, 10.0)  # strengths of the penalty, in units of the mean variance of a feature


@dataclass(frozen=True)
class Explanations:
    """The words that each sense of each token pushes up and down, (tokens, k, n) each, the strongest first."""

    up: torch.Tensor
    down: torch.Tensor

    def first(self, n: int) -> "Explanations":
        """The n strongest of each."""
        return Explanations(self.up[..., :n], self.down[..., :n])

    def rows(self, places: torch.Tensor) -> "Explanations":
        """Those of some of the tokens."""
        return Explanations(self.up[places], self.down[places])

    def features(self, E: torch.Tensor) -> torch.Tensor:
        """The mean embedding of the words up, that of the words down, and a one, (tokens, k, 2 d + 1)."""
        means = []
        for words in (self.up, self.down):
            mean = F.embedding_bag(words.flatten(0, 1), E, mode="mean")
            means.append(mean.view(*words.shape[:2], -1))
        return torch.cat([*means, torch.ones_like(means[0][..., :1])], -1)


@torch.no_grad()
def explain(model, tokens: torch.Tensor, n: int, among: torch.Tensor) -> Explanations:
    """The n highest and n lowest words of each sense of some tokens, by their pushes. among: words to choose from."""
    require_senses(model)
    E, n = model.get_output_embeddings().weight[among], min(n, len(among))
    up, down = [], []
    for part in tokens.split(TOKENS_AT_ONCE):
        pushes = model.sense_vectors(part) @ E.T  # (tokens, k, words)
        up.append(among[pushes.topk(n).indices])
        down.append(among[pushes.topk(n, largest=False).indices])
    return Explanations(torch.cat(up), torch.cat(down))


@dataclass(frozen=True)
class Simulator:
    """From explanations to sense vectors, by one ridge regression for each sense.

    weights: (k, 2 d + 1, d); E: the embeddings by which words are seen, (V, d).
    """

    weights: torch.Tensor
    E: torch.Tensor

    @classmethod
    def fit(cls, model, said: Explanations, tokens: torch.Tensor) -> "Simulator":
        """Fitted on explanations of tokens, (n,), at least ten, whose senses are looked up."""
        E = model.get_output_embeddings().weight.detach().float()
        with torch.no_grad():
            C = model.sense_vectors(tokens).float()  # (n, k, d)
        X = said.features(E)
        return cls(torch.stack([_fit(X[:, sense], C[:, sense]) for sense in range(C.shape[1])]), E)

    def __call__(self, said: Explanations) -> torch.Tensor:
        """Sense vectors as explanations say, (n, k, d)."""
        return torch.einsum("nkf,kfd->nkd", said.features(self.E), self.weights)


def cross_fitted(
    model, said: Explanations, tokens: torch.Tensor, others: Explanations, other_tokens: torch.Tensor, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Simulated senses of tokens, each by a simulator that has not seen its own: two halves, and other words for both.

    -> as simulated, and the mean sense of the words that were fitted, (n, k, d) each.
    """
    simulated = torch.zeros(len(tokens), model.config.num_senses, model.config.n_embd, device=tokens.device)
    means = torch.zeros_like(simulated)
    order = np.random.default_rng(seed).permutation(len(tokens))
    in_first_half = torch.tensor(order % 2 == 0, device=tokens.device)
    for fitted_on in (in_first_half, ~in_first_half):
        seen = said.rows(fitted_on)
        both = Explanations(torch.cat([seen.up, others.up]), torch.cat([seen.down, others.down]))
        both_tokens = torch.cat([tokens[fitted_on], other_tokens])
        simulated[~fitted_on] = Simulator.fit(model, both, both_tokens)(said.rows(~fitted_on))
        with torch.no_grad():
            means[~fitted_on] = model.sense_vectors(both_tokens).float().mean(0)
    return simulated, means


def _fit(X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """(n, f + 1), (n, d) -> (f + 1, d). The strength is chosen on every fifth word; all words are fitted with it."""
    held_out = torch.arange(len(X), device=X.device) % 5 == 0
    errors = []
    for weights in _ridge(X[~held_out], Y[~held_out], RIDGES):
        errors.append(((X[held_out] @ weights - Y[held_out]) ** 2).mean().item())
    best = RIDGES[int(np.argmin(errors))]
    return _ridge(X, Y, [best])[0]


def _ridge(X: torch.Tensor, Y: torch.Tensor, strengths) -> list[torch.Tensor]:
    """The weights at each strength, (f + 1, d). The last column of X is the constant one, which is not penalised."""
    mean = X.mean(0, keepdim=True)
    mean[:, -1] = 0  # the constant stays
    x = X - mean
    products, targets = x.T @ x, x.T @ Y
    penalty = len(X) * x[:, :-1].var(0).mean() * torch.eye(X.shape[1], device=X.device)
    penalty[-1, -1] = 0
    solutions = []
    for strength in strengths:
        weights = torch.cholesky_solve(targets, torch.linalg.cholesky(products + strength * penalty))
        weights[-1] -= mean[0, :-1] @ weights[:-1]
        solutions.append(weights)
    return solutions
