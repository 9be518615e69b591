"""Explorers to click on, such as SenseExplorer(model, tokenizer, "film"): controls over the functions of `tables.py`.

Controls are attributes, so `explorer.word.value = "king"` does what typing does. `among` is as in `tables.py`.
"""

from functools import cache
from html import escape

import ipywidgets as W
import torch

from backpack_lib.analysis import pplm
from backpack_lib.analysis.attribution import read
from backpack_lib.analysis.bias import PAIR, debias, fill, tokens_of_pair
from backpack_lib.analysis.edits import SenseEdits
from backpack_lib.analysis.senses import senses_of_words
from backpack_lib.analysis.topic import STRENGTHS, TopicControl
from backpack_lib.display import tables
from backpack_lib.text.words import MULTI_TOKEN, spell, token_of_word, tokens_of_word
from backpack_lib.text.writing import continue_text, ids_of_text

TWIN = "An explorer, as it opens. Its controls answer in a running notebook."
GENERATED, WRITTEN = 20, 40  # tokens of a text that shows an edit, and of one that has a topic


class Explorer(W.VBox):
    """Controls, buttons, a line for errors, and a page: the HTML that `show` makes of the controls' values by name.

    controls: as `control_of` takes them. buttons: what each does, by name, before the page is drawn again. Where one
    of these raises a ValueError, the line for errors says it, and the last good page stays.
    (`ipywidgets.interactive_output` does much of this, but shows nothing in a stored notebook.)
    """

    def __init__(self, model, tokenizer, buttons: dict | None = None, **controls):
        self.model, self.tokenizer, self.busy = model, tokenizer, False
        self.message, self.page, self.written = W.HTML(), W.HTML(), W.HTML()
        self.controls = {name: control_of(name, value) for name, value in controls.items()}
        self.buttons = {name: W.Button(description=name) for name in buttons or {}}
        for name, control in self.controls.items():
            setattr(self, name, control)
            control.observe(self.refresh, "value")
        for name, button in self.buttons.items():
            button.on_click(lambda _, work=buttons[name]: self.refresh(work=work))
        rows = [W.HBox([*row.values()], layout={"flex_flow": "row wrap"}) for row in (self.controls, self.buttons)]
        super().__init__([*rows, self.message, self.page, self.written])
        self.refresh()

    def refresh(self, _change=None, work=lambda: None):
        """Does something, and draws the page once, whatever controls change meanwhile."""
        if self.busy:
            return
        self.busy = True
        try:
            work()
            page = self.show(**{name: control.value for name, control in self.controls.items()})
            self.page.value = f"<div style='line-height: 1.4; overflow-x: auto'>{page}</div>"
            self.message.value = ""
        except ValueError as error:
            self.message.value = f"<b role='alert'>{escape(str(error))}</b>"
        finally:
            self.busy = False

    def _repr_mimebundle_(self, **kwargs):
        """The widget, and its page for places where none can live: a saved page, or a notebook that is not trusted."""
        twin = f"{self.message.value}{self.page.value}<p><small>{TWIN}</small></p>"
        return super()._repr_mimebundle_(**kwargs) | {"text/html": twin}


def control_of(name: str, value) -> W.Widget:
    """A control that is read when it is left or let go: (value, lowest, highest) of a slider, a text, or a widget."""
    control = value
    if isinstance(value, tuple):
        control = W.FloatSlider(value[0], min=value[1], max=value[2], step=0.1)
    elif isinstance(value, str):
        control = W.Text(value, layout={"width": "40em" if " " in value else "16em"})
    control.description = control.description or name.replace("_", " ")
    control.style.description_width = "initial"
    if control.has_trait("continuous_update"):
        control.continuous_update = False
    return control


class SenseExplorer(Explorer):
    """A word's senses: what each pushes up and down, another word beside it, and the nearest words.

    directions: of all sense vectors (`senses.sense_directions`), for the nearest words; without, they are left out.
    """

    def __init__(self, model, tokenizer, word: str, directions: torch.Tensor | None = None, among=None):
        self.directions, self.among = directions, among
        super().__init__(model, tokenizer, word=word, tokens=W.Dropdown(options=MULTI_TOKEN), compare_with="")

    def show(self, word, tokens, compare_with):
        names = spell(self.tokenizer, tokens_of_word(self.tokenizer, word))
        counted = "one token" if len(names) == 1 else f"{len(names)} tokens: {' · '.join(names)}"
        words = tables.word_senses(self.model, self.tokenizer, word, multi_token=tokens, among=self.among)
        page = f"<p>“{escape(word.strip())}” is {escape(counted)}.</p>{tables.sense_words_html(words)}"
        (vectors,) = senses_of_words(self.model, self.tokenizer, [word], tokens)
        if compare_with.strip():
            (others,) = senses_of_words(self.model, self.tokenizer, [compare_with])
            compared = tables.compare_senses(self.model, self.tokenizer, vectors, others, self.among)
            page += tables.shaded(compared, caption=f"{word} and {compare_with}").to_html()
        if self.directions is not None:
            near = tables.near_words(self.directions, self.tokenizer, vectors)
            page += tables.shaded(near, caption="the words whose sense lies nearest").to_html()
        return page


