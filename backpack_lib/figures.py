"""Figures of the suite, in one style. Each function returns a matplotlib figure and shows nothing itself."""

from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

WIDTH = 7.5  # inches; reads well at the width of a page
LINE = 88  # characters of a title


class DescribedFigure(Figure):
    """A figure that tells a notebook in words what it shows, as the `alt` of its picture."""

    def description(self) -> str:
        """Its title, what its axes are, and the names of what is drawn."""
        axes = self.axes[0]
        named = axes.get_legend_handles_labels()[1] or [
            text.get_text() for legend in self.legends for text in legend.texts
        ]
        ticks = [label.get_text() for label in axes.get_yticklabels()] if not axes.get_ylabel() else []
        parts = {
            "across": axes.get_xlabel(),
            "up": axes.get_ylabel(),
            "rows": ", ".join(filter(None, ticks)),
            "drawn": "; ".join(dict.fromkeys(named)),
            "colour": ", ".join(other.get_ylabel() for other in self.axes[1:] if other.get_ylabel()),
        }
        said = [f"{name}: {' '.join(text.split())}." for name, text in parts.items() if text]
        return " ".join([f"Figure. {' '.join(self.get_suptitle().split())}.", *said])

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {}, {"image/png": {"alt": self.description()}}  # the picture itself is IPython's


def new_figure(height: float = 3.6, columns: int = 1, **kwargs):
    """A figure in the suite's style, and its axes. It is closed for pyplot, so a notebook shows it once."""
    with sns.axes_style("whitegrid"), sns.color_palette("colorblind"):
        figure, axes = plt.subplots(
            1, columns, figsize=(WIDTH, height), layout="constrained", FigureClass=DescribedFigure, **kwargs
        )
    plt.close(figure)
    return figure, axes


def set_title(axes, finding: str):
    """A figure's title states its finding, across the whole width."""
    axes.figure.suptitle(fill(finding, LINE), x=0.01, ha="left", fontweight="bold", fontsize=11)


def loss_curves(histories: dict, title: str | None = None):
    """Training and validation loss over tokens, of one or more runs, with the floor where it is known.

    histories: name -> DataFrame as `training.train` returns it.
    """
    figure, axes = new_figure()
    colors = sns.color_palette("colorblind")
    for (name, history), color in zip(histories.items(), colors):
        tokens = history["tokens"] / 1e6
        axes.plot(tokens, history["train_loss"], color=color, alpha=0.45, linestyle=":", label=f"{name}, training")
        axes.plot(tokens, history["valid_loss"], color=color, marker="o", markersize=3, label=f"{name}, validation")
    floor = next((history["floor"].iloc[-1] for history in histories.values() if "floor" in history), None)
    if floor is not None:
        axes.axhline(floor, color="black", linestyle="--", linewidth=1, label="floor: no model can do better")
    # The first training losses are those of an ignorant model; with them the rest would look flat.
    highest = max(history["valid_loss"].max() for history in histories.values())
    lowest = min(floor or highest, *(history["train_loss"].min() for history in histories.values()))
    axes.set_ylim(lowest - 0.08 * (highest - lowest), highest + 0.08 * (highest - lowest) + 1e-3)
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)")
    set_title(axes, title or _finding(histories, floor))
    axes.legend()
    return figure


def _finding(histories: dict, floor: float | None) -> str:
    last = {name: history["valid_loss"].iloc[-1] for name, history in histories.items()}
    if floor is None:
        return "; ".join(f"{name}: {loss:.2f} nats" for name, loss in last.items())
    return "; ".join(f"{name}: {loss / floor - 1:.1%} above the floor" for name, loss in last.items())


def marked_heatmap(values, marked, title: str, label: str):
    """A heat map of a DataFrame with a box around the cells where `marked`, of the same shape, is true."""
    figure, axes = new_figure(height=0.9 + 0.24 * len(values))
    sns.heatmap(
        values, ax=axes, cmap="viridis", annot=True, fmt=".2f", annot_kws={"size": 7}, cbar_kws={"label": label}
    )
    for row, column in zip(*marked.to_numpy().nonzero()):
        axes.add_patch(plt.Rectangle((column, row), 1, 1, fill=False, edgecolor="white", linewidth=2.5))
    set_title(axes, title)
    axes.tick_params(axis="x", rotation=30)
    return figure


def against_truth(values, title: str, xlabel: str, ylabel: str):
    """As `named_points`, for shares, with the line on which both are equal."""
    figure = named_points(values, title, xlabel, ylabel)
    figure.axes[0].plot([0, 1], [0, 1], color="gray", linewidth=1, linestyle="--", label="equal")
    figure.axes[0].legend()
    return figure


def named_points(values, title: str, xlabel: str, ylabel: str):
    """Each row of a DataFrame as a point with its name: its second column over its first."""
    figure, axes = new_figure(height=4.2 if len(values) < 30 else 6.0)
    first, second = values.columns[:2]
    axes.scatter(values[first], values[second], s=18, color=sns.color_palette("colorblind")[0], zorder=3)
    for name, row in values.iterrows():
        axes.annotate(name, (row[first], row[second]), xytext=(5, -7), textcoords="offset points", fontsize=8)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    set_title(axes, title)
    return figure


