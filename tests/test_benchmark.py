"""What the benchmark compares computes the same, and the README says what was measured. No timings are asserted."""

import importlib
import json
import sys

import pytest
import torch
from helpers import ROOT


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The benchmark at a tiny size, writing into a folder of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "data" / "benchmark"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    script = importlib.import_module("bench")
    monkeypatch.setitem(script.SIZES, "demo", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 500})
    monkeypatch.setitem(script.BATCH["cpu"], "demo", (2, 16))
    monkeypatch.setattr(script, "WRITTEN", 8)
    monkeypatch.setattr(script, "LONG", 16)
    monkeypatch.setattr(script, "HERE", tmp_path)
    yield script
    sys.modules.pop("bench")


def test_the_plain_backpack_computes_the_same(bench):
    models, losses = bench.make_models("demo", 16, "cpu")
    ids = bench.text_like(2, 16, "demo", "cpu")
    torch.testing.assert_close(models["plain"](ids), models["ours"](ids).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(losses["plain"](ids), losses["ours"](ids))
    torch.testing.assert_close(losses["GPT-2"](ids), losses["GPT-2, our loss"](ids))


def test_all_rows_are_measured_and_kept(bench, tmp_path):
    bench.run("cpu", ["demo"], list(bench.ROWS))
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert [row["key"] for row in rows] == list(bench.ROWS)
    for row in rows:
        assert {"plain", "GPT-2"} <= set(row["against"])
        assert all(0 < ratio["least"] <= ratio["ratio"] <= ratio["greatest"] for ratio in row["against"].values())


def test_the_readme_shows_the_rows_as_they_were_measured(bench):
    folder = ROOT / "data" / "benchmark"
    rows = {(row["key"], row["size"]): row for row in json.loads((folder / "cpu.json").read_text())["rows"]}
    for key in bench.ROWS:
        for size in bench.SIZES:
            assert bench.line(rows[key, size]) in (folder / "README.md").read_text()
