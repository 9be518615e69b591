"""Trains models on planted text from three seeds, and ships those of the first.

    python data/planted/make.py        # a quarter of an hour on two cores; what was stopped resumes

All are trained with the parameters of 01_training, but for more steps at a lower rate. Writes `seeds.csv`, a row for
each model and seed, and `backpack/` and `transformer/`, which are `load("planted")` and `load("planted-transformer")`.
"""

import json
from pathlib import Path

import pandas as pd

from backpack_lib.files import notebooks_folder, runs_folder, write_text
from backpack_lib.lessons.training import settings
from backpack_lib.loading import export, load
from backpack_lib.running.parameters import default_parameters
from backpack_lib.text.planted import PLANTED
from backpack_lib.training.config import TrainingConfig
from backpack_lib.training.run import train

HERE, RUNS = Path(__file__).resolve().parent, runs_folder() / "planted"
SEEDS = (0, 1, 2)
SETTINGS = settings(default_parameters(notebooks_folder() / "01_training.ipynb")) | {
    "corpus": PLANTED,
    "steps": 800,
    "learning_rate": 8e-3,
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


def make_planted():
    rows = []
    for seed in SEEDS:
        for name, changes in MODELS.items():
            out = RUNS / f"{name.replace(' ', '-')}-{seed}"
            last = train(TrainingConfig(**SETTINGS | changes | {"seed": seed, "out": out})).iloc[-1]
            model, tokenizer = load(out / "model")
            row = {"model": name, "parameters": sum(p.numel() for p in model.parameters()), "seed": seed}
            rows.append(row | last[["valid_loss", "floor"]].to_dict())
            if seed == SEEDS[0] and "n_embd" not in changes:
                export(HERE / changes["architecture"], model, tokenizer)
    write_text(HERE / "seeds.csv", pd.DataFrame(rows).round(5).to_csv(index=False))
    write_text(HERE / "settings.json", json.dumps({"corpus": PLANTED}) + "\n")


if __name__ == "__main__":
    make_planted()
