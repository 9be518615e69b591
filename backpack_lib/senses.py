"""Look-ups on the sense table: what each sense of a word holds, whatever the context.

A word is given as it is written, or as the id of one token. What a sense pushes up or down is its
projection E C(x)_l: exactly what it adds to each word's logit when it goes in with weight one.
"""

from numbers import Integral

import torch
import torch.nn.functional as F

MULTI_TOKEN = ("mean", "first", "last")
CONTINUES = "…"  # shown before a token that continues a word
TOKENS_AT_ONCE = 2048


def tokens_of_word(tokenizer, word: str) -> list[int]:
    """The token ids of a word as it stands in a text: after a space, but for punctuation, and for "…ing" and its like.

    Raises ValueError for an empty word.
    """
    text = word.strip()
    if not text.strip(CONTINUES):
        raise ValueError(f"{word!r} is no word; give at least one letter.")
    text = " " + text if text[0].isalnum() else text.removeprefix(CONTINUES)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def known_tokens_of_word(tokenizer, word: str) -> list[int]:
    """As `tokens_of_word`. Raises ValueError, too, for a word that falls into bytes, which the vocabulary lacks."""
    ids = tokens_of_word(tokenizer, word)
    if tokenizer.unk_token_id in ids or any("\N{REPLACEMENT CHARACTER}" in tokenizer.decode([i]) for i in ids):
        raise ValueError(f"The vocabulary lacks the word {word!r}: it falls into bytes; choose another word.")
    return ids


def token_of_word(tokenizer, word: str | int) -> int:
    """The one token of a word, or a token id as it is.

    Raises ValueError for a word of several tokens, naming them, and for an id outside the vocabulary.
    """
    if not isinstance(word, str):
        if not _is_index(word, len(tokenizer)):
            raise ValueError(f"There is no token {word!r}; this vocabulary has the ids 0 to {len(tokenizer) - 1}.")
        return int(word)
    ids = tokens_of_word(tokenizer, word)
    if len(ids) > 1:
        parts = ", ".join(f"{name!r} ({i})" for i, name in zip(ids, spell(tokenizer, ids)))
        raise ValueError(f"{word!r} is {len(ids)} tokens here: {parts}; give one of these ids, or choose another word.")
    return ids[0]


def spell(tokenizer, ids) -> list[str]:
    """Tokens to show on their own: a word without its space, "…ing" for what continues a word, visible line ends.

    `token_of_word` reads most of them back.
    """
    special = set(tokenizer.all_special_ids)
    return [tokenizer.convert_ids_to_tokens(int(i)) if i in special else _spell(tokenizer, int(i)) for i in ids]


def spell_text(tokenizer, ids) -> list[str]:
    """The tokens of a text to show in their order; where a word begins without a space before it, "…" is left out."""
    names, before = spell(tokenizer, ids), ""
    for place, i in enumerate(ids):
        if not before[-1:].isalnum():
            names[place] = names[place].removeprefix(CONTINUES) or CONTINUES
        before = tokenizer.decode([int(i)])
    return names


def _spell(tokenizer, i: int) -> str:
    text = tokenizer.decode([i])
    if "\N{REPLACEMENT CHARACTER}" in text:  # some of a character's bytes
        return tokenizer.convert_ids_to_tokens(i)
    if not text.strip():
        return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")
    if text[0] == " ":
        return text[1:]
    return CONTINUES + text if text[0].isalnum() else text


def has_senses(model) -> bool:
    return hasattr(model, "sense_vectors")


def require_senses(model):
    """Raises ValueError if the model is no Backpack."""
    if not has_senses(model):
        raise ValueError(f"This takes a Backpack; a {type(model).__name__} has no sense vectors.")


def require_transformer(model):
    """Raises ValueError for a Backpack."""
    if has_senses(model):
        raise ValueError("This is for a Transformer, and the model given is a Backpack; load its baseline.")


def check_sense(model, sense: int) -> int:
    """Raises ValueError if the model has no such sense."""
    k = model.config.num_senses
    if not _is_index(sense, k):
        raise ValueError(f"sense={sense!r} is out of range; this model has the senses 0 to {k - 1}.")
    return int(sense)


