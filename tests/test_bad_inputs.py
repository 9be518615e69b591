"""What would give a silently wrong result is refused in one sentence, and so is a name that is not there."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

from backpack_lib import SenseEdits, load
from backpack_lib.analysis import bias
from backpack_lib.analysis.scores import bits_per_byte
from backpack_lib.analysis.topic import TopicControl
from backpack_lib.text.tokenizers import load_tokenizer
from backpack_lib.text.writing import continue_texts

NAN = float("nan")
JOBS, TEMPLATES = ["nurse", "guard"], ["At the zoo, the {profession} says that"]


@pytest.fixture(scope="module")
def c(tmp_path_factory):
    """What the cases work on: a small Backpack m, its tokenizer t, a way to edits, and a folder with bad files."""
    files, t = tmp_path_factory.mktemp("bad inputs"), tiny_tokenizer()
    m = tiny_model(vocab_size=len(t))
    for folder in ("lacking", "other"):
        m.save_pretrained(files / folder)
        t.save_pretrained(files / folder)
    tensors = load_file(files / "lacking" / "model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, files / "lacking" / "model.safetensors", {"format": "pt"})
    (files / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    SenseEdits(m, t).scale("nurse", 0).save(files / "edits.safetensors")
    (files / "cut.safetensors").write_bytes((files / "edits.safetensors").read_bytes()[:50])
    return SimpleNamespace(m=m, t=t, files=files, edits=lambda: SenseEdits(m, t))


CASES = [
    (lambda c: load("nobody/nothing"), "is no folder with a model"),
    (lambda c: load(c.files / "other"), "lack 204 of the model's tensors"),
    (lambda c: load(c.files / "lacking"), "lack 1 of the model's tensors"),
    (lambda c: load("demo", device="gpu"), "device='gpu' is no device of this machine"),
    (lambda c: load_tokenizer(str(c.files)), "bad inputs"),
    (lambda c: c.edits().scale("nurse", 0, NAN), "finite"),
    (lambda c: c.edits().scale("nurse", -1), "-1"),
    (lambda c: c.edits().replace("nurse", 0, torch.zeros(19)), "(20,)"),
    (lambda c: c.edits().add("nurse", 0, torch.full((20,), math.inf)), "finite"),
    (lambda c: c.edits().project("nurse", torch.zeros(20)), "zero"),
    (lambda c: SenseEdits.load(c.files / "cut.safetensors", c.m, c.t), "cut.safetensors"),
    (lambda c: continue_texts(c.m, c.t, ["the"], 500), "leaves room for"),
    (lambda c: TopicControl(c.m, c.t, []), "at least one word"),
    (lambda c: TopicControl(c.m, c.t, ["日本"]), "日本"),
    (lambda c: TopicControl(c.m, c.t, ["nurse"], strength=7), "choose one of 0, 1, 2, 3"),
    (lambda c: bias.log_odds(c.m, c.t, JOBS, ["The nurse said"]), "has no slot"),
    (lambda c: bias.log_odds(c.m, c.t, ["nurse", "nurse"], TEMPLATES), "twice"),
    (lambda c: bias.log_odds(c.m, c.t, ["nurse", "日本"], TEMPLATES), "日本"),
    (lambda c: bias.log_odds(c.m, c.t, JOBS, TEMPLATES, ("he", "concertina")), "tokens"),
    (lambda c: bits_per_byte(c.m, c.t, []), "no text"),
]


@pytest.mark.parametrize(("call", "words"), CASES)
def test_bad_input_is_one_clear_sentence(c, call, words):
    with pytest.raises(ValueError) as refused:
        call(c)
    message = str(refused.value)
    assert words in message and len(message.splitlines()) == 1 and len(message) < 400, message
