"""Figures of the study of reward models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.plots import style as look
from utils.plots.style import style

KINDS = {"scalar": ("scalar", look.BLUE), "ordinal": ("ten classes", look.ORANGE)}
SHARED = {"sharex": True, "sharey": True}
ACCURACIES = {"accuracy": "all pairs", "model_pairs": "pairs of two samples"}


@style()
def reliability_curves(
    curves: Mapping[str, pd.DataFrame], title: str, ece: Mapping[str, float]
) -> Figure:
    """Show how often each model is right by how sure it is; on the diagonal it is calibrated.

    Args:
        curves: tables of `reliability` by model, a panel each.
        title: of the figure.
        ece: expected calibration error by model, shown above its panel.
    """
    columns = 2 if len(curves) == 4 else min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    fig, *axes = look.panels(rows, columns, 1.0 + 2.6 * rows, title, **SHARED)
    for place, (ax, (name, table)) in enumerate(zip(axes, curves.items(), strict=False)):
        ax.plot([0.5, 1], [0.5, 1], color=look.GREY, ls="--", label="calibrated")
        _dots(ax, table["confidence"], table, "accuracy", look.BLUE, upright=True)
        ax.set_title(f"{look.plain(name)}\nECE {ece[name]:.3f}", fontsize=9)
        ax.tick_params(labelbottom=place + columns >= len(curves))
    for ax in axes[len(curves) :]:
        ax.set_visible(False)
    lows = [table["low"].min() for table in curves.values()]
    axes[0].set(xlim=(0.48, 1.02), ylim=(min([0.45, *(low - 0.03 for low in lows)]), 1.03))
    fig.supxlabel("confidence: the larger of P(A beats B) and P(B beats A)", fontsize=10)
    fig.supylabel("accuracy (line: 95% interval)", fontsize=10)
    axes[0].legend(loc="upper left")  # below the figure it would cover the label of the axes
    return fig


@style()
def arm_accuracies(table: pd.DataFrame, title: str, rule: Sequence[float]) -> Figure:
    """Show the test accuracy of each arm with its 95% interval, a panel per set of pairs.

    Args:
        table: columns `arm`, `kind`, and for each of `ACCURACIES` the value and `<name>_low`,
            `<name>_high`.
        title: of the figure.
        rule: accuracy of the best rule that reads only the text, one for each of `ACCURACIES`.
    """
    fig, *axes = look.panels(1, len(ACCURACIES), 1.5 + 0.3 * len(table), title, **SHARED)
    groups = [*table.reset_index(drop=True).groupby("kind", sort=False, dropna=False)]
    text = "best rule that reads only the text"
    for ax, best, (column, panel) in zip(axes, rule, ACCURACIES.items(), strict=True):
        ends = {column: "value", f"{column}_low": "low", f"{column}_high": "high"}
        for kind, part in groups:
            label, color = KINDS.get(kind, ("", look.BLUE))
            _dots(ax, part.index, part[[*ends]].rename(columns=ends), "value", color, label)
        ax.axvline(best, color=look.DARK, ls="--", lw=1.2, label=text)
        ax.set_title(panel)
        ax.set(xlabel="accuracy (line: 95% interval)", ylim=(len(table) - 0.4, -0.6))
    axes[0].set_yticks(range(len(table)), [look.plain(name) for name in table["arm"]])
    look.legend_below(fig, axes[0])
    return fig


@style()
def learning_curve(table: pd.DataFrame, title: str) -> Figure:
    """Show accuracy by number of training prompts with 95% intervals, a line per kind.

    Args:
        table: columns `kind`, `prompts`, `value`, `low`, `high`, and `pairs`, which pairs it is
            measured on; these have a panel each.
        title: of the figure.
    """
    groups = [*table.groupby("pairs", sort=False)]
    kinds, counts = table["kind"].unique(), sorted(table["prompts"].unique())
    fig, *axes = look.panels(1, len(groups), 3.8, title, **SHARED)
    for ax, (name, rows) in zip(axes, groups, strict=True):
        for place, kind in enumerate(kinds):
            part = rows[rows["kind"] == kind].sort_values("prompts")
            label, color = KINDS.get(kind, (look.plain(kind), look.policy_color("", place)))
            x = part["prompts"] * 1.03 ** (place - (len(kinds) - 1) / 2)  # side by side
            ax.plot(x, part["value"], color=color, lw=1.5, alpha=0.6)
            _dots(ax, x, part, "value", color, label, upright=True)
        ax.set_xscale("log")
        ax.set_xticks(counts, [f"{count:,}" for count in counts])
        ax.minorticks_off()
        ax.set_title(name)
        ax.set_xlabel("training prompts")
    axes[0].set_ylabel("test accuracy (line: 95% interval)")
    look.legend_below(fig, axes[0])
    return fig


@style()
def share_bars(table: pd.DataFrame, label: str, title: str, xlabel: str) -> Figure:
    """Show shares with 95% intervals, a row for each `label`; half is a dashed line.

    Args:
        table: columns `label`, `value`, `low`, `high`, and `series` if several models are shown.
        label: the column that names the rows.
        title: of the figure.
        xlabel: what is shared.
    """
    names = [*dict.fromkeys(table[label])]
    series = [*table.groupby("series", sort=False)] if "series" in table else [("", table)]
    height = 1.3 + (0.16 + 0.14 * len(series)) * len(names)
    fig, ax = look.panels(1, 1, height, title)
    ax.axvline(0.5, color=look.GREY, ls="--", lw=1.2)
    for place, (name, part) in enumerate(series):
        y = pd.Index(names).get_indexer(part[label]) + 0.7 * (place + 0.5) / len(series) - 0.35
        _dots(ax, y, part, "value", look.policy_color("", place), look.plain(name))
    ax.set_yticks(range(len(names)), [look.plain(name) for name in names])
    ax.set(xlabel=f"{xlabel} (line: 95% interval)", ylim=(len(names) - 0.4, -0.6))
    look.legend_below(fig, ax)
    return fig


@style()
def rating_calibration_curve(table: pd.DataFrame, title: str) -> Figure:
    """Show the expected rating by the given one, from a table of `rating_calibration`."""
    fig, ax = look.panels(1, 1, 4.2, title)
    ax.plot([1, 10], [1, 10], color=look.GREY, ls="--", label="expected = given")
    ends = table["expected"] - table["sd"], table["expected"] + table["sd"]
    ax.fill_between(
        table["rating"], *ends, color=look.BLUE, alpha=0.15, lw=0, label="±1 sd of responses"
    )
    ax.plot(table["rating"], table["expected"], color=look.BLUE, lw=1, alpha=0.6)
    _dots(ax, table["rating"], table, "expected", look.BLUE, "mean, 95% interval", upright=True)
    ticks = [f"{rating}\nn = {n}" for rating, n in zip(table["rating"], table["n"], strict=True)]
    ax.set_xticks(table["rating"], ticks)
    ax.set(xlabel="given rating", ylabel="expected rating", yticks=range(1, 11))
    ax.set(xlim=(0.6, 10.4), ylim=(0.6, 10.4))
    ax.legend()
    return fig


def _dots(
    ax: Axes,
    at: Sequence[float],
    table: pd.DataFrame,
    value: str,
    color: str,
    label: str = "",
    upright: bool = False,
) -> None:
    """Draw `value` with the interval `low` to `high` at each place; what is missing stays away."""
    ends = ax.vlines if upright else ax.hlines
    known = table[["low", "high"]].notna().all(axis=1).to_numpy()
    ends(np.asarray(at)[known], table["low"][known], table["high"][known], color=color, lw=2)
    x, y = (at, table[value]) if upright else (table[value], at)
    ax.plot(x, y, "o", ms=6, color=color, label=label or None, zorder=3)
