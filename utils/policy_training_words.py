"""What the training logs of policies say, in sentences made from their held-out rows.

Every function returns Markdown, and says so where nothing is published to make sentences from.
"""

from __future__ import annotations

import math

import pandas as pd

from utils.policy_logs import Logs, held_out_rows
from utils.policy_look import label
from utils.wording import listed

# Column: what to say of a value below and above the range of several seeds, and of one within it.
BASELINE_TERMS = {
    "gain": ("gains less", "gains more", "gains as much"),
    "half_step": ("is faster", "is slower", "is as fast"),
    "advantage_rms": ("has smaller advantages", "has larger advantages", "has advantages alike"),
    "grad_norm": ("a smaller gradient norm", "a larger gradient norm", "a like gradient norm"),
}


def scaling_words(averages: pd.DataFrame) -> str:
    """Say of the `chosen` rows of `average_table` what the average has, and a scaled seed."""
    lines = []
    for arm, part in averages[averages["chosen"]].groupby("arm", sort=False):
        said = [
            f"{'one seed' if row['seeds'] == 1 else 'the average of ' + str(row['seeds'])} times "
            f"{row['scale']:g} has {row['reward']:+.2f} (judge {row['judge']:+.2f}) at "
            f"{row['kl']:.1f} nats and {row['length']:.0f} tokens"
            for row in part.to_dict("records")
        ]
        lines.append(f"{label(arm)}: {'; '.join(said)}.")
    return listed(lines, "No average is published yet.")


def baseline_words(table: pd.DataFrame) -> str:
    """Hold the other rows of `baseline_table` against the range of the running mean's seeds."""
    lines, table = [], table.fillna({"half_step": math.inf})  # it never gets there
    reference = table[table["arm"] == "scalar"]
    others = table[table["arm"] != "scalar"] if reference["gain"].mean() > 0 else table.head(0)
    for row in others.to_dict("records"):
        said = []
        for column, words in BASELINE_TERMS.items():
            word, span = _place(row[column], reference[column], words)
            said.append(f"{word} ({column} {_steps(row[column])}; running mean {span})")
        lines.append(f"**{row['baseline']}** {', '.join(said[:-1])}, and {said[-1]}.")
    none = "There is nothing to compare: runs are missing, or the running mean gained nothing."
    return listed(lines, none)


def curve_words(logs: Logs) -> str:
    """Say what the held-out reward of each arm's seeds gained."""
    lines = []
    for arm, own in logs.items():
        rewards = [held_out_rows(log)["eval_reward"] for log in own.values()]
        ends = ", ".join(f"{values.iloc[-1] - values.iloc[0]:+.2f}" for values in rewards)
        best = ", ".join(f"{values.max() - values.iloc[0]:+.2f}" for values in rewards)
        said = f"from step 0 to the end {ends}, at best {best}, seed by seed"
        lines.append(f"{label(arm)}: {said if own else 'not published yet'}.")
    return listed(lines)


def peak_words(peaks: pd.DataFrame) -> str:
    """Say of `peak_table` in how many runs reward and judge part, and what the judge loses."""
    lines = []
    for arm, part in peaks.groupby("arm", sort=False):
        lost = ", ".join(f"{x:.2f}" for x in part["judge_max"] - part["judge_last"])
        lines.append(
            f"{label(arm)}: reward and judge part in {part['parted'].sum()} of {len(part)} runs; "
            f"from its highest point to the end the judge loses {lost}."
        )
    return listed(lines, "No run is published yet.")


def _place(value: float, seeds: pd.Series, words: tuple[str, str, str]) -> tuple[str, str]:
    """Say where a value is to the range of the seeds, and what the range is."""
    low, high = seeds.min(), seeds.max()
    word = words[0] if value < low else words[1] if value > high else words[2]
    return word, f"{_steps(low)} to {_steps(high)}"


def _steps(value: float) -> str:
    return f"{value:.2f}" if value < math.inf else "never"
