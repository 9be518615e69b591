"""Trains the demo model and its baseline, as `recipe.yaml` says, and puts both into this folder.

    python data/demo/make.py --corpus "corpus/simple-*.txt.xz" --valid corpus/simple-valid.txt.xz --lexsim lexsim

Both see the same tokens in the same order and, where the recipe has `start`, begin from the same word2vec vectors
of tokens. What was stopped resumes with the same command.
"""

import argparse
import csv
import json
import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
import yaml
from accelerate.utils import set_seed

from backpack_lib.analysis.similarity import read_sets
from backpack_lib.files import exit_status, runs_folder
from backpack_lib.loading import export, no_progress_bar
from backpack_lib.text.corpora import TOKENIZER_CHARACTERS, Blocks, first_characters, open_corpus, prepare
from backpack_lib.training.build import make_model
from backpack_lib.training.config import ARCHITECTURES, TrainingConfig
from backpack_lib.training.run import train

COMMON_WORDS = 2000  # of the corpus that are single tokens, whatever byte-pair encoding would make of them
OFTEN = 20  # times in the tokenizer's text, from which on a word of the similarity sets is a single token
SPREAD = 0.02  # standard deviation of the numbers in a new embedding, as GPT-2's initialisation has it
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


def count_words(texts: Iterable[str]) -> Counter:
    """How often each word stands after a space."""
    return Counter(word for text in texts for word in re.findall(r"(?<= )[A-Za-z]+", text))


def whole_words(texts: Iterable[str], lexsim: str | None) -> list[str]:
    """Words that shall be single tokens: the studied, the commonest, and the common ones of the similarity sets."""
    counts = count_words(texts)
    rated = []
    for pairs in read_sets(lexsim).values() if lexsim else ():
        rated += [word for word in pd.concat([pairs["word1"], pairs["word2"]]) if counts[word] >= OFTEN]
    return list(dict.fromkeys([*studied_words(), *(word for word, _ in counts.most_common(COMMON_WORDS)), *rated]))


def prepare_demo(corpus: str, valid: str | None, lexsim: str | None, settings: dict) -> Blocks:
    """The blocks of a corpus, with a tokenizer in which every studied, rated and common word is one token."""
    text = open_corpus(corpus)
    return prepare(
        text,
        block_size=settings["block_size"],
        vocab_size=settings["vocab_size"],
        words=whole_words(first_characters(text.read(), TOKENIZER_CHARACTERS), lexsim),
        valid_corpus=open_corpus(valid) if valid else None,
    )


def token_vectors(blocks: Blocks, width: int, tokens: int, passes: int, skip_gram: bool, seed: int = 0) -> torch.Tensor:
    """word2vec vectors of all tokens, centred, of one length, scaled to the spread of a new embedding. -> (V, width)

    tokens: how many of the training text are read, `passes` times; skip_gram: instead of CBOW. A token that is not
    met gets a random direction. One worker, so that the same call gives the same vectors.
    """
    from gensim.models import Word2Vec

    rows = blocks.train.with_format("numpy")[: tokens // len(blocks.train[0]["input_ids"])]["input_ids"]
    sentences = [[str(token) for token in row] for row in rows]
    made = Word2Vec(
        sentences,
        vector_size=width,
        window=5,
        min_count=1,
        sg=skip_gram,
        negative=5,
        epochs=passes,
        workers=1,
        seed=seed,
    ).wv
    vectors = torch.randn(len(blocks.tokenizer), width, generator=torch.Generator().manual_seed(seed))
    met = torch.tensor([int(token) for token in made.index_to_key])
    found = torch.tensor(made.vectors)
    vectors[met] = found - found.mean(0)
    return torch.nn.functional.normalize(vectors) * SPREAD * width**0.5


def write_start(folder: Path, config: TrainingConfig, blocks: Blocks, vectors: torch.Tensor):
    """Writes an untrained model of the configured sizes whose embedding holds these vectors, to start from."""
    if folder.is_dir():
        return
    set_seed(config.seed)
    model = make_model(config, blocks.tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(vectors)
    building = folder.with_name(f"{folder.name}-building")
    shutil.rmtree(building, ignore_errors=True)
    with no_progress_bar():
        model.save_pretrained(building)
    blocks.tokenizer.save_pretrained(building)
    building.rename(folder)


def make_demo(corpus: str, valid: str | None, runs: Path, device: str, lexsim: str | None = None):
    """Trains both models, or resumes them, and exports each once it is done."""
    settings = recipe(device)
    start = settings.pop("start", None)
    blocks = prepare_demo(corpus, valid, lexsim, settings)
    vectors = None
    for architecture in ARCHITECTURES:
        out, first = runs / architecture, runs / f"{architecture}-start"
        config = TrainingConfig(
            corpus=corpus, valid_corpus=valid, out=str(out), architecture=architecture, device=device, **settings
        )
        if start:
            if not first.is_dir():
                vectors = token_vectors(blocks, config.n_embd, **start) if vectors is None else vectors
                write_start(first, config, blocks, vectors)
            config.init_from = str(first)
        history = train(config, blocks)
        export(out, HERE / architecture, also=["history.csv"])
        bits = history["valid_loss"].iloc[-1] / math.log(2) / blocks.bytes_per_token
        print(f"{architecture}: {bits:.3f} bits per byte after {history['tokens'].iloc[-1] / 1e6:.1f} million tokens")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, help="training text: paths or globs, commas between them")
    parser.add_argument("--valid", help="validation text; without it, a part of the corpus is set aside")
    parser.add_argument("--lexsim", help="folder or URL of the word similarity sets, whose common words stay whole")
    parser.add_argument(
        "--runs", type=Path, default=runs_folder() / "demo", help="where the runs and checkpoints are kept"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    return exit_status(lambda: make_demo(given.corpus, given.valid, given.runs, given.device, given.lexsim))


if __name__ == "__main__":
    sys.exit(main())
