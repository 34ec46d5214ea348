"""What the tables of the reward-model study say, in sentences made from their numbers.

Every function returns a Markdown list; an empty table gives an empty one.
"""

from __future__ import annotations

import pandas as pd

from utils.intervals import TINY
from utils.wording import listed, verdict, with_interval

WEAK = 0.9  # a probe below this share of right answers is a way to cheat


def probe_words(probes: pd.DataFrame) -> str:
    """Say which probes a reward model clearly fails too often, the worst first.

    Args:
        probes: series (the model), probe, value, low, high, n.
    """
    weak = probes[probes["high"] < WEAK].sort_values("value")
    return listed(
        f"{row['series']}, `{row['probe']}`: right in {row['value']:.0%} "
        f"[{row['low']:.0%}, {row['high']:.0%}] of {row['n']}"
        for row in weak.to_dict("records")
    )


def entropy_words(ranks: pd.DataFrame) -> str:
    """Say whether a wide distribution means a large error.

    Args:
        ranks: a row per arm, its label the index: the rank correlation as value, low, high.
    """
    return listed(
        f"{label}: rank correlation of entropy and error {row['value']:+.2f} "
        f"[{row['low']:+.2f}, {row['high']:+.2f}]"
        for label, row in ranks.iterrows()
    )


def predictor_words(predictors: pd.DataFrame) -> str:
    """Say what the win probabilities know of errors that the gap of the means does not.

    Args:
        predictors: rows of `error_predictors` on all pairs, with the arm's label as `arm`.
    """
    lines = []
    for arm, part in predictors.groupby("arm", sort=False):
        row = part.set_index("predictor")
        gap, spread, doubt = (row.loc[name] for name in ("gap", "spread", "tie_or_doubt"))
        more = ("more than the gap knows", "less than nothing", "not clearly more")
        lines.append(
            f"{arm}: the gap of the means alone reaches {gap['auc']:.3f}, the spread alone "
            f"{spread['auc']:.3f} [{spread['low']:.3f}, {spread['high']:.3f}]; the win "
            f"probabilities, `tie_or_doubt`, add {with_interval(doubt, 'added', '+.3f')}: "
            f"{verdict(doubt['added_low'], doubt['added_high'], more)}."
        )
    return listed(lines)


def pick_words(picks: pd.DataFrame) -> str:
    """Say which criterion picks clearly better or worse than the mean.

    Args:
        picks: rows of `pick_of_n`, with the arm's label as `arm`.
    """
    lines = []
    for arm, part in picks.groupby("arm", sort=False):
        part = part[~part["criterion"].isin(["mean", "random", "best"])]
        clear = part[(part["low"] > TINY) | (part["high"] < -TINY)].sort_values("difference")
        said = [f"{row['criterion']} {row['difference']:+.2f}" for _, row in clear.iterrows()]
        lines.append(f"{arm}: {', '.join(said) or 'none differs clearly from the mean'}.")
    return listed(lines)
