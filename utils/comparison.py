"""The test-prompt comparison of the SFT model, its controls and the aligned policies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pandas as pd
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from utils.config import Profile
from utils.data import Prompt
from utils.evaluation import evaluate_policy
from utils.pipeline import (
    ALIGN_FIELDS,
    align_stage,
    load_sft,
    open_stage,
    prepared_data,
    reward_scale,
    reward_stage,
    stage_config,
)
from utils.results import read_jsonl, write_jsonl
from utils.rewards import KINDS, RewardModel

Loader = Callable[[], tuple[PeftModel, PreTrainedTokenizerBase]]


class Comparison:
    """Evaluates policies on the same prompts with both reward models, loading each model once.

    Attributes:
        profile: what is compared.
        scales: mean and standard deviation of the SFT rewards, by kind of reward model.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.reward_models: dict[str, RewardModel] = {
            kind: reward_stage(kind, profile)[0] for kind in KINDS
        }
        self.scales = {
            kind: reward_scale(model, profile) for kind, model in self.reward_models.items()
        }
        self._sft = load_sft(profile)

    def policies(self) -> dict[str, pd.DataFrame]:
        """Evaluate every policy and control on the test prompts, the SFT model first.

        Returns:
            Rows of `evaluate_policy` by policy, with the rewards in SFT standard deviations.
        """
        temperature = self.profile.reinforce.temperature
        best = self.best_temperature()
        unquantised = replace(self.profile, model=replace(self.profile.model, quantization="none"))
        frames = {
            "sft": self.evaluate("sft", lambda: self._sft, temperature),
            "sft_best": self.evaluate("sft_best", lambda: self._sft, best),
            "sft_greedy": self.evaluate("sft_greedy", lambda: self._sft, 0.0),
            "sft_16bit": self.evaluate(
                "sft_16bit", lambda: load_sft(unquantised), temperature, reference=False
            ),
        }
        for kind in KINDS:
            frames[f"align_{kind}"] = self.evaluate(
                f"align_{kind}", lambda kind=kind: align_stage(kind, self.profile)[:2], temperature
            )
        return frames

    def evaluate(
        self,
        name: str,
        load: Loader,
        temperature: float,
        split: str = "test",
        reference: bool = True,
    ) -> pd.DataFrame:
        """Evaluate one policy, or read its finished evaluation."""
        config = stage_config(
            self.profile, ALIGN_FIELDS, policy=name, temperature=temperature, split=split
        )
        run, finished = open_stage(self.profile, f"{split}_{name}", config)
        path = run.directory / "samples.jsonl"
        if not finished:
            prompts = prepared_data(self.profile).prompts(split)
            print(
                f"[{run.directory.name}] {len(prompts)} prompts at temperature {temperature}",
                flush=True,
            )
            frame = self._sampled(*load(), prompts, temperature, reference)
            write_jsonl(path, frame.to_dict("records"))
            run.finish(scales=self.scales)
        return pd.DataFrame(read_jsonl(path))

    def best_temperature(self) -> float:
        """Choose the SFT model's temperature on the validation prompts.

        The candidates are `evaluation.sft_temperatures` and the training temperature; the best has
        the highest mean of both standardised rewards.
        """
        settings = self.profile
        candidates = {*settings.evaluation.sft_temperatures, settings.reinforce.temperature}
        means = {}
        for temperature in sorted(candidates):
            frame = self.evaluate(
                f"sft_T{temperature}", lambda: self._sft, temperature, "validation"
            )
            means[temperature] = frame[[f"reward_{kind}" for kind in KINDS]].to_numpy().mean()
        best = max(means, key=means.__getitem__)
        listed = ", ".join(f"{t}: {value:+.2f}" for t, value in means.items())
        print(f"[comparison] SFT reward on validation prompts by temperature: {listed}")
        return best

    def _sampled(
        self,
        policy: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[Prompt],
        temperature: float,
        reference: bool,
    ) -> pd.DataFrame:
        frame = evaluate_policy(
            policy,
            tokenizer,
            prompts,
            self.profile,
            temperature,
            self.reward_models,
            reference,
        )
        for kind, (mean, std) in self.scales.items():
            frame[f"reward_{kind}"] = (frame[f"reward_{kind}"] - mean) / std
        return frame
