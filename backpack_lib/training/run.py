"""The training loop: one process or many, CPU or GPU, a Backpack or the Transformer of the same trunk.

    history = train(TrainingConfig(corpus="planted", out="runs/first", steps=500))

or, from a shell, with the same names as flags,

    python -m backpack_lib.training --corpus "texts/*.txt.xz" --out runs/first --steps 5000
    torchrun --nproc_per_node 8 -m backpack_lib.training --corpus ...
    accelerate launch --config_file data/launch/fsdp.yaml -m backpack_lib.training --corpus ...

What is notable:

- `out/model` holds the finished model and its tokenizer, `out/history.csv` the history.
- The order of the data is a function of the seed and the step alone (`batches.py`). So a run that
  was stopped, even killed, resumes with the same command and ends with the very weights it would
  have had, and the number of processes changes the speed only.
- A checkpoint is a folder that is renamed into place once it is whole (`checkpoints.py`).
"""

import contextlib
import math
import os
import signal
import threading
import time
from itertools import islice

import torch
from accelerate.utils import set_seed

from backpack_lib.files import locked_folder
from backpack_lib.training.batches import Batch, make_batch
from backpack_lib.training.build import (
    keep_freed_memory,
    make_accelerator,
    make_batches,
    make_loss,
    make_model,
    make_optimizers,
    make_scheduler,
    prepare_blocks,
    warn_of_slow_bf16,
)
from backpack_lib.training.checkpoints import RunFolder
from backpack_lib.training.config import TrainingConfig
from backpack_lib.training.progress import make_progress

CHECK_EVERY = 20  # steps between looks at the losses; each look makes a GPU wait


def train(config: TrainingConfig, blocks=None):
    """Trains a model, or resumes the run that `config.out` holds. Returns its history, a DataFrame.

    One row for each evaluation: step, tokens (seen so far), train_loss (mean nats per token since
    the row before), valid_loss, learning_rate, tokens_per_second, and floor, the loss that no model
    can beat, where it is known.

    blocks: `corpora.Blocks` to train on; None prepares `config.corpus`.

    Raises ValueError for settings or data that do not fit or if another process is training into `out`, OSError if
    `out` cannot hold the run, FloatingPointError if the loss is not finite, and KeyboardInterrupt, once all is saved,
    if interrupted.
    """
    folder = RunFolder(config)
    if not folder.is_finished():
        first = os.environ.get("RANK", "0") == "0"  # of the processes of one run
        with locked_folder(folder.path) if first else contextlib.nullcontext():
            Run(config, folder, blocks).to_the_end()
    return folder.history()


