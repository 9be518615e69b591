"""Every notebook under other parameters than its own: other models, words and texts, its exercises solved, and bad input.

All run in this process: the same cells in the same order, without the seconds that a kernel takes. (As a reader runs
them, with kernels, nbval runs them.)
"""

import ast
import json
import re
from contextlib import contextmanager
from types import SimpleNamespace

import matplotlib
import nbformat
import pandas as pd
import pytest
import torch
from helpers import ROOT, tiny_classifier, tiny_model

from backpack_lib import SenseEdits, load
from backpack_lib.analysis import bias, topic
from backpack_lib.analysis.knowledge import margins, project, read_facts
from backpack_lib.analysis.matching import compare_models
from backpack_lib.analysis.similarity import SETS
from backpack_lib.lessons.reading import professions_and_templates, small_models, stored_table, words_to_compare
from backpack_lib.loading import fingerprint, is_planted, load_baseline
from backpack_lib.running.notebook import RESULTS
from backpack_lib.running.parameters import default_parameters
from backpack_lib.studies.reading_study import gender_table
from backpack_lib.studies.topic_study import at_equal_fluency, settings_table
from backpack_lib.text import planted
from backpack_lib.text.tokenizers import train_tokenizer
from backpack_lib.text.writing import ids_of_text

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
FOLD = re.compile(r"<details><summary>Solution</summary>.*?```python\n(.*?)```.*?</details>", re.S)
CHECK = re.compile(r"^(\w+\.)?check_\w+\(answer_\d|^check_\d\(", re.M)
EMPTY = re.compile(r"^answer_\d = None\n")


# ---------------------------------------------------------------- how they are run


def execute(name: str, parameters: dict, solved: bool = False) -> SimpleNamespace:
    """Runs a notebook's code. -> its variables, and what the cells with exercises answered.

    solved: with the folded solutions in place of the empty answers.
    """
    matplotlib.use("Agg")
    assert set(parameters) <= set(default_parameters(NOTEBOOKS[name]))
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    solutions = iter(folded_solutions(notebook))
    space, answers = {"__name__": "__main__", "display": lambda shown: None}, []  # as IPython has it
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        asks, source = CHECK.search(cell.source), cell.source
        if asks and solved:
            source, emptied = EMPTY.subn(lambda _: next(solutions), source)
            assert emptied == 1
        value = execute_cell(source, f"{name}: {cell.source[:40]!r}", space)
        if asks:
            answers.append(value)
        if "parameters" in cell.metadata.get("tags", []):
            space |= parameters
    return SimpleNamespace(space=space, answers=answers)


