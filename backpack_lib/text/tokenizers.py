"""Byte-level BPE tokenizers, with words that are guaranteed to be single tokens."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from backpack_lib.files import first_line
from backpack_lib.hub import reaching_hub

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # every byte, and the end of text

Merge = tuple[str, str]


def train_tokenizer(texts: Iterable[str], vocab_size: int, words: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, in which each of `words` is one token after a space.

    Raises ValueError if the vocabulary cannot hold every byte and the words, or if a word can't be a single
    token because it has spaces or punctuation inside.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: single bytes and the end of text alone take {SMALLEST_VOCABULARY}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer = guarantee_words(tokenizer, [" " + word for word in words], vocab_size)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def guarantee_words(tokenizer: Tokenizer, words: list[str], vocab_size: int) -> Tokenizer:
    """The same tokenizer with merges added, last in rank, that join each word into one token.

    A merge of last rank applies only where all earlier ones are done, so words that are already
    single stay so, and other text changes only where a word's very pieces meet. Trained merges of
    lowest rank are dropped where the vocabulary would grow too large.
    """
    state = json.loads(tokenizer.to_str())
    trained = [tuple(merge) for merge in state["model"]["merges"]]
    singles = [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    spelled = [_spell(tokenizer, word) for word in words]
    n_trained = len(trained)
    while True:
        merges = _with_words(trained[:n_trained], spelled)
        tokens = list(dict.fromkeys([*singles, *(left + right for left, right in merges)]))
        excess = len(tokens) - vocab_size
        if excess <= 0:
            break
        if excess > n_trained:
            raise ValueError(
                f"vocab_size={vocab_size} has no room for {len(words)} words as single tokens; "
                f"choose at least {len(tokens) - n_trained}."
            )
        n_trained -= excess
    state["model"]["vocab"] = {token: number for number, token in enumerate(tokens)}
    state["model"]["merges"] = merges
    return Tokenizer.from_str(json.dumps(state))


def _spell(tokenizer: Tokenizer, word: str) -> str:
    """A word in the byte-level alphabet, in which BPE works."""
    parts = [part for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(word)]
    if len(parts) != 1:
        raise ValueError(f"{word.strip()!r} cannot be one token: it is split at spaces and punctuation first.")
    return parts[0]


def _with_words(merges: list[Merge], spelled: list[str]) -> list[Merge]:
    merges = list(merges)
    rank = {merge: number for number, merge in enumerate(merges)}
    for word in spelled:
        first, *rest = _segment(word, rank)
        for piece in rest:
            rank[first, piece] = len(merges)
            merges.append((first, piece))
            first += piece
    return merges


def _segment(word: str, rank: dict[Merge, int]) -> list[str]:
    """BPE by the book: join the pair of lowest rank until none is left."""
    pieces = list(word)
    while len(pieces) > 1:
        pairs = list(zip(pieces, pieces[1:]))
        lowest = min(range(len(pairs)), key=lambda i: rank.get(pairs[i], len(rank)))
        if pairs[lowest] not in rank:
            break
        pieces[lowest : lowest + 2] = ["".join(pairs[lowest])]
    return pieces


def load_tokenizer(name: str):
    """An existing tokenizer, from a folder or from the Hugging Face hub.

    Raises ValueError if there is none, if it is not byte-level BPE, or if it has no end-of-text token to put between
    documents.
    """
    try:
        with reaching_hub(name):
            tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"No tokenizer could be loaded from {str(name)!r}: {first_line(error)}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.decoder, decoders.ByteLevel):
        raise ValueError(
            f"The tokenizer {str(name)!r} is not byte-level BPE, as GPT-2's is, so its spaces would be read wrongly; "
            "choose one that is, or train one."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer {str(name)!r} has no end-of-text token (eos_token) to put between documents.")
    return tokenizer
