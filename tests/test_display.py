"""What is shown: the numbers are those of the model, every token is escaped, and widgets follow their controls."""

import re
from html import unescape

import pandas as pd
import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from backpack_lib import SenseEdits, attribute
from backpack_lib.analysis.attribution import read
from backpack_lib.analysis.senses import pushes, sense_directions, senses_of_words
from backpack_lib.analysis.topic import TopicControl
from backpack_lib.display import figures, tables
from backpack_lib.display.explorers import (
    BiasExplorer,
    EditWorkbench,
    KnowledgeExplorer,
    SenseExplorer,
    SentenceExplorer,
    TopicExplorer,
)
from backpack_lib.model.lens import SenseLens, SenseLensConfig
from backpack_lib.text.tokenizers import train_tokenizer
from backpack_lib.text.words import spell, spell_text, token_of_word
from backpack_lib.text.writing import ids_of_text

TOKENIZER = tiny_tokenizer()
V = len(TOKENIZER)
MODEL = tiny_model(vocab_size=V, num_senses=4)
SCRIPT = "<script>alert('1&2')</script>"
HE, SHE = (token_of_word(TOKENIZER, word) for word in ("he", "she"))


def text_of(html):
    return unescape(re.sub(r"<[^>]*>", " ", html))


def reading_of(text, edits=None):
    with (edits or SenseEdits(MODEL, TOKENIZER)).applied():
        return read(MODEL, ids_of_text(TOKENIZER, text))


# ---------------------------------------------------------------- tables


def test_word_senses_are_what_each_sense_pushes_most():
    words = tables.word_senses(MODEL, TOKENIZER, "nurse", n=3)
    pushed = pushes(MODEL, senses_of_words(MODEL, TOKENIZER, ["nurse"])[0])
    assert len(words) == 4 * 2 * 3
    for row in words.itertuples():
        order = pushed[row.sense].sort(descending=row.direction == "up")
        assert row.push == pytest.approx(order.values[row.rank - 1].item(), abs=1e-5)
        assert row.token == spell(TOKENIZER, [order.indices[row.rank - 1]])[0]


def test_compared_words_share_what_both_push_up():
    one, two = senses_of_words(MODEL, TOKENIZER, ["nurse", "concert"])
    table = tables.compare_senses(MODEL, TOKENIZER, one, two)
    assert table["cosine"].tolist() == pytest.approx(torch.cosine_similarity(one, two).tolist(), abs=1e-5)
    for sense in range(4):
        both = [min(a, b) for a, b in zip(pushes(MODEL, one[sense]), pushes(MODEL, two[sense]))]
        best = sorted(range(len(both)), key=both.__getitem__, reverse=True)[:5]
        assert table.at[sense, "both push up"] == " · ".join(spell(TOKENIZER, best))