class Run:
    """A run in progress: the model, its optimiser, and how far it has come."""

    def __init__(self, config: TrainingConfig, folder: RunFolder, blocks=None):
        self.config = config
        self.folder = folder
        self.accelerator = make_accelerator(config)
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
            warn_of_slow_bf16(config)
        with self.accelerator.local_main_process_first():
            self.blocks = blocks or prepare_blocks(config)
        set_seed(config.seed)
        model = make_model(config, self.blocks.tokenizer)
        folder.check_space(model)
        model.to(self.accelerator.device)
        loss = make_loss(model, config, self.blocks, folder, not self.accelerator.is_main_process)
        if config.compile:
            loss.compile()
        optimizers = make_optimizers(model, config, self.accelerator.device)
        schedulers = [make_scheduler(optimizer, config) for optimizer in optimizers]
        self.loss, *prepared = self.accelerator.prepare(loss, *optimizers, *schedulers)
        self.optimizers, self.schedulers = prepared[: len(optimizers)], prepared[len(optimizers) :]
        set_seed(config.seed, device_specific=True)  # dropout differs between processes
        self.batches = make_batches(config, self.blocks, self.accelerator)
        self.sequences_per_step = config.batch_size * config.accumulate * self.accelerator.num_processes
        self.step = 0
        self.history: list[dict] = []
        self.losses: list[float] = []  # of each step since the last row of the history
        self.unread: list[torch.Tensor] = []  # the same, still on the device
        self.resume()

    def to_the_end(self):
        config, clock = self.config, Clock(self.tokens())
        with Interrupts() as interrupts, make_progress(self, self.accelerator.is_main_process) as progress:
            for step in islice(self.batches.steps_from(self.step), config.steps - self.step):
                self.train_one_step(step)
                last = self.step == config.steps
                evaluating, saving = (last or self.step % n == 0 for n in (config.eval_every, config.save_every))
                stopping = self.any_process(interrupts.seen)
                if evaluating or saving or stopping or self.step % CHECK_EVERY == 0:
                    self.read_losses()
                progress.step()
                with clock.paused():
                    if evaluating:
                        self.add_row(clock)
                        progress.row()
                        if self.accelerator.is_main_process:
                            self.folder.write_history(self.history)
                    if saving or stopping:
                        self.save()
                if stopping:
                    raise KeyboardInterrupt(f"Stopped after step {self.step}, which is saved; the same call resumes.")
        self.finish()

    def train_one_step(self, step: list[Batch]):
        """One optimiser step on `accumulate` batches. Nothing in it has a GPU waited for."""
        self.loss.train()
        total = 0.0
        for number, batch in enumerate(step, start=1):
            # Gradients of several processes are averaged once, with the last batch.
            together = contextlib.nullcontext() if number == len(step) else self.accelerator.no_sync(self.loss)
            with together:
                loss = self.loss(*batch.to(self.accelerator.device)) / len(step)
                self.accelerator.backward(loss)
            total = total + loss.detach()
        self.accelerator.clip_grad_norm_(self.loss.parameters(), self.config.clip)
        for part in (*self.optimizers, *self.schedulers):
            part.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.unread.append(total)
        self.step += 1

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean nats per token over the first `eval_blocks` validation sequences, shared among the processes."""
        self.loss.eval()
        n_rows = min(self.config.eval_blocks, len(self.blocks.valid))
        mine = range(self.accelerator.process_index, n_rows, self.accelerator.num_processes)
        most = -(-n_rows // self.accelerator.num_processes)
        # Nats per token, summed over sequences, and the number of sequences.
        total = torch.zeros(2, device=self.accelerator.device)
        for start in range(0, most, self.config.batch_size):
            numbers = list(mine[start : start + self.config.batch_size])
            # A process that has none left goes along: a model that is divided among processes works in all or in none.
            rows = self.blocks.valid.select(numbers or [0])
            batch = make_batch(rows, padded=self.config.compile)
            total[0] += self.loss(*batch.to(self.accelerator.device)) * len(numbers)
            total[1] += len(numbers)
        nats, count = self.accelerator.reduce(total, "sum").tolist()
        return nats / count

    def read_losses(self):
        """Brings the losses of the latest steps over from the device, the mean over processes.

        Raises FloatingPointError if one of them is not finite.
        """
        fresh = self.accelerator.reduce(torch.stack(self.unread), "mean").tolist() if self.unread else []
        first = self.step - len(fresh) + 1
        for step, loss in enumerate(fresh, start=first):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"The loss of step {step} is {loss}; try a lower learning_rate (now {self.config.learning_rate}). "
                    f"{self.folder.last_checkpoint()}"
                )
        self.losses += fresh
        self.unread = []

    def tokens(self) -> int:
        """How many tokens the run has seen so far."""
        return self.step * self.sequences_per_step * self.config.block_size

    def add_row(self, clock: "Clock"):
        row = {
            "step": self.step,
            "tokens": self.tokens(),
            "train_loss": sum(self.losses) / len(self.losses),
            "valid_loss": self.evaluate(),
            "learning_rate": self.schedulers[0].get_last_lr()[0],
            "tokens_per_second": clock.rate(self.tokens()),
        }
        self.history.append(row if self.blocks.floor is None else row | {"floor": self.blocks.floor})
        self.losses = []

    def any_process(self, mine: bool) -> bool:
        """Whether any process says so. Asked of the others now and then only, since each asking makes all wait."""
        if self.accelerator.num_processes == 1:
            return mine
        if self.step % CHECK_EVERY:
            return False
        said = torch.tensor(float(mine), device=self.accelerator.device)
        return self.accelerator.reduce(said, "sum").item() > 0

    def save(self):
        progress = {
            "step": self.step,
            "history": self.history,
            "losses": self.losses,
            "sequences_per_step": self.sequences_per_step,
            "text": self.blocks.fingerprint,
            "stream": self.batches.state_dict(),
        }
        self.folder.save(self.accelerator, progress)
        if self.config.keep_models:
            self.write_model(lambda *model: self.folder.write_model(f"model-{self.step:08d}", *model))

    def finish(self):
        self.write_model(self.folder.finish)

    def write_model(self, write):
        """Has the first process write the model, its weights and its tokenizer, by a function of these three."""
        whole = self.accelerator.get_state_dict(self.loss)  # gathered from all processes, if it is divided among them
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.loss).model
            weights = {name.removeprefix("model."): tensor for name, tensor in whole.items()}
            for tied in model.all_tied_weights_keys:
                weights.pop(tied, None)
            write(model, weights, self.blocks.tokenizer)
        self.accelerator.wait_for_everyone()

    def resume(self):
        progress = self.folder.resume(self.accelerator)
        if progress is None:
            return
        for name, now in (("sequences_per_step", self.sequences_per_step), ("text", self.blocks.fingerprint)):
            if progress[name] != now:
                raise ValueError(
                    f"{self.config.out!r} holds a run with {name}={progress[name]}, which is now {now}; "
                    "resume with the same text and number of processes, or choose another `out`."
                )
        self.step, self.history, self.losses = progress["step"], progress["history"], progress["losses"]
        self.batches.load_state_dict(progress["stream"])


# ---------------------------------------------------------------- the parts of a run


class Clock:
    """Measures tokens per second of training, without the time that evaluation and saving take."""

    def __init__(self, tokens: int):
        self.tokens, self.seconds, self.running_since = tokens, 0.0, time.perf_counter()

    @contextlib.contextmanager
    def paused(self):
        self.seconds += time.perf_counter() - self.running_since
        yield
        self.running_since = time.perf_counter()

    def rate(self, tokens: int) -> float:
        """Tokens per second since the last call, from within a pause; `tokens` counts from the run's start."""
        rate = (tokens - self.tokens) / self.seconds
        self.tokens, self.seconds = tokens, 0.0
        return rate


class Interrupts:
    """While active, Ctrl-C and SIGTERM are noted instead of breaking into the middle of a step."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self):
        self.seen = False
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self.before = {number: signal.signal(number, self._note) or signal.SIG_DFL for number in self.SIGNALS}
        return self

    def _note(self, number, frame):
        self.seen = True
        signal.signal(number, self.before[number])  # a second one breaks in at once

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
