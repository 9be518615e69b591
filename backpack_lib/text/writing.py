"""Texts into rows of token ids as the models were trained on them, and continuations out."""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import set_seed


def ids_of_text(tokenizer, text: str) -> list[int]:
    """A text's token ids after an end-of-text token, which is where a text begins in training."""
    return [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def pad_rows(rows: list[list[int]], pad: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids, padded on the right or left, and their attention mask."""
    side = "left" if left else "right"
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, pad, side)
    return ids, pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True, 0, side)


def prompts_of_texts(model, tokenizer, prompts: list[str], max_new_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as a batch for `generate()`, padded on the left, and their attention mask. (n, T) each

    Raises ValueError if there is no room for the new tokens in the model's context.
    """
    ids, mask = pad_rows([ids_of_text(tokenizer, prompt) for prompt in prompts], tokenizer.eos_token_id, left=True)
    limit = model.config.max_position_embeddings
    room = limit - ids.shape[1]
    if max_new_tokens > room:
        raise ValueError(
            f"The prompt has {ids.shape[1]} tokens, which leaves room for {max(room, 0)} of the model's {limit}, but "
            f"max_new_tokens={max_new_tokens}; shorten the prompt or ask for fewer."
        )
    return ids.to(model.device), mask.to(model.device)


def continue_texts(
    model, tokenizer, prompts: list[str], max_new_tokens: int = 40, seed: int = 0, **settings
) -> list[str]:
    """Each prompt and its continuation by `generate()`, sampled; the same for the same seed and batch.

    settings: any of `generate()`'s, such as `top_p`, `temperature` or `do_sample=False`.
    """
    ids, mask = prompts_of_texts(model, tokenizer, prompts, max_new_tokens)
    set_seed(seed)
    settings = {"do_sample": True, "max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.eos_token_id} | settings
    return tokenizer.batch_decode(model.generate(ids, attention_mask=mask, **settings), skip_special_tokens=True)


def continue_text(model, tokenizer, prompt: str, max_new_tokens: int = 40, seed: int = 0, **settings) -> str:
    """One prompt and its continuation; see `continue_texts`."""
    return continue_texts(model, tokenizer, [prompt], max_new_tokens, seed, **settings)[0]
