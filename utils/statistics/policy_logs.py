"""The training logs of the policy study's published runs and trials, as tables.

Held-out rows are those with `eval_reward`, on the validation prompts; step 0 is the SFT model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from utils.arms.policies import ARMS, BASELINES, HEADLINE, SEEDS, SETTINGS, TRIALS, policy_folder
from utils.files import ResultsError
from utils.statistics.published_runs import PROFILE, finished_run, seed_runs

Logs = Mapping[str, Mapping[int, pd.DataFrame]]  # the `metrics.csv` of each run, by arm and seed
SIZES = ["advantage_std", "advantage_rms", "grad_norm"]
_TRIAL = ["step", "eval_reward", "eval_judge", "eval_kl", "eval_mean_length", "eval_distinct_2"]
_READOUT = ["step", "eval_reward", "eval_reward_low", "eval_reward_high", "eval_judge", "eval_kl"]
_READOUT += ["eval_mean_length", "eval_finished", "eval_distinct_2"]
_HELD_OUT = {
    "eval_kl": "kl",
    "eval_reward": "reward",
    "eval_reward_low": "reward_low",
    "eval_reward_high": "reward_high",
    "eval_judge": "judge",
    "eval_mean_length": "length",
}
_FRONTIER = ["arm", "seed", "step", "kl", "sqrt_kl", "reward", "reward_low", "reward_high"]
_FRONTIER += ["judge", "length"]
_AVERAGES = ["arm", "seeds", "scale", "chosen", "kl", "sqrt_kl", "reward", "judge", "length"]


def training_logs(results: Path, *arms: str) -> dict[str, dict[int, pd.DataFrame]]:
    """Return the logs of each arm's runs, the folders `policies/<arm>/seed<seed>`, by seed.

    Each has one more column, `max_grad_norm`, the limit that the run was trained with.

    Raises:
        ResultsError: naming a run that is not finished, or has another seed than its name says.
    """
    limit = "reinforce.max_grad_norm"
    return {
        arm: {
            seed: run.metrics().assign(max_grad_norm=run.info["config"][limit])
            for seed, run in seed_runs(results, f"policies/{arm}").items()
        }
        for arm in arms
    }


def clipped_steps(log: pd.DataFrame, max_grad_norm: float | pd.Series) -> float:
    """Return the share of a log's training steps whose gradient was longer than the limit.

    A row without a `grad_norm`, that of step 0, is no training step; NaN if there is none.
    """
    steps = log["grad_norm"].notna()
    return float((log["grad_norm"] > max_grad_norm)[steps].mean())


def missing_logs(logs: Logs) -> list[str]:
    """Name the runs of these arms that are not published yet."""
    missing = {arm: [s for s in ARMS[arm].seeds if s not in own] for arm, own in logs.items()}
    return [
        f"{ARMS[arm].label}, seed {', '.join(map(str, seeds))}"
        for arm, seeds in missing.items()
        if seeds
    ]


def held_out_rows(log: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a log in which the policy was evaluated."""
    return log.dropna(subset="eval_reward").reset_index(drop=True)


def trial_table(results: Path) -> pd.DataFrame:
    """Return the last held-out row of each trial, the folders `sweeps/<name>`.

    The run with the chosen settings is a policy of the study, the headline arm's first seed: it is
    the last row.

    Returns:
        A row per run: trial, the settings that were tried, `chosen`, whether they are the study's,
        step, and some of the held-out columns.
    """
    tried = sorted({field for changes in TRIALS.values() for field in changes})
    rows = []
    arm, seed = HEADLINE[0], SEEDS[0]
    folders = {name: f"sweeps/{name}" for name in sorted(TRIALS)}
    folders |= {f"align_{arm}_s{seed}": policy_folder(arm, seed)}
    for name, folder in folders.items():
        if not (path := results / PROFILE / folder).exists():
            continue
        run = finished_run(path)
        own = {field: run.info["config"][field] for field in tried}
        chosen = all(own[field] == SETTINGS[field] for field in tried)
        row = {"trial": name, **own, "chosen": chosen}
        rows.append(row | dict(held_out_rows(run.metrics()).iloc[-1].reindex(_TRIAL)))
    return pd.DataFrame(rows, columns=["trial", *tried, "chosen", *_TRIAL])


def missing_trials(trials: pd.DataFrame) -> list[str]:
    """Name the trials that `trial_table` has no row of."""
    return [name for name in TRIALS if name not in set(trials["trial"])]


