"""Targets that were set before a study: held against what was measured, and told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from utils.intervals import TINY
from utils.wording import listed


def target_row(
    target: str, found: Mapping[str, float], side: str, bound: float, form: str = ".2f"
) -> dict[str, Any]:
    """Hold a measured value against its bound.

    Args:
        target: what it is.
        found: `value` and, where there is an interval, `low` and `high`.
        side: "at least", "at most", "below"; or "above", where the interval has to be.
        bound: see `side`.
        form: of the numbers, when they are told.

    Returns:
        target, value, low, high (blank where there is none), form, `wanted`, `reached`.
    """
    value, low, high = (found.get(name, math.nan) for name in ("value", "low", "high"))
    reached = {
        "at least": value >= bound,
        "at most": value <= bound,
        "below": value < bound,
        "above": low > bound + TINY,
    }[side]
    wanted = f"{side} {format(bound, form)}"
    row = {"target": target, "value": value, "low": low, "high": high, "form": form}
    return row | {"wanted": wanted, "reached": bool(reached)}


def target_words(targets: pd.DataFrame) -> str:
    """Return a Markdown list of targets, rows of `target_row`, and whether each is reached."""
    lines = []
    for row in targets.to_dict("records"):
        value, low, high = (format(row[name], row["form"]) for name in ("value", "low", "high"))
        span = "" if pd.isna(row["low"]) else f" [{low}, {high}]"
        reached = "reached" if row["reached"] else "**not reached**"
        lines.append(f"{row['target']}: {value}{span}, wanted {row['wanted']}: {reached}")
    return listed(lines)
