"""Measurements that go on where they were stopped, at equal fluency, with intervals that a slow bootstrap finds too."""

import json
import math

import pytest
import torch
from helpers import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from backpack_lib.files import cached_json
from backpack_lib.loading import fingerprint
from backpack_lib.studies.fluency import TEMPERATURES, search_temperature


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


@given(st.floats(1, 9), st.floats(40, 400), st.floats(0.6, 1.4))
def test_the_temperature_of_equal_perplexity_is_found(slope, at_one, temperature):
    """Log-perplexity over temperature: a line with a bend, as measured."""

    def perplexity(t):
        return at_one * math.exp(slope * (t - 1) + (t - 1) ** 2)

    tried = search_temperature(perplexity, perplexity(temperature), trials=8)
    last = list(tried)[-1]
    assert tried[last] == pytest.approx(perplexity(temperature), rel=0.05)
    assert len(tried) == 1 or all(abs(math.log(p / perplexity(temperature))) > 0.047 for p in list(tried.values())[:-1])


def test_a_perplexity_out_of_reach_is_sought_up_to_the_ends():
    for wanted, end in ((2.0, TEMPERATURES[0]), (1e9, TEMPERATURES[1])):
        tried = search_temperature(lambda t: 100.0 + t, wanted, trials=12)
        assert list(tried)[-1] == end and len(tried) < 12  # and not beyond, nor twice
