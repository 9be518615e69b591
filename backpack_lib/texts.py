"""Texts into rows of token ids as the models were trained on them, and continuations out."""

import torch
from transformers import set_seed


def ids_of_text(tokenizer, text: str) -> list[int]:
    """A text's token ids behind an end-of-text token, which is where a text begins in training."""
    return [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def pad_rows(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids, padded on the right, and their attention mask."""
    size = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (size - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (size - len(row)) for row in rows])


def continue_text(model, tokenizer, prompt: str, max_new_tokens: int = 40, seed: int = 0, **settings) -> str:
    """The prompt and its continuation by `generate()`, sampled; the same for the same seed.

    settings: any of `generate()`'s, such as `top_p`, `temperature` or `do_sample=False`.

    Raises ValueError if the prompt leaves no room for `max_new_tokens` in the context.
    """
    ids = torch.tensor([ids_of_text(tokenizer, prompt)], device=model.device)
    room = model.config.n_positions - ids.shape[1]
    if max_new_tokens > room:
        raise ValueError(
            f"The prompt has {ids.shape[1]} tokens, which leaves room for {max(room, 0)} of the model's "
            f"{model.config.n_positions}, but max_new_tokens={max_new_tokens}; shorten the prompt or ask for fewer."
        )
    set_seed(seed)
    settings = {"do_sample": True, "max_new_tokens": max_new_tokens} | settings
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return tokenizer.decode(out[0], skip_special_tokens=True)