def scatter(values, title: str, xlabel: str, ylabel: str, named: dict | None = None):
    """Each row of a DataFrame of two columns as a small point, a line where both are equal, and some rows by name."""
    figure, axes = new_figure()
    blue, orange = sns.color_palette("colorblind")[:2]
    x, y = values.to_numpy().T
    axes.axline((0, 0), slope=1, color="gray", linewidth=1)
    axes.scatter(x, y, s=6, color=blue, alpha=0.4, linewidths=0, rasterized=True)
    for name, row in (named or {}).items():
        axes.scatter(x[row], y[row], s=30, color=orange, zorder=3)
        axes.annotate(name, (x[row], y[row]), xytext=(7, -3), textcoords="offset points", fontsize=9)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    set_title(axes, title)
    return figure


def heatmap(values, title: str, label: str):
    """A heat map of a DataFrame: blue above zero, orange below."""
    figure, axes = new_figure(height=1.1 + 0.25 * len(values))
    greatest, signed = values.abs().max().max(), (values < 0).any(axis=None)
    colors = (
        sns.diverging_palette(35, 245, s=90, as_cmap=True) if signed else sns.light_palette("#2079b8", as_cmap=True)
    )
    decimals = 1 if greatest >= 1 else 2
    sns.heatmap(
        values, ax=axes, cmap=colors, vmin=-greatest if signed else 0, vmax=greatest, linewidths=0.4,
        annot=values.round(decimals) + 0.0, fmt=f".{decimals}f", annot_kws={"size": 6.5}, cbar_kws={"label": label},
    )  # fmt: skip
    axes.tick_params(axis="y", rotation=0)
    set_title(axes, title)
    return figure


def paired_bars(values, other, title: str, xlabel: str, other_xlabel: str):
    """Beside each other: the bars of a DataFrame, as in `grouped_bars`, and those of a Series of the same rows."""
    figure, (left, right) = new_figure(height=1.4 + 0.26 * len(values), columns=2, sharey=True)
    colors = sns.color_palette("colorblind")
    rows, width = np.arange(len(values)), 0.8 / len(values.columns)
    for number, name in enumerate(values.columns):
        left.barh(
            rows + width * (number - (len(values.columns) - 1) / 2),
            values[name],
            width,
            color=colors[number],
            label=name,
        )
    right.barh(rows, other, color=[colors[0] if value > 0 else colors[1] for value in other])
    right.axvline(0, color="gray", linewidth=1)
    left.set_yticks(rows, values.index)
    left.invert_yaxis()
    left.set(xlabel=xlabel, ylabel=values.index.name)
    right.set(xlabel=other_xlabel)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=len(values.columns))
    set_title(left, title)
    return figure


def product(first, second, third, title: str):
    """Three heat maps of the same rows and columns, of which the third is the first times the second, cell by cell.

    first, second, third: DataFrames of weights, pushes and contributions. The largest contribution is framed in all.
    """
    names = ("weight", "× push", "= contribution")
    figure, all_axes = new_figure(height=1.9 + 0.24 * len(first), columns=3, sharey=True)
    row, column = divmod(np.abs(third.to_numpy()).argmax(), third.shape[1])
    signed = sns.diverging_palette(35, 245, s=90, as_cmap=True)
    for axes, values, name in zip(all_axes, (first, second, third), names):
        greatest = values.abs().max().max()
        lowest, colors = (0, sns.light_palette("#2079b8", as_cmap=True)) if name == "weight" else (-greatest, signed)
        bar = {"location": "bottom", "aspect": 18, "label": "0 to 1" if name == "weight" else "nats"}
        sns.heatmap(values, ax=axes, cmap=colors, vmin=lowest, vmax=greatest, linewidths=0.4, cbar_kws=bar)
        axes.add_patch(plt.Rectangle((column, row), 1, 1, fill=False, edgecolor="black", linewidth=1.5))
        axes.set_title(name, fontsize=11)
        axes.set(xlabel="sense", ylabel="")
        axes.tick_params(axis="x", labelsize=7, rotation=0)
        axes.tick_params(axis="y", rotation=0)
    set_title(all_axes[0], title)
    return figure


def grouped_bars(values, title: str, xlabel: str):
    """Horizontal bars of a DataFrame: a group for each row, a bar for each column."""
    figure, axes = new_figure(height=1.2 + 0.34 * len(values))
    long = values.reset_index(drop=True).melt(ignore_index=False, var_name="column", value_name="value")
    long = long.reset_index(names="row")
    colors = sns.color_palette("colorblind")[: len(values.columns)]
    sns.barplot(long, y="row", x="value", hue="column", orient="h", ax=axes, palette=colors)
    axes.set_yticks(range(len(values)), values.index)
    axes.set(xlabel=xlabel, ylabel="")
    handles, names = axes.get_legend_handles_labels()
    axes.get_legend().remove()  # below the axes it hides no bar
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    set_title(axes, title)
    return figure


