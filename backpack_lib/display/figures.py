"""Figures of the suite, in one style. Each function returns a matplotlib figure and shows nothing itself."""

from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

WIDTH = 7.5  # inches; reads well at the width of a page
LINE = 88  # characters of a title
COLORS = sns.color_palette("colorblind")
QUIET = sns.color_palette("colorblind", desat=0.75)  # for the larger areas of bars
BLUE, ORANGE = COLORS[:2]  # up and down
BESIDE = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "fontsize": 8}  # a legend


class DescribedFigure(Figure):
    """A figure that tells a notebook in words what it shows, as the `alt` of its picture."""

    def description(self) -> str:
        """Its title, what its axes are, and the names of what is drawn."""
        axes = self.axes[0]
        names = axes.get_legend_handles_labels()[1] or [t.get_text() for legend in self.legends for t in legend.texts]
        rows = [] if axes.get_ylabel() else [label.get_text() for label in axes.get_yticklabels()]
        parts = {
            "across": axes.get_xlabel(),
            "up": axes.get_ylabel(),
            "rows": ", ".join(filter(None, rows)),
            "drawn": "; ".join(dict.fromkeys(names)),
            "colour": ", ".join(other.get_ylabel() for other in self.axes[1:] if other.get_ylabel()),
        }
        sentences = [f"Figure. {self.get_suptitle()}.", *(f"{name}: {text}." for name, text in parts.items() if text)]
        return " ".join(" ".join(sentences).split())

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {}, {"image/png": {"alt": self.description()}}  # the picture itself is IPython's


def new_figure(title: str, height: float = 3.6, columns: int = 1, **kwargs):
    """A figure in the suite's style, its finding as title, and its axes; closed for pyplot, so it is shown once."""
    with sns.axes_style("whitegrid"), sns.color_palette("colorblind"):
        figure, axes = plt.subplots(
            1, columns, figsize=(WIDTH, height), layout="constrained", FigureClass=DescribedFigure, **kwargs
        )
    plt.close(figure)
    figure.suptitle(fill(title, LINE), x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure, axes


def loss_curves(histories: dict):
    """Training and validation loss over tokens, of one or more runs, with the floor where it is known.

    histories: name -> DataFrame as `training.train` returns it.
    """
    together = pd.concat(histories.values())
    floor = together["floor"].iloc[-1] if "floor" in together else None
    last = {name: history["valid_loss"].iloc[-1] for name, history in histories.items()}
    if floor is None:
        findings = [f"{name}: {loss:.2f} nats" for name, loss in last.items()]
    else:
        findings = [f"{name}: {loss / floor - 1:.1%} above the floor" for name, loss in last.items()]
    figure, axes = new_figure("; ".join(findings))
    for (name, history), color in zip(histories.items(), COLORS):
        tokens = history["tokens"] / 1e6
        axes.plot(tokens, history["train_loss"], color=color, alpha=0.45, linestyle=":", label=f"{name}, training")
        axes.plot(tokens, history["valid_loss"], color=color, marker="o", markersize=3, label=f"{name}, validation")
    if floor is not None:
        axes.axhline(floor, color="black", linestyle="--", linewidth=1, label="floor: no model can do better")
    # The first training losses are those of an ignorant model; with them the rest would look flat.
    lowest = together.filter(["train_loss", "floor"]).min().min()
    highest = together["valid_loss"].max()
    margin = 0.08 * (highest - lowest)
    axes.set_ylim(lowest - margin, highest + margin + 1e-3)
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)")
    axes.legend()
    return figure


def curves(table, title: str, xlabel: str, ylabel: str, **kwargs):
    """A line for each column of a DataFrame over its index, named beside the figure.

    kwargs: further ones of `DataFrame.plot`, such as style={"measured": "o"} for points.
    """
    figure, axes = new_figure(title)
    colors = sns.color_palette("colorblind", len(table.columns))
    table.plot(ax=axes, color=colors, xlabel=xlabel, ylabel=ylabel, grid=True, **kwargs)
    axes.legend(**BESIDE)
    return figure


def named_points(values, title: str, xlabel: str, ylabel: str, named: dict | None = None, equal: bool = False):
    """Each row of a DataFrame as a point, its second column over its first.

    named: the rows that are named, by their names, among many small points; None: each by its own name.
    equal: with the line on which both are equal.
    """
    all_named = named is None
    figure, axes = new_figure(title, height=4.2 if len(named or values) < 30 else 6.0)
    x, y = values.to_numpy().T
    if all_named:
        named = {name: row for row, name in enumerate(values.index)}
    else:
        axes.scatter(x, y, s=6, color=BLUE, alpha=0.4, linewidths=0, rasterized=True)
    rows = list(named.values())
    axes.scatter(x[rows], y[rows], s=18, color=BLUE if all_named else ORANGE, zorder=3)
    for name, row in named.items():
        axes.annotate(name, (x[row], y[row]), xytext=(5, -7), textcoords="offset points", fontsize=8)
    if equal:
        axes.axline((0, 0), slope=1, color="gray", linewidth=1, linestyle="--", label="equal")
        axes.legend()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure


def trade_off(table, title: str):
    """Success over perplexity: a line through the temperatures of each method and strength, and no control as a star.

    table: with the columns method, strength, relative perplexity (times that of no control) and success.
    """
    figure, axes = new_figure(title, height=4.0)
    colors = dict(zip(table["method"].unique(), COLORS))
    markers = dict(zip(sorted(table["strength"].unique()), "*osD^vP"))
    for (method, strength), rows in table.groupby(["method", "strength"], sort=False):
        rows = rows.sort_values("relative perplexity")
        name = f"{method}, {strength:g}" if strength else f"{method}, no control"
        style = {"marker": markers[strength], "markersize": 5 if strength else 13, "color": colors[method]}
        axes.plot(rows["relative perplexity"], rows["success"], label=name, linewidth=1, **style)
    axes.axvline(1, color="gray", linewidth=1, linestyle="--")
    axes.set(xlabel="perplexity, times that of no control", ylabel="success (share of texts on topic)")
    _plain_log(axes)
    axes.legend(**BESIDE)
    return figure


