"""Bad input over the public functions: one clear sentence each, and nothing left half-written."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from backpack_lib import SenseEdits, attribute, load
from backpack_lib.analysis import bias, pplm, similarity
from backpack_lib.analysis.attribution import read
from backpack_lib.analysis.scores import bits_per_byte, read_blimp
from backpack_lib.analysis.senses import senses_of_words
from backpack_lib.analysis.topic import TopicControl, topic_direction
from backpack_lib.display import tables
from backpack_lib.model.kinds import check_sense
from backpack_lib.studies.fluency import search_temperature
from backpack_lib.studies.judges import ClassifierJudge, WordJudge
from backpack_lib.text.words import token_of_word, tokens_of_word
from backpack_lib.text.writing import continue_texts

NAN = float("nan")
JOBS, TEMPLATES = ["nurse", "guard"], ["At the zoo, the {profession} says that"]


@pytest.fixture(scope="module")
def cases_folder(tmp_path_factory):
    """What the cases work on: a small Backpack m, its tokenizer t, its Transformer g, and a folder with bad files."""
    folder = tmp_path_factory.mktemp("bad inputs")
    t = tiny_tokenizer()
    sizes = dict(vocab_size=len(t), n_positions=24, n_embd=20, n_layer=1, n_head=2)
    m, g = tiny_model(vocab_size=len(t)), GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    files = folder / "files"
    m.save_pretrained(files / "whole")
    t.save_pretrained(files / "whole")
    for name in ("damaged", "lacking", "other"):
        shutil.copytree(files / "whole", files / name)
    weights = files / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    tensors = load_file(files / "lacking" / "model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, files / "lacking" / "model.safetensors", {"format": "pt"})
    (files / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (files / "no model").mkdir()
    SenseEdits(m, t).scale("nurse", 0).save(files / "edits.safetensors")
    SenseEdits(tiny_model(seed=1, vocab_size=len(t)), t).scale("nurse", 0).save(files / "of another.safetensors")
    save_file({"a": torch.zeros(1)}, files / "no edits.safetensors")
    (files / "cut.safetensors").write_bytes((files / "edits.safetensors").read_bytes()[:50])
    (files / "sets").mkdir()
    (files / "notebook.json").write_text("{}")
    return SimpleNamespace(m=m, t=t, g=g, files=files, edits=lambda: SenseEdits(m, t), out=str(folder / "out"))


@pytest.fixture
def c(cases_folder, monkeypatch):
    """`cases_folder`, in which nothing may have been written afterwards."""
    folder = cases_folder.files.parent
    monkeypatch.setenv("BACKPACK_RUNS", str(folder / "runs"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    yield cases_folder
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert after == before, "something was written"


def control(c, words=("nurse",), **settings):
    return TopicControl(c.m, c.t, words, **settings)


CASES = {
    "loading": [
        (lambda c: load("nobody/nothing"), "is no folder with a model"),
        (lambda c: load("runs/nobody/nothing"), "is no folder with a model"),
        (lambda c: load(c.files / "no model"), "is no folder with a model"),
        (lambda c: load(c.files / "other"), "lack 204 of the model's tensors"),
        (lambda c: load(c.files / "lacking"), "lack 1 of the model's tensors"),
        (lambda c: load("demo", device="gpu"), "device='gpu' is no device of this machine"),
        (lambda c: load(""), "is no folder with a model"),
    ],
    "senses": [
        (lambda c: tokens_of_word(c.t, " "), "is no word"),
        (lambda c: token_of_word(c.t, "concertina"), "tokens"),
        (lambda c: token_of_word(c.t, 10_000), "10000"),
        (lambda c: token_of_word(c.t, -1), "-1"),
        (lambda c: senses_of_words(c.m, c.t, []), "no word"),
        (lambda c: check_sense(c.m, 3), "3"),
        (lambda c: check_sense(c.m, -1), "-1"),
        (lambda c: tables.word_senses(c.m, c.t, ""), "is no word"),
    ],
    "attribution": [
        (lambda c: attribute(c.m, [], 5), "no token"),
        (lambda c: attribute(c.m, [1] * 25, 5), "n_positions=24"),
        (lambda c: attribute(c.m, [1, 2], 5, position=2), "position"),
        (lambda c: attribute(c.m, [1, 2], 5, position=-3), "position"),
        (lambda c: attribute(c.m, [1, 2], 10_000), "10000"),
        (lambda c: attribute(c.m, [1, 2], 5, contrast=-1), "-1"),
        (lambda c: attribute(c.m, [1, 10_000], 5), "10000"),
        (lambda c: attribute(c.g, [1, 2], 5), "Backpack"),
        (lambda c: read(c.m, torch.ones(2, 3, dtype=torch.long)), "one text"),
    ],
    "edits": [
        (lambda c: SenseEdits(c.g, c.t), "Backpack"),
        (lambda c: c.edits().scale("nurse", 0, NAN), "finite"),
        (lambda c: c.edits().scale("nurse", 3), "3"),
        (lambda c: c.edits().scale("nurse", [0, 7]), "7"),
        (lambda c: c.edits().scale("concertina", 0), "tokens"),
        (lambda c: c.edits().scale([], 0), "no word"),
        (lambda c: c.edits().scale("nurse", []), "no sense"),
        (lambda c: c.edits().replace("nurse", 0, torch.zeros(19)), "(20,)"),
        (lambda c: c.edits().add("nurse", 0, torch.full((20,), math.inf)), "finite"),
        (lambda c: c.edits().project("nurse", "concertina"), "tokens"),
        (lambda c: c.edits().project("nurse", torch.zeros(20)), "zero"),
        (lambda c: c.edits().scale_each(torch.ones(3, 3)), "(500, 3)"),
        (lambda c: c.edits().undo(), "no edit to undo"),
        (lambda c: c.edits().save(c.files / "no folder" / "e.safetensors"), "could not be written"),
        (lambda c: SenseEdits.load(c.files / "none.safetensors", c.m, c.t), "none.safetensors"),
        (lambda c: SenseEdits.load(c.files / "cut.safetensors", c.m, c.t), "cut.safetensors"),
        (lambda c: SenseEdits.load(c.files / "no edits.safetensors", c.m, c.t), "no edits.safetensors"),
        (lambda c: SenseEdits.load(c.files / "of another.safetensors", c.m, c.t), "another"),
        (lambda c: c.edits().scale("nurse", 0).applied(tiny_model(seed=2, vocab_size=500)).__enter__(),
         "made for a model whose senses are others"),
    ],
    "texts": [
        (lambda c: continue_texts(c.m, c.t, ["the nurse " * 30]), "leaves room for 0"),
        (lambda c: continue_texts(c.m, c.t, ["the"], 500), "leaves room for"),
        (lambda c: continue_texts(c.m, c.t, ["the"], 4, seed=-1), "Seed must be between 0 and"),
    ],
    "topic": [
        (lambda c: control(c, []), "at least one word"),
        (lambda c: control(c, ["日本"]), "日本"),
        (lambda c: control(c, strength=7), "choose one of 0, 1, 2, 3"),
        (lambda c: control(c, deltas=(1, 2)), "should be 4 finite numbers"),
        (lambda c: control(c, deltas=(NAN, 1, 1, 1)), "finite"),
        (lambda c: control(c).generate(["the"], 4, num_beams=2), "num_beams"),
        (lambda c: TopicControl(c.g, c.t, ["nurse"]), "Backpack"),
        (lambda c: topic_direction(c.m, c.t, [" "]), "is no word"),
        (lambda c: pplm.generate(c.m, c.t, ["nurse"], ["the"], 4), "Transformer"),
        (lambda c: pplm.generate(c.g, c.t, [], ["the"], 4), "at least one word"),
        (lambda c: pplm.Settings(step=-1), "step=-1"),
        (lambda c: pplm.Settings(temperature=0), "temperature=0"),
    ],
    "bias": [
        (lambda c: bias.log_odds(c.m, c.t, [], TEMPLATES), "professions=[]"),
        (lambda c: bias.log_odds(c.m, c.t, JOBS, []), "templates=[]"),
        (lambda c: bias.log_odds(c.m, c.t, JOBS, ["The nurse said"]), "has no slot"),
        (lambda c: bias.log_odds(c.m, c.t, ["nurse", "nurse"], TEMPLATES), "twice"),
        (lambda c: bias.log_odds(c.m, c.t, ["nurse", "日本"], TEMPLATES), "日本"),
        (lambda c: bias.log_odds(c.m, c.t, JOBS, TEMPLATES, ("he", "he")), "twice"),
        (lambda c: bias.log_odds(c.m, c.t, JOBS, TEMPLATES, ("he",)), "two words"),
        (lambda c: bias.log_odds(c.m, c.t, JOBS, TEMPLATES, ("he", "concertina")), "tokens"),
        (lambda c: bias.localize(bias.split_odds(c.m, c.t, JOBS, TEMPLATES), wanted=1.5), "wanted=1.5"),
        (lambda c: bias.localize(bias.split_odds(c.m, c.t, JOBS, TEMPLATES)), "need three of them, and 2 were given"),
        (lambda c: bias.split_odds(c.g, c.t, [*JOBS, "florist"], TEMPLATES), "Backpack"),
        (lambda c: bias.debias(c.m, c.t, JOBS, [0], NAN), "finite"),
        (lambda c: bias.check_split(TEMPLATES, TEMPLATES), "for fitting and for testing"),
        (lambda c: bias.check_split(TEMPLATES, []), "no template for testing"),
    ],
    "measuring": [
        (lambda c: bits_per_byte(c.m, c.t, []), "no text"),
        (lambda c: read_blimp(str(c.files / "no model")), "no .jsonl file"),
        (lambda c: similarity.read_sets(str(c.files / "sets")), "sets"),
        (lambda c: similarity.read_sets(str(c.files / "nowhere")), "nowhere"),
        (lambda c: WordJudge([]), "no topic"),
        (lambda c: ClassifierJudge(str(c.files / "nowhere")), "nowhere"),
        (lambda c: search_temperature(lambda t: 1.0, NAN), "nan"),
    ],
}  # fmt: skip
ALL = [pytest.param(*case, id=f"{name}-{number}") for name, cases in CASES.items() for number, case in enumerate(cases)]


@pytest.mark.parametrize(("call", "words"), ALL)
def test_bad_input_is_one_clear_sentence_and_leaves_nothing(c, call, words):
    with pytest.raises((ValueError, OSError)) as refused:
        call(c)
    message = str(refused.value)
    assert words in message and len(message.splitlines()) == 1 and 10 < len(message) < 400, message
