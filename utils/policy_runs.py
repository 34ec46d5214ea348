"""The published runs of the policy study: evaluations on the test prompts, and training curves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from utils.published_runs import PROFILE, finished_run
from utils.results import ResultsError, Run, read_jsonl

Frames = Mapping[str, pd.DataFrame]
BASE, POOL = "sft", "sft_pool"  # what all are compared with; many SFT samples per prompt
REWARDS = ("scalar", "ordinal", "judge")
JUDGE = "reward_judge"
_PROMPT = ["prompt_id", "category", "prompt"]
_AGAIN = "evaluate it again with `python -m utils.policy_study tests` and publish it"


def policy_frames(results: Path) -> dict[str, pd.DataFrame]:
    """Return the published evaluations on the test prompts, the folders `cpu-test_<policy>`.

    Returns:
        By policy, the SFT model first: the rows of its `samples.jsonl` with its `temperature`.
        They have the same prompts in the same order and, but for `POOL`, as many samples of each.

    Raises:
        ResultsError: naming an evaluation that is not finished, lacks a reward, or was made on
            other prompts, samples or scales than that of the SFT model.
    """
    paths = {p.name.removeprefix(f"{PROFILE}-test_"): p for p in results.glob(f"{PROFILE}-test_*")}
    paths = {name: path for name, path in sorted(paths.items()) if "@" not in name}
    if BASE not in paths:
        raise ResultsError(
            f"there is no evaluation of the SFT model to compare with: publish {PROFILE}-test_"
            f"{BASE}, which `python -m utils.policy_study tests` makes"
        )
    names = [BASE, *(name for name in paths if name != BASE)]
    runs = {name: finished_run(paths[name]) for name in names}
    frames = {name: _rows(run) for name, run in runs.items()}
    prompts = frames[BASE][_PROMPT].drop_duplicates(ignore_index=True)
    for name, frame in frames.items():
        each = len(frame) // len(prompts) if name == POOL else len(frames[BASE]) // len(prompts)
        wanted = prompts.loc[prompts.index.repeat(each)].reset_index(drop=True)
        if not frame[_PROMPT].equals(wanted):
            raise ResultsError(
                f"{paths[BASE].name} and {paths[name].name} have other prompts, another order of "
                f"them or another number of samples, and do not compare: {_AGAIN}"
            )
        scales = [runs[policy].info.get("scales") for policy in (BASE, name)]
        if scales[0] != scales[1]:
            raise ResultsError(
                f"{paths[BASE].name} and {paths[name].name} measured rewards on different scales "
                f"({scales[0]} and {scales[1]}) and do not compare: {_AGAIN}"
            )
    return frames


def arms_of(frames: Frames) -> list[str]:
    """Return the arms with evaluated seeds, in the order of their frames."""
    return list(dict.fromkeys(m[1] for name in frames if (m := _SEEDED.fullmatch(name))))


def seeds_of(frames: Frames, policy: str) -> dict[int | None, pd.DataFrame]:
    """Return the frames of an arm by seed; of a control its one frame, by None."""
    found = {name: m for name in frames if (m := _SEEDED.fullmatch(name)) and m[1] == policy}
    seeds = {int(m[2]): frames[name] for name, m in found.items()}
    return dict(sorted(seeds.items())) if seeds else {None: frame_of(frames, policy)}


def frame_of(frames: Frames, name: str) -> pd.DataFrame:
    """Return one policy's frame; an arm has one for each seed, see `seeds_of`.

    Raises:
        ResultsError: if there is no evaluation of it.
    """
    if name not in frames:
        raise ResultsError(
            f"there is no evaluation of {name!r}, only of {', '.join(frames)}: train and evaluate "
            "it with `python -m utils.policy_study`, and publish it"
        )
    return frames[name]


def policies_of(frames: Frames) -> list[str]:
    """Return the arms, then the controls with the SFT model first; not `POOL`."""
    controls = [name for name in frames if not _SEEDED.fullmatch(name) and name != POOL]
    return arms_of(frames) + controls


def rewards_of(policy: str) -> dict[str, str]:
    """Return the columns of the rewards to report: `judge`, and `own`, what it was trained on.

    A policy's name starts with its reward model's. The SFT model and its controls have no own one.
    """
    kind = policy.partition("_")[0]
    return {"judge": JUDGE} | ({"own": f"reward_{kind}"} if kind in REWARDS else {})


def extremes(
    frames: Frames, policy: str, k: int = 10, random: int = 10, seed: int = 0
) -> pd.DataFrame:
    """Show where a policy gained and lost most under the judge, and some prompts by chance.

    A prompt enters a list once, with that of its samples where the gain is largest or smallest;
    the random prompts are drawn from all, so that they stand for all.

    Args:
        frames: of `policy_frames`.
        policy: one policy with its seed, such as `scalar_s0`.
        k: how many gains, and how many losses.
        random: how many random prompts.
        seed: of their choice.

    Returns:
        A row per prompt for `widgets.browse_samples`: `list` ("gain", "loss", "random"),
        prompt_id, category, prompt, `gain`, and of both policies `response [name]`,
        `reward_<model> [name]`, `kl [name]`, `length [name]`, `finished [name]`.
    """
    sft, own = frames[BASE], frame_of(frames, policy)
    table = sft[_PROMPT].copy()
    table["gain"] = own[JUDGE] - sft[JUDGE]
    facts = ["response", *(f"reward_{name}" for name in REWARDS), "kl", "length", "finished"]
    for column in facts:
        for name, frame in ((BASE, sft), (policy, own)):
            table[f"{column} [{name}]"] = frame[column]
    ordered = table.sort_values("gain", kind="stable")
    lists = {
        "gain": ordered[::-1].drop_duplicates("prompt_id")[:k],
        "loss": ordered.drop_duplicates("prompt_id")[:k],
        "random": table.sample(frac=1, random_state=seed).drop_duplicates("prompt_id")[:random],
    }
    parts = [part.assign(list=name) for name, part in lists.items()]
    found = pd.concat(parts, ignore_index=True)
    return found[["list", *(column for column in found if column != "list")]]


def frontier_table(results: Path) -> pd.DataFrame:
    """Return the held-out reward of each training run against its KL.

    Returns:
        A row per run, folder `cpu-align_<arm>_s<seed>`, and evaluation: arm, seed, step, `kl`
        (nats), `sqrt_kl`, `reward` (that it was trained on) with `reward_low` and `reward_high`,
        `judge`, both in SFT standard deviations, and `length`, tokens.

    Raises:
        ResultsError: naming a run that is not finished, has another seed than its name says, or
            was not evaluated by the judge.
    """
    rows: list[pd.DataFrame] = []
    pattern = re.compile(rf"{PROFILE}-align_(.+)_s(\d+)")
    found = {(m[1], int(m[2])): p for p in results.glob("*") if (m := pattern.fullmatch(p.name))}
    for (arm, seed), path in sorted(found.items()):
        metrics = finished_run(path, seed).metrics()
        if "eval_judge" not in metrics:
            raise ResultsError(
                f"{path.name} was not evaluated by the judge while it was trained: train it again "
                f"with `python -m utils.policy_study {arm}:{seed}` and publish it"
            )
        held_out = metrics.dropna(subset="eval_reward")[["step", *_HELD_OUT]]
        held_out = held_out.rename(columns=_HELD_OUT)  # in training, `reward` and `kl` are others
        held_out["sqrt_kl"] = np.sqrt(held_out["kl"].clip(lower=0))  # an estimate may be below 0
        rows.append(held_out.assign(arm=arm, seed=seed)[_FRONTIER])
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=_FRONTIER)


def peak_table(frontier: pd.DataFrame) -> pd.DataFrame:
    """Say where in training the judge peaks, and where the reward that is trained on does.

    The two part if the judge has its maximum at an earlier evaluation than the reward; of equal
    maxima the first counts. Maxima of a few noisy points move easily: look whether seeds agree.

    Args:
        frontier: of `frontier_table`.

    Returns:
        A row per arm and seed: arm, seed, `reward_step` and `judge_step` (of the maxima),
        `reward_max`, `judge_max`, `judge_kl` (at the judge's maximum), `judge_at_reward_max`,
        `judge_last`, and `parted`.
    """
    rows: list[dict[str, Any]] = []
    for (arm, seed), part in frontier.groupby(["arm", "seed"], sort=False):
        reward, judge = (part.loc[part[name].idxmax()] for name in ("reward", "judge"))
        rows.append(
            {
                "arm": arm,
                "seed": seed,
                "reward_step": reward["step"],
                "judge_step": judge["step"],
                "reward_max": reward["reward"],
                "judge_max": judge["judge"],
                "judge_kl": judge["kl"],
                "judge_at_reward_max": reward["judge"],
                "judge_last": part["judge"].iloc[-1],
                "parted": judge["step"] < reward["step"],
            }
        )
    return pd.DataFrame(rows)


_SEEDED = re.compile(r"(.+)_s(\d+)")  # an arm and its seed; `scalar_s0_greedy` is a control
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


def _rows(run: Run) -> pd.DataFrame:
    frame = pd.DataFrame(read_jsonl(run.directory / "samples.jsonl"))
    if missing := [name for name in REWARDS if f"reward_{name}" not in frame]:
        raise ResultsError(f"{run.directory.name} lacks the reward of {missing}: {_AGAIN}")
    frame["kl"] = frame["kl"].astype(float)  # null where it was not measured
    return frame.assign(temperature=run.info["config"]["temperature"])
