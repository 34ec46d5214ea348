"""Whether a reward model's own probabilities are right: those of pairs, and those of ratings.

All intervals are a bootstrap over prompts. A resample of prompts is kept as a weight for each row,
how often it was drawn, so that the ranks that are made anew in each resample cost no sorting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from utils.rewards.losses import CLASSES, rating_entropy
from utils.statistics.bootstrap import cluster_draws, clustered_interval, percentile_interval

CHUNK = 250  # resamples at a time: small enough for the processor's cache
MIDDLE = (4, 6)  # where a model that is squeezed into the middle would put its ratings


def reliability(
    p: Sequence[float], clusters: Sequence[str], bins: int = 10, samples: int = 2000
) -> pd.DataFrame:
    """Compare how sure a reward model is of its choice with how often the choice is right.

    P(chosen beats rejected) has only one outcome, for the better response is called chosen, so
    nothing can be read from outcomes by p. A pair has no natural order, however: seen from its
    other side it has 1 - p and the opposite outcome, which is the same information again, and a
    curve over both sides is only the mirror image of itself about (1/2, 1/2). So each pair counts
    once, as the model's own bet: confidence max(p, 1 - p), right if p > 1/2, half right at 1/2.

    Bins hold about as many pairs each; equal confidences share one, so there may be fewer bins.
    The interval of a bin without a mistake has no width, which says little if n is small.

    Args:
        p: P(chosen beats rejected) of each pair.
        clusters: the prompt of each pair.
        bins: how many.
        samples: bootstrap resamples.

    Returns:
        A row per bin, the least confident first: mean `confidence`, `accuracy`, `low`, `high`, `n`.
    """
    confidence, right = _bets(p)
    frame = pd.DataFrame({"confidence": confidence, "right": right, "cluster": list(clusters)})
    place = _bins(confidence, bins)
    rows = []
    for _, part in frame.groupby(place):
        found = clustered_interval(part["right"], part["cluster"], samples)
        rows.append({"confidence": part["confidence"].mean(), **found})
    return pd.DataFrame(rows).rename(columns={"value": "accuracy"})


def expected_calibration_error(p: Sequence[float], bins: int = 10) -> float:
    """Mean |accuracy - confidence| over the bins of `reliability`, weighted by their pairs.

    Naeini et al. 2015; Guo et al. 2017 (arXiv 1706.04599). It is biased upwards: chance alone moves
    the accuracy of a bin of m pairs by about 0.8 sqrt(c (1 - c) / m) from its confidence c, and
    the distance counts whatever its sign. A perfectly calibrated model shows 0.03 with 1,450 pairs
    in ten bins, more where pairs of a prompt err together. There is no interval: a resample adds
    that bias once more, so a bootstrap's lies too high and may leave out the value.

    Args:
        p: P(chosen beats rejected) of each pair.
        bins: of about equal count.
    """
    confidence, right = _bets(p)
    place = _bins(confidence, bins)
    return float(np.abs(np.bincount(place, right - confidence)).sum() / len(right))


def rating_calibration(rows: Sequence[Mapping[str, Any]], samples: int) -> pd.DataFrame:
    """Return what a ten-class model expects of responses by the rating they were given.

    Even a calibrated model lies off the diagonal here, towards the mean: see `squeeze`.

    Args:
        rows: of a ten-class run's `samples.jsonl`.
        samples: bootstrap resamples.

    Returns:
        A row per given `rating` (to the nearest of 1..10) that occurs: mean `expected` rating with
        `low` and `high`, its standard deviation `sd` over responses, and `n`.
    """
    frame = _ten_class(rows)
    table = []
    for rating, part in frame.groupby(frame["rating"].round().astype(int)):
        found = clustered_interval(part["reward"], part["prompt_id"], samples)
        sd = part["reward"].std(ddof=0)
        table.append({"rating": rating, **found, "sd": sd})
    table = pd.DataFrame(table).rename(columns={"value": "expected"})
    return table[["rating", "expected", "low", "high", "sd", "n"]]


def squeeze(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Tell whether the expected rating E[r] is squeezed into the middle of the scale.

    The slope of E[r] on the given rating is below 1 for every model that cannot see all of the
    rating: for a calibrated one it is the share of variance explained. The slope the other way
    round is what tells a squeezed model: 1 if calibrated, above 1 if E[r] varies too little for
    what it knows, below 1 if it varies too much.

    Args:
        rows: of a ten-class run's `samples.jsonl`.

    Returns:
        For `expected` and `given` ratings: `mean_*` and `sd_*` over responses, and `middle_*`, the
        share in [4, 6]; `slope` of expected on given and `slope_back` of given on expected (NaN
        where one of them does not vary); and `n`.
    """
    frame = _ten_class(rows)
    shown = {"expected": frame["reward"].to_numpy(), "given": frame["rating"].to_numpy(float)}
    found: dict[str, float] = {}
    for name, values in shown.items():
        found |= {f"mean_{name}": float(values.mean()), f"sd_{name}": float(values.std())}
        found[f"middle_{name}"] = float(np.mean((values >= MIDDLE[0]) & (values <= MIDDLE[1])))
    covariance = np.cov(*shown.values(), ddof=0)
    for name, variance in {"slope": covariance[1, 1], "slope_back": covariance[0, 0]}.items():
        found[name] = float(covariance[0, 1] / variance) if variance else float("nan")
    return found | {"n": len(frame)}


