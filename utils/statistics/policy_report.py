"""The tables of the policy study, from its published evaluations alone: no model is loaded.

Rewards and gains are in SFT standard deviations. A gain is paired: same prompt, same sample, same
sampling noise. Intervals are over prompts and, where an arm has several, over seeds. Without
evaluations a table is empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from utils.arms.policies import AVERAGE
from utils.data.texts import distinct_n, distinct_of_words
from utils.statistics.bootstrap import crossed_interval, named
from utils.statistics.policy_runs import (
    BASE,
    BEST,
    GREEDY,
    JUDGE,
    POOL,
    REWARDS,
    Frames,
    arms_of,
    frame_of,
    policies_of,
    rewards_of,
    seeds_of,
)
from utils.statistics.policy_stats import outcomes, paired_gains, pick_weights, prompt_means

PROXIES, PICKED_FROM = ("scalar", "ordinal"), (2, 4, 8, 16)  # who picks the best of n, and the n


def policy_table(frames: Frames, samples: int) -> pd.DataFrame:
    """Compare all policies with the SFT model.

    Args:
        frames: of `policy_frames`.
        samples: bootstrap resamples.

    Returns:
        A row per arm, its seeds pooled, then per control and per average of an arm's seeds: policy,
        `group` ("arm", "average", "control"),
        `seeds`, `n` (prompts); with `_low` and `_high`, for each reward model `reward_<model>` and
        `gain_<model>`, the paired difference to SFT, and that one's `_sd` between seeds and
        `_agree`, whether all seeds have its sign; under the judge the shares `win`, `tie` and
        `loss` against SFT and `win_rate` (a tie is half a win) with `_low` and `_high`,
        and all five with `_best` against SFT at its best temperature; `kl` (nats), `length`
        (tokens), `finished`, `repetition`; `distinct_2` over as many texts for all, a mean over
        seeds, and `distinct2_ratio`, it over SFT's; `distinct_2_words` and
        `distinct2_ratio_words`, the same over the first `words` words, the most that all have.
    """
    if not frames:
        return pd.DataFrame()
    texts = [" ".join(frame["response"]) for name, frame in frames.items() if name != POOL]
    words, names = min(len(text.split()) for text in texts), policies_of(frames)
    table = pd.DataFrame(_policy_row(frames, name, words, samples) for name in names)
    sft = table.set_index("policy").loc[BASE]
    table["distinct2_ratio"] = table["distinct_2"] / sft["distinct_2"]
    table["distinct2_ratio_words"] = table["distinct_2_words"] / sft["distinct_2_words"]
    return table.assign(words=words)


def seed_table(frames: Frames, samples: int) -> pd.DataFrame:
    """Return each seed's paired gain over SFT, with intervals over prompts.

    Returns:
        A row per arm and seed: policy, seed, `gain_judge` and, where `rewards_of` has one,
        `gain_own` with `_low` and `_high`, kl, length, finished.
    """
    rows = []
    for policy in arms_of(frames):
        for seed, frame in seeds_of(frames, policy).items():
            row: dict[str, Any] = {"policy": policy, "seed": seed}
            for name, column in rewards_of(policy).items():
                found = _gain([frame], frames[BASE], column, samples)
                row |= named(f"gain_{name}", found)
            rows.append(row | {name: frame[name].mean() for name in ("kl", "length", "finished")})
    return pd.DataFrame(rows)


def best_of_n_table(frames: Frames, samples: int) -> pd.DataFrame:
    """Measure the best of n SFT samples by a reward model: what a policy must beat at its KL.

    The mean is exact over all subsets of n of a prompt's samples, see `pick_weights`. The KL
    log n - (n - 1) / n (Stiennon et al. 2020) is an upper bound (Beirami et al. 2024, arXiv
    2401.01879), close to it as long as no answer is very likely.

    Args:
        frames: of `policy_frames`.
        samples: bootstrap resamples.

    Returns:
        A row per proxy and n: proxy, n, `kl` (nats), `sqrt_kl`; with `_low` and `_high` the pick's
        `reward`, by the proxy, and `judge`, and `reward_gain` and `judge_gain`, what they are above
        the mean of the prompt's samples; `length` and `finished` of the pick; and `prompts`.
    """
    if not frames:
        return pd.DataFrame()
    pool = frame_of(frames, POOL)
    prompts = pool["prompt_id"].nunique()

    def shaped(column: str) -> np.ndarray:
        return pool[column].to_numpy(dtype=float).reshape(prompts, -1)

    rows = []
    for proxy in PROXIES:
        for n in PICKED_FROM:
            weights, kl = pick_weights(shaped(f"reward_{proxy}"), n), math.log(n) - (n - 1) / n
            row: dict[str, Any] = {"proxy": proxy, "n": n, "kl": kl, "sqrt_kl": math.sqrt(kl)}
            for name, column in (("reward", f"reward_{proxy}"), ("judge", JUDGE)):
                picked = (weights * shaped(column)).sum(1)
                gain = picked - shaped(column).mean(1)
                row |= named(name, crossed_interval(picked[None], samples))
                row |= named(f"{name}_gain", crossed_interval(gain[None], samples))
            for name in ("length", "finished"):
                row[name] = (weights * shaped(name)).sum(1).mean()
            rows.append(row | {"prompts": prompts})
    return pd.DataFrame(rows)


def policy_category_table(frames: Frames, samples: int) -> pd.DataFrame:
    """Return each arm's paired gain over SFT by category.

    Returns:
        Rows of policy, reward ("judge", "own": see `rewards_of`), category, value, low, high and n
        (prompts).
    """
    rows = []
    for policy in arms_of(frames):
        for category, base in frames[BASE].groupby("category"):
            own = [frame.loc[base.index] for frame in seeds_of(frames, policy).values()]
            for reward, column in rewards_of(policy).items():
                found = _gain(own, base, column, samples)
                row = {"policy": policy, "reward": reward, "category": category}
                rows.append(row | {name: found[name] for name in ("value", "low", "high", "n")})
    return pd.DataFrame(rows)


def temperature_table(frames: Frames, samples: int) -> pd.DataFrame:
    """Hold each arm, sampled and greedy, against the SFT model at a lower temperature, and greedy.

    Returns:
        A row per arm, `decoding` ("sampled", all seeds; "greedy", the seeds that have it) and
        `against` (`BEST`, `GREEDY`): policy, decoding, `temperature`, against, the paired
        differences `judge` and, where `rewards_of` has one, `own` with `_low` and `_high`, seeds,
        and n (prompts).
    """
    rows = []
    for policy in arms_of(frames):
        seeds = seeds_of(frames, policy)
        greedy = [frames[n] for seed in seeds if (n := f"{policy}_s{seed}_greedy") in frames]
        for decoding, own in {"sampled": [*seeds.values()], "greedy": greedy}.items():
            for against in (BEST, GREEDY) if own else ():
                row = {"policy": policy, "decoding": decoding}
                row |= {"temperature": own[0]["temperature"].iloc[0], "against": against}
                for reward, column in rewards_of(policy).items():
                    found = _gain(own, frame_of(frames, against), column, samples)
                    row |= named(reward, found)
                rows.append(row | {"seeds": found["seeds"], "n": found["n"]})
    return pd.DataFrame(rows)


def _gain(
    own: Sequence[pd.DataFrame], base: pd.DataFrame, column: str, samples: int
) -> dict[str, float]:
    return crossed_interval(paired_gains(own, [base] * len(own), column), samples)


def _policy_row(frames: Frames, policy: str, words: int, samples: int) -> dict[str, Any]:
    own = [*seeds_of(frames, policy).values()]
    group = "average" if policy.endswith(f"_{AVERAGE}") else "control"
    row: dict[str, Any] = {"policy": policy, "group": group if policy in frames else "arm"}
    row |= {"seeds": len(own), "n": own[0]["prompt_id"].nunique()}
    for reward in REWARDS:
        column = f"reward_{reward}"
        row |= named(column, crossed_interval(prompt_means(own, [f[column] for f in own]), samples))
        gain = _gain(own, frames[BASE], column, samples)
        row |= named(f"gain_{reward}", gain)
        row |= {f"gain_{reward}_sd": gain["seed_sd"], f"gain_{reward}_agree": gain["seeds_agree"]}
    for ending, against in {"": BASE, "_best": BEST}.items():
        found = [outcomes(frame, frame_of(frames, against), JUDGE) for frame in own]
        shares = pd.concat(found)[["win", "tie", "loss"]].mean()
        row |= {f"{name}{ending}": share for name, share in shares.items()}
        rates = prompt_means(own, [outcome["win_rate"] for outcome in found])
        row |= named(f"win_rate{ending}", crossed_interval(rates, samples))
    row |= pd.concat(own)[["kl", "length", "finished", "repetition"]].mean().to_dict()
    row["distinct_2"] = np.mean([distinct_n(frame["response"]) for frame in own])
    row["distinct_2_words"] = np.mean([distinct_of_words([*f["response"]], words) for f in own])
    return row
