"""Bootstrap intervals, 95% percentile ones, and how tables name them.

Tables have columns `<name>`, `<name>_low` and `<name>_high`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

TINY = 1e-9  # an end of an interval as close to zero as this is zero but for rounding


def side(low: float, high: float) -> int:
    """Return 1 for an interval above zero, -1 for one below it, and 0 for one that holds it."""
    return int(low > TINY) - int(high < -TINY)


def clustered_interval(
    values: Sequence[float], clusters: Sequence[str], samples: int, seed: int = 0
) -> dict[str, float]:
    """Mean with a 95% percentile bootstrap interval that resamples clusters, not rows.

    Several pairs or samples of one prompt are not independent; resampling prompts says how the
    mean would vary over new prompts (Efron and Tibshirani 1993, chapter 13; Field and Welsh 2007).

    Args:
        values: one number per row.
        clusters: the prompt of each row.
        samples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        `value`, `low`, `high` and `n`, the number of rows.
    """
    cluster, drawn = cluster_draws(clusters, samples, seed)
    by_cluster = pd.Series(np.asarray(values, dtype=float)).groupby(cluster)
    total, count = (drawn @ by_cluster.agg(["sum", "count"]).to_numpy()).T
    return {**percentile_interval(total / count), "n": len(cluster)}


def cluster_draws(
    clusters: Sequence[str], samples: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Resample clusters with replacement.

    Returns:
        The cluster of each row, 0.., shape (rows,); and how often each is drawn, shape
        (1 + samples, clusters), once in the first row, which is the sample as it is.
    """
    names, cluster = np.unique(list(clusters), return_inverse=True)
    picks = np.random.default_rng(seed).integers(0, len(names), (samples, len(names)))
    flat = picks + len(names) * np.arange(samples)[:, None]
    drawn = np.bincount(flat.ravel(), minlength=flat.size).reshape(flat.shape)
    return cluster, np.vstack([np.ones_like(drawn[:1]), drawn])


def percentile_interval(
    draws: np.ndarray, name: str = "value", prefix: str = ""
) -> dict[str, float]:
    """Return a statistic, by `name`, and its 95% percentile interval, `low` and `high`.

    Args:
        draws: the statistic for each row of `cluster_draws`; resamples with NaN are left out.
        name: of the statistic.
        prefix: of the names of the ends.
    """
    ends = draws[1:][~np.isnan(draws[1:])]
    low, high = np.quantile(ends, [0.025, 0.975]) if len(ends) else (np.nan, np.nan)
    return {name: float(draws[0]), f"{prefix}low": float(low), f"{prefix}high": float(high)}


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


def mean_or_nan(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Divide sums by counts; NaN where nothing was counted."""
    return np.divide(sums, counts, out=np.full_like(sums, math.nan), where=counts > 0)


def ends(name: str) -> list[str]:
    """Return the columns of a value and its interval."""
    return [name, f"{name}_low", f"{name}_high"]


def named(name: str, found: Mapping[str, float]) -> dict[str, float]:
    """Return `value`, `low` and `high` as these columns."""
    return dict(zip(ends(name), (found["value"], found["low"], found["high"]), strict=True))


def named_interval(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return these columns of a row as `value`, `low` and `high`, a number alone as `value`."""
    columns = dict(zip(("value", "low", "high"), ends(name), strict=True))
    found = {end: row[column] for end, column in columns.items() if column in row}
    return {"value": row[name]} | found
