"""Look-ups on the sense table: what each sense of a word holds, whatever the context."""

import torch

MULTI_TOKEN = ("mean", "first")


def tokens_of_word(tokenizer, word: str) -> list[int]:
    """The token ids of a word as it stands in a text, after a space. Raises ValueError for an empty word."""
    if not word.strip():
        raise ValueError(f"{word!r} is no word; give at least one letter.")
    return tokenizer(" " + word.strip(), add_special_tokens=False)["input_ids"]


@torch.no_grad()
def senses_of_words(model, tokenizer, words: list[str], multi_token: str = "mean") -> torch.Tensor:
    """Sense vectors of words, (n, k, d). A Transformer has none; its input embeddings stand in as one sense.

    multi_token: what becomes of a word of several tokens: the "mean" of their senses, or those of the "first".

    Raises ValueError for an empty word or an unknown `multi_token`.
    """
    if multi_token not in MULTI_TOKEN:
        raise ValueError(f"multi_token={multi_token!r} is unknown; choose one of {', '.join(MULTI_TOKEN)}.")
    ids = [tokens_of_word(tokenizer, word)[: None if multi_token == "mean" else 1] for word in words]
    distinct, place = torch.tensor([i for tokens in ids for i in tokens], device=model.device).unique(
        return_inverse=True
    )
    table = vectors_of_tokens(model, distinct)[place]
    return torch.stack([part.mean(0) for part in table.split([len(tokens) for tokens in ids])])


def vectors_of_tokens(model, token_ids: torch.Tensor) -> torch.Tensor:
    """Sense vectors of tokens, (n, k, d); of a Transformer, its input embeddings, (n, 1, d)."""
    if hasattr(model, "sense_vectors"):
        return model.sense_vectors(token_ids)
    return model.get_input_embeddings()(token_ids)[:, None]
