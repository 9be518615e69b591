"""Models come from a folder or the hub's cache without a network, and from the hub where neither has them."""

import time
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, constants
from transformers.utils import hub as hub_of_transformers

from backpack_lib import load
from backpack_lib.files import data_folder
from backpack_lib.hub import PATIENCE, local_first, offline_without_hub
from backpack_lib.text.corpora import open_corpus


def test_the_hub_is_asked_only_for_what_is_not_here(tmp_path):
    calls = []

    def from_pretrained(name, local_files_only=False):
        calls.append("here" if local_files_only else "hub")
        if local_files_only and name != "cached":
            raise OSError(f"{name} is not in the cache")

    local_first(from_pretrained, "cached")
    assert calls == ["here"]
    with pytest.raises(OSError):  # a damaged folder
        local_first(from_pretrained, str(tmp_path))
    assert calls == ["here"] * 2
    local_first(from_pretrained, "elsewhere")
    assert calls == ["here"] * 3 + ["hub"]


def test_without_a_network_nothing_waits(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://nowhere.invalid")
    offline_without_hub.cache_clear()
    start = time.monotonic()
    for missing in (load, open_corpus):
        with pytest.raises(ValueError, match="'no/thing'"):
            missing("no/thing")
    assert time.monotonic() - start < 2 * PATIENCE
    offline_without_hub.cache_clear()


@pytest.mark.parametrize("name, folder", [("demo", "demo/backpack"), ("demo-lens", "lens/demo")])
def test_a_model_goes_to_the_hub_with_its_card_and_comes_back_the_same(tmp_path, monkeypatch, name, folder):
    def keep_files(self, repo_id, operations, **_):
        for operation in operations:
            with operation.as_file() as file:
                (tmp_path / operation.path_in_repo).write_bytes(file.read())

    load_card = hub_of_transformers.ModelCard.load
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "create_commit", keep_files)
    monkeypatch.setattr(hub_of_transformers.ModelCard, "load", lambda *_, **__: load_card(tmp_path / "README.md"))
    card = (data_folder() / folder / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(card, encoding="utf-8")  # as `hf upload me/mine README.md` would
    model, tokenizer = load(name)
    model.push_to_hub("me/mine")
    tokenizer.push_to_hub("me/mine")
    again, _ = load(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    on_hub = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "license: cc-by-sa-4.0" in on_hub and on_hub.endswith(card.partition("# ")[2])
