"""What the notebooks and widgets show: tables as DataFrames, and small pieces of HTML with every token escaped.

Blue stands for up and orange for down; colours are laid over the page's own background, so they read in light and
dark mode. `among` are ids of the tokens to choose from; None: all that the model was trained with.
"""

import hashlib
from collections.abc import Iterable
from html import escape

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from backpack_lib.analysis.senses import neighbours, pushed_most, pushes, senses_of_words
from backpack_lib.model.kinds import used_tokens
from backpack_lib.text.words import spell, spell_text

UP, DOWN = "1, 115, 178", "222, 143, 5"  # of seaborn's colour-blind-safe palette
DEEPEST = 0.6  # opacity of the largest value's colour
RESIDUAL = "residual"  # the row of what no sense contributes
ROWS = 24  # of a figure, at most


def word_senses(model, tokenizer, word: str, n: int = 7, multi_token="mean", among=None) -> pd.DataFrame:
    """The tokens that each sense of a word pushes up most and down most, one row each.

    push is in logits, rank is from 1. For `multi_token`, and for what is raised, see `senses_of_words`.
    """
    vectors = senses_of_words(model, tokenizer, [word], multi_token)[0]
    up, up_scores, down, down_scores = pushed_most(model, vectors, n, among)
    rows = []
    for direction, ids, scores in (("up", up, up_scores), ("down", down, down_scores)):
        for sense in range(len(ids)):
            for rank, token in enumerate(spell(tokenizer, ids[sense])):
                rows.append((sense, direction, rank + 1, token, scores[sense, rank].item()))
    return pd.DataFrame(rows, columns=["sense", "direction", "rank", "token", "push"])


def compare_senses(model, tokenizer, one: torch.Tensor, two: torch.Tensor, among=None) -> pd.DataFrame:
    """Two words by their sense vectors, (k, d) each: cosines, and the tokens of which the smaller push is largest."""
    both = torch.minimum(pushes(model, one), pushes(model, two))
    among = used_tokens(model) if among is None else among.to(both.device)
    shared = among[both[:, among].topk(min(5, len(among))).indices]
    cosines = F.cosine_similarity(one, two, dim=-1).tolist()
    return pd.DataFrame({"cosine": cosines, "both push up": word_lists(tokenizer, shared)}).rename_axis("sense")


def near_words(directions: torch.Tensor, tokenizer, vectors: torch.Tensor) -> pd.DataFrame:
    """For each of a word's senses, (k, d), the tokens whose same sense lies nearest, and their mean cosine."""
    ids, cosines = neighbours(directions, vectors)
    table = pd.DataFrame({"nearest": word_lists(tokenizer, ids), "mean cosine": cosines.mean(1).tolist()})
    return table.rename_axis("sense")


def word_lists(tokenizer, rows: torch.Tensor) -> list[str]:
    """Rows of token ids, (n, m), each spelled out in one line."""
    return [" · ".join(spell(tokenizer, row)) for row in rows]


def by_token(tokenizer, input_ids, values: torch.Tensor) -> pd.DataFrame:
    """Contributions or weights, (T, k), as a table: a row for each token of the text, a column for each sense."""
    names = [f"{position} {name}" for position, name in enumerate(spell_text(tokenizer, input_ids[: len(values)]))]
    names += [RESIDUAL] * (len(values) - len(names))  # of a sense lens
    return pd.DataFrame(values.cpu().numpy(), index=pd.Index(names, name="token")).rename_axis(columns="sense")


def condensed(table: pd.DataFrame) -> pd.DataFrame:
    """A long text's table for a figure: the rows of the largest entries by size, in order, and the sum of others."""
    if len(table) <= ROWS:
        return table
    sizes = table.abs().max(axis=1)
    kept = table[sizes.rank(method="first", ascending=False) < ROWS]
    others = (table.sum() - kept.sum()).rename(f"the other {len(table) - len(kept)}")
    short = pd.concat([kept, others.to_frame().T])
    return short.rename_axis(index=table.index.name, columns=table.columns.name)


def next_words(tokenizer, before, after=None, n: int = 10, watch: Iterable[int] = ()) -> pd.DataFrame:
    """The likeliest next tokens with their probabilities, and after them those to watch.

    before, after: log-probabilities, (V,). With both, the tokens are the likeliest of either, and the columns
    are before, after, and their ratio.
    """
    highest = before if after is None else torch.maximum(before, after)
    ids = list(dict.fromkeys([*highest.topk(min(n, len(highest))).indices.tolist(), *watch]))
    if after is None:
        columns = {"probability": before}
    else:
        columns = {"before": before, "after": after, "ratio": after - before}
    values = {name: log_probs[ids].exp().tolist() for name, log_probs in columns.items()}
    return pd.DataFrame({"next": spell(tokenizer, ids)} | values)


def before_and_after(tokenizer, prompts: list[str], before, after, watch: Iterable[int]) -> pd.DataFrame:
    """What follows each prompt, before and after an edit: the likeliest token, and the probabilities of those to watch.

    before, after: log-probabilities, (n, V).
    """
    times = {"before": before, "after": after}
    columns = {f"likeliest {when}": spell(tokenizer, log_probs.argmax(-1)) for when, log_probs in times.items()}
    for token, name in zip(watch, spell(tokenizer, watch)):
        for when, log_probs in times.items():
            columns[f"p({name}) {when}"] = log_probs[:, token].exp().tolist()
    return pd.DataFrame(columns, index=pd.Index(prompts, name="text"))


