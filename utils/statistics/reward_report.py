"""The tables of the reward-model study, from its published runs alone: no model is loaded.

The seeds of an arm are averaged pair by pair before the bootstrap: intervals are over prompts, and
how far the seeds lie apart is a column of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from utils.arms.rewards import ARMS
from utils.config import PROFILES
from utils.data.pairs import load_data
from utils.data.sources import Pair
from utils.files import ResultsError, RunFolder, read_jsonl
from utils.statistics.bootstrap import clustered_interval, named
from utils.statistics.calibration import expected_calibration_error
from utils.statistics.published_runs import PROFILE
from utils.statistics.reward_runs import ArmRuns, seed_frames, study_arms
from utils.statistics.rules import TEXT_RULES

CURVES = ("margin", "pairwise")  # arms that were also trained on a share of the prompts
SHARES = ("_10", "_25", "_50", "")  # in percent; without a suffix, all
PAIRS = {"accuracy": "all pairs", "model_pairs": "between samples"}  # column -> what it is of
BINS = 10  # of the calibration error


def accuracy_table(
    results: Path, arms: Sequence[str], pairs: Sequence[Pair], samples: int
) -> pd.DataFrame:
    """Measure each arm on the test pairs.

    Args:
        results: the folder of published runs.
        arms: their names; one without runs has no row.
        pairs: the test pairs.
        samples: bootstrap resamples.

    Returns:
        A row per arm: arm, label, kind, `seeds` (how many); with `_low` and `_high`: `accuracy`,
        `model_pairs` (accuracy between two samples of the model), `reference_pairs` (accuracy on
        the others, one of which is a reference), `nll` (a tie is no win)
        and `nll_untied` (given that there is no tie: the kinds compare); `ece`, the calibration
        error, a mean over the seeds; `accuracy_sd` between seeds, blank for one;
        `gap_1`, `gap_2` and `gap_3`, accuracy at a rating gap of up to 1, up to 2, and more;
        and `minutes` of training, mean over the seeds that were trained on more than one thread;
        blank if none.
    """
    found = study_arms(results, arms, pairs)
    return pd.DataFrame([_accuracy_row(arm, found[arm], samples) for arm in found])


def category_table(
    results: Path, arms: Sequence[str], pairs: Sequence[Pair], samples: int
) -> pd.DataFrame:
    """Return accuracy by category, in rows of arm, category, value, low, high and n (pairs)."""
    rows = []
    for arm, seeds in study_arms(results, arms, pairs).items():
        for category, part in seeds.averaged().groupby("category"):
            found = clustered_interval(part["correct"], part["prompt_id"], samples)
            rows.append({"arm": arm, "category": category, **found})
    return pd.DataFrame(rows)


def learning_curve_table(results: Path, pairs: Sequence[Pair], samples: int) -> pd.DataFrame:
    """Return accuracy by the number of training prompts.

    Returns:
        Two rows per arm of `CURVES` and share that has runs: arm, kind, prompts, seeds, `pairs`
        ("all pairs", "between samples"), and the accuracy there as value, low, high and n.
    """
    arms = [f"{arm}{share}" for arm in CURVES for share in SHARES]
    rows = []
    for arm, seeds in study_arms(results, arms, pairs, across_sizes=True).items():
        config, frame = seeds.runs[0].info["config"], seeds.averaged()
        prompts = config["data.train_prompts"]
        if prompts is None:
            prompts = len(load_data(PROFILES[PROFILE].data).prompts("train"))
        row = {"arm": arm, "kind": config["kind"], "prompts": prompts}
        row["seeds"] = len(seeds.runs)
        parts = frame, frame[frame["between_samples"]]
        for name, part in zip(PAIRS.values(), parts, strict=True):
            found = clustered_interval(part["correct"], part["prompt_id"], samples)
            rows.append({**row, "pairs": name, **found})
    return pd.DataFrame(rows)


def difference_table(
    results: Path, arms: Sequence[str], reference: str, pairs: Sequence[Pair], samples: int
) -> pd.DataFrame:
    """Compare arms with a reference arm, pair by pair, over the seeds that both have.

    Returns:
        A row per other arm that has runs: arm, label, reference, `seeds` (how many), and what the
        arm has more than the reference, with `_low` and `_high`: `accuracy`, `model_pairs`, and
        `nll`, blank if the kinds differ, since only ten classes pay for ties.

    Raises:
        ResultsError: if the reference has no runs, or no seed in common with an arm.
    """
    found = study_arms(results, [reference, *arms], pairs)
    if reference not in found:
        raise ResultsError(
            f"the reference arm {reference!r} has no run: publish "
            f"reward_models/{reference}/seed0, or choose a reference that has one"
        )
    base = found.pop(reference)
    rows = [
        {"arm": arm, "label": ARMS[arm].label, "reference": reference}
        | _difference(arm, seeds, reference, base, samples)
        for arm, seeds in found.items()
    ]
    ends = [f"{name}{end}" for name in (*PAIRS, "nll") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["arm", "label", "reference", "seeds", *ends])


def ensemble_accuracy(
    runs: Sequence[RunFolder], pairs: Sequence[Pair], samples: int
) -> dict[str, float]:
    """Return the accuracy of the mean of the seeds' rewards, with its interval.

    Each seed's rewards count in standard deviations over the responses that it scored.
    """
    gaps = []
    for run, frame in zip(runs, seed_frames(runs, pairs), strict=True):
        rewards = [row["reward"] for row in read_jsonl(run.directory / "samples.jsonl")]
        gaps.append((frame["chosen_reward"] - frame["rejected_reward"]) / np.std(rewards))
    correct = (np.sign(np.mean(gaps, axis=0)) + 1) / 2
    return clustered_interval(correct, [pair.prompt_id for pair in pairs], samples)


def versus_rules(
    results: Path, arms: Sequence[str], pairs: Sequence[Pair], rules: pd.DataFrame, samples: int
) -> pd.DataFrame:
    """Hold each arm against the best rule that reads the text, pair by pair.

    The best rule is the most accurate on these very pairs, which favours it a little.

    Args:
        results: the folder of published runs.
        arms: their names; one without runs has no row.
        pairs: the test pairs.
        rules: of `rules_correct`, the same pairs.
        samples: bootstrap resamples.

    Returns:
        A row per arm and kind of pairs ("all pairs", "between samples"): arm, label, seeds, pairs,
        the best `rule` there, `accuracy`, `rule_accuracy`, and `difference`, the first less the
        second, with `_low` and `_high`. The interval is over prompts and leaves out the seeds.
    """
    between = np.array([pair.between_samples for pair in pairs], bool)
    kinds = zip(PAIRS.values(), (np.ones_like(between), between), strict=True)
    found, rows = study_arms(results, arms, pairs), []
    for name, there in kinds:
        accuracies = rules.loc[there, [*TEXT_RULES]].mean()
        if accuracies.isna().all():  # no pair is known to be between samples
            continue
        best = accuracies.idxmax()
        for arm, seeds in found.items():
            frame = seeds.averaged()[there]
            change = frame.assign(difference=frame["correct"] - rules.loc[there, best])
            row = {"arm": arm, "label": ARMS[arm].label, "seeds": len(seeds.runs), "pairs": name}
            row |= {"rule": best, "accuracy": frame["correct"].mean()}
            row |= {"rule_accuracy": accuracies[best]}
            rows.append(row | _interval("difference", change, "difference", samples))
    return pd.DataFrame(rows)


def _accuracy_row(arm: str, seeds: ArmRuns, samples: int) -> dict[str, Any]:
    runs, frame = seeds.runs, seeds.averaged()
    # Rounded first: on a mapped scale a gap of 1 may be a hair above it.
    gaps = np.ceil(frame["gap"].round(6)).clip(upper=3)
    accuracies = pd.Series(rows["correct"].mean() for rows in seeds.frames)
    errors = [expected_calibration_error(rows["p"], BINS) for rows in seeds.frames]
    return {
        "arm": arm,
        "label": ARMS[arm].label,
        "kind": runs[0].info["config"]["kind"],
        "seeds": len(runs),
        **_accuracies(frame, samples),
        **_interval("reference_pairs", frame[~frame["between_samples"]], "correct", samples),
        "accuracy_sd": accuracies.std(),
        **{f"gap_{gap}": frame.loc[gaps == gap, "correct"].mean() for gap in (1, 2, 3)},
        **_interval("nll", frame, "nll", samples),
        **_interval("nll_untied", frame, "nll_untied", samples),
        "ece": np.mean(errors),
        "minutes": _minutes(runs),
    }


def _minutes(runs: Sequence[RunFolder]) -> float:
    """Return the mean training time of the runs that had more than one core to themselves."""
    alone = [run for run in runs if run.info.get("threads", 1) > 1]
    return float(np.mean([run.metrics()["seconds"].sum() / 60 for run in alone] or [math.nan]))


def _difference(
    arm: str, own: ArmRuns, reference: str, base: ArmRuns, samples: int
) -> dict[str, Any]:
    shared = set.intersection(*({run.info["seed"] for run in side.runs} for side in (own, base)))
    if not shared:
        raise ResultsError(f"{arm!r} and {reference!r} have no seed in common: train one of both")
    first, second = (side.of_seeds(shared).averaged() for side in (own, base))
    change = first[["prompt_id", "between_samples"]].copy()
    change[["correct", "nll"]] = first[["correct", "nll"]] - second[["correct", "nll"]]
    nll = dict.fromkeys(("nll", "nll_low", "nll_high"), math.nan)
    if ARMS[arm].kind == ARMS[reference].kind:
        nll = _interval("nll", change, "nll", samples)
    return {"seeds": len(shared), **_accuracies(change, samples), **nll}


def _accuracies(frame: pd.DataFrame, samples: int) -> dict[str, float]:
    between = frame[frame["between_samples"]]
    return {
        **_interval("accuracy", frame, "correct", samples),
        **_interval("model_pairs", between, "correct", samples),
    }


def _interval(name: str, frame: pd.DataFrame, column: str, samples: int) -> dict[str, float]:
    return named(name, clustered_interval(frame[column], frame["prompt_id"], samples))
