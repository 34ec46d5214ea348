"""The estimator: REINFORCE with a baseline, as pure functions and one small state.

Ahmadian et al. 2024, "Back to Basics", arXiv 2402.14740: the whole completion is one action, the
KL to the SFT policy is part of its reward (eq. 3), and a baseline that does not depend on the
action lowers the variance of the gradient without moving its mean (eq. 6).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Baseline:
    """What is subtracted from a reward: the state of one of `config.BASELINES`.

    Before the first update the history is empty and the baseline is 0, which is the SFT policy's
    mean reward, since rewards are standardised with it.
    """

    kind: str
    ema_decay: float = 0.9
    window: int = 10
    num_generations: int = 1
    total: float = 0.0
    count: int = 0
    average: float = 0.0
    recent: deque[float] = field(default_factory=deque)

    def value(self, rewards: Tensor) -> Tensor:
        """Return the baseline of each row, shape (rows,); read it before `update`.

        Args:
            rewards: this step's rewards, shape (rows,). Only "batch_mean" and "rloo" look at them;
                for "rloo" the generations of a prompt are adjacent rows.
        """
        if self.kind == "batch_mean":
            return rewards.mean().expand_as(rewards)
        if self.kind == "rloo":
            groups = rewards.view(-1, self.num_generations)
            others = groups.sum(1, keepdim=True) - groups
            return (others / (self.num_generations - 1)).flatten()
        constant = {
            "none": 0.0,
            "running_mean": self.total / max(self.count, 1),
            "ema": self.average,
            "window": sum(self.recent) / max(len(self.recent), 1),
        }[self.kind]
        return torch.full_like(rewards, constant)

    def update(self, rewards: Tensor) -> None:
        """Take this step's rewards into the history; call it after the gradient step."""
        mean = rewards.mean().item()
        self.average = mean if not self.count else self._decayed(mean)
        self.total += rewards.sum().item()
        self.count += len(rewards)
        self.recent.append(mean)
        while len(self.recent) > self.window:
            self.recent.popleft()

    def _decayed(self, mean: float) -> float:
        return self.ema_decay * self.average + (1 - self.ema_decay) * mean


def kl_regularised(rewards: Tensor, log_probs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """R = r - beta * (log pi - log pi_ref): the reward of the whole completion, shape (rows,)."""
    return rewards - beta * (log_probs - reference)


def reinforce_loss(advantages: Tensor, log_probs: Tensor) -> Tensor:
    """-mean_i [A_i log pi(y_i)], whose gradient is the REINFORCE estimate, a scalar.

    Args:
        advantages: R - b, shape (rows,); detached here, since it weighs the gradient.
        log_probs: sums of log pi over each completion's sampled tokens, shape (rows,).
    """
    return -(advantages.detach() * log_probs).mean()
