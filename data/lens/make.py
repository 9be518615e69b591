"""Trains the sense lenses that are shipped, as `recipe.yaml` says, and puts each into its folder here.

    python data/lens/make.py --corpus "corpus/simple-[01].txt.xz,corpus/part-0.txt.xz" --valid corpus/simple-valid.txt.xz

What was stopped resumes with the same command.
"""

import argparse
import sys
from pathlib import Path

import yaml

from backpack_lib import load, train
from backpack_lib.files import exit_status, runs_folder
from backpack_lib.loading import export
from backpack_lib.training.build import prepare_blocks
from backpack_lib.training.config import TrainingConfig

HERE = Path(__file__).resolve().parent


def make_lens(name: str, corpus: str, valid: str | None, runs: Path, **changes):
    """Trains a lens of the recipe, or resumes it, and puts it into its folder once it is done.

    changes: settings to use instead of the recipe's. With a `seed` above 0 the lens stays among the runs.
    """
    settings = yaml.safe_load((HERE / "recipe.yaml").read_text(encoding="utf-8"))[name] | changes
    seed = settings.get("seed", 0)
    out = runs / (f"{name}-seed-{seed}" if seed else name)
    config = TrainingConfig(corpus=corpus, valid_corpus=valid, out=str(out), **settings)
    blocks = prepare_blocks(config)
    history = train(config, blocks).assign(bytes_per_token=blocks.bytes_per_token)
    if seed:  # to be compared with the one that is shipped
        return
    lens, _ = load(f"{config.out}/model")
    export(HERE / name, lens)
    history.to_csv(HERE / name / "history.csv", index=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lens", choices=["smollm2", "demo"], help="only this one; otherwise both, the small one first"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another one trains a second lens, to compare with the first"
    )
    parser.add_argument("--corpus", required=True, help="text: paths or globs, commas between them")
    parser.add_argument("--valid", help="its validation text; without it, a part of the text is set aside")
    parser.add_argument("--runs", type=Path, default=runs_folder() / "lens", help="where runs and checkpoints are kept")
    given = parser.parse_args()

    def work():
        for name in [given.lens] if given.lens else ["demo", "smollm2"]:
            make_lens(name, given.corpus, given.valid, given.runs, seed=given.seed)

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
