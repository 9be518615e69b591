"""Trains the sense lenses that are shipped, as `recipe.yaml` says, and puts each into its folder here.

    python data/lens/make.py --corpus "corpus/simple-[01].txt.xz,corpus/part-0.txt.xz" --valid corpus/simple-valid.txt.xz

What was stopped resumes with the same command.
"""

import argparse
from pathlib import Path

import yaml

from backpack_lib import load, train
from backpack_lib.files import runs_folder
from backpack_lib.loading import export
from backpack_lib.training.build import prepare_blocks
from backpack_lib.training.config import TrainingConfig

HERE = Path(__file__).resolve().parent
RUNS = runs_folder() / "lens"


def make_lens(name: str, corpus: str, valid: str | None, seed: int):
    """Trains a lens of the recipe, or resumes it, and ships that of seed 0. Another one stays among the runs."""
    recipe = yaml.safe_load((HERE / "recipe.yaml").read_text(encoding="utf-8"))[name]
    out = RUNS / (f"{name}-seed-{seed}" if seed else name)
    config = TrainingConfig(corpus=corpus, valid_corpus=valid, out=str(out), seed=seed, **recipe)
    blocks = prepare_blocks(config)
    history = train(config, blocks)
    if seed == 0:
        export(HERE / name, load(out / "model")[0])
        history.assign(bytes_per_token=blocks.bytes_per_token).to_csv(HERE / name / "history.csv", index=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lens", nargs="+", choices=["demo", "smollm2"], default=["demo", "smollm2"])
    parser.add_argument("--seed", type=int, default=0, help="another than 0 trains a lens to compare with the shipped")
    parser.add_argument("--corpus", required=True, help="text: paths or globs, commas between them")
    parser.add_argument("--valid", help="its validation text; without it, a part of the text is set aside")
    options = parser.parse_args()
    for lens in options.lens:
        make_lens(lens, options.corpus, options.valid, options.seed)
