"""Gains at equal length: a policy that only changed its length may have learned little else.

Two ways that assume different things: matching with SFT samples of the same length, and regression.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from utils.files import ResultsError
from utils.statistics.bootstrap import (
    crossed_interval,
    crossed_sums,
    mean_or_nan,
    named,
    percentile_interval,
)
from utils.statistics.policy_runs import (
    BASE,
    JUDGE,
    POOL,
    Frames,
    arms_of,
    frame_of,
    policies_of,
    rewards_of,
    seeds_of,
)
from utils.statistics.policy_stats import paired_gains, prompt_means

NEAR_TOKENS, NEAR_SHARE = 5, 0.2  # how far a match may be in length: the larger of the two
COEFFICIENTS = ("unchanged", "per_10_tokens", "per_finish")
LEVELS = (("scalar", "ordinal"), ("ordinal", "ordinal_cautious"))
MATCHES = {"length": False, "length and finish": True}  # method -> whether the finish must match


def length_table(frames: Frames, samples: int) -> pd.DataFrame:
    """Ask how much of each policy's gain over SFT is left at equal length.

    Returns:
        A row per policy, `reward` ("judge", "own": see `rewards_of`) and `method`: "raw", the
        paired gain; "length" and "length and finish", against the nearest of `POOL`
        (`matched_gains` says what that assumes); "regression", the gain at unchanged length and
        finish (`length_regression`). With value, low and high; `matched`, the share of completions
        that count; `raw_there`, the raw gain of these, so that fewer completions are not taken for
        an equal length; `length_change`, by how many tokens these are still longer than what they
        are compared with; seeds; and n (prompts). Prompts weigh alike, however many of their
        completions count; but for `matched`, those without any are left out.
    """
    return pd.DataFrame(
        {"policy": policy, "reward": reward, **row}
        for policy, reward, column, own in _to_compare(frames)
        for row in _length_rows(own, frames[BASE], frame_of(frames, POOL), column, samples)
    )


def regression_table(frames: Frames, samples: int) -> pd.DataFrame:
    """Return `length_regression` of the gains over SFT: policy, reward, and its coefficients."""
    return pd.DataFrame(
        {"policy": policy, "reward": reward}
        | length_regression(own, [frames[BASE]] * len(own), column, samples)
        for policy, reward, column, own in _to_compare(frames)
    )


def level_table(frames: Frames, samples: int) -> pd.DataFrame:
    """Compare the pairs of `LEVELS` under the judge, the second minus the first, seed by seed.

    Returns:
        For each pair that is there a row per `method`: "raw"; "length" and "length and finish", the
        difference of the gains over the nearest of `POOL` on the prompts where both have a match;
        "regression", the difference at unchanged length and finish. With value, low and high; for
        all but the last `seed_sd` and `seeds_agree`; seeds; n (prompts); `kl_first`,
        `length_first`, `kl_second`, `length_second`; and the arms, first and second.
    """
    there = arms_of(frames)
    parts = [
        _levels(frames, samples, first, second).assign(first=first, second=second)
        for first, second in LEVELS
        if first in there and second in there
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def matched_gains(
    policy: pd.DataFrame, pool: pd.DataFrame, column: str, same_finish: bool = False
) -> np.ndarray:
    """Compare each completion with the SFT samples for its prompt that are nearest in length.

    A match is at most 5 tokens away or, if that is more, 20% of the completion's length; of equally
    near samples the mean counts. This assumes that SFT samples which happen to have that length
    show what the policy's length alone is worth on that prompt. It speaks only of completions with
    a match, and where the policy left the lengths that SFT samples have, there is none.

    Args:
        policy: its rows.
        pool: several SFT samples per prompt, the prompts in the same order.
        column: what to compare.
        same_finish: whether a match must also have ended, or run into the limit, alike.

    Returns:
        The completion's value minus its match's, a number per row; NaN without a match.
    """
    prompts = policy["prompt_id"].nunique()

    def shaped(frame: pd.DataFrame, name: str) -> np.ndarray:
        return frame[name].to_numpy(dtype=float).reshape(prompts, -1)

    length = shaped(policy, "length")
    distance = np.abs(length[:, :, None] - shaped(pool, "length")[:, None, :])
    if same_finish:
        other = shaped(policy, "finished")[:, :, None] != shaped(pool, "finished")[:, None, :]
        distance[other] = np.inf
    nearest = distance.min(-1)
    near = nearest <= np.maximum(NEAR_TOKENS, NEAR_SHARE * length)
    weights = ((distance == nearest[:, :, None]) & near[:, :, None]).astype(float)
    match = mean_or_nan((weights * shaped(pool, column)[:, None, :]).sum(-1), weights.sum(-1))
    return (shaped(policy, column) - match).ravel()


def length_regression(
    policies: Sequence[pd.DataFrame], bases: Sequence[pd.DataFrame], column: str, samples: int
) -> dict[str, float]:
    """Regress the gain of a completion on its change in length and in having ended.

    Least squares over all completions, paired with the base's by prompt and sample:

        gain = unchanged + per_10_tokens * change / 10 + per_finish * (ended - base ended)

    `unchanged` is the gain at the same length and the same ending. This assumes that both act
    linearly, alike on every prompt, and cause the gain rather than come with what caused it. Unlike
    `matched_gains` it uses every completion, and extrapolates where none keeps its length.

    Args:
        policies: a frame per seed.
        bases: what each of them is compared with.
        column: the reward.
        samples: bootstrap resamples, of prompts and seeds.

    Returns:
        The three coefficients, each also with `_low` and `_high`.
    """
    cells = []
    for policy, base in zip(policies, bases, strict=True):
        change = {
            name: policy[name].to_numpy(dtype=float) - base[name].to_numpy(dtype=float)
            for name in (column, "length", "finished")
        }
        known = np.stack([np.ones(len(policy)), change["length"] / 10, change["finished"]], axis=1)
        rows = np.concatenate([known, change[column][:, None]], axis=1)
        rows = rows.reshape(policy["prompt_id"].nunique(), -1, 4)
        cells.append(np.einsum("pki,pkj->pij", rows, rows))
    products = crossed_sums(np.array(cells), samples)
    # Where no length or no ending changes, its slope is zero.
    inverse = np.linalg.pinv(products[:, :3, :3], rcond=1e-10, hermitian=True)
    coefficients = (inverse @ products[:, :3, 3:])[:, :, 0].T
    found: dict[str, float] = {}
    for name, draws in zip(COEFFICIENTS, coefficients, strict=True):
        found |= named(name, percentile_interval(draws))
    return found


def _levels(frames: Frames, samples: int, first: str, second: str) -> pd.DataFrame:
    by_seed = [seeds_of(frames, arm) for arm in (first, second)]
    shared = [seed for seed in by_seed[0] if seed in by_seed[1]]
    if not shared:
        raise ResultsError(f"{first!r} and {second!r} have no seed in common: train one of both")
    old, new = ([seeds[seed] for seed in shared] for seeds in by_seed)
    pool = frame_of(frames, POOL)
    gaps = {"raw": paired_gains(new, old, JUDGE)}
    for method, same in MATCHES.items():
        gaps[method] = _matched(new, pool, JUDGE, same) - _matched(old, pool, JUDGE, same)
    rows = [{"method": name, **crossed_interval(gap, samples)} for name, gap in gaps.items()]
    fitted = _at_equal_length(new, old, JUDGE, samples)
    rows.append({"method": "regression", **fitted, "seeds": len(shared), "n": rows[0]["n"]})
    table = pd.DataFrame(rows)
    for place, parts in (("first", old), ("second", new)):
        for name, mean in pd.concat(parts)[["kl", "length"]].mean().items():
            table[f"{name}_{place}"] = mean
    return table


def _to_compare(frames: Frames) -> Iterator[tuple[str, str, str, list[pd.DataFrame]]]:
    for policy in policies_of(frames):
        for reward, column in rewards_of(policy).items():
            if policy != BASE:
                yield policy, reward, column, list(seeds_of(frames, policy).values())


def _length_rows(
    own: Sequence[pd.DataFrame], base: pd.DataFrame, pool: pd.DataFrame, column: str, samples: int
) -> Iterator[dict[str, Any]]:
    bases = [base] * len(own)
    raw = crossed_interval(paired_gains(own, bases, column), samples)
    kept = {"seeds": raw["seeds"], "n": raw["n"]}
    change = pd.concat(own)["length"].mean() - base["length"].mean()
    everyone = {"matched": 1.0, "raw_there": raw["value"]}
    yield {"method": "raw", **_interval(raw), **everyone, "length_change": change, **kept}
    for method, same in MATCHES.items():
        found = crossed_interval(_matched(own, pool, column, same), samples)
        change = [matched_gains(frame, pool, "length", same) for frame in own]
        matched = [~np.isnan(values) for values in change]
        there = [
            np.where(near, frame[column] - base[column], np.nan)
            for near, frame in zip(matched, own, strict=True)
        ]
        facts = {"matched": np.mean(matched)}
        for name, values in (("raw_there", there), ("length_change", change)):
            facts[name] = pd.Series(prompt_means(own, values).ravel()).mean()  # of known ones
        yield {"method": method, **_interval(found), **facts, **kept, "n": found["n"]}
    fitted = _at_equal_length(own, bases, column, samples)
    yield {"method": "regression", **fitted, **everyone, "length_change": 0.0, **kept}


def _matched(
    frames: Sequence[pd.DataFrame], pool: pd.DataFrame, column: str, same_finish: bool
) -> np.ndarray:
    gains = [matched_gains(frame, pool, column, same_finish) for frame in frames]
    return prompt_means(frames, gains)


def _at_equal_length(*arguments: Any) -> dict[str, float]:
    """Return the intercept of `length_regression` as value, low and high."""
    found, name = length_regression(*arguments), COEFFICIENTS[0]
    return {"value": found[name], "low": found[f"{name}_low"], "high": found[f"{name}_high"]}


def _interval(found: Mapping[str, float]) -> dict[str, float]:
    return {end: found[end] for end in ("value", "low", "high")}
