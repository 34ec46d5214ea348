"""Sentences made from numbers: a value with its interval, and what the interval allows to say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

COMPARED = ("better", "worse", "inconclusive")


def verdict(low: float, high: float, words: tuple[str, str, str]) -> str:
    """Choose among the words for an interval above zero, below it, and one that covers it."""
    return words[0] if low > 0 else words[1] if high < 0 else words[2]


def with_interval(row: Mapping[str, Any], name: str, form: str = "+.2f") -> str:
    """Return `value [low, high]` from the columns `name`, `name_low` and `name_high` of a row."""
    value, low, high = (format(row[f"{name}{end}"], form) for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def listed(lines: Iterable[str], none: str = "") -> str:
    """Return a Markdown list, or `none` if there is nothing to list."""
    return "\n".join(f"- {line}" for line in lines) or none


def target_words(targets: pd.DataFrame) -> str:
    """Say of each target whether it is reached.

    Args:
        targets: `target`, `value`, `low`, `high` (blank where there is none), `form` (of the
            numbers), `wanted` and `reached`.

    Returns:
        A Markdown list.
    """
    lines = []
    for row in targets.to_dict("records"):
        value, low, high = (format(row[name], row["form"]) for name in ("value", "low", "high"))
        span = "" if pd.isna(row["low"]) else f" [{low}, {high}]"
        reached = "reached" if row["reached"] else "**not reached**"
        lines.append(f"- {row['target']}: {value}{span}, wanted {row['wanted']}: {reached}")
    return "\n".join(lines)
