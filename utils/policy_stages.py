"""The stages that train the policies of the study: arms, trials, rivals, the units of rewards."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from utils.alignment import Scale, align_policy
from utils.checkpoints import load_adapter
from utils.config import Profile, config_hash
from utils.judge import Judge
from utils.pipeline import (
    SFT_FIELDS,
    load_sft,
    open_stage,
    prepared_data,
    reward_scale,
    runs_dir,
    sample_sft,
    stage_config,
    texts_of,
)
from utils.policy_arms import ARMS, PolicyArm, policy_profile, trial_profile
from utils.profiles import with_fields
from utils.publish import read_record
from utils.published import load_published, published_sums
from utils.readouts import PolicyReward, rival_distributions
from utils.results import Run, read_jsonl
from utils.rewards import RewardModel

POLICY_FIELDS = ("data", "model", "reinforce", "evaluation")
# Noise of its own: rivals share no draw with an evaluation.
RIVALS: dict[str, Any] = {"evaluation.seed": 4321}
RIVAL_SAMPLES = 2


def policy_stage(name: str, seed: int) -> Run:
    """Train the policy of an arm with one seed, or find it done."""
    return _train(f"align_{name}_s{seed}", ARMS[name], policy_profile(name, seed))


def trial_stage(name: str) -> Run:
    """Train a policy with the settings of a trial and the scalar reward, or find it done."""
    return _train(f"trial_{name}", ARMS["scalar"], trial_profile(name))


def rivals_stage() -> Run:
    """Sample the SFT model on all training prompts: whom "beats_sft" has to beat."""
    profile = with_fields(base_profile(), RIVALS)
    return sample_sft("sft_rivals", profile, prompts=None, samples=RIVAL_SAMPLES)


def scale_stage(reward: str, readout: str = "mean") -> Scale:
    """Measure mean and standard deviation of a reward on SFT samples, or read what was measured.

    They are the unit of all arms and seeds, and a stage of its own, so that policies that are
    evaluated on other machines, with other rounding, share it.
    """
    profile, facts = base_profile(), reward_facts(reward, readout)
    config = stage_config(profile, SFT_FIELDS, models=published_sums((reward,)), **facts)
    run, finished = open_stage(profile, f"scale_{reward}_{readout}", config)
    if not finished:
        rated_by = scorer(reward) if readout == "mean" else _training_reward(reward, readout)
        run.finish(scale=reward_scale(rated_by, profile))
    mean, std = run.info["scale"]
    return mean, std


def trained_policies() -> Iterator[tuple[str, int, str]]:
    """Yield arm, seed and configuration hash of each finished policy with today's settings."""
    for name, arm in ARMS.items():
        for seed in arm.seeds:
            profile = policy_profile(name, seed)
            record = read_record(runs_dir(profile) / f"align_{name}_s{seed}" / "run.json")
            wanted = config_hash(_config(arm, profile))
            if record.get("status") == "finished" and record["config_hash"] == wanted:
                yield name, seed, wanted
            else:
                print(f"[align_{name}_s{seed}] is not trained yet, and not evaluated", flush=True)


def load_trained(name: str, seed: int) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a trained policy, rounded as it is published: what is published is what is tested."""
    profile = policy_profile(name, seed)
    policy, tokenizer = load_sft(profile)
    load_adapter(runs_dir(profile) / f"align_{name}_s{seed}", policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.bfloat16())
    return policy, tokenizer


def base_profile() -> Profile:
    """Return the profile that all evaluations and units are of: the headline arm's, seed 0."""
    return policy_profile("scalar", 0)


@cache
def scorer(name: str) -> RewardModel | Judge:
    """Return a published reward model or the judge, loaded once."""
    return load_published(name)


def reward_facts(reward: str, readout: str) -> dict[str, Any]:
    """Return what shapes a reward, for a stage's configuration."""
    facts: dict[str, Any] = {"reward": reward, "readout": readout}
    if readout == "beats_sft":
        facts |= {"rivals": RIVALS, "rival_samples": RIVAL_SAMPLES}
    return facts


def _train(stage: str, arm: PolicyArm, profile: Profile) -> Run:
    run, finished = open_stage(profile, stage, _config(arm, profile))
    if not finished:
        own, judge = ((scorer(name), scale_stage(name)) for name in (arm.reward, "judge"))
        training = _training_reward(arm.reward, arm.readout), scale_stage(arm.reward, arm.readout)
        policy, tokenizer = load_sft(profile)
        align_policy(
            *(policy, tokenizer, profile, prepared_data(profile), run),
            training,
            {"own": own, "judge": judge},
        )
    return run


def _config(arm: PolicyArm, profile: Profile) -> dict[str, Any]:
    models, facts = published_sums((arm.reward, "judge")), reward_facts(arm.reward, arm.readout)
    return stage_config(profile, POLICY_FIELDS, models=models, **facts)


@cache
def _training_reward(reward: str, readout: str) -> PolicyReward:
    reward_model = scorer(reward)
    if readout != "beats_sft":
        return PolicyReward(reward_model, readout)
    rows = read_jsonl(rivals_stage().directory / "samples.jsonl")
    texts = texts_of(rows, prepared_data(base_profile()))
    return PolicyReward(reward_model, readout, rival_distributions(reward_model, *texts))
