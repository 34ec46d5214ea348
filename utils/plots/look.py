"""How the figures of the study of policies name and colour an arm, and the pieces they share."""

from __future__ import annotations

import re
from collections.abc import Iterable

from utils.arms.policies import ARMS, AVERAGE
from utils.plots import style as look

ARM_COLORS = {
    "scalar": look.BLUE,
    "ordinal": look.ORANGE,
    "ordinal_cautious": look.GREEN,
    "scalar_ema": "#56b4e9",
    "scalar_none": "#000000",
}
# Arm, its seed, how it is decoded; or the average of the seeds.
_POLICY = re.compile(rf"(.+?)(?:_s(\d+))?(_greedy|_{AVERAGE})?")
_VARIANTS = {None: "", "_greedy": ", greedy", f"_{AVERAGE}": ", average of the seeds"}
UNIT = "SFT sd"  # where "SFT standard deviations" is too long


def arm_look(name: str, place: int = 0) -> tuple[str, str]:
    """Return the label and colour of an arm, of one of its policies, or of a control.

    A name that is not of the study labels itself and takes its colour by `place`.
    """
    arm, seed, variant = _POLICY.fullmatch(name).groups()
    if arm not in ARMS:
        return look.NAMES.get(name, look.plain(name)), look.policy_color(name, place)
    label = ARMS[arm].label + (f", seed {seed}" if seed else "") + _VARIANTS[variant]
    return label, ARM_COLORS.get(arm, look.policy_color("", place))


def label(name: str) -> str:
    """Return how tables name an arm, one of its policies, or a control."""
    return arm_look(name)[0]


def in_order(names: Iterable[str]) -> list[str]:
    """Return names of policies in the order of the study's arms, others last and as they come."""
    arms = {name: _POLICY.fullmatch(name)[1] for name in names}
    return sorted(arms, key=lambda name: [*ARMS, arms[name]].index(arms[name]))
