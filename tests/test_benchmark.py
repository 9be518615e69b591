"""What the benchmark compares computes the same, and the README says what was measured. No timings are asserted."""

import json
import runpy

import pytest
import torch
from helpers import ROOT

FOLDER = ROOT / "data" / "benchmark"


@pytest.fixture
def bench(tmp_path):
    """The benchmark at a tiny size, writing into a folder of its own."""
    names = runpy.run_path(str(FOLDER / "bench.py"))
    names["SIZES"]["demo"] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 500}
    names["BATCH"]["cpu"]["demo"] = (2, 16)
    names["run"].__globals__.update(WRITTEN=8, LONG=16, ROUNDS=2, HERE=tmp_path)
    return names


def test_the_plain_backpack_computes_the_same(bench):
    models, losses = bench["make_models"]("demo", 16, "cpu")
    ids = bench["text_like"](2, 16, "demo", "cpu")
    torch.testing.assert_close(models["plain"](ids), models["ours"](ids).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(losses["plain"](ids), losses["ours"](ids))
    torch.testing.assert_close(losses["GPT-2"](ids), losses["GPT-2, our loss"](ids))


def test_all_rows_are_measured_and_kept(bench, tmp_path):
    bench["run"]("cpu", ["demo"], list(bench["ROWS"]))
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert [row["key"] for row in rows] == list(bench["ROWS"])
    for row in rows:
        assert {"plain", "GPT-2"} <= set(row["against"])
        assert all(0 < ratio["least"] <= ratio["ratio"] <= ratio["greatest"] for ratio in row["against"].values())


def test_the_readme_shows_the_rows_as_they_were_measured(bench):
    rows = [row for row in json.loads((FOLDER / "cpu.json").read_text())["rows"] if row["key"] in bench["ROWS"]]
    assert len(rows) == len(bench["ROWS"]) * len(bench["SIZES"])
    assert all(bench["line"](row) in (FOLDER / "README.md").read_text() for row in rows)
