"""Teaching by examples: which senses, the convex fit, the bound, and the same by all weights and LoRA."""

import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from backpack_lib import SenseEdits
from backpack_lib.analysis import finetuning as ft
from backpack_lib.files import data_folder
from backpack_lib.studies import knowledge_study
from backpack_lib.studies.knowledge_study import split_examples, teach_sets
from backpack_lib.text import planted
from backpack_lib.text.writing import ids_of_text

MOVES = ft.read_examples(data_folder() / "planted" / "canonical.csv")


@pytest.fixture(scope="module")
def background(models):
    return ft.rows_of_texts(models[0], models[2], [text.text for text in planted.generate(12, seed=77)])


@pytest.fixture(scope="module")
def examples(models):
    table = MOVES[MOVES["set"] == "zoo → law"]
    return ft.make_examples(models[2], table[table["use"] == "fit"].head(6), "fit")


@pytest.mark.parametrize("kind", ft.KINDS)
def test_losses_and_successes_are_those_of_their_kind(kind, monkeypatch):
    log_probs = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    examples = ft.Examples(kind, ["a", "b", "c"], torch.tensor([1, 2, 3]), torch.tensor([[4, 5]] * 3))
    monkeypatch.setattr(ft, "next_log_probabilities", lambda *_: log_probs)
    for n in range(3):
        target, best = log_probs[n, n + 1].item(), max(log_probs[n, 4].item(), log_probs[n, 5].item())
        loss = {"say": -target, "prefer": math.log1p(math.exp(best - target)), "balance": (target - best) ** 2}[kind]
        solved = abs(target - best) < math.log(1.5) if kind == "balance" else target > best
        assert examples.losses(log_probs)[n].item() == pytest.approx(loss, abs=1e-5)
        assert bool(examples.solved_by(None, None)[n]) == solved


def test_mean_weights_are_those_of_all_places(models, background):
    model, rows = models[0], background[:3]
    slow, places = torch.zeros(model.config.vocab_size, model.config.num_senses), 0
    for row in rows:
        with torch.no_grad():
            alpha = model(torch.tensor([row]), output_senses=True).contextualization[0]  # (k, T, T)
        for i in range(len(row)):
            for j in range(i + 1):
                slow[row[j]] += alpha[:, i, j]
            places += 1
    torch.testing.assert_close(ft.mean_weights(model, rows), slow / places, atol=1e-5, rtol=1e-4)


def test_pairs_are_those_with_most_weight_above_the_background(models, background, examples):
    model, _, tokenizer = models
    mean = ft.mean_weights(model, background)
    texts, _ = ft.weights_and_logits(model, tokenizer, examples.prompts[:1])
    ids = ids_of_text(tokenizer, examples.prompts[0])
    with torch.no_grad():
        alpha = model(torch.tensor([ids]), output_senses=True).contextualization[0, :, -1]  # (k, T)
    weights = {}
    for j, token in enumerate(ids):
        for l in range(model.config.num_senses):
            weights[token, l] = weights.get((token, l), 0.0) + alpha[l, j].item()
    best = sorted(weights, key=lambda pair: weights[pair] - 50.0 * mean[pair].item(), reverse=True)[:4]
    pairs = ft.choose_pairs(texts, mean, 4, 50.0)
    assert set(pairs) == set(best)
    expected = [[weights[pair] for pair in pairs] + [0.0]]
    elsewhere = (next(token for token in range(len(mean)) if token not in ids), 0)
    np.testing.assert_allclose(ft.weights_of_pairs(texts, [*pairs, elsewhere]), expected, atol=1e-5)


