"""The training loop: one process or many, CPU or GPU, a Backpack, the Transformer of the same trunk, or a lens.

    history = train(TrainingConfig(corpus="planted", out="runs/first", steps=500))

or, from a shell, with the same names as flags,

    python -m backpack_lib.training --corpus "texts/*.txt.xz" --out runs/first --steps 5000
    torchrun --nproc_per_node 8 -m backpack_lib.training --corpus ...
    accelerate launch --config_file data/launch/fsdp.yaml -m backpack_lib.training --corpus ...

What is notable:

- `out/model` holds the finished model and its tokenizer, `out/history.csv` the history.
- The order of the data follows from the seed and the step (`batches.py`). So a run that was stopped, even killed,
  resumes with the same command and ends with the very weights it would have had.
- A checkpoint is a folder that is renamed into place once it is whole (`checkpoints.py`), and none is written of
  numbers that are not finite.
"""

import contextlib
import math
import os
import time

import torch
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from backpack_lib.files import locked_folder
from backpack_lib.training.batches import make_batch, make_batches
from backpack_lib.training.build import (
    keep_freed_memory,
    make_accelerator,
    make_loss,
    make_model,
    make_optimizers,
    make_scheduler,
    prepare_blocks,
)
from backpack_lib.training.checkpoints import RunFolder
from backpack_lib.training.config import TrainingConfig

CHECK_EVERY = 100  # steps between looks at the losses, at most; each look makes a GPU wait
BEGINNING = {"step": 0, "history": [], "losses": [], "seconds": 0.0, "position": None}


