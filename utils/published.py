"""Reward models by name: the chosen scalar and ten-class models and the judge, from results/models.

    from utils.published import load_published
    judge = load_published("judge")
    judge.score(prompts, responses, finished)

`python -m utils.published` puts the finished runs of the study and these models, in bf16, into
results/.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from utils.config import Profile
from utils.environment import RESULTS, quiet
from utils.judge import FOLDS, Judge, Member, judge_folds, member_profile, member_runs
from utils.pipeline import open_stage, prepared_data, stage_config
from utils.probes import probe_pairs, run_probes
from utils.publish import copy_run, read_record
from utils.results import (
    ResultsError,
    Run,
    atomic_write,
    read_json,
    read_jsonl,
    runs_dir,
    write_json,
)
from utils.rewards import RewardModel
from utils.study import ARMS, arm_profile

MODELS = RESULTS / "models"
INDEX = MODELS / "index.json"
# What the names stand for until validation has chosen: name -> arm, seed.
CHOSEN = {"scalar": ("margin", 0), "ordinal": ("pairwise", 0)}
NAMES = (*CHOSEN, "judge")


def load_published(name: str) -> RewardModel | Judge:
    """Return a published model: "scalar", "ordinal" or "judge".

    Raises:
        ResultsError: if there is no such model, or a file is not the one that was published.
    """
    index = read_json(INDEX)
    if name not in index:
        raise ResultsError(f"no published model {name!r}; there are: {', '.join(index)}")
    entries = index[name]
    if name != "judge":
        return _load(entries[0])
    members: dict[int, list[Member]] = {fold: [] for fold in range(FOLDS)}
    for entry in entries:
        members[entry["fold"]].append(Member(_load(entry), entry["mean"], entry["std"]))
    data = prepared_data(arm_profile(entries[0]["arm"], entries[0]["seed"]))
    return Judge(judge_folds(data), members)


def main() -> None:
    """Publish the study: runs, the adapters of the models that have a name, and their probes."""
    quiet()
    base = arm_profile("margin", 0)
    source = runs_dir(base)
    index = {name: entries for name in NAMES if (entries := _entries(source, name))}
    write_json(INDEX, index)
    for name in NAMES:
        print(f"{name}: {'published' if name in index else 'not trained yet, see utils.study'}")
    if index:
        probe_stage(base, index)
    records = [
        path for kind in ("rm_*", "judge_*", "probes") for path in source.glob(f"{kind}/run.json")
    ]
    done = [p.parent for p in records if "@" not in p.parent.name and _finished(p.parent)]
    for run in sorted(done):
        copy_run(run, RESULTS / f"cpu-{run.name}")
    print(f"published {len(done)} runs")


def probe_stage(profile: Profile, index: dict[str, list[dict[str, Any]]]) -> Run:
    """Probe the published models on the test prompts: a `probes.csv` of all, by `series`."""
    sums = {name: [entry["sha256"] for entry in entries] for name, entries in index.items()}
    config = stage_config(profile, ("data", "model", "evaluation"), models=sums)
    run, finished = open_stage(profile, "probes", config)
    if finished:
        return run
    pairs, tables = probe_pairs(prepared_data(profile), "test"), []
    for name in index:
        print(f"[probes] scoring {name}", flush=True)
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
        wanted = {name: (source / f"rm_{arm}_s{seed}", {"arm": arm, "seed": seed})}
    else:
        wanted = {
            run: (source / run, {"arm": arm, "seed": seed, "fold": fold})
            for run, (arm, seed, fold) in member_runs().items()
        }
    if not all(_finished(run) for run, _ in wanted.values()):
        return []
    return [_publish(run, file, **facts) for file, (run, facts) in wanted.items()]


def _finished(run: Path) -> bool:
    return read_record(run / "run.json").get("status") == "finished"


def _publish(run: Path, name: str, **facts: Any) -> dict[str, Any]:
    """Write a run's adapter in bf16 and return its entry in the index."""
    state = load_file(run / "adapter" / "adapter_model.safetensors")
    state = {key: value.to(torch.bfloat16).contiguous() for key, value in state.items()}
    path = MODELS / f"{name}.safetensors"
    atomic_write(path, lambda p: save_file(state, p))
    rewards = torch.tensor([row["reward"] for row in read_jsonl(run / "samples.jsonl")])
    return {
        **facts,
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "run": f"cpu-{run.name}",
        "mean": rewards.mean().item(),
        "std": rewards.std().item(),
    }


def _load(entry: dict[str, Any]) -> RewardModel:
    path = MODELS / entry["file"]
    if not path.exists():
        raise ResultsError(f"results/models/{path.name} is missing; `git checkout` brings it back")
    if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
        raise ResultsError(f"results/models/{path.name} is not the file that was published")
    arm = entry["arm"]
    profile = (member_profile if "fold" in entry else arm_profile)(arm, entry["seed"])
    reward_model = RewardModel.fresh(ARMS[arm].kind, profile)
    set_peft_model_state_dict(reward_model.model, load_file(path))
    return reward_model


if __name__ == "__main__":
    main()
