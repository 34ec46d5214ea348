"""Sentences made from numbers: a value with its interval, and what the interval allows to say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from utils.intervals import ends, side


def verdict(low: float, high: float, words: tuple[str, str, str]) -> str:
    """Choose among the words for an interval above zero, below it, and one that covers it."""
    above, below, neither = words
    return {1: above, -1: below, 0: neither}[side(low, high)]


def with_interval(row: Mapping[str, Any], name: str, form: str = "+.2f") -> str:
    """Return `value [low, high]` from the columns `name`, `name_low` and `name_high` of a row."""
    value, low, high = (format(row[end], form) for end in ends(name))
    return f"{value} [{low}, {high}]"


def listed(lines: Iterable[str], none: str = "") -> str:
    """Return a Markdown list, or `none` if there is nothing to list."""
    return "\n".join(f"- {line}" for line in lines) or none
