"""Models come from a folder or the hub's cache without a network, and from the hub where neither has them."""

import time

import pytest

from backpack_lib import hub
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
