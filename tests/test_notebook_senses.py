"""02_senses under other parameters than its own."""

import json

import pandas as pd

from backpack_lib import load
from backpack_lib.analysis.similarity import SETS
from backpack_lib.loading import is_planted
from backpack_lib.running.notebook import run_notebook


def test_senses_of_the_trained_backpack_hold_the_planted_meanings(planted_run, tmp_path):
    for name, senses in (("planted", 8), ("planted-transformer", 0)):
        assert getattr(load(name)[0].config, "num_senses", 0) == senses and is_planted(name)
    folder = next(planted_run.copy.parent.glob("backpack-*")) / "model"
    for number, name in enumerate(("planted", str(folder))):
        outcome = run_notebook("02_senses", {"model": name, "out": str(tmp_path / str(number))})
        assert not outcome.failed, outcome.result
        results = json.loads((tmp_path / str(number) / "results.json").read_text())
        assert results["planted meanings found"] > 0.9 and results["residual"] < 1e-4
        assert f"planted meanings found {results['planted meanings found']:.0%}" in outcome.result


def test_senses_with_words_texts_and_sets_of_ones_own(tmp_path):
    pairs = [("king", "queen", 8), ("film", "movie", 9), ("river", "film", 1), ("music", "band", 7), ("city", "war", 2)]
    pairs = [(a, b, score + number / 10) for number in range(6) for a, b, score in pairs]
    pd.DataFrame(pairs).to_csv(tmp_path / SETS["RG-65"].file, sep=";", header=False, index=False)
    (tmp_path / "own.txt").write_text("The king and his wife moved to the city of London.\n\n" * 40)
    given = {"word": "king", "other": "queen", "text": "The king and his", "lexsim": str(tmp_path)}
    given |= {"corpus": str(tmp_path / "own.txt"), "out": str(tmp_path / "out")}
    outcome = run_notebook("02_senses", given)
    assert not outcome.failed, outcome.result
    made = {file.name for file in (tmp_path / "out").iterdir()}
    assert made >= {"contributions.csv", "silenced.csv", "roles.csv", "similarity.csv", "edits.safetensors"}
    assert (
        pd.read_csv(tmp_path / "out" / "similarity.csv").shape[0] == 2
    )  # the Backpack and its Transformer, on one set


def test_without_a_trained_model_or_with_an_unknown_word_the_notebook_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKPACK_RUNS", str(tmp_path))
    outcome = run_notebook("02_senses", {"model": "planted"})
    assert outcome.failed and "run the notebook 01_training first" in outcome.result
    outcome = run_notebook("02_senses", {"word": "…"})
    assert outcome.failed and "'…' is no word" in outcome.result
