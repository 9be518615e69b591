"""What is shown: the numbers are those of the model, every token is escaped, and widgets follow their controls."""

import re
import time
from html import unescape

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from backpack_lib import SenseEdits, attribute, figures, load
from backpack_lib.analysis.attribution import read
from backpack_lib.analysis.explanations import explain
from backpack_lib.analysis.senses import pushes, sense_directions, senses_of_words
from backpack_lib.analysis.topic import TopicControl
from backpack_lib.display import tables
from backpack_lib.display.explorers import (
    OWN,
    BiasExplorer,
    EditWorkbench,
    ExplanationExplorer,
    KnowledgeExplorer,
    SenseExplorer,
    SentenceExplorer,
    TopicExplorer,
)
from backpack_lib.text.tokenizers import train_tokenizer
from backpack_lib.text.words import readable, spell, spell_text, token_of_word
from backpack_lib.text.writing import ids_of_text

TOKENIZER = tiny_tokenizer()
V = len(TOKENIZER)
MODEL = tiny_model(vocab_size=V, num_senses=4)
SCRIPT = "<script>alert('1&2')</script>"


def text_of(html):
    return unescape(re.sub(r"<[^>]*>", " ", html))


# ---------------------------------------------------------------- tables


def test_word_senses_are_what_each_sense_pushes_most():
    found = tables.word_senses(MODEL, TOKENIZER, "nurse", n=3)
    pushed = pushes(MODEL, senses_of_words(MODEL, TOKENIZER, ["nurse"])[0])
    assert len(found) == 4 * 2 * 3
    for row in found.itertuples():
        order = pushed[row.sense].sort(descending=row.direction == "up")
        assert row.push == pytest.approx(order.values[row.rank - 1].item(), abs=1e-5)
        assert row.token == spell(TOKENIZER, [order.indices[row.rank - 1]])[0]


def test_compared_words_share_what_both_push_up():
    one, two = senses_of_words(MODEL, TOKENIZER, ["nurse", "concert"])
    found = tables.compare_senses(MODEL, TOKENIZER, one, two, n=2)
    for sense in range(4):
        cosine = torch.nn.functional.cosine_similarity(one[sense], two[sense], dim=0).item()
        assert found.at[sense, "cosine"] == pytest.approx(cosine, abs=1e-5)
        both = [min(a, b) for a, b in zip(pushes(MODEL, one[sense]), pushes(MODEL, two[sense]))]
        best = sorted(range(len(both)), key=both.__getitem__, reverse=True)[:2]
        assert found.at[sense, "both push up"] == " · ".join(spell(TOKENIZER, best))
    assert tables.compare_senses(MODEL, TOKENIZER, one, one)["cosine"].tolist() == pytest.approx([1] * 4)


def test_the_nearest_word_of_a_word_is_itself():
    vectors = senses_of_words(MODEL, TOKENIZER, ["nurse"])[0]
    found = tables.near_words(sense_directions(MODEL), TOKENIZER, vectors, n=2)
    assert all(row.startswith("nurse · ") for row in found["nearest"]) and found["mean cosine"].max() <= 1


@given(st.integers(1, 9), st.integers(0, 2**16))
def test_the_largest_and_all_others_sum_to_the_whole(n, seed):
    values = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    found = tables.largest(tables.by_token(TOKENIZER, range(5), values), n)
    assert found["contribution"].sum() == pytest.approx(values.sum().item(), abs=1e-5)
    sizes = found["contribution"][:n].abs()
    assert sizes.is_monotonic_decreasing and sizes.iloc[-1] == pytest.approx(
        values.abs().flatten().sort(descending=True).values[n - 1].item()
    )


