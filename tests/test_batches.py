"""The order of the data is a function of the seed and the step, however many processes read or share it."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from helpers import RESULTS, random_ids

from backpack_lib import train
from backpack_lib.training.batches import ShuffledBatches, make_batch


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
