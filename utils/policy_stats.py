"""Statistics of the policy study: prompts and seeds, wins, best of n, equal amounts of text.

The frames here are rows of evaluations, a row per completion in the order of prompts x samples. A
list of frames holds the seeds of one policy. Intervals are 95% percentile intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from utils.evaluation import cluster_draws, distinct_n, percentile_interval

TIE = 0.1  # SFT standard deviations; answers whose rewards are closer than this tie


def crossed_sums(totals: np.ndarray, samples: int, seed: int = 0) -> np.ndarray:
    """Sum over seeds and prompts, as they are and over crossed bootstrap resamples.

    Every resample draws prompts with replacement and, independently of them, seeds; a cell counts
    as often as its prompt was drawn times its seed (Owen 2007, The pigeonhole bootstrap, for
    crossed random effects). Seeds answer the same prompts, so they are no independent rows. With
    one seed this is the bootstrap over prompts of `clustered_interval`, draw for draw.

    Of few seeds a bootstrap sees too small a spread: between three, two thirds of the variance.

    Args:
        totals: shape (seeds, prompts, ...).
        samples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        Shape (1 + samples, ...): the plain sum first.
    """
    seeds, prompts = totals.shape[:2]
    _, prompt_counts = cluster_draws(range(prompts), samples, seed)
    _, seed_counts = cluster_draws(range(seeds), samples, seed + 1)
    by_seed = prompt_counts @ totals.swapaxes(0, 1).reshape(prompts, -1)
    by_seed = by_seed.reshape(1 + samples, seeds, -1)
    return (seed_counts[:, :, None] * by_seed).sum(1).reshape(1 + samples, *totals.shape[2:])


def crossed_interval(values: np.ndarray, samples: int, seed: int = 0) -> dict[str, float]:
    """Mean over seeds and prompts, with an interval over both; see `crossed_sums`.

    Args:
        values: shape (seeds, prompts); NaN where there is none.
        samples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        `value`, `low`, `high`; `seed_sd`, the standard deviation between the seeds' means, and
        `seeds_agree`, whether all of them have the same sign, both NaN for one seed; `seeds`; and
        `n`, the prompts with a value.
    """
    known = ~np.isnan(values)
    sums = crossed_sums(np.stack([np.where(known, values, 0), known], axis=-1), samples, seed)
    found = percentile_interval(mean_or_nan(sums[:, 0], sums[:, 1]))
    spread, agree = math.nan, math.nan
    if len(values) > 1:
        means = pd.DataFrame(values).mean(axis=1)
        spread, agree = float(means.std()), bool((means > 0).all() or (means < 0).all())
    counts = {"seeds": len(values), "n": int(known.any(axis=0).sum())}
    return {**found, "seed_sd": spread, "seeds_agree": agree, **counts}


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


def outcomes(policy: pd.DataFrame, base: pd.DataFrame, column: str) -> pd.DataFrame:
    """Say of each row whether the policy's completion wins, ties or loses against the base's.

    Completions tie if their texts are the same or their rewards less than `TIE` apart.

    Returns:
        Columns `win`, `tie`, `loss`, 0 or 1, and `win_rate`, a tie being half a win.
    """
    gap = policy[column].to_numpy() - base[column].to_numpy()
    tie = (policy["response"].to_numpy() == base["response"].to_numpy()) | (np.abs(gap) < TIE)
    found = {"win": ~tie & (gap > 0), "tie": tie, "loss": ~tie & (gap < 0)}
    table = pd.DataFrame(found).astype(float)
    return table.assign(win_rate=table["win"] + table["tie"] / 2)


def distinct_of_words(texts: Sequence[str], words: int, n: int = 2, seed: int = 0) -> float:
    """Share of different n-grams in the first `words` words of the texts, in a shuffled order.

    The more text, the more repeats: `distinct_n` of few or short texts is higher for that alone,
    which a fixed number of words undoes. The order is the same for any texts of that number.
    """
    kept, left = [], words
    for place in np.random.default_rng(seed).permutation(len(texts)):
        taken = texts[place].split()[:left]
        kept.append(" ".join(taken))
        left -= len(taken)
    return distinct_n(kept, n)


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


def mean_or_nan(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Divide sums by counts; NaN where nothing was counted."""
    return np.divide(sums, counts, out=np.full_like(sums, math.nan), where=counts > 0)
