"""The generated parts of the README, as Markdown, from the published tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from utils.environment import RESULTS
from utils.policy_look import in_order, label
from utils.policy_runs import rewards_of
from utils.readings import PICKED
from utils.results import GLOSSARY, read_json
from utils.wording import with_interval

PROFILE = "quick"  # the profile of the first run, whose published runs are summarised
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
        "policies": _policy_table(results),
        "results": _quick_table(results),
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
    return published_table(results, f"test_{kind}").set_index("policy")


def study_table(results: Path) -> pd.DataFrame:
    """Return the reward-model study, a row per arm."""
    return pd.read_csv(results / "tables" / "09_study.csv").set_index("arm")


def published_table(results: Path, name: str = "policies") -> pd.DataFrame:
    """Return one of the tables of notebook 06."""
    return pd.read_csv(results / "tables" / f"06_{name}.csv")


def _policy_table(results: Path) -> str:
    """Show the policies and controls of the study under their own reward, the judge, the reader.

    The reader has rated one seed of an arm. Greedy ones are left out.
    """
    table = published_table(results).set_index("policy")
    blind = published_table(results, "blind_policies").set_index("policy")
    picks = published_table(results, "best_of_n").set_index(["proxy", "n"])
    lines = [
        "| policy | seeds | own reward, gain | judge, gain | judge, win rate "
        "| blind rating, seed 0 | blind win rate, seed 0 | KL, nats | length |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for policy in in_order(name for name in table.index if not name.endswith("greedy")):
        row, own = table.loc[policy], rewards_of(policy).get("own", "").removeprefix("reward_")
        arm = row["group"] == "arm"
        cells = [f"{row['seeds']}" if arm else ""]
        cells += [with_interval(row, f"gain_{own}") if own else ""]
        cells += [with_interval(row, "gain_judge"), f"{row['win_rate']:.0%}"]
        cells += _blind_cells(blind, f"{policy}_s0" if arm else policy)
        cells += ["" if pd.isna(row["kl"]) else f"{row['kl']:.1f}", f"{row['length']:.0f}"]
        lines.append(f"| {label(policy)} | {' | '.join(cells)} |")
    row = picks.loc["scalar", 16]
    cells = ["", *(with_interval(row, name, "+.2f") for name in ("reward_gain", "judge_gain"))]
    cells += [f"{blind.loc[PICKED, 'judge_win_rate']:.0%}", *_blind_cells(blind, PICKED)]
    cells += [f"at most {row['kl']:.2f}", f"{row['length']:.0f}"]
    return "\n".join([*lines, f"| {label(PICKED)} | {' | '.join(cells)} |"])


def _blind_cells(blind: pd.DataFrame, policy: str) -> list[str]:
    """Return mean blind rating and win rate against SFT, blank for what was not rated."""
    if policy not in blind.index:
        return ["", ""]
    row = blind.loc[policy]
    return [with_interval(row, "rating", ".2f"), with_interval(row, "win_rate", ".0%")]


def _quick_table(results: Path) -> str:
    """Show the policies of the first run."""
    tables = {kind: test_table(results, kind) for kind in KINDS}
    lines = [
        "| policy | scalar reward, difference to SFT | ten-class reward, difference to SFT "
        "| KL, nats | length, tokens | finished |",
        "|---|---|---|---|---|---|",
    ]
    for policy, name in POLICIES.items():
        row = tables["scalar"].loc[policy]
        cells = ["0" if policy == "sft" else _interval(tables[kind].loc[policy]) for kind in KINDS]
        kl = "" if pd.isna(row["kl"]) else f"{row['kl']:.1f}"
        cells += [kl, f"{row['length']:.0f}", f"{row['finished']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(row: pd.Series) -> str:
    return f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"


def _reward_table(results: Path) -> str:
    """Show the reward models that the first run's policies were trained against."""
    lines = [
        "| reward model | accuracy, all pairs | accuracy, pairs of two samples "
        "| -log P(chosen wins) |",
        "|---|---|---|---|",
    ]
    for kind, name in {"scalar": "scalar", "ordinal": "ten classes"}.items():
        metrics = read_json(results / f"{PROFILE}-reward_{kind}" / "run.json")["metrics"]
        cells = [_cell(metrics[n]) for n in ("accuracy", "accuracy_model_pairs", "nll")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
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
            cells = [with_interval(row, name, ".3f") for name in ("accuracy", "model_pairs", "nll")]
            cells.append(f"{row['ece']:.3f}")
            lines.append(f"| {row['label']} | {row['seeds']} | {' | '.join(cells)} |")
    for name, row in rules[rules["reads_text"]].set_index("rule").iterrows():
        cells = [with_interval(row, column, ".3f") for column in ("accuracy", "model_pairs")]
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
            with_interval(row, column, "+.3f") for column in ("model_pairs", "accuracy")
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