def test_next_words_hold_the_likeliest_of_either_and_those_to_watch():
    before, after = torch.randn(2, len(TOKENIZER), generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    table = tables.next_words(TOKENIZER, before, after, n=3, watch=(7,))
    ids = [*torch.maximum(before, after).topk(3).indices.tolist(), 7]
    assert list(table["next"]) == spell(TOKENIZER, ids)
    assert table["ratio"].tolist() == pytest.approx((after[ids].exp() / before[ids].exp()).tolist(), rel=1e-4)
    assert list(tables.next_words(TOKENIZER, before, n=2).columns) == ["next", "probability"]


def test_turned_up_senses_are_those_of_the_highest_score():
    control = TopicControl(MODEL, TOKENIZER, ["nurse", "concert"], 3)
    table = tables.turned_up(control)
    scores, factors = control.scores_of(torch.arange(V)), control.factors_of(torch.arange(V))
    order = sorted(((scores[x, l].item(), x, l) for x in range(V) for l in range(4)), reverse=True)[:10]
    assert list(table["score"]) == pytest.approx([score for score, _, _ in order])
    assert list(table["sense"]) == [l for _, _, l in order]
    assert list(table["token"]) == spell(TOKENIZER, [x for _, x, _ in order])
    assert list(table["factor"]) == pytest.approx([factors[x, l].item() for _, x, l in order])
    few = torch.tensor([5, 9])
    assert set(tables.turned_up(control, few)["token"]) <= set(spell(TOKENIZER, few))


def test_the_table_of_contributions_has_a_row_for_each_token():
    ids = ids_of_text(TOKENIZER, "the nurse said")
    table = tables.by_token(TOKENIZER, ids, attribute(MODEL, ids, 7))
    assert list(table.index) == [f"{j} {name}" for j, name in enumerate(spell_text(TOKENIZER, ids))]
    torch.testing.assert_close(torch.tensor(table.to_numpy()), attribute(MODEL, ids, 7))


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
    explorer.compare_with.value = SCRIPT
    sentence = SentenceExplorer(model, tokenizer, SCRIPT, SCRIPT, SCRIPT)
    bench = EditWorkbench(model, tokenizer, SCRIPT, watch="…x")
    bench.word.value, bench.scale_by.value = SCRIPT, 0
    bench.buttons["keep"].click()
    bench.buttons["write a text"].click()
    assert not bench.message.value
    pages = [
        tables.sense_words_html(words, caption=SCRIPT),
        tables.shaded(table, caption=SCRIPT).to_html(),
        tables.shaded(table.T).to_html(),
        tables.folded(SCRIPT, table.T).data,
        tables.side_by_side({SCRIPT: SCRIPT}),
        explorer.page.value,
        sentence.page.value,
        bench.page.value,
        bench.written.value,
    ]
    for page in pages:
        assert "<script" not in page and SCRIPT in text_of(page).replace("  ", " "), page[:300]
    sentence.next_word.value = SCRIPT + "no"
    assert "<script" not in sentence.message.value and sentence.message.value


# ---------------------------------------------------------------- figures


def test_figures_show_the_values():
    frame = tables.by_token(TOKENIZER, [5, 6], torch.tensor([[1.0, -2.0], [0.5, 0.0]]))
    mesh = figures.heatmap(frame, "finding", "nats").axes[0].collections[0]
    assert mesh.get_array().flatten().tolist() == [1, -2, 0.5, 0] and mesh.get_clim() == (-2, 2)
    bars = figures.grouped_bars(pd.DataFrame({"before": [0.5, 0.2], "after": [0.1, 0.3]}, index=[".", "."]), "f", "p")
    assert [p.get_width() for p in bars.axes[0].patches] == [0.5, 0.2, 0.1, 0.3]
    named = figures.named_points(pd.DataFrame({"x": [0.1], "y": [7.0]}, index=["music"]), "f", "x", "y").axes[0]
    assert named.texts[0].get_text() == "music" and named.collections[0].get_offsets().tolist() == [[0.1, 7.0]]
    rows = pd.DataFrame({"method": ["a", "b", "b"], "strength": [0.0, 2.5, 2.5], "success": [0.5, 0.2, 0.4]})
    axes = figures.trade_off(rows.assign(**{"relative perplexity": [1.0, 3.0, 2.0]}), "f").axes[0]
    assert [text.get_text() for text in axes.get_legend().texts] == ["a, no control", "b, 2.5"]
    assert list(axes.lines[1].get_xdata()) == [2, 3] and list(axes.lines[1].get_ydata()) == [0.4, 0.2]
    parts = figures.waterfall(pd.Series({"a": 2.0, "b": -0.5}), "f", "nats").axes[0]
    assert [bar.get_x() for bar in parts.patches] == [0, 2, 0] and parts.texts[-1].get_text() == "+1.50"


def test_intervals_reach_from_low_to_high_on_either_axis():
    table = pd.DataFrame({"rho": [0.5], "low": [0.3], "high": [0.7]}, index=["set"])
    for tables_, at, log in ((table, 1, True), ({"one": table, "two": table}, 0, False)):
        axes = figures.intervals(tables_, "f", "rho", at=at, log=log).axes[0]
        (interval,) = axes.containers[0].lines[2][0].get_segments()
        assert interval[:, 0].tolist() == pytest.approx([0.3, 0.7])
        assert axes.get_xscale() == ("log" if log else "linear") and bool(axes.figure.legends) != log


def test_a_figure_says_in_words_what_it_shows():
    values = pd.DataFrame({"a": [1.0, 2.0], "b": [2.0, 1.0]}, index=pd.Index([0, 1], name="sense"))
    figure = figures.grouped_bars(values, "A finding", "weight")
    assert figure.description() == "Figure. A finding. across: weight. rows: 0, 1. drawn: a; b."
    assert figure._repr_mimebundle_()[1]["image/png"]["alt"] == figure.description()


# ---------------------------------------------------------------- explorers


def test_the_sense_explorer_follows_its_controls():
    explorer = SenseExplorer(MODEL, TOKENIZER, "nurse", directions=sense_directions(MODEL))
    assert "“nurse” is one token." in text_of(explorer.page.value) and "nearest" in explorer.page.value
    explorer.compare_with.value = "concert"
    assert "both push up" in explorer.page.value
    explorer.word.value = "zebra"
    names = spell(TOKENIZER, TOKENIZER(" zebra")["input_ids"])
    assert f"{len(names)} tokens: {' · '.join(names)}" in text_of(explorer.page.value)
    for choice in ("mean", "first", "last"):
        explorer.tokens.value = choice
        words = tables.word_senses(MODEL, TOKENIZER, "zebra", multi_token=choice)
        assert tables.sense_words_html(words) in explorer.page.value


def test_the_sentence_explorer_follows_its_controls():
    explorer = SentenceExplorer(MODEL, TOKENIZER, "the nurse said", "he", "she")

    def shows(text, position, contrast, what):
        ids = ids_of_text(TOKENIZER, text)
        return (
            tables.reading_html(TOKENIZER, ids, read(MODEL, ids, position), HE, contrast, what) in explorer.page.value
        )

    assert shows("the nurse said", -1, SHE, "contributions") and "residual of" in explorer.page.value
    explorer.rather_than.value = ""
    assert shows("the nurse said", -1, None, "contributions")
    explorer.position.value, explorer.shown.value, explorer.text.value = 1, "weights", "the concert"
    assert shows("the concert", 1, None, "weights")


def test_the_workbench_shows_an_edit_before_it_is_kept():
    bench = EditWorkbench(MODEL, TOKENIZER, "the nurse said")
    assert "no edits" in bench.page.value
    bench.word.value, bench.scale_by.value = "nurse", -1.5
    after = reading_of("the nurse said", SenseEdits(MODEL, TOKENIZER).scale("nurse", by=-1.5)).log_probs()
    table = tables.next_words(TOKENIZER, reading_of("the nurse said").log_probs(), after, watch=(HE, SHE))
    assert all(f"{value:.3f}" in text_of(bench.page.value) for value in table["after"])
    assert "not kept yet" in bench.page.value and len(bench.edits) == 0
    bench.buttons["keep"].click()
    assert repr(bench.edits) == "1. scale all senses of “nurse” by -1.5" and bench.scale_by.value == 1
    assert "not kept yet" not in bench.page.value and f"{table['after'].iloc[0]:.3f}" in text_of(bench.page.value)
    assert not MODEL.backpack.patches


def test_the_workbench_replaces_projects_undoes_and_clears():
    bench = EditWorkbench(MODEL, TOKENIZER, "the nurse said")
    bench.word.value, bench.sense.value, bench.replace_by.value = "nurse", 2, "concert"
    bench.buttons["keep"].click()
    bench.word.value, bench.sense.index, bench.take_out.value, bench.put_in.value = "", 0, "he", "she"
    bench.buttons["keep"].click()
    assert repr(bench.edits).splitlines() == [
        "1. replace sense 2 of “nurse” by those of “concert”",
        "2. take “he” out of all senses of all words and put “she” in",
    ]
    bench.buttons["undo"].click()
    assert len(bench.edits) == 1
    bench.buttons["clear"].click()
    assert len(bench.edits) == 0 and "no edits" in bench.page.value
    bench.buttons["undo"].click()
    assert "There is no edit to undo" in bench.message.value


def test_the_topic_explorer_follows_its_controls():
    torch.manual_seed(0)
    baseline = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=64, n_embd=8, n_layer=1, n_head=1)).eval()
    model = tiny_model(vocab_size=V, num_senses=4, n_positions=64)
    topics = [{"name": "care", "steer": ["nurse", "doctor"]}, {"name": "<music>", "steer": ["concert"]}]
    explorer = TopicExplorer(model, TOKENIZER, topics, baseline, temperature=0.5)

    def shows(words, strength):
        table = tables.turned_up(TopicControl(model, TOKENIZER, words, strength))
        return all(
            f"{row.score:.2f}" in explorer.page.value and row.token in text_of(explorer.page.value)
            for row in table.itertuples()
        )

    assert shows(["nurse", "doctor"], 2) and "2.20" in explorer.page.value
    explorer.topic.label, explorer.strength.value = "<music>", 3
    assert shows(["concert"], 3) and "3.30" in explorer.page.value
    explorer.words.value, explorer.strength.value, explorer.text.value = "bat, lion", 2, "the nurse"
    assert shows(["bat", "lion"], 2)
    explorer.buttons["write texts"].click()
    control = TopicControl(model, TOKENIZER, ["bat", "lion"], 2)
    texts = [control.at(0).generate(["the nurse"], 40)[0], control.generate(["the nurse"], 40, temperature=0.5)[0]]
    shown = text_of(explorer.written.value)
    assert all(text in shown for text in texts) and "PPLM" in shown and "no control" in shown


