"""Reward-model losses and what is read from a rating distribution: pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CLASSES = 10  # ratings 1..10


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, center: float = 0.0
) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected - margin), plus a pull of the rewards to zero.

    Args:
        chosen: rewards of the chosen responses, shape (pairs,).
        rejected: rewards of the rejected responses, shape (pairs,).
        margin: how far apart the pair shall be, shape (pairs,), in logits (Llama 2, Touvron et al.
            2023, eq. 2). It is subtracted: a larger rating gap asks for a larger reward gap.
        center: weight of mean((chosen + rejected)^2), which fixes the otherwise free offset
            (Eisenstein et al. 2023, eq. 2; trl's `center_rewards_coefficient`).

    Returns:
        A scalar.
    """
    loss = -F.logsigmoid(chosen - rejected - margin).mean()
    return loss + center * (chosen + rejected).square().mean() if center else loss


def log_win_probability(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return log P(I > J) for independent ratings I ~ softmax(chosen), J ~ softmax(rejected).

    P(I > J) = sum_i p(i) Q(i - 1), with Q the cumulative distribution of J: strictly below i, so a
    tie is no win. Computed in log space, so that neither confident nor large logits underflow.

    Args:
        chosen: logits of the chosen responses' ratings, lowest class first, shape (..., classes).
        rejected: the same for the rejected responses.

    Returns:
        Shape (...), at most 0.
    """
    log_p = F.log_softmax(chosen.float(), dim=-1)
    log_below = torch.logcumsumexp(F.log_softmax(rejected.float(), dim=-1), dim=-1)
    return torch.logsumexp(log_p[..., 1:] + log_below[..., :-1], dim=-1)


def rating_pair_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean of -log P(rating of chosen > rating of rejected), a scalar.

    Minimising it maximises P(chosen beats rejected), as Bradley-Terry does. The best constant
    output is the uniform one with -ln .45 = .7985, since P(I > J) = (1 - sum_i p(i)^2) / 2 when
    both follow the same p.
    """
    return -log_win_probability(chosen, rejected).mean()


def outcome_probabilities(first: Tensor, second: Tensor) -> Tensor:
    """P(first wins), P(tie), P(second wins) for two rating distributions, shape (..., 3)."""
    win = log_win_probability(first, second).exp()
    lose = log_win_probability(second, first).exp()
    tie = (first.float().softmax(-1) * second.float().softmax(-1)).sum(-1)
    return torch.stack([win, tie, lose], dim=-1)


def expected_rating(logits: Tensor) -> Tensor:
    """Mean of the rating distribution, 1..classes; logits (..., classes) -> (...)."""
    ratings = torch.arange(1, logits.shape[-1] + 1, dtype=torch.float32, device=logits.device)
    return logits.float().softmax(-1) @ ratings


def rating_spread(logits: Tensor) -> Tensor:
    """Standard deviation of the rating distribution; logits (..., classes) -> (...)."""
    ratings = torch.arange(1, logits.shape[-1] + 1, dtype=torch.float32, device=logits.device)
    p = logits.float().softmax(-1)
    mean = p @ ratings
    return (p @ ratings.square() - mean.square()).clamp_min(0).sqrt()


def pair_indices(ratings: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Index every ordered pair of rows of one group whose first row has the higher rating.

    Args:
        ratings: shape (rows,).
        group: which responses were rated side by side, integers, shape (rows,).

    Returns:
        Row indices of the chosen and of the rejected, each of shape (pairs,); ties give no pair.
    """
    better = (ratings[:, None] > ratings[None, :]) & (group[:, None] == group[None, :])
    return better.nonzero(as_tuple=True)
