"""Byte-level BPE tokenizers: new ones of a text, and existing ones by name."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from backpack_lib.files import first_line
from backpack_lib.hub import local_first

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, but at least the 256 bytes and the end of text."""
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
    return as_fast_tokenizer(tokenizer)


def as_fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer in the form that transformers uses, with the end-of-text token in every special part."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str):
    """An existing tokenizer, from a folder or from the Hugging Face hub: byte-level BPE with an end-of-text token."""
    try:
        tokenizer = local_first(AutoTokenizer.from_pretrained, name)
    except (OSError, ValueError) as error:
        raise ValueError(f"No tokenizer could be loaded from {str(name)!r}: {first_line(error)}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.decoder, decoders.ByteLevel) or tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {str(name)!r} is not byte-level BPE with an end-of-text token (eos_token), as GPT-2's is, "
            "so texts would be read wrongly; choose one that is, or train one."
        )
    return tokenizer