def test_next_words_hold_the_likeliest_of_either_and_those_to_watch():
    before, after = torch.randn(2, len(TOKENIZER), generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    found = tables.next_words(TOKENIZER, before, after, n=3, watch=(7,))
    ids = [*torch.maximum(before, after).topk(3).indices.tolist(), 7]
    assert list(found["next"]) == spell(TOKENIZER, ids)
    assert found["ratio"].tolist() == pytest.approx((after[ids].exp() / before[ids].exp()).tolist(), rel=1e-4)
    assert list(tables.next_words(TOKENIZER, before, n=2).columns) == ["next", "probability"]


# ---------------------------------------------------------------- HTML


@pytest.fixture(scope="module")
def scripted():
    """A model whose vocabulary has a token that would run in a browser."""
    tokenizer = train_tokenizer(["x"], 400)
    tokenizer.add_tokens([SCRIPT])
    return tiny_model(vocab_size=len(tokenizer), num_senses=3, n_positions=40), tokenizer


def test_tokens_show_as_text_everywhere(scripted):
    model, tokenizer = scripted
    script = tokenizer.convert_tokens_to_ids(SCRIPT)
    ids = [tokenizer.eos_token_id, script, script]
    reading = read(model, ids)
    table = tables.by_token(tokenizer, ids, reading.contributions(script))
    words = tables.word_senses(model, tokenizer, SCRIPT, n=len(tokenizer))
    explorer = SenseExplorer(model, tokenizer, SCRIPT, directions=sense_directions(model))
    explorer.other.value = SCRIPT
    sentence = SentenceExplorer(model, tokenizer, SCRIPT, SCRIPT, SCRIPT)
    bench = EditWorkbench(model, tokenizer, SCRIPT, SCRIPT, watch="…x")
    bench.by.value = 0
    bench.keep.click()
    bench.write.click()
    assert not bench.message.value
    pages = [
        tables.sense_words_html(words, caption=SCRIPT),
        tables.shaded(table, caption=SCRIPT).to_html(),
        tables.shaded(table.T).to_html(),
        tables.shaded(tables.largest(table)).to_html(),
        tables.shaded(tables.next_words(tokenizer, reading.log_probs(), n=len(tokenizer))).to_html(),
        tables.colored_tokens(tokenizer, ids, reading.weights.sum(1)),
        tables.side_by_side({SCRIPT: SCRIPT}),
        tables.reading_html(tokenizer, ids, reading, script, script),
        explorer.page.value,
        sentence.page.value,
        bench.page.value,
        bench.written.value,
    ]
    for page in pages:
        assert "<script" not in page and SCRIPT in text_of(page).replace("  ", " "), page[:300]
    sentence.target.value = SCRIPT + "no"
    assert "<script" not in sentence.message.value and sentence.message.value


def test_larger_values_are_deeper_in_colour_and_signs_differ():
    html = tables.colored_tokens(TOKENIZER, [5, 6, 7], torch.tensor([2.0, -1.0, 0.0]))
    assert re.findall(r"rgba\(([^)]*)\)", html)[:2] == [f"{tables.UP}, 0.60", f"{tables.DOWN}, 0.30"]
    styled = tables.shaded(pd.DataFrame({"a": [4.0, -1.0], "b": ["x", "y"]})).to_html()
    assert f"{tables.UP}, 0.60" in styled and f"{tables.DOWN}, 0.15" in styled


def test_a_table_may_hold_one_token_twice_and_shows_its_names_in_the_corner():
    twice = tables.shaded(pd.DataFrame({"next": [".", "."], "probability": [0.5, 0.2]})).to_html()
    assert text_of(twice).split()[-6:] == ["next", "probability", ".", "0.50", ".", "0.20"]
    table = tables.shaded(tables.by_token(TOKENIZER, [5, 6], torch.eye(2))).to_html()
    assert "token \\ sense" in text_of(table)


def test_figures_show_the_values():
    frame = tables.by_token(TOKENIZER, [5, 6], torch.tensor([[1.0, -2.0], [0.5, 0.0]]))
    axes = figures.heatmap(frame, "finding", "nats").axes[0]
    mesh = axes.collections[0]
    assert mesh.get_array().flatten().tolist() == [1, -2, 0.5, 0] and mesh.get_clim() == (-2, 2)
    bars = figures.grouped_bars(pd.DataFrame({"before": [0.5, 0.2], "after": [0.1, 0.3]}, index=[".", "."]), "f", "p")
    assert sorted(p.get_width() for p in bars.axes[0].patches if p.get_width()) == [0.1, 0.2, 0.3, 0.5]
    table = pd.DataFrame({"rho": [0.5], "low": [0.4], "high": [0.7]}, index=["set"])
    points = figures.intervals({"one": table}, "f", "rho").axes[0]
    assert list(points.lines[0].get_ydata()) == [0.5]
    across = figures.row_intervals(table.assign(low=0.3), "f", "rho", at=1, log=True).axes[0]
    assert list(across.lines[0].get_xdata()) == [0.5] and across.get_xscale() == "log"
    (interval,) = across.containers[0].lines[2][0].get_segments()
    assert interval[:, 0].tolist() == pytest.approx([0.3, 0.7])
    rows = pd.DataFrame({"method": ["a", "b", "b"], "strength": [0.0, 2.5, 2.5], "success": [0.5, 0.2, 0.4]})
    axes = figures.trade_off(rows.assign(**{"relative perplexity": [1.0, 3.0, 2.0]}), "f").axes[0]
    assert [text.get_text() for text in axes.get_legend().texts] == ["a, no control", "b, 2.5"]
    assert list(axes.lines[1].get_xdata()) == [2, 3] and list(axes.lines[1].get_ydata()) == [0.4, 0.2]
    lines = figures.curves(pd.DataFrame({"one": [3.0, 1.0], "two": [float("nan"), 2.0]}), "f", "x", "y").axes[0]
    assert list(lines.lines[0].get_ydata()) == [3, 1] and len(lines.get_legend().texts) == 2
    named = figures.named_points(pd.DataFrame({"x": [0.1], "y": [7.0]}, index=["music"]), "f", "x", "y").axes[0]
    assert named.texts[0].get_text() == "music" and named.collections[0].get_offsets().tolist() == [[0.1, 7.0]]
    truth = figures.against_truth(pd.DataFrame({"x": [0.1], "y": [0.7]}, index=["nurse"]), "f", "x", "y").axes[0]
    assert list(truth.lines[0].get_ydata()) == [0, 1] and truth.texts[0].get_text() == "nurse"


# ---------------------------------------------------------------- widgets


def test_the_sense_explorer_follows_its_controls():
    explorer = SenseExplorer(MODEL, TOKENIZER, "nurse", directions=sense_directions(MODEL))
    assert "“nurse” is one token." in text_of(explorer.page.value)
    expected = tables.sense_words_html(tables.word_senses(MODEL, TOKENIZER, "nurse", multi_token=0))
    assert expected in explorer.page.value and "nearest" in explorer.page.value
    explorer.other.value = "concert"
    assert "both push up" in explorer.page.value
    explorer.word.value = "zebra"
    names = spell(TOKENIZER, TOKENIZER(" zebra")["input_ids"])
    assert f"{len(names)} tokens: {' · '.join(names)}" in text_of(explorer.page.value)
    assert [label for label, _ in explorer.part.options] == ["mean of all", *names]
    for choice in ("mean", 0, 1):
        explorer.part.value = choice
        words = tables.word_senses(MODEL, TOKENIZER, "zebra", multi_token=choice)
        assert tables.sense_words_html(words) in explorer.page.value


def test_the_sentence_explorer_follows_its_controls():
    explorer = SentenceExplorer(MODEL, TOKENIZER, "the nurse said", "he", "she")
    he, she = (token_of_word(TOKENIZER, word) for word in ("he", "she"))

    def expected(text, position, contrast, what):
        ids = ids_of_text(TOKENIZER, text)
        return tables.reading_html(TOKENIZER, ids, read(MODEL, ids, position), he, contrast, what)

    def shown():
        return re.fullmatch("<div [^>]*>(.*)</div>", explorer.page.value, re.S)[1]

    assert shown() == expected("the nurse said", -1, she, "contributions")
    explorer.contrast.value = ""
    assert shown() == expected("the nurse said", -1, None, "contributions")
    explorer.position.value = 1
    explorer.what.value = "weights"
    assert shown() == expected("the nurse said", 1, None, "weights")
    explorer.text.value = "the concert"
    assert shown() == expected("the concert", 1, None, "weights")
    assert "residual of" in explorer.page.value


def test_the_workbench_shows_an_edit_before_it_is_kept():
    bench = EditWorkbench(MODEL, TOKENIZER, "the nurse said", "nurse", watch="he she")
    assert "no edits" in bench.page.value
    bench.by.value = -1.5
    ids = ids_of_text(TOKENIZER, "the nurse said")
    with SenseEdits(MODEL, TOKENIZER).scale("nurse", by=-1.5).applied(MODEL):
        after = read(MODEL, ids).log_probs()
    watched = tuple(token_of_word(TOKENIZER, word) for word in ("he", "she"))
    table = tables.next_words(TOKENIZER, read(MODEL, ids).log_probs(), after, watch=watched)
    for name, row in table.iterrows():
        assert f"{row['after']:.3f}" in text_of(bench.page.value)
    assert "not kept yet" in bench.page.value and len(bench.edits) == 0
    bench.keep.click()
    assert repr(bench.edits) == "1. scale all senses of “nurse” by -1.5" and bench.by.value == 1
    assert "not kept yet" not in bench.page.value and f"{table['after'].iloc[0]:.3f}" in text_of(bench.page.value)
    assert not MODEL.backpack.patches


def test_the_workbench_replaces_projects_undoes_and_clears():
    bench = EditWorkbench(MODEL, TOKENIZER, "the nurse said", "nurse")
    bench.sense.value, bench.kind.value, bench.other.value = 2, "replace", "concert"
    bench.keep.click()
    bench.kind.value, bench.other.value, bench.into.value, bench.word.value = "project", "he", "she", ""
    bench.sense.value = "all"
    bench.keep.click()
    assert repr(bench.edits).splitlines() == [
        "1. replace sense 2 of “nurse” by those of “concert”",
        "2. take “he” out of all senses of all words and put “she” in",
    ]
    bench.undo.click()
    assert len(bench.edits) == 1
    bench.clear.click()
    assert len(bench.edits) == 0 and "no edits" in bench.page.value
    bench.undo.click()
    assert "There is no edit to undo" in bench.message.value


def test_the_workbench_writes_saves_and_loads(tmp_path):
    bench = EditWorkbench(MODEL, TOKENIZER, "the nurse", "nurse")
    bench.by.value = 0
    bench.keep.click()
    bench.file.value = str(tmp_path / "mine.safetensors")
    bench.save.click()
    assert "saved as" in bench.message.value and "1 edits" in bench.message.value
    bench.load.click()
    assert len(bench.edits) == 2
    bench.file.value = str(tmp_path / "no such folder" / "mine.safetensors")
    bench.save.click()
    assert "could not be written" in bench.message.value
    bench.load.click()
    assert "There is no file" in bench.message.value


TOPICS = [{"name": "care", "steer": ["nurse", "doctor"]}, {"name": "<music>", "steer": ["concert"]}]


def test_the_topic_explorer_follows_its_controls():
    torch.manual_seed(0)
    baseline = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=64, n_embd=8, n_layer=1, n_head=1)).eval()
    model = tiny_model(vocab_size=V, num_senses=4, n_positions=64)
    explorer = TopicExplorer(model, TOKENIZER, TOPICS, baseline, temperature=0.5)
    assert explorer.words.value == "nurse doctor" and explorer.strength.value == 2

    def shows(words, strength):
        table = tables.turned_up(TopicControl(model, TOKENIZER, words, strength))
        return all(
            f"{row.score:.2f}" in explorer.page.value and row.token in text_of(explorer.page.value)
            for row in table.itertuples()
        )

    assert shows(["nurse", "doctor"], 2) and "2.20" in explorer.page.value
    explorer.topic.value, explorer.strength.value = "<music>", 3
    assert explorer.words.value == "concert" and shows(["concert"], 3) and "3.30" in explorer.page.value
    explorer.words.value = "bat, lion"
    assert shows(["bat", "lion"], 3) and explorer.topic.value == OWN
    explorer.strength.value, explorer.prompt.value = 2, "the nurse"
    explorer.write.click()
    control = TopicControl(model, TOKENIZER, ["bat", "lion"], 2)
    texts = [control.at(0).generate(["the nurse"], 40)[0], control.generate(["the nurse"], 40, temperature=0.5)[0]]
    shown = text_of(explorer.written.value)
    assert all(text in shown for text in texts) and "PPLM" in shown and "no control" in shown


