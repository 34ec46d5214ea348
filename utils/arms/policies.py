"""The arms of the policy study and the trials before it, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from utils.config import PROFILES, Profile, flatten, with_fields

SEEDS = (0, 1, 2)  # of the two arms that the report is about


@dataclass(frozen=True)
class PolicyArm:
    """A reward and a way of learning from it.

    Attributes:
        reward: name of the published reward model, "scalar" or "ordinal".
        label: how tables and figures name it.
        readout: how the reward is read off that model, see `utils.rewards.readouts`.
        changes: fields in which it differs from the other arms.
        seeds: with which it is trained.
    """

    reward: str
    label: str
    readout: str = "mean"
    changes: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)


# In which all policies differ from the profile `cpu`. A small rank keeps a published adapter small.
SETTINGS: dict[str, Any] = {
    "evaluation.samples_per_prompt": 2,
    "reinforce.lora_r": 8,
    "reinforce.lora_alpha": 16,
    "reinforce.prompts_per_step": 16,
    "reinforce.steps": 128,
    "reinforce.eval_steps": 16,
    "reinforce.learning_rate": 4e-4,
    "reinforce.beta": 0.07,
    "reinforce.kl_budget": 10.0,
}
ARMS: dict[str, PolicyArm] = {
    "scalar": PolicyArm("scalar", "scalar reward", seeds=SEEDS),
    "ordinal": PolicyArm("ordinal", "ten-class reward", seeds=SEEDS),
    "ordinal_cautious": PolicyArm("ordinal", "ten classes, mean less spread", "minus_spread"),
    "scalar_ema": PolicyArm(
        "scalar", "scalar, exponential baseline", changes={"reinforce.baseline": "ema"}
    ),
    "scalar_none": PolicyArm(
        "scalar", "scalar, constant baseline (SFT mean)", changes={"reinforce.baseline": "none"}
    ),
}
# Arms to compare: those the report is about, the baselines by their names, the readouts.
HEADLINE = ("scalar", "ordinal")
# Standardised rewards have the SFT model's mean subtracted, so "none" has that as its baseline.
BASELINES = {"scalar": "running mean", "scalar_ema": "EMA", "scalar_none": "constant (SFT mean)"}
READOUTS = ("ordinal", "ordinal_cautious")
# The seeds of an arm in one policy, see `utils.reinforce.averaging`; the ending of its name, and
# the scales that are tried on validation prompts.
AVERAGE = "average"
AVERAGE_SCALES = (0.5, 1.0, 1.2, 1.4, 1.6)
# Tried on the scalar reward and judged on validation prompts: first over a few steps and without an
# end at a KL, since what a setting does beyond the budget is part of what it tells, then at full
# length, in half as many steps of twice as many samples as the study's.
_LONG: dict[str, Any] = {
    "reinforce.prompts_per_step": 32,
    "reinforce.steps": 64,
    "reinforce.eval_steps": 8,
}
_SHORT: dict[str, Any] = _LONG | {"reinforce.steps": 24, "reinforce.kl_budget": None}
TRIALS: dict[str, dict[str, Any]] = {
    "lr3e-4_beta0.05": _SHORT | {"reinforce.learning_rate": 3e-4, "reinforce.beta": 0.05},
    "lr6e-4_beta0.1": _SHORT | {"reinforce.learning_rate": 6e-4, "reinforce.beta": 0.1},
    "long_lr6e-4_beta0.1": _LONG | {"reinforce.learning_rate": 6e-4, "reinforce.beta": 0.1},
    "long_lr6e-4_beta0.07": _LONG | {"reinforce.learning_rate": 6e-4, "reinforce.beta": 0.07},
    "long_lr4e-4_beta0.07": _LONG | {"reinforce.learning_rate": 4e-4, "reinforce.beta": 0.07},
}


def policy_folder(arm: str, seed: int) -> str:
    """Return where a policy lies below runs/<profile> or results/<profile>."""
    return f"policies/{arm}/seed{seed}"


def policy_profile(arm: str, seed: int) -> Profile:
    """Return the profile of an arm, whatever REPORT_PROFILE says; an unknown name is a KeyError."""
    return with_fields(PROFILES["cpu"], {**SETTINGS, **ARMS[arm].changes, "seed": seed})


def trial_profile(name: str) -> Profile:
    """Return the profile of a trial; an unknown name is a KeyError."""
    return with_fields(PROFILES["cpu"], {**SETTINGS, **TRIALS[name]})


def settings_table(profile: Profile) -> pd.DataFrame:
    """Compare the settings that shape a policy: a run's, and the study's where they differ."""
    both = {"this run": profile, "the study": policy_profile(HEADLINE[0], SEEDS[0])}
    table = pd.DataFrame({name: pd.Series(flatten(p)).map(str) for name, p in both.items()})
    table = table[table.index.str.startswith(("data.", "model.", "reinforce.", "evaluation."))]
    return table[table["this run"] != table["the study"]].rename_axis("setting")
