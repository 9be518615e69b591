"""Trains the small models of real text that 06_reading compares: seeds, numbers of senses, and Transformers.

    python data/reading/models.py --corpus "corpus/simple-*.txt.xz" --valid corpus/simple-valid.txt.xz

All read the same tokens; what was stopped resumes. `seed-0` to `seed-2` are shipped here, in half precision; the others
are only measured, by `make.py` beside this file.
"""

import argparse
import sys

from backpack_lib.files import data_folder, runs_folder
from backpack_lib.text.corpora import open_corpus
from backpack_lib.training.config import TrainingConfig
from backpack_lib.training.run import train

sys.path.insert(0, str(data_folder() / "demo"))
from make import studied_words
from whole_words import prepare_with_words

SETTINGS = dict(
    n_layer=3, n_head=4, n_embd=96, num_senses=16, block_size=128, batch_size=32, steps=800, learning_rate=3e-3,
    optimizer="muon", schedule="wsd", warmup=50, eval_every=100, save_every=100, eval_blocks=128, keep_models=True,
    precision="bf16", device="cpu", compile=True,
)  # fmt: skip
VOCABULARY, RUNS = 6000, runs_folder() / "reading"
MODELS = {
    "seed-0": {},
    "seed-1": {"seed": 1},
    "seed-2": {"seed": 2},
    "senses-4": {"num_senses": 4},
    "senses-1": {"num_senses": 1},
    "transformer-0": {"architecture": "transformer"},
    "transformer-1": {"architecture": "transformer", "seed": 1},
}


def train_all(corpus: str, valid: str):
    """Trains the models one after the other, or resumes them."""
    text, valid_text = open_corpus(corpus), open_corpus(valid)
    blocks = prepare_with_words(text, SETTINGS["block_size"], VOCABULARY, studied_words(), valid_text)
    for name, changes in MODELS.items():
        config = TrainingConfig(
            **SETTINGS | changes, vocab_size=VOCABULARY, corpus=corpus, valid_corpus=valid, out=str(RUNS / name)
        )
        history = train(config, blocks)
        print(f"{name}: {history['valid_loss'].iloc[-1]:.3f} nats")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, help="training text: paths or globs, commas between them")
    parser.add_argument("--valid", required=True, help="validation text")
    options = parser.parse_args()
    train_all(options.corpus, options.valid)
