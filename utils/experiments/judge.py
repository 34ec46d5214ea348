"""The judge: an ensemble of reward models that shares no prompt with any policy or its reward.

The prompts of validation and test are cut into folds. A member is trained on all of these folds
but one, and judges the prompts of that one. So whatever the judge reads, it was not trained on, nor
was it trained on any prompt that a policy's reward model or the policy itself has seen.

    python -m utils.experiments.judge                    # trains the members that are not there yet
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from utils.arms.rewards import ARMS, arm_profile
from utils.config import Profile, with_fields
from utils.data.pairs import Group, Key, Pair, PreferenceData, response_key
from utils.experiments.environment import quiet
from utils.experiments.pipeline import (
    REWARD_FIELDS,
    open_stage,
    prepared_data,
    stage_config,
    train_and_score,
)
from utils.experiments.storage import Run
from utils.files import read_jsonl, stored
from utils.rewards.ensemble import FOLDS, judge_folds, prompt_key
from utils.statistics.bootstrap import clustered_interval
from utils.statistics.published_runs import PROFILE

# Two losses that differ much, so that what the members have in common is the text; with seeds that
# no policy's reward model has.
MEMBERS = (("plackett_luce_light", 100), ("pairwise_light", 101))
# Fewer prompts than the arms have, so more passes; a small rank, since eight are published.
CHANGES: dict[str, Any] = {"reward.epochs": 2.0, "reward.lora_r": 8, "reward.lora_alpha": 16}


def member_runs() -> dict[str, tuple[str, int, int]]:
    """Return the arm, seed and fold of every member, by its name."""
    return {
        f"{arm}_fold{fold}": (arm, seed, fold) for arm, seed in MEMBERS for fold in range(FOLDS)
    }


def member_profile(arm: str, seed: int) -> Profile:
    """Return the profile that a member of the judge is trained with."""
    return with_fields(arm_profile(arm, seed), CHANGES)


def judge_stage(name: str) -> Run:
    """Train one of `member_runs` and score the pairs of the fold it judges, or find it done."""
    arm, seed, fold = member_runs()[name]
    profile = member_profile(arm, seed)
    config = stage_config(profile, REWARD_FIELDS, kind=ARMS[arm].kind, fold=fold, folds=FOLDS)
    run, finished = open_stage(profile, f"ensemble/{name}", config)
    if not finished:
        data = prepared_data(profile)
        train_and_score(ARMS[arm].kind, profile, *member_data(data, fold), run)
    return run


def member_data(data: PreferenceData, fold: int) -> tuple[list[Group], list[Pair]]:
    """Return the groups of the other folds, to train on, and the pairs of the fold, to judge."""
    folds, splits = judge_folds(data), ("validation", "test")
    groups = [group for split in splits for group in data.groups_of(split)]
    pairs = [pair for split in splits for pair in data.pairs(split)]
    return (
        [group for group in groups if folds[prompt_key(group.prompt)] != fold],
        [pair for pair in pairs if folds[prompt_key(pair.group.prompt)] == fold],
    )


def judge_accuracy(results: Path, pairs: Sequence[Pair], samples: int) -> pd.DataFrame:
    """Measure the judge on held-out pairs, from its members' published scores.

    Args:
        results: the folder of published runs.
        pairs: of the validation or test split.
        samples: bootstrap resamples.

    Returns:
        A row for the judge and for each kind of member alone, and for all pairs and those between
        two samples: `judge`, `pairs`, and the accuracy as value, low, high and n. Empty if a
        member is not published.
    """
    folder = results / PROFILE / "ensemble"
    files = {name: stored(folder / name / "samples.jsonl") for name in member_runs()}
    if not all(file.exists() for file in files.values()):
        return pd.DataFrame(columns=["judge", "pairs", "value", "low", "high", "n"])
    scores: dict[str, dict[Key, float]] = {arm: {} for arm, _ in MEMBERS}
    for name, (arm, _, _) in member_runs().items():
        rows = pd.DataFrame(read_jsonl(files[name]))
        keys = zip(rows["prompt_id"], rows["batch"], rows["place"], strict=True)
        standard = (rows["reward"] - rows["reward"].mean()) / rows["reward"].std()
        scores[arm] |= dict(zip(keys, standard, strict=True))
    sides = [
        [response_key(pair, side(pair)) for pair in pairs]
        for side in (attrgetter("chosen"), attrgetter("rejected"))
    ]
    gaps = {
        ARMS[arm].label: np.array([found[c] - found[r] for c, r in zip(*sides, strict=True)])
        for arm, found in scores.items()
    }
    prompts = np.array([pair.prompt_id for pair in pairs])
    between = np.array([pair.between_samples for pair in pairs])
    table = []
    for name, gap in {"judge": sum(gaps.values()), **gaps}.items():
        for subset, part in {"all pairs": ~between | between, "between samples": between}.items():
            correct = (np.sign(gap[part]) + 1) / 2
            found = clustered_interval(correct, prompts[part], samples)
            table.append({"judge": name, "pairs": subset, **found})
    return pd.DataFrame(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m utils.experiments.judge")
    parser.add_argument("members", nargs="*", metavar="MEMBER", help="default: all")
    wanted = parser.parse_args(arguments).members or list(member_runs())
    if unknown := [name for name in wanted if name not in member_runs()]:
        parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(member_runs())}")
    quiet()
    for name in wanted:
        accuracy = judge_stage(name).info["metrics"]["accuracy"]["value"]
        print(f"[{name}] accuracy on its fold {accuracy:.3f}", flush=True)


if __name__ == "__main__":
    main()
