"""Look-ups on the sense table: what each sense of a word holds, whatever the context.

A word is given as it is written, or as the id of one token. What a sense pushes up or down is its
projection E C(x)_l: exactly what it adds to each word's logit when it goes in with weight one.
"""

import torch
import torch.nn.functional as F

from backpack_lib.model.kinds import has_senses, require_senses, used_tokens
from backpack_lib.text.words import choose_tokens

TOKENS_AT_ONCE = 2048


@torch.no_grad()
def senses_of_words(model, tokenizer, words: list[str], multi_token: str = "mean") -> torch.Tensor:
    """Sense vectors of words, (n, k, d). A Transformer has none; its input embeddings stand in as one sense.

    multi_token: what becomes of a word of several tokens: the "mean" of their senses, or those of the
        "first" or of the "last".
    """
    if not words:
        raise ValueError("There is no word in an empty list; give at least one.")
    ids = [choose_tokens(tokenizer, word, multi_token) for word in words]
    distinct, inverse = torch.tensor([i for tokens in ids for i in tokens], device=model.device).unique(
        return_inverse=True
    )
    table = vectors_of_tokens(model, distinct)[inverse]
    return torch.stack([part.mean(0) for part in table.split([len(tokens) for tokens in ids])])


def vectors_of_tokens(model, token_ids: torch.Tensor) -> torch.Tensor:
    """Sense vectors of tokens, (n, k, d); of a Transformer, its input embeddings, (n, 1, d)."""
    token_ids = token_ids.to(model.device)
    return model.sense_vectors(token_ids) if has_senses(model) else model.get_input_embeddings()(token_ids)[:, None]


@torch.no_grad()
def pushes(model, senses: torch.Tensor) -> torch.Tensor:
    """What sense vectors add to each logit at weight one, E C(x)_l. (..., d) -> (..., V)"""
    return senses @ model.get_output_embeddings().weight.T * getattr(model, "logit_scale", 1.0)


def pushed_most(model, senses: torch.Tensor, n: int = 8, among: torch.Tensor | None = None) -> tuple:
    """The tokens that each of k senses pushes up most and down most.

    senses: (k, d). among: ids of the tokens to choose from; None: the whole vocabulary.
    -> (ids up, scores up, ids down, scores down), each (k, n), the strongest first.
    """
    among = used_tokens(model) if among is None else among.to(senses.device)
    found = pushes(model, senses)[:, among]
    n = min(n, len(among))
    up, down = found.topk(n), found.topk(n, largest=False)
    return among[up.indices], up.values, among[down.indices], down.values


@torch.no_grad()
def sense_directions(model) -> torch.Tensor:
    """Sense vectors of all tokens, scaled to length one, in half precision, (k, tokens, d).

    131 MB for the demo model, 1.2 GB at the released size; cosines with them are right to .0002.
    """
    require_senses(model)
    tokens, k, width = used_tokens(model), model.config.num_senses, model.config.n_embd
    found = torch.empty(k, len(tokens), width, dtype=torch.half, device=model.device)
    for ids in tokens.split(TOKENS_AT_ONCE):
        found[:, ids] = F.normalize(model.sense_vectors(ids).float(), dim=-1).transpose(0, 1).half()
    return found


def neighbours(directions: torch.Tensor, vectors: torch.Tensor, n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of a word's senses, (k, d), the tokens whose same sense lies nearest: ids and cosines, (k, n) each."""
    vectors = F.normalize(vectors.float(), dim=-1)
    # One sense at a time, in float32: a CPU multiplies half-precision numbers slowly, and a copy of all would be large.
    cosines = torch.stack([of_sense.float() @ vector for of_sense, vector in zip(directions, vectors)])
    nearest = cosines.topk(min(n, cosines.shape[1]))
    return nearest.indices, nearest.values