def test_the_bias_explorer_follows_its_controls(tmp_path):
    templates = ["the {profession} said that", "near the {profession} she"]
    explorer = BiasExplorer(MODEL, TOKENIZER, ["nurse", "concert"], templates, turned_down=[1, 3])
    he, she = (token_of_word(TOKENIZER, word) for word in ("he", "she"))

    def shows(text, edits):
        ids = ids_of_text(TOKENIZER, text)
        before = read(MODEL, ids)
        with edits.applied():
            after = read(MODEL, ids)
        page = text_of(explorer.page.value)
        odds = f"{before.total(he, she):+.2f} before, {after.total(he, she):+.2f} after"
        probabilities = [f"{reading.log_probs()[word].exp():.4f}" for reading in (before, after) for word in (he, she)]
        contributions = [f"{value:.2f}" for value in after.contributions(he, she).flatten().tolist()]
        return odds in page and all(number in page for number in probabilities + contributions)

    none = SenseEdits(MODEL, TOKENIZER)
    turned_down = SenseEdits(MODEL, TOKENIZER).scale("nurse", [1, 3], 0)
    assert [slider.value for slider in explorer.scales] == [1, 0, 1, 0]  # it opens with the edit applied
    assert shows("the nurse said that", turned_down)
    explorer.reset.click()
    assert shows("the nurse said that", none) and len(explorer.edits()) == 0
    explorer.down.click()
    assert shows("the nurse said that", turned_down)
    explorer.profession.value, explorer.template.value = "concert", "near the {profession} she"
    explorer.scales[0].value = 2.5
    expected = SenseEdits(MODEL, TOKENIZER).scale("concert", [1, 3], 0).scale("concert", 0, 2.5)
    assert shows("near the concert she", expected)
    explorer.edits().save(tmp_path / "mine.safetensors")
    assert len(SenseEdits.load(tmp_path / "mine.safetensors", MODEL, TOKENIZER)) == 3
    explorer.reset.click()
    assert shows("near the concert she", none) and not MODEL.backpack.patches
    explorer.pair.value = "the that"
    assert "log-odds of the to that" in explorer.page.value


