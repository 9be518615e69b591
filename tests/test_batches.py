"""The order of the data is a function of the seed and the step, however many processes read or share it."""

import json
from dataclasses import replace
from itertools import islice

import pandas as pd
import pytest
import torch
from helpers import RESULTS, assert_same_weights, random_ids

from backpack_lib import train
from backpack_lib.text import planted
from backpack_lib.text.corpora import open_corpus, prepare
from backpack_lib.training.batches import ShuffledBatches, StreamedBatches, make_batch
from backpack_lib.training.run import Run


class Rows:
    """A data set whose row i is filled with the number i."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, number):
        return {"input_ids": torch.full((4,), number)}


def rows_of(batches, first, steps):
    taken = batches.steps_from(first)
    return [torch.cat([batch.input_ids[:, 0] for batch in next(taken)]).tolist() for _ in range(steps)]


def test_every_pass_sees_every_row_once_in_a_new_order():
    steps = rows_of(ShuffledBatches(Rows(12), batch_size=2, accumulate=2, seed=0), 0, 9)
    seen = sum(steps, [])
    passes = [seen[i : i + 12] for i in (0, 12, 24)]
    assert all(sorted(p) == list(range(12)) for p in passes)
    assert len({tuple(p) for p in passes}) == 3
    assert seen != sum(rows_of(ShuffledBatches(Rows(12), 2, 2, seed=1), 0, 9), [])


def test_a_run_can_begin_at_any_step():
    def make():
        return ShuffledBatches(Rows(10), batch_size=3, accumulate=1, seed=0)

    assert rows_of(make(), 0, 20)[7:] == rows_of(make(), 7, 13)


def test_workers_change_neither_the_rows_nor_their_order():
    def make(workers):
        return ShuffledBatches(Rows(30), batch_size=3, accumulate=2, seed=0, num_workers=workers)

    assert rows_of(make(2), 4, 10) == rows_of(make(0), 4, 10)


@pytest.mark.parametrize("padded", [False, True])
def test_a_batch_says_which_distinct_tokens_stand_where(padded):
    ids = random_ids(3, 8, vocab_size=12)
    batch = make_batch([{"input_ids": row} for row in ids], padded)
    assert batch.tokens[batch.inverse].equal(ids) and batch.input_ids.equal(ids)
    assert set(batch.tokens.tolist()) == set(ids.flatten().tolist())
    assert len(batch.tokens) == (12 if padded else len(ids.unique()))


def test_workers_change_nothing_in_a_run(tiny):
    alone, helped = (train(replace(tiny, out=f"{tiny.out}-{n}", workers=n, steps=6)) for n in (0, 2))
    pd.testing.assert_frame_equal(alone[RESULTS], helped[RESULTS])


def test_processes_share_the_rows_of_a_step():
    alone = rows_of(ShuffledBatches(Rows(50), batch_size=8, accumulate=1, seed=0), 0, 10)
    shared = [rows_of(ShuffledBatches(Rows(50), 2, 2, seed=0, process=p, processes=2), 0, 10) for p in (0, 1)]
    for step, (a, b) in enumerate(zip(*shared)):
        assert sorted(a + b) == sorted(alone[step])


# ---------------------------------------------------------------- streams


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """A stream of 77 blocks from two files, and the folder that they lie in."""
    folder = tmp_path_factory.mktemp("stream")
    texts = [text.text for text in planted.generate(60)]
    for number in range(2):
        (folder / f"{number}.txt").write_text("\n\n".join(texts[number::2]))
    return prepare(open_corpus(str(folder), streaming=True), 32, 400, valid_fraction=0.1).train, folder


@pytest.mark.parametrize("place, processes", [(0, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("stop", [3, 30])
def test_a_stream_resumed_within_any_pass_is_the_unbroken_one_in_all_later_passes(stream, place, processes, stop):
    def batches():
        return StreamedBatches(stream[0], 2, 1, place, processes)

    def take(batches, n):
        return [step[0].input_ids.tolist() for step in islice(batches.steps_from(0), n)]

    n_blocks = sum(1 for _ in stream[0])
    length = 4 * n_blocks // (2 * processes)  # batches of four passes
    whole, broken, again = take(batches(), length), batches(), batches()
    assert take(broken, stop) == whole[:stop]
    again.load_state_dict(json.loads(json.dumps(broken.state_dict())))
    assert take(again, length - stop) == whole[stop:]


def test_a_run_on_a_stream_that_is_killed_within_a_pass_ends_with_the_same_weights(stream, tiny, monkeypatch):
    config = replace(tiny, corpus=str(stream[1]), streaming=True, block_size=32, steps=60, save_every=7)
    broken = replace(config, out=f"{config.out}-broken")
    train(config)
    step = Run.train_one_step

    def breaking(self, batch):
        if self.step == 10:
            raise SystemExit
        step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_one_step", breaking)
        with pytest.raises(SystemExit):
            train(broken)
    train(broken)
    assert_same_weights(config.out, broken.out)


def test_a_stream_is_not_resumed_by_another_number_of_processes(stream):
    with pytest.raises(ValueError, match="was read by 2 processes, not 1"):
        StreamedBatches(stream[0], 2, 1).load_state_dict(StreamedBatches(stream[0], 2, 1, 0, 2).state_dict())


def test_a_process_without_a_block_is_told(stream):
    with pytest.raises(ValueError, match="no block for this process"):
        next(StreamedBatches(stream[0].take(1), 2, 1, process=1, processes=2).steps_from(0))
