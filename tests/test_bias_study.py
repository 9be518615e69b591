"""The study of bias: its rows are what the edited models say, its comparisons are paired, and it resumes."""

import json
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest

from backpack_lib import load
from backpack_lib.analysis import bias
from backpack_lib.files import data_folder
from backpack_lib.lessons import bias as of_bias
from backpack_lib.lessons.opening import open_lesson
from backpack_lib.studies.bias_study import AS_IT_IS, OFFSET, BiasStudy, change_of, compare, methods_table, odds_of


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    (model, tokenizer), (transformer, _) = load("planted"), load("planted-transformer")
    prompts = json.loads((data_folder() / "prompts.json").read_text())["planted"]
    names = ["nurse", "guard", "baker", "cook", "pilot", "judge", "singer", "tailor"]
    found = bias.localize(model, tokenizer, names, prompts["fit"], permutations=99)
    folder = tmp_path_factory.mktemp("bias")
    return BiasStudy(model, transformer, tokenizer, names, prompts["fit"], prompts["test"], found, folder)


@pytest.fixture(scope="module")
def rows(study):
    return study.run()


def test_rows_are_what_the_edited_models_say(study, rows):
    of = (study.backpack, study.tokenizer, study.professions, study.test)

    def measured():
        odds = bias.log_odds(*of)
        return odds.sort_index()[sorted(odds)].to_numpy()

    np.testing.assert_allclose(odds_of(rows, "Backpack", AS_IT_IS), measured(), atol=1e-4)
    with bias.debias(study.backpack, study.tokenizer, study.professions, study.senses).applied():
        removed = measured()
    np.testing.assert_allclose(odds_of(rows, "Backpack", "removed"), removed, atol=1e-4)
    along = odds_of(rows, "Backpack", "removed, along")
    np.testing.assert_allclose(along, removed, atol=1e-3)
    fitting = bias.log_odds(study.backpack, study.tokenizer, study.professions, study.fit).to_numpy()
    offset = odds_of(rows, "Backpack", AS_IT_IS) - fitting.mean()
    np.testing.assert_allclose(odds_of(rows, "Backpack", OFFSET), offset, atol=1e-4)
    assert len(rows) == rows.groupby(["model", "method"]).ngroups * len(study.professions) * len(study.test)


def test_a_bias_study_resumes_and_is_the_same(study, rows, monkeypatch):
    monkeypatch.setattr(bias, "kl_of_other_words_each", None)  # nothing is measured anew
    pd.testing.assert_frame_equal(study.run(), rows)


def test_the_best_subset_is_the_best_of_all(study):
    one = study.best_subset(1)
    ratios = [bias.ratio(study.fitting.scaled([l], 0.0)) for l in range(8)]
    assert one == [int(np.argmin(ratios))]
    pairs = {(a, b): bias.ratio(study.fitting.scaled([a, b], 0.0)) for a in range(8) for b in range(a)}
    assert tuple(sorted(study.best_subset(2))) == tuple(sorted(min(pairs, key=pairs.get)))


def test_random_senses_are_one_row_of_their_mean(study, rows):
    table = methods_table(rows, resamples=50)
    (name,) = [method for model, method in table.index if "at random" in method]
    draws = rows[rows["method"].str.startswith(name)]
    assert draws["method"].nunique() == 20 and name == f"{len(study.senses)} senses at random"
    slow = np.mean([bias.ratio(odds_of(rows, "Backpack", method)) for method in draws["method"].unique()])
    assert table.loc[("Backpack", name), "ratio"] == pytest.approx(slow)
    assert table.loc[("Backpack", "removed"), "excess removed"] > table.loc[("Backpack", name), "excess removed"]


def test_a_method_is_compared_with_itself_and_with_a_better_one(rows):
    same = compare(rows, ("Backpack", "removed"), ("Backpack", "removed, along"), resamples=100)
    assert same["difference"] == pytest.approx(0, abs=1e-3) and same["high"] - same["low"] < 1e-2
    better = compare(rows, ("Backpack", "removed"), ("Backpack", AS_IT_IS), resamples=200)
    assert better["low"] > 0.3  # narrow, though each excess varies from profession to profession
    changed = change_of(np.ones((5, 3)), np.ones((5, 3)) * 2, resamples=50)
    assert changed["difference"] == pytest.approx(np.e**2 - np.e) == changed["low"] == changed["high"]


def test_senses_are_chosen_on_other_professions(study):
    found = study.held_out_professions()
    assert sorted(found["profession"].unique()) == sorted(study.professions)
    assert len(found) == len(study.professions) * len(study.test)
    first = found.iloc[0]
    p, senses = study.professions.index(first["profession"]), json.loads(first["senses"])
    assert first["after"] == pytest.approx(study.testing.scaled(senses, 0.0)[p, study.test.index(first["template"])])


def test_references_are_asked_of_models_that_can_read_them(tmp_path):
    lesson = open_lesson("04_gender_bias", "demo", str(tmp_path))
    whom = of_bias.references(lesson, {"as it is": nullcontext})
    assert len(whom) == 80 and whom["given"].sum() == 40 and whom["shift"].notna().all()
    assert whom.loc[whom["given"], "right"].isin([True, False]).all() and whom.loc[~whom["given"], "right"].isna().all()
    short = open_lesson("04_gender_bias", "planted", str(tmp_path))
    whom = of_bias.references(short, {"as it is": None})
    assert whom["shift"].isna().all() and "too short" in of_bias.references_finding(whom["right"], whom["shift"])