def test_the_explanation_explorer_says_what_the_words_cost():
    text = "near the nurse she said"
    explorer = ExplanationExplorer(MODEL, TOKENIZER, "nurse", text, torch.arange(20, 200), n=4)
    explorer.sense.value = 2
    nurse = token_of_word(TOKENIZER, "nurse")
    said = explain(MODEL, torch.tensor([nurse]), 4, torch.tensor(readable(TOKENIZER, range(20, 200))))
    assert explorer.up.value.split() == spell(TOKENIZER, said.up[0, 2].tolist())

    def loss(edits):
        ids = torch.tensor([ids_of_text(TOKENIZER, text)])
        with torch.no_grad(), edits.applied():
            log_probs = MODEL(ids).logits[0, :-1].log_softmax(-1)
        return -log_probs.gather(1, ids[0, 1:, None]).mean().item()

    def rows():
        return dict(
            re.findall(r"(the sense itself|as its words say|taken away)\s+([\d.]+)", text_of(explorer.page.value))
        )

    simulated = explorer.fitted(said)[0, 2]
    expected = {
        "the sense itself": loss(SenseEdits(MODEL, TOKENIZER)),
        "as its words say": loss(SenseEdits(MODEL, TOKENIZER).replace("nurse", 2, simulated)),
        "taken away": loss(SenseEdits(MODEL, TOKENIZER).scale("nurse", 2, 0)),
    }
    assert {name: float(value) for name, value in rows().items()} == pytest.approx(expected, abs=1e-3)
    before = rows()["as its words say"]
    explorer.up.value = "he she"
    assert rows()["as its words say"] != before
    explorer.again.click()
    assert rows()["as its words say"] == before


