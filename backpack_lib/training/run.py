"""The training loop: one process or many, CPU or GPU, a Backpack, the Transformer of the same trunk, or a lens.

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
- A checkpoint is a folder that is renamed into place once it is whole (`checkpoints.py`), and none is written of
  numbers that are not finite.
"""

import contextlib
import math
import os
import time
from itertools import islice

import torch
from accelerate.utils import set_seed
from tqdm.auto import tqdm

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
)
from backpack_lib.training.checkpoints import RunFolder
from backpack_lib.training.config import TrainingConfig

CHECK_EVERY = 20  # steps between looks at the losses; each look makes a GPU wait


def train(config: TrainingConfig, blocks=None):
    """Trains a model, or resumes the run that `config.out` holds. Returns its history, a DataFrame.

    One row for each evaluation: step, tokens (seen so far), train_loss (mean nats per token since
    the row before), valid_loss, learning_rate, tokens_per_second, and floor, the loss that no model
    can beat, where it is known.

    blocks: `corpora.Blocks` to train on; None prepares `config.corpus`.

    Raises ValueError for settings or data that do not fit or if another process is training into `out`, and
    FloatingPointError if the loss or a weight is not finite.
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
        with self.accelerator.local_main_process_first():
            self.blocks = blocks or prepare_blocks(config)
        set_seed(config.seed)
        model = make_model(config, self.blocks.tokenizer).to(self.accelerator.device)
        loss = make_loss(model, config, self.blocks, folder)
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
        self.seconds = 0.0  # of training since then
        if self.accelerator.is_main_process:
            folder.claim()
        self.resume()

    def to_the_end(self):
        config, main = self.config, self.accelerator.is_main_process
        steps = islice(self.batches.steps_from(self.step), config.steps - self.step)
        with tqdm(
            total=config.steps, initial=self.step, desc=config.architecture, unit="step", leave=False, disable=not main
        ) as bar:
            for step in steps:
                start = time.perf_counter()
                self.train_one_step(step)
                last = self.step == config.steps
                evaluating = last or self.step % config.eval_every == 0
                saving = last or self.step % config.save_every == 0
                if evaluating or saving or self.step % CHECK_EVERY == 0:
                    self.read_losses()
                self.seconds += time.perf_counter() - start
                bar.update()
                if evaluating or saving:
                    self.check_weights()
                if evaluating:
                    self.add_row()
                    bar.set_postfix(valid_loss=f"{self.history[-1]['valid_loss']:.3f}")
                if saving:
                    self.save()
        if config.lens_of:
            self.accelerator.unwrap_model(self.loss).centre()
        self.write_model("model")
        if main:
            self.folder.finish()

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

    def add_row(self):
        """Adds a row to the history, and writes it."""
        tokens = self.step * self.sequences_per_step * self.config.block_size
        row = {
            "step": self.step,
            "tokens": tokens,
            "train_loss": sum(self.losses) / len(self.losses),
            "valid_loss": self.evaluate(),
            "learning_rate": self.schedulers[0].get_last_lr()[0],
            "tokens_per_second": len(self.losses) * tokens / self.step / self.seconds,
        }
        self.history.append(row if self.blocks.floor is None else row | {"floor": self.blocks.floor})
        self.losses, self.seconds = [], 0.0
        if self.accelerator.is_main_process:
            self.folder.write_history(self.history)

    # ------------------------------------------------------------ nothing that is not finite is kept

    def read_losses(self):
        """Brings the losses of the latest steps over from the device, the mean over processes.

        Raises FloatingPointError if one of them is not finite.
        """
        fresh = self.accelerator.reduce(torch.stack(self.unread), "mean").tolist() if self.unread else []
        for step, loss in enumerate(fresh, start=self.step - len(fresh) + 1):
            if not math.isfinite(loss):
                self.stop(f"The loss of step {step} is {loss}")
        self.losses += fresh
        self.unread = []

    def check_weights(self):
        """Raises FloatingPointError if a weight is not finite: the last step's, which no loss has seen yet."""
        # Of a model that is divided among processes, each looks at its own part.
        own = [getattr(parameter, "_local_tensor", parameter).detach() for parameter in self.loss.parameters()]
        finite = torch.stack([tensor.isfinite().all() for tensor in own]).all()
        if self.accelerator.reduce((~finite).float(), "sum").item():
            self.stop(f"After step {self.step} a weight is not finite")

    def stop(self, reason: str):
        raise FloatingPointError(
            f"{reason}; resume with a smaller learning_rate (now {self.config.learning_rate}) in another `out`. "
            f"{self.folder.last_checkpoint()}"
        )

    # ------------------------------------------------------------ saving and resuming

    def save(self):
        progress = {
            "step": self.step,
            "history": self.history,
            "losses": self.losses,
            "seconds": self.seconds,
            "sequences_per_step": self.sequences_per_step,
            "text": self.blocks.fingerprint,
            "stream": self.batches.state_dict(),
        }
        self.folder.save(self.accelerator, progress)
        if self.config.keep_models:
            self.write_model(f"model-{self.step:08d}")

    def write_model(self, name: str):
        """Has the first process write the model and its tokenizer into a folder of the run."""
        whole = self.accelerator.get_state_dict(self.loss)  # gathered from all processes, if it is divided among them
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.loss).model
            weights = {key.removeprefix("model."): tensor for key, tensor in whole.items()}
            for tied in model.all_tied_weights_keys:
                weights.pop(tied, None)
            self.folder.write_model(name, model, weights, self.blocks.tokenizer)
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
        self.step, self.history = progress["step"], progress["history"]
        self.losses, self.seconds = progress["losses"], progress["seconds"]
        self.batches.load_state_dict(progress["stream"])
