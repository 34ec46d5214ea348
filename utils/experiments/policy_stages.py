"""The stages that train the policies of the study: arms, trials, the units of rewards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from utils.arms.policies import ARMS, PolicyArm, policy_folder, policy_profile, trial_profile
from utils.config import Profile, config_hash
from utils.experiments.alignment import Scale, align_policy
from utils.experiments.pipeline import (
    SFT_FIELDS,
    load_sft,
    open_stage,
    prepared_data,
    reward_scale,
    runs_dir,
    stage_config,
)
from utils.experiments.publish import read_record
from utils.experiments.published import load_published, published_sums
from utils.experiments.storage import Run
from utils.reinforce.checkpoints import load_adapter
from utils.rewards.readouts import PolicyReward

POLICY_FIELDS = ("data", "model", "reinforce", "evaluation")


def policy_stage(name: str, seed: int) -> Run:
    """Train the policy of an arm with one seed, or find it done."""
    return _train(policy_folder(name, seed), ARMS[name], policy_profile(name, seed))


def trial_stage(name: str) -> Run:
    """Train a policy with the settings of a trial and the scalar reward, or find it done."""
    return _train(f"sweeps/{name}", ARMS["scalar"], trial_profile(name))


def scale_stage(reward: str, readout: str = "mean") -> Scale:
    """Measure mean and standard deviation of a reward on SFT samples, or read what was measured.

    They are the unit of all arms and seeds, and a stage of its own, so that policies that are
    evaluated on other machines, with other rounding, share it.
    """
    profile, models = base_profile(), published_sums((reward,))
    config = stage_config(profile, SFT_FIELDS, models=models, reward=reward, readout=readout)
    run, finished = open_stage(profile, f"controls/scale_{reward}_{readout}", config)
    if not finished:
        model = load_published(reward)
        rated_by = model if readout == "mean" else PolicyReward(model, readout)
        run.finish(scale=reward_scale(rated_by, profile))
    mean, std = run.info["scale"]
    return mean, std


def trained_policies() -> Iterator[tuple[str, int, str]]:
    """Yield arm, seed and configuration hash of each finished policy with today's settings."""
    for name, arm in ARMS.items():
        for seed in arm.seeds:
            profile = policy_profile(name, seed)
            folder = policy_folder(name, seed)
            record = read_record(runs_dir(profile) / folder / "run.json")
            wanted = config_hash(_config(arm, profile))
            if record.get("status") == "finished" and record["config_hash"] == wanted:
                yield name, seed, wanted
            else:
                print(f"[{folder}] is not trained yet, and not evaluated", flush=True)


def load_trained(name: str, seed: int) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a trained policy, rounded as it is published: what is published is what is tested."""
    profile = policy_profile(name, seed)
    policy, tokenizer = load_sft(profile)
    load_adapter(runs_dir(profile) / policy_folder(name, seed), policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.bfloat16())
    return policy, tokenizer


def base_profile() -> Profile:
    """Return the profile that all evaluations and units are of: the headline arm's, seed 0."""
    return policy_profile("scalar", 0)


def _train(stage: str, arm: PolicyArm, profile: Profile) -> Run:
    run, finished = open_stage(profile, stage, _config(arm, profile))
    if not finished:
        own, judge = ((load_published(name), scale_stage(name)) for name in (arm.reward, "judge"))
        training = PolicyReward(own[0], arm.readout), scale_stage(arm.reward, arm.readout)
        policy, tokenizer = load_sft(profile)
        align_policy(
            *(policy, tokenizer, profile, prepared_data(profile), run),
            training,
            {"own": own, "judge": judge},
        )
    return run


def _config(arm: PolicyArm, profile: Profile) -> dict[str, Any]:
    facts = {"reward": arm.reward, "readout": arm.readout}
    models = published_sums((arm.reward,))  # the judge only watches
    return stage_config(profile, POLICY_FIELDS, models=models, **facts)
