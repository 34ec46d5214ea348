"""Rated responses: loading, the pairs that follow from them, tables and simple rules."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

import pandas as pd

from utils.config import DataConfig
from utils.sources import (
    EMBEDDED_PATH,
    SPLITS,
    DataError,
    Group,
    Message,
    Response,
    check_embedded,
    parse_rows,
    read_rows,
)


@dataclass(frozen=True)
class Pair:
    """Two responses of one group, the first rated strictly higher."""

    group: Group
    chosen: Response
    rejected: Response

    @property
    def rating_gap(self) -> float:
        """Rating of the chosen response less that of the rejected one, in rating points."""
        return self.chosen.rating - self.rejected.rating

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


def load_data(config: DataConfig) -> PreferenceData:
    """Read the source that `config` names, check every row, split it and apply the limits.

    Raises:
        DataError: if the source is missing, damaged or breaks the contract.
    """
    path = EMBEDDED_PATH if config.source == "embedded" else Path(str(config.path))
    if config.source == "embedded":
        check_embedded(path)
    rows = read_rows(path)
    if not rows:
        raise DataError(f"{path}: no rows, expected at least one")
    groups, dropped = parse_rows(path, rows, config)
    kept = {i for split in SPLITS for i in _first_prompts(groups, split, config)}
    return _bundle((group for group in groups if group.prompt_id in kept), dropped)


def pairs_frame(pairs: Iterable[Pair]) -> pd.DataFrame:
    """Return one row per pair, in the HelpSteer2_binarized schema plus split, category and id."""
    columns = "prompt chosen rejected chosen_rating rejected_rating split category prompt_id"
    rows = []
    for p in pairs:
        turns = [[*p.group.prompt, _answer(r.text)] for r in (p.chosen, p.rejected)]
        ratings = (float(p.chosen.rating), float(p.rejected.rating))
        key = (p.group.split, p.category, p.prompt_id)
        rows.append((p.group.prompt[-1]["content"], *turns, *ratings, *key))
    return pd.DataFrame(rows, columns=columns.split())


def responses_frame(data: PreferenceData) -> pd.DataFrame:
    """Return one row per response; `n_words` counts words between white space."""
    columns = "prompt_id split category batch prompt response rating finished source temperature"
    rows = [
        (
            *(g.prompt_id, g.split, g.category, g.batch, g.prompt[-1]["content"]),
            *(r.text, r.rating, r.finished, r.source, r.temperature, _words(r)),
        )
        for g in data.groups
        for r in g.responses
    ]
    return pd.DataFrame(rows, columns=[*columns.split(), "n_words"])


def drop_long(
    data: PreferenceData,
    count_tokens: Callable[[Sequence[Message], Response | None], int],
    max_prompt_length: int,
    max_length: int,
) -> PreferenceData:
    """Drop what is too long, and then every group with fewer than two responses.

    Args:
        data: what to filter; it is not changed.
        count_tokens: tokens of a prompt and a response together, or, given None, of the prompt
            with its generation header.
        max_prompt_length: in tokens; longer prompts are dropped with all their responses.
        max_length: in tokens of prompt and response.

    Returns:
        The rest, its fingerprint, and in `dropped` how many prompts, responses and groups went.
    """
    dropped, long_prompts, kept = Counter(data.dropped), set(), []
    lengths: dict[str, int] = {}
    for group in data.groups:
        if group.prompt_id not in lengths:
            lengths[group.prompt_id] = count_tokens(group.prompt, None)
        if lengths[group.prompt_id] > max_prompt_length:
            long_prompts.add(group.prompt_id)
            continue
        short = [r for r in group.responses if count_tokens(group.prompt, r) <= max_length]
        dropped[f"response over {max_length} tokens"] += len(group.responses) - len(short)
        if len(short) < 2:
            dropped["group of fewer than two responses"] += 1
        else:
            kept.append(replace(group, responses=tuple(short)))
    dropped[f"prompt over {max_prompt_length} tokens"] += len(long_prompts)
    return _bundle(kept, dropped)


def rule_accuracy(pairs: Iterable[Pair], rule: str) -> tuple[float, int]:
    """Return how often a rule that reads no text picks the chosen response, and of how many pairs.

    Args:
        pairs: pairs to judge.
        rule: "longer" (more characters), "cooler" (lower temperature; pairs without are skipped) or
            "finished". A tie counts half.

    Returns:
        A share in 0..1 (NaN if no pair could be judged) and the number of pairs judged.

    Raises:
        DataError: if the rule is unknown.
    """
    scores: dict[str, Callable[[Response], float | None]] = {
        "longer": lambda r: len(r.text),
        "cooler": lambda r: None if r.temperature is None else -r.temperature,
        "finished": lambda r: float(r.finished),
    }
    if rule not in scores:
        raise DataError(f"unknown rule {rule!r}, expected one of {', '.join(scores)}")
    judged = [(scores[rule](pair.chosen), scores[rule](pair.rejected)) for pair in pairs]
    both = [(a, b) for a, b in judged if a is not None and b is not None]
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in both)
    return (wins / len(both) if both else math.nan), len(both)


def _words(response: Response) -> int:
    return len(response.text.split())


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _bundle(groups: Iterable[Group], dropped: dict[str, int]) -> PreferenceData:
    groups, digest = tuple(groups), hashlib.sha256()
    for g in groups:
        content = [g.prompt_id, g.split, g.batch, [[m["role"], m["content"]] for m in g.prompt]]
        content += [[r.text, float(r.rating)] for r in g.responses]
        digest.update(json.dumps(content).encode() + b"\n")
    counts = {reason: count for reason, count in dropped.items() if count}
    return PreferenceData(groups, digest.hexdigest()[:16], counts)


def _first_prompts(groups: Sequence[Group], split: str, config: DataConfig) -> list[str]:
    """Return the first n prompt ids of a split, taking one of each category in turn."""
    categories = {g.prompt_id: g.category for g in groups if g.split == split}
    limit = getattr(config, f"{split}_prompts")
    if limit is not None and limit < 0:
        raise DataError(f"data.{split}_prompts = {limit}, expected None or at least 0")
    rounds: Counter[str | None] = Counter()
    turn: dict[str, int] = {}
    for prompt_id, category in categories.items():
        turn[prompt_id] = rounds[category]
        rounds[category] += 1
    first = {category: place for place, category in enumerate(rounds)}
    order = sorted(categories, key=lambda i: (turn[i], first[categories[i]]))
    return order[:limit]