def baseline_table(logs: Logs) -> pd.DataFrame:
    """Compare arms that differ in the baseline.

    A baseline is one number for a step: it changes the mean of the step's advantages, and so their
    root mean square, but not their spread.

    Args:
        logs: of the arms of `BASELINES`.

    Returns:
        A row per run: arm, baseline, seed; `gain`, of the held-out reward from step 0 to the end;
        `half_step`, the first held-out step with half of the gain that the running mean has at its
        end, a mean over its seeds, blank if it is never reached; means over the steps of
        `advantage_std`, `advantage_rms` and `grad_norm`, which is that before clipping; and
        `clipped_steps`, the share of steps in which the gradient was clipped.
    """
    ends = [_gain(log).iloc[-1] for log in logs.get("scalar", {}).values()]
    half = np.mean(ends) / 2 if ends else math.nan
    rows = []
    for arm, own in logs.items():
        for seed, log in own.items():
            gain, shift = _gain(log), log["objective"] - log["baseline"]
            reached = gain.index[gain >= half] if half > 0 else []
            row = {"arm": arm, "baseline": BASELINES[arm], "seed": seed, "gain": gain.iloc[-1]}
            row["half_step"] = reached[0] if len(reached) else math.nan
            log = log.assign(advantage_rms=np.hypot(log["advantage_std"], shift))
            row["clipped_steps"] = clipped_steps(log, log["max_grad_norm"])
            rows.append(row | log[SIZES].mean().to_dict())
    columns = ["arm", "baseline", "seed", "gain", "half_step", *SIZES, "clipped_steps"]
    return pd.DataFrame(rows, columns=columns)


def readout_table(logs: Logs) -> pd.DataFrame:
    """Return arm, label, seed and the last held-out row of each run."""
    rows = [
        {"arm": arm, "label": ARMS[arm].label, "seed": seed}
        | dict(held_out_rows(log).iloc[-1].reindex(_READOUT))
        for arm, own in logs.items()
        for seed, log in own.items()
    ]
    return pd.DataFrame(rows, columns=["arm", "label", "seed", *_READOUT])


def frontier_table(logs: Logs) -> pd.DataFrame:
    """Return the held-out reward of each run against its KL.

    Returns:
        A row per run and evaluation: arm, seed, step, `kl` (nats), `sqrt_kl`, `reward` (of the
        model that it was trained with; of ten classes the mean rating, whatever the readout) with
        `reward_low` and `reward_high`, `judge`, both in SFT standard deviations, and `length`,
        tokens.

    Raises:
        ResultsError: naming a run that was not evaluated by the judge.
    """
    rows: list[pd.DataFrame] = []
    for arm, own in logs.items():
        for seed, log in own.items():
            if "eval_judge" not in log:
                raise ResultsError(
                    f"{policy_folder(arm, seed)} was not evaluated by the judge while it was "
                    "trained: train it again with `python -m utils.experiments.policy_study "
                    f"{arm}:{seed}` and publish it"
                )
            # In training, `reward` and `kl` are others.
            held_out = held_out_rows(log)[["step", *_HELD_OUT]].rename(columns=_HELD_OUT)
            held_out["sqrt_kl"] = np.sqrt(held_out["kl"].clip(lower=0))  # an estimate may be below
            rows.append(held_out.assign(arm=arm, seed=seed)[_FRONTIER])
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=_FRONTIER)


def average_table(results: Path) -> pd.DataFrame:
    """Return the held-out rows of the averages of seeds, and of a seed that is only scaled.

    They are in the folders `sweeps/average_<arm>` and `sweeps/scaled_<arm>`.

    Returns:
        A row per arm, number of `seeds` and scale: arm, seeds, scale, `chosen`, and the held-out
        columns of `frontier_table` without the intervals.
    """
    rows = []
    for arm in ARMS:
        for kind in ("average", "scaled"):
            path = results / PROFILE / "sweeps" / f"{kind}_{arm}"
            if path.exists():
                run = finished_run(path)
                table = run.metrics().rename(columns=_HELD_OUT)
                table["sqrt_kl"] = np.sqrt(table["kl"].clip(lower=0))
                table["chosen"] = table["scale"] == run.info["scale"]
                table["seeds"] = len(run.info["config"]["average_of"])
                rows.append(table.assign(arm=arm)[_AVERAGES])
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=_AVERAGES)


def _gain(log: pd.DataFrame) -> pd.Series:
    """Return what the held-out reward gained since step 0, by step."""
    rewards = held_out_rows(log).set_index("step")["eval_reward"]
    return rewards - rewards.iloc[0]
