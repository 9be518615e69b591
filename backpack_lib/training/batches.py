"""Which rows of the data each process sees at each step: a function of the seed and the step alone.

Batches are read, tokenised and put together by processes of their own (torchdata's `StatefulDataLoader`), so that the
training loop never waits for them. What it holds does not depend on their number.
"""

import os
import warnings
from collections.abc import Iterator
from itertools import count, islice
from typing import NamedTuple

import torch
from torch.utils.data import BatchSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from backpack_lib.model.backpack import distinct_tokens


class Batch(NamedTuple):
    """Sequences, and their distinct tokens, which are found on the host: a GPU would have to be waited for.

    input_ids: (B, T). tokens: (n,), inverse: (B, T), which of them stands where; see `distinct_tokens`.
    """

    input_ids: torch.Tensor
    tokens: torch.Tensor
    inverse: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def make_batch(rows, padded: bool = False) -> Batch:
    """Rows with their `input_ids` -> a batch. padded: for a compiled model; see `distinct_tokens`."""
    input_ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in rows])
    return Batch(input_ids, *distinct_tokens(input_ids, padded))


class ShuffledBatches:
    """Batches of a map-style data set, shuffled anew in every pass.

    A step takes `batch_size` x `accumulate` rows for each process. The rows of a step do not depend
    on how many processes share them, and a run can begin at any step.

    loading: further settings of the loader, such as `num_workers`, `pin_memory` and `collate_fn`.
    """

    def __init__(
        self, rows, batch_size: int, accumulate: int, seed: int, process: int = 0, processes: int = 1, **loading
    ):
        self.rows = rows
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.seed = seed
        self.process = process
        self.processes = processes
        self.loading = loading

    def steps_from(self, first: int) -> Iterator[list[Batch]]:
        """This process' `accumulate` batches of each step from `first` on."""
        position = first * self.batch_size * self.accumulate * self.processes
        batches = BatchSampler(shuffled(len(self.rows), self.seed, position), self.batch_size, drop_last=False)
        mine = islice(batches, self.process, None, self.processes)
        return _steps(_loader(self.rows, batch_sampler=mine, **self.loading), self.accumulate)

    def state_dict(self) -> dict:
        return {}  # the step says it all

    def load_state_dict(self, state: dict):
        pass


def shuffled(n_rows: int, seed: int, position: int) -> Iterator[int]:
    """Row numbers in an order of their own for each pass over the rows, without an end, from a position on."""
    first_pass, begin = divmod(position, n_rows)
    for number in count(first_pass):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        yield from torch.randperm(n_rows, generator=generator).tolist()[begin:]
        begin = 0


class StreamedBatches:
    """Batches of a stream of blocks, in its own order, pass after pass; each process reads another part of it.

    A stream has no row numbers, so its position in the data has to be kept with a checkpoint. It is read by one
    process, always: with another number, its order and its position would be others.
    """

    def __init__(self, stream, batch_size: int, accumulate: int, process: int = 0, processes: int = 1, **loading):
        from datasets.distributed import split_dataset_by_node

        self.stream = split_dataset_by_node(stream, rank=process, world_size=processes).repeat(None)
        self.accumulate = accumulate
        self.processes = processes
        self.loader = _loader(self.stream, batch_size=batch_size, **loading | {"num_workers": 1})

    def steps_from(self, first: int) -> Iterator[list[Batch]]:
        """This process' batches of each step; the position to begin at comes from `load_state_dict`."""
        yield from _steps(self.loader, self.accumulate)
        raise ValueError("The stream has no block for this process; use fewer processes or a larger data set.")

    def state_dict(self) -> dict:
        """The position after the last batch that was taken, whatever was read ahead."""
        return {"processes": self.processes, "loader": self.loader.state_dict()}

    def load_state_dict(self, state: dict):
        if state["processes"] != self.processes:
            raise ValueError(
                f"The stream was read by {state['processes']} processes, not {self.processes}; resume with as many."
            )
        self.loader.load_state_dict(state["loader"])


def _loader(data, **settings) -> StatefulDataLoader:
    # A generator of its own: the global one, which dropout draws from, would be another one after a resumption.
    settings = {"collate_fn": make_batch, "generator": torch.Generator(), "worker_init_fn": _begin_worker} | settings
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # of torch's, which torchdata still calls
        return StatefulDataLoader(data, **settings)


def _begin_worker(number: int):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of a tokenizer do not survive a fork


def _steps(batches, accumulate: int) -> Iterator[list[Batch]]:
    batches = iter(batches)
    while step := list(islice(batches, accumulate)):
        yield step
