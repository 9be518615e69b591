"""Text in, blocks out: every token is kept, no document is on both sides, nothing is done twice."""

import gzip
import json
import lzma
import os
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast

from backpack_lib.text import corpora, planted
from backpack_lib.text.corpora import open_corpus, pack, prepare, split
from backpack_lib.text.tokenizers import END_OF_TEXT, load_tokenizer, train_tokenizer

TEXTS = [text.text for text in planted.generate(300)]


def write(path, texts=TEXTS):
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------- reading


def test_compressed_files_read_like_plain_ones(tmp_path):
    import zstandard

    content = "\n\n".join(TEXTS).encode()
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(content))
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(content))
    for name in ("a.txt", "a.txt.gz", "a.txt.xz", "a.txt.zst"):
        assert list(open_corpus(str(tmp_path / name)).read()) == TEXTS


def test_globs_lists_and_folders_name_files(tmp_path):
    write(tmp_path / "b.txt", TEXTS[5:9])
    write(tmp_path / "a.txt", TEXTS[:5])
    for name in (f"{tmp_path}/*.txt", f"{tmp_path}/a.txt, {tmp_path}/b.txt", str(tmp_path)):
        assert list(open_corpus(name).read()) == TEXTS[:9]


def test_documents_are_blocks_or_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n \n\nthree\n")
    (tmp_path / "b.txt").write_text("four")
    name = f"{tmp_path}/*.txt"
    assert list(open_corpus(name).read()) == ["one\ntwo", "three", "four"]
    assert [text.split() for text in open_corpus(name, per_file=True).read()] == [["one", "two", "three"], ["four"]]


def test_large_files_are_read_in_bounded_memory(tmp_path):
    file = tmp_path / "large.txt"
    with open(file, "w") as out:
        for number in range(150_000):
            out.write(TEXTS[number % 300] + "\n\n")
    assert file.stat().st_size > 18e6
    tracemalloc.start()
    assert sum(1 for _ in open_corpus(str(file)).read()) == 150_000
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()
    one_line = tmp_path / "one.txt"
    one_line.write_text("word " * 10 + "\n")
    with open(one_line, "a") as out:
        for _ in range(300):
            out.write("word " * 2000 + "\n")
    parts = list(open_corpus(str(one_line), per_file=True).read())
    assert len(parts) == 3 and max(map(len, parts)) < 1.1e6


# ---------------------------------------------------------------- splitting and packing


@given(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=60), st.sampled_from([0.1, 0.3, 0.5]))
def test_every_document_is_on_exactly_one_side_and_copies_stay_together(texts, fraction):
    train, valid = (list(split(texts, fraction, side)) for side in (False, True))
    assert sorted(train + valid) == sorted(texts)
    assert not set(train) & set(valid)
    assert texts[0] in valid


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(2, 9))
def test_packing_keeps_every_token_in_order(sizes, block_size):
    tokens = np.arange(sum(sizes), dtype=np.uint16)
    chunks = np.split(tokens, np.cumsum(sizes)[:-1]) if sizes else []
    blocks = [block for part in pack(chunks, block_size) for block in part]
    whole = len(tokens) // block_size
    assert len(blocks) == whole
    assert np.array_equal(np.concatenate([[], *blocks]), tokens[: whole * block_size])


def test_blocks_are_the_documents_with_an_end_behind_each(tmp_path):
    blocks = prepare(open_corpus(write(tmp_path / "a.txt")), block_size=8, vocab_size=500, valid_fraction=0.1)
    for side, want_valid in ((blocks.train, False), (blocks.valid, True)):
        written = blocks.tokenizer.decode(side[:]["input_ids"].flatten().tolist())
        expected = "".join(text + END_OF_TEXT for text in split(TEXTS, 0.1, want_valid))
        assert expected.startswith(written) and len(expected) - len(written) < 8 * 20
    valid = list(split(TEXTS, 0.1, True))
    tokens = sum(len(blocks.tokenizer(text)["input_ids"]) + 1 for text in valid)
    assert blocks.bytes_per_token == pytest.approx(sum(len(text.encode()) for text in valid) / tokens)


def test_tokens_of_the_planted_corpus_are_its_words_and_the_floor_is_their_mean():
    blocks = prepare(open_corpus("planted"), block_size=64, vocab_size=1200)
    wanted = set(split((text.text for text in planted.generate()), 0.02, True))
    valid = [text for text in planted.generate() if text.text in wanted]
    for text in valid[:100]:
        ids = blocks.tokenizer(text.text)["input_ids"]
        assert tuple(blocks.tokenizer.decode([i]) for i in ids) == text.pieces
    log_probs = np.concatenate([text.log_probs for text in valid])
    assert blocks.floor == pytest.approx(-log_probs.mean())


