"""What needs no GPU of being right on one: nothing mixes devices, and the host waits for the card only where it has to.

`card.py` stands in for the GPU; its rules are held to those of PyTorch's own fake tensors.
"""

import copy
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from card import CUDA, Card, OnCard
from executing import execute, results_of
from helpers import random_ids
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from backpack_lib import SenseEdits, TrainingConfig, attribute
from backpack_lib.analysis import (
    bias, bigrams, disambiguation, explanations, finetuning, knowledge, matching, pplm, roles, scores, senses,
    similarity, substitutes,
)  # fmt: skip
from backpack_lib.analysis.attribution import read
from backpack_lib.analysis.topic import TopicControl, largest_pushes
from backpack_lib.model import backpack as module
from backpack_lib.model import mixing
from backpack_lib.model.cache import CACHE
from backpack_lib.text.writing import continue_texts
from backpack_lib.training.batches import make_batch
from backpack_lib.training.build import make_optimizers, make_scheduler
from backpack_lib.training.loss import LanguageModelLoss
from backpack_lib.training.run import Run

# ---------------------------------------------------------------- the stand-in itself

MIXTURES = [
    "card + host", "card + scalar", "torch.cat([card, host])",
    "torch.where(card > 0, card, host)", "torch.where(card > 0, card, scalar)", "host.copy_(card)",
    "torch.nn.functional.embedding(card.long(), square_of_host)", "square_of_host @ card",
    "card.index_select(0, host.long())", "card.gather(0, host.long())", "card.masked_fill(host > 0, 0.0)",
    "card.scatter_add(0, card.long(), host)",
]  # fmt: skip


def tensors(make):
    names = {"card": torch.ones(2, device=CUDA), "host": torch.ones(2), "scalar": torch.tensor(2.0)}
    return names | {"square_of_host": torch.ones(2, 2), "torch": torch}


@pytest.mark.parametrize("expression", MIXTURES)
def test_the_stand_in_refuses_what_pytorchs_fake_tensors_refuse(expression):
    refused = []
    for mode in (FakeTensorMode(), Card()):
        with mode:
            names = tensors(mode)
            try:
                eval(expression, names)
                refused.append(False)
            except RuntimeError as error:
                assert "device" in str(error)
                refused.append(True)
    assert refused[0] == refused[1]


@pytest.mark.parametrize(
    "expression, waits",
    [
        ("card.sum().item()", 1), ("card.tolist()", 1), ("card.unique()", 1), ("card[card > 0]", 1),
        ("bool(card.all())", 1), ("card.cpu()", 1), ("host.to(CUDA)", 1), ("host.to(CUDA, non_blocking=True)", 0),
        ("card.nonzero()", 1), ("card[card.long()]", 0), ("card[host.long()]", 1), ("card[[0, 1]]", 1),
        ("card.copy_(host)", 1), ("card * 2 + card.sum()", 0), ("torch.where(card > 0, card, 0.0)", 0),
        ("card.masked_fill(card > 0, 0.0)", 0), ("torch.multinomial(card, 1)", 0), ("card.to(torch.bfloat16)", 0),
    ],
)  # fmt: skip
def test_the_stand_in_counts_what_the_host_waits_for(expression, waits):
    with Card() as card:
        eval(expression, tensors(card) | {"CUDA": CUDA})
    assert len(card.waits) == waits


# ---------------------------------------------------------------- the same numbers on the card


def to_host(value):
    return value.held if isinstance(value, OnCard) else value


def numbers(value) -> np.ndarray:
    """All numbers in tensors, arrays, tables and nested lists of them."""
    found = []
    for leaf in tree_leaves(value):
        leaf = to_host(leaf)
        leaf = leaf.detach().float().numpy() if isinstance(leaf, torch.Tensor) else leaf
        leaf = leaf.select_dtypes("number").to_numpy(float) if hasattr(leaf, "select_dtypes") else leaf
        if not isinstance(leaf, str | type(None)):
            found.append(np.asarray(leaf, float).flatten())
    return np.concatenate(found)


TEXT = "The nurse sang at the concert and then"
WORDS = ["nurse", "concert"]
PEOPLE, TEMPLATES = (
    ["nurse", "doctor", "poet", "baker"],
    ["The {profession} said that", "At the end the {profession} thought"],
)


def reads(model, tokenizer):
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(TEXT)["input_ids"]])
    return ids.to(model.device)


def rows_of(tokenizer, n=3):
    return [[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]] for text in [TEXT, "The poet sang.", "A bank."][:n]]


def losses(model, transformer, tokenizer):
    ids = reads(model, tokenizer)[None].expand(2, -1)
    found = []
    for net in (model, transformer):
        net.zero_grad()
        net(ids, labels=ids).loss.backward()
        found += [net(ids, labels=ids).loss, net.get_input_embeddings().weight.grad]
    return found