class SentenceExplorer(Explorer):
    """One prediction in a text: how much of each sense goes in, and what each contributes to a next word."""

    def __init__(self, model, tokenizer, text: str, target: str, contrast: str = ""):
        controls = {"text": text, "position": W.IntText(-1), "next_word": target, "rather_than": contrast}
        super().__init__(model, tokenizer, **controls, shown=W.ToggleButtons(options=["contributions", "weights"]))

    def show(self, text, position, next_word, rather_than, shown):
        ids = ids_of_text(self.tokenizer, text)
        reading = read(self.model, ids, position)
        target = token_of_word(self.tokenizer, next_word)
        contrast = token_of_word(self.tokenizer, rather_than) if rather_than.strip() else None
        return tables.reading_html(self.tokenizer, ids, reading, target, contrast, shown)


class EditWorkbench(Explorer):
    """Edits, tried out live: the next word and a text, before and after.

    `edits` is the stack that the buttons work on, and can be saved; what the controls say is shown at once, as if it
    were on top of the stack, and joins it with "keep".
    """

    def __init__(self, model, tokenizer, prompt: str, watch: str = "he she"):
        self.edits = SenseEdits(model, tokenizer)
        buttons = {"keep": self._keep, "undo": self.edits.undo, "clear": self.edits.clear, "write a text": self._write}
        texts = {"text": prompt, "watch": watch, "word": W.Text(placeholder="empty: all words")}
        senses = W.Dropdown(options={"all": None} | {str(sense): sense for sense in range(model.config.num_senses)})
        changes = {"scale_by": (1.0, -2, 3), "replace_by": "", "take_out": "", "put_in": ""}
        super().__init__(model, tokenizer, buttons, **texts, sense=senses, **changes)

    def pending(self) -> SenseEdits:
        """What the controls say, as a stack of its own; empty while they say nothing."""
        boxes = (self.word, self.replace_by, self.take_out, self.put_in)
        word, replace_by, take_out, put_in = (box.value.strip() or None for box in boxes)
        edits, sense = SenseEdits(self.model, self.tokenizer), self.sense.value
        if self.scale_by.value != 1:
            edits.scale(word, sense, self.scale_by.value)
        if replace_by:
            edits.replace(word, sense, replace_by)
        if take_out:
            edits.project(word, take_out, put_in, sense)
        return edits

    def show(self, text, watch, **_):
        ids = ids_of_text(self.tokenizer, text)
        watched = [token_of_word(self.tokenizer, word) for word in watch.split()]
        before = read(self.model, ids).log_probs()
        pending = self.pending()
        with self.edits.applied(), pending.applied():
            after = read(self.model, ids).log_probs()
        lines = [f"<li>{escape(kept.note)}</li>" for kept in self.edits]
        lines += [f"<li><i>{escape(tried.note)} (not kept yet)</i></li>" for tried in pending]
        table = tables.next_words(self.tokenizer, before, after, watch=watched)
        shown = tables.shaded(table, 3, "the next word", shade=["before", "after"]).to_html()
        return f"<ol>{''.join(lines) or '<li>no edits</li>'}</ol>{shown}"

    def _keep(self):
        self.edits.extend(self.pending())
        self.scale_by.value = 1.0
        self.replace_by.value = self.take_out.value = self.put_in.value = ""

    def _write(self):
        settings = {"max_new_tokens": GENERATED, "top_p": 0.8, "repetition_penalty": 1.2}
        before = continue_text(self.model, self.tokenizer, self.text.value, **settings)
        with self.edits.applied(), self.pending().applied():
            after = continue_text(self.model, self.tokenizer, self.text.value, **settings)
        self.written.value = tables.side_by_side({"before": before, "after": after})


class TopicExplorer(Explorer):
    """A topic and a strength: the senses that get more weight, and texts without and with control, and by PPLM.

    topics: as in `data/topics.json`. baseline: a Transformer with the same tokenizer, for PPLM; None: without.
    control: any `TopicControl` of the model, which saves some seconds. temperature: of the Backpack's sampling under
    control, to begin with.
    """

    def __init__(self, model, tokenizer, topics, baseline=None, control=None, temperature=1.0, among=None):
        topics = {topic["name"]: tuple(topic["steer"]) for topic in topics}
        control = control or TopicControl(model, tokenizer, next(iter(topics.values())))
        self.baseline, self.among, self.control_of = baseline, among, cache(control.toward)
        words, strength = W.Text(description="or words"), W.SelectionSlider(options=list(STRENGTHS), value=2)
        begin = W.Text(placeholder="empty: from nothing")
        writing = {"temperature": (temperature, 0.3, 2), "text": begin, "seed": W.IntText()}
        chosen = {"topic": W.Dropdown(options=topics), "words": words, "strength": strength}
        super().__init__(model, tokenizer, {"write texts": self._write}, **chosen, **writing)

    def control(self) -> TopicControl:
        """The control that the page shows."""
        words = tuple(self.words.value.replace(",", " ").split()) or self.topic.value
        return self.control_of(words).at(self.strength.value)

    def show(self, **_):
        control = self.control()
        caption = f"the senses of highest score for {', '.join(control.words)}"
        return tables.shaded(tables.turned_up(control, self.among), caption=caption, shade=["factor"]).to_html()

    def _write(self):
        control, settings = self.control(), ([self.text.value], WRITTEN, self.seed.value)
        steered = control.generate(*settings, temperature=self.temperature.value)
        texts = {"no control": control.at(0).generate(*settings), f"Backpack, strength {self.strength.value}": steered}
        if self.baseline is not None:
            texts["PPLM"] = pplm.generate(self.baseline, self.tokenizer, control.words, *settings)
        self.written.value = tables.side_by_side({title: text for title, (text,) in texts.items()})


