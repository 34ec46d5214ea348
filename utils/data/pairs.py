"""Rated responses: loading, the pairs that follow from them, and tables."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest

import pandas as pd

from utils.config import DataConfig
from utils.data.hub import hub_rows
from utils.data.rows import parse_rows, without_contradictions
from utils.data.sources import (
    EMBEDDED_PATH,
    SPLITS,
    DataError,
    Group,
    Message,
    Pair,
    PreferenceData,
    Prompt,
    Response,
    check_embedded,
    read_rows,
)
from utils.files import ROOT

# What is used of this module; some of it lives in utils.data.sources.
__all__ = ["SPLITS", "DataError", "Group", "Pair", "PreferenceData", "Prompt", "Response"]
__all__ += ["drop_long", "load_data", "pairs_frame", "require_splits", "responses_frame"]
Key = tuple[str, int, int]  # prompt, batch, place among the responses rated side by side


def load_data(config: DataConfig) -> PreferenceData:
    """Read the source that `config` names, check every row, split it and apply the limits.

    Raises:
        DataError: if the source is missing, damaged or breaks the contract.
    """
    ties = pairs = 0
    if config.source == "hub":
        where, rows, ties, pairs = hub_rows(config)
    else:
        path = EMBEDDED_PATH if config.source == "embedded" else ROOT / str(config.path)
        if config.source == "embedded":
            check_embedded(path)
        where, rows = str(path), read_rows(path)
    if not rows:
        raise DataError(f"{where}: no rows, expected at least one")
    groups, dropped, dropped_of = parse_rows(where, rows, config)
    dropped["pair of equal ratings"], dropped_of["pair of equal ratings"] = ties, pairs
    kept = {i for split in SPLITS for i in _first_prompts(groups, split, config)}
    return _bundle((group for group in groups if group.prompt_id in kept), dropped, dropped_of)


def pairs_frame(pairs: Iterable[Pair]) -> pd.DataFrame:
    """Return one row per pair, in the HelpSteer2_binarized schema plus split, category and id."""
    columns = "prompt chosen rejected chosen_rating rejected_rating split category prompt_id"
    rows = []
    for p in pairs:
        both = (p.chosen, p.rejected)
        turns = [[*p.group.prompt, {"role": "assistant", "content": r.text}] for r in both]
        key = (p.group.split, p.category, p.prompt_id)
        ratings = [float(r.rating) for r in both]
        rows.append((p.group.prompt[-1]["content"], *turns, *ratings, *key))
    return pd.DataFrame(rows, columns=columns.split())


def responses_frame(data: PreferenceData) -> pd.DataFrame:
    """Return one row per response; `n_words` counts words between white space."""
    columns = "prompt_id split category batch prompt response rating finished source temperature"
    rows = [
        (
            *(g.prompt_id, g.split, g.category, g.batch, g.prompt[-1]["content"]),
            *(r.text, r.rating, r.finished, r.source, r.temperature, len(r.text.split())),
        )
        for g in data.groups
        for r in g.responses
    ]
    return pd.DataFrame(rows, columns=[*columns.split(), "n_words"])


def drop_long(
    data: PreferenceData,
    encode: Callable[[Sequence[Message], Response | None], Sequence[int]],
    max_prompt_length: int,
    max_length: int,
) -> PreferenceData:
    """Drop what is too long or reads the same, then every group with fewer than two responses.

    A response that has the token ids of an earlier one of its group but another rating goes: no
    model could tell the two apart. Of a pair, both go.

    Args:
        data: what to filter; it is not changed.
        encode: token ids of a prompt and a response together, or, given None, of the prompt with
            its generation header. It is called once for each prompt and each response.
        max_prompt_length: in tokens; longer prompts are dropped with all their responses.
        max_length: in tokens of prompt and response.

    Returns:
        The rest, its fingerprint, and in `dropped` how many prompts, responses and groups went.
    """
    dropped, total, kept = Counter(data.dropped), Counter(data.dropped_of), []
    long_prompt = f"prompt over {max_prompt_length} tokens"
    long = f"response over {max_length} tokens"
    identical, single = "identical after tokenisation", "group of fewer than two responses"
    prompts = {g.prompt_id: g.prompt for g in data.groups}
    fits = {i: len(encode(p, None)) <= max_prompt_length for i, p in prompts.items()}
    for group in (group for group in data.groups if fits[group.prompt_id]):
        ids = [(r, tuple(encode(group.prompt, r))) for r in group.responses]
        short = [(r, tokens) for r, tokens in ids if len(tokens) <= max_length]
        responses, tokens = [r for r, _ in short], [t for _, t in short]
        different = without_contradictions(responses, tokens, paired=len(short) == 2)
        total.update({long: len(ids), identical: len(short), single: 1})
        dropped.update({long: len(ids) - len(short), identical: len(short) - len(different)})
        if len(different) >= 2:
            kept.append(replace(group, responses=different))
        elif different or not short:
            dropped[single] += 1
    dropped[long_prompt] += len(fits) - sum(fits.values())
    total[long_prompt] += len(fits)
    return _bundle(kept, dropped, total)


def require_splits(data: PreferenceData, config: DataConfig, template_tokens: int) -> None:
    """Refuse limits that leave a split empty.

    Args:
        data: what `drop_long` left.
        config: the limits; a split whose number of prompts is set to 0 may be empty.
        template_tokens: what the chat template makes of a message of one word.

    Raises:
        DataError: naming the field, the tokens of the template and the shares dropped, or saying
            that all ratings tie.
    """
    shares = "; ".join(data.dropped_shares()) or "none"
    if config.max_prompt_length <= template_tokens:
        raise DataError(
            f"data.max_prompt_length = {config.max_prompt_length} leaves no room for a prompt: of "
            f"one word, the chat template makes {template_tokens} tokens; raise the limit "
            f"(dropped: {shares})"
        )
    wanted = [split for split in SPLITS if getattr(config, f"{split}_prompts") != 0]
    empty = [split for split in wanted if not data.groups_of(split)]
    if empty:
        raise DataError(
            f"no prompts are left in {' and '.join(empty)} (dropped: {shares}); raise "
            f"data.max_prompt_length = {config.max_prompt_length}, of which the chat template "
            f"takes about {template_tokens}, or data.max_length = {config.max_length}, or use data "
            "that has rows of each split"
        )
    tied = [split for split in wanted if split != "validation" and not data.pairs(split)]
    if tied:
        raise DataError(
            f"no pairs in {' and '.join(tied)}: all responses to a prompt have the same rating"
        )


def _bundle(
    groups: Iterable[Group], dropped: Mapping[str, int], dropped_of: Mapping[str, int]
) -> PreferenceData:
    groups, digest = tuple(groups), hashlib.sha256()
    for g in groups:
        content = [g.prompt_id, g.split, g.batch, [[m["role"], m["content"]] for m in g.prompt]]
        content += [[r.text, float(r.rating)] for r in g.responses]
        digest.update(json.dumps(content).encode() + b"\n")
    counts = {reason: count for reason, count in dropped.items() if count}
    totals = {reason: dropped_of[reason] for reason in counts}
    return PreferenceData(groups, digest.hexdigest()[:16], counts, totals)


def _first_prompts(groups: Sequence[Group], split: str, config: DataConfig) -> list[str]:
    """Return the first n prompt ids of a split, taking one of each category in turn."""
    categories = {g.prompt_id: g.category for g in groups if g.split == split}
    limit = getattr(config, f"{split}_prompts")
    if limit is not None and limit < 0:
        raise DataError(f"data.{split}_prompts = {limit}, expected None or at least 0")
    by_category: defaultdict[str | None, list[str]] = defaultdict(list)
    for prompt_id, category in categories.items():
        by_category[category].append(prompt_id)
    turns = zip_longest(*by_category.values())
    return [prompt_id for turn in turns for prompt_id in turn if prompt_id is not None][:limit]


def response_key(pair: Pair, response: Response) -> Key:
    """Name one of a pair's responses."""
    return pair.prompt_id, pair.group.batch, pair.group.responses.index(response)
