"""Figures of the report: each reads a table or a few arrays, and takes a second or two.

A title may state the finding. A notebook shows a figure with `display(save_figure(...))`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from utils.plots import style as look
from utils.plots.style import style

SFT_SD = "SFT standard deviations"


@style()
def rating_histograms(frame: pd.DataFrame, title: str = "Ratings by temperature") -> Figure:
    """Show the ratings 1..10 of `responses_frame` for each temperature, coloured by batch."""
    keys = frame["temperature"].map("temperature {:.1f}".format, na_action="ignore")
    rest = np.where(frame["source"] == "reference", "~reference", "~temperature unknown")
    groups = dict([*frame.groupby(keys.where(keys.notna(), rest))])  # "~" sorts last
    fig, *axes = look.small_multiples(len(groups), title, "rating, 1 to 10", "responses, %")
    colors = {b: look.policy_color("", i) for i, b in enumerate(sorted(frame["batch"].unique()))}
    for ax, (name, part) in zip(axes, groups.items(), strict=True):
        batches = sorted(part["batch"].unique())
        width = 0.8 / len(batches)
        for place, batch in enumerate(batches):
            ratings = part.loc[part["batch"] == batch, "rating"].round().to_numpy(int)
            share = np.bincount(ratings, minlength=11)[1:11] / len(part) * 100
            x = np.arange(1, 11) + (place - (len(batches) - 1) / 2) * width
            ax.bar(x, share, width, color=colors[batch])
        label = f"{name.lstrip('~')}: mean {part['rating'].mean():.1f}, n = {len(part):,}"
        ax.set_title(label, fontsize=9)
    if len(colors) > 1:
        handles = [Patch(color=color, label=f"batch {batch}") for batch, color in colors.items()]
        fig.legend(handles=handles, loc="outside lower right", ncols=len(handles))
    return fig


@style()
def category_overview(frame: pd.DataFrame, title: str = "Ratings and length by category") -> Figure:
    """Compare responses with references per category: mean rating and mean words."""
    other = "model sample" if frame["source"].notna().any() else "response"
    kind = np.where(frame["source"] == "reference", "reference", other)
    means = frame.groupby(["category", kind])[["rating", "n_words"]].mean().unstack()
    means = means.sort_values(means.columns[0])
    fig, left, right = look.panels(1, 2, 1.3 + 0.25 * len(means), title, sharey=True)
    for ax, column in ((left, "rating"), (right, "n_words")):
        ends = means[column].min(axis=1), means[column].max(axis=1)
        ax.hlines(range(len(means)), *ends, color="#cccccc", lw=2)
        for name, color in {other: look.BLUE, "reference": look.ORANGE}.items():
            if name in means[column]:
                ax.plot(means[column][name], range(len(means)), "o", color=color, label=name)
    left.set_yticks(range(len(means)), [str(name).replace("_", " ") for name in means.index])
    left.set(xlabel="mean rating, 1 to 10", xlim=(1, 10))
    right.set(xlabel="mean length, words", xlim=(0, None))
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


@style()
def reward_training(metrics: pd.DataFrame, title: str, constant: float | None = None) -> Figure:
    """Show loss and accuracy by step; `constant`, a loss of predicting blindly, is a line."""
    fig, left, right = look.panels(1, 2, 3.2, title)
    look.smooth(left, metrics, "loss", look.BLUE, "moving average")
    look.smooth(right, metrics, "accuracy", look.BLUE, "moving average")
    if constant is not None:
        left.axhline(constant, color=look.DARK, ls="--", label=f"best constant, {constant:.4g}")
    right.axhline(0.5, color=look.DARK, ls="--", label="chance")
    for ax, label in ((left, "loss, nats per pair"), (right, "accuracy, share of pairs")):
        ax.set(xlabel="optimiser step", ylabel=label)
        ax.legend()
    return fig


@style()
def reward_histograms(
    chosen: Sequence[float], rejected: Sequence[float], title: str, xlabel: str = "reward"
) -> Figure:
    """Overlay the rewards of chosen and rejected responses, with their medians."""
    fig, ax = look.panels(1, 1, 3.4, title)
    bins = np.histogram_bin_edges([*chosen, *rejected], bins=30)
    for name, values, color in (("chosen", chosen, look.BLUE), ("rejected", rejected, look.ORANGE)):
        label = f"{name}: median {np.median(values):.2f}, n = {len(values):,}"
        ax.hist(values, bins, color=color, alpha=0.5, label=label)
        ax.axvline(np.median(values), color=color, lw=2, ls="--")
    ax.set(xlabel=xlabel, ylabel="responses")
    ax.legend()
    return fig


@style()
def rating_distributions(probabilities: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Show P(rating) of each response, its expected value and a band of one sd each way."""
    ratings = np.arange(1, 11)
    fig, *axes = look.small_multiples(len(probabilities), title, "rating", "probability")
    for ax, (name, p) in zip(axes, probabilities.items(), strict=True):
        mean = float(ratings @ np.asarray(p))
        sd = math.sqrt(float((ratings - mean) ** 2 @ np.asarray(p)))
        ax.bar(ratings, p, color=look.BLUE)
        ends = (mean - sd, mean + sd)
        ax.axvspan(*ends, color=look.ORANGE, alpha=0.25, lw=0, zorder=0, label="±1 sd")
        ax.axvline(mean, color=look.ORANGE, lw=2, label="expected rating")
        ax.set_title(f"{textwrap.fill(name, 30)}\nexpected {mean:.2f}, sd {sd:.2f}", fontsize=9)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return fig