class SensePanel(Explorer):
    """A slider for each sense of a word, and what the edits that `edit` makes of them do to two words after some texts.

    UNEDITED: the value that stands for no edit. At a strength of 0 the sliders do nothing, at 2 twice as much.
    """

    UNEDITED = 1.0

    def __init__(self, model, tokenizer, start: list[float], low: float, high: float, **controls):
        sliders = {f"sense_{sense}": (value, low, high) for sense, value in enumerate(start)}
        super().__init__(model, tokenizer, **controls, strength=(1.0, 0, 5), **sliders)

    def edits(self) -> SenseEdits:
        """What the sliders say, as edits that can be saved; empty while they say nothing."""
        edits = SenseEdits(self.model, self.tokenizer)
        for sense in range(self.model.config.num_senses):
            change = self.strength.value * (self.controls[f"sense_{sense}"].value - self.UNEDITED)
            if change:
                self.edit(edits, sense, self.UNEDITED + change)
        return edits

    def effects(self, texts: list[str], pair: tuple[int, int]) -> str:
        """What the edits do to the probabilities of two tokens after texts, and what their log-odds are made of."""
        rows = [ids_of_text(self.tokenizer, text) for text in texts]
        before = torch.stack([read(self.model, ids).log_probs() for ids in rows])
        with self.edits().applied():
            readings = [read(self.model, ids) for ids in rows]
        after = torch.stack([reading.log_probs() for reading in readings])
        parts = tables.by_token(self.tokenizer, rows[0], readings[0].contributions(*pair))
        changes = tables.before_and_after(self.tokenizer, texts, before, after, pair)
        odds = [f"{log_probs[0, pair[0]] - log_probs[0, pair[1]]:+.2f}" for log_probs in (before, after)]
        words = " to ".join(spell(self.tokenizer, pair))
        caption = f"log-odds of {words} in the first text: {odds[0]} before, {odds[1]} after, the sum of"
        return tables.shaded(changes, 3, shade=[]).to_html() + tables.shaded(parts, caption=caption).to_html()


class BiasExplorer(SensePanel):
    """A profession in a template: the probabilities of two words, while the profession's senses are scaled.

    turned_down: senses of the profession's own tokens that are at 0 when it opens, such as those that `bias.localize`
    found. Professions and templates of one's own can be typed in.
    """

    def __init__(self, model, tokenizer, professions, templates, pair=PAIR, turned_down=()):
        controls = {
            "profession": W.Combobox(value=professions[0], options=list(professions)),
            "template": W.Combobox(value=templates[0], options=list(templates), layout={"width": "34em"}),
            "two_words": " ".join(pair),
        }
        start = [0.0 if sense in turned_down else 1.0 for sense in range(model.config.num_senses)]
        super().__init__(model, tokenizer, start, -1, 3, **controls)

    def edit(self, edits: SenseEdits, sense: int, value: float):
        edits.extend(debias(self.model, self.tokenizer, [self.profession.value], [sense], value))

    def show(self, profession, template, two_words, **_):
        pair = tokens_of_pair(self.tokenizer, two_words.split())
        return self.effects(fill(self.tokenizer, [profession], [template]), pair)


class KnowledgeExplorer(SensePanel):
    """A fact and its edit: what is taken out of a word's senses, what is put in, and what else changes.

    Sliders say how many times the projection is made: 0 not, 1 as in the paper.
    prompts: with the word; neighbours: without it, or about something else.
    """

    UNEDITED = 0.0

    def __init__(self, model, tokenizer, word: str, remove: str, add: str, prompts: list[str], neighbours: list[str]):
        lines = W.Textarea("\n".join([*prompts, *neighbours]), layout={"width": "40em", "height": "9em"})
        controls = {"word": word, "take_out": remove, "put_in": add, "texts": lines}
        super().__init__(model, tokenizer, [1.0] * model.config.num_senses, 0, 5, **controls)

    def edit(self, edits: SenseEdits, sense: int, value: float):
        edits.project(self.word.value, self.take_out.value, self.put_in.value, sense, by=1 - value)

    def show(self, take_out, put_in, texts, **_):
        pair = tokens_of_pair(self.tokenizer, (take_out, put_in))
        return self.effects(texts.splitlines() or [""], pair)