def test_validation_text_of_its_own(tmp_path):
    train, valid = (
        open_corpus(write(tmp_path / name, texts)) for name, texts in (("a.txt", TEXTS[:200]), ("b.txt", TEXTS[200:]))
    )
    blocks = prepare(train, 8, 500, valid_corpus=valid)
    assert blocks.tokenizer.decode(blocks.train[0]["input_ids"]).startswith(TEXTS[0][:10])
    assert blocks.tokenizer.decode(blocks.valid[0]["input_ids"]).startswith(TEXTS[200][:10])


# ---------------------------------------------------------------- the cache


def test_a_second_run_reads_the_cache_and_changed_text_does_not(tmp_path, monkeypatch):
    name = write(tmp_path / "a.txt")
    first = prepare(open_corpus(name), 8, 500)
    assert os.path.isfile(first.train.cache_files[0]["filename"])
    monkeypatch.setattr(corpora, "tokenize", None)  # not needed again
    second = prepare(open_corpus(name), 8, 500)
    assert second.fingerprint == first.fingerprint and len(second.train) == len(first.train)
    monkeypatch.undo()
    fingerprints = {
        first.fingerprint,
        prepare(open_corpus(name), 16, 500).fingerprint,
        prepare(open_corpus(name), 8, 400).fingerprint,
    }
    write(tmp_path / "a.txt", [*TEXTS, "One more."])
    fingerprints.add(prepare(open_corpus(name), 8, 500).fingerprint)
    assert len(fingerprints) == 4


def test_a_build_that_breaks_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKPACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpora, "pack", lambda *args: iter([]))
    with pytest.raises(ValueError):
        prepare(open_corpus(write(tmp_path / "a.txt")), 8, 500)
    assert os.listdir(tmp_path / "cache") == []


def test_what_a_killed_build_left_is_cleared_away_after_a_day_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKPACK_CACHE", str(tmp_path))
    name = open_corpus(write(tmp_path / "a.txt"))
    whole = prepare(name, 8, 500).fingerprint
    two_days_ago = time.time() - 48 * 60 * 60
    for folder in ("building-killed", "building-goes-on"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.arrow").write_bytes(b"blocks")
    for path in (tmp_path / whole, *(tmp_path / "building-killed").iterdir(), *tmp_path.glob("building-*")):
        os.utime(path, (two_days_ago, two_days_ago))
    other = prepare(name, 16, 500).fingerprint
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"building-goes-on", whole, other}


def test_an_unwritable_cache_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BACKPACK_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="cache folder .* cannot be written .*; set BACKPACK_CACHE to another"):
        prepare(open_corpus(write(tmp_path / "a.txt")), 8, 500)


# ---------------------------------------------------------------- tokenizers


@settings(deadline=None)
@given(st.text(max_size=50))
def test_any_text_comes_back_from_its_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400, words=["hairdresser", "counselor", "Straße"])


def test_wanted_words_are_single_tokens(tokenizer):
    assert len(tokenizer) <= 400
    for word in ("hairdresser", "counselor", "Straße"):
        assert len(tokenizer(" " + word)["input_ids"]) == 1
    # Inside other words they do not get in the way.
    assert len(tokenizer(" unhairdressered")["input_ids"]) > 1


def test_wanted_words_change_other_text_little():
    plain, wanted = train_tokenizer(TEXTS, 600), train_tokenizer(TEXTS, 600, words=["hairdresser", "counselor"])
    lengths = [sum(len(t(text)["input_ids"]) for text in TEXTS) for t in (plain, wanted)]
    assert lengths[1] < 1.02 * lengths[0]


def test_the_same_text_gives_the_same_tokenizer():
    a, b = (train_tokenizer(TEXTS, 400, words=["nurse"]).backend_tokenizer.to_str() for _ in range(2))
    assert a == b


