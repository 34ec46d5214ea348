"""Checking rows: a row becomes groups of rated responses, or a DataError that says why not."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from utils.config import DataConfig
from utils.data.sources import SPLITS, DataError, Group, Message, Response

# HelpSteer2 keeps the earlier turns of a dialogue in the text of its prompt:
# "question\n<extra_id_1>Assistant\nanswer\n<extra_id_1>User\nnext question"
TURN_MARKER = re.compile(r"<extra_id_1>([A-Za-z]+)")
MALFORMED = "malformed turns"  # in a set from the hub, which the reader cannot mend
MALFORMED_SHARE = 0.01  # above this, the set is not what it was


class TurnError(DataError):
    """Turn markers that make no dialogue."""


def row_error(where: str, column: str, expected: str, got: Any) -> DataError:
    """Return the error for a column that is not as expected; `where` names source and row."""
    found = "it is missing" if got is None else f"got {got!r:.80}"
    return DataError(f"{where}, column {column!r}: expected {expected}, {found}")


def parse_rows(
    source: str, rows: list[tuple[int, dict[str, Any]]], config: DataConfig
) -> tuple[list[Group], Counter[str], Counter[str]]:
    """Return the groups in file order and, by reason, how many were left out, and of how many.

    Every rating x is mapped to 1 + 9 (x - rating_low) / (rating_high - rating_low), the scale of
    the classes; whatever counts rating points later, such as `reward.margin_scale`, counts these.

    Args:
        source: the path or name that errors give.
        rows: row numbers and rows.
        config: the ends of the rating scale and the seed of the split.

    Raises:
        DataError: for the first row that breaks the contract; it shows ratings as they were read.
    """
    groups: list[Group] = []
    dropped, dropped_of = Counter(), Counter({MALFORMED: len(rows)})
    prompts: dict[str, tuple[Message, ...]] = {}
    splits: dict[str, str] = {}
    taken: set[tuple[str, int]] = set()
    has_split = any(row.get("split") is not None for _, row in rows)
    parse = _listwise_row if rows[0][1].get("responses") is not None else _pair_row
    for number, row in rows:
        where = f"{source}, row {number}"
        text = _text(where, "prompt", row.get("prompt"))
        try:
            messages, batches = parse(where, row, config)
        except TurnError:
            dropped[MALFORMED] += 1
            if config.source != "hub" or dropped[MALFORMED] > MALFORMED_SHARE * len(rows):
                raise
            continue
        split = row.get("split") if has_split else _split_of(text, config.split_seed)
        if split not in SPLITS:
            raise row_error(where, "split", f"one of {', '.join(SPLITS)}", split)
        if (before := splits.setdefault(text, split)) != split:
            raise row_error(where, "split", f"{before!r} as for this prompt's earlier row", split)
        ids = (row.get("id"), row.get("prompt_id"), _digest(messages))
        prompt_id = str(next(i for i in ids if i is not None))
        if prompts.setdefault(prompt_id, messages) != messages:
            raise row_error(where, "id", "one id per prompt (an earlier row has it too)", prompt_id)
        category = row.get("category")
        if category is not None:
            _text(where, "category", category)
        for batch, responses in batches.items():
            paired = parse is _pair_row
            kept = without_contradictions(responses, [r.text for r in responses], paired)
            dropped["identical texts"] += len(responses) - len(kept) if kept else 1
            dropped_of["identical texts"] += 1 if paired else len(responses)
            if not kept:
                continue
            while (prompt_id, batch) in taken:
                batch += 1
            taken.add((prompt_id, batch))
            groups.append(Group(prompt_id, split, category, messages, kept, batch))
    return groups, dropped, dropped_of


def without_contradictions(
    responses: Sequence[Response], contents: Iterable[Hashable], paired: bool
) -> tuple[Response, ...]:
    """Leave out content that came before with another rating, and pairs of one content altogether.

    Repeats with the same rating stay: two temperatures may well give the same text, and equal
    ratings never make a pair.
    """
    first: dict[Hashable, Response] = {}
    kept = tuple(
        response
        for response, content in zip(responses, contents, strict=True)
        if first.setdefault(content, response).rating == response.rating
    )
    return () if paired and len(first) == 1 else kept


_Batches = dict[int, list[Response]]


def _pair_row(
    where: str, row: dict[str, Any], config: DataConfig
) -> tuple[tuple[Message, ...], _Batches]:
    turns = {name: _turns(where, name, row.get(name)) for name in ("chosen", "rejected")}
    *prompt, chosen = turns["chosen"]
    if list(turns["rejected"][:-1]) != prompt:
        raise row_error(where, "rejected", "the prompt turns of 'chosen'", turns["rejected"][:-1])
    # The column may hold the last user turn alone or, marked up, all of them.
    asked = _marked_turns(where, "prompt", row["prompt"])
    if [_bare(turn) for turn in asked] != [_bare(turn) for turn in prompt[-len(asked) :]]:
        raise row_error(where, "prompt", "the last user turn of 'chosen'", row["prompt"])
    ratings = [_rating(where, f"{name}_rating", row, config) for name in turns]
    if ratings[0] < ratings[1]:
        raise row_error(
            where, "chosen_rating", f"at least rejected_rating {ratings[1]}", ratings[0]
        )
    texts = (chosen["content"], turns["rejected"][-1]["content"])
    scaled = [_scaled(rating, config) for rating in ratings]
    return tuple(prompt), {1: [Response(t, r) for t, r in zip(texts, scaled, strict=True)]}


def _listwise_row(
    where: str, row: dict[str, Any], config: DataConfig
) -> tuple[tuple[Message, ...], _Batches]:
    entries = row.get("responses")
    if not isinstance(entries, list) or not entries:
        raise row_error(where, "responses", "a non-empty list", entries)
    batches: _Batches = {}
    for index, entry in enumerate(entries):
        column = f"responses[{index}]"
        if not isinstance(entry, dict):
            raise row_error(where, column, "an object with 'response' and 'overall'", entry)
        entry = {key: value for key, value in entry.items() if value is not None}
        text = _text(where, f"{column}.response", entry.get("response"))
        key = "rating" if "rating" in entry and "overall" not in entry else "overall"
        rating = _scaled(_rating(where, key, entry, config, f"{column}."), config)
        finished, batch = entry.get("finished", True), entry.get("batch", 1)
        if not isinstance(finished, bool):
            raise row_error(where, f"{column}.finished", "true or false", finished)
        if not isinstance(batch, int):
            raise row_error(where, f"{column}.batch", "an integer", batch)
        temperature = entry.get("temperature")
        if temperature is not None and not _is_number(temperature):
            raise row_error(where, f"{column}.temperature", "a number", temperature)
        source = entry.get("source", entry.get("model"))
        if source is not None:
            _text(where, f"{column}.source", source)
        response = Response(text, rating, finished, source, temperature)
        batches.setdefault(batch, []).append(response)
    return _marked_turns(where, "prompt", row["prompt"]), batches


def _turns(where: str, column: str, value: Any) -> tuple[Message, ...]:
    roles = "system (optional), user, assistant, ... ending in assistant"
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise row_error(where, column, "a list of {role, content}", value)
    found = [turn.get("role") for turn in value]
    body = found[1:] if found[:1] == ["system"] else found
    if not body or body != ["user", "assistant"] * (len(body) // 2):
        raise row_error(where, column, f"the roles {roles}", found)
    turns: list[Message] = []
    for i, (role, turn) in enumerate(zip(found, value, strict=True)):
        text = _text(where, f"{column}[{i}].content", turn.get("content"))
        if role == "user":
            turns += _marked_turns(where, f"{column}[{i}].content", text)
        else:
            turns.append({"role": role, "content": text})
    return tuple(turns)


def _marked_turns(where: str, column: str, text: str) -> tuple[Message, ...]:
    """Return the turns of a user's text: one or, where markers divide it, as many as they say."""
    first, *rest = TURN_MARKER.split(text)
    if not rest:
        return ({"role": "user", "content": text},)
    roles = ["user", *(role.lower() for role in rest[::2])]
    contents = [content.strip("\n") for content in (first, *rest[1::2])]
    alternate = [*roles, "assistant"] == ["user", "assistant"] * ((len(roles) + 1) // 2)
    if not alternate or not all(content.strip() for content in contents):
        expected = (
            "turns that are not empty, marked <extra_id_1>Assistant and <extra_id_1>User in turn, "
            "User last"
        )
        raise TurnError(row_error(where, column, expected, text if alternate else roles))
    return tuple({"role": r, "content": c} for r, c in zip(roles, contents, strict=True))


def _bare(turn: Message) -> Message:
    return {**turn, "content": turn["content"].strip()}


def _text(where: str, column: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise row_error(where, column, "a text that is not empty", value)
    return value


def _rating(
    where: str, key: str, row: dict[str, Any], config: DataConfig, prefix: str = ""
) -> float:
    value, low, high = row.get(key), config.rating_low, config.rating_high
    if not _is_number(value) or not low <= value <= high:
        limits = f"a number from {low:g} to {high:g} (data.rating_low, data.rating_high)"
        raise row_error(where, prefix + key, limits, value)
    return float(value)


def _scaled(rating: float, config: DataConfig) -> float:
    low, high = config.rating_low, config.rating_high
    # Already on the scale of the classes: no rounding may touch it.
    return rating if (low, high) == (1, 10) else 1 + 9 * (rating - low) / (high - low)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _digest(messages: Sequence[Message]) -> str:
    return hashlib.sha256(json.dumps(list(messages)).encode()).hexdigest()[:16]


def _split_of(prompt: str, seed: int) -> str:
    digest = hashlib.sha256(f"{seed}:{prompt}".encode(errors="surrogatepass")).digest()
    share = int.from_bytes(digest[:8]) / 2**64
    return "train" if share < 0.8 else "validation" if share < 0.9 else "test"
