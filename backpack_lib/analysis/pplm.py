"""PPLM: a Transformer drawn toward a topic by gradients on its cached keys and values (Dathathri et al., 2020).

For each token, the keys and values of the text so far are moved, in a few steps, up the gradient of the topic's
probability; the next token is drawn from a mix of the distributions with and without them. No weight changes, and
it takes several forward and backward passes a token. It is the baseline that topic control is measured against.
"""

from dataclasses import dataclass

import torch
from transformers import DynamicCache, set_seed

from backpack_lib.model.cache import CACHE
from backpack_lib.model.kinds import require_transformer, used_tokens
from backpack_lib.text.words import tokens_of_word
from backpack_lib.text.writing import prompts_of_texts

SMALL = 1e-15

Past = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer, (B, heads, T, width of a head) each


@dataclass(frozen=True)
class Settings:
    """As in Hewitt et al. (2023)."""

    step: float = 0.04  # length of a gradient step: the strength
    iterations: int = 3  # steps a token
    gamma: float = 1.5  # a gradient is divided by its norm to the power of this
    kl_scale: float = 0.01  # how much staying near the plain distribution counts
    gm_scale: float = 0.9  # share of the steered distribution in the geometric mean that is sampled from
    window: int = 5  # how many last positions are moved
    temperature: float = 1.0  # of the sampling


def generate(
    model, tokenizer, words: list[str], prompts: list[str], max_new_tokens: int = 100, seed: int = 0,
    settings: Settings = Settings(),
) -> list[str]:  # fmt: skip
    """Each prompt and its continuation by a Transformer steered toward words, sampled.

    A word of several tokens is steered to by its first.
    """
    require_transformer(model)
    bag = torch.tensor([tokens_of_word(tokenizer, word)[0] for word in words], device=model.device)
    ids, mask = prompts_of_texts(model, tokenizer, prompts, max_new_tokens)
    set_seed(seed)
    plain = _read(model, ids[:, :-1], mask[:, :-1], [])[1] if ids.shape[1] > 1 else []
    past, norms = plain, None
    done = torch.zeros(len(ids), dtype=torch.bool, device=model.device)
    for _ in range(max_new_tokens):
        last = ids[:, -1:]
        logits, plain = _read(model, last, mask, plain)
        past, norms = perturbed(model, last, mask, past, bag, logits.softmax(-1), norms, settings)
        steered, past = _read(model, last, mask, past)
        chances = mixed(steered, logits, settings.gm_scale, settings.temperature)[:, used_tokens(model)]
        token = torch.multinomial(chances, 1).masked_fill(done[:, None], tokenizer.eos_token_id)
        done |= token[:, 0] == tokenizer.eos_token_id
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        if done.all():
            break
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def mixed(steered: torch.Tensor, plain: torch.Tensor, gm_scale: float, temperature: float = 1.0) -> torch.Tensor:
    """The geometric mean of two distributions, from their logits, at a temperature. (B, V) -> (B, V)"""
    log_mean = gm_scale * steered.log_softmax(-1) + (1 - gm_scale) * plain.log_softmax(-1)
    return (log_mean / temperature).softmax(-1)


def topic_loss(logits: torch.Tensor, bag: torch.Tensor, plain: torch.Tensor, kl_scale: float) -> torch.Tensor:
    """-log p(bag) + kl_scale KL(steered || plain), summed over the batch. logits, plain probabilities: (B, V)."""
    log_probs = logits.log_softmax(-1)
    kl = (log_probs.exp() * (log_probs - (plain + SMALL).log())).sum()
    return kl_scale * kl - log_probs[:, bag].logsumexp(-1).sum()


def perturbed(model, last, mask, past: Past, bag, plain, norms, settings: Settings):
    """The past moved toward the topic, and the largest norm so far of each layer's gradient, (layers, B).

    A step is divided by that norm, which is of keys and values together, so that no token is moved further than
    the one whose gradient was the largest. A text without a past is left alone.
    """
    if not past:
        return past, norms
    moves = [[torch.zeros_like(part) for part in layer] for layer in past]
    length = past[0][0].shape[2]
    inside = (torch.arange(length, device=last.device) >= length - settings.window)[:, None]
    for _ in range(settings.iterations):
        moves = [[move.detach().requires_grad_() for move in layer] for layer in moves]
        with torch.enable_grad():
            moved = [tuple(p + m for p, m in zip(*pair)) for pair in zip(past, moves)]
            loss = topic_loss(_read(model, last, mask, moved)[0], bag, plain, settings.kl_scale)
            flat = torch.autograd.grad(loss, [move for layer in moves for move in layer])
        gradients = [[g * inside for g in flat[i : i + 2]] for i in range(0, len(flat), 2)]
        now = torch.stack([torch.stack([g.flatten(1).norm(dim=1) for g in layer]).norm(dim=0) for layer in gradients])
        norms = now + SMALL if norms is None else torch.maximum(norms, now)
        for layer, gradient, norm in zip(moves, gradients, norms):
            scale = settings.step / norm[:, None, None, None] ** settings.gamma
            layer[:] = [move.detach() - scale * g for move, g in zip(layer, gradient)]
    return [tuple(p + m for p, m in zip(*pair)) for pair in zip(past, moves)], norms


def _read(model, ids, mask, past: Past) -> tuple[torch.Tensor, Past]:
    """Logits after the last token, (B, V), and the past with these tokens in it."""
    cache = DynamicCache()
    for number, (keys, values) in enumerate(past):
        cache.update(keys, values, number)
    with torch.set_grad_enabled(torch.is_grad_enabled() and any(k.requires_grad for k, _ in past)):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, **{CACHE: cache})
    return out.logits[:, -1].float(), [(layer.keys, layer.values) for layer in cache.layers]
