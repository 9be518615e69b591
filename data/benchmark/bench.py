"""Measures the suite's Backpack against a plain one and against the GPT-2 that it contains.

    python data/benchmark/bench.py                    all rows, on this machine's CPU
    python data/benchmark/bench.py --device cuda      in bf16; training compiled
    python data/benchmark/bench.py --sizes demo --rows training generation

Every row is a ratio of two times (or memories), taken in alternation within one run: the median over rounds after a
warm-up, with the least and the greatest round. Above 1, the suite's Backpack is the faster (or the smaller) one.
The table is written as `cpu.json` or `cuda.json` beside this file, and from there into the README there.
"""

import argparse
import datetime
import itertools
import json
import math
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor

from backpack_lib import BackpackConfig, BackpackLMHeadModel, SenseEdits, attribute
from backpack_lib.files import exit_status, write_text
from backpack_lib.loading import load_tokenizer_of
from backpack_lib.training.build import keep_freed_memory
from backpack_lib.training.loss import LanguageModelLoss

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
SIZES = {  # the shipped demo model, and the least and the greatest of the paper
    "demo": dict(n_embd=256, n_layer=4, n_head=4, vocab_size=16_000),
    "micro": dict(n_embd=384, n_layer=6, n_head=6, vocab_size=50_264),
    "small": dict(n_embd=768, n_layer=12, n_head=12, vocab_size=50_264),
}
SENSES = 16
BATCH = {  # sequences, and tokens in each
    "cpu": {"demo": (16, 256), "micro": (8, 256), "small": (2, 512)},
    "cuda": dict.fromkeys(SIZES, (32, 512)),
}
LENGTHS = (512, 1024, 2048)  # of the texts whose peak memory is measured
MODELS = ("ours", "plain", "GPT-2")
ROUNDS = 5
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16 FLOP/s without sparsity, by Nvidia's data sheets


# ---------------------------------------------------------------- the models


class PlainBackpack(nn.Module):
    """A Backpack written from its equations and nothing else: every tensor is made whole, nothing is kept.

    Built from the parts of one of the suite's models, so that both compute the same.
    """

    def __init__(self, model: BackpackLMHeadModel):
        super().__init__()
        self.trunk = model.backpack.gpt2_model
        self.sense_network = model.backpack.sense_network
        self.sense_weight_net = model.backpack.sense_weight_net
        self.E = model.lm_head.weight

    def forward(self, ids):
        T = ids.shape[1]
        senses = self.sense_network(self.trunk.wte(ids)).transpose(1, 2)  # (B, k, T, d), of every position
        queries, keys = self.sense_weight_net(self.trunk(ids, use_cache=False).last_hidden_state)
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
        future = torch.ones(T, T, dtype=torch.bool, device=ids.device).triu(1)
        alpha = scores.masked_fill(future, -torch.inf).softmax(-1)  # (B, k, T, T)
        o = (alpha.to(senses.dtype) @ senses).sum(1)  # (B, k, T, d), then (B, T, d)
        return o @ self.E.T

    def loss(self, ids):
        logits = self(ids)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    @torch.no_grad()
    def write(self, text):
        """Writes a given text after its first token: for each token, all before it are computed anew."""
        for n in range(1, text.shape[1]):
            self(text[:, :n])[:, -1].argmax(-1)


class Dictated(LogitsProcessor):
    """Has `generate()` write a given text, so that tokens come again as often as they do in one."""

    def __init__(self, text: torch.Tensor):
        self.text = text

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).scatter_(1, self.text[:, input_ids.shape[1], None], 0.0)


def make_models(size: str, positions: int, device: str, training: bool = False) -> dict[str, nn.Module]:
    """The suite's Backpack, the plain one of the same weights, and the GPT-2 of the same trunk.

    On a GPU their weights are in bf16, but for training, where `computed_in` casts them. A CPU computes in float32.
    """
    torch.manual_seed(0)
    shape = SIZES[size] | dict(n_positions=positions, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    shape |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ours = BackpackLMHeadModel(BackpackConfig(**shape, num_senses=SENSES)).to(device)
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape)).to(device)
    gpt2.loss_type = "ForCausalLM"
    if device == "cuda" and not training:
        ours, gpt2 = ours.bfloat16(), gpt2.bfloat16()
    return {name: model.train(training) for name, model in zip(MODELS, (ours, PlainBackpack(ours), gpt2))}


