"""Trains models on planted text from five seeds, and ships those of the first.

    python data/planted/make.py        # a quarter of an hour on two cores; what was stopped resumes

Writes `seeds.csv`, a row for each model and seed, and `backpack/` and `transformer/`, which `load("planted")` and
`load("planted-transformer")` return until 01_training has trained others.
"""

import json
import sys
from pathlib import Path

import pandas as pd

from backpack_lib.files import exit_status, runs_folder, write_text
from backpack_lib.loading import export, load
from backpack_lib.text.planted import PLANTED
from backpack_lib.training.config import TrainingConfig
from backpack_lib.training.run import train

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2, 3, 4)
# The parameters of 01_training, and a Transformer with as many parameters as the Backpack.
SETTINGS = dict(
    corpus=PLANTED, n_layer=2, n_head=4, n_embd=64, num_senses=8, vocab_size=1200, block_size=64, batch_size=32,
    steps=800, learning_rate=8e-3, warmup=40, eval_every=80, save_every=160, device="cpu", precision="fp32",
)  # fmt: skip
MODELS = {
    "Backpack": {"architecture": "backpack"},
    "Transformer": {"architecture": "transformer"},
    "wider Transformer": {"architecture": "transformer", "n_embd": 100},
}


def train_one(name: str, seed: int, runs: Path) -> tuple[dict, Path]:
    """Trains a model. -> its row of the table, and the folder of its run"""
    out = runs / f"{name.replace(' ', '-')}-{seed}"
    history = train(TrainingConfig(**SETTINGS | MODELS[name], seed=seed, out=str(out)))
    model, _ = load(out / "model")
    last = history.iloc[-1]
    parameters = sum(p.numel() for p in model.parameters())
    return {"model": name, "parameters": parameters, "seed": seed} | last[["valid_loss", "floor"]].to_dict(), out


def make_planted(runs: Path):
    rows = []
    for seed in SEEDS:
        for name, changes in MODELS.items():
            row, out = train_one(name, seed, runs)
            rows.append(row)
            if seed == SEEDS[0] and "n_embd" not in changes:
                export(HERE / changes["architecture"], *load(out / "model"))
    write_text(HERE / "seeds.csv", pd.DataFrame(rows).round(5).to_csv(index=False))
    write_text(HERE / "settings.json", json.dumps({"corpus": PLANTED}) + "\n")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: make_planted(runs_folder() / "planted")))
