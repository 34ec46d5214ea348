"""The arms of the reward-model study: what is trained, and training it.

    python -m utils.experiments.study  # all arms and seeds that are not there yet
    python -m utils.experiments.study margin pairwise:1  # an arm with all its seeds, one seed of an

A finished arm lands in runs/cpu/reward_models/<arm>/seed<seed>; one that was stopped goes on from
its last checkpoint. `python -m utils.experiments.published` copies what is there into results/,
`make study` does both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from utils.arms.rewards import ARMS, arm_profile
from utils.experiments.environment import quiet
from utils.experiments.pipeline import (
    REWARD_FIELDS,
    open_stage,
    prepared_data,
    stage_config,
    train_and_score,
)
from utils.experiments.storage import Run


def study_stage(name: str, seed: int) -> Run:
    """Train an arm with one seed and score the test pairs, or find it done."""
    profile = arm_profile(name, seed)
    config = stage_config(profile, REWARD_FIELDS, kind=ARMS[name].kind)
    run, finished = open_stage(profile, f"reward_models/{name}/seed{seed}", config)
    if not finished:
        data = prepared_data(profile)
        groups, pairs = data.groups_of("train"), data.pairs("test")
        train_and_score(ARMS[name].kind, profile, groups, pairs, run)
    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.experiments.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arms", nargs="*", metavar="ARM[:SEED]", help="default: all")
    wanted = parser.parse_args(arguments).arms or list(ARMS)
    if unknown := [entry for entry in wanted if entry.partition(":")[0] not in ARMS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(ARMS)}")
    quiet()
    for entry in wanted:
        name, _, seed = entry.partition(":")
        for one in [int(seed)] if seed else ARMS[name].seeds:
            run = study_stage(name, one)
            accuracy = run.info["metrics"]["accuracy"]["value"]
            print(f"[{run.label}] accuracy on the test pairs {accuracy:.3f}", flush=True)


if __name__ == "__main__":
    main()
