"""The look of the figures, the pieces they share, and how figures and tables are saved."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import pandas as pd
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.config import Profile, runs_dir
from utils.files import atomic_write
from utils.statistics.bootstrap import side

# After Okabe and Ito: told apart by colour-blind readers.
GREY, DARK, BLUE = "#8c8c8c", "#4d4d4d", "#0072b2"
ORANGE, GREEN, PURPLE = "#e08214", "#009e73", "#cc79a7"
COLORS = {
    "sft": GREY,
    "sft_best": DARK,
    "sft_best_of_16": "#7570b3",
    "sft_greedy": PURPLE,
    "sft_16bit": GREEN,
    "align_scalar": BLUE,
    "align_ordinal": ORANGE,
}
NAMES = {
    "sft": "SFT",
    "sft_best": "SFT, best temperature",
    "sft_best_of_16": "SFT, best of 16 by scalar reward",
    "sft_greedy": "SFT, greedy",
    "sft_16bit": "SFT, 16 bits",
    "align_scalar": "aligned, scalar reward",
    "align_ordinal": "aligned, ten-class reward",
}
WIDTH = 8.0  # inches; 1040 pixels, still readable at the 800 that GitHub shows


def style() -> AbstractContextManager[None]:
    """Return a context, also usable as a decorator, in which all figures are made and saved."""
    settings = {
        "figure.dpi": 130,
        "savefig.dpi": 130,
        "figure.constrained_layout.use": True,
        "figure.facecolor": "white",
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6e6e6",
        "legend.frameon": False,
        "legend.fontsize": 9,
    }
    return mpl.rc_context(settings)


def policy_color(name: str, place: int = 0) -> str:
    """Return a policy's fixed colour, also for a name that adds a seed; others go by `place`."""
    known = [key for key in COLORS if name == key or name.startswith((f"{key}_", f"{key}@"))]
    return COLORS[max(known, key=len)] if known else (BLUE, ORANGE, GREEN, PURPLE, DARK)[place % 5]


def save_figure(fig: Figure, profile: Profile, name: str) -> Image:
    """Write `figures/<name>.png` into the profile's runs and return it, for `display`."""
    path = runs_dir(profile) / "figures" / f"{name}.png"
    with style():
        atomic_write(path, lambda p: fig.savefig(p, format="png", metadata={"Software": None}))
    return Image(data=path.read_bytes())


def save_table(frame: pd.DataFrame, profile: Profile, name: str) -> None:
    """Write `tables/<name>.csv` into the profile's runs; a plain row count is left out."""
    index = not isinstance(frame.index, pd.RangeIndex)
    path = runs_dir(profile) / "tables" / f"{name}.csv"
    atomic_write(path, lambda p: frame.to_csv(p, index=index, float_format="%.6g"))


def panels(rows: int, columns: int, height: float, title: str, **options: Any) -> list[Any]:
    """Open a figure; return it and then its axes, row by row."""
    fig = Figure(figsize=(WIDTH, height))  # not pyplot's, which would show some and keep all
    axes = fig.subplots(rows, columns, squeeze=False, **options)
    fig.suptitle(textwrap.fill(title, 78), x=0.01, ha="left", fontsize=11.5, weight="bold")
    for ax in axes.flat:
        ax.tick_params(labelsize=9, color=GREY)
    return [fig, *axes.flat]


def small_multiples(count: int, title: str, xlabel: str, ylabel: str) -> list[Any]:
    """Open a figure of `count` like panels over the ratings 1..10, three in a row."""
    columns = min(3, count)
    rows = math.ceil(count / columns)
    fig, *axes = panels(rows, columns, 1.0 + 2.1 * rows, title, sharex=True, sharey=True)
    for place, ax in enumerate(axes):
        ax.set(xticks=range(1, 11), xlim=(0.4, 10.6), visible=place < count)
        ax.tick_params(labelbottom=place + columns >= count)
        ax.grid(axis="x", visible=False)
    fig.supxlabel(xlabel, fontsize=10)
    fig.supylabel(ylabel, fontsize=10)
    return [fig, *axes[:count]]


def measured(frame: pd.DataFrame, column: str) -> tuple[pd.Series, pd.Series]:
    """Return the steps at which a column was measured, and its values there."""
    rows = frame[["step", column]].dropna()
    return rows["step"], rows[column]


def smooth(ax: Axes, frame: pd.DataFrame, column: str, color: str, label: str = "") -> None:
    """Draw a column by step, raw and as a moving average."""
    x, y = measured(frame, column)
    ax.plot(x, y, color=color, alpha=0.35, lw=1)
    ax.plot(x, moving_average(y), color=color, lw=2, label=label or None)


def moving_average(values: pd.Series) -> pd.Series:
    """Average each value with those before it, over a fifth of the run, at most ten."""
    window = min(10, max(2, len(values) // 5))
    return values.rolling(window, min_periods=1).mean()


def intervals(
    ax: Axes,
    y: Iterable[float],
    table: Iterable[Sequence[float]],
    color: str,
    label: str = "",
    marker: str = "o",
    size: float = 7,
) -> None:
    """Draw rows (value, low, high) and a line at 0; a marker is hollow where the interval holds 0.

    What was not measured stays away.
    """
    width = size / 3.5
    for place, (value, low, high) in zip(y, table, strict=True):
        ax.plot([low, high], [place, place], color=color, lw=width, solid_capstyle="butt")
        face = color if side(low, high) else "white"
        ax.plot([value], [place], marker, ms=size, color=color, markerfacecolor=face, zorder=3)
    if label:
        ax.plot([], [], f"{marker}-", color=color, ms=size, lw=width, label=label)
    ax.axvline(0, color=DARK, lw=1, ls="--")


def legend_below(fig: Figure, ax: Axes, columns: int = 3) -> None:
    """Put the legend of one panel below the figure, in rows of about the same length."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        columns = math.ceil(len(handles) / math.ceil(len(handles) / columns))
        fig.legend(handles, labels, loc="outside lower center", ncols=columns)


def plain(name: object) -> str:
    """Return a name of code as words."""
    return str(name).replace("_", " ")