def test_the_knowledge_explorer_follows_its_controls(tmp_path):
    explorer = KnowledgeExplorer(
        MODEL, TOKENIZER, "nurse", "he", "she", ["the nurse said that", "a nurse"], ["the concert"]
    )
    he, she = (token_of_word(TOKENIZER, word) for word in ("he", "she"))

    def shows(edits, *texts):
        page = text_of(explorer.page.value)
        with edits.applied():
            after = [read(MODEL, ids_of_text(TOKENIZER, text)).log_probs() for text in texts]
        before = [read(MODEL, ids_of_text(TOKENIZER, text)).log_probs() for text in texts]
        return all(f"{log_probs[word].exp():.3f}" in page for log_probs in before + after for word in (he, she))

    whole = SenseEdits(MODEL, TOKENIZER).project("nurse", "he", "she")
    assert shows(whole, "the nurse said that", "a nurse", "the concert")  # it opens with the paper's projection
    explorer.every.value = 0.0
    assert len(explorer.edits()) == 0 and shows(SenseEdits(MODEL, TOKENIZER), "the nurse said that")
    explorer.scales[2].value = 2.0
    one = SenseEdits(MODEL, TOKENIZER).project("nurse", "he", "she", sense=2, by=-1)
    assert shows(one, "the nurse said that", "a nurse")
    explorer.edits().save(tmp_path / "mine.safetensors")
    assert len(SenseEdits.load(tmp_path / "mine.safetensors", MODEL, TOKENIZER)) == 1
    explorer.prompts.value = explorer.neighbours.value = ""
    assert "no prompt to look at" in unescape(explorer.message.value)


