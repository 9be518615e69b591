"""Text in, blocks out: text of any source is read as it is, no document is on both sides, nothing is done twice."""

import bz2
import gzip
import io
import json
import lzma
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import zstandard
from datasets.distributed import split_dataset_by_node
from helpers import tiny_classifier, tokenizer_with_words
from hypothesis import given, settings
from hypothesis import strategies as st

from backpack_lib.text import corpora, planted
from backpack_lib.text.corpora import open_corpus, prepare, split
from backpack_lib.text.tokenizers import END_OF_TEXT, load_tokenizer

TEXTS = [text.text for text in planted.generate(300)]
PLAIN = "\n\n".join(TEXTS).encode()
TABLE = pd.DataFrame({"number": range(300), "text": TEXTS})
LINES = TABLE.to_json(orient="records", lines=True).encode()


def write(path, texts=TEXTS):
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return str(path)


def split_of(corpus, valid_fraction=0.1):
    return [list(side.read()) for side in split(corpus, valid_fraction)]


def parquet() -> bytes:
    file = io.BytesIO()
    TABLE.to_parquet(file)
    return file.getvalue()


# ---------------------------------------------------------------- reading

FILES = {
    "no suffix": PLAIN,
    "with a mark.txt": b"\xef\xbb\xbf" + PLAIN,
    "windows.txt": PLAIN.replace(b"\n", b"\r\n"),
    "A, {b} [1].TXT.GZ": gzip.compress(PLAIN),
    "a.txt.xz": lzma.compress(PLAIN),
    "a.txt.zst": zstandard.compress(PLAIN),
    "a.txt.bz2": bz2.compress(PLAIN),
    "marked.txt": f"\n{END_OF_TEXT}\n".join(TEXTS).encode(),
    "A, {b}.JSONL.xz": lzma.compress(LINES),
    "a.json": TABLE.to_json(orient="records").encode(),
    "a.csv.gz": gzip.compress(TABLE.to_csv(index=False).encode()),
    "[1].parquet": parquet(),
}


@pytest.mark.parametrize("name", FILES)
def test_text_is_the_same_from_every_kind_of_file(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    corpus = open_corpus(str(tmp_path / name))
    assert list(corpus.read()) == TEXTS == list(corpus.read())


def test_globs_lists_and_folders_name_files_but_hidden_ones(tmp_path):
    write(tmp_path / "b.txt", TEXTS[5:9])
    write(tmp_path / "a.txt", TEXTS[:5])
    for name in (".DS_Store", "._a.txt"):
        (tmp_path / name).write_bytes(b"\0\1")
    for name in (f"{tmp_path}/*.txt", f"{tmp_path}/a.txt, {tmp_path}/b.txt", str(tmp_path), f"{tmp_path}/**"):
        assert list(open_corpus(name).read()) == TEXTS[:9]


def test_documents_are_blocks_or_files_and_end_at_an_end_of_text(tmp_path):
    (tmp_path / "a.txt").write_text(f"one\ntwo\n\n \n\nthree\n{END_OF_TEXT}\n\nfour{END_OF_TEXT}")
    (tmp_path / "b.txt").write_text("five\n\nsix")
    name = f"{tmp_path}/*.txt"
    assert list(open_corpus(name).read()) == ["one\ntwo", "three", "four", "five", "six"]
    assert list(open_corpus(name, per_file=True).read()) == ["one\ntwo\n\n \n\nthree", "four", "five\n\nsix"]


@pytest.mark.parametrize("between", ["\n\n", " "])
def test_large_files_are_read_whole_in_bounded_memory_even_of_one_line(between, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "LONGEST_DOCUMENT", 1000)
    (tmp_path / "large.txt").write_text(between.join(TEXTS * 70))
    list(open_corpus(write(tmp_path / "small.txt")).read())  # imports
    corpus = open_corpus(str(tmp_path / "large.txt"))
    tracemalloc.start()
    lengths = [len(text) for text in corpus.read()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6
    assert max(lengths) <= 1000 and sum(lengths) == pytest.approx(70 * len(PLAIN), rel=0.02)


def test_rows_without_text_are_counted_and_left_out(tmp_path):
    rows = [{"text": text} for text in TEXTS] + [{"text": None}] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match="3 rows of .* have no text and are left out"):
        prepare(open_corpus(str(tmp_path / "a.jsonl")), 8, 500)
    TABLE.assign(text=["NA", None, *TEXTS[2:]]).to_csv(tmp_path / "a.csv")
    assert list(open_corpus(str(tmp_path / "a.csv")).read()) == ["NA", *TEXTS[2:]]


# ---------------------------------------------------------------- splitting and packing


@settings(max_examples=15)
@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=60), st.sampled_from([0.1, 0.5]))
def test_every_document_is_on_exactly_one_side_and_copies_stay_together(tmp_path_factory, texts, fraction):
    train, valid = split_of(open_corpus(write(tmp_path_factory.mktemp("split") / "a.txt", texts)), fraction)
    assert sorted(train + valid) == sorted(texts)
    assert not set(train) & set(valid)
    assert texts[0] in valid


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["plain.txt", "A, {b}.JSONL.xz"])
def test_blocks_are_the_documents_with_an_end_after_each(name, streaming, tmp_path):
    (tmp_path / name).write_bytes(FILES.get(name, PLAIN))
    corpus = open_corpus(str(tmp_path / name), streaming=streaming)
    blocks = prepare(corpus, block_size=8, vocab_size=500, valid_fraction=0.1)
    for side, texts in zip((blocks.train, blocks.valid), split_of(corpus)):
        tokens = [i for row in side for i in row["input_ids"].tolist()]
        written, expected = blocks.tokenizer.decode(tokens), "".join(text + END_OF_TEXT for text in texts)
        assert expected.startswith(written) and len(expected) - len(written) < 8 * 20
    n_bytes = len(blocks.tokenizer.decode(tokens, skip_special_tokens=True).encode())
    assert blocks.bytes_per_token == pytest.approx(n_bytes / len(tokens))


