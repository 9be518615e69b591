"""The rows of a step follow from the seed and the step alone, however many workers prepare them or processes share them."""

import json
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same_weights, random_ids, stop_before

from backpack_lib import TrainingConfig, train
from backpack_lib.text import planted
from backpack_lib.text.corpora import open_corpus, prepare
from backpack_lib.training.batches import make_batch, make_batches


class Rows(list):
    """A data set whose row i is filled with the number i."""

    def __init__(self, n):
        super().__init__({"input_ids": torch.full((4,), number)} for number in range(n))


def loader(rows, batch_size, process=0, processes=1, step=0, position=None, **settings):
    config = TrainingConfig(corpus="planted", out="", batch_size=batch_size, **settings)
    place = SimpleNamespace(process_index=process, num_processes=processes, device=torch.device("cpu"))
    return make_batches(config, SimpleNamespace(train=rows), place, step, position)


def numbers(n_rows, n_batches, *args, **settings):
    return [batch.input_ids[:, 0].tolist() for batch in islice(loader(Rows(n_rows), *args, **settings), n_batches)]


def test_every_pass_sees_every_row_once_in_a_new_order():
    seen = sum(numbers(12, 18, 2), [])
    passes = [seen[i : i + 12] for i in (0, 12, 24)]
    assert all(sorted(p) == list(range(12)) for p in passes) and len({tuple(p) for p in passes}) == 3
    assert seen != sum(numbers(12, 18, 2, seed=1), [])


def test_a_run_can_begin_at_any_step_with_any_number_of_workers():
    whole = numbers(10, 40, 3, accumulate=2)
    assert numbers(10, 26, 3, accumulate=2, step=7) == numbers(10, 26, 3, accumulate=2, step=7, workers=2) == whole[14:]


def test_processes_share_the_rows_of_a_step():
    alone = numbers(50, 10, 8)
    shared = [numbers(50, 20, 2, process, 2, accumulate=2) for process in (0, 1)]
    for step, rows in enumerate(alone):
        assert sorted(rows) == sorted(sum((part for own in shared for part in own[2 * step : 2 * step + 2]), []))


def test_a_batch_says_which_distinct_tokens_stand_where():
    ids = random_ids(3, 8, vocab_size=12)
    for padded, n in ((False, len(ids.unique())), (True, 12)):
        batch = make_batch([{"input_ids": row} for row in ids], padded)
        assert batch.tokens[batch.inverse].equal(ids) and batch.input_ids.equal(ids)
        assert set(batch.tokens.tolist()) == set(ids.flatten().tolist()) and len(batch.tokens) == n


# ---------------------------------------------------------------- streams


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """A stream of 77 blocks from two files, and the folder that they lie in."""
    folder = tmp_path_factory.mktemp("stream")
    texts = [text.text for text in planted.generate(60)]
    for number in range(2):
        (folder / f"{number}.txt").write_text("\n\n".join(texts[number::2]))
    return prepare(open_corpus(str(folder), streaming=True), 32, 400, valid_fraction=0.1).train, folder


@pytest.mark.parametrize("process, processes", [(0, 1), (2, 3)])
def test_a_stream_resumed_within_any_pass_is_the_unbroken_one_in_all_later_passes(stream, process, processes):
    def batches(loader, n):
        return [batch.input_ids.tolist() for batch in islice(loader, n)]

    n_batches = 4 * sum(1 for _ in stream[0]) // (2 * processes)  # of four passes
    whole = batches(loader(stream[0], 2, process, processes), n_batches)
    for stop in (3, 30):
        broken = loader(stream[0], 2, process, processes)
        assert batches(broken, stop) == whole[:stop]
        position = json.loads(json.dumps(broken.state_dict()))
        assert batches(loader(stream[0], 2, process, processes, position=position), n_batches - stop) == whole[stop:]


def test_a_run_on_a_stream_that_breaks_off_within_a_pass_ends_with_the_same_weights(stream, tiny, monkeypatch):
    config = replace(tiny, corpus=str(stream[1]), streaming=True, block_size=32, steps=40, save_every=7)
    broken = replace(config, out=f"{config.out}-broken")
    train(config)
    stop_before(monkeypatch, broken, step=11)
    train(broken)
    assert_same_weights(config.out, broken.out)
