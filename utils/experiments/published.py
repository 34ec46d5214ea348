"""Models by name, from results/models: the chosen reward models, the judge, aligned policies.

    from utils.experiments.published import load_aligned, load_published
    judge = load_published("judge")
    judge.score(prompts, responses, finished)
    policy, tokenizer = load_aligned("scalar")

`python -m utils.experiments.published` puts the finished runs of both studies and these models, in
bf16, into results/.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from utils.arms.policies import ARMS as POLICY_ARMS
from utils.arms.policies import policy_folder, policy_profile
from utils.arms.rewards import ARMS, arm_profile
from utils.config import Profile, runs_dir
from utils.experiments.environment import quiet
from utils.experiments.judge import member_profile, member_runs
from utils.experiments.pipeline import load_sft, open_stage, prepared_data, stage_config
from utils.experiments.publish import copy_run, finished, read_record, run_folders
from utils.experiments.storage import Run
from utils.files import (
    RESULTS,
    ResultsError,
    atomic_write,
    read_json,
    read_jsonl,
    run_label,
    write_json,
)
from utils.reinforce.checkpoints import load_adapter
from utils.rewards.ensemble import FOLDS, Judge, Member, judge_folds
from utils.rewards.model import RewardModel
from utils.statistics.probes import probe_pairs, run_probes
from utils.statistics.published_runs import PROFILE

MODELS = RESULTS / "models"
INDEX = MODELS / "index.json"
# What the names stand for: name -> arm, seed. A policy is rewarded for differences between samples;
# trained on samples only, a model tells these apart best (on held-out training prompts).
CHOSEN = {"scalar": ("margin_light", 0), "ordinal": ("pairwise_light", 0)}
NAMES = (*CHOSEN, "judge")
POLICIES = "policies"  # the index's entry for aligned policies, by arm


def load_published(name: str) -> RewardModel | Judge:
    """Return a published model: "scalar", "ordinal" or "judge".

    Raises:
        ResultsError: if there is no such model, or a file is not the one that was published.
    """
    entries = _published(name)
    if name != "judge":
        return _load(entries[0])
    members: dict[int, list[Member]] = {fold: [] for fold in range(FOLDS)}
    for entry in entries:
        members[entry["fold"]].append(Member(_load(entry), entry["mean"], entry["std"]))
    data = prepared_data(arm_profile(entries[0]["arm"], entries[0]["seed"]))
    return Judge(judge_folds(data), members)


def published_sums(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the SHA-256 of the files behind published models, which changes when they do.

    Raises:
        ResultsError: if there is no such model.
    """
    return {name: [entry["sha256"] for entry in _published(name)] for name in names}