def test_the_bias_explorer_follows_its_controls(tmp_path):
    templates = ["the {profession} said that", "near the {profession} she"]
    explorer = BiasExplorer(MODEL, TOKENIZER, ["nurse", "concert"], templates, turned_down=[1, 3])

    def shows(text, edits):
        before, after, page = reading_of(text), reading_of(text, edits), text_of(explorer.page.value)
        numbers = [f"{reading.log_probs()[word].exp():.3f}" for reading in (before, after) for word in (HE, SHE)]
        numbers += [f"{value:.2f}" for value in after.contributions(HE, SHE).flatten().tolist()]
        odds = f"{before.total(HE, SHE):+.2f} before, {after.total(HE, SHE):+.2f} after"
        return odds in page and all(number in page for number in numbers)

    assert shows("the nurse said that", SenseEdits(MODEL, TOKENIZER).scale("nurse", [1, 3], 0))
    explorer.strength.value = 0
    assert shows("the nurse said that", SenseEdits(MODEL, TOKENIZER)) and len(explorer.edits()) == 0
    explorer.strength.value = 1
    explorer.profession.value, explorer.template.value, explorer.sense_0.value = "concert", templates[1], 2.5
    expected = SenseEdits(MODEL, TOKENIZER).scale("concert", [1, 3], 0).scale("concert", 0, 2.5)
    assert shows("near the concert she", expected) and not MODEL.backpack.patches
    explorer.edits().save(tmp_path / "mine.safetensors")
    assert len(SenseEdits.load(tmp_path / "mine.safetensors", MODEL, TOKENIZER)) == 3
    explorer.two_words.value = "the that"
    assert "log-odds of the to that" in explorer.page.value


