"""The parts of a training run, made from its settings: accelerator, blocks, model, loss, optimisers, schedule."""

import ctypes
import os
import platform
import re
import warnings
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import GPT2Config, GPT2LMHeadModel, get_scheduler

from backpack_lib.loading import SMOLLM2, SMOLLM2_ON_HUB, load_model, load_tokenizer_of, pick_device
from backpack_lib.model.backpack import BackpackConfig, BackpackLMHeadModel
from backpack_lib.model.kinds import require_transformer, suppress_unused_rows
from backpack_lib.model.lens import SenseLens, SenseLensConfig
from backpack_lib.training.checkpoints import RunFolder
from backpack_lib.training.config import PRECISIONS, SCHEDULES, TrainingConfig
from backpack_lib.training.lens import COUNTED_BLOCKS, KeptStates, LensLoss, start
from backpack_lib.training.loss import LanguageModelLoss

KINDS = {"backpack": BackpackLMHeadModel, "transformer": GPT2LMHeadModel}
HIDDEN_MATRIX = re.compile(r"\.(attn|mlp)\.c_\w+\.weight$|final_mlp\.c_fc\.weight$|sense_weight_net")
# Rows of a large vocabulary are a multiple of this, as a GPU's products want them; a small one would gain nothing.
VOCABULARY_MULTIPLE, LARGE_VOCABULARY = 64, 10_000
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Accelerate's view of the device and the other processes, made anew for each run."""
    on_cpu = pick_device(config.device).type == "cpu"
    # Accelerate keeps its state for the life of a process; a notebook may train twice, differently.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    accelerator = Accelerator(
        mixed_precision=PRECISIONS[config.resolved_precision()],
        gradient_accumulation_steps=config.accumulate,
        cpu=on_cpu,
        step_scheduler_with_optimizer=False,  # it would step once for each process
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        if config.optimizer == "muon":
            raise ValueError("optimizer='muon' needs whole matrices, which FSDP divides; choose 'adamw', or DDP.")
        if on_cpu:  # where accelerate itself would have each process hold the whole model
            PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # It warns of changes in place to what the sense network returns; there are none.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    return accelerator


def keep_freed_memory():
    """Tells glibc to keep the memory of freed tensors for the next ones.

    Otherwise the system clears every large tensor page by page: on two cores that took as long as the training itself.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # its upper bound
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def prepare_blocks(config: TrainingConfig):
    """The `corpora.Blocks` of the configured text, tokenised as the model asks for."""
    from backpack_lib.text.corpora import open_corpus, prepare

    existing = config.init_from or config.lens_of
    blocks = prepare(
        open_corpus(config.corpus, config.per_file, config.streaming),
        block_size=config.block_size,
        vocab_size=config.vocab_size,
        tokenizer=load_tokenizer_of(existing) if existing else config.tokenizer,
        valid_corpus=open_corpus(config.valid_corpus, config.per_file) if config.valid_corpus else None,
        valid_fraction=config.valid_fraction,
    )
    if 0 < config.max_blocks < len(blocks.train):
        shuffled = blocks.train.shuffle(seed=config.seed)  # a corpus may be sorted
        blocks = replace(blocks, train=shuffled.select(range(config.max_blocks)))
    return blocks


def make_model(config: TrainingConfig, tokenizer):
    """A new model of the configured sizes, the one to start from, or a new sense lens."""
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    if not (config.init_from or config.lens_of):
        return make_new_model(config, tokenizer, dropout)
    if config.lens_of:
        base = load_model(config.lens_of)
        require_transformer(base)
        name = SMOLLM2_ON_HUB if config.lens_of == SMOLLM2 else config.lens_of
        model = SenseLens(SenseLensConfig.of_base(base, name, num_senses=config.num_senses), base)
    else:
        model = load_model(config.init_from, **dropout)
        if not isinstance(model, KINDS[config.architecture]):
            raise ValueError(
                f"init_from={config.init_from!r} holds a {type(model).__name__}, "
                f"but architecture={config.architecture!r} was asked for."
            )
    if config.block_size > model.config.n_positions:
        raise ValueError(
            f"block_size={config.block_size} is longer than the n_positions={model.config.n_positions} "
            f"of {config.init_from or config.lens_of!r}; choose a shorter one."
        )
    return model


def make_new_model(config: TrainingConfig, tokenizer, dropout: dict[str, float]):
    """A Backpack or a Transformer with random weights."""
    rows = len(tokenizer)
    if rows >= LARGE_VOCABULARY:
        rows += -rows % VOCABULARY_MULTIPLE
    trunk = dict(
        vocab_size=rows,
        used_vocab_size=len(tokenizer),
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
    suppress_unused_rows(model)
    return model


def make_loss(model, config: TrainingConfig, blocks, folder: RunFolder):
    """The loss that a run trains by; a new lens is also given its start."""
    if not config.lens_of:
        return LanguageModelLoss(model)
    states = KeptStates(model, folder.path / "states", config.states_gb * 1e9)
    counts = torch.bincount(blocks.train[:COUNTED_BLOCKS]["input_ids"].flatten(), minlength=model.config.vocab_size)
    if not folder.checkpoints():
        start(model, states, blocks, counts)
    return LensLoss(model, states, counts)


def make_optimizers(model, config: TrainingConfig, device: torch.device) -> list[torch.optim.Optimizer]:
    """AdamW, which decays matrices, embeddings included, and leaves biases and norms alone.

    With optimizer="muon", Muon takes over the trunk's and the sense network's matrices, but for the
    last one, which is wide: its orthogonalisation would cost more than it gives. Muon's updates are
    scaled to the size of AdamW's, so that one learning rate serves both.
    """
    matrices = {name: p for name, p in model.named_parameters() if p.dim() >= 2}
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizers = []
    if config.optimizer == "muon":
        hidden = [matrices.pop(name) for name in list(matrices) if HIDDEN_MATRIX.search(name)]
        settings = {"weight_decay": config.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        optimizers = [torch.optim.Muon(hidden, lr=config.learning_rate, **settings)]
    groups = [
        {"params": list(matrices.values()), "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=device.type != "mps")
    return [adamw, *optimizers]


def make_scheduler(optimizer, config: TrainingConfig):
    specific = {}
    if config.schedule == "wsd":
        specific = {"num_decay_steps": round(config.steps * config.decay), "decay_type": "linear"}
    return get_scheduler(
        SCHEDULES[config.schedule], optimizer, config.warmup, config.steps, scheduler_specific_kwargs=specific
    )