def load_aligned(arm: str) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Return the published policy of an arm of `utils.arms.policies`, seed 0, and its tokenizer.

    Raises:
        ResultsError: if there is no such policy, or its file is not the one that was published.
    """
    index = read_json(INDEX).get(POLICIES, {})
    if arm not in index:
        raise ResultsError(
            f"no published policy {arm!r}; there are: {', '.join(index) or 'none'}. `make study`"
            " trains and publishes them"
        )
    state = _state(index[arm])
    policy, tokenizer = load_sft(policy_profile(arm, index[arm]["seed"]))
    set_peft_model_state_dict(policy, state)
    return policy, tokenizer


def main() -> None:
    """Publish both studies: runs, the adapters of what has a name, and the probes."""
    quiet()
    base = arm_profile("margin", 0)
    source = runs_dir(base)
    # What was not trained here stays as it was published.
    index = read_record(INDEX)
    index |= {name: entries for name in NAMES if (entries := _entries(source, name))}
    aligned = {arm: _policy_entry(source, arm) for arm in POLICY_ARMS if _aligned(source, arm)}
    if aligned:
        index[POLICIES] = index.get(POLICIES, {}) | aligned
    write_json(INDEX, index)
    for name in NAMES:
        print(f"{name}: {'published' if name in index else 'not trained yet'}")
    if any(name in index for name in NAMES):
        probe_stage(base, [name for name in NAMES if name in index])
    done = [run for run in run_folders(source) if finished(run)]
    for run in done:
        copy_run(run, RESULTS / PROFILE / run.relative_to(source))
    print(f"published {len(done)} runs")


def probe_stage(profile: Profile, names: Iterable[str]) -> Run:
    """Probe published reward models on the test prompts: a `probes.csv` of all, by `series`."""
    sums = published_sums(names)
    config = stage_config(profile, ("data", "model", "evaluation"), models=sums)
    run, done = open_stage(profile, "controls/probes", config)
    if done:
        return run
    pairs, tables = probe_pairs(prepared_data(profile), "test"), []
    for name in sums:
        print(f"[{run.label}] scoring {name}", flush=True)
        model = load_published(name)
        table = run_probes(model.score, pairs, profile.evaluation.bootstrap_samples)
        tables.append(table.assign(series=name))
    table = pd.concat(tables)
    atomic_write(run.directory / "probes.csv", lambda path: table.to_csv(path, index=False))
    run.finish()
    return run


def _entries(source: Path, name: str) -> list[dict[str, Any]]:
    """Publish the adapters behind a name and return their entries; none if one is not trained."""
    if name in CHOSEN:
        arm, seed = CHOSEN[name]
        run = source / "reward_models" / arm / f"seed{seed}"
        wanted = {name: (run, {"arm": arm, "seed": seed})}
    else:
        wanted = {
            f"judge_{arm}_f{fold}": (
                source / "ensemble" / member,
                {"arm": arm, "seed": seed, "fold": fold},
            )
            for member, (arm, seed, fold) in member_runs().items()
        }
    if not all(finished(run) for run, _ in wanted.values()):
        return []
    return [_publish(run, file, **facts) for file, (run, facts) in wanted.items()]


def _aligned(source: Path, arm: str) -> bool:
    run = source / policy_folder(arm, 0)
    return finished(run) and (run / "checkpoints").exists()


def _policy_entry(source: Path, arm: str) -> dict[str, Any]:
    """Publish the adapter of an arm's first seed and return its entry."""
    run = source / policy_folder(arm, 0)
    policy, _ = load_sft(policy_profile(arm, 0))
    load_adapter(run, policy)
    file = _write(f"policy_{arm}", get_peft_model_state_dict(policy))
    return {"arm": arm, "seed": 0, **file, "run": f"{PROFILE}/{run_label(run)}"}


def _publish(run: Path, name: str, **facts: Any) -> dict[str, Any]:
    """Publish a reward model's adapter and return its entry in the index."""
    file = _write(name, load_file(run / "adapter" / "adapter_model.safetensors"))
    rewards = torch.tensor([row["reward"] for row in read_jsonl(run / "samples.jsonl")])
    scale = {"mean": rewards.mean().item(), "std": rewards.std().item()}
    return {**facts, **file, "run": f"{PROFILE}/{run_label(run)}", **scale}


def _write(name: str, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Write an adapter in bf16 and return its file name and SHA-256."""
    state = {key: value.to(torch.bfloat16).contiguous() for key, value in state.items()}
    path = MODELS / f"{name}.safetensors"
    atomic_write(path, lambda p: save_file(state, p))
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _published(name: str) -> list[dict[str, Any]]:
    """Return a reward model's entries in the index."""
    index = read_json(INDEX)
    if name not in NAMES or name not in index:
        known = [known for known in NAMES if known in index]
        raise ResultsError(
            f"no published model {name!r}; there are: {', '.join(known) or 'none'}. `make study` "
            f"trains and publishes {', '.join(NAMES)}"
        )
    return index[name]


def _state(entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the adapter of an entry, after checking that it is the one that was published."""
    path = MODELS / entry["file"]
    if not path.exists():
        raise ResultsError(f"results/models/{path.name} is missing; `git checkout` brings it back")
    if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
        raise ResultsError(f"results/models/{path.name} is not the file that was published")
    return load_file(path)


def _load(entry: Mapping[str, Any]) -> RewardModel:
    state, arm = _state(entry), entry["arm"]
    profile = (member_profile if "fold" in entry else arm_profile)(arm, entry["seed"])
    reward_model = RewardModel.fresh(ARMS[arm].kind, profile)
    set_peft_model_state_dict(reward_model.model, state)
    return reward_model


if __name__ == "__main__":
    main()
