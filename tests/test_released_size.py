"""The notebooks with a model of the released size: 170 million parameters, random, and GPT-2's tokenizer."""

import resource
import shutil
import sys
from multiprocessing import get_context

import pytest
import torch
from executing import NOTEBOOKS, execute
from transformers import GPT2Config, GPT2LMHeadModel

from backpack_lib import BackpackConfig, BackpackLMHeadModel
from backpack_lib.running.parameters import default_parameters

GIGABYTES = 8
SIZES = dict(
    vocab_size=50257, n_positions=512, n_embd=768, n_layer=12, n_head=12, bos_token_id=50256, eos_token_id=50256
)
# What takes long in a first half, made short.
SHORTER = {
    "03_topic_control": {
        "topics": ["music"],
        "samples": 2,
        "tokens": 8,
        "trials": 1,
        "strengths": [],
        "pplm_steps": [0.1],
    },
    "04_gender_bias": {"professions": ["nurse", "driver", "cook", "farmer", "doctor"], "profession": "nurse"},
    "05_knowledge": {"facts_measured": 1},
    "06_reading": {"numbers": [10], "seeds": [0, 1], "counts_of_senses": [], "steps": 20},
}


@pytest.fixture(scope="module")
def released(tmp_path_factory, shared):
    """The folder of a Backpack, beside a Transformer of its trunk."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    backpack = BackpackLMHeadModel(BackpackConfig(**SIZES, num_senses=16))
    assert 169e6 < backpack.num_parameters() < 171e6
    for name, model in {"backpack": backpack, "transformer": GPT2LMHeadModel(GPT2Config(**SIZES))}.items():
        model.half().save_pretrained(folder / name)
        for file in (shared / "golden" / "gpt2").iterdir():
            shutil.copy(file, folder / name)
    return folder / "backpack"


def first_half(name, parameters) -> float:
    """Runs it; the most memory that it took, in GB."""
    execute(name, parameters, share=0.5)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NOTEBOOKS if "model" in default_parameters(NOTEBOOKS[name])])
def test_the_first_half_of_each_notebook_fits_a_laptop(name, released, tmp_path):
    given = SHORTER.get(name, {}) | {"model": str(released), "out": str(tmp_path)}
    if "baseline" in default_parameters(NOTEBOOKS[name]):
        given["baseline"] = str(released.with_name("transformer"))
    with get_context("spawn").Pool(1) as pool:  # memory is counted by process
        assert pool.apply(first_half, (name, given)) < GIGABYTES
