"""The test-prompt comparison of the SFT model, its controls and the aligned policies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from utils.arms.policies import policy_folder
from utils.config import Profile, with_fields
from utils.experiments.alignment import Scale
from utils.experiments.pipeline import (
    ALIGN_FIELDS,
    align_stage,
    load_sft,
    open_stage,
    prepared_data,
    reward_scale,
    stage_config,
)
from utils.files import read_jsonl, write_jsonl
from utils.reinforce.evaluation import Scorer, evaluate_policy
from utils.rewards.losses import KINDS
from utils.statistics.bootstrap import clustered_interval
from utils.statistics.policy_stats import compare

Loader = Callable[[], tuple[PeftModel, PreTrainedTokenizerBase]]


class Comparison:
    """Evaluates policies on the same prompts with the same reward models.

    Attributes:
        profile: what is compared.
        reward_models: what scores the completions, by name.
        scales: mean and standard deviation of the SFT rewards, by name of the reward model.
    """

    def __init__(
        self,
        profile: Profile,
        reward_models: Mapping[str, Scorer],
        fields: tuple[str, ...] = ALIGN_FIELDS,
        facts: Mapping[str, Any] | None = None,
        scales: Mapping[str, Scale] | None = None,
    ) -> None:
        """Load the SFT model.

        Args:
            profile: see above.
            reward_models: see above.
            fields: sections and fields of the profile that shape an evaluation.
            facts: what else does.
            scales: see above; None measures them.
        """
        self.profile = profile
        self.reward_models = reward_models
        self.scales = scales or {
            name: reward_scale(model, profile) for name, model in reward_models.items()
        }
        self._fields, self._facts = fields, facts or {}
        self._sft = load_sft(profile)

    def policies(self) -> dict[str, pd.DataFrame]:
        """Evaluate the SFT model, its controls, and the profile's policy of each kind.

        Returns:
            Rows of `evaluate_policy` by policy, with the rewards in SFT standard deviations.
        """
        frames = self.controls()
        temperature = self.profile.reinforce.temperature
        for kind in KINDS:
            frames[f"align_{kind}"] = self.evaluate(
                *(f"align_{kind}", lambda kind=kind: align_stage(kind, self.profile)[:2]),
                temperature,
                folder=f"{policy_folder(kind, self.profile.seed)}/test",
            )
        return frames

    def controls(self) -> dict[str, pd.DataFrame]:
        """Evaluate the SFT model, first, at its best temperature, greedy, and in 16 bits."""
        temperature = self.profile.reinforce.temperature
        best = self.best_temperature()
        unquantised = replace(self.profile, model=replace(self.profile.model, quantization="none"))
        return {
            "sft": self.evaluate("sft", self.sft, temperature),
            "sft_best": self.evaluate("sft_best", self.sft, best),
            "sft_greedy": self.evaluate("sft_greedy", self.sft, 0.0),
            "sft_16bit": self.evaluate(
                "sft_16bit", lambda: load_sft(unquantised), temperature, reference=False
            ),
        }

    def sft(self) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        """Return the 4-bit SFT model and its tokenizer, loaded once."""
        return self._sft

    def evaluate(
        self,
        name: str,
        load: Loader,
        temperature: float,
        split: str = "test",
        reference: bool = True,
        changes: Mapping[str, Any] | None = None,
        folder: str | None = None,
        **facts: Any,
    ) -> pd.DataFrame:
        """Evaluate one policy, or read its finished evaluation.

        Args:
            name: of the policy.
            load: returns policy and tokenizer; called if they are needed.
            temperature: of this policy; 0 is greedy.
            split: whose prompts are answered.
            reference: see `evaluate_policy`.
            changes: fields in which the sampling differs from the profile.
            folder: below runs/<profile>; None: that of a control.
            facts: what else shapes this evaluation.
        """
        profile = with_fields(self.profile, changes or {})
        facts = {"policy": name, "temperature": temperature, "split": split, **self._facts, **facts}
        config = stage_config(profile, self._fields, **facts)
        run, finished = open_stage(profile, folder or f"controls/{name}/{split}", config)
        path = run.directory / "samples.jsonl"
        if not finished:
            prompts = prepared_data(profile).prompts(split)
            print(
                f"[{run.label}] {len(prompts)} prompts at temperature {temperature}",
                flush=True,
            )
            frame = evaluate_policy(
                *load(), prompts, profile, temperature, self.reward_models, reference
            )
            for kind, (mean, std) in self.scales.items():
                frame[f"reward_{kind}"] = (frame[f"reward_{kind}"] - mean) / std
            write_jsonl(path, frame.to_dict("records"))
            run.finish(scales=self.scales)
        return pd.DataFrame(read_jsonl(path))

    def best_temperature(self) -> float:
        """Choose the SFT model's temperature on the validation prompts.

        The candidates are `evaluation.sft_temperatures` and the training temperature; the best has
        the highest mean of all standardised rewards.
        """
        settings = self.profile
        candidates = {*settings.evaluation.sft_temperatures, settings.reinforce.temperature}
        means = {}
        for temperature in sorted(candidates):
            frame = self.evaluate(f"sft_T{temperature}", self.sft, temperature, "validation")
            rewards = frame[[f"reward_{name}" for name in self.reward_models]]
            means[temperature] = rewards.to_numpy().mean()
        best = max(means, key=means.__getitem__)
        listed = ", ".join(f"{t}: {value:+.2f}" for t, value in means.items())
        print(f"[comparison] SFT reward on validation prompts by temperature: {listed}")
        return best


def gains_table(frames: Mapping[str, pd.DataFrame], samples: int) -> pd.DataFrame:
    """Hold the aligned policies against the SFT model, and it at its best temperature.

    Args:
        frames: of `Comparison.policies`.
        samples: bootstrap resamples.

    Returns:
        A row per policy and reward model: policy, reward; the paired `difference` to SFT with low,
        high and win_rate; and that to SFT at its best temperature, `beyond_best_value`, with
        `beyond_best_low` and `beyond_best_high`.
    """
    rows = []
    for policy, kind in itertools.product([f"align_{own}" for own in KINDS], KINDS):
        to_sft, beyond = (
            compare({base: frames[base], policy: frames[policy]}, f"reward_{kind}", samples).iloc[1]
            for base in ("sft", "sft_best")
        )
        row = {"policy": policy, "reward": kind}
        row |= to_sft[["difference", "low", "high", "win_rate"]].to_dict()
        ends = {"value": "difference", "low": "low", "high": "high"}
        rows.append(row | {f"beyond_best_{end}": beyond[name] for end, name in ends.items()})
    return pd.DataFrame(rows)


def category_gains(frames: Mapping[str, pd.DataFrame], samples: int) -> pd.DataFrame:
    """Return each aligned policy's gain over SFT by category, under its own reward model.

    Returns:
        Rows of policy, category, value, low, high and n (prompts); none without categories.
    """
    rows, base = [], frames["sft"]
    for kind in KINDS:
        gains = frames[f"align_{kind}"][f"reward_{kind}"] - base[f"reward_{kind}"]
        for category, prompts in base.groupby("category")["prompt_id"]:
            found = clustered_interval(gains[prompts.index], prompts, samples)
            row = {"policy": f"align_{kind}", "category": category, **found}
            rows.append(row | {"n": prompts.nunique()})
    return pd.DataFrame(rows)