def test_the_knowledge_explorer_follows_its_controls():
    texts = ["the nurse said that", "a nurse", "the concert"]
    explorer = KnowledgeExplorer(MODEL, TOKENIZER, "nurse", "he", "she", texts[:2], texts[2:])

    def shows(edits):
        log_probs = [reading_of(text, applied).log_probs() for text in texts for applied in (None, edits)]
        page = text_of(explorer.page.value)
        return all(f"{of_text[word].exp():.3f}" in page for of_text in log_probs for word in (HE, SHE))

    assert shows(SenseEdits(MODEL, TOKENIZER).project("nurse", "he", "she"))  # it opens with the paper's projection
    explorer.strength.value = 2
    assert shows(SenseEdits(MODEL, TOKENIZER).project("nurse", "he", "she", by=-1))
    for sense in (0, 1, 3):
        getattr(explorer, f"sense_{sense}").value = 0
    assert shows(SenseEdits(MODEL, TOKENIZER).project("nurse", "he", "she", sense=2, by=-1))
    assert len(explorer.edits()) == 1


EXPLORERS = {
    "topic": lambda model=MODEL: TopicExplorer(model, TOKENIZER, [{"name": "care", "steer": ["nurse"]}]),
    "senses": lambda model=MODEL: SenseExplorer(model, TOKENIZER, "nurse"),
    "sentence": lambda model=MODEL: SentenceExplorer(model, TOKENIZER, "the nurse said", "he"),
    "bias": lambda model=MODEL: BiasExplorer(model, TOKENIZER, ["nurse"], ["the {profession} said"]),
    "knowledge": lambda model=MODEL: KnowledgeExplorer(
        model, TOKENIZER, "nurse", "he", "she", ["the nurse said"], ["the concert"]
    ),
    "edits": lambda model=MODEL: EditWorkbench(model, TOKENIZER, "the nurse said"),
}


@pytest.mark.parametrize(
    ("kind", "control", "value", "message"),
    [
        ("senses", "compare_with", "…", "'…' is no word"),
        ("sentence", "position", 99, "There is no position 99 in a text of"),
        ("sentence", "text", "the nurse " * 30, "this model reads at most n_positions=24"),
        ("edits", "scale_by", float("nan"), "by=nan is not a finite number"),
        ("bias", "template", "the nurse said", "has no slot; write {profession}"),
        ("bias", "two_words", "he he", "the same word twice: 'he'"),
        ("topic", "words", "nurse …", "'…' is no word"),
    ],
)
def test_bad_input_is_one_sentence_and_the_widget_stays_usable(kind, control, value, message):
    explorer = EXPLORERS[kind]()
    page, good = explorer.page.value, getattr(explorer, control).value
    getattr(explorer, control).value = value
    assert message in unescape(explorer.message.value) and explorer.page.value == page
    getattr(explorer, control).value = good
    assert explorer.message.value == ""


@pytest.mark.parametrize("kind", EXPLORERS)
def test_explorers_work_with_a_sense_lens(kind):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval()
    explorer = EXPLORERS[kind](SenseLens(SenseLensConfig.of_base(base, num_senses=4), base).eval())
    assert explorer.page.value and not explorer.message.value
    if kind in ("sentence", "bias", "knowledge"):
        assert "residual" in text_of(explorer.page.value).split()  # contributions have a row for it


def test_a_page_for_readers_without_a_kernel_goes_with_the_widget():
    bundle = EXPLORERS["sentence"]()._repr_mimebundle_()
    assert "answer in a running notebook" in bundle["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in bundle
