"""Trains models on planted text from three seeds, and ships those of the first.

    python data/planted/make.py        # a quarter of an hour on two cores; what was stopped resumes

All are trained with the parameters of 01_training, but for more steps. Writes `seeds.csv`, a row for each model and
seed, and `backpack/` and `transformer/`, which `load("planted")` and `load("planted-transformer")` return until
01_training has trained others.
"""

import json
import sys
from pathlib import Path

import pandas as pd

from backpack_lib.files import exit_status, notebooks_folder, runs_folder, write_text
from backpack_lib.lessons.training import settings
from backpack_lib.loading import export, load
from backpack_lib.running.parameters import default_parameters
from backpack_lib.text.planted import PLANTED
from backpack_lib.training.config import TrainingConfig
from backpack_lib.training.run import train

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
SETTINGS = settings(default_parameters(notebooks_folder() / "01_training.ipynb")) | {
    "corpus": PLANTED,
    "steps": 800,
    "eval_every": 80,
    "save_every": 160,
    "device": "cpu",
    "precision": "fp32",
}
MODELS = {
    "Backpack": {"architecture": "backpack"},
    "Transformer": {"architecture": "transformer"},
    "wider Transformer": {"architecture": "transformer", "n_embd": 100},  # with as many parameters as the Backpack
}


def train_one(name: str, seed: int, runs: Path) -> tuple[dict, Path]:
    """Trains a model. -> its row of the table, and the folder of its run"""
    out = runs / f"{name.replace(' ', '-')}-{seed}"
    history = train(TrainingConfig(**SETTINGS | MODELS[name] | {"seed": seed, "out": out}))
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
            print(row, flush=True)
            if seed == SEEDS[0] and "n_embd" not in changes:
                export(HERE / changes["architecture"], *load(out / "model"))
    write_text(HERE / "seeds.csv", pd.DataFrame(rows).round(5).to_csv(index=False))
    write_text(HERE / "settings.json", json.dumps({"corpus": PLANTED}) + "\n")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: make_planted(runs_folder() / "planted")))
