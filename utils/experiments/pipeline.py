"""The stages of the report, each made on demand or reused: what the notebooks call.

Every stage has a folder under `runs/<profile>`. A finished one is reused only if the fields of the
configuration that shaped it are the same; see `utils.results.prepare`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pandas as pd
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from utils.arms.policies import policy_folder
from utils.config import Profile, flatten, runs_dir, with_fields
from utils.data.pairs import Group, Pair, PreferenceData, drop_long, load_data, require_splits
from utils.experiments.alignment import align_policy
from utils.experiments.check import check_config, try_model
from utils.experiments.storage import Run, prepare
from utils.files import ResultsError, RunFolder, read_jsonl, write_jsonl
from utils.models.body import load_policy
from utils.models.weights import encode_dialogue, encode_prompt, load_tokenizer
from utils.reinforce.checkpoints import load_adapter
from utils.reinforce.distributed import processes
from utils.reinforce.evaluation import Scorer, evaluate_policy
from utils.reinforce.loop import Monitor
from utils.rewards.evaluation import scored_responses
from utils.rewards.losses import KINDS
from utils.rewards.model import RewardModel
from utils.rewards.training import train_reward_model
from utils.statistics.pairs import pair_metrics

SCALE_PROMPTS = 128  # training prompts whose SFT samples fix the unit of the reward
# Which fields shape a stage's artefact, besides the seed and the data's fingerprint.
REWARD_FIELDS = ("data", "model", "reward", "evaluation")
SAMPLING_FIELDS = ("reinforce.temperature", "reinforce.max_completion_length", "evaluation.seed")
SFT_FIELDS = ("data", "model", *SAMPLING_FIELDS)
ALIGN_FIELDS = ("data", "model", "reward", "reinforce", "evaluation")


@cache
def prepared_data(profile: Profile) -> PreferenceData:
    """Load the data and drop what is too long for the profile, counting it.

    Raises:
        DataError: if the data cannot be used.
        ModelError: if the model's configuration does not suit.
    """
    check_config(profile)
    tokenizer = load_tokenizer(profile.model)

    def encode(messages: Any, response: Any) -> list[int]:
        if response is None:
            return encode_prompt(tokenizer, messages)
        return encode_dialogue(tokenizer, messages, response.text, response.finished)

    limits = profile.data
    data = drop_long(load_data(limits), encode, limits.max_prompt_length, limits.max_length)
    template = len(encode_prompt(tokenizer, [{"role": "user", "content": "Hi"}]))
    require_splits(data, limits, template)
    return data


def stage_config(profile: Profile, fields: tuple[str, ...], **extra: Any) -> dict[str, Any]:
    """Return the sections and single fields that shape a stage, with the data's fingerprint."""
    values = {
        name: value
        for name, value in flatten(profile).items()
        if name in fields or name.partition(".")[0] in fields
    }
    return values | {
        "seed": profile.seed,
        "data.fingerprint": prepared_data(profile).fingerprint,
        **extra,
    }


def open_stage(profile: Profile, name: str, config: dict[str, Any]) -> tuple[Run, bool]:
    """Return the run of a stage, a folder below runs/<profile>, and whether it is finished.

    Raises:
        ModelError: if it is not, and the model does not suit; see `try_model`.
    """
    directory = runs_dir(profile) / name
    state = prepare(directory, config)
    if state != "reuse":
        try_model(profile.model, profile.reward.first_layer)
    run = Run(directory, config, profile.seed, config["data.fingerprint"])
    return run, state == "reuse"


@cache
def reward_stage(kind: str, profile: Profile) -> tuple[RewardModel, Run]:
    """Train a reward model and score the test pairs, or load both.

    `run.json` then holds `metrics`: the pair accuracies with their intervals and, for ten classes,
    the likelihood per pair. `samples.jsonl` holds every test response with its score.
    """
    config = stage_config(profile, REWARD_FIELDS, kind=kind)
    run, finished = open_stage(profile, f"reward_models/{kind}/seed{profile.seed}", config)
    if finished:
        return RewardModel.load(kind, profile, run.directory), run
    if processes().num_processes > 1:
        raise ResultsError(
            f"{run.label} is not there yet, and one process trains it: first run "
            f"`python -m utils.experiments.train reward {kind} --profile {profile.name}`, without "
            "a launcher"
        )
    data = prepared_data(profile)
    groups, pairs = data.groups_of("train"), data.pairs("test")
    return train_and_score(kind, profile, groups, pairs, run), run


def train_and_score(
    kind: str, profile: Profile, groups: Sequence[Group], pairs: Sequence[Pair], run: Run
) -> RewardModel:
    """Train a reward model on groups and score the responses of held-out pairs with it."""
    reward_model = train_reward_model(kind, profile, groups, run)
    print(f"[{run.label}] scoring held-out pairs", flush=True)
    write_jsonl(run.directory / "samples.jsonl", scored_responses(reward_model, pairs))
    run.finish(metrics=pair_metrics(run, pairs, profile.evaluation.bootstrap_samples)[1])
    return reward_model


