"""Models come from a folder or the hub's cache without a network, and from the hub where neither has them."""

import pytest
from transformers import PreTrainedConfig

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


def test_the_hub_is_asked_only_for_what_is_not_here():
    here, elsewhere = Hub(["some/model"]), Hub()
    assert local_first(here, "some/model", dtype="half") == ("some/model", {"dtype": "half"}) and here.calls == ["here"]
    assert local_first(elsewhere, "some/model") == ("some/model", {}) and elsewhere.calls == ["here", "hub"]


def test_a_damaged_folder_is_not_asked_for_at_the_hub(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match="not a valid JSON"):
        local_first(PreTrainedConfig.get_config_dict, str(tmp_path))
    hub = Hub()
    with pytest.raises(OSError):
        local_first(hub, str(tmp_path))
    assert hub.calls == ["here"]
