"""Headline numbers from the published runs.

`python -m utils.experiments.summary` rewrites `results/summary.json`; `make publish` calls it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from utils.arms.policies import HEADLINE
from utils.experiments.environment import quiet
from utils.experiments.published import CHOSEN
from utils.files import RESULTS, read_json, write_json
from utils.statistics.bootstrap import named_interval

PROFILE = "quick"  # the profile whose run says what a first run costs
# Name in summary.json -> column of the study's table, and of the rules' the column of their count.
METRICS = {
    "accuracy": "accuracy",
    "accuracy_model_pairs": "model_pairs",
    "nll": "nll",
    "nll_untied": "nll_untied",
    "ece": "ece",
}
# The arms with the losses of the chosen ones that were trained on references, too.
WITH_REFERENCES = {"scalar": "margin", "ordinal": "pairwise"}
# The same of the table of policies.
POLICY_METRICS = {
    "judge_gain": "gain_judge",
    "judge_winrate": "win_rate",
    "judge_winrate_best_temperature": "win_rate_best",
}
# The same of the table of blind ratings, and which of its rows are the headline policies.
BLIND_METRICS = {
    "blind_rating_gain": "gain",
    "blind_winrate": "win_rate",
    "blind_winrate_best_temperature": "win_rate_best",
    "blind_winrate_best_of_16": "win_rate_best_of_16",
    "echo_share": "echo_share",
}
RATED = {
    "align_scalar": ("scalar_s0", "scalar/seed0"),
    "align_ordinal": ("ordinal_s0", "ordinal/seed0"),
    "average_scalar": ("scalar_average", "scalar_average"),
}
RULE_COUNTS = {"accuracy": "n", "model_pairs": "model_pairs_n"}


def headline(results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return `{name: {value, low, high, n, seeds, run}}`; low to high is the 95% interval."""
    return _reward_models(results) | _policies(results) | _readings(results) | _cost(results)


def _table(results: Path, name: str, *index: str) -> pd.DataFrame:
    return pd.read_csv(results / "tables" / f"{name}.csv").set_index([*index])


def _entry(interval: dict[str, float], run: str, seeds: int = 1) -> dict[str, Any]:
    rounded = {
        key: None if pd.isna(interval.get(key)) else round(float(interval[key]), 4)
        for key in ("value", "low", "high")
    }
    return {**rounded, "n": int(interval["n"]), "seeds": int(seeds), "run": run}


def _reward_models(results: Path) -> dict[str, dict[str, Any]]:
    """Read the study's tables: the chosen arms, their like with references, judge and rules."""
    study, rules = _table(results, "09_study", "arm"), _table(results, "09_rules", "rule")
    numbers = {column: rules.loc["longer", n] for column, n in RULE_COUNTS.items()}
    found = {}
    arms = {kind: arm for kind, (arm, _) in CHOSEN.items()}
    arms |= {f"{kind}_references": arm for kind, arm in WITH_REFERENCES.items()}
    for model, arm in arms.items():
        row, run = study.loc[arm], f"cpu/reward_models/{arm}"
        for name, column in METRICS.items():
            count = numbers.get(column, numbers["accuracy"])
            entry = _entry({**named_interval(row, column), "n": count}, run, row["seeds"])
            found[f"rm_{model}.{name}"] = entry
    text = rules[rules["reads_text"]]["model_pairs"].idxmax()
    for name, rule, column in (
        ("rule.longer.accuracy", "longer", "accuracy"),
        ("rule.best_text_rule.accuracy_model_pairs", text, "model_pairs"),
    ):
        row = rules.loc[rule]
        found[name] = _entry(
            {**named_interval(row, column), "n": row[RULE_COUNTS[column]]}, "09_rules"
        )
    row = _table(results, "09_judge", "judge", "pairs").loc[("judge", "all pairs")]
    found["judge.accuracy"] = _entry(row.to_dict(), "cpu/ensemble")
    return found


def _policies(results: Path) -> dict[str, dict[str, Any]]:
    """Read the study's tables: the arms that the report is about."""
    table = _table(results, "06_policies", "policy")
    lengths = _table(results, "06_length", "policy", "reward", "method")
    found = {}
    for arm in HEADLINE:
        row, run = table.loc[arm], f"cpu/policies/{arm}"
        columns = {"gain_sd": f"gain_{arm}"} | POLICY_METRICS
        values = {name: named_interval(row, column) for name, column in columns.items()}
        values["length_matched_gain"] = lengths.loc[(arm, "judge", "length")].to_dict()
        values |= {name: {"value": row[name]} for name in ("kl", "distinct2_ratio")}
        for name, value in values.items():
            found[f"align_{arm}.{name}"] = _entry({"n": row["n"], **value}, run, row["seeds"])
    return found


def _readings(results: Path) -> dict[str, dict[str, Any]]:
    """Read the table of blind ratings, in which each policy is one seed or one average."""
    table = _table(results, "06_blind_policies", "policy")
    return {
        f"{model}.{name}": _entry(
            {**named_interval(table.loc[policy], column), "n": table.loc[policy, "n"]},
            f"cpu/policies/{folder}/test",
        )
        for model, (policy, folder) in RATED.items()
        for name, column in BLIND_METRICS.items()
    }


def _cost(results: Path) -> dict[str, dict[str, Any]]:
    folder = results / PROFILE
    cost = read_json(folder / "cost.json")
    metrics = pd.read_csv(folder / "policies" / "scalar" / "seed0" / "metrics.csv")
    training = pd.read_csv(folder / "reward_models" / "scalar" / "seed0" / "metrics.csv")
    values = {
        "run_quick_minutes": sum(entry["seconds"] for entry in cost.values()) / 60,
        "step_seconds": metrics["seconds"].median(),
        "reward_model_minutes": training["seconds"].sum() / 60,
        "peak_rss_gb": max(entry["peak_rss_gb"] for entry in cost.values()),
    }
    run = f"{PROFILE}/cost.json"
    return {f"cost.{name}": _entry({"value": v, "n": 1}, run) for name, v in values.items()}


if __name__ == "__main__":
    quiet()
    write_json(RESULTS / "summary.json", headline())