@style()
def comparison_curves(bands: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Show the held-out reward of several policies by step, with 95% bands and SFT's level.

    `bands` has columns step, mean, low, high per policy; of "sft" the last row is used.
    """
    fig, ax = look.panels(1, 1, 4.2, title)
    sft = bands["sft"].iloc[-1]
    ax.axhspan(sft["low"], sft["high"], color=look.GREY, alpha=0.2, lw=0)
    ax.axhline(sft["mean"], color=look.GREY, lw=2, ls="--", label=look.NAMES["sft"])
    for place, name in enumerate(name for name in bands if name != "sft"):
        color = look.policy_color(name, place)
        band = bands[name].dropna(subset=["mean", "low", "high"])
        ax.fill_between(band["step"], band["low"], band["high"], color=color, alpha=0.18, lw=0)
        label = look.NAMES.get(name, name)
        ax.plot(band["step"], band["mean"], "o-", color=color, lw=2, ms=5, label=label)
    ax.set(xlabel="optimiser step", ylabel=f"held-out reward, {SFT_SD}")
    ax.legend(title="shaded: 95% interval", title_fontsize=8)
    return fig


@style()
def paired_differences(
    table: pd.DataFrame,
    value: str = "difference",
    low: str = "low",
    high: str = "high",
    label: str = "policy",
    title: str = "Difference to SFT",
    xlabel: str = f"paired difference to SFT, {SFT_SD}",
) -> Figure:
    """Show differences to SFT with 95% intervals, one line per row of the table."""
    fig, ax = look.panels(1, 1, 1.4 + 0.36 * len(table), title)
    for place, (name, *row) in enumerate(table[[label, value, low, high]].to_numpy()):
        look.intervals(ax, [place], [row], look.policy_color(name, place))
    ax.set_yticks(range(len(table)), [look.NAMES.get(name, name) for name in table[label]])
    ax.set(xlabel=f"{xlabel} (line: 95% interval; hollow: holds 0)", ylim=(len(table) - 0.4, -0.6))
    return fig


@style()
def bandit_curves(curves: Mapping[str, Sequence[float]], optimum: float, title: str) -> Figure:
    """Show the expected reward of a bandit's policies by step, and the best possible one."""
    fig, ax = look.panels(1, 1, 3.4, title)
    ax.axhline(optimum, color=look.DARK, ls="--", label=f"optimum, {optimum:.3g}")
    for place, (name, values) in enumerate(curves.items()):
        color, lw = look.policy_color(name, place), 3.6 - place  # curves may lie on each other
        ax.plot(range(len(values)), values, color=color, lw=lw, label=look.plain(name))
    ax.set(xlabel="step", ylabel="expected reward")
    ax.legend()
    return fig
