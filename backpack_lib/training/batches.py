"""Which rows of the data each process sees at each step: a function of the seed and the step alone.

Batches are read, tokenised and put together by processes of their own (torchdata's `StatefulDataLoader`), so that the
training loop never waits for them. What it holds does not depend on their number.
"""

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import NamedTuple

import torch
from torch.utils.data import IterableDataset
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
        self._pass, self._order = -1, None

    def steps_from(self, first: int) -> Iterator[list[Batch]]:
        """This process' `accumulate` batches of each step from `first` on."""
        numbers = (group for step in count(first) for group in self._groups(step))
        return _steps(loader(self.rows, batch_sampler=numbers, **self.loading), self.accumulate)

    def _groups(self, step: int) -> list[list[int]]:
        """The numbers of the rows of each of this process' batches of a step."""
        per_step = self.batch_size * self.accumulate * self.processes
        numbers = [self._row(i) for i in range(step * per_step, (step + 1) * per_step)]
        groups = [numbers[i : i + self.batch_size] for i in range(0, per_step, self.batch_size)]
        return groups[self.process :: self.processes]

    def state_dict(self) -> dict:
        return {}  # the step says it all

    def load_state_dict(self, state: dict):
        pass

    def _row(self, position: int) -> int:
        """The row at a position in the endless sequence of shuffled passes."""
        this_pass, index = divmod(position, len(self.rows))
        if this_pass != self._pass:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + this_pass)
            self._pass, self._order = this_pass, torch.randperm(len(self.rows), generator=generator).tolist()
        return self._order[index]


class StreamedBatches:
    """Batches of a stream of blocks, in its own order; each process reads another part of it.

    A stream has no row numbers, so its position in the data has to be kept with a checkpoint. It is read by one
    process, always: with another number, its order and its position would be others.
    """

    def __init__(self, stream, batch_size: int, accumulate: int, process: int = 0, processes: int = 1, **loading):
        from datasets.distributed import split_dataset_by_node

        self.stream = split_dataset_by_node(stream, rank=process, world_size=processes)
        self.accumulate = accumulate
        self.loader = loader(Endless(self.stream), batch_size=batch_size, **loading | {"num_workers": 1})

    def steps_from(self, first: int) -> Iterator[list[Batch]]:
        """This process' batches of each step; the position to begin at comes from `load_state_dict`."""
        return _steps(self.loader, self.accumulate)

    def state_dict(self) -> dict:
        """The position behind the last batch that was taken, whatever was read ahead."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict):
        self.loader.load_state_dict(state)


class Endless(IterableDataset):
    """The rows of a stream, pass after pass."""

    def __init__(self, stream):
        self.stream = stream

    def __iter__(self) -> Iterator:
        while True:
            empty = True
            for row in self.stream:
                empty = False
                yield row
            if empty:
                raise ValueError("The stream has no block for this process; use fewer processes or a larger data set.")

    def state_dict(self) -> dict:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict):
        self.stream.load_state_dict(state)


def loader(data, collate_fn: Callable = make_batch, **settings) -> StatefulDataLoader:
    # A generator of its own: the global one, which dropout draws from, would be another one after a resumption.
    settings |= {"generator": torch.Generator(), "worker_init_fn": _begin_worker, "collate_fn": collate_fn}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # of torch's, which torchdata still calls
        return StatefulDataLoader(data, **settings)


def _begin_worker(number: int):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the training loop, which saves first
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of a tokenizer do not survive a fork


def _steps(batches, accumulate: int) -> Iterator[list[Batch]]:
    batches = iter(batches)
    while step := list(islice(batches, accumulate)):
        yield step
