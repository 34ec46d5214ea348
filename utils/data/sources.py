"""What rated responses are, and reading them from files; `utils.data.rows` checks what was read."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import pyarrow.parquet

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
    rating: float  # on the scale 1..10 of the classes, whatever the scale of the source
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


@dataclass(frozen=True)
class Pair:
    """Two responses of one group, the first rated strictly higher."""

    group: Group
    chosen: Response
    rejected: Response

    @property
    def prompt_id(self) -> str:
        """Id of the prompt that both responses answer."""
        return self.group.prompt_id

    @property
    def category(self) -> str | None:
        """Category of the prompt, if the source gives one."""
        return self.group.category

    @property
    def between_samples(self) -> bool:
        """Whether both responses are known to be samples of a model, not references."""
        return not {self.chosen.source, self.rejected.source} & {None, "reference"}


@dataclass(frozen=True)
class Prompt:
    """A prompt without responses."""

    id: str
    split: str
    category: str | None
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class PreferenceData:
    """All groups in file order, a fingerprint of their content, and what was left out."""

    groups: tuple[Group, ...]
    fingerprint: str  # 16 hex digits of the SHA-256 of ids, splits, texts and ratings
    dropped: dict[str, int]  # reason -> count
    dropped_of: dict[str, int] = field(default_factory=dict)  # reason -> how many were looked at

    def dropped_shares(self) -> list[str]:
        """Return a line per reason, e.g. "prompt over 256 tokens: 41 of 688, 6.0%"."""
        counts = [(reason, n, self.dropped_of[reason]) for reason, n in self.dropped.items()]
        return [f"{reason}: {n} of {total}, {n / total:.1%}" for reason, n, total in counts]

    def groups_of(self, split: str) -> list[Group]:
        """Return the groups of a split; raises DataError for an unknown split."""
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
        return [group for group in self.groups if group.split == split]

    def prompts(self, split: str) -> list[Prompt]:
        """Return each prompt of a split once; raises DataError for an unknown split."""
        first: dict[str, Prompt] = {}
        for g in self.groups_of(split):
            first.setdefault(g.prompt_id, Prompt(g.prompt_id, g.split, g.category, g.prompt))
        return list(first.values())

    def pairs(self, split: str) -> list[Pair]:
        """Return all pairs within groups, without ties; raises DataError for an unknown split."""
        return [
            Pair(group, chosen, rejected)
            for group in self.groups_of(split)
            for chosen, rejected in permutations(group.responses, 2)
            if chosen.rating > rejected.rating
        ]


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
        raise DataError(
            f"{path}: no such file; a relative data.path counts from the repository root"
        )
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
