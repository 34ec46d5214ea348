"""What the tables of evaluated policies say, in sentences made from their numbers.

Every function returns Markdown, and says so where nothing is published to make sentences from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from utils.intervals import TINY
from utils.policy_arms import ARMS, AVERAGE, HEADLINE
from utils.policy_look import in_order, label
from utils.policy_runs import rewards_of
from utils.targets import target_words
from utils.wording import listed, verdict, with_interval

ZERO = ("above zero", "below zero", "inconclusive")
NONE = "No policy is published yet."


def gain_words(table: pd.DataFrame) -> str:
    """Say what each arm of `policy_table` gains under its own reward and the judge."""
    lines = []
    for arm, rows in _by_arm(table):
        row = rows.iloc[0]
        own = f"under its own reward model {_judgement(row, f'gain_{ARMS[arm].reward}')}; "
        own = own if "own" in rewards_of(arm) else ""
        agree = "all seeds have its sign" if row["gain_judge_agree"] == 1 else "the seeds disagree"
        lines.append(
            f"**{label(arm)}**: {own}under the judge {_judgement(row, 'gain_judge')} "
            f"({agree if row['seeds'] > 1 else 'one seed'})."
        )
    return listed(lines, NONE)


def best_of_n_words(best: pd.DataFrame, table: pd.DataFrame) -> str:
    """Hold the largest n of `best_of_n_table` against the arm's row of `policy_table`."""
    lines = []
    for arm, rows in _by_arm(table):
        if arm in HEADLINE:
            policy, pick = rows.iloc[0], best[best["proxy"] == arm].sort_values("n").iloc[-1]
            lines.append(
                f"Under the judge, the best of {pick['n']} by the {label(arm)} gains "
                f"{_judgement(pick, 'judge_gain')}, at {pick['kl']:.1f} nats and "
                f"{pick['length']:.0f} tokens; the policy gains {_judgement(policy, 'gain_judge')},"
                f" at {policy['kl']:.1f} nats and {policy['length']:.0f} tokens."
            )
    return listed(lines, NONE)


def average_words(table: pd.DataFrame) -> str:
    """Hold the averages of seeds in `policy_table` against their arms: the gain, and its price."""
    lines = []
    for arm, rows in _by_arm(table):
        averages = table[table["policy"] == f"{arm}_{AVERAGE}"]
        for _, average in averages.iterrows():
            own, alone = f"gain_{ARMS[arm].reward}", rows.iloc[0]
            prices = (row[own] / math.sqrt(row["kl"]) for row in (average, alone))
            lines.append(
                f"**{label(arm)}**: the average of the seeds gains {with_interval(average, own)} "
                f"under its own reward model and {with_interval(average, 'gain_judge')} under the "
                f"judge at {average['kl']:.1f} nats; a seed alone {with_interval(alone, own)} and "
                f"{with_interval(alone, 'gain_judge')} at {alone['kl']:.1f}. For the root of a nat "
                "the own gain is {:.2f} against {:.2f}.".format(*prices)
            )
    return listed(lines, "No average is published yet.")


def level_words(levels: pd.DataFrame) -> str:
    """Say of each pair of `level_table` with several seeds which arm is better under the judge."""
    lines, words = [], ("better", "worse", "not clearly different")
    pairs = levels.groupby(["first", "second"], sort=False) if len(levels) else []
    for (first, second), part in pairs:
        raw, equal = (_row(part, name) for name in ("raw", "length"))
        if not raw["seeds"] > 1:
            continue
        agree = "The seeds agree" if raw["seeds_agree"] == 1 else "The seeds do not agree in sign"
        lines.append(
            f"**{label(second)}** against **{label(first)}**: {_span(raw)} under the judge, "
            f"**{verdict(raw['low'], raw['high'], words)}**; at equal length {_span(equal)}, "
            f"{verdict(equal['low'], equal['high'], words)}. KL {raw['kl_second']:.1f} against "
            f"{raw['kl_first']:.1f} nats, length {raw['length_second']:.0f} against "
            f"{raw['length_first']:.0f} tokens; {raw['seeds']:.0f} seeds. {agree}."
        )
    return listed(lines, "The arms to compare are not published yet.")


