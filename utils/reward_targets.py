"""What the study of reward models was hoped to show, and what it shows."""

from __future__ import annotations

import pandas as pd

from utils.intervals import TINY, named_interval
from utils.study import HEADLINE_SEEDS
from utils.targets import target_row

# Accuracy of the best arm: column -> where, and at least what.
BEST = {"model_pairs": ("between samples", 0.84), "accuracy": ("on all pairs", 0.88)}
BEHIND = -0.01  # how far the ten-class arm may be behind the scalar one in accuracy
# Of the ten-class arm: column -> what it is, and below what.
BELOW = {"nll": ("-log P", 0.42), "ece": ("calibration error", 0.05)}
MINUTES = 8.0  # of training, two cores
LEVELS = ("margin", "pairwise")  # the arms that are Level 1 and Level 2


def reward_targets(
    table: pd.DataFrame, against: pd.DataFrame, differences: pd.DataFrame
) -> pd.DataFrame:
    """Hold the study against its targets.

    A target is judged by its value but for the first, which is about intervals. The best arm is
    that of the arms with all seeds.

    Args:
        table: of `accuracy_table`.
        against: of `versus_rules`, the same arms.
        differences: of `difference_table`; has a row of the second of `LEVELS` against the first.

    Returns:
        A row per target as `target_words` reads it.
    """
    above = against.loc[against["pairs"] == "all pairs", "difference_low"] > TINY
    name = "arms clearly above the best rule, all pairs"
    rows = [target_row(name, {"value": above.sum()}, "at least", len(above), ".0f")]
    full = table[table["seeds"] == len(HEADLINE_SEEDS)]
    for column, (place, bound) in BEST.items() if len(full) else ():
        best = full.loc[full[column].idxmax()]
        name = f"best accuracy {place} ({best['label']})"
        rows.append(target_row(name, named_interval(best, column), "at least", bound, ".3f"))
    first, second = LEVELS
    pair = (differences["reference"] == first) & (differences["arm"] == second)
    behind = named_interval(differences[pair].iloc[0], "accuracy")
    name = "accuracy of ten classes less that of the scalar arm"
    rows.append(target_row(name, behind, "at least", BEHIND, "+.3f"))
    ten = table.set_index("arm").loc[second]
    for column, (name, bound) in BELOW.items():
        found = named_interval(ten, column)
        rows.append(target_row(f"{name}, {ten['label']}", found, "below", bound, ".3f"))
    for arm in table[table["arm"].isin(LEVELS)].dropna(subset="minutes").to_dict("records"):
        name = f"minutes of training, {arm['label']}"
        rows.append(target_row(name, {"value": arm["minutes"]}, "at most", MINUTES, ".1f"))
    return pd.DataFrame(rows)
