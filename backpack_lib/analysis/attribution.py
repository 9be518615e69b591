"""What a prediction is made of: the exact share of each sense of each earlier token in a logit.

    logit_y(i) = sum over positions j <= i and senses l of alpha_{l i j} (C(x_j)_l . E_y)

This is the model's own equation (Hewitt et al., 2023, section 2), not an approximation; and because
log p(a) - log p(b) is the difference of two logits, log-odds split just as exactly.
"""

from dataclasses import dataclass

import torch

from backpack_lib.model.backpack import check_ids
from backpack_lib.model.kinds import require_senses


@dataclass(frozen=True)
class Reading:
    """One prediction and all that went into it."""

    weights: torch.Tensor  # alpha, (T, k): how much of each sense of each token goes in; sums to one over tokens
    senses: torch.Tensor  # of the tokens, (T, k, d)
    logits: torch.Tensor  # the model's own, (V,)
    embeddings: torch.Tensor  # the output embedding E, (V, d), in the scale of the logits
    residual: torch.Tensor | None = None  # of a sense lens, what no sense says of the Transformer's last state, (d,)
    bias: torch.Tensor | None = None  # of the output embedding, (V,), where it has one; it counts with the residual

    def contributions(self, target: int, contrast: int | None = None) -> torch.Tensor:
        """The share of each (token, sense) in the target's logit, or in its log-odds to the contrast, (T, k).

        Of a sense lens (T + 1, k): the last row begins with the residual's share and is zero otherwise.
        """
        direction = self._difference(self.embeddings, target, contrast)
        shares = self.weights.float() * (self.senses.float() @ direction)
        if self.residual is None:
            return shares
        rest = shares.new_zeros(1, shares.shape[1])
        rest[0, 0] = self.residual.float() @ direction
        if self.bias is not None:
            rest[0, 0] += self._difference(self.bias, target, contrast)
        return torch.cat([shares, rest])

    def total(self, target: int, contrast: int | None = None) -> float:
        """What the contributions should sum to: the model's own logit, or log-odds in nats."""
        other = 0.0 if contrast is None else self.logits[self._row(contrast)].item()
        return self.logits[self._row(target)].item() - other

    def log_probs(self) -> torch.Tensor:
        """Log-probabilities of the next token in nats, (V,)."""
        return self.logits.float().log_softmax(-1)

    def _difference(self, table: torch.Tensor, target: int, contrast: int | None) -> torch.Tensor:
        """The target's row of a table less the contrast's, if there is one."""
        row = table[self._row(target)].float()
        return row if contrast is None else row - table[self._row(contrast)].float()

    def _row(self, token: int) -> int:
        if not 0 <= token < len(self.embeddings):
            raise ValueError(f"There is no token {token}; this model's vocabulary is 0 to {len(self.embeddings) - 1}.")
        return token


@torch.no_grad()
def read(model, input_ids, position: int = -1) -> Reading:
    """Runs the model on one text, up to a position, and keeps all that went into the prediction there.

    input_ids: (T,) or (1, T). position: whose next token is predicted; negative ones count from the end.
    """
    require_senses(model)
    ids = torch.as_tensor(input_ids)
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise ValueError(f"input_ids has shape {tuple(ids.shape)}; give one text, as (tokens,) or (1, tokens).")
    if not -len(ids) <= position < len(ids):
        raise ValueError(f"There is no position {position} in a text of {len(ids)} tokens (0 to {len(ids) - 1}).")
    if ids.device.type == "cpu":
        check_ids(ids, model.config.vocab_size)
    ids = ids.to(model.device)[: position % len(ids) + 1]  # what comes after a position does not reach it
    whole = torch.ones_like(ids)[None]  # said openly, since transformers takes the end of text for padding
    out = model(ids[None], attention_mask=whole, output_senses=True, use_cache=False, logits_to_keep=1)
    return reading_of(model, out, 0, len(ids) - 1, out.logits[0, -1])


def reading_of(model, out, row: int, position: int, logits: torch.Tensor) -> Reading:
    """The `Reading` of one position in a batch that the model read with `output_senses=True`; logits: (V,), there."""
    head, scale = model.get_output_embeddings(), getattr(model, "logit_scale", 1.0)
    bias = getattr(head, "bias", None)
    return Reading(
        weights=out.contextualization[row, :, position, : position + 1].T,
        senses=out.senses[row, :, : position + 1].transpose(0, 1),
        logits=logits,
        embeddings=head.weight.detach() if scale == 1 else head.weight.detach() * scale,
        residual=out.residual[row, position] if "residual" in out else None,
        bias=None if bias is None else bias.detach() * scale,
    )


def attribute(model, input_ids, target: int, contrast: int | None = None, position: int = -1) -> torch.Tensor:
    """The contribution of each sense of each token to a logit, or to log-odds, at a position; (T, k).

    Of a sense lens (T + 1, k), with a row for the residual; see `Reading.contributions`.
    They sum to the model's own logit of `target`, or to log p(target) - log p(contrast), up to rounding.
    Takes one forward pass and T k products of width d, whatever the size of the vocabulary.

    input_ids: (T,) or (1, T); with a position before the last, T counts the tokens up to it.

    Raises ValueError for a model without senses, several texts, and a position or token that is not there.
    """
    return read(model, input_ids, position).contributions(target, contrast)
