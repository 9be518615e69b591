"""Explorers to click on: controls over the functions of `tables.py`, which do all the work.

    SenseExplorer(model, tokenizer, "film")
    SentenceExplorer(model, tokenizer, "The film was directed by a woman who", "was", "had")
    EditWorkbench(model, tokenizer, "The nurse said that")
    TopicExplorer(model, tokenizer, topics, baseline)
    BiasExplorer(model, tokenizer, ["nurse", "guard"], ["The {profession} said that"])
    ExplanationExplorer(model, tokenizer, "bank", "He went to the bank to pay.", common)
    KnowledgeExplorer(model, tokenizer, "Paris", "France", "Germany", ["Paris is a city in"], ["Rome is a city in"])

Each shows what a function of `tables.py` returns, and, for bad input, what it raises, in one sentence; the last
good page stays. Controls are attributes, so `explorer.word.value = "king"` does what typing does.
"""

from html import escape

import ipywidgets as W
import pandas as pd
import torch

from backpack_lib.analysis import pplm
from backpack_lib.analysis.attribution import read
from backpack_lib.analysis.bias import PAIR, debias, fill, tokens_of_pair
from backpack_lib.analysis.edits import SenseEdits
from backpack_lib.analysis.explanations import Explanations, Replacement, Simulator, explain
from backpack_lib.analysis.scores import next_log_probabilities
from backpack_lib.analysis.senses import senses_of_words
from backpack_lib.analysis.topic import STRENGTHS, LargestPushes, TopicControl
from backpack_lib.display import tables
from backpack_lib.model.kinds import require_senses
from backpack_lib.text.words import readable, spell, token_of_word, tokens_of_word
from backpack_lib.text.writing import continue_text, ids_of_text

ALL = "all"
OWN = "words of your own"
MEAN = ("mean of all", "mean")
TWIN = "An explorer, as it opens. Its controls answer in a running notebook."
FITTED_ON = 500  # words, from whose explanations a simulator learns
GENERATED, WRITTEN = 20, 40  # tokens of a text that shows an edit, and of one that has a topic


def _text(description: str, value: str = "", width: str = "16em", **kwargs) -> W.Text:
    """A field that is read when Enter is pressed or the field is left."""
    style, layout = {"description_width": "initial"}, W.Layout(width=width)
    return W.Text(value, description=description, continuous_update=False, style=style, layout=layout, **kwargs)


