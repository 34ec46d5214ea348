"""The published runs of the reward-model study, and what they say of each test pair.

An arm is one way to train a reward model, a run is one seed of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from utils.data.sources import Pair
from utils.files import ResultsError, RunFolder
from utils.statistics.pairs import pair_rows
from utils.statistics.published_runs import seed_runs


class ArmRuns(NamedTuple):
    """The seeds of an arm."""

    runs: list[RunFolder]
    frames: list[pd.DataFrame]  # of each run, the rows of `pair_rows`

    def of_seeds(self, seeds: Collection[int]) -> ArmRuns:
        """Return those with these seeds."""
        kept = [(r, f) for r, f in zip(*self, strict=True) if r.info["seed"] in seeds]
        return ArmRuns(*map(list, zip(*kept, strict=True)))

    def averaged(self) -> pd.DataFrame:
        """Average the seeds, pair by pair; see `pair_frame`."""
        columns = ["prompt_id", "category", "prompt", "gap", "between_samples"]
        table = self.frames[0][[*columns, "chosen", "rejected"]].copy()
        table["correct"] = np.mean([frame["correct"] for frame in self.frames], axis=0)
        table["nll"] = -np.mean([frame["log_p"] for frame in self.frames], axis=0)
        table["nll_untied"] = -np.mean([np.log(frame["p"]) for frame in self.frames], axis=0)
        for run, frame in zip(*self, strict=True):
            table[f"p_{run.info['seed']}"] = frame["p"]
        return table


def study_runs(results: Path, arm: str) -> list[RunFolder]:
    """Return an arm's runs, the folders `reward_models/<arm>/seed<seed>`, by seed; maybe none.

    Raises:
        ResultsError: if a run is not finished, or has another seed than its name says.
    """
    return [*seed_runs(results, f"reward_models/{arm}").values()]


def study_arms(
    results: Path,
    arms: Iterable[str],
    pairs: Sequence[Pair],
    across_sizes: bool = False,
) -> dict[str, ArmRuns]:
    """Return the runs of each arm that has some, and their rows, once it is sure they compare.

    Args:
        results: the folder of published runs.
        arms: their names; one without runs is left out.
        pairs: the test pairs.
        across_sizes: whether arms may differ in `data.train_prompts`, which changes the data's
            fingerprint; those that agree in it must still have the same.

    Raises:
        ResultsError: naming two runs that were trained on different data or scored different
            responses.
    """
    found = {arm: runs for arm in arms if (runs := study_runs(results, arm))}
    everything = [run for runs in found.values() for run in runs]
    first: dict[int | None, RunFolder] = {}
    for run in everything:
        size = run.info["config"]["data.train_prompts"] if across_sizes else None
        other = first.setdefault(size, run)
        prints = [r.info["config"]["data.fingerprint"] for r in (other, run)]
        if prints[0] != prints[1]:
            raise ResultsError(
                f"{other.label} and {run.label} were trained on different data "
                f"(fingerprints {prints[0]} and {prints[1]}) and do not compare: train both on the "
                "same and publish them again, or leave one out"
            )
    frames = iter(seed_frames(everything, pairs))
    return {arm: ArmRuns(runs, [next(frames) for _ in runs]) for arm, runs in found.items()}


def seed_frames(runs: Sequence[RunFolder], pairs: Sequence[Pair]) -> list[pd.DataFrame]:
    """Return the rows of `pair_rows` of each run.

    Raises:
        ResultsError: naming two runs that scored different responses, or one that scored others
            than the pairs'.
    """
    frames = []
    for run in runs:
        try:
            frames.append(pair_rows(run, pairs))
        except KeyError as error:
            raise ResultsError(_other_pairs(run)) from error
    same = ["prompt_id", "chosen", "rejected", "gap"]
    for run, frame in zip(runs, frames, strict=True):
        if not frame[same].equals(frames[0][same]):
            raise ResultsError(
                f"{runs[0].label} and {run.label} scored different responses and "
                "do not compare: score both on the same test pairs and publish them again"
            )
    texts = [(pair.chosen.text, pair.rejected.text) for pair in pairs]
    if frames and list(zip(frames[0]["chosen"], frames[0]["rejected"], strict=True)) != texts:
        raise ResultsError(_other_pairs(runs[0]))
    return frames


def pair_frame(runs: Sequence[RunFolder], pairs: Sequence[Pair]) -> pd.DataFrame:
    """Average an arm's seeds, pair by pair.

    Returns:
        A row per pair: prompt_id, category, prompt, gap, between_samples, chosen, rejected; means
        over the seeds of `correct`, `nll` (-log P(chosen wins)) and `nll_untied` (the same, given
        that there is no tie); and that probability, given no tie, of each seed: `p_<seed>`.
    """
    return ArmRuns([*runs], seed_frames(runs, pairs)).averaged()


def _other_pairs(run: RunFolder) -> str:
    return (
        f"{run.label} scored other responses than those of the test pairs: use the data "
        "that it was trained on, or train it again and publish it"
    )