def execute_cell(source: str, name: str, space: dict):
    """Runs the code of a cell and returns the value of its last expression, which a notebook would show."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), space)
    return None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), space)


def folded_solutions(notebook) -> list[str]:
    found = [FOLD.search(cell.source) for cell in notebook.cells if cell.cell_type == "markdown"]
    return [solution[1] for solution in found if solution]


def results_of(folder) -> dict:
    return json.loads((folder / RESULTS).read_text())


@pytest.fixture(autouse=True, scope="module")
def scores_computed_once():
    """The scores of topics take 03 most of its time, and are the same for most of these runs."""
    known = {}

    def remembered(function):
        def call(*given):
            key = (function, *(v.sum().item() if isinstance(v, torch.Tensor) else fingerprint(v) for v in given))
            if key not in known:
                known[key] = function(*given)
            return known[key]

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("largest_pushes",):
            patch.setattr(topic, name, remembered(getattr(topic, name)))
        yield


# ---------------------------------------------------------------- exercises, and the models that 01 trained

SHORT = {
    "03_topic_control": {
        "topics": ["music", "law", "money"],
        "strengths": [],
        "pplm_steps": [0.3],
        "samples": 16,
        "tokens": 40,
        "trials": 2,
    },
}


def assert_solved(answers: list[str], at_least: int = 2):
    assert len(answers) >= at_least and all(answer.startswith("Right") for answer in answers), answers


@pytest.mark.parametrize("name", [n for n in NOTEBOOKS if folded_solutions(nbformat.read(NOTEBOOKS[n], as_version=4))])
def test_empty_exercises_say_what_is_missing(name):
    cells = [cell for cell in nbformat.read(NOTEBOOKS[name], as_version=4).cells if cell.cell_type == "code"]
    cells = [cell for cell in cells if CHECK.search(cell.source)]
    assert len(cells) == len(folded_solutions(nbformat.read(NOTEBOOKS[name], as_version=4))) >= 2
    assert all("Not yet" in cell.outputs[0]["data"]["text/plain"] for cell in cells)


@pytest.mark.parametrize("model", ["demo", "planted"])
def test_the_tour_and_its_exercises(model, tmp_path):
    assert_solved(execute("00_tour", {"model": model, "out": str(tmp_path)}, solved=True).answers, 5)
    results = results_of(tmp_path)
    assert results["residual"] < 1e-3 and results["p after the edit"] != results["p"]


def test_training_and_its_exercises(planted_run):
    assert_solved(execute("01_training", {}, solved=True).answers)  # it finds its models trained
    results = results_of(planted_run)
    assert results["excess"] < 0.1 and results["meanings"] > 0.9 and results["professions"] > 0.9
    assert results["meanings, Backpack, meanings permuted (mean)"] < 0.6
    assert results["finetuning, new text"] < -1 and results["finetuning, old text"] > 0
    for name, senses in (("planted", 8), ("planted-transformer", 0)):
        assert getattr(load(name)[0].config, "num_senses", 0) == senses and is_planted(name)


def test_contexts_decide_between_planted_meanings_and_the_exercises_on_senses_are_solved(planted_run, tmp_path):
    assert_solved(execute("02_senses", {"model": "planted", "out": str(tmp_path)}, solved=True).answers)
    results = results_of(tmp_path)
    assert results["residual"] < 1e-4 and results["ambiguous words"] == 18
    assert results["effect of context"] > 5 > abs(results["by the word's own senses"])


def test_control_reaches_planted_topics_and_the_exercises_on_topics_are_solved(planted_run, tmp_path):
    given = {"model": "planted", "out": str(tmp_path)} | SHORT["03_topic_control"]
    assert_solved(execute("03_topic_control", given, solved=True).answers, 5)
    live = pd.read_csv(tmp_path / "live.csv").set_index(["method", "strength"])["success"]
    assert (
        live["Backpack", 2].max() > 0.5 > 0.4 > live["Backpack", 0].max()
    )  # three topics are announced, one is its own
    made = {file.name for file in tmp_path.iterdir()}
    assert made >= {"settings.csv", "equal_fluency.csv", "paired.csv", "responses.csv", "annealing.csv", "texts.csv.gz"}


def test_the_bias_search_finds_what_was_planted_and_the_edit_takes_it_away(planted_run, tmp_path):
    assert_solved(execute("04_gender_bias", {"model": "planted", "out": str(tmp_path)}, solved=True).answers, 5)
    results = results_of(tmp_path)
    assert results["rho"] >= 0.9 and results["p"] < 0.01 and results["share"] >= 0.9
    spread = pd.read_csv(tmp_path / "methods.csv", index_col=["model", "method"])["spread"]
    assert spread["Backpack", "removed"] < 0.05 * spread["Backpack", "as it is"]
    # What other words of a template carry is left, whichever senses of the profession are removed.
    assert results["excess removed, Backpack removed"] > results["excess removed, Backpack all senses removed"] - 0.02
    assert results["ratio, Backpack levelled"] < 1.3  # without what differs between professions
    assert abs(results["excess removed, Backpack constant offset"]) < 0.1  # the planted professions share no lean
    assert results["rise of the loss, removed, %"] < 1
    assert results["excess removed, held-out professions"] > 0.8 and results["excess removed, unseen words"] > 0.8
    made = {file.name for file in tmp_path.iterdir()}
    assert made >= {
        "professions.csv",
        "localization.csv",
        "held_out.csv",
        "methods.csv",
        "paired.csv",
        "loss.csv",
        "debiased.safetensors",
    }
    localization = pd.read_csv(tmp_path / "localization.csv", index_col="sense")
    assert localization["share"].sum() + results["elsewhere"] == pytest.approx(1)
    model, tokenizer = load("planted")
    words, templates = ["nurse", "guard"], ["At the farm, the {profession} hopes that"]
    before = bias.bias_ratio(model, tokenizer, words, templates)
    with SenseEdits.load(tmp_path / "debiased.safetensors", model, tokenizer).applied():
        assert bias.bias_ratio(model, tokenizer, words, templates) < before


def test_planted_facts_are_edited_and_taught_and_the_exercises_are_solved(planted_run, tmp_path):
    given = {"model": "planted", "out": str(tmp_path), "facts_measured": 4, "finetuned_facts": 1}
    assert_solved(execute("05_knowledge", given, solved=True).answers, 5)
    results = results_of(tmp_path)
    assert results["known to the Backpack, facts"] >= 28 and results["largest error of the prediction"] < 1e-3
    assert (
        results["efficacy, Backpack projection, dosed"] == 1
        and results["paraphrases, Backpack projection, dosed"] > 0.9
    )
    assert results["efficacy, 1 at once"] == results["efficacy, 20 at once"]
    assert (
        results["new facts, Backpack, senses, 20 examples"]
        > 0.9
        > 0.1
        > results["new facts elsewhere, Backpack, senses, 20 examples"]
    )
    made = {file.name for file in tmp_path.iterdir()}
    assert made >= {
        "known.csv",
        "methods.csv",
        "paired.csv",
        "at_once.csv",
        "senses.csv",
        "taught_success.csv",
        "taught.safetensors",
    }


def test_planted_senses_are_read_and_the_exercises_are_solved(planted_run, tmp_path):
    given = {
        "model": "planted",
        "out": str(tmp_path),
        "numbers": [1, 10, 30],
        "seeds": [0, 1],
        "counts_of_senses": [1],
        "steps": 150,
    }
    assert_solved(execute("06_reading", given, solved=True).answers, 5)
    results = results_of(tmp_path)
    assert results["all senses, said in words, 30 words"] > 0.5 > results["all senses, mean sense, 0 words"]
    assert results["loss, counted bigrams"] > results["loss, model"]
    assert results["place moves the weights most, share of texts"] > 0.6
    assert results["matched, planted text"] > results["null (95 %), planted text"]
    made = {file.name for file in tmp_path.iterdir()}
    assert made >= {
        "explanations.csv",
        "by_sense.csv",
        "bigrams.csv",
        "seeds.csv",
        "senses_planted.csv",
        "choosing.csv",
    }


# ---------------------------------------------------------------- a model that nobody has a Transformer for


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A small random Backpack in the released format, with a vocabulary of its own."""
    folder = tmp_path_factory.mktemp("released")
    words = "film movie screenwriting time money family music driver nurse he she her his him man woman sports".split()
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "data" / "README.md")]
    tokenizer = train_tokenizer([*texts, " ".join(words)], 1200, words=words)
    model = tiny_model(vocab_size=len(tokenizer) + 8, n_positions=128, num_senses=16, n_embd=32, initializer_range=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "gpt2", "auto_map": {"AutoModelForCausalLM": "nowhere.Backpack"}}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