def test_the_fit_is_at_a_minimum_of_a_convex_loss(models, background, examples, monkeypatch):
    """Steps in any direction make the stated objective worse."""
    model, _, tokenizer = models
    for name, value in {"KL_OF_SENSES": 2.0, "RIDGE": 1e-2, "FIT_STEPS": 300}.items():
        monkeypatch.setattr(ft, name, value)
    taught = ft.SenseTeaching(model, tokenizer, examples, background)
    n_tokens = sum(len(row) - 1 for row in background)

    def log_probs(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def objective(added):
        edits = SenseEdits(model, tokenizer)
        for (token, sense), vector in zip(taught.pairs, added):
            edits.add(token, sense, vector)
        with edits.applied():
            last = [log_probs(ids_of_text(tokenizer, prompt))[-1] for prompt in examples.prompts]
            after = [log_probs(row) for row in background]
        before = [log_probs(row) for row in background]
        divergence = sum((p.exp() * (p - q)).sum().item() for p, q in zip(before, after)) / n_tokens
        return examples.losses(torch.stack(last)).mean().item() + 1e-2 * added.square().sum().item() + 2.0 * divergence

    least, draw = objective(taught.added), torch.Generator().manual_seed(0)
    for _ in range(4):
        assert objective(taught.added + torch.randn(taught.added.shape, generator=draw) * 0.05) > least


def test_taught_senses_meet_the_bound_and_are_edits_like_any_other(models, background, examples, tmp_path, monkeypatch):
    model, _, tokenizer = models
    monkeypatch.setattr(ft, "KL_OF_SENSES", 0.0)
    taught = ft.SenseTeaching(model, tokenizer, examples, background, background_weight=0.0)
    start = ft.general_loss(model, background)
    share = ft.bounded_share(model, taught.applied, background, 1e-2)
    assert 0 < share < 1
    with taught.applied(share):
        loss, solved = ft.general_loss(model, background), examples.solved_by(model, tokenizer)
    assert loss <= start * (1 + 1e-2) + 1e-6
    taught.edits(share).save(tmp_path / "taught.safetensors")
    with SenseEdits.load(tmp_path / "taught.safetensors", model, tokenizer).applied():
        assert ft.general_loss(model, background) == pytest.approx(loss, abs=1e-6)
        assert (examples.solved_by(model, tokenizer) == solved).all()
    assert ft.general_loss(model, background) == pytest.approx(start, abs=1e-6)


@pytest.mark.parametrize("eps", [0.0, float("nan"), float("inf"), "0.1"])
def test_a_bound_that_bounds_nothing_is_refused(eps):
    with pytest.raises(ValueError, match="should be a finite number above 0"):
        ft.check_bound(eps)


@pytest.mark.parametrize("eps", [1e-3, 0.2, 2.0])
def test_walking_back_stops_at_the_bound(eps, monkeypatch):
    shares = [0.0]
    monkeypatch.setattr(ft, "general_loss", lambda *_: 3.0 + shares[-1] ** 2)
    share = ft.bounded_share(None, lambda share: nullcontext(shares.append(share)), [], eps)
    assert 0 <= min(1.0, math.sqrt(3 * eps)) - share <= 2**-ft.HALVINGS


@pytest.mark.parametrize(("which", "lora"), [(0, True), (1, False)])
def test_finetuning_learns_leaves_the_model_alone_and_can_be_walked_back(models, background, examples, which, lora):
    if lora:
        pytest.importorskip("peft")
    model, tokenizer = models[which], models[2]
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    plain, start = examples.solved_by(model, tokenizer).mean(), ft.general_loss(model, background)
    change = ft.finetune(model, tokenizer, examples, background, lora, learning_rate=1e-2 if lora else 3e-3)
    assert set(change) == set(before)
    applied = partial(ft.changed, model, change)
    with applied():
        assert examples.solved_by(model, tokenizer).mean() > plain
    with applied(ft.bounded_share(model, applied, background, 1e-3)):
        assert ft.general_loss(model, background) <= start * (1 + 1e-3) + 1e-6
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert not any("lora" in name for name, _ in model.named_modules())


def test_the_shipped_examples_are_whole(tmp_path):
    for name, rows in ft.read_examples().groupby("set"):
        assert (rows["use"].value_counts()[["fit", "test"]] >= 50).all() and rows["kind"].nunique() == 1, name
        assert not set(rows.loc[rows["use"] == "fit", "prompt"]) & set(rows.loc[rows["use"] == "test", "prompt"]), name
    (tmp_path / "bad.csv").write_text(f"{','.join(ft.COLUMNS)}\na,shout,fit,b,c,d\n")
    with pytest.raises(ValueError, match="of the kind 'shout'; choose"):
        ft.read_examples(tmp_path / "bad.csv")


# ---------------------------------------------------------------- the study


def test_a_teaching_study_is_tested_on_what_it_did_not_see_and_resumes(models, tmp_path, monkeypatch):
    monkeypatch.setitem(knowledge_study.SETTINGS, "all weights", ({"learning_rate": 1e-3},))
    monkeypatch.setattr(ft, "STEPS", 3)
    of = {"Backpack": models[0], "Transformer": models[1]}
    table = MOVES[MOVES["set"] == "zoo → law"]
    sets = pd.concat([table[table["use"] == use].head(8) for use in ("fit", "test", "about")])
    general = [text.text for text in planted.generate(8, seed=5)]
    study = of, models[2], sets, general, tmp_path, ("senses", "all weights"), (1e-3, 1e-2)
    rows = teach_sets(*study)
    assert len(rows) == (2 + 2 * 3) * 8  # two models as they are, and at two bounds senses, all weights of both
    fit, choose, test = split_examples(models[2], sets, seed=0)
    assert not {*fit.prompts, *choose.prompts} & {*test.prompts} and not {*fit.prompts} & {*choose.prompts}
    assert (len(fit), len(choose), len(test)) == (6, 2, 8)
    plain = rows[(rows["model"] == "Backpack") & (rows["bound"] == 0)]
    assert plain["success"].tolist() == test.solved_by(models[0], models[2]).tolist()
    solved = rows.groupby(["model", "method", "bound"])["success"].mean()
    assert solved["Backpack", "senses", 1e-2] > solved["Backpack", "as it is", 0.0]
    monkeypatch.setattr(knowledge_study, "SenseTeaching", None)  # nothing is fitted anew
    pd.testing.assert_frame_equal(teach_sets(*study), rows)
