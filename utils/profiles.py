"""The profiles: the values of every field, and how single ones are replaced.

A profile is data. Code never branches on a profile's name; it reads the fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.config import (
    ConfigError,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    Profile,
    ReinforceConfig,
    RewardConfig,
    known_fields,
)
from utils.files import ROOT

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
