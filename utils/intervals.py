"""How tables name a value and its interval: columns `<name>`, `<name>_low` and `<name>_high`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def ends(name: str) -> list[str]:
    """Return the columns of a value and its interval."""
    return [name, f"{name}_low", f"{name}_high"]


def named(name: str, found: Mapping[str, float]) -> dict[str, float]:
    """Return `value`, `low` and `high` as these columns."""
    return dict(zip(ends(name), (found["value"], found["low"], found["high"]), strict=True))


def named_interval(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return these columns of a row as `value`, `low` and `high`."""
    return dict(zip(("value", "low", "high"), (row[end] for end in ends(name)), strict=True))
