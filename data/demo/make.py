"""Trains the demo model and its baseline, as `recipe.yaml` says, and puts both into this folder.

    python data/demo/make.py --corpus "corpus/part-*.txt.xz" --valid corpus/valid.txt.xz

Both see the same tokens in the same order. What was stopped goes on where it was with the same command.
"""

import argparse
import csv
import json
import math
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
import yaml

from backpack_lib.config import ARCHITECTURES, TrainingConfig
from backpack_lib.corpora import TOKENIZER_CHARACTERS, Blocks, first_characters, open_corpus, prepare
from backpack_lib.errors import exit_status
from backpack_lib.loading import load, no_progress_bar
from backpack_lib.paths import runs_folder
from backpack_lib.training import train

COMMON_WORDS = 2000  # of the corpus that are single tokens, whatever byte-pair encoding would make of them
HERE = Path(__file__).resolve().parent


def recipe(device: str) -> dict:
    """The settings of `TrainingConfig` that make the demo models on a device, "cuda" or "cpu"."""
    parts = yaml.safe_load((HERE / "recipe.yaml").read_text())
    return parts["both"] | parts[device]


def studied_words() -> list[str]:
    """Words that the notebooks study: professions, pronouns and words like them, and those of the topics."""
    words = (HERE / "words.txt").read_text().split()
    with open(HERE.parent / "professions.csv", newline="") as file:
        words += [word for row in csv.DictReader(file) for word in row["profession"].split()]
    for topic in json.loads((HERE.parent / "topics.json").read_text()):
        words += [*re.findall(r"\w+", topic["name"]), *topic["steer"], *topic["words"]]
    return list(dict.fromkeys(words))


def common_words(texts: Iterable[str], n: int = COMMON_WORDS) -> list[str]:
    """The n commonest words, as they are written after a space."""
    counts = Counter(word for text in texts for word in re.findall(r"(?<= )[A-Za-z]+", text))
    return [word for word, _ in counts.most_common(n)]


def prepare_demo(corpus: str, valid: str | None, settings: dict) -> Blocks:
    """The blocks of a corpus, with a tokenizer in which every studied and every common word is one token."""
    text = open_corpus(corpus)
    words = dict.fromkeys([*studied_words(), *common_words(first_characters(text.read(), TOKENIZER_CHARACTERS))])
    return prepare(
        text,
        block_size=settings["block_size"],
        vocab_size=settings["vocab_size"],
        words=words,
        valid_corpus=open_corpus(valid) if valid else None,
    )


def export(run: Path, target: Path):
    """Copies a finished run's model in half precision, its tokenizer and its history. Each file is there whole or not."""
    model, tokenizer = load(run / "model")
    with tempfile.TemporaryDirectory(dir=target.parent) as building, no_progress_bar():
        model.half().save_pretrained(building)
        tokenizer.save_pretrained(building)
        shutil.copy(run / "history.csv", building)
        target.mkdir(exist_ok=True)
        for file in Path(building).iterdir():
            file.chmod(0o644)  # weights and temporary files are written for the owner alone
            file.replace(target / file.name)


def make_demo(corpus: str, valid: str | None, runs: Path, device: str):
    """Trains both models, or goes on with them, and exports each once it is done."""
    settings = recipe(device)
    blocks = prepare_demo(corpus, valid, settings)
    for architecture in ARCHITECTURES:
        run = runs / architecture
        config = TrainingConfig(
            corpus=corpus, valid_corpus=valid, out=str(run), architecture=architecture, device=device, **settings
        )
        history = train(config, blocks)
        export(run, HERE / architecture)
        bits = history["valid_loss"].iloc[-1] / math.log(2) / blocks.bytes_per_token
        print(f"{architecture}: {bits:.3f} bits per byte after {history['tokens'].iloc[-1] / 1e6:.1f} million tokens")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, help="training text: paths or globs, commas between them")
    parser.add_argument("--valid", help="validation text; without it, a part of the corpus is set aside")
    parser.add_argument(
        "--runs", type=Path, default=runs_folder() / "demo", help="where the runs and checkpoints are kept"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    return exit_status(lambda: make_demo(given.corpus, given.valid, given.runs, given.device))


if __name__ == "__main__":
    sys.exit(main())