def intervals(tables: dict, title: str, ylabel: str):
    """Points with their intervals: for each name a DataFrame with a row for each group.

    Its first column is the value; low and high are the interval's ends.
    """
    figure, axes = new_figure()
    colors = sns.color_palette("colorblind")
    for number, (name, table) in enumerate(tables.items()):
        x = [row + 0.18 * (number - (len(tables) - 1) / 2) for row in range(len(table))]
        value = table.iloc[:, 0]
        errors = [value - table["low"], table["high"] - value]
        axes.errorbar(x, value, yerr=errors, fmt="o", capsize=3, color=colors[number], label=name)
    axes.set_xticks(range(len(table)), table.index)
    axes.axhline(0, color="gray", linewidth=1)
    axes.set(ylabel=ylabel)
    axes.legend()
    set_title(axes, title)
    return figure


def row_intervals(table, title: str, xlabel: str, at: float = 0.0, log: bool = False):
    """A row for each row of a DataFrame: its first column as a point, low and high as interval, a line at no effect."""
    figure, axes = new_figure(height=1.2 + 0.27 * len(table))
    rows, value = range(len(table)), table.iloc[:, 0]
    axes.errorbar(
        value,
        rows,
        xerr=[value - table["low"], table["high"] - value],
        fmt="o",
        capsize=3,
        color=sns.color_palette("colorblind")[0],
    )
    axes.axvline(at, color="gray", linewidth=1)
    axes.set_yticks(rows, table.index)
    axes.set(xlabel=xlabel)
    if log:
        _plain_log(axes)
    set_title(axes, title)
    return figure


def _plain_log(axes):
    """A logarithmic axis across, with its numbers written out."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")


def trade_off(table, title: str):
    """Success over perplexity: a line through the temperatures of each method and strength, and no control as a star.

    table: as `topic_study.settings_table` returns it.
    """
    figure, axes = new_figure(height=4.0)
    colors = dict(zip(table["method"].unique(), sns.color_palette("colorblind")))
    markers = dict(zip(sorted(table["strength"].unique()), "*osD^vP"))
    for (method, strength), rows in table.groupby(["method", "strength"], sort=False):
        rows = rows.sort_values("relative perplexity")
        name = f"{method}, no control" if not strength else f"{method}, {strength:g}"
        style = {
            "marker": markers[strength],
            "markersize": 5 if strength else 13,
            "color": colors[method],
            "linewidth": 1,
        }
        axes.plot(rows["relative perplexity"], rows["success"], label=name, **style)
    axes.axvline(1, color="gray", linewidth=1, linestyle="--")
    axes.set(xlabel="perplexity, times that of no control", ylabel="success (share of texts on topic)")
    _plain_log(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    set_title(axes, title)
    return figure


def prediction_line(x, predicted, measured, title: str, xlabel: str, ylabel: str):
    """What was predicted as a line, and what was measured as points on it, or off it."""
    figure, axes = new_figure()
    blue, orange = sns.color_palette("colorblind")[:2]
    axes.axhline(0, color="gray", linewidth=1)
    axes.plot(x, predicted, color=blue, label="predicted")
    axes.plot(x, measured, "o", color=orange, label="measured")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend()
    set_title(axes, title)
    return figure


def curves(table, title: str, xlabel: str, ylabel: str):
    """A line for each column of a DataFrame over its index, named beside the figure."""
    figure, axes = new_figure()
    colors = sns.color_palette("colorblind", len(table.columns))
    for name, color in zip(table.columns, colors):
        axes.plot(table.index, table[name], color=color, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    set_title(axes, title)
    return figure


def waterfall(parts, title: str, xlabel: str):
    """A sum as a flight of bars: each part begins where the one before it ended, and the last bar is the sum.

    parts: a Series of numbers by name. Blue parts add, orange parts take away.
    """
    figure, axes = new_figure(height=1.1 + 0.36 * len(parts))
    blue, orange = sns.color_palette("colorblind")[:2]
    ends = parts.cumsum()
    axes.barh(range(len(parts)), parts, left=ends - parts, color=[blue if value > 0 else orange for value in parts])
    axes.barh(len(parts), ends.iloc[-1], color="dimgray")
    for row, (end, value) in enumerate(zip([*ends, ends.iloc[-1]], [*parts, ends.iloc[-1]])):
        side, shift = ("left", 4) if value > 0 else ("right", -4)
        axes.annotate(
            f"{value:+.2f}", (end, row), (shift, 0), textcoords="offset points", ha=side, va="center", fontsize=9
        )
    axes.set_yticks([*range(len(parts)), len(parts)], [*parts.index, "sum"])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.axvline(0, color="gray", linewidth=1)
    axes.grid(False, axis="y")
    axes.set(xlabel=xlabel)
    set_title(axes, title)
    return figure
