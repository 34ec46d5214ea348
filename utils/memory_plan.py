"""What a run will need in memory, and the batches that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import psutil
import torch
from transformers import LlamaConfig

from utils.config import Profile
from utils.memory import MemoryTooSmall, fitting_size, free_memory_gb
from utils.model_size import GB, Arithmetic, ModelSize, device_arithmetic
from utils.models import device
from utils.weights import transformers_config

LIBRARIES_GB = 1.0  # of a Python process with all libraries, before any weights
RESPONSES = 4  # in a group of rated responses, at most
T4, T4_GB = Arithmetic("a T4", torch.float16, four_bits=True, grouped=False), 15.0
# SmolLM2 in its three sizes: hidden, layers, intermediate, heads, key-value heads.
SIZES = {
    "SmolLM2-135M": (576, 30, 1536, 9, 3),
    "SmolLM2-360M": (960, 32, 2560, 15, 5),
    "SmolLM2-1.7B": (2048, 24, 8192, 32, 32),
}


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will need, in GB (10^9 bytes).

    Attributes:
        title: the profile and the device.
        batches: of the plan, by name.
        reward: parts of a reward model's training; "update" grows with its micro-batch.
        alignment: parts of the alignment, the frozen reward model among them; "update" and
            "sampling", which take turns, grow with their batches.
    """

    title: str
    batches: dict[str, int]
    reward: dict[str, float]
    alignment: dict[str, float]

    @property
    def total(self) -> float:
        """The larger of the two stages."""
        turns = self.alignment["sampling"], self.alignment["update"]
        return max(sum(self.reward.values()), sum(self.alignment.values()) - min(turns))


def memory_plan(
    profile: Profile,
    micro_batch: int = 1,
    micro_groups: int = 1,
    sampled: int = 1,
    size: ModelSize | None = None,
    how: Arithmetic | None = None,
    responses: int = RESPONSES,
) -> MemoryPlan:
    """Return what training a reward model and aligning with it will need.

    Args:
        profile: the settings.
        micro_batch: sequences in one pass of the policy's update.
        micro_groups: groups in one pass of the reward model's update.
        sampled: sequences that are sampled together.
        size: of the model; None: of the profile's.
        how: the kind of device; None: this machine's.
        responses: in a group.
    """
    size = size or ModelSize(transformers_config(profile.model))
    how = how or device_arithmetic(profile.model)
    data, reward, policy = profile.data, profile.reward, profile.reinforce
    first, rank = reward.first_layer, reward.lora_r
    body, adapter = size.weights_gb(how, first), size.adapter_gb(rank, first)
    read = micro_groups * responses * data.max_length
    prompt, completion = data.max_prompt_length, policy.max_completion_length
    return MemoryPlan(
        f"{profile.name} on {how.name}",
        {"micro_batch": micro_batch, "micro_groups": micro_groups, "sampled": sampled},
        {
            "weights": body,
            "adapters": adapter,
            "update": size.activations_gb(read, how, rank, first, autocast=True),
        },
        {
            "policy": size.weights_gb(how),
            "adapters": size.adapter_gb(policy.lora_r, 0),
            "reward model": body + adapter / 4,
            "logits": size.logits_gb(),
            "sampling": size.sampling_gb(sampled, prompt, completion, how),
            "update": size.activations_gb(micro_batch * (prompt + completion), how, policy.lora_r),
        },
    )


def describe(plan: MemoryPlan) -> str:
    """Return the plan as the lines that are printed before a run.

    It counts tensors. The libraries, and what the allocator keeps for the next time, come on top.
    """
    available, batches = _available_gb(), plan.batches
    total = f"{plan.total:.1f} GB of tensors at most, {available:.1f} GB are there"
    lines = [f"[memory] plan for {plan.title}: {total}; in GB,"]
    stages = {
        f"reward model, {batches['micro_groups']} groups in a pass": plan.reward,
        f"alignment, {batches['micro_batch']} sequences in a pass, "
        f"{batches['sampled']} sampled together": plan.alignment,
    }
    for stage, parts in stages.items():
        shown = ", ".join(f"{name} {gb:.2f}" for name, gb in parts.items())
        lines.append(f"[memory] {stage}: {shown}")
    return "\n".join(lines)


