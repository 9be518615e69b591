"""Measures the suite's Backpack against a plain one and against the GPT-2 that it contains.

    python data/benchmark/bench.py --device cpu --sizes demo micro small --rows training generation memory-1024

Every row is a ratio of two times (or memories), taken in alternation within one run: the median over rounds, with the
least and the greatest. Above 1, the suite's Backpack is the faster (or the smaller) one. The rows are kept in
`cpu.json` or `cuda.json` beside this file, and printed as lines of the README's table.
"""

import argparse
import datetime
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

from backpack_lib import BackpackConfig, BackpackLMHeadModel
from backpack_lib.files import write_text
from backpack_lib.training.build import keep_freed_memory
from backpack_lib.training.loss import LanguageModelLoss

HERE = Path(__file__).resolve().parent
SIZES = {  # the shipped demo model, and the least and the greatest of the paper
    "demo": {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 16_000},
    "micro": {"n_embd": 384, "n_layer": 6, "n_head": 6, "vocab_size": 50_264},
    "small": {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50_264},
}
BATCH = {  # sequences, and tokens in each
    "cpu": {"demo": (16, 256), "micro": (8, 256), "small": (2, 512)},
    "cuda": dict.fromkeys(SIZES, (32, 512)),
}
SENSES, ROUNDS, WRITTEN, LONG = 16, 5, 300, 1024  # the last two: tokens of generation, and of the text for memory


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


def make_models(size: str, positions: int, device: str) -> tuple[dict[str, nn.Module], dict[str, Callable]]:
    """The suite's Backpack, the plain one of the same weights, and the GPT-2 of the same trunk; and their losses."""
    torch.manual_seed(0)
    shape = SIZES[size] | {"n_positions": positions, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ours = BackpackLMHeadModel(BackpackConfig(**shape, num_senses=SENSES)).to(device)
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape)).to(device)
    gpt2.loss_type = "ForCausalLM"
    plain = PlainBackpack(ours)
    losses = {
        "ours": LanguageModelLoss(ours),
        "plain": plain.loss,
        "GPT-2": lambda ids: gpt2(ids, labels=ids, use_cache=False).loss,
        "GPT-2, our loss": LanguageModelLoss(gpt2),
    }
    return {"ours": ours, "plain": plain, "GPT-2": gpt2}, losses


def text_like(batch: int, tokens: int, size: str, device: str) -> torch.Tensor:
    """Token ids that repeat about as those of English do, by Zipf's law. (batch, tokens)"""
    frequency = (torch.arange(1, SIZES[size]["vocab_size"], dtype=torch.float) + 2.7) ** -1.08
    generator = torch.Generator().manual_seed(0)
    return (torch.multinomial(frequency, batch * tokens, True, generator=generator) + 1).view(batch, tokens).to(device)


def alternated(works: dict[str, Callable], device: str) -> dict[str, list[float]]:
    """Seconds of each work in each round, one after the other in every round."""
    seconds = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


# ---------------------------------------------------------------- the rows: from size and device to values by model


def training(size: str, device: str) -> dict[str, list[float]]:
    """Seconds of forward, backward and AdamW."""
    batch, tokens = BATCH[device][size]
    (models, losses), ids = make_models(size, tokens, device), text_like(batch, tokens, size, device)

    def step(name):
        optimizer = torch.optim.AdamW(models[name.split(",")[0]].parameters(), lr=1e-6, fused=True)
        loss = torch.compile(losses[name]) if device == "cuda" else losses[name]

        def work():
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                value = loss(ids)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

        return work

    steps = {name: step(name) for name in losses}
    for first in steps.values():
        first()
    return alternated(steps, device)


@torch.no_grad()
def generation(size: str, device: str) -> dict[str, list[float]]:
    """Seconds of `generate()` from one token; the plain Backpack computes the whole text for each token."""
    models, _ = make_models(size, WRITTEN + 1, device)
    for model in models.values():
        model.eval().to(torch.bfloat16 if device == "cuda" else torch.float32)
    text = text_like(1, WRITTEN + 1, size, device)
    written = text[0].tolist()
    settings = {
        "attention_mask": torch.ones(1, 1, dtype=torch.long, device=device),
        "do_sample": False,
        "eos_token_id": None,
        # It writes a text that is given, so that tokens come again as often as they do in one.
        "prefix_allowed_tokens_fn": lambda _, ids: [written[len(ids)]],
    }

    def writes(name, tokens):
        if name == "plain":
            return lambda: [models[name](text[:, :n])[:, -1].argmax(-1) for n in range(1, tokens + 1)]
        return lambda: models[name].generate(text[:, :1], max_new_tokens=tokens, **settings)

    for name in models:
        writes(name, 4)()
    return alternated({name: writes(name, WRITTEN) for name in models}, device)


def memory(size: str, device: str) -> dict[str, list[float]]:
    """Bytes of tensors beyond weights and gradients that the loss of one sequence and its gradient need; exact."""
    (models, losses), ids = make_models(size, LONG, device), text_like(1, LONG, size, device)
    peak = peak_on_gpu if device == "cuda" else peak_on_cpu

    def step(name):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = losses[name](ids)
        loss.backward()

    for parameter in itertools.chain(models["ours"].parameters(), models["GPT-2"].parameters()):
        parameter.grad = torch.zeros_like(parameter)
    return {name: [peak(lambda name=name: step(name))] for name in models}


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
    return max(itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())))


ROWS = {"training": training, "generation": generation, f"memory-{LONG}": memory}
OTHERS = ("plain", "GPT-2", "GPT-2, our loss")


def row_of(key: str, size: str, values: dict[str, list[float]]) -> dict:
    """A row of the table: how many times as much each of the others takes as the suite's, by rounds."""
    against = {}
    for name in values.keys() - {"ours"}:
        ratios = [theirs / ours for theirs, ours in zip(values[name], values["ours"])]
        against[name] = {"ratio": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}
    medians = {name: statistics.median(rounds) for name, rounds in values.items()}
    return {"key": key, "size": size, "against": against, "medians": medians}


def line(row: dict) -> str:
    """A row as a line of the README's table."""
    amount = row["medians"]["ours"]
    in_memory = row["key"].startswith("memory")  # exact, so that there is no spread to show
    cells = [row["key"], row["size"], f"{amount / 1e6:,.0f} MB" if in_memory else f"{amount:.2f} s"]
    form = "{ratio:.2f}" if in_memory else "{ratio:.2f} [{least:.2f}, {greatest:.2f}]"
    cells += [form.format(**row["against"][name]) if name in row["against"] else "" for name in OTHERS]
    return f"| {' | '.join(cells)} |"


def run(device: str, sizes: list[str], keys: list[str]):
    """Measures rows and puts each into the device's table, or renews it there, as soon as it is measured."""
    if device == "cpu":
        keep_freed_memory()
    file = HERE / f"{device}.json"
    table = json.loads(file.read_text()) if file.is_file() else {"rows": []}
    rows = {(row["key"], row["size"]): row for row in table["rows"]}
    table["machine"] = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    table["date"] = datetime.date.today().isoformat()
    table["versions"] = {name: version(name) for name in ("torch", "transformers")}
    for key, size in itertools.product(keys, sizes):
        rows[key, size] = row_of(key, size, ROWS[key](size, device))
        table["rows"] = [rows[place] for place in itertools.product(ROWS, SIZES) if place in rows]
        write_text(file, json.dumps(table, indent=1, allow_nan=False) + "\n")
        print(line(rows[key, size]), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), metavar="SIZE")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    options = parser.parse_args()
    run(options.device, options.sizes, options.rows)