def train(config: TrainingConfig, blocks=None):
    """Trains a model, or resumes the run that `config.out` holds. Returns its history, a DataFrame.

    One row for each evaluation: step, tokens (seen so far), train_loss (mean nats per token since the row before),
    valid_loss, learning_rate, tokens_per_second, and floor, the loss that no model can beat, where it is known.

    blocks: `corpora.Blocks` to train on; None prepares `config.corpus`.

    Raises ValueError if another process is training into `out`, and FloatingPointError if the loss or a weight is not
    finite, so that no such number is saved.
    """
    folder = RunFolder(config)
    if not (folder.path / "model").is_dir():
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
        device = self.accelerator.device
        if device.type == "cpu":
            keep_freed_memory()
        with self.accelerator.local_main_process_first():  # the others then find the blocks in the cache
            self.blocks = blocks or prepare_blocks(config)
        set_seed(config.seed)
        model = make_model(config, self.blocks.tokenizer).to(device)
        loss = make_loss(model, config, self.blocks, folder)
        if config.compile:
            loss.compile()
        optimizers = make_optimizers(model, config, device)
        schedulers = [make_scheduler(optimizer, config) for optimizer in optimizers]
        self.loss, *prepared = self.accelerator.prepare(loss, *optimizers, *schedulers)
        self.optimizers, self.schedulers = prepared[: len(optimizers)], prepared[len(optimizers) :]
        set_seed(config.seed, device_specific=True)  # dropout differs between processes

        folder.claim(self.accelerator, self.blocks.fingerprint)
        progress = folder.resume(self.accelerator) or BEGINNING
        self.step = progress["step"]
        self.history: list[dict] = list(progress["history"])
        # Since the last row of the history: this process' loss of each step, and the seconds of training.
        self.losses = [torch.tensor(loss, device=device) for loss in progress["losses"]]
        self.seconds = progress["seconds"]
        self.loader = make_batches(config, self.blocks, self.accelerator, self.step, progress["position"])
        self.batches = iter(self.loader)

    def to_the_end(self):
        config, main = self.config, self.accelerator.is_main_process
        steps = range(self.step, config.steps)
        # At most once a second: a notebook that is read only at the end of a long cell would lose messages.
        drawn = {"initial": self.step, "leave": False, "disable": not main, "mininterval": 1}
        bar = tqdm(steps, config.architecture, config.steps, **drawn)
        for _ in bar:
            start = time.perf_counter()
            self.train_one_step()
            last = self.step == config.steps
            evaluating = last or self.step % config.eval_every == 0
            saving = last or self.step % config.save_every == 0
            if evaluating or saving or self.step % CHECK_EVERY == 0:
                train_loss = self.read_losses()
            self.seconds += time.perf_counter() - start
            if evaluating:
                self.add_row(train_loss)
                bar.set_postfix(valid_loss=f"{self.history[-1]['valid_loss']:.3f}")
            if saving:
                self.save()
        if config.lens_of:
            self.accelerator.unwrap_model(self.loss).centre()
        self.folder.write_model("model", self.accelerator, self.loss, self.blocks.tokenizer)
        if main:
            self.folder.finish()

    def train_one_step(self):
        """One optimiser step on `accumulate` batches. Nothing in it makes a GPU wait."""
        self.loss.train()
        total = 0.0
        for _ in range(self.config.accumulate):
            batch = next(self.batches).to(self.accelerator.device)
            # Gradients of several processes are averaged once, with the last batch.
            with self.accelerator.accumulate(self.loss):
                loss = self.loss(*batch)
                self.accelerator.backward(loss)  # of the loss over `accumulate`
            total = total + loss.detach() / self.config.accumulate
        self.accelerator.clip_grad_norm_(self.loss.parameters(), self.config.clip)
        for part in (*self.optimizers, *self.schedulers):
            part.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.losses.append(total)
        self.step += 1

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean nats per token over the first `eval_blocks` validation sequences, all of which each process reads."""
        self.loss.eval()
        n_rows, total = min(self.config.eval_blocks, len(self.blocks.valid)), 0.0
        for start in range(0, n_rows, self.config.batch_size):
            rows = self.blocks.valid.select(range(start, min(start + self.config.batch_size, n_rows)))
            batch = make_batch(rows, padded=self.config.compile).to(self.accelerator.device)
            total = total + self.loss(*batch) * len(rows)
        return total.item() / n_rows

    def add_row(self, train_loss: float):
        """Adds a row to the history, and writes it."""
        config, processes = self.config, self.accelerator.num_processes
        tokens_per_step = config.block_size * config.batch_size * config.accumulate * processes
        row = {
            "step": self.step,
            "tokens": self.step * tokens_per_step,
            "train_loss": train_loss,
            "valid_loss": self.evaluate(),
            "learning_rate": self.schedulers[0].get_last_lr()[0],
            "tokens_per_second": len(self.losses) * tokens_per_step / self.seconds,
        }
        self.history.append(row if self.blocks.floor is None else row | {"floor": self.blocks.floor})
        self.losses, self.seconds = [], 0.0
        if self.accelerator.is_main_process:
            self.folder.write_history(self.history)

    def read_losses(self) -> float:
        """The mean loss over the processes and the steps since the last row; a GPU has to finish its work for it."""
        losses = self.accelerator.reduce(torch.stack(self.losses), "mean").tolist()
        first = self.step - len(losses) + 1
        broken = [f"The loss of step {n} is {loss}" for n, loss in enumerate(losses, first) if not math.isfinite(loss)]
        # No loss has seen the last step's weights yet. Of a model that is divided, each process looks at its own part.
        weights = [getattr(weight, "_local_tensor", weight) for weight in self.loss.parameters()]
        finite = torch.stack([weight.isfinite().all() for weight in weights]).all()
        if self.accelerator.reduce((~finite).float(), "sum").item():
            broken.append(f"After step {self.step} a weight is not finite")
        if broken:
            checkpoints = self.folder.checkpoints()
            raise FloatingPointError(
                f"{broken[0]}; train into another `out` with a learning_rate below {self.config.learning_rate}. "
                f"The last good checkpoint is {checkpoints[-1] if checkpoints else 'not there yet'}."
            )
        return sum(losses) / len(losses)

    def save(self):
        progress = {
            "step": self.step,
            "history": self.history,
            "losses": [loss.item() for loss in self.losses],
            "seconds": self.seconds,
            # Of a stream; rows of a data set are found again by the step alone.
            "position": self.loader.state_dict() if hasattr(self.loader, "state_dict") else None,
        }
        self.folder.save(self.accelerator, progress)
        if self.config.keep_models:
            self.folder.write_model(f"model-{self.step:08d}", self.accelerator, self.loss, self.blocks.tokenizer)
