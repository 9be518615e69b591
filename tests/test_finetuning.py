"""Teaching by examples: which senses, the convex fit, the bound, and the same by all weights and LoRA."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny_model, tiny_tokenizer

from backpack_lib import SenseEdits
from backpack_lib.analysis import finetuning as ft
from backpack_lib.lessons.knowledge import MOVED, new_facts, planted_sets, topic_mass
from backpack_lib.studies import teaching_study
from backpack_lib.studies.teaching_study import TeachingStudy, paired, success_table
from backpack_lib.text import planted
from backpack_lib.text.writing import ids_of_text


@pytest.fixture(scope="module")
def background(models):
    return ft.rows_of_texts(models[0], models[2], [text.text for text in planted.generate(12, seed=77)])


@pytest.fixture(scope="module")
def examples(models):
    table = planted_sets(n=6)
    return ft.make_examples(models[2], table[table["set"] == "zoo → law"], "fit")


def three(kind, tokenizer=None):
    return ft.Examples(kind, ["a", "b", "c"], torch.tensor([1, 2, 3]), torch.tensor([[4, 5], [4, 5], [4, 5]]))


@pytest.mark.parametrize("kind", ft.KINDS)
def test_losses_and_successes_are_those_of_their_kind(kind):
    given = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    examples = three(kind)
    for n in range(3):
        target, best = given[n, n + 1].item(), max(given[n, 4].item(), given[n, 5].item())
        loss = {"say": -target, "prefer": math.log1p(math.exp(best - target)), "balance": (target - best) ** 2}[kind]
        solved = abs(target - best) < math.log(1.5) if kind == "balance" else target > best
        assert examples.losses(given)[n].item() == pytest.approx(loss, abs=1e-5)
        assert bool(examples.success(given)[n]) == solved


def test_general_loss_is_the_mean_over_tokens(models, background):
    model = models[0]
    nats = []
    for row in background:
        with torch.no_grad():
            log_probs = model(torch.tensor([row])).logits[0].log_softmax(-1)
        nats += [-log_probs[i - 1, row[i]].item() for i in range(1, len(row))]
    assert ft.general_loss(model, background) == pytest.approx(np.mean(nats), abs=1e-4)


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
    rows, _ = ft.weights_in(model, tokenizer, examples.prompts[:1])
    ids = ids_of_text(tokenizer, examples.prompts[0])
    with torch.no_grad():
        alpha = model(torch.tensor([ids]), output_senses=True).contextualization[0, :, -1]  # (k, T)
    scores = {}
    for j, token in enumerate(ids):
        for l in range(model.config.num_senses):
            scores[token, l] = scores.get((token, l), 0.0) + alpha[l, j].item()
    scores = {pair: weight - 50.0 * mean[pair].item() for pair, weight in scores.items()}
    best = sorted(scores, key=scores.get, reverse=True)[:4]
    assert set(ft.choose_pairs(rows, mean, 4, 50.0)) == set(best)


def test_the_fit_is_what_the_edited_model_says_and_it_learns(models, background, examples):
    model, _, tokenizer = models
    taught = ft.SenseTeaching(model, tokenizer, examples, background)
    rows, o = ft.weights_in(model, tokenizer, examples.prompts)
    A = torch.stack([w[taught._columns()] for w in rows])
    predicted = (o + A @ taught.added) @ model.get_output_embeddings().weight.T
    with torch.no_grad(), taught.edits().applied():
        for n, prompt in enumerate(examples.prompts):
            found = model(torch.tensor([ids_of_text(tokenizer, prompt)])).logits[0, -1]
            torch.testing.assert_close(found, predicted[n], atol=1e-3, rtol=1e-3)
        assert examples.solved_by(model, tokenizer).mean() > 0.9
    assert examples.solved_by(model, tokenizer).mean() < 0.5


def test_the_fit_is_at_a_minimum_of_a_convex_loss(models, background, examples):
    """Steps in any direction make the stated objective worse."""
    model, _, tokenizer = models
    taught = ft.SenseTeaching(model, tokenizer, examples, background, kl_weight=2.0, ridge=1e-2, steps=300)
    rows, o = ft.weights_in(model, tokenizer, examples.prompts)
    A, E = torch.stack([w[taught._columns()] for w in rows]), model.get_output_embeddings().weight.detach()
    n_tokens = sum(len(row) - 1 for row in background)

    def objective(added):
        loss = (
            examples.losses(((o + A @ added) @ E.T).log_softmax(-1)).mean().item() + 1e-2 * added.square().sum().item()
        )
        edits = SenseEdits(model, tokenizer)
        for (token, sense), vector in zip(taught.pairs, added):
            edits.add(token, sense, vector)
        divergence = 0.0
        for row in background:
            ids = torch.tensor([row])
            with torch.no_grad():
                before = model(ids).logits[0].log_softmax(-1)
                with edits.applied():
                    after = model(ids).logits[0].log_softmax(-1)
            divergence += (before.exp() * (before - after)).sum().item()
        return loss + 2.0 * divergence / n_tokens

    least, draw = objective(taught.added), torch.Generator().manual_seed(0)
    for _ in range(4):
        step = torch.randn(taught.added.shape, generator=draw) * 0.05
        assert objective(taught.added + step) > least


def test_taught_senses_meet_the_bound_and_are_edits_like_any_other(models, background, examples, tmp_path):
    model, _, tokenizer = models
    taught = ft.SenseTeaching(model, tokenizer, examples, background, background_weight=0.0, kl_weight=0.0)
    start = ft.general_loss(model, background)
    edits = taught.edits(eps=1e-4)
    with edits.applied():
        loss, solved = ft.general_loss(model, background), examples.solved_by(model, tokenizer)
    assert loss <= start * (1 + 1e-4) + 1e-6
    edits.save(tmp_path / "taught.safetensors")
    with SenseEdits.load(tmp_path / "taught.safetensors", model, tokenizer).applied():
        assert ft.general_loss(model, background) == pytest.approx(loss, abs=1e-6)
        assert (examples.solved_by(model, tokenizer) == solved).all()
    while len(edits):
        edits.undo()
    with edits.applied():
        assert ft.general_loss(model, background) == pytest.approx(start, abs=1e-6)


@pytest.mark.parametrize("eps", [0.0, -0.1, float("nan"), float("inf")])
def test_a_bound_that_cannot_be_met_is_refused(eps):
    with pytest.raises(ValueError, match="cannot be met") as refused:
        ft.walk_back(lambda share: 1.0, 1.0, eps)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("eps", [1e-3, 1e-2, 0.2, 2.0])
def test_walking_back_stops_at_the_bound(eps):
    found = ft.walk_back(lambda share: 3.0 + share**2, 3.0, eps, steps=20)
    assert found == pytest.approx(min(1.0, math.sqrt(3 * eps)), abs=1e-4)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_finetuning_learns_leaves_the_model_alone_and_can_be_walked_back(models, background, examples, which, lora):
    if lora:
        pytest.importorskip("peft")
    model, tokenizer = models[which], models[2]
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    change = ft.finetune(
        model, tokenizer, examples, background, lora=lora, learning_rate=1e-2 if lora else 3e-3, steps=25
    )
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters()) and set(change) == set(
        before
    )
    plain, start = examples.solved_by(model, tokenizer).mean(), ft.general_loss(model, background)
    with ft.changed(model, change):
        assert examples.solved_by(model, tokenizer).mean() > plain
    share = ft.bounded_share(model, change, background, 1e-3)
    with ft.changed(model, change, share):
        assert ft.general_loss(model, background) <= start * (1 + 1e-3) + 1e-6
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "shout"}, "kind='shout' is unknown"),
        ({"prompts": []}, "There are no examples to learn from"),
        ({"prompts": ["a"]}, "their numbers differ"),
    ],
)
def test_examples_that_do_not_fit_are_refused(changes, message):
    fields = {
        "kind": "say",
        "prompts": ["a", "b"],
        "targets": torch.tensor([1, 2]),
        "contrasts": torch.tensor([[3], [3]]),
    }
    with pytest.raises(ValueError, match=message):
        ft.Examples(**fields | changes)


def test_the_shipped_examples_are_whole(tmp_path):
    table = ft.read_examples()
    for name, some in table.groupby("set"):
        assert (some["use"].value_counts()[["fit", "test"]] >= 50).all() and some["kind"].nunique() == 1, name
        assert not set(some.loc[some["use"] == "fit", "prompt"]) & set(some.loc[some["use"] == "test", "prompt"]), name
    (tmp_path / "bad.csv").write_text("set,kind\n")
    with pytest.raises(ValueError, match="lacks the column 'use'"):
        ft.read_examples(tmp_path / "bad.csv")
    with pytest.raises(ValueError, match="cannot be read"):
        ft.read_examples(tmp_path / "nothing.csv")


def test_without_a_contrast_all_other_targets_are_contrasts():
    rows = [("s", "say", "fit", "At the", word, "") for word in ("nurse", "concert")]
    tokenizer = tiny_tokenizer()
    found = ft.make_examples(tokenizer, pd.DataFrame(rows, columns=ft.COLUMNS), "fit")
    assert found.targets.tolist() == found.contrasts[:, 0].tolist()[::-1]


def test_only_a_backpack_has_senses_to_teach(models, background, examples):
    with pytest.raises(ValueError, match="has no sense vectors"):
        ft.SenseTeaching(models[1], models[2], examples, background)
    with pytest.raises(ValueError, match="no general text"):
        ft.rows_of_texts(tiny_model(), tiny_tokenizer(), [])


# ---------------------------------------------------------------- new facts on planted text


@pytest.mark.parametrize("place", MOVED)
def test_new_facts_are_texts_of_the_new_topic_at_the_moved_place(place):
    table = new_facts(place, MOVED[place], 8)
    assert len(table) == 8
    for row in table.itertuples():
        assert row.prompt.startswith(f"At the {place},") and row.target in planted.topic_words(MOVED[place])
        before = set(row.prompt.replace(",", "").split())
        assert not any(before & planted.topic_words(topic) - {place} for topic in planted.lexicon()["topics"])


def test_topic_mass_is_the_share_of_probability(models):
    model, _, tokenizer = models
    prompts = list(new_facts("zoo", "law", 3)["prompt"])
    found = topic_mass(model, tokenizer, prompts, "law", "animals")
    with torch.no_grad():
        p = model(torch.tensor([ids_of_text(tokenizer, prompts[0])])).logits[0, -1].softmax(-1)
    of = [
        sum(p[tokenizer(" " + word)["input_ids"][0]].item() for word in planted.topic_words(t))
        for t in ("law", "animals")
    ]
    assert found[0] == pytest.approx(of[0] / sum(of), abs=1e-4) and found.mean() < 0.2  # it has not moved yet


# ---------------------------------------------------------------- the study


@pytest.fixture(scope="module")
def study(models, tmp_path_factory):
    of = {"Backpack": models[0], "Transformer": models[1]}
    sets = planted_sets(n=8)
    sets = sets[sets["set"].isin(["zoo → law", "lab → animals"])]
    general = [text.text for text in planted.generate(8, seed=5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(teaching_study.SETTINGS, "all weights", ({"learning_rate": 1e-3, "steps": 3},))
        yield TeachingStudy(
            of, models[2], sets, general, tmp_path_factory.mktemp("t"), ("senses", "all weights"), (1e-3, 1e-2)
        )


def test_a_teaching_study_is_tested_on_what_it_did_not_see_and_resumes(study, monkeypatch):
    rows = study.run()
    # For each set: two models as they are, and at two bounds senses, all weights of both; 8 examples each.
    assert len(rows) == 2 * (2 + 2 * 3) * 8
    fit, choose, test = study.examples("zoo → law")
    assert not set(fit.prompts) & set(choose.prompts) and len(fit) == 6 and len(choose) == 2 and len(test) == 8
    table = success_table(rows)
    taught, plain = (
        table.loc[("zoo → law", "Backpack", m, b), "success"] for m, b in (("senses", 1e-2), ("as it is", 0.0))
    )
    assert taught > plain
    found = paired(rows, "zoo → law", 1e-2, ("Backpack", "senses"), ("Transformer", "all weights"))
    other = table.loc[("zoo → law", "Transformer", "all weights", 1e-2), "success"]
    assert found["difference"] == pytest.approx(taught - other)
    monkeypatch.setattr(teaching_study, "SenseTeaching", None)  # nothing is fitted anew
    pd.testing.assert_frame_equal(study.run(), rows)


def test_unknown_methods_are_refused(models, tmp_path):
    with pytest.raises(ValueError, match="The method 'magic' is unknown"):
        TeachingStudy({"Backpack": models[0]}, models[2], planted_sets(n=4), ["a b"], tmp_path, ("magic",))