WITH_A_BASELINE = ("03_topic_control", "04_gender_bias", "05_knowledge", "06_reading")
RELEASED = {
    "00_tour": {},
    "02_senses": {"corpus": str(ROOT / "README.md")},
    "03_topic_control": {"topics": ["music", "sports"], "strengths": [2], "samples": 2, "tokens": 8, "trials": 2},
    "04_gender_bias": {
        "professions": ["nurse", "driver", "sports", "man", "construction worker", "cook"],
        "profession": "driver",
    },
    "05_knowledge": {
        "subject": "film",
        "remove": "music",
        "add": "money",
        "prompts": ["the film is", "a film about"],
        "facts_measured": 2,
    },
    "06_reading": {
        "word": "film",
        "text": "a film about the music",
        "numbers": [2, 5],
        "seeds": [0, 1],
        "counts_of_senses": [],
        "steps": 20,
    },
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_model_of_another_vocabulary_goes_through_without_a_transformer(name, released, tmp_path, capsys):
    execute(name, RELEASED[name] | {"model": released, "out": str(tmp_path)})
    assert results_of(tmp_path)["headline"]
    if name in WITH_A_BASELINE:
        said = capsys.readouterr().out
        assert f"No Transformer that belongs to {released!r} is known; name one by the parameter `baseline`." in said


@pytest.mark.parametrize("name", WITH_A_BASELINE)
def test_a_transformer_of_another_vocabulary_is_refused(name, released, tmp_path):
    with pytest.raises(ValueError, match="baseline='demo-transformer' reads other tokens than") as refused:
        execute(name, {"model": released, "baseline": "demo-transformer", "out": str(tmp_path)})
    assert "(16,000 and 1,200 in all)" in str(refused.value) and len(str(refused.value).splitlines()) == 1


# ---------------------------------------------------------------- words, texts and files of one's own


@pytest.mark.slow
def test_senses_with_words_texts_and_sets_of_ones_own(tmp_path):
    pairs = [("king", "queen", 8), ("film", "movie", 9), ("river", "film", 1), ("music", "band", 7), ("city", "war", 2)]
    pairs = [(a, b, score + number / 10) for number in range(6) for a, b, score in pairs]
    pd.DataFrame(pairs).to_csv(tmp_path / SETS["RG-65"].file, sep=";", header=False, index=False)
    (tmp_path / "own.txt").write_text("The king and his wife moved to the city of London.\n\n" * 40)
    given = {"word": "king", "other": "queen", "text": "The king and his", "lexsim": str(tmp_path)}
    execute("02_senses", given | {"corpus": str(tmp_path / "own.txt"), "out": str(tmp_path / "out")})
    made = {file.name for file in (tmp_path / "out").iterdir()}
    assert made >= {"contributions.csv", "silenced.csv", "roles.csv", "similarity.csv", "edits.safetensors"}
    found = pd.read_csv(tmp_path / "out" / "similarity.csv")
    assert len(found) == 3  # the Backpack, its input embedding, and its Transformer, on one set
    assert (
        len(pd.read_csv(tmp_path / "out" / "similarity_differences.csv")) == 4
    )  # two others, on the set and their mean


@pytest.mark.slow
def test_topic_control_with_a_judge_a_beginning_and_words_of_ones_own(planted_run, tmp_path):
    pytest.importorskip("mauve")
    tiny_classifier(tmp_path / "judge", {0: "music", 1: "law"}, bias=[9.0, -9.0])
    (tmp_path / "own.txt").write_text("\n\n".join(text.text for text in planted.generate(300)))
    given = {
        "model": "planted",
        "topics": ["music", "law"],
        "strengths": [2],
        "words": "prison bridge",
        "samples": 4,
        "trials": 2,
    }
    given |= {"judge": str(tmp_path / "judge"), "reference": str(tmp_path / "own.txt"), "prompt": "At the"}
    execute("03_topic_control", given | {"out": str(tmp_path / "out")})
    texts = pd.read_csv(tmp_path / "out" / "texts.csv.gz")
    assert (
        texts.loc[texts["topic"] == "music", "on topic"].all()
        and not texts.loc[texts["topic"] == "law", "on topic"].any()
    )
    assert pd.read_csv(tmp_path / "out" / "equal_fluency.csv")["MAUVE"].between(0, 1).all()


def own_prompts(folder, **changes) -> str:
    """A file of templates that can be changed to be wrong."""
    english = {
        "fit": ["The {profession} said that", "When the {profession} came,"],
        "test": ["If the {profession} is late,"],
    }
    english |= {"by definition": {"he": ["The king said that"], "she": []}, "other pairs": []} | changes
    (folder / "own.json").write_text(json.dumps({"english": english}))
    return str(folder / "own.json")


@pytest.mark.slow
def test_bias_of_another_pair_with_professions_and_templates_of_ones_own(tmp_path):
    given = {"pair": ["he", "they"], "professions": ["nurse", "guard", "construction worker", "teacher", "cook"]}
    given |= {"prompts": own_prompts(tmp_path), "wanted": 0.5, "out": str(tmp_path / "out")}
    execute("04_gender_bias", given | {"reference": str(ROOT / "README.md")})
    model, tokenizer = load("demo")
    measured = pd.read_csv(tmp_path / "out" / "professions.csv", index_col="profession")["log-odds"]
    template = "If the {profession} is late,"
    for name, value in measured.items():
        ids = torch.tensor([ids_of_text(tokenizer, template.replace("{profession}", name))])
        log_probs = model(ids).logits[0, -1].log_softmax(-1)
        he, they = (tokenizer(" " + word)["input_ids"][0] for word in ("he", "they"))
        assert value == pytest.approx((log_probs[he] - log_probs[they]).item(), abs=1e-3)
    assert len(measured) == 5


@pytest.mark.parametrize(
    ("given", "prompts", "message"),
    [
        ({"professions": ["nurse", "guard", "日本"]}, {}, "The vocabulary lacks the word '日本'"),
        ({}, {"fit": ["The nurse said that"]}, "The template 'The nurse said that' has no slot"),
        ({}, {"test": []}, "There is no template for testing"),
    ],
)
def test_templates_and_professions_that_do_not_fit_are_named(given, prompts, message, tmp_path):
    given = given | {"prompts": own_prompts(tmp_path, **prompts), "out": str(tmp_path / "out")}
    with refusal(message):
        execute("04_gender_bias", given)


# ---------------------------------------------------------------- the tables that are stored


def test_the_stored_texts_of_topic_control_are_of_the_demo_models_on_all_topics():
    stored = pd.read_csv(ROOT / "data" / "demo" / "topic_control" / "texts.csv.gz")
    models = stored.groupby("method")["model"].unique()
    assert list(models["Backpack"]) == [fingerprint(load("demo")[0])], "run: make topic-control"
    assert list(models["PPLM"]) == [fingerprint(load("demo-transformer")[0])]
    assert stored["topic"].nunique() == 17
    fair = at_equal_fluency(settings_table(stored))
    assert set(fair["strength"]) == {0, 1, 2, 3, 0.1, 0.3} and (fair["reached"] | (fair["why"] != "")).all()


def test_the_stored_losses_of_debiasing_are_of_the_demo_model():
    loss = pd.read_csv(ROOT / "data" / "demo" / "gender_bias" / "loss.csv", index_col="edit")
    assert set(loss["model"]) == {fingerprint(load("demo")[0])}, "run: make gender-bias"
    assert loss.loc["as it is", "rise, %"] == 0 and "removed, along" in loss.index


@pytest.mark.parametrize("name", ["facts", "taught"])
def test_the_stored_tables_of_knowledge_are_of_the_demo_model(name):
    stored = pd.read_csv(ROOT / "data" / "demo" / "knowledge" / f"{name}.csv.gz")
    assert set(stored["weights"]) == {fingerprint(load("demo")[0])}, "run: make knowledge"
    if name == "facts":
        assert stored.groupby(["model", "method"]).size().nunique() == 1  # all methods on the same facts
    else:
        assert {*stored["method"]} == {"as it is", "senses", "all weights", "LoRA"} and stored["set"].nunique() == 3


def test_a_stored_row_of_knowledge_is_what_the_code_gives():
    model, tokenizer = load("demo")
    stored = pd.read_csv(ROOT / "data" / "demo" / "knowledge" / "facts.csv.gz")
    row = stored[(stored["model"] == "Backpack") & (stored["method"] == "projection")].iloc[3]
    (fact,) = [f for f in read_facts() if (f.relation, f.subject) == (row["relation"], row["subject"])]
    with project(model, tokenizer, [fact]).applied():
        assert margins(model, tokenizer, fact, fact.test).mean() == pytest.approx(row["margin, test"], abs=2e-3)


def test_the_stored_tables_of_reading_are_of_these_models():
    demo = load("demo")[0]
    for name in ("explanations", "bigrams_of_demo"):
        assert set(stored_table(name)["weights"]) == {fingerprint(demo)}, "run: make reading"
    models, tokenizer = small_models()
    tokens, among = words_to_compare(tokenizer)
    found = compare_models(models["seed-0"], models["seed-1"], tokens, among)
    row = stored_table("seeds").query("what == 'senses' and one == 'seed-0' and other == 'seed-1'").iloc[0]
    assert found["matched"] == pytest.approx(row["matched"], abs=2e-3)
    gender = gender_table(
        models, tokenizer, *professions_and_templates(), {("seed-0", "seed-1"): found["partners"]}
    ).iloc[0]
    stored = stored_table("gender").query("one == 'seed-0' and other == 'seed-1'").iloc[0]
    assert (
        gender[["sense", "other sense", "partners"]].tolist() == stored[["sense", "other sense", "partners"]].tolist()
    )
    assert gender["share"] == pytest.approx(stored["share"], abs=2e-2)
    trained = stored_table("bigrams_over_training")
    assert trained["step"].is_monotonic_increasing and set(stored_table("senses")["senses"]) == {0, 1, 4, 16}


# ---------------------------------------------------------------- every parameter at its edges: it works, or one sentence

LONGEST = ("the film " * 127).strip()  # with the token that begins a text, one less than the context
TEXT, FOLDER = str(ROOT / "README.md"), str(ROOT / "data" / "demo" / "backpack")

WORKS = {
    "00_tour": [
        {"word": "a", "text": "The", "target": "film", "strength": 0, "topic": ["a"], "prompt": LONGEST, "pair": ["she", "he"]},
        {"profession": "construction worker", "template": "The {profession}", "strength": 3, "seed": 2**32 - 1, "device": "auto"},
        {"text": LONGEST, "target": "the", "topic": ["music", "football", "law"], "pair": ["he", "they"]},
        {"text": "The film"},
    ],
    "01_training": [
        {"steps": 1, "n_layer": 1, "n_head": 1, "n_embd": 8, "num_senses": 1, "block_size": 16, "batch_size": 1, "warmup": 0, "eval_every": 1, "save_every": 1,
         "eval_blocks": 1, "dropout": 0.5, "strict": False, "seed": 2**32 - 1, "finetune_steps": 1, "start": FOLDER},
        {"steps": 3, "n_head": 3, "n_embd": 12, "num_senses": 6, "vocab_size": 3000, "accumulate": 3, "optimizer": "muon", "warmup": 3, "eval_every": 1000,
         "save_every": 1000, "precision": "bf16", "device": "cpu", "strict": False, "learning_rate": 1e-9, "corpus": TEXT, "finetune_steps": 2},
    ],
    "02_senses": [
        {"word": "a", "other": "a", "long_word": "film", "text": "The", "target": "film", "baseline": ""},
        {"word": "king", "text": LONGEST, "target": "the", "contrast": "a", "seed": 7, "device": "auto"},
        {"text": "The film was", "contrast": "", "long_word": "antidisestablishmentarianism"},
    ],
    "03_topic_control": [
        {"model": FOLDER, "topics": ["music"], "strength": 1, "strengths": [], "pplm_steps": [], "samples": 1, "tokens": 1},
        {"model": FOLDER, "topics": ["music"], "topic": "sports", "words": "team game", "strength": 3, "strengths": [3, 3], "samples": 2, "tokens": 3,
         "prompt": LONGEST[:400], "pplm_steps": [0.01, 5.0], "device": "auto", "seed": 11, "trials": 1},
    ],
    "04_gender_bias": [
        {"professions": ["nurse", "guard", "cook"], "wanted": 1.0, "wide_bounds": [-0.01, 0.0], "profession": "teacher", "whole_words": True, "reference": TEXT},
        {"professions": ["nurse", "guard", "construction worker"], "wanted": 0.01, "pair": ["she", "he"], "device": "auto", "seed": 3, "reference": TEXT},
    ],
    "05_knowledge": [
        {"subject": "Chicago", "remove": "Illinois", "add": "Texas", "prompts": ["The city of {subject} is in"], "facts_measured": 1, "finetuned_facts": 1, "bounds": [0.5]},
        {"model": FOLDER, "baseline": "none", "facts_measured": 2, "reference": TEXT, "share": 1.0, "seed": 2**32 - 1, "device": "auto"},
    ],
    "06_reading": [
        {"numbers": [1], "seeds": [0, 7], "counts_of_senses": [], "steps": 1, "word": "film", "text": "the film was", "reference": TEXT, "simulator": "size", "seed": 2**32 - 1},
        {"model": FOLDER, "baseline": "none", "numbers": [200], "seeds": [1, 0], "counts_of_senses": [64], "steps": 2, "device": "auto"},
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
          ("n_layer", "n_head", "n_embd", "num_senses", "vocab_size", "batch_size", "accumulate", "steps", "eval_every", "save_every", "eval_blocks")),
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
        ({"wide_bounds": [1.0, -1.0]}, "bounds"),
        ({"wide_bounds": [1.0]}, "bounds"),
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
        ({"bounds": [-0.1]}, "cannot be met"),
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


@contextmanager
def refusal(words: str):
    """What is inside fails with one sentence that has these words."""
    with pytest.raises((ValueError, OSError)) as refused:
        yield
    message = str(refused.value)
    assert words in message and len(message.splitlines()) == 1 and len(message) < 500, message


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


def test_planted_models_are_shipped_for_whoever_has_not_trained_them(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKPACK_RUNS", str(tmp_path))
    (model, tokenizer), (transformer, _) = load("planted"), load("planted-transformer")
    assert is_planted("planted") and model.config.num_senses == 8 and len(tokenizer) == transformer.config.vocab_size
    assert fingerprint(load_baseline("planted")[0]) == fingerprint(transformer)
