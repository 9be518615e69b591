"""Text in, packed blocks of tokens out.

    corpus = open_corpus("texts/*.txt.xz")        # or "planted", or a data set of the Hugging Face hub
    blocks = prepare(corpus, block_size=256, vocab_size=16_000)
    blocks.train[0]["input_ids"]                  # 256 token ids; also blocks.valid, blocks.tokenizer

Documents are split into training and validation before they are packed, so no block mixes the two.
Blocks are kept in the cache folder as memory-mapped Arrow files, under a key made of the text's
content and of the settings: a second run starts at once, and changed text is never mistaken for old.
"""

import contextlib
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from backpack_lib.files import cache_folder, first_line, project_folder
from backpack_lib.hub import reaching_hub
from backpack_lib.text import planted
from backpack_lib.text.tokenizers import load_tokenizer, train_tokenizer

PLANTED = "planted"
TOKENIZER_CHARACTERS = 50_000_000  # a tokenizer is trained on the first so many characters
LONGEST_DOCUMENT = 1_000_000  # characters; a longer one is read as several, to bound memory
BATCH_CHARACTERS = 2_000_000  # tokenised at a time
STREAM_VALID_CHARACTERS = 1_000_000  # of a stream are set aside for validation
BUILDING = "building-"  # the cache's folders that are not yet whole
ABANDONED = 24 * 60 * 60  # seconds without a change, after which whoever was building must have been killed
FORMAT = 1  # of the cached files; a change of it makes old caches unread


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read again and again. `fingerprint` changes with their content.

    stream: the `datasets.IterableDataset` behind a corpus that is read over the network as needed.
    """

    name: str
    fingerprint: str
    read: Callable[[], Iterator[str]]
    stream: Any = None


@dataclass(frozen=True)
class Blocks:
    """Packed blocks of `block_size` token ids, as `datasets.Dataset`s with one column, `input_ids`.

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


# ---------------------------------------------------------------- reading


def open_corpus(name: str, per_file: bool = False, streaming: bool = False) -> Corpus:
    """A corpus by name.

    name: "planted"; or text files, as paths or globs with commas between them, plain or compressed
        (.gz, .xz, .zst); or a text data set of the Hugging Face hub, as "owner/name" or "owner/name:subset".
    per_file: a file is one document; otherwise blank lines separate documents.
    streaming: read a hub data set over the network as it is needed, instead of downloading it first.

    Raises ValueError if there is nothing by that name, and on reading, if a file is not text.
    """
    if name == PLANTED:
        return Corpus(name, _planted_fingerprint(), lambda: (text.text for text in planted.generate()))
    files = find_files(name)
    if files:
        reader = _read_whole if per_file else _read_blocks
        return Corpus(name, _digest_files(files, per_file), lambda: chain.from_iterable(map(reader, files)))
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", name) and Path(name).suffix not in SUFFIXES:
        return _open_hub(name, streaming)
    raise ValueError(f"No file matches {name!r}; give a path, a glob such as 'texts/*.txt.xz', or {PLANTED!r}.")


def find_files(name: str) -> list[Path]:
    """Files for paths and globs with commas between them; a folder stands for the files in it."""
    found = []
    for pattern in filter(None, (part.strip() for part in name.split(","))):
        pattern = os.path.expanduser(pattern)
        paths = _matching(pattern) or _matching(str(project_folder() / pattern))
        for path in map(Path, sorted(paths)):
            found += sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    return found


def _matching(pattern: str) -> list[str]:
    return [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)


def _open_zst(path):
    import zstandard

    return io.TextIOWrapper(zstandard.open(path, "rb"), encoding="utf-8")


SUFFIXES = {
    ".gz": lambda path: gzip.open(path, "rt", encoding="utf-8"),
    ".xz": lambda path: lzma.open(path, "rt", encoding="utf-8"),
    ".zst": _open_zst,
    ".txt": lambda path: open(path, encoding="utf-8"),
}


def _lines(path: Path) -> Iterator[str]:
    opener = SUFFIXES.get(path.suffix, SUFFIXES[".txt"])
    try:
        with opener(path) as file:
            for line in file:
                if "\0" in line:
                    raise ValueError(f"{path} is not a text file (it holds zero bytes); give UTF-8 text.")
                yield line
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 (byte {error.start} cannot be read).") from error
    except ValueError:
        raise
    except Exception as error:  # each compression library has errors of its own
        raise ValueError(f"{path} could not be read: {first_line(error)}") from error


def _read_blocks(path: Path) -> Iterator[str]:
    """Documents of a file, separated by blank lines."""
    lines, size = [], 0
    for line in _lines(path):
        if line.strip() and size < LONGEST_DOCUMENT:
            lines.append(line)
            size += len(line)
        elif lines:
            yield "".join(lines).strip()
            lines, size = ([line], len(line)) if line.strip() else ([], 0)
    if lines:
        yield "".join(lines).strip()


