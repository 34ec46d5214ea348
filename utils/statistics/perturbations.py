"""Ways to spoil a good answer that need no model: cut it, pad it, repeat its end."""

from __future__ import annotations

import re

OPENINGS = (
    "Certainly! I'd be happy to help you with that.",
    "Of course! That's a great question.",
    "Sure thing! Here is a helpful answer for you.",
    "Absolutely! Thank you for asking.",
)
CLOSINGS = (
    "I hope this helps! Let me know if you have any other questions.",
    "Feel free to ask if you need anything else. I'm always happy to help!",
    "Please let me know if you would like more details. Have a wonderful day!",
    "If you have any further questions, don't hesitate to ask!",
)


def first_half(text: str) -> str | None:
    """Return the first half of a text's words (the smaller one), or None if there is only one."""
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    return text[: ends[len(ends) // 2 - 1]] if len(ends) > 1 else None


def repeat_end(text: str) -> str:
    """Return a text with its last sentence, or last line, that has words said three times more."""
    text = text.rstrip()
    parts = re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"')])\s+|\n+", text)
    last = next((part for part in reversed(parts) if re.search(r"\w", part)), text)
    gap = "\n" if text[: text.rindex(last)].endswith("\n") else " "
    return text + 3 * (gap + last)
