"""Short trainings of the demo Backpack that choose its recipe; writes `trials.csv` beside this file.

    python data/demo/trials.py --corpus "corpus/simple-*.txt.xz" --valid corpus/simple-valid.txt.xz \\
        --old "corpus/part-[01].txt.xz" --lexsim lexsim

Each trial differs from the recipe in what its row of `TRIALS` says. Finished ones are not repeated, and one that
was stopped resumes.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
from make import HERE, prepare_demo, recipe, token_vectors, write_start

from backpack_lib.files import exit_status, runs_folder, write_text
from backpack_lib.text.corpora import Blocks, open_corpus, prepare
from backpack_lib.training.config import TrainingConfig
from backpack_lib.training.run import train

TOKENS = 2_000_000  # of each trial, unless it says otherwise
FIFTEEN_MILLION, ALL = 15_000_000, 10**9  # tokens that word2vec reads
STARTS = {
    "usual": None,
    "CBOW, 1 pass over 15 M": {"tokens": FIFTEEN_MILLION, "passes": 1, "skip_gram": False},
    "CBOW, 5 passes over all": {"tokens": ALL, "passes": 5, "skip_gram": False},
    "skip-gram, 1 pass over 15 M": {"tokens": FIFTEEN_MILLION, "passes": 1, "skip_gram": True},
}
MUON = {"optimizer": "muon", "learning_rate": 3e-3}
BASE = {"start": "CBOW, 1 pass over 15 M", "text": "simple", "sequences": 32, "tokens": TOKENS, **MUON}
TRIALS = [  # the most telling ones first
    {},
    {"learning_rate": 6e-3},
    {"start": "CBOW, 5 passes over all"},
    {"text": "a quarter old"},
    {"sequences": 16},
    {"start": "usual"},
    {"start": "skip-gram, 1 pass over 15 M"},
    {"optimizer": "adamw", "learning_rate": 1e-3},
    {"optimizer": "adamw", "learning_rate": 3e-3},
    {"tokens": 10_000_000},
    {"start": "usual", "tokens": 10_000_000},
]


def with_a_quarter(simple: Blocks, old: str, block_size: int) -> Blocks:
    """The same blocks, and a third as many of another text: a quarter of the whole."""
    from datasets import concatenate_datasets

    more = prepare(open_corpus(old), block_size, tokenizer=simple.tokenizer).train
    train = concatenate_datasets([simple.train, more.select(range(len(simple.train) // 3))])
    return replace(simple, train=train, fingerprint=f"{simple.fingerprint} and a third of it old")


def run_trial(trial: dict, texts: dict[str, Blocks], settings: dict, runs: Path) -> dict:
    """Trains one model and returns its row of the table."""
    trial = BASE | trial
    blocks = texts[trial["text"]]
    name = "-".join(str(value).replace(" ", "_").replace(",", "") for value in trial.values())
    steps = round(trial["tokens"] / trial["sequences"] / settings["block_size"])
    config = TrainingConfig(
        corpus="planted",  # only a name here: the blocks are given
        out=str(runs / name),
        **settings
        | {key: trial[key] for key in MUON}
        | {"steps": steps, "batch_size": trial["sequences"], "eval_every": steps},
    )
    if STARTS[trial["start"]]:
        folder = runs / ("start-" + trial["start"].replace(" ", "_").replace(",", ""))
        if not folder.is_dir():
            write_start(
                folder, config, texts["simple"], token_vectors(texts["simple"], config.n_embd, **STARTS[trial["start"]])
            )
        config.init_from = str(folder)
    nats = train(config, blocks)["valid_loss"].iloc[-1]
    return {
        "start": trial["start"],
        "optimiser": {"muon": "Muon + AdamW", "adamw": "AdamW"}[trial["optimizer"]],
        "learning rate": trial["learning_rate"],
        "tokens per step": trial["sequences"] * settings["block_size"],
        "text": trial["text"],
        "tokens (millions)": round(config.steps * trial["sequences"] * settings["block_size"] / 1e6, 2),
        "nats per token": round(nats, 3),
        "bits per byte": round(nats / math.log(2) / texts["simple"].bytes_per_token, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, help="training text: paths or globs, commas between them")
    parser.add_argument("--valid", required=True, help="validation text")
    parser.add_argument("--old", required=True, help="other text, a quarter of the mixed one")
    parser.add_argument("--lexsim", help="folder or URL of the word similarity sets")
    parser.add_argument("--runs", type=Path, default=runs_folder() / "demo-trials")
    given = parser.parse_args()

    def work():
        settings = recipe("cpu")
        settings.pop("start", None)
        simple = prepare_demo(given.corpus, given.valid, given.lexsim, settings)
        texts = {"simple": simple, "a quarter old": with_a_quarter(simple, given.old, settings["block_size"])}
        rows = []
        for trial in TRIALS:
            rows.append(run_trial(trial, texts, settings, given.runs))
            print(rows[-1], flush=True)
            write_text(HERE / "trials.csv", pd.DataFrame(rows).to_csv(index=False))

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
