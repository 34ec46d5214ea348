"""The two kinds of reward model: scoring text, saving and loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.config import Profile
from utils.files import atomic_write, run_label
from utils.models.body import compute_dtype, device, load_reward_base
from utils.models.memory import BatchSize
from utils.models.weights import ModelError, encode_dialogue, load_tokenizer, pad_right
from utils.rewards.losses import KINDS, reward_from_logits


class RewardModel:
    """A reward model that scores text.

    Attributes:
        kind: "scalar" (a Bradley-Terry logit) or "ordinal" (a distribution over ratings 1..10,
            read by its mean).
        batch: how many responses are read together.
    """

    def __init__(
        self,
        kind: str,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.kind = kind
        self.model = model
        self.tokenizer = tokenizer
        self.batch = BatchSize("responses scored together", 32)

    @classmethod
    def fresh(cls, kind: str, profile: Profile) -> RewardModel:
        """Return an untrained reward model."""
        reward = profile.reward
        model = load_reward_base(
            profile.model,
            KINDS[kind],
            reward.lora_r,
            reward.lora_alpha,
            reward.first_layer,
            profile.seed,
        )
        return cls(kind, model, load_tokenizer(profile.model))

    @classmethod
    def load(cls, kind: str, profile: Profile, directory: Path) -> RewardModel:
        """Load what `save` wrote.

        Raises:
            ModelError: if the saved file is missing or cut short.
        """
        reward_model = cls.fresh(kind, profile)
        adapted = profile.reward.lora_r > 0
        name = "adapter_model.safetensors" if adapted else "model.safetensors"
        try:
            state = load_file(directory / "adapter" / name)
        except Exception as error:
            raise ModelError(
                f"{run_label(directory)}: the saved adapter cannot be read: {error}"
            ) from error
        if adapted:
            set_peft_model_state_dict(reward_model.model, state)
        else:
            reward_model.model.load_state_dict(state)
            reward_model.round()
        return reward_model

    def save(self, directory: Path) -> None:
        """Write adapter and head, or without an adapter all weights, to `directory/adapter`."""
        atomic_write(directory / "adapter", self.model.save_pretrained)

    def round(self) -> None:
        """Turn weights that were trained in full, in fp32, into the dtype they are read in."""
        self.model.to(compute_dtype(device()))
        self.model.score.float()

    @torch.no_grad()
    def logits(
        self,
        prompts: Sequence[Sequence[Mapping[str, str]]],
        responses: Sequence[str],
        finished: Sequence[bool],
    ) -> Tensor:
        """Return the head's outputs, fp32 on the CPU, shape (rows, 1 or 10).

        Rows are sorted by length for speed; the result is in the order given.
        """
        texts = zip(prompts, responses, finished, strict=True)
        rows = [encode_dialogue(self.tokenizer, *text) for text in texts]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        out = torch.empty(len(rows), KINDS[self.kind])
        self.model.eval()

        def read(size: int) -> Tensor:
            for start in range(0, len(rows), size):
                chunk = order[start : start + size]
                ids = pad_right([rows[index] for index in chunk], self.tokenizer.pad_token_id)
                logits = self.model(input_ids=ids.to(device()), use_cache=False).logits
                out[chunk] = logits.float().cpu()
            return out

        return self.batch.run(read)

    def score(
        self,
        prompts: Sequence[Sequence[Mapping[str, str]]],
        responses: Sequence[str],
        finished: Sequence[bool],
    ) -> Tensor:
        """Return one reward per response, shape (rows,): the logit, or the expected rating."""
        return reward_from_logits(self.logits(prompts, responses, finished))
