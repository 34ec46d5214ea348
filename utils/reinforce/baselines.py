"""The estimator: REINFORCE with a baseline, as pure functions and small classes.

Ahmadian et al. 2024, "Back to Basics", arXiv 2402.14740: the whole completion is one action, the
KL to the SFT policy is part of its reward (eq. 3), and a baseline that does not depend on the
action lowers the variance of the gradient without moving its mean (eq. 6).

A new baseline is a class here with its name in `BASELINES`, and in `config.BASELINE_NAMES`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from utils.config import ReinforceConfig

DEFAULTS = ReinforceConfig()


class NoBaseline:
    """Nothing: zero, which for rewards standardised with the SFT model is that model's mean.

    It has the methods of all baselines.

    Attributes:
        history: the names of what a checkpoint keeps.
    """

    history: tuple[str, ...] = ()

    def __init__(self, config: ReinforceConfig = DEFAULTS) -> None:
        self.config = config

    def value(self, rewards: Tensor) -> Tensor:
        """Return the baseline of each of this step's rewards, shape (rows,); read before `update`.

        Args:
            rewards: shape (rows,); only `LeaveOneOut` looks at them.
        """
        return torch.zeros_like(rewards)

    def update(self, rewards: Tensor) -> None:
        """Take this step's rewards into the history; call it after the gradient step."""

    def state_dict(self) -> dict[str, float]:
        """Return the history, for a checkpoint."""
        return {name: getattr(self, name) for name in self.history}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what `state_dict` returned."""
        for name in self.history:
            setattr(self, name, state[name])


class RunningMean(NoBaseline):
    """The mean of all rewards so far, the paper's; 0 before the first."""

    history = ("total", "count")
    total, count = 0.0, 0

    def value(self, rewards: Tensor) -> Tensor:
        """Return the mean of the history for each row."""
        return torch.full_like(rewards, self.total / max(self.count, 1))

    def update(self, rewards: Tensor) -> None:
        """Count each row once, however many a step has."""
        self.total += rewards.sum().item()
        self.count += len(rewards)


class Ema(NoBaseline):
    """The moving average of the steps' means, exponential; starts at the first, 0 before it."""

    history = ("average", "count")
    average, count = 0.0, 0

    def value(self, rewards: Tensor) -> Tensor:
        """Return the average for each row."""
        return torch.full_like(rewards, self.average)

    def update(self, rewards: Tensor) -> None:
        """Let the average decay by `ema_decay` towards the step's mean."""
        decay = self.config.ema_decay if self.count else 0.0
        self.average = decay * self.average + (1 - decay) * rewards.mean().item()
        self.count += len(rewards)


class LeaveOneOut(NoBaseline):
    """RLOO: the mean of the prompt's other completions, `num_generations` adjacent rows in all."""

    def value(self, rewards: Tensor) -> Tensor:
        """Return for each row the mean of the others of its prompt."""
        groups = rewards.view(-1, self.config.num_generations)
        others = groups.sum(1, keepdim=True) - groups
        return (others / (self.config.num_generations - 1)).flatten()


BASELINES: dict[str, type[NoBaseline]] = {
    "none": NoBaseline,
    "running_mean": RunningMean,
    "ema": Ema,
    "rloo": LeaveOneOut,
}


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
