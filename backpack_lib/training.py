"""The training loop: one process or many, CPU or GPU, a Backpack or the Transformer of the same trunk.

    history = train(TrainingConfig(corpus="planted", out="runs/first", steps=500))

or, from a shell, with the same names as flags,

    python -m backpack_lib.training --corpus "texts/*.txt.xz" --out runs/first --steps 5000
    torchrun --nproc_per_node 8 -m backpack_lib.training --corpus ...
    accelerate launch --config_file data/launch/fsdp.yaml -m backpack_lib.training --corpus ...

What is notable:

- `out/model` holds the finished model and its tokenizer, `out/history.csv` the history.
- The order of the data is a function of the seed and the step alone (`batches.py`). So a run that
  was stopped, even killed, goes on with the same command and ends with the very weights it would
  have had, and the number of processes changes the speed only.
- A checkpoint is a folder that is renamed into place once it is whole (`checkpoints.py`).
"""

import contextlib
import ctypes
import math
import os
import re
import signal
import sys
import threading
import time
import warnings

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, set_seed
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, get_scheduler

from backpack_lib.batches import ShuffledBatches, StreamedBatches
from backpack_lib.checkpoints import RunFolder
from backpack_lib.config import PRECISIONS, SCHEDULES, TrainingConfig
from backpack_lib.devices import pick_device
from backpack_lib.errors import exit_status
from backpack_lib.loading import load_model, load_tokenizer_of
from backpack_lib.loss import LanguageModelLoss
from backpack_lib.model import BackpackConfig, BackpackLMHeadModel
from backpack_lib.progress import make_progress

HIDDEN_MATRIX = re.compile(r"\.(attn|mlp)\.c_\w+\.weight$|final_mlp\.c_fc\.weight$|sense_weight_net")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
CHECK_EVERY = 20  # steps between looks at the losses; each look makes a GPU wait


def train(config: TrainingConfig, blocks=None):
    """Trains a model, or goes on with the run that `config.out` holds. Returns its history, a DataFrame.

    One row for each evaluation: step, tokens (seen so far), train_loss (mean nats per token since
    the row before), valid_loss, learning_rate, tokens_per_second, and floor, the loss that no model
    can beat, where it is known.

    blocks: `corpora.Blocks` to train on; None prepares `config.corpus`.

    Raises ValueError for settings or data that do not fit, OSError if `out` cannot hold the run,
    FloatingPointError if the loss is not finite, and KeyboardInterrupt, once all is saved, if
    interrupted.
    """
    folder = RunFolder(config)
    if not folder.is_finished():
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
        model = make_model(config, self.blocks.tokenizer)
        folder.check_space(model)
        loss = LanguageModelLoss(model)
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
            for batch in self.batches.steps_from(self.step):
                if self.step == config.steps:
                    break
                self.train_one_step(batch)
                last = self.step == config.steps
                evaluating, saving = (last or self.step % n == 0 for n in (config.eval_every, config.save_every))
                stopping = self.agree(interrupts.seen)
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
                    raise KeyboardInterrupt(
                        f"Stopped after step {self.step}, which is saved; the same call goes on from there."
                    )
        self.finish()

    def train_one_step(self, batch: list[torch.Tensor]):
        """One optimiser step on `accumulate` batches (batch_size, T)."""
        self.loss.train()
        total = 0.0
        for number, rows in enumerate(batch, start=1):
            # Gradients of several processes are averaged once, with the last batch.
            together = contextlib.nullcontext() if number == len(batch) else self.accelerator.no_sync(self.loss)
            with together:
                loss = self.loss(self.on_device(rows)) / len(batch)
                self.accelerator.backward(loss)
            total = total + loss.detach()
        self.accelerator.clip_grad_norm_(self.loss.parameters(), self.config.clip)
        for part in (*self.optimizers, *self.schedulers):
            part.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.unread.append(total)
        self.step += 1

    def on_device(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(self.accelerator.device, non_blocking=True)

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
            rows = self.blocks.valid[numbers or [0]]["input_ids"]
            total[0] += self.loss(self.on_device(rows)) * len(numbers)
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

    def agree(self, mine: bool) -> bool:
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

    def finish(self):
        whole = self.accelerator.get_state_dict(self.loss)  # gathered from all processes, if it is divided among them
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.loss).model
            weights = {name.removeprefix("model."): tensor for name, tensor in whole.items()}
            for tied in model.all_tied_weights_keys:
                weights.pop(tied, None)
            self.folder.finish(model, weights, self.blocks.tokenizer)
        self.accelerator.wait_for_everyone()

    def resume(self):
        progress = self.folder.resume(self.accelerator)
        if progress is None:
            return
        for name, now in (("sequences_per_step", self.sequences_per_step), ("text", self.blocks.fingerprint)):
            if progress[name] != now:
                raise ValueError(
                    f"{self.config.out!r} holds a run with {name}={progress[name]}, which is now {now}; "
                    "go on with the same text and number of processes, or choose another `out`."
                )
        self.step, self.history, self.losses = progress["step"], progress["history"], progress["losses"]
        self.batches.load_state_dict(progress["stream"])


