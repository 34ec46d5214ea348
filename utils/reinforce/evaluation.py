"""Held-out evaluation: text statistics, and policies compared on the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from utils.config import Profile
from utils.data.pairs import Prompt
from utils.data.texts import repetition
from utils.models.weights import encode_prompt
from utils.reinforce.sampling import Rollout, batched_logprobs, sample, sampling_noise


class Scorer(Protocol):
    """Whatever rewards responses: a reward model, the judge."""

    def score(
        self,
        prompts: Sequence[Sequence[Mapping[str, str]]],
        responses: Sequence[str],
        finished: Sequence[bool],
    ) -> Tensor:
        """Return raw rewards, fp32 on the CPU, shape (rows,)."""


def evaluate_policy(
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    profile: Profile,
    temperature: float,
    reward_models: Mapping[str, Scorer],
    reference: bool = True,
) -> pd.DataFrame:
    """Sample each prompt, score the completions, and measure the KL to the SFT policy.

    All policies get the same noise, so a difference between two is not one between their dice.

    Args:
        policy: the policy; for the SFT model, call this inside `disable_adapter()`.
        tokenizer: the policy's.
        prompts: held-out prompts.
        profile: length limit, samples per prompt, seed and batch size.
        temperature: of this policy; 0 is greedy.
        reward_models: by name; each gives a column `reward_<name>`, raw.
        reference: whether the adapter-free model is the reference for the KL; False for a model
            whose SFT reference is another one.

    Returns:
        One row per completion.
    """
    settings, limit = profile.evaluation, profile.reinforce.max_completion_length
    batch = [prompt for prompt in prompts for _ in range(settings.samples_per_prompt)]
    ids = [encode_prompt(tokenizer, prompt.messages) for prompt in batch]
    noise = sampling_noise(settings.seed, len(batch), limit)
    rollout = sample(policy, tokenizer, ids, noise, temperature, settings.batch_size)
    frame = pd.DataFrame(
        {
            "prompt_id": [prompt.id for prompt in batch],
            "category": [prompt.category for prompt in batch],
            "prompt": [prompt.messages[-1]["content"] for prompt in batch],
            "response": rollout.texts,
            "finished": rollout.finished,
            "length": rollout.lengths().int().tolist(),
            "repetition": [repetition(text) for text in rollout.texts],
        }
    )
    frame["kl"] = (
        sequence_kl(policy, tokenizer, rollout, temperature, profile) if reference else None
    )
    messages = [prompt.messages for prompt in batch]
    for name, reward_model in reward_models.items():
        frame[f"reward_{name}"] = reward_model.score(messages, rollout.texts, rollout.finished)
    return frame


def sequence_kl(
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    temperature: float,
    profile: Profile,
) -> np.ndarray:
    """Log pi(y) - log pi_ref(y) of each completion, in nats, shape (rows,).

    The reference is the SFT model at the training temperature. A greedy policy gives its own
    completion probability one.
    """
    pad = tokenizer.pad_token_id
    own = torch.zeros(len(rollout))
    if temperature > 0:
        own, _ = batched_logprobs(policy, rollout, temperature, pad)
    with policy.disable_adapter():
        reference, _ = batched_logprobs(policy, rollout, profile.reinforce.temperature, pad)
    return (own - reference).numpy()
