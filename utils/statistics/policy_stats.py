"""Statistics of the policy study: gains by prompt, wins, best of n.

The frames here are rows of evaluations, a row per completion in the order of prompts x samples. A
list of frames holds the seeds of one policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from utils.data.texts import distinct_n
from utils.statistics.bootstrap import clustered_interval


def prompt_means(frames: Sequence[pd.DataFrame], values: Sequence[np.ndarray]) -> np.ndarray:
    """Average each frame's values, one per row, by prompt: shape (seeds, prompts)."""
    rows = zip(frames, values, strict=True)
    return np.array(
        [pd.Series(v).groupby(f["prompt_id"].to_numpy(), sort=False).mean() for f, v in rows],
        dtype=float,
    )


def paired_gains(
    policies: Sequence[pd.DataFrame], bases: Sequence[pd.DataFrame], column: str
) -> np.ndarray:
    """Average what each frame has more than its base on the same rows: (seeds, prompts)."""
    pairs = zip(policies, bases, strict=True)
    gaps = [policy[column].to_numpy() - base[column].to_numpy() for policy, base in pairs]
    return prompt_means(policies, gaps)


def win_shares(gap: np.ndarray | pd.Series) -> np.ndarray | pd.Series:
    """Return 1 where a gap is above zero and a half where it is zero: only equal values tie."""
    return (gap > 0) + (gap == 0) / 2


def outcomes(policy: pd.DataFrame, base: pd.DataFrame, column: str) -> pd.DataFrame:
    """Say of each row whether the policy's completion wins, ties or loses against the base's.

    Completions tie if their rewards are equal, as those of equal texts are.

    Returns:
        Columns `win`, `tie`, `loss`, 0 or 1, and `win_rate`, a tie being half a win.
    """
    gap = policy[column].to_numpy() - base[column].to_numpy()
    found = {"win": gap > 0, "tie": gap == 0, "loss": gap < 0}
    return pd.DataFrame(found).astype(float).assign(win_rate=win_shares(gap))


def pick_weights(scores: np.ndarray, n: int) -> np.ndarray:
    """Chance that each of a prompt's N samples is the best of n that are drawn without replacement.

    The i-th smallest is the largest of C(i - 1, n - 1) of the C(N, n) subsets; equal scores share
    theirs evenly. So a mean with these weights is exact over all subsets, and unbiased for n
    fresh samples.

    Args:
        scores: what decides, shape (prompts, N).
        n: 1..N.

    Returns:
        The same shape; rows sum to one.
    """
    total = scores.shape[1]
    if not 1 <= n <= total:
        raise ValueError(f"no best of {n} among {total} samples: choose n from 1 to {total}")
    chances = np.array([math.comb(i, n) for i in range(total + 1)]) / math.comb(total, n)
    below = (scores[:, None, :] < scores[:, :, None]).sum(-1)
    same = (scores[:, None, :] == scores[:, :, None]).sum(-1)
    return (chances[below + same] - chances[below]) / same


def compare(frames: Mapping[str, pd.DataFrame], column: str, samples: int) -> pd.DataFrame:
    """Compare policies with the first on the same prompts.

    Args:
        frames: rows of `evaluate_policy` by policy; the first is what the others are compared to.
        column: the reward to compare.
        samples: bootstrap resamples.

    Returns:
        One row per policy: mean `column` with its interval, paired difference to the first with
        its interval (over prompts), win rate (a tie is half a win), KL, length, finished share,
        distinct-2 and repetition.
    """
    base = next(iter(frames.values()))
    rows = []
    for name, frame in frames.items():
        own = clustered_interval(frame[column], frame["prompt_id"], samples)
        difference = frame[column].to_numpy() - base[column].to_numpy()
        paired = clustered_interval(difference, frame["prompt_id"], samples)
        rows.append(
            {
                "policy": name,
                "reward": own["value"],
                "reward_low": own["low"],
                "reward_high": own["high"],
                "difference": paired["value"],
                "low": paired["low"],
                "high": paired["high"],
                "win_rate": outcomes(frame, base, column)["win_rate"].mean(),
                "kl": frame["kl"].astype(float).mean(),
                "length": frame["length"].mean(),
                "finished": frame["finished"].mean(),
                "distinct_2": distinct_n(frame["response"]),
                "repetition": frame["repetition"].mean(),
                "n": own["n"],
            }
        )
    return pd.DataFrame(rows)
