"""Tokenizers in which chosen words are single tokens, whatever byte-pair encoding would make of them."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from backpack_lib.text.corpora import Blocks, Corpus, prepare, split, trained_tokenizer
from backpack_lib.text.tokenizers import END_OF_TEXT, as_fast_tokenizer

VALID_FRACTION = 0.02  # of a corpus without a validation text of its own


def prepare_with_words(
    corpus: Corpus, block_size: int, vocab_size: int, words: list[str], valid_corpus: Corpus | None
) -> Blocks:
    """The blocks of a corpus, with a tokenizer of its training documents in which each of `words` is one token."""
    train = corpus if valid_corpus else split(corpus, VALID_FRACTION)[0]
    tokenizer = guarantee_words(trained_tokenizer(train, vocab_size), words, vocab_size)
    return prepare(corpus, block_size, tokenizer=tokenizer, valid_corpus=valid_corpus, valid_fraction=VALID_FRACTION)


def guarantee_words(tokenizer, words: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A trained tokenizer, changed so that each of `words` is one token after a space.

    A merge of last rank applies only where all earlier ones are done, so words that are already single stay so, and
    other text changes only where a word's very pieces meet. Trained merges of lowest rank are dropped to make room.

    Raises ValueError if the vocabulary cannot hold the words.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    trained = [tuple(merge) for merge in state["model"]["merges"]]
    while True:
        merges = trained + _merges_of_words(trained, words)
        vocabulary = _vocabulary(merges)
        excess = len(vocabulary) - vocab_size
        if excess <= 0:
            break
        if excess > len(trained):
            raise ValueError(f"vocab_size={vocab_size} has no room for {len(words)} words as single tokens.")
        trained = trained[:-excess]
    state["model"] |= {"vocab": vocabulary, "merges": merges}
    return as_fast_tokenizer(Tokenizer.from_str(json.dumps(state)))


def _vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """The tokens of a tokenizer with these merges: the end of text, single bytes, and what each merge makes."""
    singles = [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = dict.fromkeys([*singles, *(left + right for left, right in merges)])
    return {token: number for number, token in enumerate(tokens)}


def _merges_of_words(trained: list[tuple[str, str]], words: list[str]) -> list[tuple[str, str]]:
    """The merges that join each word, from left to right, from the pieces that the trained ones leave of it."""
    tokenizer = Tokenizer(models.BPE(_vocabulary(trained), trained))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merges = {}
    for word in words:
        joined, *rest = tokenizer.encode(" " + word).tokens
        for piece in rest:
            merges[joined, piece] = None
            joined += piece
    return list(merges)