def in_parts(model, transformer, tokenizer):
    ids = reads(model, tokenizer)[None]
    first = model(ids[:, :4], use_cache=True)
    second = model(ids[:, 4:5], cache=first[CACHE], use_cache=True)
    third = model(ids[:, 5:], cache=second[CACHE], use_cache=True, output_senses=True)
    return first.logits, second.logits, third.logits, third.contextualization, third.senses


def padded(model, transformer, tokenizer):
    return [continue_texts(net, tokenizer, [TEXT, "The"], 6, seed=1) for net in (model, transformer)]


def edited(model, transformer, tokenizer):
    ids, d = reads(model, tokenizer), model.config.n_embd
    vector = torch.linspace(-1, 1, d)
    factors = torch.linspace(0, 1, model.config.vocab_size * model.config.num_senses)
    edits = SenseEdits(model, tokenizer).scale("nurse", 1, 0.3).add("concert", None, vector).replace("baker", 2, vector)
    edits.replace("the", None, "nurse").project("nurse", remove="concert", add="baker").project("baker", vector, by=0.5)
    edits.scale_each(factors.view(-1, model.config.num_senses))
    with edits.applied():
        return model(ids[None]).logits, attribute(model, ids, 5)


def saved_edits(model, transformer, tokenizer, path):
    edits = SenseEdits(model, tokenizer).scale("nurse", 1, 0.3).project("nurse", remove="concert")
    edits.save(path)
    with SenseEdits.load(path, model, tokenizer).applied():
        return model(reads(model, tokenizer)[None]).logits


def attributed(model, transformer, tokenizer):
    ids = reads(model, tokenizer)
    reading = read(model, ids)
    return attribute(model, ids, 5, contrast=7), reading.contributions(5), reading.log_probs(), reading.logits


def controlled(model, transformer, tokenizer):
    control = TopicControl(model, tokenizer, WORDS, 3, largest=largest_pushes(model))
    made = []
    for annealing in (True, False):
        control.annealing = annealing
        made.append(control.generate([TEXT, "The poet"], 6, seed=2))
    with control.edits.applied():
        return control.scores, control.factors, made, model(reads(model, tokenizer)[None]).logits


def estimated(model, transformer, tokenizer):
    return TopicControl(model, tokenizer, WORDS, 2).thresholds


def pplm_texts(model, transformer, tokenizer):
    return pplm.generate(transformer, tokenizer, WORDS, [TEXT, "The poet"], 3, settings=pplm.Settings(iterations=2))


def biased(model, transformer, tokenizer):
    split = bias.split_odds(model, tokenizer, PEOPLE, TEMPLATES)
    found = bias.localize(model, tokenizer, PEOPLE, TEMPLATES, permutations=50)
    edits = bias.debias(model, tokenizer, PEOPLE, [0], 0.4)
    mean = bias.mean_ablate(model, tokenizer, PEOPLE, [1])
    fitted = bias.fit_scales(model, tokenizer, PEOPLE, TEMPLATES, [0, 1])
    made = [split.odds, found.table, fitted]
    for each in (edits, mean):
        with each.applied():
            made.append(bias.log_odds(model, tokenizer, PEOPLE, TEMPLATES))
    with bias.nullspace(transformer, tokenizer, PEOPLE):
        made.append(bias.log_odds(transformer, tokenizer, PEOPLE, TEMPLATES))
    return made


def read_of_senses(model, transformer, tokenizer):
    vectors = senses.senses_of_words(model, tokenizer, WORDS)
    directions = senses.sense_directions(model)
    pairs = np.array([(5, 9), (6, 10), (7, 11)] * 4)
    return (
        senses.pushes(model, vectors), senses.pushed_most(model, vectors[0]), senses.likeness_of_senses(directions),
        senses.neighbours(directions, vectors[0]), similarity.of_input_embeddings(transformer, tokenizer)(WORDS),
        similarity.similarities(vectors[:1], vectors[1:]), roles.relation_auc(model, pairs),
    )  # fmt: skip


def scored(model, transformer, tokenizer):
    of_pairs = bigrams.Bigrams(rows_of(tokenizer), model.config.vocab_size)
    return (
        scores.bits_per_byte(model, tokenizer, [TEXT]), scores.log_probabilities(transformer, tokenizer, [TEXT, "The"]),
        scores.next_log_probabilities(model, tokenizer, [TEXT, "The"]),
        bigrams.losses_by_part(model, rows_of(tokenizer)),
        bigrams.bigram_correlations(model, of_pairs, torch.tensor([5, 6]), torch.arange(20)),
        finetuning.general_loss(model, rows_of(tokenizer)), finetuning.mean_weights(model, rows_of(tokenizer)),
    )  # fmt: skip


