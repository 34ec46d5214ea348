"""The published evaluations of the policy study on the test prompts, and samples from them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from utils.arms.policies import ARMS, AVERAGE, HEADLINE
from utils.files import ResultsError, RunFolder, read_jsonl
from utils.statistics.published_runs import PROFILE, finished_run

Frames = Mapping[str, pd.DataFrame]
BASE, POOL = "sft", "sft_pool"  # what all are compared with; many SFT samples per prompt
BEST, GREEDY = "sft_best", "sft_greedy"  # SFT at its best temperature, and at none
CONTROLS = (BASE, BEST, GREEDY, POOL)  # without these nothing can be compared
REWARDS = ("scalar", "ordinal", "judge")
JUDGE = "reward_judge"
_PROMPT = ["prompt_id", "category", "prompt"]
_AGAIN = "evaluate it again with `python -m utils.experiments.policy_study tests` and publish it"


def policy_frames(results: Path) -> dict[str, pd.DataFrame]:
    """Return the published evaluations on the test prompts, see `_evaluations`.

    Returns:
        By policy, the SFT model first: the rows of its `samples.jsonl` with its `temperature`.
        They have the same prompts in the same order and, but for `POOL`, as many samples of each.
        Empty as long as one of `CONTROLS` is missing, or all policies are.

    Raises:
        ResultsError: naming an evaluation that is not finished, lacks a reward, or was made on
            other prompts, samples or scales than that of the SFT model.
    """
    paths = dict(sorted(_evaluations(results / PROFILE).items()))
    if not arms_of(paths) or not {*CONTROLS} <= {*paths}:
        return {}
    names = [BASE, *(name for name in paths if name != BASE)]
    runs = {name: finished_run(paths[name]) for name in names}
    frames = {name: _rows(run) for name, run in runs.items()}
    prompts = frames[BASE][_PROMPT].drop_duplicates(ignore_index=True)
    for name, frame in frames.items():
        each = len(frame) // len(prompts) if name == POOL else len(frames[BASE]) // len(prompts)
        wanted = prompts.loc[prompts.index.repeat(each)].reset_index(drop=True)
        if not frame[_PROMPT].equals(wanted):
            raise ResultsError(
                f"{runs[BASE].label} and {runs[name].label} have other prompts, another order of "
                f"them or another number of samples, and do not compare: {_AGAIN}"
            )
        scales = [runs[policy].info.get("scales") for policy in (BASE, name)]
        if scales[0] != scales[1]:
            raise ResultsError(
                f"{runs[BASE].label} and {runs[name].label} measured rewards on different scales "
                f"({scales[0]} and {scales[1]}) and do not compare: {_AGAIN}"
            )
    return frames


def missing_policies(frames: Frames) -> list[str]:
    """Name the evaluations of the study that are not published yet."""
    wanted = [f"{arm}_s{seed}" for arm in ARMS for seed in ARMS[arm].seeds]
    wanted += [*CONTROLS, "sft_16bit"]
    wanted += [f"{arm}_{kind}" for arm in HEADLINE for kind in ("s0_greedy", AVERAGE)]
    return [name for name in wanted if name not in frames]


def arms_of(frames: Iterable[str]) -> list[str]:
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
            "it with `python -m utils.experiments.policy_study`, and publish it"
        )
    return frames[name]


def policies_of(frames: Frames) -> list[str]:
    """Return the arms, then the controls with the SFT model first; not `POOL`."""
    controls = [name for name in frames if not _SEEDED.fullmatch(name) and name != POOL]
    return arms_of(frames) + controls


def rewards_of(policy: str) -> dict[str, str]:
    """Return the columns of the rewards to report: `judge`, and `own`, what it was trained on.

    Evaluations hold the mean rating of a ten-class model and not its spread, so a policy that was
    trained on another readout has no own reward there; nor do the SFT model and its controls.
    """
    arms = [name for name in ARMS if f"{policy}_".startswith(f"{name}_")]
    arm = ARMS[max(arms, key=len)] if arms else None
    own = {"own": f"reward_{arm.reward}"} if arm and arm.readout == "mean" else {}
    return {"judge": JUDGE} | own


def panel(frames: Frames, policies: Sequence[str], prompts: int = 12) -> pd.DataFrame:
    """Show what policies answer to the first prompts, one per category where there are any.

    Args:
        frames: rows of evaluations by policy, among them the SFT model's.
        policies: whom to show.
        prompts: how many.

    Returns:
        A row per prompt for `widgets.browse_samples`: prompt_id, category, prompt, and of the first
        sample of each policy `response [name]`, `reward_<model> [name]`, `kl [name]` and
        `length [name]`.
    """
    base = frames[BASE].drop_duplicates("prompt_id").fillna({"category": "no category"})
    turn = base.groupby("category").cumcount().sort_values(kind="stable")
    table = base.loc[turn.index[:prompts], _PROMPT]
    rewards = [column for column in base if column.startswith("reward_")]
    for name in policies:
        own = frames[name].drop_duplicates("prompt_id").set_index("prompt_id")
        own = own.loc[table["prompt_id"]].round(1)
        for column in ("response", *rewards, "kl", "length"):
            table[f"{column} [{name}]"] = own[column].to_numpy()
    return table


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


_SEEDED = re.compile(r"(.+)_s(\d+)")  # an arm and its seed; `scalar_s0_greedy` is a control


def _evaluations(folder: Path) -> dict[str, Path]:
    """Return where the evaluations of policies are, by the names that tables give these.

    Those of `policies/scalar/seed0/test`, `policies/scalar/seed0/test_greedy`,
    `policies/scalar_average/test` and `controls/sft/test` are `scalar_s0`, `scalar_s0_greedy`,
    `scalar_average` and `sft`.
    """
    found = {path.parent.name: path for path in folder.glob("controls/*/test")}
    found |= {path.parent.name: path for path in folder.glob(f"policies/*_{AVERAGE}/test")}
    for path in folder.glob("policies/*/seed*/test*"):
        arm, seed, test = path.parts[-3:]
        found[f"{arm}_s{seed.removeprefix('seed')}{test.removeprefix('test')}"] = path
    return {name: path for name, path in found.items() if "@" not in name}  # not what is set aside


def _rows(run: RunFolder) -> pd.DataFrame:
    frame = pd.DataFrame(read_jsonl(run.directory / "samples.jsonl"))
    if missing := [name for name in REWARDS if f"reward_{name}" not in frame]:
        raise ResultsError(f"{run.label} lacks the reward of {missing}: {_AGAIN}")
    frame["kl"] = frame["kl"].astype(float)  # null where it was not measured
    return frame.assign(temperature=run.info["config"]["temperature"])
