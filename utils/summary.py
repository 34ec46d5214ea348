"""Headline numbers from the published runs, and the README's generated parts.

`python -m utils.summary` rewrites `results/summary.json` and the parts of the README between
`<!-- NAME -->` and `<!-- /NAME -->`; `make publish` calls it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from utils.environment import quiet
from utils.profiles import PROFILES
from utils.results import GLOSSARY, ROOT, read_json, write_json

RESULTS = ROOT / "results"
PROFILE = "quick"  # the profile whose published runs are summarised
KINDS = ("scalar", "ordinal")
POLICIES = {
    "sft": "SFT, 4 bits (where both policies start)",
    "sft_best": "SFT at its best temperature",
    "sft_greedy": "SFT, greedy",
    "sft_16bit": "SFT, 16 bits",
    "align_scalar": "aligned with the scalar reward",
    "align_ordinal": "aligned with the ten-class reward",
}


def headline(results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return `{name: {value, low, high, n, seeds, run}}`; low to high is the 95% interval."""
    found: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        run = f"{PROFILE}-reward_{kind}"
        info = read_json(results / run / "run.json")
        for metric, interval in info["metrics"].items():
            found[f"rm_{kind}.{metric}"] = _entry(interval, run)
        run = f"{PROFILE}-align_{kind}"
        table = _test_table(results, kind)
        row, sft = table.loc[f"align_{kind}"], table.loc["sft"]
        gain = {"value": row["difference"], "low": row["low"], "high": row["high"], "n": row["n"]}
        found[f"align_{kind}.gain_sd"] = _entry(gain, run)
        for name, value in {
            "kl": row["kl"],
            "length_ratio": row["length"] / sft["length"],
            "distinct2_ratio": row["distinct_2"] / sft["distinct_2"],
        }.items():
            found[f"align_{kind}.{name}"] = _entry({"value": value, "n": row["n"]}, run)
    for row in pd.read_csv(results / "tables" / "06_gains.csv").to_dict("records"):
        run, judged = f"{PROFILE}-{row['policy']}", f"{row['policy']}.beyond_best_{row['reward']}"
        beyond = {key: row[f"beyond_best_{key}"] for key in ("value", "low", "high")}
        found[judged] = _entry({**beyond, "n": found[f"{row['policy']}.gain_sd"]["n"]}, run)
    return found | _rules(results) | _cost(results)


def render(summary: dict[str, dict[str, Any]], results: Path = RESULTS) -> dict[str, str]:
    """Return the generated parts of the README by name, as Markdown."""
    return {
        "results": _policy_table(results),
        "answer": _answer(results),
        "reward-models": _reward_table(summary),
        "cost": _cost_table(results),
        "memory": _memory_table(results),
        "glossary": "\n".join(
            ["| name | meaning |", "|---|---|"]
            + [f"| `{name}` | {meaning} |" for name, meaning in GLOSSARY.items()]
        ),
    }


def fill(text: str, parts: dict[str, str]) -> str:
    """Replace what stands between each part's two markers.

    Raises:
        ValueError: if a part's markers are missing.
    """
    for name, part in parts.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        text, count = re.subn(
            pattern, lambda m, p=part: m[1] + p + m[2], text, count=1, flags=re.DOTALL
        )
        if not count:
            raise ValueError(f"the README has no markers for the part {name!r}")
    return text


def update() -> None:
    """Rewrite `results/summary.json` and the generated parts of the README."""
    quiet()  # before the libraries below are imported
    from utils.memory_plan import plan_table

    plan_table(PROFILES["full"]).to_csv(RESULTS / "tables" / "memory_plan.csv", float_format="%.4g")
    summary = headline()
    write_json(RESULTS / "summary.json", summary)
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(), render(summary)))


def _entry(interval: dict[str, float], run: str) -> dict[str, Any]:
    rounded = {
        key: None if interval.get(key) is None else round(float(interval[key]), 4)
        for key in ("value", "low", "high")
    }
    return {**rounded, "n": int(interval["n"]), "seeds": 1, "run": run}


def _rules(results: Path) -> dict[str, dict[str, Any]]:
    rules = pd.read_csv(results / "tables" / "01_rules.csv").set_index(["pairs", "rule"])
    row = rules.loc[("all pairs", "longer")]
    return {"rule.longer.accuracy": _entry({"value": row["accuracy"], "n": row["n"]}, "01_rules")}


def _cost(results: Path) -> dict[str, dict[str, Any]]:
    cost = read_json(results / f"{PROFILE}-cost.json")
    metrics = pd.read_csv(results / f"{PROFILE}-align_scalar" / "metrics.csv")
    training = pd.read_csv(results / f"{PROFILE}-reward_scalar" / "metrics.csv")
    values = {
        "run_quick_minutes": sum(entry["seconds"] for entry in cost.values()) / 60,
        "step_seconds": metrics["seconds"].median(),
        "reward_model_minutes": training["seconds"].sum() / 60,
        "peak_rss_gb": max(entry["peak_rss_gb"] for entry in cost.values()),
    }
    run = f"{PROFILE}-cost"
    return {f"cost.{name}": _entry({"value": v, "n": 1}, run) for name, v in values.items()}


