"""Reading and checking rated responses: a row becomes groups, or a DataError that says why not."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

from utils.config import DataConfig

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
SPLITS = ("train", "validation", "test")
EMBEDDED_PATH = Path(__file__).parent / "embedded" / "helpful_mini.jsonl"
EMBEDDED_SHA256 = "2cc6363d89e156a0d4dbe0728ddcc72c2e52621decd4bc247bf380f8503e3fa3"


class DataError(ValueError):
    """Unusable input; the message names file, row and column, what was expected, and a remedy."""


@dataclass(frozen=True)
class Response:
    """One rated response; `finished` is false if it was cut off before its end token."""

    text: str
    rating: float
    finished: bool = True
    source: str | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class Group:
    """Responses to one prompt that were rated side by side, so that their ratings compare."""

    prompt_id: str
    split: str
    category: str | None
    prompt: tuple[Message, ...]  # the turns before the response; the last is a user turn
    responses: tuple[Response, ...]
    batch: int = 1  # which group of its prompt this is


def _fail(where: str, column: str, expected: str, got: Any) -> DataError:
    found = "it is missing" if got is None else f"got {got!r:.80}"
    return DataError(f"{where}, column {column!r}: expected {expected}, {found}")


def check_embedded(path: Path) -> None:
    """Refuse an embedded set that is not byte for byte the published one."""
    remedy = f"restore it with `git checkout -- {path}`"
    if not path.is_file():
        raise DataError(f"{path}: the embedded set is missing; {remedy}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != EMBEDDED_SHA256:
        raise DataError(f"{path}: expected SHA-256 {EMBEDDED_SHA256}, got {found}; {remedy}")


def read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return (row number from 1, row); in JSON Lines the row number is the line number."""
    if not path.name.endswith((".parquet", ".jsonl", ".jsonl.gz")):
        raise DataError(f"{path}: unknown file ending, expected .parquet, .jsonl or .jsonl.gz")
    if not path.is_file():
        raise DataError(f"{path}: no such file; check data.path (relative to {Path.cwd()})")
    try:
        if path.suffix == ".parquet":
            return list(enumerate(pyarrow.parquet.ParquetFile(path).read().to_pylist(), start=1))
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: unreadable ({error}); export or download it again") from error
    lines = enumerate(text.split("\n"), start=1)
    return [(number, _json_row(path, number, line)) for number, line in lines if line.strip()]


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: expected a JSON object, got {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: expected a JSON object, got {row!r:.80}")
    return row


def parse_rows(
    path: Path, rows: list[tuple[int, dict[str, Any]]], config: DataConfig
) -> tuple[list[Group], Counter[str]]:
    """Return the groups in file order and, by reason, how many texts were left out."""
    groups: list[Group] = []
    dropped: Counter[str] = Counter()
    prompts: dict[str, tuple[Message, ...]] = {}
    splits: dict[str, str] = {}
    taken: set[tuple[str, int]] = set()
    has_split = any(row.get("split") is not None for _, row in rows)
    parse = _listwise_row if rows[0][1].get("responses") is not None else _pair_row
    for number, row in rows:
        where = f"{path}, row {number}"
        text = _text(where, "prompt", row.get("prompt"))
        messages, batches = parse(where, row, config)
        split = row.get("split") if has_split else _split_of(text, config.split_seed)
        if split not in SPLITS:
            raise _fail(where, "split", f"one of {', '.join(SPLITS)}", split)
        if splits.setdefault(text, split) != split:
            raise _fail(where, "split", f"{splits[text]!r} as for this prompt's earlier row", split)
        ids = (row.get("id"), row.get("prompt_id"), _digest(messages))
        prompt_id = str(next(i for i in ids if i is not None))
        if prompts.setdefault(prompt_id, messages) != messages:
            raise _fail(where, "id", "one id per prompt (an earlier row has it too)", prompt_id)
        category = row.get("category")
        if category is not None:
            _text(where, "category", category)
        for batch, responses in batches.items():
            kept = _without_contradictions(responses, paired=parse is _pair_row)
            dropped["identical texts"] += len(responses) - len(kept) if kept else 1
            if not kept:
                continue
            while (prompt_id, batch) in taken:
                batch += 1
            taken.add((prompt_id, batch))
            groups.append(Group(prompt_id, split, category, messages, kept, batch))
    return groups, dropped


def _without_contradictions(responses: list[Response], paired: bool) -> tuple[Response, ...]:
    """Leave out a text that came before with another rating, and pairs of one text altogether.

    Repeats with the same rating stay: two temperatures may well give the same text, and equal
    ratings never make a pair.
    """
    first: dict[str, Response] = {}
    kept = tuple(r for r in responses if first.setdefault(r.text, r).rating == r.rating)
    return () if paired and len(first) == 1 else kept


_Batches = dict[int, list[Response]]


def _pair_row(
    where: str, row: dict[str, Any], config: DataConfig
) -> tuple[tuple[Message, ...], _Batches]:
    turns = {name: _turns(where, name, row.get(name)) for name in ("chosen", "rejected")}
    *prompt, chosen = turns["chosen"]
    if list(turns["rejected"][:-1]) != prompt:
        raise _fail(where, "rejected", "the prompt turns of 'chosen'", turns["rejected"][:-1])
    if row["prompt"].strip() != prompt[-1]["content"].strip():
        raise _fail(where, "prompt", "the last user turn of 'chosen'", row["prompt"])
    ratings = [_rating(where, f"{name}_rating", row, config) for name in turns]
    if ratings[0] < ratings[1]:
        raise _fail(where, "chosen_rating", f"at least rejected_rating {ratings[1]}", ratings[0])
    texts = (chosen["content"], turns["rejected"][-1]["content"])
    return tuple(prompt), {1: [Response(t, r) for t, r in zip(texts, ratings, strict=True)]}


def _listwise_row(
    where: str, row: dict[str, Any], config: DataConfig
) -> tuple[tuple[Message, ...], _Batches]:
    entries = row.get("responses")
    if not isinstance(entries, list) or not entries:
        raise _fail(where, "responses", "a non-empty list", entries)
    batches: _Batches = {}
    for index, entry in enumerate(entries):
        column = f"responses[{index}]"
        if not isinstance(entry, dict):
            raise _fail(where, column, "an object with 'response' and 'overall'", entry)
        entry = {key: value for key, value in entry.items() if value is not None}
        text = _text(where, f"{column}.response", entry.get("response"))
        key = "rating" if "rating" in entry and "overall" not in entry else "overall"
        rating = _rating(where, key, entry, config, f"{column}.")
        finished, batch = entry.get("finished", True), entry.get("batch", 1)
        if not isinstance(finished, bool):
            raise _fail(where, f"{column}.finished", "true or false", finished)
        if not isinstance(batch, int):
            raise _fail(where, f"{column}.batch", "an integer", batch)
        temperature = entry.get("temperature")
        if temperature is not None and not _is_number(temperature):
            raise _fail(where, f"{column}.temperature", "a number", temperature)
        source = entry.get("source", entry.get("model"))
        if source is not None:
            _text(where, f"{column}.source", source)
        response = Response(text, rating, finished, source, temperature)
        batches.setdefault(batch, []).append(response)
    return ({"role": "user", "content": row["prompt"]},), batches


def _turns(where: str, column: str, value: Any) -> tuple[Message, ...]:
    roles = "system (optional), user, assistant, ... ending in assistant"
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise _fail(where, column, "a list of {role, content}", value)
    found = [turn.get("role") for turn in value]
    body = found[1:] if found[:1] == ["system"] else found
    if not body or body != ["user", "assistant"] * (len(body) // 2):
        raise _fail(where, column, f"the roles {roles}", found)
    return tuple(
        {"role": role, "content": _text(where, f"{column}[{i}].content", turn.get("content"))}
        for i, (role, turn) in enumerate(zip(found, value, strict=True))
    )


def _text(where: str, column: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _fail(where, column, "a text that is not empty", value)
    return value


def _rating(
    where: str, key: str, row: dict[str, Any], config: DataConfig, prefix: str = ""
) -> float:
    value, low, high = row.get(key), config.rating_low, config.rating_high
    if not _is_number(value) or not low <= value <= high:
        limits = f"a number from {low:g} to {high:g} (data.rating_low, data.rating_high)"
        raise _fail(where, prefix + key, limits, value)
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _digest(messages: Sequence[Message]) -> str:
    return hashlib.sha256(json.dumps(list(messages)).encode()).hexdigest()[:16]


def _split_of(prompt: str, seed: int) -> str:
    digest = hashlib.sha256(f"{seed}:{prompt}".encode(errors="surrogatepass")).digest()
    share = int.from_bytes(digest[:8]) / 2**64
    return "train" if share < 0.8 else "validation" if share < 0.9 else "test"
