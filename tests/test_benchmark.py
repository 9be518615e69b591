"""What the benchmark compares computes the same, and the README says what was measured. No timings are asserted."""

import importlib
import json
import sys

import pytest
import torch
from helpers import ROOT
from torch.utils.flop_counter import FlopCounterMode

TINY = dict(n_embd=32, n_layer=2, n_head=2, vocab_size=500)


@pytest.fixture
def script(monkeypatch):
    """The benchmark, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "data" / "benchmark"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield importlib.import_module("bench")
    sys.modules.pop("bench")


@pytest.fixture
def bench(script, monkeypatch, tmp_path):
    """The benchmark at a tiny size, writing into a folder of its own."""
    monkeypatch.setitem(script.SIZES, "demo", TINY)
    monkeypatch.setitem(script.BATCH["cpu"], "demo", (2, 16))
    monkeypatch.setattr(script, "HERE", tmp_path)
    monkeypatch.setattr(script, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("before\n<!-- cpu -->\nold\n<!-- end cpu -->\nafter\n")
    return script


def test_the_plain_backpack_computes_the_same(bench):
    models = bench.make_models("demo", 16, "cpu")
    ids = bench.text_like(2, 16, "demo", "cpu")
    torch.testing.assert_close(models["plain"](ids), models["ours"](ids).logits, atol=1e-4, rtol=1e-4)
    losses = bench.make_losses(models)
    torch.testing.assert_close(losses["plain"](ids), losses["ours"](ids))
    torch.testing.assert_close(losses["GPT-2"](ids), losses["GPT-2, our loss"](ids))


def test_generation_writes_the_text_that_is_dictated(bench):
    text = bench.text_like(2, 9, "demo", "cpu")
    model = bench.make_models("demo", 9, "cpu")["ours"]
    made = model.generate(
        text[:, :1], max_new_tokens=8, do_sample=False, eos_token_id=None, logits_processor=[bench.Dictated(text)]
    )
    assert torch.equal(made, text)


def test_flops_are_those_that_are_counted(bench):
    """The formula looks at half of all earlier positions, transformers' attention at all of them."""
    models, ids = bench.make_models("demo", 16, "cpu", training=True), torch.arange(32).view(2, 16)
    d, attention = TINY["n_embd"], 6 * 2 * 2 * TINY["n_embd"] * 16 / 2
    mixing = 6 * (d // 16 * 16 + 16 * d) * 16 / 2
    expected = bench.flops_per_token("demo", 16, distinct=1.0)
    losses = bench.make_losses(models)
    for name, loss, whole in (("GPT-2", losses["GPT-2"], attention), ("ours", losses["plain"], attention + mixing)):
        with FlopCounterMode(display=False) as counter:
            loss(ids).backward()
        assert counter.get_total_flops() / 32 == pytest.approx(expected[name] + whole, rel=0.05)


@pytest.mark.slow
def test_all_rows_are_measured_and_written(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "LENGTHS", (16,))
    rows = {key: row for key, row in bench.ROWS.items() if not key.startswith(("memory", "generation"))}
    rows["memory-16"] = ("peak memory", lambda size, device: bench.peak_memory(size, device, 16))
    rows["generation"] = ("generation", lambda size, device: bench.generation(size, device, 1, 4))
    monkeypatch.setattr(bench, "ROWS", rows)
    bench.run("cpu", ["demo"], list(rows))
    table = json.loads((tmp_path / "cpu.json").read_text())
    assert [row["key"] for row in table["rows"]] == list(rows)
    for row in table["rows"]:
        for found in row["against"].values():
            assert 0 < found["least"] <= found["ratio"] <= found["greatest"]
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("\nafter\n") and "old" not in readme
    assert "| training step | demo |" in readme


def test_readme_shows_the_tables_as_they_were_measured(script):
    readme = script.README.read_text()
    assert script.with_tables(readme) == readme
    measured = [json.loads(file.read_text())["rows"] for file in script.HERE.glob("*.json")]
    assert measured
    for rows in measured:
        assert {(row["key"], row["size"]) for row in rows} == {
            (key, size) for key in script.ROWS for size in script.SIZES
        }
