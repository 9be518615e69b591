"""Which rows of the data each process sees at each step: a function of the seed and the step alone."""

from collections.abc import Iterator

import torch


class ShuffledBatches:
    """Batches of a map-style data set, shuffled anew in every pass.

    A step takes `batch_size` x `accumulate` rows for each process. The rows of a step do not depend
    on how many processes share them, and a run can begin at any step.
    """

    def __init__(self, rows, batch_size: int, accumulate: int, seed: int, process: int = 0, processes: int = 1):
        self.rows = rows
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.seed = seed
        self.process = process
        self.processes = processes
        self._pass, self._order = -1, None

    def steps_from(self, first: int) -> Iterator[list[torch.Tensor]]:
        """This process' batches of each step from `first` on: `accumulate` tensors (batch_size, T) a step."""
        per_step = self.batch_size * self.accumulate * self.processes
        step = first
        while True:
            numbers = [self._row(i) for i in range(step * per_step, (step + 1) * per_step)]
            groups = [numbers[i : i + self.batch_size] for i in range(0, per_step, self.batch_size)]
            yield [self.rows[group]["input_ids"] for group in groups[self.process :: self.processes]]
            step += 1

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

    A stream has no row numbers, so its position in the data has to be kept with a checkpoint.
    """

    def __init__(self, stream, batch_size: int, accumulate: int, process: int = 0, processes: int = 1):
        from datasets.distributed import split_dataset_by_node

        self.stream = split_dataset_by_node(stream, rank=process, world_size=processes)
        self.batch_size = batch_size
        self.accumulate = accumulate

    def steps_from(self, first: int) -> Iterator[list[torch.Tensor]]:
        """This process' batches of each step; the position to begin at comes from `load_state_dict`."""
        rows = self._endless()
        while True:
            yield [torch.stack([next(rows) for _ in range(self.batch_size)]) for _ in range(self.accumulate)]

    def _endless(self) -> Iterator[torch.Tensor]:
        while True:
            empty = True
            for row in self.stream:
                empty = False
                yield torch.as_tensor(row["input_ids"])
            if empty:
                raise ValueError("The stream has no block for this process; use fewer processes or a larger data set.")

    def state_dict(self) -> dict:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict):
        self.stream.load_state_dict(state)
