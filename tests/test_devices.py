"""Nothing mixes devices: every step is taken on the meta device, which computes nothing, and on a GPU where one is."""

import copy

import pytest
import torch
from helpers import random_ids

from backpack_lib import SenseEdits, TrainingConfig, attribute, load, train
from backpack_lib.analysis.topic import TopicControl
from backpack_lib.training.loss import whole_rows


def edit_of_all_kinds(model, tokenizer):
    """Edits with every kind of tensor that an edit can hold."""
    vector = torch.ones(model.config.n_embd)
    edits = SenseEdits(model, tokenizer).scale("nurse", sense=1, by=0.5).project("nurse", remove="concert", add="nurse")
    return edits.add("concert", [0, 2], vector).replace("nurse", 3, vector)


@pytest.mark.parametrize("edited", [False, True])
def test_a_forward_pass_mixes_no_devices(model, tokenizer, edited):
    model, edits = copy.deepcopy(model), edit_of_all_kinds(model, tokenizer) if edited else []
    model.to("meta")
    model.patches.extend(edit.on(torch.device("meta")) for edit in edits)
    ids = torch.ones(2, 12, dtype=torch.long, device="meta")
    distinct = torch.ones(6, dtype=torch.long, device="meta"), torch.zeros_like(ids)
    with whole_rows(model):  # otherwise transformers looks for several texts in a row
        out = model(ids, distinct=distinct, output_senses=True, use_cache=False)
    assert {out.logits.device.type, out.senses.device.type, out.contextualization.device.type} == {"meta"}


needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")


@needs_a_gpu
def test_the_demo_predicts_the_same_on_a_gpu():
    (here, _), (there, _) = load("demo"), load("demo", "cuda")
    ids = random_ids(2, 32, vocab_size=here.config.vocab_size)
    torch.testing.assert_close(there(ids.cuda()).logits.cpu(), here(ids).logits, rtol=1e-3, atol=1e-3)
    shares = [attribute(model, ids[0], 5, 7).cpu() for model in (here, there)]
    torch.testing.assert_close(*shares, rtol=1e-3, atol=1e-3)


@needs_a_gpu
def test_edits_and_topic_control_work_on_a_gpu():
    model, tokenizer = load("demo", "cuda")
    with SenseEdits(model, tokenizer).scale("nurse", by=0).applied():
        texts = TopicControl(model, tokenizer, ["music"], strength=2).generate(["The nurse"] * 4, max_new_tokens=10)
    assert len(texts) == 4


@needs_a_gpu
def test_training_learns_on_a_gpu(tiny):
    history = train(TrainingConfig(**{**vars(tiny), "device": "cuda", "steps": 60, "eval_every": 20, "dropout": 0.0}))
    assert history["valid_loss"].is_monotonic_decreasing
