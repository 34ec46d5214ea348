"""The arms of the reward-model study, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.config import PROFILES, Profile, with_fields

HEADLINE_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Arm:
    """A configuration of the study.

    Attributes:
        kind: "scalar" or "ordinal".
        label: how tables and figures name it.
        changes: fields in which it differs from the profile `cpu`.
        seeds: with which it is trained.
    """

    kind: str
    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)


PLACKETT_LUCE = {"reward.scalar_loss": "plackett_luce"}
LIGHT = {"reward.reference_weight": 0.1}
SAMPLES = {"reward.reference_weight": 0.0}
BITS16 = {"model.quantization": "none"}
STRONG = {**PLACKETT_LUCE, **BITS16, "reward.first_layer": 0}
ARMS: dict[str, Arm] = {
    "margin": Arm("scalar", "Bradley-Terry with margin", seeds=HEADLINE_SEEDS),
    "pairwise": Arm("ordinal", "ten classes, pairwise", seeds=HEADLINE_SEEDS),
    "anchored": Arm(
        "ordinal",
        "ten classes, anchored on ratings",
        {"reward.ordinal_loss": "anchored"},
        HEADLINE_SEEDS,
    ),
    "plackett_luce": Arm("scalar", "Plackett-Luce", PLACKETT_LUCE, HEADLINE_SEEDS),
    "margin_light": Arm("scalar", "with margin, references count .1", LIGHT, HEADLINE_SEEDS),
    "pairwise_light": Arm("ordinal", "ten classes, references count .1", LIGHT, HEADLINE_SEEDS),
    "plackett_luce_light": Arm(
        "scalar", "Plackett-Luce, references count .1", {**PLACKETT_LUCE, **LIGHT}
    ),
    "margin_samples": Arm("scalar", "with margin, references left out", SAMPLES),
    "pairwise_samples": Arm("ordinal", "ten classes, references left out", SAMPLES),
    "bt": Arm("scalar", "Bradley-Terry", {"reward.margin_scale": 0.0}),
    "scaled": Arm(
        "scalar", "Bradley-Terry, scaled", {"reward.scalar_loss": "scaled_bradley_terry"}
    ),
    "ties_half": Arm("ordinal", "ten classes, ties half", {"reward.ordinal_loss": "ties_half"}),
    "soft": Arm("ordinal", "ten classes, soft targets", {"reward.ordinal_loss": "soft_classes"}),
    "bits16": Arm("scalar", "with margin, LoRA on 16 bits", BITS16),
    "strong": Arm("scalar", "Plackett-Luce, 16 bits, all layers", STRONG),
    "strong_light": Arm(
        "scalar", "Plackett-Luce, 16 bits, all layers, references count .1", {**STRONG, **LIGHT}
    ),
    "full_tuning": Arm(
        "scalar",
        "with margin, full tuning, 16 bits",
        {**BITS16, "reward.lora_r": 0, "reward.learning_rate": 1e-4, "reward.save_steps": 1000},
    ),
    "trl": Arm("scalar", "with margin, trl.RewardTrainer", {"reward.trainer": "pairs"}),
    **{
        f"{name}_{share}": Arm(kind, f"{label}, {share}% of prompts", {"data.train_prompts": n})
        for name, kind, label in (
            ("margin", "scalar", "with margin"),
            ("pairwise", "ordinal", "ten classes"),
        )
        for share, n in ((10, 46), (25, 115), (50, 230))
    },
    "dropped": Arm("scalar", "over 128 tokens dropped", {"reward.train_max_length": 128}),
}


def arm_profile(name: str, seed: int) -> Profile:
    """Return the profile of an arm, whatever REPORT_PROFILE says; an unknown name is a KeyError."""
    return with_fields(PROFILES["cpu"], {**ARMS[name].changes, "seed": seed})