def policy_micro_batch(profile: Profile) -> int:
    """Return how many sequences one pass of the policy's update reads.

    It is `reinforce.micro_batch` if that is given, otherwise a power of two that fits.

    Raises:
        MemoryTooSmall: if a GPU has not the memory for a single one.
    """
    given = profile.reinforce.micro_batch
    if given is not None and device().type == "cpu":
        return given
    available, parts = _available_gb(), _without_sampling(memory_plan(profile))
    _require("the alignment", parts, available)
    return given or _fit(parts, available, profile.reinforce.prompts_per_step)


def reward_micro_groups(profile: Profile, responses: int = RESPONSES) -> int:
    """Return how many groups one pass of the reward model's update reads.

    It is `reward.micro_groups` if that is given, otherwise a divisor of `reward.groups_per_step`
    that fits.

    Args:
        profile: the settings.
        responses: in the largest group.

    Raises:
        MemoryTooSmall: if a GPU has not the memory for a single one.
    """
    given, groups = profile.reward.micro_groups, profile.reward.groups_per_step
    if given is not None and device().type == "cpu":
        return given
    available, parts = _available_gb(), memory_plan(profile, responses=responses).reward
    _require("training the reward model", parts, available)
    return given or largest_divisor(groups, _fit(parts, available, groups))


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of `number` that is at most `limit`."""
    return next(n for n in range(limit, 0, -1) if number % n == 0)


def plan_table(profile: Profile) -> pd.DataFrame:
    """Return what SmolLM2 in its three sizes would need on a T4, one row each.

    Micro-batches that the profile leaves open, and the sampling batch, are those that fit a T4.
    """
    rows = {}
    for name, (hidden, layers, inner, heads, groups) in SIZES.items():
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            tie_word_embeddings=True,
        )
        size = ModelSize(config)
        one = memory_plan(profile, size=size, how=T4)
        update = _without_sampling(one)
        batches = {
            "micro-batch": profile.reinforce.micro_batch
            or _fit(update, T4_GB, profile.reinforce.prompts_per_step),
            "groups": profile.reward.micro_groups
            or _fit(one.reward, T4_GB, profile.reward.groups_per_step),
            "sampled together": _fit(
                update | {"update": one.alignment["sampling"]},
                T4_GB,
                profile.evaluation.batch_size,
            ),
        }
        total = memory_plan(profile, *batches.values(), size, T4).total
        rows[name] = {
            "parameters, millions": size.parameters / 1e6,
            "weights in 16 bits, GB": 2 * size.parameters / GB,
            "weights in 4 bits, GB": size.weights_gb(T4),
            "plan with batches of 1, GB": one.total,
            **batches,
            "plan with these, GB": total,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _without_sampling(plan: MemoryPlan) -> dict[str, float]:
    return {name: gb for name, gb in plan.alignment.items() if name != "sampling"}


def _fit(parts: dict[str, float], available: float, largest: int) -> int:
    """Return the batch that fits, from the parts of a plan with a batch of one."""
    row = parts["update"]
    return fitting_size(row, sum(parts.values()) - row, available, largest)


def _require(stage: str, parts: dict[str, float], available: float) -> None:
    needed = sum(parts.values())
    if device().type == "cuda" and needed > available:
        raise MemoryTooSmall(
            f"{stage} needs {needed:.1f} GB with a batch of 1, and the GPU has {available:.1f} GB "
            "free; shorten reinforce.max_completion_length, data.max_prompt_length or "
            "data.max_length, choose a smaller model.name, or use a GPU with more memory"
        )


def _available_gb() -> float:
    """Return what is free or already this process's: a plan counts loaded weights, too."""
    if device().type == "cuda":
        return free_memory_gb() + torch.cuda.memory_reserved() / GB
    return free_memory_gb() + psutil.Process().memory_info().rss / GB - LIBRARIES_GB