class Explorer(W.VBox):
    """Controls, a line for errors, and a page that `show` fills in."""

    def __init__(self, model, tokenizer, rows: list[list[W.Widget]]):
        require_senses(model)
        self.model, self.tokenizer = model, tokenizer
        self.message, self.page = W.HTML(), W.HTML()
        super().__init__(
            [*(W.HBox(row, layout=W.Layout(flex_flow="row wrap")) for row in rows), self.message, self.page]
        )

    def show(self) -> str:
        """The page as HTML, or a ValueError in one sentence."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs):
        """The widget, and its page for places where none can live: a saved page, or a notebook that is not trusted."""
        twin = f"{self.message.value}{self.page.value}<p><small>{TWIN}</small></p>"
        return super()._repr_mimebundle_(**kwargs) | {"text/html": twin}

    def observe_all(self, *controls: W.Widget):
        for control in controls:
            control.observe(self.refresh, "value")

    def set_and_draw(self, values: dict):
        """Sets several observed controls, and draws once."""
        for control, value in values.items():
            control.unobserve(self.refresh, "value")
            control.value = value
            control.observe(self.refresh, "value")
        self.refresh()

    def draw(self):
        self.page.value = f"<div style='line-height: 1.4; overflow-x: auto'>{self.show()}</div>"

    def refresh(self, _change=None):
        self.attempt(self.draw)

    def attempt(self, work) -> bool:
        """Does something, and says in the line for messages what it returned, or what was wrong."""
        try:
            self.message.value = escape(work() or "")
        except ValueError as error:
            self.message.value = f"<b role='alert'>{escape(str(error))}</b>"
            return False
        return True


class SenseExplorer(Explorer):
    """A word's senses: what each pushes up and down, another word beside it, and the nearest words.

    directions: of all sense vectors (`senses.sense_directions`), for the nearest words; without, they are left out.
    among: the tokens to choose from; see `senses.pushed_most`.
    """

    def __init__(self, model, tokenizer, word: str, directions: torch.Tensor | None = None, among=None):
        self.directions, self.among = directions, among
        self.word, self.other = _text("word", word), _text("compare with")
        self.part = W.Dropdown(options=[MEAN], description="tokens")
        super().__init__(model, tokenizer, [[self.word, self.part, self.other]])
        self.word.observe(self._new_word, "value")
        self.observe_all(self.part, self.other)
        self._new_word()

    def _new_word(self, _change=None):
        def offer_tokens():
            names = spell(self.tokenizer, tokens_of_word(self.tokenizer, self.word.value))
            single = [(name, number) for number, name in enumerate(names)]
            self.part.options = single if len(names) == 1 else [MEAN, *single]

        if self.attempt(offer_tokens):
            self.refresh()

    def show(self) -> str:
        word, part = self.word.value, self.part.value
        names = spell(self.tokenizer, tokens_of_word(self.tokenizer, word))
        counted = "one token" if len(names) == 1 else f"{len(names)} tokens: {' · '.join(names)}"
        words = tables.word_senses(self.model, self.tokenizer, word, multi_token=part, among=self.among)
        pages = [f"<p>“{escape(word.strip())}” is {escape(counted)}.</p>", tables.sense_words_html(words)]
        vectors = senses_of_words(self.model, self.tokenizer, [word], part)[0]
        if self.other.value.strip():
            others = senses_of_words(self.model, self.tokenizer, [self.other.value])[0]
            compared = tables.compare_senses(self.model, self.tokenizer, vectors, others, among=self.among)
            pages.append(tables.shaded(compared, caption=f"{word} and {self.other.value}").to_html())
        if self.directions is not None:
            near = tables.near_words(self.directions, self.tokenizer, vectors)
            pages.append(tables.shaded(near, caption="the words whose sense lies nearest").to_html())
        return "".join(pages)


class SentenceExplorer(Explorer):
    """One prediction in a text: how much of each sense goes in, and what each contributes to a next word."""

    def __init__(self, model, tokenizer, text: str, target: str, contrast: str = ""):
        self.text = _text("text", text, width="40em")
        self.position = W.IntText(-1, description="position", layout=W.Layout(width="12em"))
        self.target, self.contrast = _text("next word", target), _text("rather than", contrast)
        self.what = W.ToggleButtons(options=["contributions", "weights"])
        super().__init__(model, tokenizer, [[self.text, self.position], [self.target, self.contrast], [self.what]])
        self.observe_all(self.text, self.position, self.target, self.contrast, self.what)
        self.refresh()

    def show(self) -> str:
        ids = ids_of_text(self.tokenizer, self.text.value)
        reading = read(self.model, ids, self.position.value)
        target = token_of_word(self.tokenizer, self.target.value)
        contrast = token_of_word(self.tokenizer, self.contrast.value) if self.contrast.value.strip() else None
        return tables.reading_html(self.tokenizer, ids, reading, target, contrast, self.what.value)


class EditWorkbench(Explorer):
    """Edits, tried out live: the next word and a text, before and after.

    `edits` is the stack that the buttons work on; what the controls say is shown at once, as if it were on top of
    the stack, and joins it with "keep". The stack can be saved, and goes on working outside of the widget.
    """

    def __init__(
        self, model, tokenizer, prompt: str, word: str = "", watch: str = "he she", edits: SenseEdits | None = None
    ):
        self.edits = SenseEdits(model, tokenizer) if edits is None else edits
        k = model.config.num_senses
        self.prompt, self.watch = _text("text", prompt, width="40em"), _text("watch", watch)
        self.word = _text("word", word, placeholder="empty: all words")
        self.sense = W.Dropdown(options=[ALL, *range(k)], description="sense", layout=W.Layout(width="12em"))
        self.kind = W.Dropdown(options=["scale", "replace", "project"], description="edit")
        self.by = W.FloatSlider(1.0, min=-2, max=3, step=0.1, description="scale by", continuous_update=False)
        self.other = _text("by those of")
        self.into = _text("put in")
        self.keep, self.undo, self.clear = (W.Button(description=name) for name in ("keep", "undo", "clear"))
        self.write = W.Button(description="write a text")
        self.file = _text("file", "edits.safetensors")
        self.save, self.load = W.Button(description="save"), W.Button(description="load")
        self.written = W.HTML()
        super().__init__(
            model,
            tokenizer,
            [
                [self.prompt, self.watch],
                [self.word, self.sense, self.kind],
                [self.by, self.other, self.into],
                [self.keep, self.undo, self.clear, self.write],
                [self.file, self.save, self.load],
            ],
        )
        self.children = [*self.children, self.written]
        self.kind.observe(self._new_kind, "value")
        self.observe_all(self.prompt, self.watch, self.word, self.sense, self.by, self.other, self.into)
        for button, work in (
            (self.keep, self._keep), (self.undo, self._undo), (self.clear, self._clear),
            (self.write, self._write), (self.save, self._save), (self.load, self._load),
        ):  # fmt: skip
            button.on_click(lambda _, work=work: self.attempt(work))
        self._new_kind()

    def pending(self) -> SenseEdits:
        """What the controls say, as a stack of its own; empty while they say nothing."""
        edits = SenseEdits(self.model, self.tokenizer)
        word = self.word.value if self.word.value.strip() else None
        sense = None if self.sense.value == ALL else self.sense.value
        kind, other, into = self.kind.value, self.other.value, self.into.value
        if kind == "scale" and self.by.value != 1:
            edits.scale(word, sense, self.by.value)
        elif kind == "replace" and other.strip():
            edits.replace(word, sense, other)
        elif kind == "project" and other.strip():
            edits.project(word, remove=other, add=into if into.strip() else None, sense=sense)
        return edits

    def show(self) -> str:
        ids = ids_of_text(self.tokenizer, self.prompt.value)
        watched = [token_of_word(self.tokenizer, word) for word in self.watch.value.split()]
        before = read(self.model, ids).log_probs()
        pending = self.pending()
        with self.edits.applied(), pending.applied():
            after = read(self.model, ids).log_probs()
        made = "".join(f"<li>{escape(edit.note)}</li>" for edit in self.edits)
        trying = "".join(f"<li><i>{escape(edit.note)} (not kept yet)</i></li>" for edit in pending)
        table = tables.next_words(self.tokenizer, before, after, watch=watched)
        shown = tables.shaded(table, precision=3, shade=["before", "after"], caption="the next word").to_html()
        return f"<ol>{made}{trying or ('' if made else '<li>no edits</li>')}</ol>{shown}"

    def _new_kind(self, _change=None):
        kind = self.kind.value
        for control, kinds in ((self.by, ["scale"]), (self.other, ["replace", "project"]), (self.into, ["project"])):
            control.layout.display = None if kind in kinds else "none"
        self.other.description = "take out" if kind == "project" else "by those of"
        self.refresh()

    def _keep(self):
        pending = self.pending()
        if not len(pending):
            raise ValueError("There is nothing to keep; move the slider, or name a word to replace by or to take out.")
        self.edits.extend(pending)
        self.by.value, self.other.value, self.into.value = 1.0, "", ""
        self.draw()

    def _undo(self):
        self.edits.undo()
        self.draw()

    def _clear(self):
        self.edits.clear()
        self.draw()

    def _write(self):
        def text():
            return continue_text(
                self.model, self.tokenizer, self.prompt.value, GENERATED, top_p=0.8, repetition_penalty=1.2
            )

        before = text()
        with self.edits.applied(), self.pending().applied():
            self.written.value = tables.side_by_side({"before": before, "after": text()})

    def _save(self):
        self.edits.save(self.file.value)
        return f"saved as {self.file.value}: {len(self.edits)} edits"

    def _load(self):
        loaded = SenseEdits.load(self.file.value, self.model, self.tokenizer)
        self.edits.extend(loaded)
        self.draw()
        return f"loaded from {self.file.value}: {len(loaded)} edits"


class TopicExplorer(Explorer):
    """A topic and a strength: the senses that get more weight, and texts without and with control, and by PPLM.

    topics: as in `data/topics.json`. baseline: a Transformer with the same tokenizer, for PPLM; None: without.
    largest: the model's `topic.LargestPushes`. temperature: of the Backpack's sampling under control, to begin with.
    among: the tokens whose senses are listed; see `tables.turned_up`.
    """

    def __init__(
        self, model, tokenizer, topics: list[dict], baseline=None, largest: LargestPushes | None = None,
        temperature: float = 1.0, among: torch.Tensor | None = None, pplm_settings: pplm.Settings = pplm.Settings(),
    ):  # fmt: skip
        self.words_of = {topic["name"]: " ".join(topic["steer"]) for topic in topics}
        self.baseline, self.among, self.pplm_settings = baseline, among, pplm_settings
        self.largest = LargestPushes(model) if largest is None else largest
        self.controls = {}  # by their words; a topic's scores are computed once
        first = next(iter(self.words_of))
        self.topic = W.Dropdown(options=[*self.words_of, OWN], value=first, description="topic")
        self.words = _text("words", self.words_of[first], width="24em")
        self.strength = W.SelectionSlider(options=list(STRENGTHS), value=2, description="strength")
        self.temperature = W.FloatSlider(
            temperature, min=0.3, max=2, step=0.05, description="temperature", continuous_update=False
        )
        self.prompt = _text("text", "", width="30em", placeholder="empty: from nothing")
        self.seed = W.IntText(0, description="seed", layout=W.Layout(width="12em"))
        self.write = W.Button(description="write texts")
        self.written = W.HTML()
        rows = [[self.topic, self.words], [self.strength, self.temperature], [self.prompt, self.seed, self.write]]
        super().__init__(model, tokenizer, rows)
        self.children = [*self.children, self.written]
        self.topic.observe(self._new_topic, "value")
        self.words.observe(self._new_words, "value")
        self.observe_all(self.strength)
        self.write.on_click(lambda _: self.attempt(self._write))
        self.refresh()

    def control(self) -> TopicControl:
        """The control that the page shows."""
        words = tuple(self.words.value.replace(",", " ").split())
        if words not in self.controls:
            self.controls[words] = TopicControl(self.model, self.tokenizer, words, largest=self.largest)
        return self.controls[words].at(self.strength.value)

    def show(self) -> str:
        control = self.control()
        table = tables.turned_up(control, among=self.among)
        caption = f"the senses of highest score for {', '.join(control.words)}"
        return tables.shaded(table, caption=caption, shade=["factor"]).to_html()

    def _new_topic(self, _change=None):
        if self.topic.value != OWN:
            self.words.value = self.words_of[self.topic.value]

    def _new_words(self, _change=None):
        if self.words.value != self.words_of.get(self.topic.value):
            self.topic.value = OWN
        self.refresh()

    def _write(self):
        control, prompts, seed = self.control(), [self.prompt.value], self.seed.value
        plain = control.at(0).generate(prompts, WRITTEN, seed)
        steered = control.generate(prompts, WRITTEN, seed, temperature=self.temperature.value)
        texts = {"no control": plain[0], f"Backpack, strength {self.strength.value}": steered[0]}
        if self.baseline is not None:
            by_pplm = pplm.generate(
                self.baseline, self.tokenizer, control.words, prompts, WRITTEN, seed, self.pplm_settings
            )
            texts[f"PPLM, step {self.pplm_settings.step:g}"] = by_pplm[0]
        self.written.value = tables.side_by_side(texts)


class BiasExplorer(Explorer):
    """A profession in a template: the probabilities of two words, and what each sense contributes, while its senses
    are scaled.

    scales: a slider for each sense of the profession's own tokens. turned_down: senses that are at 0 when it opens,
    and that a button sets to 0, such as those that `bias.localize` found. Professions and templates of one's own can
    be typed in.
    """

    def __init__(
        self, model, tokenizer, professions: list[str], templates: list[str], pair=PAIR, turned_down: list[int] = ()
    ):
        wide, labelled = W.Layout(width="34em"), {"description_width": "initial"}
        self.profession, self.template = (
            W.Combobox(
                value=given[0], options=list(given), description=name, continuous_update=False, layout=layout,
                style=labelled,
            )
            for name, given, layout in (
                ("profession", professions, W.Layout(width="20em")), ("template", templates, wide)
            )
        )  # fmt: skip
        self.pair = _text("two words", " ".join(pair))
        self.turned_down = turned_down
        self.scales = [
            W.FloatSlider(
                0.0 if sense in turned_down else 1.0,
                min=-1,
                max=3,
                step=0.1,
                description=f"sense {sense}",
                continuous_update=False,
                layout=W.Layout(width="19em"),
            )  # fmt: skip
            for sense in range(model.config.num_senses)
        ]
        names = f"turn down {', '.join(map(str, turned_down))}", "leave all as they are"
        self.down, self.reset = (W.Button(description=name, layout=W.Layout(width="16em")) for name in names)
        buttons = [self.down, self.reset] if turned_down else [self.reset]
        super().__init__(model, tokenizer, [[self.profession, self.template], [self.pair, *buttons], self.scales])
        self.observe_all(self.profession, self.template, self.pair, *self.scales)
        self.down.on_click(lambda _: self._set({sense: 0.0 for sense in self.turned_down}))
        self.reset.on_click(lambda _: self._set({}))
        self.refresh()

    def edits(self) -> SenseEdits:
        """What the sliders say, as edits that can be saved; empty while they say nothing."""
        edits = SenseEdits(self.model, self.tokenizer)
        for sense, slider in enumerate(self.scales):
            if slider.value != 1:
                edits.extend(debias(self.model, self.tokenizer, [self.profession.value], [sense], slider.value))
        return edits

    def show(self) -> str:
        pair = self.pair.value.split()
        first, second = tokens_of_pair(self.tokenizer, pair)
        (prompt,) = fill(self.tokenizer, [self.profession.value], [self.template.value])
        ids = ids_of_text(self.tokenizer, prompt)
        before = read(self.model, ids)
        with self.edits().applied():
            after = read(self.model, ids)
        words = tables.next_words(self.tokenizer, before.log_probs(), after.log_probs(), n=0, watch=[first, second])
        odds = [f"{reading.total(first, second):+.2f}" for reading in (before, after)]
        table = tables.by_token(self.tokenizer, ids, after.contributions(first, second))
        return (
            tables.shaded(words, 4, "the next word", shade=["before", "after"]).to_html()
            + f"<p>log-odds of {' to '.join(map(escape, pair))}: {odds[0]} before, {odds[1]} after, the sum of:</p>"
            + tables.shaded(table, caption="what each sense of each token contributes, after").to_html()
        )

    def _set(self, scales: dict[int, float]):
        self.set_and_draw({slider: scales.get(sense, 1.0) for sense, slider in enumerate(self.scales)})


class KnowledgeExplorer(Explorer):
    """A fact and its edit: what is taken out of a word's senses, what is put in, sense by sense, and what else changes.

    scales: a slider for each sense of the word, of how many times the projection is made: 0 not, 1 as in the paper.
    prompts: with the word, one in a line; neighbours: without it, or about something else.
    """

    def __init__(self, model, tokenizer, word: str, remove: str, add: str, prompts: list[str], neighbours: list[str]):
        self.word, self.remove, self.add = _text("word", word), _text("take out", remove), _text("put in", add)
        lines = W.Layout(width="32em", height="6em")
        self.prompts, self.neighbours = (
            W.Textarea("\n".join(given), description=name, continuous_update=False, layout=lines)
            for name, given in (("prompts", prompts), ("neighbours", neighbours))
        )
        self.every = W.FloatSlider(1.0, min=0, max=5, step=0.1, description="all senses", continuous_update=False)
        layout = W.Layout(width="19em")
        self.scales = [
            W.FloatSlider(
                1.0, min=0, max=5, step=0.1, description=f"sense {sense}", continuous_update=False, layout=layout
            )
            for sense in range(model.config.num_senses)
        ]
        super().__init__(
            model,
            tokenizer,
            [[self.word, self.remove, self.add], [self.prompts, self.neighbours], [self.every], self.scales],
        )
        self.observe_all(self.word, self.remove, self.add, self.prompts, self.neighbours, *self.scales)
        self.every.observe(self._set_all, "value")
        self.refresh()

    def edits(self) -> SenseEdits:
        """What the sliders say, as edits that can be saved; empty while all of them are at 0."""
        edits = SenseEdits(self.model, self.tokenizer)
        word, remove, add = (token_of_word(self.tokenizer, box.value) for box in (self.word, self.remove, self.add))
        if remove == add:
            raise ValueError(f"What is put in is what is taken out, {self.remove.value!r}; name another word.")
        for sense, slider in enumerate(self.scales):
            if slider.value:
                edits.project(word, remove, add, sense, by=1 - slider.value)
        return edits

    def show(self) -> str:
        edits = self.edits()
        watched = [token_of_word(self.tokenizer, box.value) for box in (self.remove, self.add)]
        pages = []
        for name, box in (("prompts", self.prompts), ("neighbours", self.neighbours)):
            prompts = [line for line in box.value.splitlines() if line.strip()]
            if prompts:
                before = next_log_probabilities(self.model, self.tokenizer, prompts)
                with edits.applied():
                    after = next_log_probabilities(self.model, self.tokenizer, prompts)
                table = tables.before_and_after(self.tokenizer, prompts, before, after, watched)
                pages.append(tables.shaded(table, 3, name, shade=[]).to_html())
        if not pages:
            raise ValueError("There is no prompt to look at; write at least one.")
        return "".join(pages)

    def _set_all(self, _change):
        self.set_and_draw(dict.fromkeys(self.scales, self.every.value))


class ExplanationExplorer(Explorer):
    """A sense of a word and its explanation, to be edited; what the words cost on a text, and what they leave out.

    among: the words that explanations are made of, on which the simulator is fitted. The loss is that of the text, with
    this sense of the word as it is, as its explanation says, as the mean sense, and taken away.
    """

    def __init__(self, model, tokenizer, word: str, text: str, among: torch.Tensor, n: int = 10, seed: int = 0):
        require_senses(model)
        among = torch.tensor(readable(tokenizer, among.tolist()), device=model.device)
        self.among, self.n = among, n
        order = torch.randperm(len(among), generator=torch.Generator().manual_seed(seed))[:FITTED_ON]
        self.others = among[order.to(among.device)]
        self.fitted = Simulator.fit(model, explain(model, self.others, n, among), self.others)
        with torch.no_grad():
            self.mean = model.sense_vectors(self.others).float().mean(0)
        self.word, self.text = _text("word", word), _text("text", text, width="40em")
        self.sense = W.Dropdown(
            options=range(model.config.num_senses), description="sense", layout=W.Layout(width="12em")
        )
        self.up, self.down = (_text(name, width="48em") for name in ("up", "down"))
        self.again = W.Button(description="its own words")
        rows = [[self.word, self.sense, self.again], [self.text], [self.up], [self.down]]
        super().__init__(model, tokenizer, rows)
        for control in (self.word, self.sense):
            control.observe(lambda _: self._own_words(), "value")
        self.observe_all(self.text, self.up, self.down)
        self.again.on_click(lambda _: self._own_words())
        self._own_words()

    def _own_words(self):
        """Puts the sense's own strongest words into the fields."""
        own = {}

        def find():
            said = explain(self.model, torch.tensor([self._token()], device=self.among.device), self.n, self.among)
            for box, ids in ((self.up, said.up), (self.down, said.down)):
                own[box] = " ".join(spell(self.tokenizer, ids[0, self.sense.value].tolist()))

        if self.attempt(find):
            self.set_and_draw(own)

    def _token(self) -> int:
        return token_of_word(self.tokenizer, self.word.value)

    def show(self) -> str:
        token, sense = self._token(), self.sense.value
        ids = ids_of_text(self.tokenizer, self.text.value)
        if token not in ids[:-1]:
            raise ValueError(
                f"The text does not have {self.word.value.strip()!r} in it, after a space and before its end; "
                "write one that has."
            )
        if len(ids) > self.model.config.n_positions:
            raise ValueError(
                f"The text has {len(ids)} tokens; this model reads at most {self.model.config.n_positions}."
            )
        up, down = ([token_of_word(self.tokenizer, one) for one in box.value.split()] for box in (self.up, self.down))
        if not up or not down:
            raise ValueError("An explanation needs at least one word up and one word down.")
        said = Explanations(*(self._as_explanation(words) for words in (up, down)))
        simulated = self.fitted(said)[0, sense]
        texts = Replacement(self.model, [ids])
        place, own = texts.tokens == token, texts.senses[:, sense]
        losses = {"the sense itself": texts.losses()}
        for name, vector in (
            ("as its words say", simulated),
            ("the mean sense", self.mean[sense]),
            ("taken away", 0 * simulated),
        ):
            losses[name] = texts.losses({sense: torch.where(place[:, None], vector, own)})
        table = pd.DataFrame(
            {"loss (nats per token)": {name: loss.sum() / texts.counts[0] for name, loss in losses.items()}}
        )
        table["rise"] = table.iloc[:, 0] - table.iloc[0, 0]
        cosine = torch.cosine_similarity(simulated, own[place][0], dim=0).item()
        return tables.shaded(table, 4, f"sense {sense} of {self.word.value.strip()}", shade=["rise"]).to_html() + (
            f"<p>cosine of the sense and what its words say: {cosine:.2f}</p>"
        )

    def _as_explanation(self, words: list[int]) -> torch.Tensor:
        """The same words for each sense, (1, k, n)."""
        return torch.tensor(words, device=self.among.device).expand(1, self.model.config.num_senses, -1)