def _is_index(number, size: int) -> bool:
    """Whether a number, of Python or of numpy, counts one of `size` things from 0."""
    return isinstance(number, Integral) and not isinstance(number, bool) and 0 <= number < size


@torch.no_grad()
def senses_of_words(model, tokenizer, words: list[str], multi_token: str | int = "mean") -> torch.Tensor:
    """Sense vectors of words, (n, k, d). A Transformer has none; its input embeddings stand in as one sense.

    multi_token: what becomes of a word of several tokens: the "mean" of their senses, or those of the
        "first", of the "last", or of the one that an index from 0 names.

    Raises ValueError for no words, an empty word, an unknown `multi_token`, or an index that a word is too short for.
    """
    if not words:
        raise ValueError("There is no word in an empty list; give at least one.")
    ids = [choose_tokens(tokenizer, word, multi_token) for word in words]
    distinct, place = torch.tensor([i for tokens in ids for i in tokens], device=model.device).unique(
        return_inverse=True
    )
    table = vectors_of_tokens(model, distinct)[place]
    return torch.stack([part.mean(0) for part in table.split([len(tokens) for tokens in ids])])


def choose_tokens(tokenizer, word: str, multi_token: str | int) -> list[int]:
    """Those of a word's tokens that stand for it; see `senses_of_words`."""
    ids = tokens_of_word(tokenizer, word)
    if multi_token == "mean":
        return ids
    if multi_token in ("first", "last"):
        return [ids[0 if multi_token == "first" else -1]]
    if not isinstance(multi_token, Integral):
        choices = ", ".join(MULTI_TOKEN)
        raise ValueError(f"multi_token={multi_token!r} is unknown; choose one of {choices}, or a token's index.")
    if not _is_index(multi_token, len(ids)):
        parts = ", ".join(map(repr, spell(tokenizer, ids)))
        raise ValueError(f"{word!r} has no token number {multi_token}; from 0, its tokens are {parts}.")
    return [ids[multi_token]]


def vectors_of_tokens(model, token_ids: torch.Tensor) -> torch.Tensor:
    """Sense vectors of tokens, (n, k, d); of a Transformer, its input embeddings, (n, 1, d)."""
    if has_senses(model):
        return model.sense_vectors(token_ids)
    return model.get_input_embeddings()(token_ids)[:, None]


@torch.no_grad()
def pushes(model, senses: torch.Tensor) -> torch.Tensor:
    """What sense vectors add to each logit at weight one, E C(x)_l. (..., d) -> (..., V)"""
    return senses @ model.get_output_embeddings().weight.T


def used_tokens(model) -> torch.Tensor:
    """The ids of the vocabulary's rows that stand for a token."""
    return torch.arange(getattr(model.config, "used_vocab_size", None) or model.config.vocab_size, device=model.device)


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
    """Sense vectors of all tokens, scaled to length one, (k, tokens, d): 262 MB for the demo model."""
    require_senses(model)
    tokens, k, width = used_tokens(model), model.config.num_senses, model.config.n_embd
    found = torch.empty(k, len(tokens), width, dtype=model.dtype, device=model.device)
    for ids in tokens.split(TOKENS_AT_ONCE):
        found[:, ids] = F.normalize(model.sense_vectors(ids), dim=-1).transpose(0, 1)
    return found


def neighbours(directions: torch.Tensor, vectors: torch.Tensor, n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of a word's senses, (k, d), the tokens whose same sense lies nearest: ids and cosines, (k, n) each."""
    cosines = (directions @ F.normalize(vectors, dim=-1)[..., None])[..., 0]
    nearest = cosines.topk(min(n, cosines.shape[1]))
    return nearest.indices, nearest.values


def likeness_of_senses(directions: torch.Tensor) -> torch.Tensor:
    """How alike the senses of one word are: the cosine of C(x)_l and C(x)_m, averaged over all x. -> (k, k)"""
    flat = directions.flatten(1)
    return flat @ flat.T / directions.shape[1]
