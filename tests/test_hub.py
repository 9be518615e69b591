"""Models come from a folder or the hub's cache without a network, and from the hub where neither has them."""

import time
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from transformers.utils import hub as hub_of_transformers

from backpack_lib import hub, load
from backpack_lib.files import data_folder
from backpack_lib.hub import local_first


class Hub:
    """A `from_pretrained` that notes how it is called. cached: what it finds without a network."""

    def __init__(self, cached=()):
        self.cached = cached
        self.calls = []

    def __call__(self, name, local_files_only=False, **settings):
        self.calls.append("here" if local_files_only else "hub")
        if local_files_only and name not in self.cached:
            raise OSError(f"{name} is not in the cache")
        return name, settings


def test_the_hub_is_asked_only_for_what_is_not_here(monkeypatch):
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    here, elsewhere = Hub(["some/model"]), Hub()
    assert local_first(here, "some/model", dtype="half") == ("some/model", {"dtype": "half"}) and here.calls == ["here"]
    assert local_first(elsewhere, "some/model") == ("some/model", {}) and elsewhere.calls == ["here", "hub"]


def test_a_damaged_folder_is_not_asked_for_at_the_hub(tmp_path):
    loader = Hub()
    with pytest.raises(OSError):
        local_first(loader, str(tmp_path))
    assert loader.calls == ["here"]


def test_without_a_network_nothing_is_asked_for_and_nothing_waits(monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "https://nowhere.invalid")
    hub.hub_answers.cache_clear()
    loader, start = Hub(), time.monotonic()
    with pytest.raises(OSError, match="is not in the cache"):
        local_first(loader, "some/model")
    with hub.offline_without_hub():
        assert hub.constants.HF_HUB_OFFLINE
    assert loader.calls == ["here"] and time.monotonic() - start < 2 * hub.PATIENCE
    assert not hub.constants.HF_HUB_OFFLINE
    hub.hub_answers.cache_clear()


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