def make_losses(models: dict[str, nn.Module]) -> dict[str, Callable]:
    """How each of the models computes the loss of some sequences, and the GPT-2 by the suite's own loss."""
    return {
        "ours": LanguageModelLoss(models["ours"]),
        "plain": models["plain"].loss,
        "GPT-2": lambda ids: models["GPT-2"](ids, labels=ids, use_cache=False).loss,
        "GPT-2, our loss": LanguageModelLoss(models["GPT-2"]),
    }


def text_like(batch: int, tokens: int, size: str, device: str) -> torch.Tensor:
    """Token ids that repeat about as those of English do, by Zipf's law. (batch, tokens)

    Of 4,096 tokens 1,634 are distinct; of as many of the validation text, under the demo tokenizer, 1,576.
    """
    frequency = (torch.arange(1, SIZES[size]["vocab_size"], dtype=torch.float) + 2.7) ** -1.08
    generator = torch.Generator().manual_seed(0)
    return (torch.multinomial(frequency, batch * tokens, True, generator=generator) + 1).view(batch, tokens).to(device)


def computed_in(device: str):
    """The precision of training: bf16 on a GPU."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


# ---------------------------------------------------------------- timing


def alternated(
    works: dict[str, Callable], device: str, rounds: int = ROUNDS, warm_ups: int = 1
) -> dict[str, list[float]]:
    """Seconds of each work in each round, one after the other in every round, after rounds that only warm up."""
    seconds = {name: [] for name in works}
    for number in range(warm_ups + rounds):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= warm_ups:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratios(values: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """How many times as much each of the others takes as the suite's: the median of the rounds, least and greatest."""
    found = {}
    for name in values.keys() - {"ours"}:
        by_round = [theirs / ours for theirs, ours in zip(values[name], values["ours"])]
        found[name] = {"ratio": statistics.median(by_round), "least": min(by_round), "greatest": max(by_round)}
    return found


# ---------------------------------------------------------------- the rows: from size and device to values by model


def training_step(size: str, device: str) -> dict[str, list[float]]:
    """Forward, backward and AdamW."""
    batch, tokens = BATCH[device][size]
    models = make_models(size, tokens, device, training=True)
    ids = text_like(batch, tokens, size, device)
    losses = make_losses(models)
    if device == "cuda":
        losses = {name: torch.compile(loss) for name, loss in losses.items()}

    def step(name, loss):
        parameters = models[name.split(",")[0]].parameters()
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

        def work():
            with computed_in(device):
                value = loss(ids)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

        return work

    return alternated({name: step(name, loss) for name, loss in losses.items()}, device)


@torch.no_grad()
def forward_pass(size: str, device: str) -> dict[str, list[float]]:
    batch, tokens = BATCH[device][size]
    models = make_models(size, tokens, device)
    ids = text_like(batch, tokens, size, device)
    works = {
        "ours": lambda: models["ours"](ids, use_cache=False).logits,
        "plain": lambda: models["plain"](ids),
        "GPT-2": lambda: models["GPT-2"](ids, use_cache=False).logits,
    }
    return alternated(works, device)


def generation(size: str, device: str, batch: int, tokens: int) -> dict[str, list[float]]:
    """From one token, by transformers' `generate()`; the plain Backpack computes the whole text for each token."""
    models = make_models(size, tokens + 1, device)
    text = text_like(batch, tokens + 1, size, device)
    settings = dict(attention_mask=torch.ones_like(text[:, :1]), do_sample=False, eos_token_id=None)
    settings |= dict(logits_processor=[Dictated(text)])

    def writes(name, tokens):
        if name == "plain":
            return lambda: models[name].write(text[:, : tokens + 1])
        return lambda: models[name].generate(text[:, :1], max_new_tokens=tokens, **settings)

    names = MODELS if batch == 1 else ("ours", "GPT-2")  # for more, the plain one would take hours on a CPU
    for name in names:
        writes(name, 4)()
    return alternated({name: writes(name, tokens) for name in names}, device, warm_ups=0)


