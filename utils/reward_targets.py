"""What the study of reward models was hoped to show, and what it shows."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from utils.study import HEADLINE_SEEDS

BETWEEN, ALL = 0.84, 0.88  # accuracy of the best arm between two samples, and on all pairs
BEHIND = -0.01  # how far the ten-class arm may be behind the scalar one in accuracy
NLL, ECE = 0.42, 0.05  # of the ten-class arm
MINUTES = 8.0  # of training, two cores
LEVELS = ("margin", "pairwise")  # the arms that are Level 1 and Level 2


def reward_targets(
    table: pd.DataFrame, against: pd.DataFrame, differences: pd.DataFrame
) -> pd.DataFrame:
    """Hold the study against its targets.

    A target is judged by its value but for the first, which is about intervals. The best arm is
    that of the arms with all seeds.

    Args:
        table: of `accuracy_table`.
        against: of `versus_rules`, the same arms.
        differences: of `difference_table`; has a row of the second of `LEVELS` against the first.

    Returns:
        A row per target as `target_words` reads it.
    """
    above = against[against["pairs"] == "all pairs"]["above"]
    rows = [
        _row("arms clearly above the best rule, all pairs", above.sum(), len(above), "at least")
    ]
    full = table[table["seeds"] == len(HEADLINE_SEEDS)]
    for column, place, bound in (
        ("model_pairs", "between samples", BETWEEN),
        ("accuracy", "on all pairs", ALL),
    ):
        if len(full):
            best = full.loc[full[column].idxmax()]
            name = f"best accuracy {place} ({best['label']})"
            rows.append(_row(name, best, bound, "at least", column, ".3f"))
    first, second = LEVELS
    pair = (differences["reference"] == first) & (differences["arm"] == second)
    name = "accuracy of ten classes less that of the scalar arm"
    rows.append(_row(name, differences[pair].iloc[0], BEHIND, "at least", "accuracy", "+.3f"))
    ten = table.set_index("arm").loc[second]
    rows.append(_row(f"-log P, {ten['label']}", ten, NLL, "below", "nll", ".3f"))
    rows.append(_row(f"calibration error, {ten['label']}", ten, ECE, "below", "ece", ".3f"))
    for arm in table[table["arm"].isin(LEVELS)].to_dict("records"):
        if not math.isnan(arm["minutes"]):
            name = f"minutes of training, {arm['label']}"
            rows.append(_row(name, arm["minutes"], MINUTES, "at most", form=".1f"))
    return pd.DataFrame(rows)


def _row(
    target: str, found: Any, bound: float, side: str, column: str | None = None, form: str = ".0f"
) -> dict[str, Any]:
    ends = ("value", "low", "high")
    if column is None:
        span = dict(zip(ends, (float(found), math.nan, math.nan), strict=True))
    else:
        span = {
            n: found[f"{column}{end}"] for n, end in zip(ends, ("", "_low", "_high"), strict=True)
        }
    value = span["value"]
    reached = {"at least": value >= bound, "at most": value <= bound, "below": value < bound}[side]
    wanted = f"{side} {format(bound, form)}"
    return {"target": target, **span, "form": form, "wanted": wanted, "reached": bool(reached)}
