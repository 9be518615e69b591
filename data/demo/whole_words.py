"""Tokenizers in which chosen words are single tokens, whatever byte-pair encoding would make of them."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from backpack_lib.text.corpora import Blocks, Corpus, prepare, split, trained_tokenizer
from backpack_lib.text.tokenizers import END_OF_TEXT, as_fast_tokenizer

VALID_FRACTION = 0.02  # of a corpus without a validation text of its own

Merge = tuple[str, str]


def prepare_with_words(
    corpus: Corpus, block_size: int, vocab_size: int, words: list[str], valid_corpus: Corpus | None
) -> Blocks:
    """The blocks of a corpus, with a tokenizer of its training documents in which each of `words` is one token."""
    train = corpus if valid_corpus else split(corpus, VALID_FRACTION)[0]
    tokenizer = guarantee_words(trained_tokenizer(train, vocab_size), words, vocab_size)
    return prepare(corpus, block_size, tokenizer=tokenizer, valid_corpus=valid_corpus, valid_fraction=VALID_FRACTION)


def guarantee_words(tokenizer, words: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A trained tokenizer, changed so that each of `words` is one token after a space.

    A merge of last rank applies only where all earlier ones are done, so words that are already single stay so, and
    other text changes only where a word's very pieces meet. Trained merges of lowest rank are dropped to make room.

    Raises ValueError if the vocabulary cannot hold the words, or if a word has spaces or punctuation inside.
    """
    tokenizer = tokenizer.backend_tokenizer
    state = json.loads(tokenizer.to_str())
    trained = [tuple(merge) for merge in state["model"]["merges"]]
    spelled = [_spell(tokenizer, word) for word in words]
    merges = _with_words(trained, spelled)
    while len(_vocabulary(merges)) > vocab_size:
        excess = len(_vocabulary(merges)) - vocab_size
        if excess > len(trained):
            raise ValueError(
                f"vocab_size={vocab_size} has no room for {len(spelled)} words as single tokens; "
                f"choose at least {vocab_size + excess - len(trained)}."
            )
        trained = trained[:-excess]
        merges = _with_words(trained, spelled)
    state["model"]["vocab"] = {token: number for number, token in enumerate(_vocabulary(merges))}
    state["model"]["merges"] = merges
    return as_fast_tokenizer(Tokenizer.from_str(json.dumps(state)))


def _vocabulary(merges: list[Merge]) -> list[str]:
    """The tokens of a tokenizer with these merges: the end of text, single bytes, and what each merge makes."""
    singles = [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return list(dict.fromkeys([*singles, *(left + right for left, right in merges)]))


def _spell(tokenizer: Tokenizer, word: str) -> str:
    """A word after a space in the byte-level alphabet, in which BPE works."""
    parts = [part for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(" " + word)]
    if len(parts) != 1:
        raise ValueError(f"{word!r} cannot be one token: it is split at spaces and punctuation first.")
    return parts[0]


def _with_words(merges: list[Merge], spelled: list[str]) -> list[Merge]:
    """The merges, and after them those that join each word from the pieces that it falls into."""
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