def _plain_log(axes):
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")


def heatmap(values, title: str, label: str, marked=None):
    """A heat map of a DataFrame: blue above zero, orange below.

    marked: truth values of the same shape; where true, a cell is framed, and colours go from the least to the greatest.
    """
    figure, axes = new_figure(title, height=1.1 + 0.25 * len(values))
    decimals = 1 if values.abs().max().max() >= 1 and marked is None else 2
    style = _colors(values) if marked is None else {"cmap": "viridis", "linewidths": 0}
    annotated = {"annot": values.round(decimals) + 0.0, "fmt": f".{decimals}f", "annot_kws": {"size": 6.5}}
    sns.heatmap(values, ax=axes, cbar_kws={"label": label}, **style, **annotated)
    axes.tick_params(axis="y", rotation=0)
    if marked is not None:
        _frame(axes, marked, "white")
        axes.tick_params(axis="x", rotation=30)
    return figure


def product(first, second, third, title: str):
    """Three heat maps of the same rows and columns, of which the third is the first times the second, cell by cell.

    first, second, third: DataFrames of weights, pushes and contributions. The largest contribution is framed in all.
    """
    figure, all_axes = new_figure(title, height=1.9 + 0.24 * len(first), columns=3, sharey=True)
    panels = (("weight", "0 to 1", first), ("× push", "nats", second), ("= contribution", "nats", third))
    largest = third.abs() == third.abs().max().max()
    for axes, (name, unit, values) in zip(all_axes, panels):
        bar = {"location": "bottom", "aspect": 18, "label": unit}
        sns.heatmap(values, ax=axes, cbar_kws=bar, **_colors(values))
        _frame(axes, largest, "black")
        axes.set_title(name, fontsize=11)
        axes.set(xlabel="sense", ylabel="")
        axes.tick_params(axis="x", labelsize=7, rotation=0)
        axes.tick_params(axis="y", rotation=0)
    return figure


def _colors(values) -> dict:
    """Blue for what is above zero, deeper the greater, and orange for what is below, if anything is."""
    greatest = values.abs().max().max()
    if (values < 0).any(axis=None):
        colors, lowest = sns.diverging_palette(35, 245, s=90, as_cmap=True), -greatest
    else:
        colors, lowest = sns.light_palette("#2079b8", as_cmap=True), 0
    return {"cmap": colors, "vmin": lowest, "vmax": greatest, "linewidths": 0.4}


def _frame(axes, marked, color: str):
    """Frames the cells of a heat map where a DataFrame of truth values is true."""
    for row, column in zip(*marked.to_numpy().nonzero()):
        axes.add_patch(plt.Rectangle((column, row), 1, 1, fill=False, edgecolor=color, linewidth=2))


def grouped_bars(values, title: str, xlabel: str):
    """Horizontal bars of a DataFrame: a group for each row, from the top, a bar for each column."""
    figure, axes = new_figure(title, height=1.2 + 0.34 * len(values))
    values.rename_axis(None).plot.barh(ax=axes, width=0.8, color=QUIET, legend=False, xlabel=xlabel)
    axes.grid(axis="x")
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=len(values.columns))  # where it hides no bar
    return figure


def intervals(tables, title: str, xlabel: str, at: float = 0.0, log: bool = False):
    """A row for each row of a DataFrame: its first column as a point, low and high as interval, a line at no effect.

    tables: a DataFrame, or several of the same rows by name.
    """
    tables = tables if isinstance(tables, dict) else {None: tables}
    rows = next(iter(tables.values())).index
    figure, axes = new_figure(title, height=1.2 + (0.09 + 0.18 * len(tables)) * len(rows))
    for number, (name, table) in enumerate(tables.items()):
        places = np.arange(len(table)) - 0.18 * (number - (len(tables) - 1) / 2)
        value = table.iloc[:, 0]
        ends = [value - table["low"], table["high"] - value]
        axes.errorbar(value, places, xerr=ends, fmt="o", capsize=3, color=COLORS[number], label=name)
    axes.axvline(at, color="gray", linewidth=1)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=xlabel, ylim=(-0.6, len(rows) - 0.4))
    if log:
        _plain_log(axes)
    if len(tables) > 1:
        figure.legend(loc="outside lower center", ncols=len(tables))
    return figure


def waterfall(parts, title: str, xlabel: str):
    """A sum as a flight of bars: each part begins where the one before it ended, and the last bar is the sum.

    parts: a Series of numbers by name. Blue parts add, orange parts take away.
    """
    figure, axes = new_figure(title, height=1.1 + 0.36 * len(parts))
    widths = [*parts, parts.sum()]
    colors = [BLUE if value > 0 else ORANGE for value in parts]
    bars = axes.barh(range(len(widths)), widths, left=[*(parts.cumsum() - parts), 0], color=[*colors, "dimgray"])
    axes.bar_label(bars, [f"{value:+.2f}" for value in widths], padding=4, fontsize=9)
    axes.set_yticks(range(len(widths)), [*parts.index, "sum"])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.axvline(0, color="gray", linewidth=1)
    axes.grid(False, axis="y")
    axes.set(xlabel=xlabel)
    return figure
