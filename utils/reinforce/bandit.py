"""A softmax bandit trained by the report's estimator: small enough to check by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.reinforce.baselines import BASELINES, reinforce_loss


def train_bandit(
    means: Tensor,
    baseline: str,
    steps: int = 300,
    batch: int = 16,
    learning_rate: float = 0.5,
    noise: float = 0.5,
    seed: int = 0,
) -> list[float]:
    """Train softmax(theta) over arms with `reinforce_loss` and a baseline.

    Args:
        means: mean reward of each arm, shape (arms,).
        baseline: one of "none", "running_mean", "ema".
        steps: gradient steps.
        batch: pulls per step.
        learning_rate: of plain gradient descent.
        noise: standard deviation of a pull's reward.
        seed: of pulls and rewards.

    Returns:
        The policy's expected reward before the first step and after each, `steps + 1` numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    theta = torch.zeros_like(means, requires_grad=True)
    state = BASELINES[baseline]()
    curve = [float(means.mean())]
    for _ in range(steps):
        log_policy = theta.log_softmax(-1)
        arms = torch.multinomial(log_policy.exp(), batch, replacement=True, generator=generator)
        rewards = means[arms] + noise * torch.randn(batch, generator=generator)
        advantage = rewards - state.value(rewards)
        loss = reinforce_loss(advantage, log_policy[arms])
        (gradient,) = torch.autograd.grad(loss, theta)
        with torch.no_grad():
            theta -= learning_rate * gradient
            curve.append(float(theta.softmax(-1) @ means))
        state.update(rewards)
    return curve