@pytest.mark.parametrize(
    "size, words, message",
    [
        (100, [], "vocab_size=100 is too small"),
        (260, ["hairdresser", "counselor", "unbelievably"], "no room for 3 words as single tokens; choose at least"),
        (400, ["construction worker"], "'construction worker' cannot be one token"),
    ],
)
def test_tokenizers_that_cannot_be_are_one_sentence(size, words, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(TEXTS, size, words)


def test_an_existing_tokenizer_is_used(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    blocks = prepare(open_corpus(write(tmp_path / "a.txt")), 8, tokenizer=str(tmp_path / "tokenizer"))
    assert blocks.tokenizer.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ValueError, match="No tokenizer could be loaded from '.*missing'"):
        load_tokenizer(str(tmp_path / "missing"))


# ---------------------------------------------------------------- data sets of the hub, in their local form


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    for shard in range(4):
        lines = (json.dumps({"text": text, "number": number}) for number, text in enumerate(TEXTS[shard::4]))
        (folder / f"part-{shard}.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    # A folder would be read as files; the library itself takes it for a data set.
    monkeypatch.setattr(corpora, "find_files", lambda name: [])
    return "owner/name"


def test_a_data_set_by_name(hub):
    assert sorted(open_corpus(hub).read()) == sorted(TEXTS)
    assert len(prepare(open_corpus(hub), 8, 500, valid_fraction=0.1).train) > 100


def test_a_stream_gives_the_training_documents_and_resumes_where_it_was(hub):
    from backpack_lib.training.batches import StreamedBatches

    blocks = prepare(open_corpus(hub, streaming=True), 8, 500, valid_fraction=0.1)
    train_text = " ".join(split(sorted(TEXTS), 0.1, False))
    assert blocks.tokenizer.decode(next(iter(blocks.train))["input_ids"]).split(".")[0] in train_text

    def take(batches, n):
        steps = batches.steps_from(0)
        return [next(steps)[0].input_ids.tolist() for _ in range(n)]

    whole = take(StreamedBatches(blocks.train, 4, 1), 12)
    first = StreamedBatches(blocks.train, 4, 1)
    assert take(first, 5) == whole[:5]
    again = StreamedBatches(blocks.train, 4, 1)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert take(again, 7) == whole[5:]


@pytest.mark.parametrize("processes", [2, 3, 4])  # of 4 shards
def test_processes_read_different_parts_of_a_stream(hub, processes):
    from backpack_lib.training.batches import StreamedBatches

    blocks = prepare(open_corpus(hub, streaming=True), 32, 500, valid_fraction=0.1)
    places = range(processes)
    parts = [
        [tuple(row["input_ids"]) for row in StreamedBatches(blocks.train, 1, 1, place, processes).stream]
        for place in places
    ]
    n_whole = sum(1 for _ in blocks.train)
    # Each process packs its own documents, so that one block more or less may be left over.
    assert len(set().union(*parts)) == sum(map(len, parts))
    assert abs(sum(map(len, parts)) - n_whole) <= processes
    assert min(map(len, parts)) > 0.8 * n_whole / processes


@pytest.mark.slow
def test_a_run_on_a_stream_can_be_interrupted(hub, tmp_path, monkeypatch):
    from backpack_lib import TrainingConfig, load, train
    from backpack_lib.training.run import Run

    def config(name):
        sizes = dict(n_layer=1, n_head=2, n_embd=16, num_senses=2, vocab_size=500, block_size=8, batch_size=4)
        steps = dict(steps=10, warmup=0, eval_every=5, save_every=3, valid_fraction=0.1)
        return TrainingConfig(corpus=hub, out=str(tmp_path / name), streaming=True, **sizes, **steps)

    train(config("whole"))
    step = Run.train_one_step

    def breaking(self, batch):
        if self.step == 7:
            raise SystemExit
        step(self, batch)

    monkeypatch.setattr(Run, "train_one_step", breaking)
    with pytest.raises(SystemExit):
        train(config("broken"))
    monkeypatch.setattr(Run, "train_one_step", step)
    train(config("broken"))
    a, b = (load(tmp_path / name / "model")[0].state_dict() for name in ("whole", "broken"))
    assert all((a[name] == b[name]).all() for name in a)


# ---------------------------------------------------------------- bad input


def test_missing_empty_and_small_corpora_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"No file matches 'missing/\*.txt'"):
        open_corpus("missing/*.txt")
    with pytest.raises(ValueError, match="no data set could be loaded by that name"):
        open_corpus("no-owner/no-such-data")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="has no text to train on"):
        prepare(open_corpus(str(tmp_path / "empty.txt")), 8, 500)
    with pytest.raises(ValueError, match="less than one block of 1024; use more text or a smaller block_size"):
        prepare(open_corpus(write(tmp_path / "small.txt", TEXTS[:9])), 1024, 500)
    with pytest.raises(ValueError, match="valid_fraction=0 is out of range"):
        prepare(open_corpus("planted"), 8, 500, valid_fraction=0)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"\x00\x01\x02", "zero bytes"),
        ("a.txt", b"good\n\xff\xfe bad", "not a text file in UTF-8"),
        ("a.txt.xz", b"not compressed", "could not be read"),
        ("a.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:30], "could not be read"),
        ("a.txt.zst", b"not compressed", "could not be read"),
    ],
)
def test_files_that_are_no_text_are_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(open_corpus(str(tmp_path / name)).read())


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    BertTokenizerFast(str(tmp_path / "vocab.txt"), eos_token="[SEP]").save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is not byte-level BPE, as GPT-2's is"):
        load_tokenizer(str(tmp_path / "bert"))