@torch.no_grad()
def sense_table(size: str, device: str) -> dict[str, list[float]]:
    """The sense vectors of all tokens, 2,048 at a time, against those of as many positions of text, 256 at a time."""
    models = make_models(size, 16, device)
    ids = torch.arange(SIZES[size]["vocab_size"], device=device)
    text = text_like(1, len(ids), size, device)[0]
    works = {
        "ours": lambda: [models["ours"].sense_vectors(part) for part in ids.split(2048)],
        "plain": lambda: [models["plain"].sense_network(models["plain"].trunk.wte(part)) for part in text.split(256)],
    }
    return alternated(works, device)


@torch.no_grad()
def looking_inside(size: str, device: str, kind: str) -> dict[str, list[float]]:
    """The model's own forward pass on one text of 256 tokens against one with attribution or with an edit."""
    model = make_models(size, 256, device)["ours"]
    ids = text_like(1, 256, size, device)
    edits = SenseEdits(model, load_tokenizer_of("demo")).scale([5, 7, 11], 3, 0.5)

    def forward():
        return model(ids, use_cache=False, logits_to_keep=1).logits

    def edited():
        with edits.applied():
            return forward()

    work = {"attribution": lambda: attribute(model, ids, 5, 7), "edit": edited}[kind]
    return alternated({"ours": work, "forward": forward}, device, rounds=25)


def peak_memory(size: str, device: str, tokens: int) -> dict[str, list[float]]:
    """Bytes of tensors beyond weights and gradients that the loss of one sequence and its gradient need; exact."""
    models = make_models(size, tokens, device, training=True)
    ids, losses = text_like(1, tokens, size, device), make_losses(models)

    def step(name):
        with computed_in(device):
            loss = losses[name](ids)
        loss.backward()

    for name in MODELS:
        for parameter in models[name].parameters():
            parameter.grad = torch.zeros_like(parameter)
    peak = peak_on_gpu if device == "cuda" else peak_on_cpu
    return {name: [peak(lambda name=name: step(name))] for name in MODELS}


def peak_on_gpu(work: Callable) -> int:
    work()  # what libraries need once
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(work: Callable) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


# What is measured: its name, and how.
ROWS = {
    "training": ("training step", training_step),
    "forward": ("forward pass", forward_pass),
    "generation": ("generation, 300 tokens, batch 1", lambda s, d: generation(s, d, 1, 300)),
    "generation-16": ("generation, 256 tokens, batch 16", lambda s, d: generation(s, d, 16, 256)),
    **{
        f"memory-{T}": (f"peak memory of training, {T} tokens", lambda s, d, T=T: peak_memory(s, d, T)) for T in LENGTHS
    },
    "attribution": ("forward pass with attribution", lambda s, d: looking_inside(s, d, "attribution")),
    "edit": ("forward pass with an edit", lambda s, d: looking_inside(s, d, "edit")),
    "senses": ("sense table of all tokens", sense_table),
}
AGAINST = ("plain", "GPT-2", "GPT-2, our loss", "forward")


def flops_per_token(size: str, tokens: int, distinct: float) -> dict[str, float]:
    """Floating-point operations that the equations ask of a training step, per token.

    Six for each multiplication of a weight: two in the forward pass, four in the backward pass (Kaplan et al., 2020).
    A position looks at tokens / 2 others on average. distinct: share of tokens that are not in the batch before.
    """
    d, layers, V = (SIZES[size][name] for name in ("n_embd", "n_layer", "vocab_size"))
    trunk = layers * (12 * d**2 + 2 * d * tokens / 2) + V * d
    senses = distinct * (8 * d**2 + 4 * d**2 + 4 * SENSES * d**2)  # the block's MLP, then the last one
    mixing = 2 * d**2 + (d + SENSES * d) * tokens / 2  # queries and keys, their products, and the weighted sum
    return {"ours": 6 * (trunk + senses + mixing), "GPT-2": 6 * trunk}


# ---------------------------------------------------------------- the table


