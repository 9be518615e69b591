"""Measurements that go on where they were stopped, at equal fluency, with intervals that a slow bootstrap finds too."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from backpack_lib.files import cached_json
from backpack_lib.loading import fingerprint
from backpack_lib.studies.fluency import TEMPERATURES, matched_temperature, success


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


@given(st.floats(2, 9), st.floats(40, 400), st.floats(0.6, 1.4))
def test_the_temperature_of_equal_perplexity_is_found(slope, at_one, temperature):
    """Log-perplexity over temperature: a line with a bend, as measured."""

    def perplexity(t):
        return at_one * math.exp(slope * (t - 1) + (t - 1) ** 2)

    found = matched_temperature(perplexity, perplexity(temperature))
    assert perplexity(found) == pytest.approx(perplexity(temperature), rel=0.1)


def test_a_temperature_out_of_reach_is_the_last_of_the_range():
    assert matched_temperature(lambda t: 1000.0, 2.0) == TEMPERATURES[0]
    assert matched_temperature(lambda t: 10.0, 1e9) == TEMPERATURES[1]


def table(*groups):
    return pd.DataFrame(groups, columns=["on topic", "texts"])


@settings(deadline=None, max_examples=10)
@given(st.lists(st.tuples(st.integers(5, 25), st.integers(30, 60)), min_size=1, max_size=5))
def test_intervals_are_those_of_the_bootstrap_over_texts(groups):
    none = table(*[(25, 60)] * len(groups))
    found = success(table(*groups), none)
    texts = [np.arange(n) < hits for hits, n in [*groups, *[(25, 60)] * len(groups)]]

    def mean(*samples, axis):
        return np.mean([sample.mean(axis) for sample in samples], axis=0)

    def ratio(*samples, axis):
        return mean(*samples[: len(groups)], axis=axis) / mean(*samples[len(groups) :], axis=axis)

    settings = {"vectorized": True, "n_resamples": 4000, "method": "percentile"}
    for statistic, samples, value, low, high, apart in (
        (mean, texts[: len(groups)], "success", "low", "high", 0.035),
        (ratio, texts, "times", "times low", "times high", 0.4),
    ):
        expected = bootstrap(samples, statistic, rng=np.random.default_rng(1), **settings).confidence_interval
        assert found[value] == pytest.approx(statistic(*samples, axis=-1))
        assert found[low] == pytest.approx(expected.low, abs=apart, rel=0.1)
        assert found[high] == pytest.approx(expected.high, abs=apart, rel=0.15)


def test_of_no_success_at_all_there_is_no_multiple():
    found = success(table((3, 10), (0, 10)), table((0, 10), (0, 10)))
    assert found["success"] == 0.15 and math.isnan(found["times"])
    rare = success(table((5, 10)), table((1, 10)))  # whose draws are often none
    assert rare["times"] == pytest.approx(5) and rare["times high"] == math.inf
