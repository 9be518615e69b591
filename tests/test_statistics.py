"""Measurements resume where they were stopped, by what was measured on which weights; intervals are scipy's."""

import json

import numpy as np
import pytest
import torch
from helpers import tiny_model
from scipy import stats

from backpack_lib.analysis.statistics import bootstrap
from backpack_lib.files import cached_json
from backpack_lib.loading import fingerprint


def test_other_weights_have_another_fingerprint():
    model, same, other = (tiny_model(seed, num_senses=2) for seed in (0, 0, 1))
    before = fingerprint(model)
    assert before == fingerprint(same) != fingerprint(other)
    with torch.no_grad():
        model.backpack.gpt2_model.wte.weight[3, 1] += 1e-3
    assert fingerprint(model) != before


def test_a_part_is_made_once_for_the_same_settings_and_never_kept_half(tmp_path):
    made = []

    def measure(stop=False, **what):
        def make():
            if stop:
                raise KeyboardInterrupt
            made.append(what)
            return ["ä text", len(made)]

        return cached_json(tmp_path / "new", what, make)

    assert measure(strength=2, topic="music") == measure(topic="music", strength=2) == ["ä text", 1]
    with pytest.raises(KeyboardInterrupt):
        measure(strength=3, topic="music", stop=True)
    assert measure(strength=3, topic="music") == ["ä text", 2] and len(made) == 2
    files = list((tmp_path / "new").iterdir())
    assert [json.loads(file.read_text())["what"]["topic"] for file in files] == ["music"] * 2


def test_intervals_agree_with_scipys_where_only_professions_vary():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, 1)) + np.zeros((1, 8))
    ours = bootstrap(lambda x: x.mean(), values, axes=2, resamples=4000)
    scipys = stats.bootstrap((values[:, 0],), np.mean, method="percentile", n_resamples=4000, rng=rng)
    np.testing.assert_allclose(ours, scipys.confidence_interval, atol=0.03)
    templates = rng.normal(size=(1, 8)) + np.zeros((40, 1))
    low, high = bootstrap(lambda x: x.mean(), templates, axes=2)
    assert high - low > 0.5  # few templates that differ are little evidence, however many professions there are