def length_words(lengths: pd.DataFrame, regression: pd.DataFrame) -> str:
    """Say what `length_table` and `regression_table` leave of each arm's gain under the judge."""
    lines = []
    for arm, part in _by_arm(lengths):
        part = part[part["reward"] == "judge"]
        raw, equal, both = (_row(part, name) for name in ("raw", "length", "length and finish"))
        fits = regression[(regression["policy"] == arm) & (regression["reward"] == "judge")]
        fit = fits.iloc[0]
        lines.append(
            f"**{label(arm)}**, {raw['length_change']:+.0f} tokens: {raw['value']:+.2f} as it is, "
            f"{_span(equal)} at equal length ({verdict(equal['low'], equal['high'], ZERO)}; "
            f"{equal['matched']:.0%} of the completions, which gain {equal['raw_there']:+.2f} "
            f"unmatched), {_span(both)} if the ending is matched too "
            f"({verdict(both['low'], both['high'], ZERO)}), and by regression "
            f"{_judgement(fit, 'unchanged')}. Ten tokens more: {fit['per_10_tokens']:+.2f}; an "
            f"ending: {fit['per_finish']:+.2f}."
        )
    return listed(lines, NONE)


def temperature_words(table: pd.DataFrame) -> str:
    """Say what of each arm's gain in `temperature_table` a lower temperature has not for free."""
    lines = []
    for arm, part in _by_arm(table):
        least = part.loc[part["judge"].idxmin()]
        lines.append(
            f"{label(arm)}: {(part['judge_low'] > TINY).sum()} of {len(part)} comparisons under "
            f"the judge are above zero; the least is {least['decoding']} against "
            f"{label(least['against'])}: {_judgement(least, 'judge')}."
        )
    return listed(lines, NONE)


def category_words(table: pd.DataFrame) -> str:
    """Say in how many categories of `policy_category_table` each arm gains under the judge."""
    lines = []
    for arm, part in _by_arm(table):
        own = part[part["reward"] == "judge"]
        least, most = own.loc[own["value"].idxmin()], own.loc[own["value"].idxmax()]
        lines.append(
            f"{label(arm)}: of {len(own)} categories {(own['value'] > 0).sum()} gain, "
            f"{(own['low'] > TINY).sum()} clearly, and {(own['high'] < -TINY).sum()} clearly lose; "
            f"least {least['category']} ({least['value']:+.2f}), most {most['category']} "
            f"({most['value']:+.2f})."
        )
    return listed(lines, "No policy is published yet, or the set has no categories.")


def arm_target_words(targets: pd.DataFrame) -> str:
    """Say which targets of `target_table` each arm, and each average of seeds, reaches."""
    lines = []
    for arm, part in targets.groupby("arm", sort=False) if len(targets) else ():
        count = f"{part['reached'].sum()} of {len(part)} targets reached"
        lines.append(f"**Aligned with the {label(arm)}**, {count}:")
        lines.append(target_words(part))
    return "\n\n".join(lines) or "The policies of the study are not published yet."


def control_words(gains: pd.DataFrame) -> str:
    """Say of a run's `gains_table` what each policy gains over SFT, and beyond its temperature."""
    return listed(
        f"`{row['policy']}` under the {row['reward']} reward: **{row['difference']:+.2f}** to SFT "
        f"({verdict(row['low'], row['high'], ZERO)}), win rate {row['win_rate']:.2f}; "
        f"**{row['beyond_best_value']:+.2f}** to SFT at its best temperature "
        f"({verdict(row['beyond_best_low'], row['beyond_best_high'], ZERO)})"
        for row in gains.to_dict("records")
    )


def run_words(tables: Mapping[str, pd.DataFrame]) -> str:
    """Say what each aligned policy of a run gained under its own reward model, and at what price.

    Args:
        tables: of `evaluation.compare` by reward model; the first row is the SFT model's.
    """
    lines, words = [], ("rose by", "fell by", "did not clearly change:")
    for kind, table in tables.items():
        sft, row = table.iloc[0], table.set_index("policy").loc[f"align_{kind}"]
        lines.append(
            f"**{kind}**: the mean reward on held-out prompts "
            f"{verdict(row['low'], row['high'], words)} {row['difference']:+.2f} SFT sd "
            f"[{row['low']:+.2f}, {row['high']:+.2f}] at {row['kl']:.1f} nats; length "
            f"{row['length']:.0f} tokens against {sft['length']:.0f}."
        )
    return listed(lines)


def _by_arm(table: pd.DataFrame, column: str = "policy") -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the rows of each arm, in the order of the study; not those of controls."""
    for arm in in_order(table[column].unique() if len(table) else ()):
        if arm in ARMS:
            yield arm, table[table[column] == arm]


def _row(table: pd.DataFrame, method: str) -> pd.Series:
    return table.set_index("method").loc[method]


def _judgement(row: Mapping[str, Any], name: str) -> str:
    return f"{with_interval(row, name)}, {verdict(row[f'{name}_low'], row[f'{name}_high'], ZERO)}"


def _span(row: Mapping[str, float]) -> str:
    return f"{row['value']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
