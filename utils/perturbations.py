"""Ways to spoil a good answer that need no model: cut, pad, repeat, exchange its facts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from random import Random

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

_MONTHS = "January February March April May June July August September October November December"
_SMALL = "two three four five six seven eight nine ten eleven twelve"
_SUFFIXES = {2: "nd", 3: "rd", 21: "st"}

# A fact is exchanged for another of its list, several of one text in the order of the list, so that
# "two or three" does not become "nine or four". There is no "one" and no 1: "5 hour" would show.
LISTS: dict[str, list[str]] = {
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "month": _MONTHS.split(),
    "small": _SMALL.split(),
    "tens": ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"],
    "ordinal": [f"{n}{_SUFFIXES.get(n, 'th')}" for n in range(2, 22)],  # floors, days, centuries
    "hour": [str(n) for n in range(1, 13)],
    "digit": list("23456789"),
    "teen": [str(n) for n in range(11, 20)],
    "first digit": list("123456789"),  # of any other number
}


def _any(kind: str) -> str:
    return "|".join(LISTS[kind])


# A name is capitalised inside a sentence: after a word or a comma and one space, or after a title.
_INSIDE = r"(?:(?<=[\w,;][ ])|(?<=M[rs]\.[ ])|(?<=Mrs\.[ ])|(?<=Dr\.[ ]))"
_CAPITAL = r"(?!(?:Mrs?|Ms|Dr)\b)[A-Z][a-zà-ÿ]+\b(?!-)"
# The first alternative that fits wins, so what must stay and what is narrower comes first.
_FACT = re.compile(
    rf"""(?P<marker>^[ \t]*\d+[.)](?=\s))
    |(?P<modal>(?<![\w,;][ ])\bMay\b)
    |(?P<day>\b(?:{_any("day")})(?=s?\b))
    |(?P<month>\b(?:{_any("month")})\b)
    |(?P<quoted>(?<=")[^\W\d_][^".,:;!?\n]{{1,28}}(?="))
    |(?P<name>{_INSIDE}{_CAPITAL}(?:[ ]{_CAPITAL})*)
    |(?P<small>\b(?i:{_any("small")})\b)
    |(?P<tens>\b(?i:{_any("tens")})\b)
    |(?P<ordinal>\b\d+(?:st|nd|rd|th)\b)
    |(?P<hour>(?<![\w.,:])\d{{1,2}}(?=:\d\d\b|[ ]?[ap]\.?m\b))
    |(?P<minute>(?<=\d:)\d\d\b)
    |(?P<year>\b(?:1[1-9]|20)\d\d(?:-\d\d\b(?!-)|s\b|\b(?![.,]\d)))
    |(?P<number>(?<![\w.,])\d+(?:[.,]\d+)*(?![A-Z\d]))""",
    re.MULTILINE | re.VERBOSE,
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


def name_pool(texts: Iterable[str]) -> list[str]:
    """Return the names that capital letters betray inside the sentences of some texts, in order.

    Days and months are none, nor are words that the texts also write small, as in headings.
    """
    texts = list(texts)
    small = {word for text in texts for word in re.findall(r"\b[a-zà-ÿ]+\b", text)}
    matches = [match for text in texts for match in _FACT.finditer(text)]
    found = [match.group() for match in matches if match.lastgroup == "name"]
    return [name for name in dict.fromkeys(found) if not small.issuperset(name.lower().split())]


def swap_facts(text: str, names: Sequence[str], rng: Random) -> str | None:
    """Exchange the numbers, dates, names and short quoted terms of a text for others.

    A number keeps its form (digits, separators, roundness), all years of a text move by the same
    decades, and what occurs twice is exchanged for the same thing twice. List numbers, minutes and
    the number one stay.

    Args:
        text: what to falsify.
        names: of which those not in the text replace its names and quoted terms.
        rng: makes the choices.

    Returns:
        The false text, or None if there is nothing to exchange.
    """
    matches = [(match, _kind(match)) for match in _FACT.finditer(text)]
    found: dict[str, list[str]] = {}
    for match, kind in matches:
        found.setdefault(kind, []).append(_key(match.group(), kind))
    tables: dict[str, dict[str, str]] = {}
    for kind, tokens in found.items():
        if kind == "year":
            tables[kind] = _moved(tokens, rng)
        elif kind in LISTS:
            tables[kind] = _others(LISTS[kind], tokens, rng)
        elif kind == "name":
            unsaid = [name for name in names if name.lower() not in text.lower()]
            tokens = list(dict.fromkeys(tokens))
            picks = rng.sample(unsaid, min(len(tokens), len(unsaid)))
            tables[kind] = dict(zip(tokens, picks, strict=False))
    for match, kind in reversed(matches):
        old = match.group()
        key = _key(old, kind)
        if key in tables.get(kind, ()):
            new = tables[kind][key]
            if kind == "first digit":
                new = old.replace(key, new, 1)
            elif key != old:
                new = new.capitalize()
            text = text[: match.start()] + new + text[match.end() :]
    return text if any(tables.values()) else None


def _kind(match: re.Match[str]) -> str:
    kind, token = str(match.lastgroup), match.group()
    if kind == "quoted":
        return "name"
    if kind != "number":
        return kind
    if len(token) == 1:
        return "digit"
    return "teen" if token in LISTS["teen"] else "first digit"


def _key(token: str, kind: str) -> str:
    """Return that part of a fact which is looked up: the first digit that is not 0, or all."""
    if kind == "first digit":
        return token.lstrip("0.,")[:1]
    return token.lower() if kind in ("small", "tens") else token


def _others(order: Sequence[str], tokens: Sequence[str], rng: Random) -> dict[str, str]:
    own = [token for token in order if token in tokens]
    rest = [place for place, token in enumerate(order) if token not in own]
    picks = sorted(rng.sample(rest, min(len(own), len(rest))))
    return {token: order[place] for token, place in zip(own, picks, strict=False)}


def _moved(years: Sequence[str], rng: Random) -> dict[str, str]:
    latest = max(int(year[:4]) for year in years)
    move = 10 * rng.choice([-5, -4, -3, -2] + ([2, 3, 4, 5] if latest < 1970 else []))
    table = {}
    for year in years:
        end = f"-{(int(year[5:]) + move) % 100:02d}" if "-" in year else year[4:]
        table[year] = f"{int(year[:4]) + move}{end}"
    return table
