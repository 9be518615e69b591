"""Text in, packed blocks of tokens out.

    corpus = open_corpus("texts/*.txt.xz")        # or "planted", tables, a data set of the Hugging Face hub
    blocks = prepare(corpus, block_size=256, vocab_size=16_000)
    blocks.train[0]["input_ids"]                  # 256 token ids; also blocks.valid, blocks.tokenizer

Whatever its source, a corpus is a `datasets.IterableDataset` of documents, in a column `text`. They are split into
training and validation before they are packed, so no block mixes the two. Blocks are kept in the cache folder as
memory-mapped Arrow files, under a key made of the text's content and of the settings: a second run starts at once,
and changed text is never mistaken for old.
"""

import glob
import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from backpack_lib.files import as_seen, cache_folder, cached_json, digest, first_line, project_folder, written_whole
from backpack_lib.hub import offline_without_hub
from backpack_lib.text import planted
from backpack_lib.text.planted import PLANTED
from backpack_lib.text.tokenizers import END_OF_TEXT, as_fast_tokenizer, load_tokenizer, train_tokenizer

TABLES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}  # other files are plain text
TEXT = "text"
BETWEEN_DOCUMENTS = re.compile(re.escape(END_OF_TEXT) + r"|\n\s*\n")
BETWEEN_FILES = re.compile(re.escape(END_OF_TEXT))
TOKENIZER_CHARACTERS = 50_000_000  # a tokenizer is trained on the first so many characters
LONGEST_DOCUMENT = 100_000  # characters; a longer one is read as several, to bound memory
TOKENIZED_DOCUMENTS, PACKED_DOCUMENTS, STORED_BLOCKS = 100, 1000, 1000  # at a time
STREAM_TOKENS = 250_000  # of a stream are set aside for validation
FORMAT = 3  # of the cached files; a change of it makes old caches unread


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read again and again. `fingerprint` changes with their content.

    rows: a `datasets.IterableDataset` of documents, in a column `text`.
    nulls: the numbers of the rows without text that have been met.
    streaming: blocks are made as training asks for them, instead of all at first.
    """

    name: str
    fingerprint: str
    rows: Any
    nulls: set[int] = field(default_factory=set)
    streaming: bool = False

    def read(self) -> Iterator[str]:
        return (row[TEXT] for row in self.rows)


@dataclass(frozen=True)
class Blocks:
    """Packed blocks of `block_size` token ids, as `datasets.Dataset`s with one column, `input_ids`.

    train: of a stream, a `datasets.IterableDataset`.
    fingerprint: changes with the text and with the settings that made blocks of it.
    floor: mean nats per token that no model can beat on the validation texts, where it is known.
    bytes_per_token: UTF-8 bytes of the validation text per token, to turn nats per token into bits per byte.
    """

    train: Any
    valid: Any
    tokenizer: Any
    fingerprint: str
    floor: float | None = None
    bytes_per_token: float | None = None


def open_corpus(name: str, per_file: bool = False, streaming: bool = False) -> Corpus:
    """A corpus by name.

    name: "planted"; or files, as paths, folders or globs with commas between them: text, or tables with a column
        `text` (.json, .jsonl, .csv, .parquet), plain or compressed (.gz, .xz, .zst, .bz2); or a data set of the
        Hugging Face hub, as "owner/name" or "owner/name:subset".
    per_file: a text file is one document; otherwise blank lines separate documents. `<|endoftext|>` always does.
    streaming: make blocks as they are needed, and download of a hub data set only what they are made of.
    """
    from datasets import IterableDataset

    if name == PLANTED:
        rows = IterableDataset.from_generator(_planted_rows)
        fingerprint = digest([_digest_of_file(planted.__file__), planted.lexicon()])
    elif files := find_files(name):
        rows = _rows_of_files(name, files, per_file)
        fingerprint = digest([_kind(files[0]), per_file, *map(_digest_of_file, files)])
    else:
        rows, fingerprint = _rows_of_hub(name, streaming)
    columns = rows.column_names or list(next(iter(rows), {TEXT: ""}))
    if TEXT not in columns:
        raise ValueError(f"{name!r} has no column {TEXT!r}; its columns are {', '.join(columns)}.")
    nulls = set()
    settings = {"batched": True, "batch_size": TOKENIZED_DOCUMENTS, "with_indices": True}
    texts = rows.select_columns([TEXT]).map(_documents_of_rows, fn_kwargs={"name": name, "nulls": nulls}, **settings)
    return Corpus(name, fingerprint, texts, nulls, streaming)


def find_files(name: str) -> list[Path]:
    """Files for paths and globs with commas between them; a folder stands for the files in it, but for hidden ones."""
    patterns = [name] if os.path.exists(as_seen(name)) else filter(None, map(str.strip, name.split(",")))
    files = []
    for pattern in patterns:
        path = str(as_seen(os.path.expanduser(pattern)))
        pattern = glob.escape(path) if os.path.exists(path) else path
        matches = glob.glob(pattern, recursive=True) or glob.glob(str(project_folder() / pattern), recursive=True)
        for match in sorted(matches):
            files += sorted(glob.glob(f"{glob.escape(match)}/*")) or [match]
    return [file for file in dict.fromkeys(map(Path, files)) if file.is_file()]  # "**" names some files twice


def _rows_of_files(name: str, files: list[Path], per_file: bool):
    from datasets import IterableDataset, load_dataset

    kind, *others = {_kind(file) for file in files}
    if others:
        raise ValueError(f"{name!r} holds both {kind} and {others[0]} files; name those of one kind.")
    if kind == "text":
        settings = {"files": list(map(str, files)), "per_file": per_file}
        return IterableDataset.from_generator(_text_rows, gen_kwargs=settings)
    settings = {"keep_default_na": False, "na_values": [""]} if kind == "csv" else {}  # "NA" and "null" are words
    names = [glob.escape(str(file)) for file in files]
    return load_dataset(kind, data_files=names, split="train", streaming=True, **settings)


def _kind(file: Path) -> str:
    """ "text", or the kind of table that a file holds."""
    suffixes = map(str.lower, file.suffixes[-2:])  # the last may be that of a compression
    return next((TABLES[suffix] for suffix in suffixes if suffix in TABLES), "text")


def _planted_rows() -> Iterator[dict]:
    return ({TEXT: text.text} for text in planted.generate())


def _text_rows(files: list[str], per_file: bool) -> Iterator[dict]:
    """The documents of text files; what goes on for long without an end is given out in parts."""
    from fsspec.implementations.local import LocalFileSystem

    separator = BETWEEN_FILES if per_file else BETWEEN_DOCUMENTS
    for file in files:
        rest = ""
        try:
            with LocalFileSystem().open(file, "rt", encoding="utf-8-sig", compression="infer") as text:
                while chunk := text.read(LONGEST_DOCUMENT):
                    if "\0" in chunk:
                        raise ValueError("it holds zero bytes")
                    *documents, rest = separator.split(rest + chunk)
                    if len(rest) > 2 * LONGEST_DOCUMENT:  # its end may be half a separator
                        documents.append(rest[:-LONGEST_DOCUMENT])
                        rest = rest[-LONGEST_DOCUMENT:]
                    yield from ({TEXT: document} for document in documents)
        except Exception as error:  # each compression library has errors of its own
            raise ValueError(f"{file} could not be read as text in UTF-8: {first_line(error)}") from error
        yield {TEXT: rest}


def _rows_of_hub(name: str, streaming: bool):
    """The rows of a data set of the hub, and what changes with its content."""
    from datasets import load_dataset_builder

    path, _, subset = name.partition(":")
    try:
        offline_without_hub()
        builder = load_dataset_builder(path, subset or None)
        if streaming:
            return builder.as_streaming_dataset("train"), digest([name, builder.hash])
        builder.download_and_prepare()
        return builder.as_dataset("train").to_iterable_dataset(), digest([name, builder.hash])
    except Exception as error:  # the library raises many kinds, from the network's to its own
        raise ValueError(f"No file matches {name!r}, nor could a data set be loaded: {first_line(error)}") from error


def _documents_of_rows(rows: dict, numbers: list[int], name: str, nulls: set[int]) -> dict:
    """The documents in the column `text` of some rows. Notes in `nulls` the numbers of the rows that have none."""
    documents = []
    for number, text in zip(numbers, rows[TEXT]):
        if text is None:
            nulls.add(number)
        elif not isinstance(text, str):
            kind = type(text).__name__
            raise ValueError(f"Row {number} of {name!r} has no text in its column {TEXT!r} but a {kind}, {text!r:.40}.")
        else:
            for part in map(str.strip, text.split(END_OF_TEXT)):
                documents += [part[i : i + LONGEST_DOCUMENT] for i in range(0, len(part), LONGEST_DOCUMENT)]
    return {TEXT: documents}


def _digest_of_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def split(corpus: Corpus, valid_fraction: float) -> tuple[Corpus, Corpus]:
    """The documents for training and those for validation."""
    first = next(corpus.read(), None)

    def side(name: str) -> Corpus:
        settings = {"validation": name == "validation", "valid_fraction": valid_fraction, "first": first}
        rows = corpus.rows.filter(is_on_side, input_columns=[TEXT], fn_kwargs=settings)
        fingerprint = digest([corpus.fingerprint, name, valid_fraction])
        return replace(corpus, name=f"the {name} part of {corpus.name}", fingerprint=fingerprint, rows=rows)

    return side("training"), side("validation")


def is_on_side(text: str, validation: bool, valid_fraction: float, first: str) -> bool:
    """Whether a document is for validation, or not: decided by its content, so copies of it fall on the same side.

    first: the first document of the corpus, always for validation, so that even a small corpus has some.
    """
    draw = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return (text == first or draw < valid_fraction * 2**64) == validation


def first_characters(documents: Iterable[str], limit: int) -> Iterator[str]:
    """The first documents, until they have `limit` characters together."""
    size = 0
    for text in documents:
        yield text
        size += len(text)
        if size >= limit:
            return


def prepare(
    corpus: Corpus,
    block_size: int,
    vocab_size: int = 16_000,
    tokenizer=None,
    valid_corpus: Corpus | None = None,
    valid_fraction: float = 0.02,
) -> Blocks:
    """Tokenised, packed blocks of a corpus; taken from the cache where they are already there.

    tokenizer: an existing tokenizer, or its folder or hub id; None trains one of `vocab_size` on the
        training documents.
    valid_corpus: documents for validation; None sets aside `valid_fraction` of the corpus.
    """
    train, valid = (corpus, valid_corpus) if valid_corpus else split(corpus, valid_fraction)
    if tokenizer is None:
        tokenizer = trained_tokenizer(train, vocab_size)
    elif isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    valid_blocks = stored_blocks(valid, tokenizer, block_size).with_format("torch")
    make_blocks = blocks_of if corpus.streaming else stored_blocks
    key = digest([_key(side, tokenizer, block_size) for side in (train, valid)])
    floor = None
    if (valid_corpus or corpus).name == PLANTED:
        floor = cached_json(cache_folder(), {"floor": key}, lambda: planted_floor(tokenizer, valid.read()))
    return Blocks(
        train=make_blocks(train, tokenizer, block_size).with_format("torch"),
        valid=valid_blocks,
        tokenizer=tokenizer,
        fingerprint=key,
        floor=floor,
        bytes_per_token=bytes_per_token(tokenizer, valid_blocks),
    )


def trained_tokenizer(documents: Corpus, vocab_size: int):
    """A tokenizer of the first documents, taken from the cache where it is already there."""

    def train() -> str:
        texts = first_characters(documents.read(), TOKENIZER_CHARACTERS)
        return train_tokenizer(texts, vocab_size).backend_tokenizer.to_str()

    what = {"tokenizer of": documents.fingerprint, "vocab_size": vocab_size, "format": FORMAT}
    return as_fast_tokenizer(Tokenizer.from_str(cached_json(cache_folder(), what, train)))


def stored_blocks(documents: Corpus, tokenizer, block_size: int):
    """Blocks of token ids, as a memory-mapped `Dataset`; of a stream, those of its beginning."""
    from datasets import Dataset, Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    file = cache_folder() / f"{_key(documents, tokenizer, block_size)}.arrow"
    if file.is_file():
        return Dataset.from_file(str(file))
    blocks = blocks_of(documents, tokenizer, block_size)
    if documents.streaming:
        blocks = blocks.take(max(1, STREAM_TOKENS // block_size))
    features = Features({"input_ids": List(Value(_token_type(tokenizer)), length=block_size)})
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as building, ArrowWriter(path=str(building), features=features) as writer:
        for rows in blocks.iter(STORED_BLOCKS):
            writer.write_batch(rows)
        if not writer.finalize()[0]:
            raise ValueError(
                f"There is no text in {documents.name}, or less than one block of {block_size} tokens; "
                "use more documents, with a blank line between two, or a smaller block_size."
            )
    if documents.nulls:
        warnings.warn(f"{len(documents.nulls)} rows of {documents.name} have no text and are left out.", stacklevel=3)
    return Dataset.from_file(str(file))


def blocks_of(documents: Corpus, tokenizer, block_size: int):
    """Blocks of token ids, as an `IterableDataset`; what is left over of every 1000 documents is dropped."""
    settings = {"batched": True, "batch_size": PACKED_DOCUMENTS, "remove_columns": [TEXT]}
    return documents.rows.map(pack, fn_kwargs={"tokenizer": tokenizer, "block_size": block_size}, **settings)


def pack(rows: dict, tokenizer, block_size: int) -> dict:
    """Documents -> rows of `block_size` token ids, with an end-of-text token after each document."""
    tokens = []
    for start in range(0, len(rows[TEXT]), TOKENIZED_DOCUMENTS):
        texts = rows[TEXT][start : start + TOKENIZED_DOCUMENTS]
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        tokens += [np.array([*row, tokenizer.eos_token_id], _token_type(tokenizer)) for row in ids]
    tokens = np.concatenate(tokens)
    whole = len(tokens) // block_size * block_size
    return {"input_ids": list(tokens[:whole].reshape(-1, block_size))}


def _token_type(tokenizer) -> str:
    return "uint16" if len(tokenizer) <= 2**16 else "uint32"


def _key(documents: Corpus, tokenizer, block_size: int) -> str:
    settings = [FORMAT, documents.fingerprint, documents.streaming, block_size]
    return digest([*settings, tokenizer.backend_tokenizer.to_str()])


def bytes_per_token(tokenizer, blocks) -> float:
    """Mean UTF-8 bytes of the tokens in some blocks. Byte-level tokens are written with one letter for each byte."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    n_bytes = np.array([0 if token in special else len(token) for token in tokens])
    return float(n_bytes[blocks.with_format("numpy")[:]["input_ids"]].mean())


def planted_floor(tokenizer, valid_texts: Iterable[str]) -> float:
    """Mean nats per token of planted texts under the generator that wrote them."""
    wanted = set(valid_texts)
    texts = [text for text in planted.generate() if text.text in wanted]
    ids = tokenizer([text.text for text in texts], add_special_tokens=False)["input_ids"]
    return -sum(sum(text.log_probs) for text in texts) / sum(len(i) + 1 for i in ids)
