"""How the figures of the study of policies name and colour an arm, and the pieces they share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils import plot_style as look
from utils.policy_arms import ARMS

ARM_COLORS = {
    "scalar": look.BLUE,
    "ordinal": look.ORANGE,
    "ordinal_cautious": look.GREEN,
    "ordinal_beats_sft": look.PURPLE,
    "scalar_ema": "#56b4e9",
    "scalar_none": "#000000",
}
_POLICY = re.compile(r"(.+?)(?:_s(\d+))?(_greedy)?")  # arm, its seed, how it is decoded
UNIT = "SFT sd"  # where "SFT standard deviations" is too long


def arm_look(name: str, place: int = 0) -> tuple[str, str]:
    """Return the label and colour of an arm, of one of its policies, or of a control.

    A name that is not of the study labels itself and takes its colour by `place`.
    """
    arm, seed, greedy = _POLICY.fullmatch(name).groups()
    if arm not in ARMS:
        return look.NAMES.get(name, plain(name)), look.policy_color(name, place)
    label = ARMS[arm].label + (f", seed {seed}" if seed else "") + (", greedy" if greedy else "")
    return label, ARM_COLORS.get(arm, look.policy_color("", place))


def in_order(names: Iterable[str]) -> list[str]:
    """Return names of policies in the order of the study's arms, others last and as they come."""
    arms = {name: _POLICY.fullmatch(name)[1] for name in names}
    return sorted(arms, key=lambda name: [*ARMS, arms[name]].index(arms[name]))


def plain(name: object) -> str:
    """Return a name of code as words."""
    return str(name).replace("_", " ")


def ends(name: str) -> list[str]:
    """Return the columns of a value and its interval."""
    return [name, f"{name}_low", f"{name}_high"]


def gains(
    ax: Axes,
    y: Sequence[float],
    rows: Iterable[Sequence[float]],
    color: str,
    marker: str = "o",
    size: float = 7,
) -> None:
    """Draw rows of value, low and high along x; hollow where the interval holds 0.

    What was not measured stays away. The line at 0 is left to the figure.
    """
    for place, (value, low, high) in zip(y, rows, strict=True):
        ax.plot([low, high], [place, place], color=color, lw=size / 3.5, solid_capstyle="butt")
        face = "white" if low <= 0 <= high else color
        ax.plot([value], [place], marker, ms=size, color=color, markerfacecolor=face, zorder=3)


def legend_below(fig: Figure, ax: Axes, columns: int = 3) -> None:
    """Put the legend of one panel below the figure, in rows of about the same length."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        columns = math.ceil(len(handles) / math.ceil(len(handles) / columns))
        fig.legend(handles, labels, loc="outside lower center", ncols=columns)
