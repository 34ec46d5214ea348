"""Blind ratings of published answers: what a reader who does not know their source thinks of them.

The ratings lie in `results/readings`, with the brief that they follow. They are test data: no model
is trained on them and nothing is chosen by them. Everything here is paired by prompt, and intervals
are over prompts; each policy is one seed, so they leave out the spread between seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from utils.data.sources import DataError, read_rows
from utils.statistics.bootstrap import (
    clustered_interval,
    crossed_sums,
    mean_or_nan,
    named,
    percentile_interval,
)
from utils.statistics.policy_runs import BASE, BEST, POOL, REWARDS, Frames, frame_of
from utils.statistics.policy_stats import win_shares

PICKED = "sft_best_of_16"  # of a prompt's SFT samples the one with the highest scalar reward
# The rated policies, and of what sort they are.
SORTS = {BASE: "SFT", BEST: "SFT", PICKED: "best of 16"}
SORTS |= dict.fromkeys(("scalar_s0", "ordinal_s0", "scalar_average"), "policy")
# Kinds of pairs. The best of 16 is an SFT sample, too, but one that the scalar reward has picked.
KINDS = [("SFT", "SFT"), ("policy", "SFT"), ("best of 16", "SFT"), ("policy", "policy")]
KINDS += [("best of 16", "policy")]
RIVALS = {"": BASE, "_best": BEST, "_best_of_16": PICKED}  # by the ending of their columns
GOOD = 4  # the brief: from here on an answer is at least partly useful
BAD = 2  # the brief: an echo is worth no more, however fluent
_COLUMNS = ("prompt_id", "prompt", "policy", "response", "finished", "overall", "echo")


def load_readings(path: Path) -> pd.DataFrame:
    """Read blind ratings and check every line.

    Args:
        path: JSON Lines, a line per answer; the columns are explained beside the file.

    Returns:
        The rows, `overall` a float in 1..10, `echo` and `finished` bools.

    Raises:
        DataError: naming file and line of a missing column, an unknown policy, a rating outside
            1..10, an echo that is not 0 or 1, or a second rating of the same answer; or naming a
            prompt to which not all policies have an answer.
    """
    rows, seen = read_rows(path), {}
    for line, row in rows:
        where = f"{path}, line {line}"
        if missing := [name for name in _COLUMNS if name not in row]:
            raise DataError(f"{where}: no column {missing[0]!r}, expected {', '.join(_COLUMNS)}")
        if row["policy"] not in SORTS:
            raise DataError(f"{where}: policy {row['policy']!r}, expected {', '.join(SORTS)}")
        if not (type(row["overall"]) in (int, float) and 1 <= row["overall"] <= 10):
            raise DataError(f"{where}: overall is {row['overall']!r}, expected a number in 1..10")
        if row["echo"] not in (0, 1):
            raise DataError(f"{where}: echo is {row['echo']!r}, expected 0 or 1")
        first = seen.setdefault((row["prompt_id"], row["policy"]), line)
        if first != line:
            raise DataError(
                f"{where}: {row['policy']} is rated again on {row['prompt_id']}, first in line "
                f"{first}; expected one rating of an answer"
            )
    for prompt in dict.fromkeys(prompt for prompt, _ in seen):
        if absent := [policy for policy in SORTS if (prompt, policy) not in seen]:
            raise DataError(f"{path}: prompt {prompt} has no rated answer of {', '.join(absent)}")
    frame = pd.DataFrame([row for _, row in rows], columns=[*_COLUMNS])
    return frame.astype({"overall": float, "echo": bool, "finished": bool})


def rated_answers(readings: pd.DataFrame, frames: Frames) -> pd.DataFrame:
    """Join ratings with the published samples that were rated, by prompt and policy.

    Args:
        readings: of `load_readings`.
        frames: of `policy_frames`.

    Returns:
        A row per prompt and policy: the columns of the evaluations, `policy`, `overall`, `echo`.

    Raises:
        DataError: naming the first prompt and policy whose rated text is not the published one, or
            that only one side has.
        ResultsError: if an evaluation is missing.
    """
    published = pd.concat(_first(frames, policy).assign(policy=policy) for policy in SORTS)
    keys = ["prompt_id", "policy"]
    rated = readings[[*keys, "response", "overall", "echo"]].rename(columns={"response": "read"})
    table = published.merge(rated, "outer", on=keys, validate="one_to_one", sort=True)
    wrong = table[table["read"].isna() | (table["response"] != table["read"])]
    if len(wrong):
        row = wrong.iloc[0]
        raise DataError(
            f"prompt {row['prompt_id']}: the rated answer of {row['policy']} is not the published "
            f"one, nor are {len(wrong) - 1} others; expected the first sample of each prompt in "
            "the published evaluations, whose ratings these are"
        )
    return table.drop(columns="read")


def policy_readings(rated: pd.DataFrame, samples: int) -> pd.DataFrame:
    """Compare the rated policies as the reader sees them.

    Args:
        rated: of `rated_answers`.
        samples: bootstrap resamples.

    Returns:
        A row per policy: policy, `n` (prompts), `tied`, the share rated as SFT's answer is; with
        `_low` and `_high` the mean `rating` (1..10); the paired `gain` in it and the `win_rate` (a
        tie is half a win) against SFT, and both with the endings of `RIVALS` against the others;
        `judge_win_rate`, the judge's against SFT for the same answers; `echo_share`, and
        `echo_gain`, what it is above SFT's; `good_share`, rated `GOOD` or more; then the mean
        `length` (tokens) and the share `finished`.
    """
    rating, judge, echo = (_wide(rated, name) for name in ("overall", "reward_judge", "echo"))
    means = rated.groupby("policy")[["length", "finished"]].mean()
    rows = []
    for policy in SORTS:
        values = {"rating": rating[policy]}
        for ending, rival in RIVALS.items():
            gap = rating[policy] - rating[rival]
            values |= {f"gain{ending}": gap, f"win_rate{ending}": win_shares(gap)}
        values["judge_win_rate"] = win_shares(judge[policy] - judge[BASE])
        values |= {"echo_share": echo[policy], "echo_gain": echo[policy] - echo[BASE]}
        values["good_share"] = rating[policy] >= GOOD
        row: dict[str, Any] = {"policy": policy, "n": len(rating)}
        row["tied"] = (values["gain"] == 0).mean()
        for name, value in values.items():
            row |= named(name, clustered_interval(value, rating.index, samples))
        rows.append(row | means.loc[policy].to_dict())
    return pd.DataFrame(rows)


def agreement_table(rated: pd.DataFrame, samples: int) -> pd.DataFrame:
    """Measure how often each reward orders two answers to a prompt as the reader does.

    Of the pairs that the reader decides, those of unequal ratings; a tie of the rewards is half
    right. The control is `version`: always the answer of that policy of the two whose answers the
    reader prefers more often. It reads no text: a reward that is right no more often has not shown
    to know more than which policy is better on average. The control's choice is made on the same
    pairs, which flatters it a little.

    Args:
        rated: of `rated_answers`.
        samples: bootstrap resamples.

    Returns:
        A row per kind of pair, by `KINDS`: kind, `pairs`, `decided`, `prompts` with a decided pair;
        with `_low` and `_high` the shares `scalar`, `ordinal`, `judge`, `version`, and
        `<reward>_beyond`, a reward's less that of `version`, paired.
    """
    rating = _wide(rated, "overall")
    rewards = {name: _wide(rated, f"reward_{name}") for name in REWARDS}
    rows = []
    for sorts in KINDS:
        parts = [
            _decided(rating, rewards, first, second)
            for first, second in combinations(SORTS, 2)
            if sorted((SORTS[first], SORTS[second])) == sorted(sorts)
        ]
        found = pd.concat(parts)
        row: dict[str, Any] = {"kind": " with ".join(sorts), "pairs": len(parts) * len(rating)}
        row |= {"decided": len(found), "prompts": found.index.nunique()}
        for name in found:
            row |= named(name, clustered_interval(found[name], found.index, samples))
        for name in REWARDS:
            beyond = found[name] - found["version"]
            row |= named(f"{name}_beyond", clustered_interval(beyond, found.index, samples))
        rows.append(row)
    return pd.DataFrame(rows)


def echo_table(rated: pd.DataFrame, samples: int) -> pd.DataFrame:
    """Compare what echoes, honest bad answers and good ones of the aligned policies earn.

    An honest bad answer is no echo and rated `BAD` or less; a good one is rated `GOOD` or more.
    Those between the two are in no group.

    Args:
        rated: of `rated_answers`.
        samples: bootstrap resamples, of all prompts at once, so that groups are compared under the
            same draws.

    Returns:
        A row per group: `answers`, `n` and `prompts` that have one, the mean `rating`; with `_low`
        and `_high` the mean reward `scalar`, `ordinal`, `judge` in SFT standard deviations, and
        `<reward>_over_echoes`, what it is above that of the echoes.
    """
    own = rated[rated["policy"].map(SORTS) == "policy"]
    groups = {
        "echo": own["echo"],
        "honest bad": ~own["echo"] & (own["overall"] <= BAD),
        "good": ~own["echo"] & (own["overall"] >= GOOD),
    }
    columns = ["overall", *(f"reward_{name}" for name in REWARDS)]
    values = own[columns].assign(count=1)
    totals = [
        values.mul(member, axis=0).groupby(own["prompt_id"]).sum() for member in groups.values()
    ]
    sums = crossed_sums(np.stack(totals, axis=1)[None].astype(float), samples)
    means = mean_or_nan(sums[..., :-1], sums[..., -1:])
    rows = []
    for place, (name, member) in enumerate(groups.items()):
        row: dict[str, Any] = {"answers": name, "n": int(member.sum())}
        row |= {"prompts": own.loc[member, "prompt_id"].nunique(), "rating": means[0, place, 0]}
        for column, reward in enumerate(REWARDS, start=1):
            mean, echoes = means[:, place, column], means[:, 0, column]
            row |= named(reward, percentile_interval(mean))
            row |= named(f"{reward}_over_echoes", percentile_interval(mean - echoes))
        rows.append(row)
    return pd.DataFrame(rows)


def _first(frames: Frames, policy: str) -> pd.DataFrame:
    """Return the sample of each prompt that was rated."""
    if policy != PICKED:
        return frame_of(frames, policy).drop_duplicates("prompt_id")
    pool = frame_of(frames, POOL)
    return pool.loc[pool.groupby("prompt_id", sort=False)["reward_scalar"].idxmax()]


def _wide(rated: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return one column as prompts x policies, whatever the order of the rows."""
    return rated.pivot(index="prompt_id", columns="policy", values=column).astype(float)


def _decided(
    rating: pd.DataFrame, rewards: Mapping[str, pd.DataFrame], first: str, second: str
) -> pd.DataFrame:
    """Say for the prompts of which the reader decides whether each reward agrees."""
    side = np.sign(rating[first] - rating[second])
    side = side[side != 0]
    gaps = {name: (wide[first] - wide[second])[side.index] for name, wide in rewards.items()}
    gaps["version"] = side * 0 + side.sum()
    return pd.DataFrame({name: win_shares(gap * side) for name, gap in gaps.items()})
