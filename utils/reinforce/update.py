"""One gradient step of the policy, whatever memory, precision and number of processes allow."""

from __future__ import annotations

import math

import torch
from peft import PeftModel
from torch import Tensor

from utils.config import ReinforceConfig
from utils.models.body import compute_dtype, device
from utils.models.memory import BatchSize
from utils.reinforce.baselines import reinforce_loss
from utils.reinforce.distributed import sum_gradients
from utils.reinforce.sampling import Rollout, completion_logprobs

MICRO_BATCH = 32  # sequences in one pass, to begin with, if the configuration leaves it open
OVERFLOWS = 20  # retries of a step whose fp16 gradients overflow, each at half the loss scale


class PolicyUpdate:
    """Turns rollouts and advantages into optimiser steps.

    Its passes shrink when memory runs out; the batch and the gradient stay the same.

    Attributes:
        scaler: of the loss; it does something only in fp16.
    """

    def __init__(
        self,
        policy: PeftModel,
        optimizer: torch.optim.Optimizer,
        config: ReinforceConfig,
        pad_token_id: int,
    ) -> None:
        self.policy, self.optimizer = policy, optimizer
        self.config, self.pad_token_id = config, pad_token_id
        size = config.micro_batch or MICRO_BATCH
        self.micro_batch = BatchSize("sequences in one pass of the update", size)
        where = device()
        fp16 = compute_dtype(where) == torch.float16
        self.scaler = torch.amp.GradScaler(where.type, enabled=fp16)

    def step(
        self, rollout: Rollout, advantages: Tensor, rows: int, learning_rate: float
    ) -> dict[str, float]:
        """Take one gradient step on the whole rollout and return what of it is logged.

        A step whose gradients overflow in fp16 is repeated with a smaller loss scale, so none is
        skipped. If the norm is not finite even then, the weights are left alone.

        Args:
            rollout: this process's completions.
            advantages: theirs, shape (own rows,).
            rows: completions of all processes together.
            learning_rate: of this step.
        """
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        for _ in range(OVERFLOWS):
            loss = self.micro_batch.run(
                lambda size: self._accumulate(rollout, advantages, rows, size)
            )
            loss = sum_gradients(trained, loss)
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(trained, self.config.max_grad_norm).item()
            if math.isfinite(norm) or not self.scaler.is_enabled():
                break
            self.scaler.step(self.optimizer)  # skips the step
            self.scaler.update()  # halves the scale
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss, "grad_norm": norm, "learning_rate": learning_rate}

    def _accumulate(self, rollout: Rollout, advantages: Tensor, rows: int, size: int) -> float:
        """Make the gradient of this process's part of the mean, in passes of like length."""
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in rollout.by_length(size):
            log_probs, _ = completion_logprobs(
                self.policy,
                [rollout.prompt_ids[row] for row in part],
                [rollout.completion_ids[row] for row in part],
                self.config.temperature,
                self.pad_token_id,
            )
            mean = reinforce_loss(advantages[part].to(log_probs), log_probs)
            loss = mean * len(part) / rows
            self.scaler.scale(loss).backward()
            total += loss.item()
        return total