def test_turned_up_senses_are_those_of_the_highest_score():
    control = TopicControl(MODEL, TOKENIZER, ["nurse", "concert"], 3)
    table = tables.turned_up(control, 5)
    order = sorted(((control.scores[x, l].item(), x, l) for x in range(V) for l in range(4)), reverse=True)[:5]
    assert list(table["score"]) == pytest.approx([score for score, _, _ in order])
    assert list(table["sense"]) == [l for _, _, l in order]
    assert list(table["token"]) == spell(TOKENIZER, [x for _, x, _ in order])
    assert list(table["factor"]) == pytest.approx([3.3] * 5)
    few = torch.tensor([5, 9])
    assert set(tables.turned_up(control, 5, few)["token"]) <= set(spell(TOKENIZER, few))


COMMON = torch.arange(20, 200)
EXPLORERS = {
    "topic": lambda: TopicExplorer(MODEL, TOKENIZER, TOPICS),
    "senses": lambda: SenseExplorer(MODEL, TOKENIZER, "nurse"),
    "sentence": lambda: SentenceExplorer(MODEL, TOKENIZER, "the nurse said", "he"),
    "bias": lambda: BiasExplorer(MODEL, TOKENIZER, ["nurse"], ["the {profession} said"]),
    "knowledge": lambda: KnowledgeExplorer(MODEL, TOKENIZER, "nurse", "he", "she", ["the nurse said"], ["the concert"]),
    "explanation": lambda: ExplanationExplorer(MODEL, TOKENIZER, "nurse", "near the nurse she said", COMMON),
    "edits": lambda: EditWorkbench(MODEL, TOKENIZER, "the nurse said", "nurse"),
}


@pytest.mark.parametrize(
    ("kind", "control", "value", "message"),
    [
        ("senses", "word", "", "'' is no word"),
        ("senses", "other", "…", "'…' is no word"),
        ("sentence", "target", "zebra", "'zebra' is"),
        ("sentence", "target", "", "'' is no word"),
        ("sentence", "contrast", "zebra", "'zebra' is"),
        ("sentence", "position", 99, "There is no position 99 in a text of"),
        ("sentence", "text", "the nurse " * 30, "this model reads at most n_positions=24"),
        ("edits", "word", "zebra", "'zebra' is"),
        ("edits", "watch", "he zebra", "'zebra' is"),
        ("edits", "by", float("nan"), "by=nan is not a finite number"),
        ("bias", "profession", "", "'' is no word"),
        ("bias", "profession", "日本", "The vocabulary lacks the word '日本'"),
        ("bias", "template", "the nurse said", "has no slot; write {profession}"),
        ("bias", "pair", "he he", "the same word twice: 'he'"),
        ("bias", "pair", "he", "should be two words"),
        ("knowledge", "word", "zebra", "'zebra' is"),
        ("knowledge", "word", "", "'' is no word"),
        ("knowledge", "add", "he", "What is put in is what is taken out, 'he'"),
        ("explanation", "word", "zebra", "'zebra' is"),
        ("explanation", "text", "near the concert", "The text does not have 'nurse' in it"),
        ("explanation", "text", "the nurse " * 30, "this model reads at most 24"),
        ("explanation", "up", "", "needs at least one word up"),
        ("explanation", "down", "he zebra", "'zebra' is"),
        ("topic", "words", "", "A topic needs at least one word"),
        ("topic", "words", "nurse …", "'…' is no word"),
    ],
)
def test_bad_input_is_one_sentence_and_the_widget_stays_usable(kind, control, value, message):
    explorer = EXPLORERS[kind]()
    page, good = explorer.page.value, getattr(explorer, control).value
    if kind == "edits" and control == "word":
        explorer.by.value = 0
        page = explorer.page.value
    getattr(explorer, control).value = value
    assert message in unescape(explorer.message.value) and explorer.page.value == page
    getattr(explorer, control).value = good
    assert explorer.message.value == ""