def turned_up(control, among: torch.Tensor | None = None) -> pd.DataFrame:
    """The ten (token, sense) pairs of highest score under a `TopicControl`, and what each is multiplied by.

    among: None for the tokens that the control has sampled.
    """
    ids = control.sampled if among is None else among
    scores, factors = control.scores_of(ids), control.factors_of(ids)
    best = scores.flatten().topk(min(10, scores.numel())).indices
    rows, senses = best // scores.shape[1], best % scores.shape[1]
    values = torch.stack([scores[rows, senses], factors[rows, senses]], 1).tolist()
    table = pd.DataFrame(values, columns=["score", "factor"])
    return pd.DataFrame({"token": spell(control.tokenizer, ids[rows]), "sense": senses.tolist()}).join(table)


def _background(value: float, largest: float) -> str:
    """A colour for a number: blue above zero, orange below, stronger the larger it is."""
    if not largest or not np.isfinite(value):
        return ""
    strength = DEEPEST * min(abs(value) / largest, 1)
    return f"background-color: rgba({UP if value > 0 else DOWN}, {strength:.2f})"


def shaded(frame: pd.DataFrame, precision: int = 2, caption: str = "", shade: list | None = None):
    """A table with everything escaped and its numbers shaded, as a pandas Styler; `.to_html()` gives the HTML.

    shade: the columns to shade together; None: all that hold numbers.
    """
    columns = [c for c in (frame if shade is None else shade) if pd.api.types.is_numeric_dtype(frame[c])]
    greatest = float(frame[columns].abs().max().max()) if columns else 0.0
    styler = _styled(frame, caption).format(precision=precision, escape="html", na_rep="")
    return styler.map(lambda value: _background(value, greatest), subset=columns) if columns else styler


def _styled(frame: pd.DataFrame, caption: str):
    """A table as it looks everywhere, its cells not escaped yet."""
    names = [name for name in (frame.index.name, frame.columns.name) if name]
    only_counts = isinstance(frame.index, pd.RangeIndex) and not frame.index.name
    frame = frame.rename_axis(index=None, columns=" \\ ".join(names) or None)  # both in the corner, on one line
    name = hashlib.sha256(f"{caption}{frame.to_csv()}".encode()).hexdigest()[:8]  # the same page for the same table
    styler = frame.style.set_uuid(name).format_index(escape="html").format_index(escape="html", axis=1)
    styles = {
        "td, th": "padding: 2px 5px; text-align: left; vertical-align: top",
        "th, caption": "text-align: left; white-space: nowrap",
        "caption": "padding-top: 0.6em",
    }
    styler = styler.set_table_styles([{"selector": selector, "props": props} for selector, props in styles.items()])
    styler = styler.hide(axis="index") if only_counts else styler
    return styler.set_caption(escape(caption)) if caption else styler


def sense_words_html(words: pd.DataFrame, caption: str = "") -> str:
    """`word_senses` as a table of HTML: a row for each sense, what it pushes up and down, each with its score."""
    push = words["push"].map(" <small style='opacity: .6'>{:+.1f}</small></span>".format)
    spans = "<span style='white-space: nowrap'>" + words["token"].map(escape) + push
    cells = spans.groupby([words["sense"], words["direction"]]).agg(" &nbsp;".join).unstack()
    return _styled(cells[["up", "down"]].add_prefix("pushes ").rename_axis(columns=None), caption).to_html()


def reading_html(tokenizer, input_ids, reading, target: int, contrast: int | None = None, what="contributions") -> str:
    """All about one prediction: its sum, each (token, sense), and the likeliest next words.

    reading: an `attribution.Reading` of the ids. what: "contributions" to the logit of `target` (or to its log-odds
    to `contrast`), or "weights".
    """
    contributions, total = reading.contributions(target, contrast), reading.total(target, contrast)
    residual = abs(contributions.sum().item() - total)
    watched = [target] if contrast is None else [target, contrast]
    names = " to ".join(f"“{name}”" for name in spell(tokenizer, watched))
    quantity = f"{'logit' if contrast is None else 'log-odds'} of {names}: {total:.3f}"
    table = condensed(by_token(tokenizer, input_ids, reading.weights if what == "weights" else contributions))
    if what == "contributions":
        table.insert(0, "all", table.sum(axis=1))
    after = next_words(tokenizer, reading.log_probs(), n=6, watch=watched)
    page = f"<p>{escape(quantity)}; the contributions sum to it with a residual of {residual:.0e}</p>"
    page += shaded(table, caption=f"{what}: tokens and senses").to_html()
    return page + shaded(after, 3, "the next word").to_html()


def folded(summary: str, frame: pd.DataFrame, precision: int = 2, shade: list | None = None):
    """A table that opens when its summary is clicked, for IPython to display. precision, shade: as in `shaded`."""
    from IPython.display import HTML

    table = shaded(frame, precision, shade=shade).to_html()
    return HTML(f"<details><summary>{escape(summary)}</summary>{table}</details>")


def markdown(frame: pd.DataFrame) -> str:
    """A DataFrame and its index as a table of Markdown, for cards of models."""
    rows = [[frame.index.name or "", *frame.columns], ["---"] * (len(frame.columns) + 1), *frame.reset_index().values]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def side_by_side(titles_and_texts: dict[str, str]) -> str:
    """Texts beside each other, each under its title."""
    cells = "".join(
        f"<div style='flex: 1; min-width: 16em'><b>{escape(title)}</b><br>{escape(text)}</div>"
        for title, text in titles_and_texts.items()
    )
    return f"<div style='display: flex; flex-wrap: wrap; gap: 1.5em'>{cells}</div>"