def _read_whole(path: Path) -> Iterator[str]:
    """A whole file as one document, in parts if it is very long."""
    lines, size = [], 0
    for line in _lines(path):
        lines.append(line)
        size += len(line)
        if size >= LONGEST_DOCUMENT:
            yield "".join(lines)
            lines, size = [], 0
    if "".join(lines).strip():
        yield "".join(lines)


def _open_hub(name: str, streaming: bool) -> Corpus:
    import datasets

    path, _, subset = name.partition(":")
    try:
        with reaching_hub(path):
            data = datasets.load_dataset(path, subset or None, split="train", streaming=streaming)
    except Exception as error:  # the library raises many kinds, from the network's to its own
        raise ValueError(
            f"{name!r} is no file here, and no data set could be loaded by that name: {first_line(error)}"
        ) from error
    if "text" not in (data.column_names or ["text"]):
        raise ValueError(f"The data set {name!r} has no column 'text'; its columns are {data.column_names}.")
    return Corpus(
        name,
        fingerprint=name if streaming else data._fingerprint,
        read=lambda: (row["text"] for row in data if row["text"].strip()),
        stream=data if streaming else None,
    )


def _digest(*parts: bytes | str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _digest_files(files: list[Path], per_file: bool) -> str:
    def content(path):
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "blake2b").digest()
        except OSError as error:
            raise ValueError(f"{path} could not be read: {error}") from error

    return _digest(str(per_file), *map(content, files))


def _planted_fingerprint() -> str:
    return _digest(Path(planted.__file__).read_bytes(), json.dumps(planted.lexicon()))


# ---------------------------------------------------------------- splitting, tokenising, packing


def check_valid_fraction(valid_fraction: float):
    """Raises ValueError if it leaves one of the two sides without text, or training with less than half."""
    if not 0 < valid_fraction <= 0.5:
        raise ValueError(f"valid_fraction={valid_fraction} is out of range; choose above 0 and at most 0.5.")


def is_validation(text: str, valid_fraction: float) -> bool:
    """Whether a document is for validation: decided by its content, so copies of it fall on the same side."""
    draw = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return draw < valid_fraction * 2**64


def split(documents: Iterable[str], valid_fraction: float, want_valid: bool) -> Iterator[str]:
    """One side of the documents. The first is always for validation, so that even a small corpus has some."""
    first = None
    for text in documents:
        first = text if first is None else first
        if (text == first or is_validation(text, valid_fraction)) == want_valid:
            yield text


def tokenize(documents: Iterable[str], tokenizer) -> Iterator[np.ndarray]:
    """Token ids of the documents, an end-of-text token after each, some millions of characters at a time."""
    end = [tokenizer.eos_token_id]
    for texts in _batches(documents):
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        yield np.fromiter(chain.from_iterable(chain(i, end) for i in ids), dtype=_token_type(tokenizer))


def pack(tokens: Iterable[np.ndarray], block_size: int) -> Iterator[np.ndarray]:
    """Cuts a stream of tokens into blocks, whatever its chunks. Yields (n, block_size); drops what is left over."""
    rest = np.zeros(0, dtype=np.uint16)
    for chunk in tokens:
        rest = np.concatenate([rest, chunk]) if len(rest) else chunk
        full = len(rest) // block_size * block_size
        if full:
            yield rest[:full].reshape(-1, block_size)
            rest = rest[full:]


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _token_type(tokenizer) -> type:
    return np.uint16 if len(tokenizer) <= 2**16 else np.uint32


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
    words: Iterable[str] = (),
    valid_corpus: Corpus | None = None,
    valid_fraction: float = 0.02,
) -> Blocks:
    """Tokenised, packed blocks of a corpus; taken from the cache where they are already there.

    tokenizer: an existing tokenizer, or its folder or hub id; None trains one of `vocab_size` on the
        training documents, in which each of `words` is one token.
    valid_corpus: documents for validation; None sets aside `valid_fraction` of the corpus.

    Raises ValueError if the corpus is empty or too small for one block on either side.
    """
    check_valid_fraction(valid_fraction)
    words = list(words)
    settings = [FORMAT, block_size, vocab_size, words, valid_fraction, corpus.stream is not None]
    source = (valid_corpus or corpus).fingerprint
    existing = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    spelled = existing.backend_tokenizer.to_str() if existing else ""
    folder = cache_folder() / _digest(corpus.fingerprint, source, spelled, json.dumps(settings))

    def documents(want_valid: bool) -> Iterator[str]:
        if valid_corpus is not None:
            return (valid_corpus if want_valid else corpus).read()
        return split(corpus.read(), valid_fraction, want_valid)

    def build(target: Path):
        first = first_characters(documents(want_valid=False), TOKENIZER_CHARACTERS)
        made = existing or train_tokenizer(_not_empty(first, corpus.name), vocab_size, words)
        made.save_pretrained(target / "tokenizer")
        if corpus.stream is None:
            _write_blocks(target / "train.arrow", documents(want_valid=False), made, block_size, corpus.name)
        valid = documents(want_valid=True)
        if corpus.stream is not None:
            valid = first_characters(valid, STREAM_VALID_CHARACTERS)
        valid_name = f"The validation part of {(valid_corpus or corpus).name}"
        measured = _write_blocks(target / "valid.arrow", valid, made, block_size, valid_name)
        if (valid_corpus or corpus).name == PLANTED:
            measured["floor"] = planted_floor(made, documents(want_valid=True))
        (target / "measured.json").write_text(json.dumps(measured))

    if not folder.is_dir():
        _build_atomically(folder, build)
    return _load_blocks(folder, corpus, block_size, valid_fraction if valid_corpus is None else 0)