def test_tokens_of_the_planted_corpus_are_its_words_and_the_floor_is_their_mean():
    corpus = open_corpus("planted")
    blocks = prepare(corpus, block_size=64, vocab_size=1200)
    wanted = set(split_of(corpus, 0.02)[1])
    valid = [text for text in planted.generate() if text.text in wanted]
    for text in valid[:100]:
        ids = blocks.tokenizer(text.text)["input_ids"]
        assert tuple(blocks.tokenizer.decode([i]) for i in ids) == text.pieces
    log_probs = np.concatenate([text.log_probs for text in valid])
    assert blocks.floor == pytest.approx(-log_probs.mean())


def test_processes_read_different_parts_of_a_stream(tmp_path):
    for number in range(4):
        write(tmp_path / f"{number}.txt", TEXTS[number::4])
    stream = prepare(open_corpus(str(tmp_path), streaming=True), 32, 500, valid_fraction=0.1).train
    for processes in (2, 3):
        parts = [[*split_dataset_by_node(stream, place, processes)] for place in range(processes)]
        rows = [tuple(row["input_ids"].tolist()) for part in parts for row in part]
        # Each process packs its own documents, so that one block more or less may be left over.
        n_whole = sum(1 for _ in stream)
        assert len(set(rows)) == len(rows) and abs(len(rows) - n_whole) <= processes
        assert min(map(len, parts)) > 0.8 * n_whole / processes


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("streaming", [False, True])
def test_a_second_run_reads_the_cache_and_changed_text_does_not(streaming, tmp_path, monkeypatch):
    def prepared(*sizes):
        return prepare(open_corpus(name, streaming=streaming), *sizes)

    name = write(tmp_path / "a.txt")
    first = prepared(8, 500)
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "train_tokenizer", None)  # not needed again
        patch.setattr(corpora, "written_whole", None)
        assert prepared(8, 500).fingerprint == first.fingerprint
    fingerprints = {first.fingerprint, prepared(16, 500).fingerprint, prepared(8, 400).fingerprint}
    write(tmp_path / "a.txt", ["One more.", *TEXTS])
    changed = prepared(8, 500)
    assert len(fingerprints | {changed.fingerprint}) == 4
    assert changed.tokenizer.decode(changed.valid[0]["input_ids"]).startswith("One more.")


def test_a_build_that_breaks_leaves_nothing(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("BACKPACK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_bytes(PLAIN + b"\0" * 100)
    with pytest.raises(ValueError, match="a.txt could not be read as text in UTF-8: it holds zero bytes"):
        prepare(open_corpus(str(tmp_path / "a.txt")), 8, tokenizer=tokenizer)
    assert not list((tmp_path / "cache").glob("*"))


# ---------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def whole_words():
    return tokenizer_with_words(TEXTS, 400, ["hairdresser", "Straße"])


@given(st.text(max_size=50))
def test_any_text_comes_back_from_its_tokens(whole_words, text):
    assert whole_words.decode(whole_words(text)["input_ids"]) == text


def test_an_existing_tokenizer_and_validation_text_are_used(whole_words, tmp_path):
    whole_words.save_pretrained(tmp_path / "tokenizer")
    train, valid = (open_corpus(write(tmp_path / f"{i}.txt", TEXTS[i : i + 150])) for i in (0, 150))
    blocks = prepare(train, 8, tokenizer=str(tmp_path / "tokenizer"), valid_corpus=valid)
    assert blocks.tokenizer.get_vocab() == whole_words.get_vocab()
    for side, start in ((blocks.train, 0), (blocks.valid, 150)):
        assert whole_words.decode(side[0]["input_ids"]).startswith(TEXTS[start][:6])


def test_a_tokenizer_that_would_read_texts_wrongly_is_refused(tmp_path):
    tiny_classifier(tmp_path, {0: "a"}, [0.0])  # of BERT's kind
    with pytest.raises(ValueError, match="is not byte-level BPE"):
        load_tokenizer(str(tmp_path))


# ---------------------------------------------------------------- what cannot be trained on


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("one.txt", b"One document.", "There is no text in the .* part of .*, or less than one block of 8 tokens"),
        ("a.txt", b"good\n\xff\xfe bad", "a.txt could not be read as text in UTF-8"),
        ("a.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:30], "a.txt.gz could not be read as text"),
        ("a.csv", b"words\na\n", "has no column 'text'; its columns are words"),
        ("a.jsonl", b'{"text": "word"}\n{"text": ["a"]}', "Row 1 of '.*a.jsonl' has no text in its column 'text'"),
    ],
)
def test_files_that_cannot_be_trained_on_are_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(open_corpus(str(tmp_path / name)), 8, 500)


def test_a_name_of_nothing_and_a_folder_of_several_kinds_are_refused(tmp_path):
    for name in ("missing/*.txt", "no-owner/no-such-data", ""):
        with pytest.raises(ValueError, match="^No file matches '.*', nor could a data set be loaded"):
            open_corpus(name)
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match="holds both .* files; name those of one kind"):
        open_corpus(str(tmp_path))
