"""Which rows of the data each process reads at each step.

Rows of a data set are shuffled by the seed, so a run resumes from its step alone. A stream has no row numbers, so its
position is kept with each checkpoint. Either way, batches do not depend on the number of workers that prepare them.
"""

import os
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch.utils.data import BatchSampler, DataLoader

from backpack_lib.model.backpack import distinct_tokens
from backpack_lib.training.config import AUTO, TrainingConfig


class Batch(NamedTuple):
    """Sequences and their `distinct_tokens`, which are found on the host, since finding them would make a GPU wait."""

    input_ids: torch.Tensor  # (B, T)
    tokens: torch.Tensor  # (n,)
    inverse: torch.Tensor  # (B, T), which of them stands where

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def make_batch(rows, padded: bool = False) -> Batch:
    """padded: for a compiled model; see `distinct_tokens`."""
    input_ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in rows])
    return Batch(input_ids, *distinct_tokens(input_ids, padded))


def make_batches(config: TrainingConfig, blocks, accelerator: Accelerator, step: int = 0, position: dict | None = None):
    """A loader of this process' batches from a step on, without an end.

    position: of a stream, what the loader's `state_dict()` was at that step.
    """
    process, processes = accelerator.process_index, accelerator.num_processes
    on_gpu = accelerator.device.type == "cuda"
    settings = {
        "collate_fn": partial(make_batch, padded=config.compile),
        "pin_memory": on_gpu,
        # A generator of its own: the global one, which dropout draws from, would not be the same after resuming.
        "generator": torch.Generator(),
    }
    if hasattr(blocks.train, "__len__"):
        rows = shuffled(len(blocks.train), config.seed, step * config.accumulate * config.batch_size * processes)
        batches = BatchSampler(rows, config.batch_size, drop_last=False)
        own = islice(batches, process, None, processes)  # so that processes share the rows of a step
        workers = (2 if on_gpu else 0) if config.workers == AUTO else config.workers
        return DataLoader(blocks.train, batch_sampler=own, num_workers=workers, **settings)

    from datasets.distributed import split_dataset_by_node
    from torchdata.stateful_dataloader import StatefulDataLoader

    stream = split_dataset_by_node(blocks.train, rank=process, world_size=processes).repeat(None)
    warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # of torch's, which torchdata still calls
    # One worker, always: with another number, the order of the stream and its position would be others.
    loader = StatefulDataLoader(stream, config.batch_size, num_workers=1, worker_init_fn=_begin_worker, **settings)
    if position:
        loader.load_state_dict(position)
    return loader


def shuffled(n_rows: int, seed: int, position: int) -> Iterator[int]:
    """Row numbers in a new order for each pass over the rows, without an end, from a position on."""
    first_pass, begin = divmod(position, n_rows)
    for number in count(first_pass):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        yield from torch.randperm(n_rows, generator=generator).tolist()[begin:]
        begin = 0


def _begin_worker(number: int):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of a tokenizer do not survive a fork
