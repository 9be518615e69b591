"""The output embedding: logits, and their loss in parts, since a vocabulary makes them the largest tensor by far.

The softmax of the logits and its gradient are made for some rows at a time and thrown away. Since the loss is a mean,
its gradient is known as soon as the logits are, so nothing is computed twice.

torch's own `F.linear_cross_entropy` does the same. In 2.13 it gives the loss of bf16 logits in bf16: off by .01 to .1
nats at 2,040 x 16,000 logits, under every one of its options (this one: .0002), and is no faster on a CPU.
"""

import math

import torch
from torch import nn

# Logits worked on at once. On a CPU they should stay in its cache; a GPU wants large products.
LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**28}
IGNORED = -100  # the label of a position that does not count


class OutputEmbedding(nn.Linear):
    """The logits E o, whose one product for a single new token is shared among the cores of a CPU."""

    def forward(self, hidden, labels=None, n_labels=None):
        """(B, T, d) -> (B, T, V); with labels, (B, T), the loss of each position's label, a scalar, and the logits."""
        if labels is not None:
            loss, logits = linear_cross_entropy(hidden.flatten(0, 1), self.weight, labels.flatten(), n_labels, True)
            return loss, logits.view(*hidden.shape[:2], -1)
        rows, d = self.weight.shape
        parts = math.gcd(rows, 8)
        if hidden.numel() > d or hidden.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(hidden)
        # A matrix times one vector is left to a single core, however large it is; several such products are not.
        column = hidden.view(1, 1, d).expand(parts, -1, -1).transpose(1, 2)  # this layout is the one that is shared
        return torch.bmm(self.weight.view(parts, -1, d), column).view(*hidden.shape[:-1], rows)


def linear_cross_entropy(hidden, weight, labels, n_labels=None, with_logits=False):
    """Mean cross-entropy of the logits `hidden @ weight.T`: (n, d), (V, d), (n,) -> scalar; -100 is ignored.

    The products are taken in the precision of the autocast region, if in one, and all else in float32.
    n_labels: what to divide the sum by, if not by the number of labels. with_logits: return the logits, (n, V), too.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if n_labels is None:
        n_labels = (labels != IGNORED).sum()
    n_labels = torch.as_tensor(n_labels, device=hidden.device)
    loss, logits = _LinearCrossEntropy.apply(hidden, weight, labels, n_labels, with_logits, torch.is_grad_enabled())
    return (loss, logits) if with_logits else loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, n_labels, with_logits, wants_gradient):
        ctx.set_materialize_grads(False)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        logits = hidden.new_empty(len(hidden), len(weight)) if with_logits else None
        counts = (labels != IGNORED).to(hidden)[:, None]
        labels = labels.clamp(min=0)[:, None]
        rows = max(1, LOGITS_AT_ONCE.get(hidden.device.type, 2**24) // len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                part_logits = torch.mm(hidden[part], weight.T, out=logits[part] if with_logits else None)
                log_p = part_logits.float().log_softmax(-1)
                total -= (log_p.gather(1, labels[part]) * counts[part]).sum()
                if wants_gradient:
                    # softmax minus one-hot, the gradient of the logits but for the mean, in their place
                    d_logits = log_p.exp_().scatter_add_(1, labels[part], torch.full_like(log_p[:, :1], -1.0))
                    d_logits = d_logits.to(hidden.dtype)
                    torch.mm(d_logits, weight, out=d_hidden[part])
                    counted = hidden[part] * counts[part]
                    if d_logits.dtype == d_weight.dtype:
                        d_weight.addmm_(d_logits.T, counted)
                    else:
                        d_weight += d_logits.T @ counted
        ctx.save_for_backward(d_hidden.mul_(counts), d_weight, n_labels, *((hidden, weight) if with_logits else ()))
        return total / n_labels, logits

    @staticmethod
    def backward(ctx, d_loss, d_logits):
        d_hidden, d_weight, n_labels, *inputs = ctx.saved_tensors
        scale = 0.0 if d_loss is None else d_loss / n_labels
        # In place: the gradient of a large vocabulary would double the peak. A second pass is refused by autograd.
        d_hidden, d_weight = d_hidden.mul_(scale), d_weight.mul_(scale).to(d_hidden.dtype)
        if d_logits is not None:  # somebody's own loss of the logits
            hidden, weight = inputs
            d_hidden, d_weight = d_hidden + d_logits @ weight, d_weight + d_logits.T @ hidden
        return d_hidden, d_weight, None, None, None, None
