"""What the tables of the reward-model study say, in sentences made from their numbers.

Every function returns a Markdown list; an empty table gives an empty one.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from utils.study import ARMS
from utils.wording import COMPARED, listed, verdict, with_interval

WEAK = 0.9  # a probe below this share of right answers is a way to cheat


def difference_words(table: pd.DataFrame, column: str = "accuracy") -> str:
    """Say how each arm of a `difference_table` compares with its reference."""
    return listed(
        f"{row['label']} against {ARMS[row['reference']].label}: "
        f"{with_interval(row, column, '+.3f')}, {_seeds(row['seeds'])}: "
        f"**{verdict(row[f'{column}_low'], row[f'{column}_high'], COMPARED)}**"
        for row in table.to_dict("records")
    )


def reference_words(table: pd.DataFrame) -> str:
    """Say what counting references less changes, of rows of `difference_table`."""
    return listed(
        f"{row['label']}: {with_interval(row, 'model_pairs', '+.3f')} between two samples "
        f"({verdict(row['model_pairs_low'], row['model_pairs_high'], COMPARED)}), "
        f"{with_interval(row, 'accuracy', '+.3f')} on all pairs, against "
        f"{ARMS[row['reference']].label}"
        for row in table.to_dict("records")
    )


def rules_words(against: pd.DataFrame, table: pd.DataFrame) -> str:
    """Say which arms are clearly above the best rule, and which is the best arm.

    Args:
        against: of `versus_rules`.
        table: of `accuracy_table`, the same arms.
    """
    lines = []
    for name, part in against.groupby("pairs", sort=False):
        below = part.loc[~part["above"], "label"]
        clear = f"{part['above'].sum()} of {len(part)} are clearly above `{part['rule'].iloc[0]}`"
        lines.append(f"{name}: {clear}" + (f"; not so: {', '.join(below)}." if len(below) else "."))
    for column, place in {"model_pairs": "between samples", "accuracy": "on all pairs"}.items():
        top = table.loc[table[column].idxmax()]
        lines.append(
            f"The best {place} is **{top['label']}** with {with_interval(top, column, '.3f')}"
        )
    return listed(lines)


def learning_curve_words(curve: pd.DataFrame) -> str:
    """Say what the last doubling of the prompts brought, of a `learning_curve_table`."""
    lines = []
    for (kind, pairs), part in curve.groupby(["kind", "pairs"], sort=False):
        part = part.sort_values("prompts")
        ends = ", ".join(f"{row.value:.3f} with {row.prompts}" for row in part.itertuples())
        lines.append(f"{kind}, {pairs}: {ends} prompts")
        if len(part) > 1:
            before, last = part.iloc[-2], part.iloc[-1]
            overlap = before["high"] >= last["low"] and last["high"] >= before["low"]
            lines[-1] += (
                f"; the last step is worth {last['value'] - before['value']:+.3f}, the intervals "
                f"{'overlap' if overlap else 'are apart'}"
            )
    return listed(lines)


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
        clear = part[(part["low"] > 0) | (part["high"] < 0)].sort_values("difference")
        said = [f"{row['criterion']} {row['difference']:+.2f}" for _, row in clear.iterrows()]
        lines.append(f"{arm}: {', '.join(said) or 'none differs clearly from the mean'}.")
    return listed(lines)


def _seeds(count: Any) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"