def entropy_against_error(
    rows: Sequence[Mapping[str, Any]], samples: int
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Tell whether a ten-class model errs more where its distribution is wider.

    Args:
        rows: of a ten-class run's `samples.jsonl`.
        samples: bootstrap resamples.

    Returns:
        A row per `quarter` of the responses, the surest first: mean `entropy` of the predicted
        distribution in nats, mean `error` |E[r] - given rating| with `low` and `high`, and `n`; and
        Spearman's rank correlation of entropy and error with its interval (NaN if one is constant).
    """
    frame = _ten_class(rows)
    logits = torch.tensor(frame["logits"].tolist(), dtype=torch.float64)
    spread = rating_entropy(logits).numpy().round(12)
    error = (frame["reward"] - frame["rating"]).abs().to_numpy(float)
    place = _bins(spread, 4)
    table = []
    for quarter, part in frame.groupby(place):
        found = clustered_interval(error[part.index], part["prompt_id"], samples)
        mean = float(spread[part.index].mean())
        table.append({"quarter": quarter + 1, "entropy": mean, **found})
    table = pd.DataFrame(table).rename(columns={"value": "error"})

    def correlation(weights: np.ndarray) -> np.ndarray:
        total = weights.sum(axis=1, keepdims=True)
        a, b = (_mid_ranks(values, weights) - total / 2 for values in (spread, error))
        with np.errstate(invalid="ignore"):
            norm = np.sqrt((weights * a * a).sum(axis=1) * (weights * b * b).sum(axis=1))
            return (weights * a * b).sum(axis=1) / norm

    cluster, drawn = cluster_draws(frame["prompt_id"], samples)
    parts = (drawn[i : i + CHUNK, cluster].astype(float) for i in range(0, len(drawn), CHUNK))
    draws = np.concatenate([correlation(weights) for weights in parts])
    return table, {**percentile_interval(draws), "n": len(frame)}


def _bets(p: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    p = np.asarray(p, dtype=float)
    if not len(p) or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(
            f"calibration is about probabilities in [0, 1] of one pair or more, got {len(p)} "
            "values, or some outside or NaN: pass the column p of `pair_metrics`, not rewards"
        )
    # Rounded, so that p and 1 - p of another pair are the same confidence.
    return np.maximum(p, 1 - p).round(12), (np.sign(p - 0.5) + 1) / 2


def _ten_class(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows).reset_index(drop=True)
    if frame.empty or set(frame["logits"].map(len)) != {CLASSES}:
        raise ValueError(
            f"the calibration of ratings needs rows with {CLASSES} logits each: pass the "
            "samples.jsonl of a run of kind ordinal; a scalar reward is on no rating scale"
        )
    return frame


def _mid_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Rank of each row as if repeated by its weight, in each resample; equal values share one."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    first = np.flatnonzero(np.diff(group[order], prepend=-1))
    counts = np.add.reduceat(weights[:, order], first, axis=1)
    return (counts.cumsum(axis=1) - counts / 2)[:, group]


def _bins(values: np.ndarray, bins: int) -> np.ndarray:
    """Return the bin, 0.., of each row; bins hold about as many each, equal values share one."""
    ranks = _mid_ranks(values, np.ones((1, len(values))))[0]
    return (bins * ranks // len(values)).astype(int)