def test_widgets_answer_within_300_ms_with_the_demo_model():
    model, tokenizer = load("demo")
    explorer = SenseExplorer(model, tokenizer, "film", directions=sense_directions(model))
    sentence = SentenceExplorer(model, tokenizer, "The film was directed by a woman who", "was", "had")
    bench = EditWorkbench(model, tokenizer, "The nurse said that", "nurse")
    bias = BiasExplorer(model, tokenizer, ["nurse", "guard", "writer"], ["The {profession} said that"])
    knowledge = KnowledgeExplorer(
        model, tokenizer, "Tokyo", "Japan", "China", ["The city of Tokyo is in"], ["The city of Paris is in"]
    )

    def fastest(control, *values):
        seconds = []
        for value in values:
            began = time.perf_counter()
            control.value = value
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    assert fastest(explorer.word, "king", "river", "city", "music") < 0.3
    assert fastest(explorer.other, "king", "river", "city", "music") < 0.3
    assert fastest(sentence.text, "The king and his", "In the city", "The band played") < 0.3
    assert fastest(sentence.target, "he", "she", "is") < 0.3
    assert fastest(bench.by, 0.5, 0.0, -1.0) < 0.3
    assert fastest(bias.profession, "guard", "writer", "nurse") < 0.3
    assert fastest(bias.scales[7], 0.5, 0.0, -1.0) < 0.3
    assert fastest(knowledge.scales[7], 0.5, 0.0, 2.0) < 0.3


def test_the_table_of_contributions_has_a_row_for_each_token():
    ids = ids_of_text(TOKENIZER, "the nurse said")
    table = tables.by_token(TOKENIZER, ids, attribute(MODEL, ids, 7))
    assert list(table.index) == [f"{j} {name}" for j, name in enumerate(spell_text(TOKENIZER, ids))]
    torch.testing.assert_close(torch.tensor(table.to_numpy()), attribute(MODEL, ids, 7))


def test_a_long_texts_table_keeps_its_largest_rows_and_its_sum():
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 3)), index=[f"{n} w" for n in range(60)])
    short = tables.condensed(table, rows=10)
    assert len(short) == 10 and np.allclose(short.sum(), table.sum()) and short.index[-1] == "the other 51"
    kept = [int(name.split()[0]) for name in short.index[:-1]]
    assert kept == sorted(kept) and table.abs().max(axis=1).nlargest(9).index.isin(short.index).all()
    assert tables.condensed(short, rows=10) is short


def test_a_folded_table_escapes_its_summary_and_its_cells():
    html = tables.folded("a < b", pd.DataFrame({"<i>": ["<b>"], "n": [0.125]}), 3, shade=[]).data
    assert html.startswith("<details><summary>a &lt; b</summary>") and html.endswith("</details>")
    assert "&lt;i&gt;" in html and "&lt;b&gt;" in html and "0.125" in html and "rgba" not in html


def test_the_figure_of_a_product_frames_the_largest_cell_in_all_panels():
    weights = pd.DataFrame([[0.1, 0.9], [0.9, 0.1]], index=["0 a", "1 b"])
    pushes = pd.DataFrame([[5.0, 1.0], [-1.0, 2.0]], index=["0 a", "1 b"])
    figure = figures.product(weights, pushes, weights * pushes, "one finding")
    panels = figure.axes[:3]
    assert [axes.get_title() for axes in panels] == ["weight", "× push", "= contribution"]
    framed = [[patch.get_xy() for patch in axes.patches] for axes in panels]
    largest = (weights * pushes).abs().to_numpy()
    row, column = divmod(largest.argmax(), 2)
    assert framed == [[(column, row)]] * 3 and "one finding" in figure.description()


def test_paired_bars_share_their_rows():
    values = pd.DataFrame({"a": [1.0, 2.0], "b": [2.0, 1.0]}, index=pd.Index([0, 1], name="sense"))
    figure = figures.paired_bars(values, pd.Series([0.5, -0.5]), "title", "weight", "lean")
    left, right = figure.axes
    assert len(left.patches) == 4 and [bar.get_width() for bar in right.patches] == [0.5, -0.5]
    assert left.yaxis_inverted() and {text.get_text() for text in figure.legends[0].texts} == {"a", "b"}