def _test_table(results: Path, kind: str) -> pd.DataFrame:
    """Return the test comparison under one reward model, a row per policy."""
    return pd.read_csv(results / "tables" / f"06_test_{kind}.csv").set_index("policy")


def _policy_table(results: Path) -> str:
    tables = {kind: _test_table(results, kind) for kind in KINDS}
    lines = [
        "| policy | scalar reward, difference to SFT | ten-class reward, difference to SFT "
        "| KL, nats | length, tokens | finished |",
        "|---|---|---|---|---|---|",
    ]
    for policy, label in POLICIES.items():
        row = tables["scalar"].loc[policy]
        cells = ["0" if policy == "sft" else _interval(tables[kind].loc[policy]) for kind in KINDS]
        kl = "" if pd.isna(row["kl"]) else f"{row['kl']:.1f}"
        cells += [kl, f"{row['length']:.0f}", f"{row['finished']:.2f}"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _answer(results: Path) -> str:
    """Say what the intervals allow, and no more."""
    gains = pd.read_csv(results / "tables" / "06_gains.csv").set_index(["policy", "reward"])
    other = {"scalar": "ordinal", "ordinal": "scalar"}
    lines = []
    for kind in KINDS:
        own, judge = (gains.loc[(f"align_{kind}", k)] for k in (kind, other[kind]))
        table = _test_table(results, kind)
        row, sft = table.loc[f"align_{kind}"], table.loc["sft"]
        lines.append(
            f"- **{POLICIES[f'align_{kind}'].capitalize()}**: its own reward {_moved(own, '')} by "
            f"{_interval(own)} SFT standard deviations, and {_moved(own, 'beyond_best_')} by "
            f"{own['beyond_best_value']:+.2f} [{own['beyond_best_low']:+.2f}, "
            f"{own['beyond_best_high']:+.2f}] against SFT at its best temperature. Under the other "
            f"reward model, which it never saw, it {_moved(judge, '')} by {_interval(judge)}. The "
            f"price: {row['kl']:.1f} nats of KL, and {row['length']:.0f} tokens a completion "
            f"instead of {sft['length']:.0f}."
        )
    rules = pd.read_csv(results / "tables" / "01_rules.csv").set_index(["pairs", "rule"])
    cooler = rules.loc[("between samples", "cooler"), "accuracy"]
    if all(_test_table(results, kind).loc["sft_best", "low"] <= 0 for kind in KINDS):
        lines.append(
            f"- **Doubts.** The raters preferred the cooler of two samples in {cooler:.0%} of the "
            "test pairs between samples, yet neither reward model clearly rates the SFT model "
            "higher at its best temperature: they see less than the raters did. And the policies "
            "became brief; the panel in notebook 06 has short answers that are wrong and score "
            "high. How much of the gain is brevity, these runs do not settle."
        )
    return "\n".join(lines)


def _moved(row: pd.Series, prefix: str) -> str:
    low, high = row[f"{prefix}low"], row[f"{prefix}high"]
    return "rose" if low > 0 else "fell" if high < 0 else "moved inconclusively,"


def _interval(row: pd.Series) -> str:
    return f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"


def _reward_table(summary: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| reward model | accuracy, all pairs | accuracy, pairs of two samples "
        "| -log P(chosen wins) |",
        "|---|---|---|---|",
    ]
    for kind, label in {"scalar": "scalar", "ordinal": "ten classes"}.items():
        cells = []
        for metric in ("accuracy", "accuracy_model_pairs", "nll"):
            entry = summary[f"rm_{kind}.{metric}"]
            cells.append(f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    longer = summary["rule.longer.accuracy"]["value"]
    lines.append(f"| choose the longer | {longer:.3f} | | |")
    return "\n".join(lines)


def _cost_table(results: Path) -> str:
    cost = read_json(results / f"{PROFILE}-cost.json")
    lines = ["| notebook | minutes | peak memory, GB |", "|---|---|---|"]
    lines += [
        f"| `{name}` | {entry['seconds'] / 60:.1f} | {entry['peak_rss_gb']:.1f} |"
        for name, entry in sorted(cost.items())
    ]
    return "\n".join(lines)


def _memory_table(results: Path) -> str:
    plans = pd.read_csv(results / "tables" / "memory_plan.csv", index_col=0)
    lines = [
        "| model | parameters, millions | weights in 16 bits, GB | in 4 bits, GB "
        "| smallest plan, GB | sequences, groups in a pass | its plan, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in plans.iterrows():
        weights = f"{row['weights in 16 bits, GB']:.2f} | {row['weights in 4 bits, GB']:.2f}"
        passes = f"{row['micro-batch']:.0f}, {row['groups']:.0f}"
        lines.append(
            f"| {name} | {row['parameters, millions']:.0f} | {weights} "
            f"| {row['plan with batches of 1, GB']:.1f} | {passes} "
            f"| {row['plan with these, GB']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    update()