def replaced(model, transformer, tokenizer):
    tokens = torch.arange(20, 900, device=model.device)
    said = explanations.explain(model, tokens, 5)
    simulator = explanations.Simulator.fit(model, said, tokens)
    replacement = explanations.Replacement(model, rows_of(tokenizer))
    return said.up, simulator(said), replacement.losses(), replacement.losses(replacement.zero([1]))


def matched(model, transformer, tokenizer):
    tokens, among = torch.arange(20, 60), torch.arange(20, 90)
    return matching.profiles(model, tokens, among), matching.profiles(transformer, tokens, among)


def of_tokens(model, transformer, tokenizer):
    ids = rows_of(tokenizer, 1)[0]
    return (
        substitutes.contributions_of_tokens(model, ids, 5, 7), substitutes.weights_of_tokens(model, ids),
        substitutes.attention_of_tokens(transformer, ids), substitutes.gradient_times_input(transformer, ids, 5, 7),
        disambiguation.weights_in_context(model, tokenizer, disambiguation.planted_ambiguities()[0]),
    )  # fmt: skip


def known_facts(model, transformer, tokenizer):
    fact = knowledge.Fact("place", "bat", "zoo", "court", ("the bat is at the",), ("we saw the bat at the",))
    edits = knowledge.project(model, tokenizer, [fact])
    with edits.applied():
        after = knowledge.margins(model, tokenizer, fact, fact.edit)
    with knowledge.projected_inputs(transformer, tokenizer, [fact]):
        other = knowledge.margins(transformer, tokenizer, fact, fact.edit)
    return (
        after, other, knowledge.dose(model, tokenizer, fact), knowledge.search_strength(transformer, tokenizer, fact),
        knowledge.predict(model, tokenizer, fact.edit[0], edits),
        knowledge.sense_effects(model, tokenizer, fact, fact.edit),
    )  # fmt: skip


