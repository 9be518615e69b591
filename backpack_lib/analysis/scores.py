"""How well a model knows a language: bits per byte, and BLiMP's minimal pairs (Warstadt et al., 2020)."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from backpack_lib.analysis.attribution import Reading, reading_of
from backpack_lib.files import first_line
from backpack_lib.hub import offline_without_hub
from backpack_lib.model.kinds import require_senses
from backpack_lib.text.writing import ids_of_text, pad_rows

# Bytes that the logits of the texts which are read at once may take, in float32.
MEMORY = {"cpu": 2**28, "cuda": 2**33}
PROMPTS_AT_ONCE = 64  # of which only the last token's logits are made


@torch.inference_mode()
def token_nats(model, rows: list[list[int]]) -> list[torch.Tensor]:
    """The loss of each token but the first of every row of token ids, in nats: for each row a float32 (T - 1,)."""
    nats = [torch.empty(0)] * len(rows)
    for places, ids, mask in batches(model, rows):
        logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").cpu()
        for place, row in zip(places, losses):
            nats[place] = row[: len(rows[place]) - 1]
    return nats


def bits_per_byte(model, tokenizer, texts: Iterable[str]) -> float:
    """Mean bits that the model needs for a byte of UTF-8 text, which does not depend on the tokenizer.

    Each text stands alone after an end-of-text token. Longer ones are read in windows that overlap by
    half, so that a token has at least half a window before it; each token counts once.
    """
    n_bytes, windows = 0, []
    for text in texts:
        n_bytes += len(text.encode())
        windows += _windows(ids_of_text(tokenizer, text), model.config.n_positions)
    if not n_bytes:
        raise ValueError("There is no text to measure; give at least one that is not empty.")
    nats = token_nats(model, [ids for ids, _ in windows])
    counted = sum(losses[first - 1 :].sum().item() for losses, (_, first) in zip(nats, windows))
    return counted / math.log(2) / n_bytes


def _windows(ids: list[int], size: int) -> Iterator[tuple[list[int], int]]:
    """Windows of a text's tokens, and in each the first token that no window before has counted."""
    start, counted = 0, 1
    while counted < len(ids):
        yield ids[start : start + size], counted - start
        counted = start + size
        start += size // 2


def log_probabilities(model, tokenizer, sentences: list[str]) -> torch.Tensor:
    """Log-probability of each sentence, the sum over its tokens, (n,)."""
    nats = token_nats(model, [ids_of_text(tokenizer, sentence) for sentence in sentences])
    return -torch.stack([losses.sum() for losses in nats])


def nats_per_token(model, tokenizer, texts: list[str], prompts: list[str] | None = None) -> float:
    """The mean loss on texts, or on what each says after its prompt, in nats per token; `math.exp` of it is perplexity."""
    nats = token_nats(model, [ids_of_text(tokenizer, text) for text in texts])
    if prompts is not None:
        nats = [losses[len(ids_of_text(tokenizer, prompt)) - 1 :] for losses, prompt in zip(nats, prompts)]
    return torch.cat(nats).mean().item()


@torch.inference_mode()
def next_log_probabilities(model, tokenizer, prompts: list[str]) -> torch.Tensor:
    """Log-probabilities of the token that follows each prompt, (n, V)."""
    log_probs = []
    for ids, mask, last in prompt_batches(model, tokenizer, prompts):
        kept, place = last.unique(return_inverse=True)
        logits = model(ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
        log_probs.append(logits[torch.arange(len(ids)), place].float().log_softmax(-1))
    return torch.cat(log_probs)


@torch.inference_mode()
def readings(model, tokenizer, prompts: list[str]) -> Iterator[tuple[list[int], Reading]]:
    """The ids of each prompt, and all that went into the prediction of the token that follows it.

    Raises ValueError for a model without senses.
    """
    require_senses(model)
    for ids, mask, last in prompt_batches(model, tokenizer, prompts):
        kept, place = last.unique(return_inverse=True)
        out = model(ids, attention_mask=mask, output_senses=True, use_cache=False, logits_to_keep=kept)
        for row, end in enumerate(last.tolist()):
            yield ids[row, : end + 1].tolist(), reading_of(model, out, row, end, out.logits[row, place[row]])


def prompt_batches(model, tokenizer, prompts: list[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Prompts, `PROMPTS_AT_ONCE` at a time: ids and mask, (B, T), and where each one's last token stands, (B,)."""
    for part in parts(prompts, PROMPTS_AT_ONCE):
        ids, mask = _padded(model, [ids_of_text(tokenizer, prompt) for prompt in part])
        yield ids, mask, mask.sum(1) - 1


def batches(model, rows: list[list[int]]) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Rows of token ids, the shortest first, as many at once as have logits that fit `MEMORY`.

    -> where they stand in `rows`, and their ids and mask, (B, T), on the model's device.
    """
    memory = MEMORY.get(model.device.type, MEMORY["cpu"])
    room = memory // (model.config.vocab_size * torch.float32.itemsize)  # tokens
    part = []
    for place in sorted(range(len(rows)), key=lambda place: len(rows[place])):
        if part and (len(part) + 1) * len(rows[place]) > room:
            yield part, *_padded(model, [rows[one] for one in part])
            part = []
        part.append(place)
    if part:
        yield part, *_padded(model, [rows[one] for one in part])


def _padded(model, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = pad_rows(rows, 0)  # what stands after a text is read by nothing before it
    return ids.to(model.device), mask.to(model.device)


def blimp_accuracy(model, tokenizer, pairs: pd.DataFrame) -> pd.Series:
    """The share of each phenomenon's pairs in which the grammatical sentence is the likelier one."""
    good, bad = (log_probabilities(model, tokenizer, list(pairs[c])) for c in ("sentence_good", "sentence_bad"))
    return pd.Series((good > bad).cpu().numpy()).groupby(pairs["UID"].to_numpy()).mean()


def read_blimp(source: str) -> pd.DataFrame:
    """BLiMP's pairs, from a folder of its .jsonl files or from the Hugging Face hub."""
    if Path(source).is_dir():
        files = sorted(Path(source).glob("*.jsonl"))
        if not files:
            raise ValueError(f"The folder {source!r} has no .jsonl file; give one with BLiMP's sets.")
        return pd.concat([pd.read_json(file, lines=True) for file in files], ignore_index=True)
    import datasets

    try:
        offline_without_hub()
        names = datasets.get_dataset_config_names(source)
        return pd.concat([datasets.load_dataset(source, name, split="train").to_pandas() for name in names])
    except Exception as error:  # the library raises many kinds, from the network's to its own
        raise ValueError(
            f"{source!r} is no folder, and BLiMP could not be loaded by that name: {first_line(error)}"
        ) from error


def parts(items: list, size: int) -> Iterator[list]:
    return (items[start : start + size] for start in range(0, len(items), size))
