"""Measures on five published sets whether senses tell meanings apart; writes a row an instance to wsd-NAME.csv.gz here.

python data/lens/wsd.py --wsd folder --models smollm2-lens demo demo-lens
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from backpack_lib import load
from backpack_lib.analysis import wsd
from backpack_lib.files import written_whole
from backpack_lib.loading import fingerprint

HERE = Path(__file__).resolve().parent


def measure(name: str, folder: str):
    model, tokenizer = load(name)
    instances, candidates = wsd.read_tables(folder)
    rng = np.random.default_rng(0)
    rows = [wsd.answers(alike, rng) for alike in wsd.similarities(model, tokenizer, instances, candidates)]
    table = pd.DataFrame(rows, index=instances["id"]).astype(int).assign(weights=fingerprint(model))
    with written_whole(HERE / f"wsd-{name}.csv.gz") as building:
        table.to_csv(building, compression={"method": "gzip", "mtime": 0})
    by_set = table.drop(columns="weights").groupby(table.index.str.split(".").str[0]).mean()
    print(by_set.T.round(3).to_string())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wsd", required=True, help="folder of instances.tsv.xz and candidates.tsv.xz")
    parser.add_argument("--models", nargs="+", default=["smollm2-lens", "demo", "demo-lens"])
    options = parser.parse_args()
    for model_name in options.models:
        measure(model_name, options.wsd)
