"""Every parameter of every notebook at its edges: it works, or one sentence says what is wrong."""

import pytest
from executing import computed_once, execute, refusal, results_of  # noqa: F401, a fixture
from helpers import ROOT

LONGEST = ("the film " * 127).strip()  # with the token that begins a text, one less than the context
TEXT, FOLDER = str(ROOT / "README.md"), str(ROOT / "data" / "demo" / "backpack")

WORKS = {
    "00_tour": [
        {"word": "a", "text": "The", "target": "film", "strength": 0, "topic": ["a"], "prompt": LONGEST,
         "pair": ["she", "he"]},
        {"profession": "construction worker", "template": "The {profession}", "strength": 3, "seed": 2**32 - 1,
         "device": "auto"},
        {"text": LONGEST, "target": "the", "topic": ["music", "football", "law"], "pair": ["he", "they"]},
        {"text": "The film"},
    ],
    "01_training": [
        {"steps": 1, "n_layer": 1, "n_head": 1, "n_embd": 8, "num_senses": 1, "block_size": 16, "batch_size": 1,
         "warmup": 0, "eval_every": 1, "save_every": 1, "eval_blocks": 1, "dropout": 0.5, "strict": False,
         "seed": 2**32 - 1, "finetune_steps": 1, "start": FOLDER},
        {"steps": 3, "n_head": 3, "n_embd": 12, "num_senses": 6, "vocab_size": 3000, "accumulate": 3,
         "optimizer": "muon", "warmup": 3, "eval_every": 1000, "save_every": 1000, "precision": "bf16", "device": "cpu",
         "strict": False, "learning_rate": 1e-9, "corpus": TEXT, "finetune_steps": 2},
    ],
    "02_senses": [
        {"word": "a", "other": "a", "long_word": "film", "text": "The", "target": "film", "baseline": ""},
        {"word": "king", "text": LONGEST, "target": "the", "contrast": "a", "seed": 7, "device": "auto"},
        {"text": "The film was", "contrast": "", "long_word": "antidisestablishmentarianism"},
    ],
    "03_topic_control": [
        {"model": FOLDER, "topics": ["music"], "strength": 1, "strengths": [], "pplm_steps": [], "samples": 1,
         "tokens": 1},
        {"model": FOLDER, "topics": ["music"], "topic": "sports", "words": "team game", "strength": 3,
         "strengths": [3, 3], "samples": 2, "tokens": 3, "prompt": LONGEST[:400], "pplm_steps": [0.01, 5.0],
         "device": "auto", "seed": 11, "trials": 1},
    ],
    "04_gender_bias": [
        {"professions": ["nurse", "guard", "cook"], "wanted": 1.0, "profession": "teacher",
         "whole_words": True, "reference": TEXT},
        {"professions": ["nurse", "guard", "construction worker"], "wanted": 0.01, "pair": ["she", "he"],
         "device": "auto", "seed": 3, "reference": TEXT},
    ],
    "05_knowledge": [
        {"subject": "Chicago", "remove": "Illinois", "add": "Texas", "prompts": ["The city of {subject} is in"],
         "facts_measured": 1, "finetune_facts": True, "bounds": [0.5]},
        {"model": FOLDER, "baseline": "none", "facts_measured": 2, "reference": TEXT, "share": 1.0, "seed": 2**32 - 1,
         "device": "auto"},
    ],
    "06_reading": [
        {"numbers": [1], "seeds": [0, 7], "counts_of_senses": [], "steps": 1, "word": "film", "text": "the film was",
         "reference": TEXT, "simulator": "size", "seed": 2**32 - 1},
        {"model": FOLDER, "baseline": "none", "numbers": [200], "seeds": [1, 0], "counts_of_senses": [64], "steps": 2,
         "device": "auto"},
    ],
}  # fmt: skip
REFUSED = {  # some of each notebook, whose checks stand in the notebook itself, in `make test`; the others are slow
    "00_tour": [
        ({"word": "  "}, "is no word"),
        ({"text": LONGEST * 2, "target": "the"}, "n_positions=256"),
        ({"target": "antidisestablishmentarianism"}, "tokens"),
        ({"strength": 4}, "choose one of 0, 1, 2, 3"),
        ({"strength": -1}, "choose one of 0, 1, 2, 3"),
        ({"topic": ["日本"]}, "日本"),
        ({"profession": "日本"}, "日本"),
        ({"template": "The nurse said that"}, "no slot"),
        ({"pair": ["he", "he"]}, "twice"),
        ({"pair": ["he"]}, "two words"),
        ({"device": "gpu"}, "is unknown; choose one of auto, cpu, cuda, mps"),
        ({"model": "nobody/nothing"}, "'nobody/nothing' is no folder with a model"),
        ({"model": "demo-transformer"}, "Backpack"),
        ({"prompt": LONGEST * 2}, "room"),
        ({"seed": -1}, "Seed must be"),
    ],
    "01_training": [
        ({"corpus": "nothing-here/*.txt"}, "nothing-here"),
        ({"corpus": ""}, "The corpus is empty"),
        ({"finetune_steps": 0}, "steps=0 is out of range"),
        ({"start": "demo-transformer"}, "Backpack"),
        ({"start": "nobody/nothing"}, "'nobody/nothing' is no folder with a model"),
        *(({name: 0}, f"{name}=0 is out of range") for name in
          ("n_layer", "n_head", "n_embd", "num_senses", "vocab_size", "batch_size", "accumulate", "steps",
           "eval_every", "save_every", "eval_blocks")),
        ({"n_embd": 30}, "does not divide"),
        ({"num_senses": 65}, "num_senses=65"),
        ({"block_size": 1}, "block_size=1"),
        ({"block_size": 15}, "block_size=15"),
        ({"vocab_size": 100}, "vocab"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 is out of range"),
        ({"learning_rate": float("nan")}, "learning_rate=nan is out of range"),
        ({"warmup": -1}, "warmup=-1 is out of range"),
        ({"warmup": 801}, "warmup=801 is out of range"),
        ({"dropout": 1.0}, "dropout=1.0 is out of range"),
        ({"optimizer": "sgd"}, "optimizer='sgd' is unknown"),
        ({"precision": "int8"}, "precision='int8' is unknown"),
        ({"device": "gpu"}, "device='gpu' is unknown"),
        ({"seed": -1}, "seed"),
    ],
    "02_senses": [
        ({"word": "…"}, "is no word"),
        ({"other": "日本"}, "日本"),
        ({"target": "antidisestablishmentarianism"}, "tokens"),
        ({"text": LONGEST * 2}, "n_positions=256"),
        ({"lexsim": "nothing-here"}, "nothing-here"),
        ({"corpus": "nothing-here.txt"}, "nothing-here"),
        ({"model": "demo-transformer"}, "Backpack"),
        ({"device": "gpu"}, "is unknown"),
    ],
    "03_topic_control": [
        ({"topic": "weather"}, "are no topics here"),
        ({"topics": ["weather"]}, "are no topics here"),
        ({"words": "日本"}, "日本"),
        ({"strength": 4}, "choose one of 0, 1, 2, 3"),
        ({"strengths": [-1]}, "choose one of 0, 1, 2, 3"),
        ({"strength": 0, "strengths": []}, "leaves nothing to compare"),
        ({"pplm_steps": [-0.1]}, "step"),
        ({"samples": 0}, "samples=0 should be at least 1"),
        ({"tokens": 0}, "tokens=0 should be at least 1"),
        ({"trials": 0}, "trials=0 should be at least 1"),
        ({"tokens": 300}, "leaves no room"),
        ({"prompt": LONGEST * 2}, "leaves no room"),
        ({"judge": "nothing/here"}, "nothing/here"),
        ({"baseline": "demo"}, "Transformer"),
        ({"baseline": "nobody/nothing"}, "'nobody/nothing' is no folder with a model"),
        ({"device": "gpu"}, "is unknown"),
        ({"reference": "nothing-here.txt"}, "nothing-here"),
    ],
    "04_gender_bias": [
        ({"professions": ["nurse", "guard"]}, "need three of them"),
        ({"professions": ["nurse", "guard"], "whole_words": True}, "need three of them"),
        ({"professions": ["nurse", "nurse"]}, "twice"),
        ({"profession": "日本"}, "日本"),
        ({"pair": ["he", "he"]}, "twice"),
        ({"pair": ["he", "antidisestablishmentarianism"]}, "tokens"),
        ({"wanted": 1.5}, "wanted=1.5"),
        ({"prompts": "nothing-here.json"}, "nothing-here"),
        ({"baseline": "demo"}, "Transformer"),
        ({"reference": "nothing-here.txt"}, "nothing-here"),
        ({"device": "gpu"}, "is unknown"),
    ],
    "05_knowledge": [
        ({"subject": "antidisestablishmentarianism"}, "tokens"),
        ({"subject": "日本"}, "tokens"),
        ({"add": "Russia"}, "The counter-object is the object, 'Russia'"),
        ({"subject": "Paris", "prompts": ["The city of London is in"]}, "lacks 'Paris' as a word"),
        ({"facts": "nothing-here.csv"}, "nothing-here"),
        ({"relations": "nothing-here.yaml"}, "nothing-here"),
        ({"examples": "nothing-here.csv"}, "nothing-here"),
        ({"examples": str(ROOT / "data" / "facts.csv")}, "lacks the column 'set'"),
        ({"bounds": [-0.1]}, "a finite number above 0"),
        ({"bounds": [float("inf")]}, "a finite number above 0"),
        ({"bounds": []}, "bounds"),
        ({"share": 0.0}, "share=0.0"),
        ({"methods": ["magic"]}, "The method 'magic' is unknown"),
        ({"facts_measured": -1}, "facts_measured=-1"),
        ({"baseline": "demo"}, "Transformer"),
        ({"model": "demo-transformer"}, "Backpack"),
        ({"reference": "nothing-here.txt"}, "nothing-here"),
        ({"device": "gpu"}, "is unknown"),
    ],
    "06_reading": [
        ({"word": "antidisestablishmentarianism"}, "tokens"),
        ({"word": "film", "text": "the film"}, "does not have 'film' in it"),
        ({"numbers": []}, "numbers=[]"),
        ({"numbers": [0]}, "numbers=[0]"),
        ({"simulator": "magic"}, "simulator='magic' is unknown"),
        ({"seeds": [0]}, "seeds=[0]"),
        ({"seeds": [0, 0]}, "seeds=[0, 0]"),
        ({"counts_of_senses": [65]}, "num_senses=65"),
        ({"steps": 0}, "steps=0"),
        ({"explanations": "nothing-here.csv"}, "nothing-here"),
        ({"explanations": str(ROOT / "data" / "facts.csv")}, "lacks the column 'word'"),
        ({"reference": "nothing-here.txt"}, "nothing-here"),
        ({"baseline": "demo"}, "Transformer"),
        ({"model": "demo-transformer"}, "Backpack"),
        ({"device": "gpu"}, "is unknown"),
    ],
}  # fmt: skip
QUICK = {
    "are no topics here",
    "should be at least 1",
    "leaves no room",
    "name the next word",
    "Backpack",
    "choose one of",
    "nothing-here",
    "steps=0",
    "tokens",
    "The counter-object is",
}


def cases(table):
    return [
        pytest.param(name, case, id=f"{name}-{number}", marks=marks_of(case))
        for name in table
        for number, case in enumerate(table[name])
    ]


def marks_of(case) -> list:
    quick = isinstance(case, tuple) and any(words in case[1] for words in QUICK)
    return [] if quick else [pytest.mark.slow]


@pytest.mark.parametrize(("name", "parameters"), cases(WORKS))
def test_a_notebook_works_at_the_edges(name, parameters, tmp_path):
    execute(name, parameters | {"out": str(tmp_path / "out")})
    results = results_of(tmp_path / "out")
    assert results["headline"] and len(results) > 1


@pytest.mark.parametrize(("name", "case"), cases(REFUSED))
def test_a_notebook_says_what_is_wrong(name, case, tmp_path):
    parameters, words = case
    with refusal(words):
        execute(name, parameters | {"out": str(tmp_path / "out")})
    assert not list(tmp_path.rglob("results.json"))