def _not_empty(documents: Iterator[str], name: str) -> Iterator[str]:
    first = list(islice(documents, 1))
    if not first:
        raise ValueError(f"The corpus {name!r} has no text to train on; it needs at least two documents.")
    return chain(first, documents)


def _write_blocks(path: Path, documents: Iterable[str], tokenizer, block_size: int, name: str) -> dict:
    """Writes the blocks of some documents; returns their bytes per token."""
    import pyarrow as pa

    count = {"documents": 0, "bytes": 0, "tokens": 0, "blocks": 0}

    def counted_texts():
        for text in documents:
            count["documents"] += 1
            count["bytes"] += len(text.encode())
            yield text

    def counted_tokens():
        for tokens in tokenize(counted_texts(), tokenizer):
            count["tokens"] += len(tokens)
            yield tokens

    row = pa.list_(pa.from_numpy_dtype(_token_type(tokenizer)), block_size)
    schema = pa.schema({"input_ids": row})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for blocks in pack(counted_tokens(), block_size):
            column = pa.FixedSizeListArray.from_arrays(pa.array(blocks.reshape(-1)), type=row)
            writer.write_batch(pa.record_batch([column], schema=schema))
            count["blocks"] += len(blocks)
    if not count["blocks"]:
        raise ValueError(
            f"{name} has {count['tokens']} tokens in {count['documents']} documents, less than one block of "
            f"{block_size}; use more text or a smaller block_size."
        )
    return {"bytes_per_token": count["bytes"] / count["tokens"]}


def _build_atomically(folder: Path, build: Callable[[Path], None]):
    """Builds a folder under another name and renames it, so that it is there whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        target = Path(tempfile.mkdtemp(prefix=BUILDING, dir=folder.parent))
    except OSError as error:
        raise OSError(
            f"The cache folder {folder.parent} cannot be written ({error}); set BACKPACK_CACHE to another."
        ) from error
    try:
        build(target)
        try:
            target.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _remove_abandoned(cache: Path):
    """Clears away what killed builds have left, which may be gigabytes."""
    for folder in cache.glob(f"{BUILDING}*"):
        with contextlib.suppress(OSError):  # another process has finished it meanwhile, or it is of another user
            if time.time() - max(path.stat().st_mtime for path in (folder, *folder.rglob("*"))) > ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)


def _load_blocks(folder: Path, corpus: Corpus, block_size: int, valid_fraction: float) -> Blocks:
    from datasets import Dataset

    tokenizer = load_tokenizer(folder / "tokenizer")
    if corpus.stream is None:
        train = Dataset.from_file(str(folder / "train.arrow")).with_format("torch")
    else:
        train = stream_blocks(corpus.stream, tokenizer, block_size, valid_fraction)
    measured = json.loads((folder / "measured.json").read_text())
    return Blocks(
        train=train,
        valid=Dataset.from_file(str(folder / "valid.arrow")).with_format("torch"),
        tokenizer=tokenizer,
        fingerprint=folder.name,
        floor=measured.get("floor"),
        bytes_per_token=measured["bytes_per_token"],
    )


def stream_blocks(stream, tokenizer, block_size: int, valid_fraction: float):
    """Blocks of a stream's training documents, made as they are asked for; what is left of every 1000 is dropped."""
    settings = {"tokenizer": tokenizer, "block_size": block_size, "valid_fraction": valid_fraction}
    return stream.map(_to_blocks, batched=True, batch_size=1000, remove_columns=stream.column_names, fn_kwargs=settings)


def _to_blocks(rows: dict, tokenizer, block_size: int, valid_fraction: float) -> dict:
    texts = [text for text in rows["text"] if text.strip() and not is_validation(text, valid_fraction)]
    blocks = pack(tokenize(texts, tokenizer), block_size)
    return {"input_ids": [block.astype(np.int64) for part in blocks for block in part]}


def planted_floor(tokenizer, valid_texts: Iterable[str]) -> float:
    """Mean nats per token of planted texts under the generator that wrote them."""
    wanted = set(valid_texts)
    texts = [text for text in planted.generate() if text.text in wanted]
    ids = tokenizer([text.text for text in texts], add_special_tokens=False)["input_ids"]
    return -sum(sum(text.log_probs) for text in texts) / sum(len(i) + 1 for i in ids)
