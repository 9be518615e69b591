"""Measurements that go on where they were stopped, by what was measured on which weights."""

import json

import pytest
import torch
from helpers import tiny_model

from backpack_lib.files import cached_json
from backpack_lib.loading import fingerprint


def test_other_weights_have_another_fingerprint():
    model, same, other = (tiny_model(seed, num_senses=2) for seed in (0, 0, 1))
    before = fingerprint(model)
    assert before == fingerprint(same) != fingerprint(other)
    with torch.no_grad():
        model.backpack.gpt2_model.wte.weight[3, 1] += 1e-3
    assert fingerprint(model) != before


def test_a_part_is_made_once_for_the_same_settings(tmp_path):
    made = []

    def make():
        made.append(1)
        return ["ä text", len(made)]

    what = {"strength": 2, "topic": "music"}
    assert cached_json(tmp_path / "new", what, make) == ["ä text", 1]
    assert cached_json(tmp_path / "new", dict(reversed(what.items())), make) == ["ä text", 1]
    assert cached_json(tmp_path / "new", what | {"strength": 3}, make) == ["ä text", 2]
    assert json.loads(next((tmp_path / "new").iterdir()).read_text())["what"]["topic"] == "music"


def test_a_stopped_measurement_goes_on_where_it_was(tmp_path):
    made = []

    def measure(number, stop_at=None):
        def make():
            if number == stop_at:
                raise KeyboardInterrupt
            made.append(number)
            return number

        return cached_json(tmp_path, {"number": number}, make)

    with pytest.raises(KeyboardInterrupt):
        [measure(number, stop_at=2) for number in range(4)]
    assert [measure(number) for number in range(4)] == [0, 1, 2, 3] and made == [0, 1, 2, 3]
    assert len(list(tmp_path.iterdir())) == 4  # and nothing half written
