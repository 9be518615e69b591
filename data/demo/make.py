"""Trains the demo model and its baseline, as `recipe.yaml` says, and puts both into this folder.

    python data/demo/make.py --older "corpus/part-*.txt.xz" --older-valid corpus/valid.txt.xz \\
        --corpus "corpus/simple-*.txt.xz" --valid corpus/simple-valid.txt.xz

They learn from an older text first (an encyclopedia, film reviews), then from plain English. Both see the same tokens
in the same order. What was stopped resumes with the same command.
"""

import argparse
import json
import math
import re
from collections import Counter
from pathlib import Path

import pandas as pd
import torch
import yaml
from whole_words import prepare_with_words

from backpack_lib.files import runs_folder, write_text
from backpack_lib.loading import export, load
from backpack_lib.text.corpora import TOKENIZER_CHARACTERS, Blocks, first_characters, open_corpus
from backpack_lib.training.build import prepare_blocks
from backpack_lib.training.config import ARCHITECTURES, TrainingConfig
from backpack_lib.training.run import train

COMMON_WORDS = 2000  # of the corpus that are single tokens, whatever byte-pair encoding would make of them
HERE = Path(__file__).resolve().parent


def recipe(device: str) -> dict[str, dict]:
    """The settings of `TrainingConfig` for each text, in order, that make the demo models on "cuda" or "cpu"."""
    parts = yaml.safe_load((HERE / "recipe.yaml").read_text())
    return {text: parts["both"] | settings for text, settings in parts[device].items()}


def studied_words() -> list[str]:
    """Words that the notebooks study: professions, pronouns and words like them, and those of the topics."""
    words = (HERE / "words.txt").read_text().split()
    words += " ".join(pd.read_csv(HERE.parent / "professions.csv")["profession"]).split()
    for topic in json.loads((HERE.parent / "topics.json").read_text()):
        words += [*re.findall(r"\w+", topic["name"]), *topic["steer"], *topic["words"]]
    return list(dict.fromkeys(words))


def prepare_demo(corpus: str, valid: str | None, settings: dict) -> Blocks:
    """The blocks of a corpus, with a tokenizer in which every studied and every common word is one token."""
    text, counts = open_corpus(corpus), Counter()
    for document in first_characters(text.read(), TOKENIZER_CHARACTERS):
        counts.update(re.findall(r"(?<= )[A-Za-z]+", document))
    words = list(dict.fromkeys([*studied_words(), *(word for word, _ in counts.most_common(COMMON_WORDS))]))
    return prepare_with_words(text, settings["block_size"], settings["vocab_size"], words, valid and open_corpus(valid))


def train_on_each(texts: dict, runs: Path, device: str, architecture: str) -> tuple[Path, pd.DataFrame]:
    """Trains a model on one text after the other, or resumes. -> the folder of the last model, and its history

    texts: corpus and validation text, or None, by the name of each in the recipe.
    """
    model, histories = None, []
    for name, settings in recipe(device).items():
        corpus, valid = texts[name]
        out = runs / architecture / name
        places = {"corpus": corpus, "valid_corpus": valid, "out": str(out), "init_from": model and str(model)}
        config = TrainingConfig(**places, architecture=architecture, device=device, **settings)
        blocks = prepare_blocks(config) if model else prepare_demo(corpus, valid, settings)
        histories.append(train(config, blocks).assign(text=name, bytes_per_token=blocks.bytes_per_token))
        model = out.with_name(f"{name}-exported")
        export(model, *load(out / "model"))
    return model, pd.concat(histories)


def make_demo(texts: dict[str, tuple[str, str | None]], runs: Path, device: str):
    """Trains both models, or resumes them, and puts each into this folder once it is done."""
    for architecture in ARCHITECTURES:
        model, history = train_on_each(texts, runs, device, architecture)
        export(HERE / architecture, *load(model))
        write_text(HERE / architecture / "history.csv", history.to_csv(index=False))
        tokens, last = history.groupby("text")["tokens"].max().sum(), history.iloc[-1]
        bits = last["valid_loss"] / math.log(2) / last["bytes_per_token"]
        print(f"{architecture}: {bits:.3f} bits per byte after {tokens / 1e6:.1f} million tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--older", required=True, help="text that is read first: paths or globs, commas between them")
    parser.add_argument("--older-valid", help="its validation text; without it, a part of the text is set aside")
    parser.add_argument("--corpus", required=True, help="plain text, which is read then")
    parser.add_argument("--valid", help="its validation text")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    both = {"older": (options.older, options.older_valid), "plain": (options.corpus, options.valid)}
    make_demo(both, runs_folder() / "demo", options.device)
