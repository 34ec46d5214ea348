"""What a rating distribution adds to its mean: where the order errs, and picking one of n."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from utils.data.pairs import Group
from utils.rewards.losses import (
    CLASSES,
    expected_rating,
    outcome_probabilities,
    rating_entropy,
    rating_minus_spread,
    rating_spread,
    reward_from_logits,
)
from utils.statistics.bootstrap import cluster_draws, clustered_interval, percentile_interval

Row = Mapping[str, Any]  # of a run's samples.jsonl
Criterion = Callable[[Sequence[Row], Tensor], Tensor]  # of the rows and their logits
CRITERIA: dict[str, Criterion] = {
    "mean": lambda rows, logits: reward_from_logits(logits),
    "random": lambda rows, logits: torch.zeros(len(rows)),
    "best": lambda rows, _: torch.tensor([row["rating"] for row in rows], dtype=torch.float64),
    "mean_minus_spread": lambda rows, logits: rating_minus_spread(logits),
}
TIE = 1e-5  # logits are kept to five decimals, so smaller differences are rounding


def doubt_scores(first: Tensor, second: Tensor) -> dict[str, np.ndarray]:
    """Score how doubtful the order of two responses is; every score rises with the doubt.

    Args:
        first: logits of the first responses' ratings, shape (pairs, classes).
        second: the same for the second responses.

    Returns:
        By name, shape (pairs,): `gap`, minus the distance of the expected ratings, for which the
        mean is enough; `spread`, the standard deviation of the difference of independent ratings;
        `spread_given_gap`, minus the distance in units of that spread; `tie_or_doubt`,
        1 - |P(win) - P(lose)|; `entropy`, the mean of the two.
    """
    gap = (expected_rating(first) - expected_rating(second)).abs()
    spread = torch.hypot(rating_spread(first), rating_spread(second))
    win, _, lose = outcome_probabilities(first, second).unbind(-1)
    scores = {
        "gap": -gap,
        "spread": spread,
        "spread_given_gap": -gap / spread.clamp_min(1e-6),  # two certain ratings have no spread
        "tie_or_doubt": 1 - (win - lose).abs(),
        "entropy": (rating_entropy(first) + rating_entropy(second)) / 2,
    }
    return {name: score.numpy() for name, score in scores.items()}


def auc_draws(
    score: Sequence[float], event: Sequence[bool], clusters: Sequence[str], samples: int
) -> np.ndarray:
    """Return the area under the ROC curve of a score for an event: of the rows, and of resamples.

    It is the chance that a row with the event scores above one without, ties half (Hanley and
    McNeil 1982). Resamples are of clusters, the prompts of the rows, for `percentile_interval`.

    Returns:
        Shape (1 + samples,), first of the rows as they are; NaN where no two differ in the event.
    """
    score, event = np.asarray(score, dtype=float), np.asarray(event, dtype=bool)
    cluster, drawn = cluster_draws(clusters, samples)
    member, hits, rest = np.eye(drawn.shape[1])[cluster], score[event][:, None], score[~event]
    # Wins by prompt of the one and of the other row: a resample that draws two prompts k and l
    # times has k * l times their wins, so no resample needs sorting.
    wins = member[event].T @ ((hits > rest) + 0.5 * (hits == rest)) @ member[~event]
    comparisons = (drawn @ member[event].sum(0)) * (drawn @ member[~event].sum(0))
    return ((drawn @ wins) * drawn).sum(1) / np.where(comparisons, comparisons, np.nan)


def error_predictors(rows: Sequence[Row], pairs: pd.DataFrame, samples: int) -> pd.DataFrame:
    """Measure how well the distributions foretell which pairs their means put in the wrong order.

    Args:
        rows: a ten-class run's `samples.jsonl`.
        pairs: what `pair_metrics` gives for the same run.
        samples: bootstrap resamples.

    Returns:
        A row for each of `doubt_scores` as `predictor`, of `pairs` "all" and, if any, "between
        samples": `auc` with `low` and `high`; `added`, its difference to that of `gap`, with paired
        `added_low` and `added_high`; `n` pairs, of them `wrong`, and `ties` of the means left out.
    """
    scores = doubt_scores(*(_logits_of(rows, pairs, side) for side in ("chosen", "rejected")))
    correct, between = pairs["correct"].to_numpy(), pairs["between_samples"].to_numpy(dtype=bool)
    table = []
    for subset, part in {"all": np.ones_like(between), "between samples": between}.items():
        used = part & (correct != 0.5)
        if not used.any():
            continue
        wrong, prompts = correct[used] == 0, pairs.loc[used, "prompt_id"]
        counts = {"n": used.sum(), "wrong": wrong.sum(), "ties": (part & ~used).sum()}
        gap = auc_draws(scores["gap"][used], wrong, prompts, samples)
        for name, score in scores.items():
            areas = auc_draws(score[used], wrong, prompts, samples)
            row = {"predictor": name, "pairs": subset, **percentile_interval(areas, "auc")}
            table.append(row | percentile_interval(areas - gap, "added", "added_") | counts)
    return pd.DataFrame(table)


def pick_of_n(rows: Sequence[Row], groups: Sequence[Group], samples: int) -> pd.DataFrame:
    """Pick one sample of each group by each of `CRITERIA`, and see how the picks were rated.

    Candidates are a group's responses but the reference; groups whose candidates all have the same
    rating are left out. Responses tied for the highest score count in equal parts.

    The criteria are `mean`, the reward; `random`, a tie of all, so its exact expectation; `best`,
    the given rating; and `mean_minus_spread`.

    Args:
        rows: a ten-class run's `samples.jsonl`.
        groups: the test groups that the run was scored on.
        samples: bootstrap resamples.

    Returns:
        A row per criterion with intervals over prompts: `rating` of the pick with `rating_low` and
        `rating_high`; `top`, the share of groups whose pick no candidate beats, with `top_low` and
        `top_high`; `difference`, in rating to the pick by the mean of the same group, with `low`
        and `high`; and `n` groups.
    """
    logits = torch.tensor([row["logits"] for row in rows])
    candidates, ratings = _candidates(rows, groups), CRITERIA["best"](rows, logits).numpy()
    prompts = [rows[indices[0]]["prompt_id"] for indices in candidates]

    def picked(name: str) -> np.ndarray:
        scores = CRITERIA[name](rows, logits).numpy()
        return np.array([_pick(scores[indices], ratings[indices]) for indices in candidates]).T

    table, by_mean = [], picked("mean")[0]
    for name in CRITERIA:
        rating, top = picked(name)
        row: dict[str, Any] = {"criterion": name}
        for column, values in {"rating": rating, "top": top, "": rating - by_mean}.items():
            found = clustered_interval(values, prompts, samples)
            row[column or "difference"] = found["value"]
            row |= {f"{column}_{end}".lstrip("_"): found[end] for end in ("low", "high")}
        table.append(row | {"n": len(prompts)})
    return pd.DataFrame(table)


def _logits_of(rows: Sequence[Row], pairs: pd.DataFrame, side: str) -> Tensor:
    # A frame's texts name responses of a prompt up to copies, which read and score the same.
    scored = {(row["prompt_id"], row["response"], row["reward"]): row["logits"] for row in rows}
    keys = zip(pairs["prompt_id"], pairs[side], pairs[f"{side}_reward"], strict=True)
    logits = [scored.get(key, ()) for key in keys]
    if any(len(values) != CLASSES for values in logits):
        raise ValueError(
            "the pairs are not of the run that the rows are of, or it is not a ten-class run; read "
            "both from the folder of one ten-class run"
        )
    return torch.tensor(logits)


def _candidates(rows: Sequence[Row], groups: Sequence[Group]) -> list[list[int]]:
    """Return, for each group with something to choose, the rows of its samples."""
    names = ("prompt_id", "batch", "place", "response")
    index = {tuple(row[name] for name in names): i for i, row in enumerate(rows)}
    found = []
    for group in groups:
        own = [response for response in group.responses if response.source != "reference"]
        places = [group.responses.index(response) for response in own]
        keys = [(group.prompt_id, group.batch, p, r.text) for p, r in zip(places, own, strict=True)]
        if len({response.rating for response in own}) > 1:
            found.append([index.get(key, -1) for key in keys])
    if not found or any(-1 in indices for indices in found):
        raise ValueError(
            "pick_of_n found no group of differently rated samples, or one that was not scored; "
            "pass the test groups of the data that the run was scored on"
        )
    return found


def _pick(scores: np.ndarray, ratings: np.ndarray) -> tuple[float, float]:
    tied = ratings[scores >= scores.max() - TIE]
    return float(tied.mean()), float((tied == ratings.max()).mean())