def measure(key: str, size: str, device: str) -> dict:
    """One row of the table."""
    values = ROWS[key][1](size, device)
    medians = {name: statistics.median(rounds) for name, rounds in values.items()}
    row = {"key": key, "size": size, "against": ratios(values), "medians": medians}
    if key == "training":
        batch, tokens = BATCH[device][size]
        distinct = len(text_like(batch, tokens, size, "cpu").unique()) / (batch * tokens)
        row |= {"batch": [batch, tokens], "tokens_per_second": batch * tokens / medians["ours"]}
        row["flops_per_token"] = flops_per_token(size, tokens, distinct)
        row["flops_per_second"] = row["flops_per_token"]["ours"] * row["tokens_per_second"]
        if device == "cuda":
            peak = next((peak for name, peak in PEAK.items() if name in machine(device)), None)
            row["utilisation"] = peak and row["flops_per_second"] / peak
    return row


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        name = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    return f"{torch.get_num_threads()} cores of {name}"


def run(device: str, sizes: list[str], keys: list[str]):
    """Measures rows and puts each into the device's table, or renews it there, as soon as it is measured."""
    if device == "cpu":
        keep_freed_memory()
    file = HERE / f"{device}.json"
    table = json.loads(file.read_text()) if file.is_file() else {"rows": []}
    table |= {
        "machine": machine(device),
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    rows = {(row["key"], row["size"]): row for row in table["rows"]}
    for key, size in tqdm([(key, size) for key in keys for size in sizes], desc="benchmark"):
        rows[key, size] = row = measure(key, size, device)
        table["rows"] = [rows[place] for place in ((k, s) for k in ROWS for s in SIZES) if place in rows]
        write_text(file, json.dumps(table, indent=1) + "\n")
        tqdm.write(f"{ROWS[key][0]}, {size}: " + ", ".join(f"{n} {cell(row, n)}" for n in row["against"]))
    write_text(README, with_tables(README.read_text()))


def cell(row: dict, name: str) -> str:
    """A ratio and its range, such as "1.62 [1.58, 1.71]"; of one value, the ratio alone."""
    if name not in row["against"]:
        return ""
    found = row["against"][name]
    spread = f" [{found['least']:.2f}, {found['greatest']:.2f}]" if found["least"] < found["greatest"] else ""
    return f"{found['ratio']:.2f}{spread}"


def amount(row: dict) -> str:
    """What the suite's Backpack takes: "172 MB", "1.74 s" or "23 ms"."""
    value = row["medians"]["ours"]
    if row["key"].startswith("memory"):
        return f"{value / 1e6:,.0f} MB"
    return f"{value:,.2f} s" if value >= 0.1 else f"{1e3 * value:.1f} ms"


def markdown(table: dict) -> str:
    """A device's table as it stands in the README beside this file."""
    versions = ", ".join(f"{name} {number}" for name, number in table["versions"].items())
    lines = [f"{table['machine']}, {versions}, {table['date']}:", ""]
    heads = ["", "size", "takes", *(f"against {name}" for name in AGAINST[:3]), "against its own forward pass"]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in table["rows"]:
        cells = [ROWS[row["key"]][0], row["size"], amount(row), *(cell(row, name) for name in AGAINST)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {training(row)}" for row in table["rows"] if row["key"] == "training")])


def training(row: dict) -> str:
    """How fast a training step is in tokens and in the operations that the equations ask for."""
    batch, tokens = row["batch"]
    ours, theirs = (row["flops_per_token"][name] / 1e6 for name in ("ours", "GPT-2"))
    share = f", {row['utilisation']:.0%} of the peak" if row.get("utilisation") else ""
    return (
        f"training, {row['size']}, {batch} x {tokens} tokens a step: {row['tokens_per_second']:,.0f} tokens/s, "
        f"{row['flops_per_second'] / 1e9:,.0f} GFLOP/s{share}; the equations ask {ours:.0f} MFLOP a token, "
        f"GPT-2's {theirs:.0f}"
    )


def with_tables(readme: str) -> str:
    """The README with each device's table in its place: between <!-- cpu --> and <!-- end cpu -->."""
    for file in sorted(HERE.glob("*.json")):
        begin, end = f"<!-- {file.stem} -->", f"<!-- end {file.stem} -->"
        before, _, rest = readme.partition(begin)
        readme = f"{before}{begin}\n{markdown(json.loads(file.read_text()))}\n{end}{rest.partition(end)[2]}"
    return readme


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), metavar="SIZE")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    given = parser.parse_args()
    return exit_status(lambda: run(given.device, given.sizes, given.rows))


if __name__ == "__main__":
    sys.exit(main())
