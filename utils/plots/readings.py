"""The figure of the blind ratings, and their tables as a notebook shows them."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.plots import style as look
from utils.plots.look import arm_look
from utils.plots.style import style
from utils.statistics.bootstrap import ends
from utils.statistics.policy_runs import BASE


@style()
def readings_figure(table: pd.DataFrame, title: str) -> Figure:
    """Show the mean rating of each policy, and the reader's win rate beside the judge's.

    Args:
        table: of `policy_readings`; SFT is not shown against itself.
        title: of the figure.
    """
    fig, left, right = look.panels(1, 2, 1.6 + 0.4 * len(table), title, sharey=True)
    for place, row in enumerate(table.to_dict("records")):
        color = arm_look(row["policy"], place)[1]
        _point(left, place, [row[end] for end in ends("rating")], color)
        if row["policy"] != BASE:
            judge, reader = (
                [row[end] * 100 for end in ends(name)] for name in ("judge_win_rate", "win_rate")
            )
            _point(right, place - 0.13, judge, look.GREY, "s")
            _point(right, place + 0.13, reader, color)
    left.set_yticks(range(len(table)), [arm_look(name)[0] for name in table["policy"]])
    left.set(xlabel="mean blind rating, 1 to 10", xlim=(1, None), ylim=(len(table) - 0.4, -0.6))
    right.axvline(50, color=look.DARK, lw=1, ls="--")
    right.set(xlabel="win rate against SFT, %", xlim=(40, 100))
    for marker, color, name in (("s", look.GREY, "judge"), ("o", look.DARK, "blind reader")):
        right.plot([], [], f"{marker}-", ms=7, lw=2, color=color, label=name)
    right.plot([], [], "-", lw=2, color=look.DARK, label="95% interval over prompts")
    look.legend_below(fig, right)
    return fig


def with_intervals(table: pd.DataFrame, columns: Sequence[str], form: str = ".2f") -> pd.DataFrame:
    """Return these columns of a table as `value [low, high]`."""
    rows = [[_cell(row[ends(name)], form) for name in columns] for _, row in table.iterrows()]
    return pd.DataFrame(rows, table.index, [*columns])


def _cell(span: Sequence[float], form: str) -> str:
    value, low, high = (format(end, form) for end in span)
    return f"{value} [{low}, {high}]"


def _point(ax: Axes, y: float, span: Sequence[float], color: str, marker: str = "o") -> None:
    value, low, high = span
    ax.plot([low, high], [y, y], color=color, lw=2, solid_capstyle="butt")
    ax.plot([value], [y], marker, ms=7, color=color, zorder=3)