def trained_reward_models(profile: Profile) -> dict[str, RewardModel]:
    """Return the reward models of a profile by kind, trained if they are not there yet."""
    return {kind: reward_stage(kind, profile)[0] for kind in KINDS}


@cache
def sft_stage(profile: Profile) -> Run:
    """Sample the SFT policy on training prompts: its rewards there are the unit of all rewards."""
    config = stage_config(profile, SFT_FIELDS, prompts=SCALE_PROMPTS, samples=1)
    run, finished = open_stage(profile, "controls/sft_training_prompts", config)
    if not finished:
        print(f"[{run.label}] sampling the SFT model on training prompts", flush=True)
        policy, tokenizer = load_sft(profile)
        chosen = prepared_data(profile).prompts("train")[:SCALE_PROMPTS]
        frame = evaluate_policy(
            *(policy, tokenizer, chosen),
            with_fields(profile, {"evaluation.samples_per_prompt": 1}),
            profile.reinforce.temperature,
            {},
            reference=False,
        )
        write_jsonl(run.directory / "samples.jsonl", frame.to_dict("records"))
        run.finish()
    return run


def load_sft(profile: Profile) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the 4-bit SFT model with its untrained adapter, which is the identity."""
    settings = profile.reinforce
    policy = load_policy(profile.model, settings.lora_r, settings.lora_alpha, profile.seed)
    return policy, load_tokenizer(profile.model)


def reward_scale(reward_model: Scorer, profile: Profile) -> tuple[float, float]:
    """Return mean and standard deviation of the SFT policy's reward on training prompts."""
    rows = read_jsonl(sft_stage(profile).directory / "samples.jsonl")
    messages = {p.id: p.messages for p in prepared_data(profile).prompts("train")}
    turns = [messages[row["prompt_id"]] for row in rows]
    responses, finished = ([row[name] for row in rows] for name in ("response", "finished"))
    rewards = reward_model.score(turns, responses, finished)
    return rewards.mean().item(), rewards.std().item()


def align_stage(
    kind: str, profile: Profile, monitor: Monitor | None = None
) -> tuple[PeftModel, PreTrainedTokenizerBase, Run]:
    """Align a policy with the reward model of a kind, or load the aligned policy.

    See `align_policy` for what `run.json` then holds.
    """
    with processes().main_process_first():  # what is missing is made once
        run, finished = _open_alignment(kind, profile)
        policy, tokenizer = load_sft(profile)
        if finished:
            load_adapter(run.directory, policy)
            return policy, tokenizer, run
        reward_model, _ = reward_stage(kind, profile)
        reward = reward_model, reward_scale(reward_model, profile)
    data = prepared_data(profile)
    align_policy(policy, tokenizer, profile, data, run, reward, {"own": reward}, monitor)
    return policy, tokenizer, run


def align_run(kind: str, profile: Profile) -> Run:
    """Return the run of `align_stage`; if it is finished, no model is loaded."""
    run, finished = _open_alignment(kind, profile)
    return run if finished else align_stage(kind, profile)[2]


def _open_alignment(kind: str, profile: Profile) -> tuple[Run, bool]:
    config = stage_config(profile, ALIGN_FIELDS, kind=kind)
    return open_stage(profile, policy_folder(kind, profile.seed), config)


def before_and_after(
    kind: str,
    profile: Profile,
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    prompts: int,
) -> pd.DataFrame:
    """Answer the first prompts of a split with adapter off and on, with the same sampling noise.

    Returns:
        Columns prompt, before, after, reward_before, reward_after, in SFT standard deviations.
    """
    reward_model, _ = reward_stage(kind, profile)
    aligned = RunFolder(runs_dir(profile) / policy_folder(kind, profile.seed)).info
    mean, std = aligned["reward_mean"], aligned["reward_std"]  # measured for the training
    chosen = prepared_data(profile).prompts(split)[:prompts]
    temperature = profile.reinforce.temperature
    arguments = (policy, tokenizer, chosen, profile, temperature, {kind: reward_model})
    after = evaluate_policy(*arguments).drop_duplicates("prompt_id", ignore_index=True)
    with policy.disable_adapter():
        before = evaluate_policy(*arguments).drop_duplicates("prompt_id", ignore_index=True)
    return pd.DataFrame(
        {
            "prompt": before["prompt"],
            "before": before["response"],
            "after": after["response"],
            "reward_before": (before[f"reward_{kind}"] - mean) / std,
            "reward_after": (after[f"reward_{kind}"] - mean) / std,
        }
    )
