"""Figures of the study of policies; the look and the rules are those of `utils.plots.report`.

All gains are paired differences to the SFT model on the test prompts, with 95% intervals; a marker
is hollow where its interval holds 0. A policy without rows is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.plots import style as look
from utils.plots.look import UNIT, arm_look, in_order
from utils.plots.report import SFT_SD
from utils.plots.style import style
from utils.statistics.bootstrap import ends
from utils.statistics.policy_runs import BASE, Frames, seeds_of

# What is used of this module; some of it lives in utils.plots.training.
GAIN = f"gain over SFT, {SFT_SD}\n(line: 95% interval; hollow: holds 0)"
METHODS = {  # of `length_table`: what the gain is called, and its marker
    "raw": ("raw gain", "o"),
    "length": ("matched in length", "s"),
    "length and finish": ("matched in length and finish", "D"),
    "regression": ("regression, at unchanged length and finish", "^"),
}
OUTCOMES = {"win": look.BLUE, "tie": "#d9d9d9", "loss": look.ORANGE}
RIVALS = {"": "against SFT", "_best": "against SFT at its best temperature"}


@style()
def policy_bars(table: pd.DataFrame, reward: str, title: str) -> Figure:
    """Show the gains of all policies over SFT by one reward model, aligned ones first.

    Args:
        table: of `policy_table`.
        reward: "scalar", "ordinal" or "judge".
        title: of the figure.
    """
    rows = [*_grouped(table)]
    fig, ax = look.panels(1, 1, 1.2 + 0.28 * len(rows), title)
    ax.axvline(0, color=look.DARK, lw=1, ls="--")
    for place, row in enumerate(rows):
        if not isinstance(row, str):
            color = arm_look(row["policy"], place)[1]
            look.intervals(ax, [place], [row[ends(f"gain_{reward}")]], color)
    _name_rows(ax, rows)
    ax.set_xlabel(GAIN)
    return fig


@style()
def win_bars(table: pd.DataFrame, title: str) -> Figure:
    """Show how often each policy's completions win, tie and lose under the judge; half is a line.

    Args:
        table: of `policy_table`; a rival is not shown against itself.
        title: of the figure.
    """
    rows = [*_grouped(table)]
    fig, *axes = look.panels(1, 2, 1.5 + 0.28 * len(rows), title, sharex=True, sharey=True)
    for ax, (ending, name) in zip(axes, RIVALS.items(), strict=True):
        shown = [(place, row) for place, row in enumerate(rows) if not isinstance(row, str)]
        shown = [(place, row) for place, row in shown if row["policy"] != f"{BASE}{ending}"]
        y, left = [place for place, _ in shown], np.zeros(len(shown))
        for outcome, color in OUTCOMES.items():
            share = np.array([row[f"{outcome}{ending}"] for _, row in shown], float) * 100
            ax.barh(y, share, 0.7, left, color=color, label=outcome)
            left += share
        rates = [row[ends(f"win_rate{ending}")] * 100 for _, row in shown]
        for place, (rate, low, high) in zip(y, rates, strict=True):
            ax.plot([low, high], [place, place], color="black", lw=1.5)
            ax.plot(rate, place, "o", ms=4, color="black")
        ax.axvline(50, color="black", lw=1, ls="--")
        ax.set_title(name, fontsize=9)
        ax.set(xlabel="completions, %", xlim=(0, 100))
        ax.grid(axis="y", visible=False)
    _name_rows(axes[0], rows)
    text = "win rate, a tie is half a win (line: 95% interval)"
    axes[0].plot([], [], "o-", ms=4, lw=1.5, color="black", label=text)
    look.legend_below(fig, axes[0], 4)
    return fig


@style()
def length_figure(
    table: pd.DataFrame,
    regression: pd.DataFrame,
    frames: Frames,
    title: str,
    policies: Sequence[str] = ("scalar", "ordinal"),
) -> Figure:
    """Show the judge's gain as it is and at equal length, and how it goes with length.

    Args:
        table: of `length_table`; the arms' rows are shown.
        regression: of `regression_table`.
        frames: of `policy_frames`.
        title: of the figure.
        policies: the arms with a panel of their own: each completion's gain by its change in
            length, and the line of `regression`, which is the gain of those that end as SFT's do.
    """
    table = table[(table["reward"] == "judge") & ~table["policy"].isin(frames)]  # arms have seeds
    names = in_order(table["policy"])
    shown = [policy for policy in policies if policy in names] or names[:1]
    heights = [0.5 + 0.45 * len(names), 2.6]
    fig, *axes = look.panels(2, len(shown), sum(heights) + 1.4, title, height_ratios=heights)
    top, below = axes[0], axes[len(shown) :]
    for ax in axes[1 : len(shown)]:
        ax.remove()
    top.set_subplotspec(top.get_gridspec()[0, :])
    _methods(top, table, names)
    for ax, policy in zip(below, shown, strict=True):
        line = regression[(regression["policy"] == policy) & (regression["reward"] == "judge")]
        if ax is not below[0]:
            ax.sharex(below[0])
            ax.sharey(below[0])
            ax.tick_params(labelleft=False)
        _scatter(ax, frames, policy, line.iloc[0])
    below[0].set_ylabel(f"gain of a completion, {UNIT}")
    for face, name in ((look.GREY, "ends as SFT's does"), ("white", "does not")):
        top.plot([], [], "o", ms=4, color=look.GREY, mfc=face, label=f"completion that {name}")
    look.legend_below(fig, top)
    return fig


@style()
def category_figure(table: pd.DataFrame, title: str) -> Figure:
    """Show the gains of a few policies by category.

    Args:
        table: columns `policy`, `category`, `value`, `low`, `high` and `n` (prompts), such as one
            reward's rows of `policy_category_table`.
        title: of the figure.
    """
    order = table.groupby("category")["value"].mean().sort_values().index
    shown = in_order(table["policy"])
    fig, ax = look.panels(1, 1, 1.5 + (0.2 + 0.1 * len(shown)) * len(order), title)
    ax.axvline(0, color=look.DARK, lw=1, ls="--")
    for place, policy in enumerate(shown):
        part = table[table["policy"] == policy]
        y = order.get_indexer(part["category"]) + 0.25 * ((len(shown) - 1) / 2 - place)
        label, color = arm_look(policy, place)
        look.intervals(ax, y, part[["value", "low", "high"]].to_numpy(), color)
        ax.plot([], [], "o-", color=color, ms=7, lw=2, label=label)
    prompts = table.groupby("category")["n"].max()
    ax.set_yticks(range(len(order)), [f"{look.plain(name)}, n = {prompts[name]}" for name in order])
    ax.set_xlabel(GAIN)
    look.legend_below(fig, ax)
    return fig


@style()
def seeds_figure(seeds: pd.DataFrame, table: pd.DataFrame, title: str) -> Figure:
    """Show each seed's gain under the judge below the gain of its arm.

    Args:
        seeds: of `seed_table`; intervals are over prompts alone.
        table: of `policy_table`; intervals are over prompts and seeds.
        title: of the figure.
    """
    arms = table[table["policy"].isin(seeds["policy"])].set_index("policy", drop=False)
    arms = arms.loc[in_order(arms.index)]
    fig, ax = look.panels(1, 1, 1.6 + 0.55 * len(arms), title)
    ax.axvline(0, color=look.DARK, lw=1, ls="--")
    for place, (policy, *gain) in enumerate(arms[["policy", *ends("gain_judge")]].to_numpy()):
        color = arm_look(policy, place)[1]
        look.intervals(ax, [place - 0.2], [gain], color, size=9)
        own = seeds[seeds["policy"] == policy]
        y = place + 0.05 + 0.14 * np.arange(len(own))
        look.intervals(ax, y, own[ends("gain_judge")].to_numpy(), color, marker="s", size=4)
    _name_rows(ax, arms.to_dict("records"))
    for marker, size, name in (("o", 9, "all seeds"), ("s", 4, "one seed")):
        ax.plot([], [], marker, ms=size, color=look.DARK, label=name)
    ax.set_xlabel(GAIN)
    look.legend_below(fig, ax)
    return fig


def _grouped(table: pd.DataFrame) -> Iterator[pd.Series | str]:
    """Yield the policies but the SFT model, each group after its heading."""
    table = table.set_index("policy", drop=False).loc[in_order(table["policy"])]
    control = table["policy"].str.startswith(BASE)
    groups = {
        "aligned": table["group"] == "arm",
        "aligned, average of the seeds": table["group"] == "average",
        "aligned, one seed, greedy": (table["group"] == "control") & ~control,
        "SFT controls": control & (table["policy"] != BASE),
    }
    for heading, chosen in groups.items():
        if chosen.any():
            yield heading
            yield from (row for _, row in table[chosen].iterrows())


def _name_rows(ax: Axes, rows: Sequence) -> None:
    names = [row if isinstance(row, str) else arm_look(row["policy"])[0] for row in rows]
    ax.set_yticks(range(len(rows)), names)
    for tick, row in zip(ax.get_yticklabels(), rows, strict=True):
        tick.set_weight("bold" if isinstance(row, str) else "normal")
    ax.set_ylim(len(rows) - 0.4, -0.6)


def _methods(ax: Axes, table: pd.DataFrame, names: Sequence[str]) -> None:
    ax.axvline(0, color=look.DARK, lw=1, ls="--")
    for place, (method, (label, marker)) in enumerate(METHODS.items()):
        for row in table[table["method"] == method].to_dict("records"):
            y = names.index(row["policy"]) + 0.18 * (place - 1.5)
            rows = [[row["value"], row["low"], row["high"]]]
            look.intervals(ax, [y], rows, arm_look(row["policy"])[1], marker=marker, size=6)
        ax.plot([], [], marker, ms=6, color=look.DARK, label=label)
    _name_rows(ax, [{"policy": name} for name in names])
    ax.set_xlabel(GAIN)


def _scatter(ax: Axes, frames: Frames, policy: str, line: pd.Series) -> None:
    label, color = arm_look(policy)
    columns = ["length", "finished", "reward_judge"]
    base = frames[BASE][columns].astype(float)
    seeds = seeds_of(frames, policy).values()
    change = pd.concat([frame[columns].astype(float) - base for frame in seeds])
    for same, face in ((False, "none"), (True, color)):
        part = change[(change["finished"] == 0) == same]
        ax.scatter(
            part["length"], part["reward_judge"], 9, face, alpha=0.4, edgecolors=color, lw=0.6
        )
    x = np.array([change["length"].min(), change["length"].max()])
    ax.plot(x, line["unchanged"] + line["per_10_tokens"] * x / 10, color="black", lw=1.5)
    ax.plot([0], [line["unchanged"]], "^", ms=7, color="black")
    ax.axhline(0, color=look.DARK, lw=1, ls="--")
    ax.set_title(label, fontsize=9)
    ax.set_xlabel("change in length, tokens")
