"""The generated parts of the README, as Markdown, from the published tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from utils.environment import RESULTS
from utils.intervals import named_interval
from utils.results import GLOSSARY, read_json

PROFILE = "quick"  # the profile whose published runs are summarised
KINDS = ("scalar", "ordinal")
# Arms of the README's table.
HEADLINE = ("margin", "pairwise", "anchored", "plackett_luce", "margin_light", "pairwise_light")
POLICIES = {
    "sft": "SFT, 4 bits (where both policies start)",
    "sft_best": "SFT at its best temperature",
    "sft_greedy": "SFT, greedy",
    "sft_16bit": "SFT, 16 bits",
    "align_scalar": "aligned with the scalar reward",
    "align_ordinal": "aligned with the ten-class reward",
}


def render(results: Path = RESULTS) -> dict[str, str]:
    """Return the generated parts of the README by name, as Markdown."""
    return {
        "results": _policy_table(results),
        "answer": _answer(results),
        "reward-models": _reward_table(results),
        "study": _study_table(results),
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


def test_table(results: Path, kind: str) -> pd.DataFrame:
    """Return the test comparison under one reward model, a row per policy."""
    return pd.read_csv(results / "tables" / f"06_test_{kind}.csv").set_index("policy")


def study_table(results: Path) -> pd.DataFrame:
    """Return the reward-model study, a row per arm."""
    return pd.read_csv(results / "tables" / "09_study.csv").set_index("arm")


def _policy_table(results: Path) -> str:
    tables = {kind: test_table(results, kind) for kind in KINDS}
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
        table = test_table(results, kind)
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
    if all(test_table(results, kind).loc["sft_best", "low"] <= 0 for kind in KINDS):
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


def _reward_table(results: Path) -> str:
    """Show the reward models that this page's policies were trained against."""
    lines = [
        "| reward model | accuracy, all pairs | accuracy, pairs of two samples "
        "| -log P(chosen wins) |",
        "|---|---|---|---|",
    ]
    for kind, label in {"scalar": "scalar", "ordinal": "ten classes"}.items():
        metrics = read_json(results / f"{PROFILE}-reward_{kind}" / "run.json")["metrics"]
        cells = [_cell(metrics[name]) for name in ("accuracy", "accuracy_model_pairs", "nll")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _study_table(results: Path) -> str:
    """Show the headline arms of the study, and the rules to beat."""
    lines = [
        "| reward model | seeds | accuracy, all pairs | accuracy, pairs of two samples "
        "| -log P(chosen wins) | calibration error |",
        "|---|---|---|---|---|---|",
    ]
    study, rules = study_table(results), pd.read_csv(results / "tables" / "09_rules.csv")
    for arm in HEADLINE:
        if arm in study.index:
            row = study.loc[arm]
            cells = [
                _cell(named_interval(row, name)) for name in ("accuracy", "model_pairs", "nll")
            ]
            cells.append(f"{row['ece']:.3f}")
            lines.append(f"| {row['label']} | {row['seeds']} | {' | '.join(cells)} |")
    for name, row in rules[rules["reads_text"]].set_index("rule").iterrows():
        cells = [_cell(named_interval(row, column)) for column in ("accuracy", "model_pairs")]
        lines.append(f"| rule: {name.replace('_', ' ')} | | {' | '.join(cells)} | | |")
    return "\n".join([*lines, *_references(results)])


def _references(results: Path) -> list[str]:
    """Say what it changes if references count less in training, if the study has it."""
    path = results / "tables" / "09_references.csv"
    if not path.exists():
        return []
    lines = ["", "The references teach a shortcut; on the same pairs and seeds,", ""]
    for _, row in pd.read_csv(path).iterrows():
        between, everything = (
            "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**named_interval(row, column))
            for column in ("model_pairs", "accuracy")
        )
        lines.append(
            f"- {row['label']}: {between} between two samples, {everything} on all pairs, against "
            f"the `{row['reference']}` arm."
        )
    return lines


def _cell(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


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