CASES = [
    losses, in_parts, padded, edited, attributed, controlled, estimated, pplm_texts, biased, read_of_senses, scored,
    replaced, matched, of_tokens, known_facts,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_everything_gives_the_same_on_the_card(models, case):
    model, transformer, tokenizer = models
    expected = case(copy.deepcopy(model), copy.deepcopy(transformer), tokenizer)
    with Card() as card:
        found = case(card.move(copy.deepcopy(model)), card.move(copy.deepcopy(transformer)), tokenizer)
    assert [leaf for leaf in tree_leaves(found) if isinstance(leaf, str)] == [
        leaf for leaf in tree_leaves(expected) if isinstance(leaf, str)
    ]
    if not isinstance(expected, list) or not isinstance(expected[0], str | list):
        np.testing.assert_allclose(numbers(found), numbers(expected), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [losses, in_parts, padded, attributed], ids=lambda case: case.__name__)
def test_half_precision_mixes_no_devices_either(models, case, dtype):
    model, transformer, tokenizer = (copy.deepcopy(part) for part in models)
    with Card() as card:
        found = case(card.move(model.to(dtype)), card.move(transformer.to(dtype)), tokenizer)
    assert case is padded or np.isfinite(numbers(found)).all()


def test_edits_that_were_saved_on_the_card_are_read_there(models, tmp_path):
    model, transformer, tokenizer = models
    expected = saved_edits(model, transformer, tokenizer, tmp_path / "host")
    with Card() as card:
        found = saved_edits(card.move(copy.deepcopy(model)), None, tokenizer, tmp_path / "card")
    with SenseEdits.load(tmp_path / "card", model, tokenizer).applied():  # and on another machine
        assert model(reads(model, tokenizer)[None]).logits.equal(expected)
    np.testing.assert_allclose(numbers(found), numbers(expected), atol=2e-4)


@pytest.mark.parametrize("planted", ["allowed_positions", "each_token", "at_positions"])
def test_a_device_that_is_forgotten_is_found(models, planted, monkeypatch):
    """What a mistake would be like: a part of the forward pass that makes its tensors on the host."""
    right = getattr(module, planted)

    def wrong(*arguments):
        made = right(*arguments)
        return tuple(part.cpu() for part in made) if isinstance(made, tuple) else made.cpu()

    monkeypatch.setattr(module, planted, wrong)
    with Card() as card, pytest.raises(RuntimeError, match="on the same device, but found cuda:0 and cpu in .*, from "):
        in_parts(card.move(copy.deepcopy(models[0])), None, models[2])


def test_the_sum_in_blocks_mixes_no_devices(models, monkeypatch):
    forward, backward = mixing.in_blocks, mixing.gradients_in_blocks
    queries, keys = (torch.randn(2, 3, 9, 4) for _ in range(2))
    table, inverse = torch.randn(5, 3, 8), random_ids(2, 9, vocab_size=5)
    allowed, d_mixed = torch.ones(2, 9, 9, dtype=torch.bool).tril(), torch.randn(2, 9, 8)
    monkeypatch.setitem(mixing.POSITIONS_AT_ONCE, "cuda", 4)
    expected = (
        forward(queries, keys, table, inverse, allowed),
        backward(d_mixed, queries, keys, table, inverse, allowed),
    )
    with Card() as card:
        queries, keys, table, inverse, allowed, d_mixed = map(
            card.move, (queries, keys, table, inverse, allowed, d_mixed)
        )
        found = (
            forward(queries, keys, table, inverse, allowed),
            backward(d_mixed, queries, keys, table, inverse, allowed),
        )
    assert not card.waits
    np.testing.assert_allclose(numbers(found), numbers(expected), atol=1e-5)


SHORT_RUNS = {
    "00_tour": {},
    "03_topic_control": {
        "topics": ["music"],
        "samples": 2,
        "tokens": 6,
        "trials": 1,
        "strengths": [],
        "pplm_steps": [0.1],
    },
    "04_gender_bias": {"professions": ["nurse", "doctor", "guard", "baker", "cook", "judge"], "profession": "nurse"},
    "05_knowledge": {"facts_measured": 2, "finetuned_facts": 1, "methods": ["senses", "all weights", "LoRA"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT_RUNS)
def test_notebooks_go_through_on_the_card(name, tmp_path):
    with Card():
        made = execute(
            name, SHORT_RUNS[name] | {"model": "planted", "device": "cuda", "out": str(tmp_path)}, solved=True
        )
    assert made.space["backpack"].device == CUDA and results_of(tmp_path)["headline"]
    assert not [answer for answer in made.answers if str(answer).startswith("Not yet")]


# ---------------------------------------------------------------- waiting

WHAT_TRANSFORMERS_ASKS = ("masking_utils.py, _ignore_causal_mask_sdpa", "utils.py, __call__")


def waits_per_token(card, write) -> Counter:
    """What a generated token adds to the waits of a text: of seven tokens, less of six."""
    found = []
    for tokens in (6, 7):
        card.waits.clear()
        write(tokens)
        found.append(Counter(card.waits))
    return found[1] - found[0]


@pytest.mark.parametrize("how", ["plain", "edited", "controlled", "without annealing"])
def test_a_generated_token_waits_for_nothing_but_what_transformers_asks(models, how):
    """Whether all texts have ended, and whether any is padded."""
    tokenizer = models[2]
    with Card() as card:
        model = card.move(copy.deepcopy(models[0]))
        control = TopicControl(model, tokenizer, WORDS, 3, annealing=how != "without annealing")
        edits = SenseEdits(model, tokenizer).scale("nurse", 1).project("concert", remove="zoo", add="court")

        def write(tokens):
            settings = {"max_new_tokens": tokens, "seed": 3, "eos_token_id": None}
            if how in ("plain", "edited"):
                with edits.applied() if how == "edited" else nullcontext():
                    continue_texts(model, tokenizer, [TEXT, "The"], **settings)
            else:
                control.generate([TEXT, "The"], **settings)

        found = waits_per_token(card, write)
    assert found == {("aten._local_scalar_dense", where): 1 for where in WHAT_TRANSFORMERS_ASKS}


@pytest.mark.parametrize("architecture", ["backpack", "transformer"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_waits_for_nothing(models, architecture, optimizer, dtype):
    """The step of the loop itself, of two batches; what it learns is what it learns on the host."""
    config = TrainingConfig("planted", out="", optimizer=optimizer, warmup=0, steps=10, accumulate=2)
    original, rows = models[architecture == "transformer"], [{"input_ids": row} for row in random_ids(6, 12)]
    learnt = {}
    with Card() as card:
        for device in (torch.device("cpu"), CUDA):
            model = copy.deepcopy(original).to(dtype)
            model = card.move(model) if device == CUDA else model
            optimizers = make_optimizers(model, config, device)
            loop = SimpleNamespace(
                config=config, loss=LanguageModelLoss(model), step=0, unread=[], optimizers=optimizers,
                schedulers=[make_scheduler(each, config) for each in optimizers],
                accelerator=SimpleNamespace(
                    device=device, backward=lambda loss: loss.backward(), no_sync=lambda _: nullcontext(),
                    clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
                ),
            )  # fmt: skip
            batches = [make_batch(rows[:3]), make_batch(rows[3:])]
            card.waits.clear()
            for _ in range(2):
                Run.train_one_step(loop, batches)
            assert not card.waits
            learnt[device] = [*model.parameters(), *loop.unread]
    close = 2e-3 if dtype == torch.float32 else 3e-2
    np.testing.assert_allclose(numbers(learnt[CUDA]), numbers(learnt[torch.device("cpu")]), atol=close, rtol=close)