# ---------------------------------------------------------------- the parts of a run


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Accelerate's view of the device and the other processes, made anew for each run."""
    on_cpu = pick_device(config.device).type == "cpu"
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if not on_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    # Accelerate keeps its state for the life of a process; a notebook may train twice, differently.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    accelerator = Accelerator(mixed_precision=PRECISIONS[precision], cpu=on_cpu, step_scheduler_with_optimizer=False)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        divide_model(accelerator, config)
    return accelerator


def divide_model(accelerator: Accelerator, config: TrainingConfig):
    """Checks that a model can be divided among processes (FSDP), and has accelerate do so on CPUs too.

    Raises ValueError if the optimiser needs whole matrices.
    """
    if config.optimizer == "muon":
        raise ValueError("optimizer='muon' needs whole matrices, which FSDP divides; choose 'adamw', or DDP.")
    if accelerator.device.type == "cpu":  # where accelerate itself would have each process hold the whole model
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    # It warns of changes in place to what the sense network returns; there are none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)


def keep_freed_memory():
    """Tells glibc to keep the memory of freed tensors for the next ones.

    Otherwise every large tensor is fresh memory from the system, which clears it page by page: on
    two cores that took as long as the training itself.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**25)  # its upper bound
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def prepare_blocks(config: TrainingConfig):
    from backpack_lib.corpora import open_corpus, prepare

    valid = config.valid_corpus and open_corpus(config.valid_corpus, config.per_file)
    return prepare(
        open_corpus(config.corpus, config.per_file, config.streaming),
        block_size=config.block_size,
        vocab_size=config.vocab_size,
        tokenizer=load_tokenizer_of(config.init_from) if config.init_from else config.tokenizer,
        valid_corpus=valid or None,
        valid_fraction=config.valid_fraction,
    )


def make_model(config: TrainingConfig, tokenizer):
    """A new model of the configured sizes, or the one to start from."""
    kinds = {"backpack": BackpackLMHeadModel, "transformer": GPT2LMHeadModel}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    if config.init_from:
        model = load_model(config.init_from, **dropout)
        if not isinstance(model, kinds[config.architecture]):
            raise ValueError(
                f"init_from={config.init_from!r} holds a {type(model).__name__}, "
                f"but architecture={config.architecture!r} was asked for."
            )
        if config.block_size > model.config.n_positions:
            raise ValueError(
                f"block_size={config.block_size} is longer than the n_positions={model.config.n_positions} "
                f"of {config.init_from!r}; choose a shorter one."
            )
        return model
    trunk = dict(
        vocab_size=len(tokenizer),
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        **dropout,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    if config.architecture == "backpack":
        model = BackpackLMHeadModel(BackpackConfig(**trunk, num_senses=config.num_senses))
    else:
        model = GPT2LMHeadModel(GPT2Config(**trunk))
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    return model


def make_optimizers(model, config: TrainingConfig, device: torch.device) -> list[torch.optim.Optimizer]:
    """AdamW, which decays matrices, embeddings included, and leaves biases and norms alone.

    With optimizer="muon", Muon takes over the trunk's and the sense network's matrices, but for the
    last one, which is wide: its orthogonalisation would cost more than it gives. Muon's updates are
    scaled to the size of AdamW's, so that one learning rate serves both.
    """
    by_name = dict(model.named_parameters())
    matrices = {name: p for name, p in by_name.items() if p.dim() >= 2}
    others = [p for p in by_name.values() if p.dim() < 2]
    made = []
    if config.optimizer == "muon":
        hidden = [name for name in matrices if HIDDEN_MATRIX.search(name)]
        settings = {"weight_decay": config.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        made = [torch.optim.Muon([matrices.pop(name) for name in hidden], lr=config.learning_rate, **settings)]
    groups = [
        {"params": list(matrices.values()), "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=device.type != "mps")
    return [adamw, *made]


def make_scheduler(optimizer, config: TrainingConfig):
    specific = {}
    if config.schedule == "wsd":
        decay = round(config.steps * config.decay)
        specific = {"num_decay_steps": decay, "decay_type": "linear"}
    return get_scheduler(
        SCHEDULES[config.schedule], optimizer, config.warmup, config.steps, scheduler_specific_kwargs=specific
    )


def make_batches(config: TrainingConfig, blocks, accelerator: Accelerator):
    place = {"process": accelerator.process_index, "processes": accelerator.num_processes}
    if hasattr(blocks.train, "__len__"):
        return ShuffledBatches(blocks.train, config.batch_size, config.accumulate, config.seed, **place)
    return StreamedBatches(blocks.train, config.batch_size, config.accumulate, **place)


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


def main() -> int:
    """Trains from the command line."""
    parser = HfArgumentParser(
        TrainingConfig,
        prog="python -m backpack_lib.training",
        description="Trains a model, or goes on with the run that OUT holds.",
    )

    def work():
        (config,) = parser.parse_args_into_dataclasses()
        history = train(config)
        state = PartialState()
        if state.is_main_process:
            print(history.tail(1).to_string(index=False))
            print(f"The model is in {config.out}/model.")
        # A process that leaves a group of CPUs open now and then dies of SIGABRT when Python ends.
        state.destroy_process_group()

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
