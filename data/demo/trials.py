"""Short trainings on the plain text that choose its part of the recipe; writes `trials.csv` beside this file.

    python data/demo/trials.py --older "corpus/part-[01].txt.xz" --corpus "corpus/simple-*.txt.xz" \\
        --valid corpus/simple-valid.txt.xz

Each trains the Backpack, as it came from the older text, and differs from the recipe in what its row of `TRIALS`
says. Finished ones are not repeated, and one that was stopped resumes.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
from make import HERE, recipe

from backpack_lib.files import exit_status, runs_folder, write_text
from backpack_lib.text.corpora import Blocks, open_corpus, prepare
from backpack_lib.training.build import prepare_blocks
from backpack_lib.training.config import TrainingConfig
from backpack_lib.training.run import train

STEPS, WARMUP = 120, 10  # of each trial: half a million tokens
TRIALS = [  # what differs from the recipe; `mixed`: a quarter of the text is of the older kind
    {},
    {"learning_rate": 3e-3},
    {"learning_rate": 3e-4},
    {"mixed": True},
    {"batch_size": 8, "steps": 2 * STEPS},
]


def with_a_quarter(plain: Blocks, older: str, block_size: int) -> Blocks:
    """The same blocks, and a third as many of another text: a quarter of the whole."""
    from datasets import concatenate_datasets

    more = prepare(open_corpus(older), block_size, tokenizer=plain.tokenizer).train
    train = concatenate_datasets([plain.train, more.select(range(len(plain.train) // 3))])
    return replace(plain, train=train, fingerprint=f"{plain.fingerprint} and a third of it older")


def run_trial(trial: dict, settings: dict, older: str, runs: Path) -> dict:
    """Trains one model and returns its row of the table. settings: of `TrainingConfig`, the trial's not yet in it."""
    differences = {name: value for name, value in trial.items() if name != "mixed"}
    steps = differences.get("steps", STEPS)
    name = "-".join(f"{key}_{value}" for key, value in trial.items()) or "recipe"
    config = TrainingConfig(
        out=str(runs / name),
        **settings | {"steps": STEPS, "warmup": WARMUP} | differences | {"eval_every": steps, "save_every": steps},
    )
    plain = prepare_blocks(config)
    history = train(config, with_a_quarter(plain, older, config.block_size) if trial.get("mixed") else plain)
    return {
        "optimiser": {"muon": "Muon + AdamW", "adamw": "AdamW"}[config.optimizer],
        "learning rate": config.learning_rate,
        "tokens per step": config.batch_size * config.block_size,
        "text": "a quarter older" if trial.get("mixed") else "plain",
        "tokens (millions)": round(history["tokens"].iloc[-1] / 1e6, 2),
        "nats per token": round(history["valid_loss"].iloc[-1], 3),
        "bits per byte": round(history["valid_loss"].iloc[-1] / math.log(2) / plain.bytes_per_token, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--older", required=True, help="older text: paths or globs, commas between them")
    parser.add_argument("--corpus", required=True, help="plain text")
    parser.add_argument("--valid", required=True, help="validation text, plain too")
    parser.add_argument("--model", type=Path, default=runs_folder() / "demo" / "backpack" / "older-exported")
    parser.add_argument("--runs", type=Path, default=runs_folder() / "demo-trials")
    given = parser.parse_args()

    def work():
        texts = {"corpus": given.corpus, "valid_corpus": given.valid, "init_from": str(given.model)}
        rows = []
        for trial in TRIALS:
            rows.append(run_trial(trial, recipe("cpu")["plain"] | texts, given.older, given.runs))
            print(rows[-1], flush=True)
            write_text(HERE / "trials.csv", pd.DataFrame(rows).to_csv(index=False))

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
