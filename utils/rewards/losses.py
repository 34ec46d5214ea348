"""Reward-model losses and what is read from a rating distribution: pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CLASSES = 10  # ratings 1..10
KINDS = {"scalar": 1, "ordinal": CLASSES}  # kind of reward model -> outputs of its head


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
    return loss + center * squared_sum(chosen, rejected) if center else loss


def squared_sum(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean of (chosen + rejected)^2, rewards of shape (pairs,); a scalar."""
    return (chosen + rejected).square().mean()


def scaled_bradley_terry_loss(chosen: Tensor, rejected: Tensor, scale: Tensor) -> Tensor:
    """Mean of -scale * log sigmoid(chosen - rejected): a pair counts as much as its rating gap.

    Wang et al. 2024 (HelpSteer2-Preference, arXiv 2410.01257, eq. 3). Where a margin asks for a
    larger reward gap, the scale only weighs the pair.

    Args:
        chosen: rewards of the chosen responses, shape (pairs,).
        rejected: rewards of the rejected responses, shape (pairs,).
        scale: weight of each pair, shape (pairs,); only its proportions count.

    Returns:
        A scalar.
    """
    return -(scale * F.logsigmoid(chosen - rejected)).sum() / scale.sum()


def plackett_luce_loss(
    rewards: Tensor, ratings: Tensor, group: Tensor, center: float = 0.0
) -> Tensor:
    """Mean of -log P(a response is the first choice among itself and all that are rated lower).

    Plackett (1975) and Luce (1959) draw a ranking as a series of choices, each with probability
    exp(r_i) / sum_j exp(r_j) over what is left. Where ratings tie nothing says which came first:
    tied responses are compared with all below them, never with each other, so a tie adds no term
    and no competitor. For two responses it is the Bradley-Terry loss.

    Args:
        rewards: shape (rows,).
        ratings: shape (rows,).
        group: which responses were rated side by side, integers, shape (rows,).
        center: weight of the squared sum of the rewards of a choice, scaled to two responses: the
            pull to zero of `bradley_terry_loss`.

    Returns:
        A scalar, the mean over all choices between at least two responses.
    """
    lower = (ratings[:, None] > ratings[None, :]) & (group[:, None] == group[None, :])
    choices = lower.any(1)
    offered = (lower | torch.eye(len(rewards), dtype=torch.bool, device=rewards.device))[choices]
    among = torch.where(offered, rewards[None, :], -torch.inf).logsumexp(1)
    loss = (among - rewards[choices]).mean()
    if not center:
        return loss
    mean = torch.where(offered, rewards[None, :], 0.0).sum(1) / offered.sum(1)
    return loss + center * (2 * mean).square().mean()


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


def ties_half_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean of -log [P(I > J) + P(I = J) / 2], a scalar: a tie is settled by a coin.

    The best constant output is then any, at ln 2: one that has learned nothing is not paid for
    spreading its mass out.
    """
    win, tie, _ = outcome_probabilities(chosen, rejected).unbind(-1)
    return -(win + tie / 2).clamp_min(torch.finfo(win.dtype).tiny).log().mean()


def rating_cross_entropy(logits: Tensor, ratings: Tensor) -> Tensor:
    """Mean cross-entropy of each response's distribution to its rating, a scalar.

    Pairs say which response is better; the ratings pin down what a "7" is.

    Args:
        logits: shape (rows, classes).
        ratings: rounded to the nearest class, shape (rows,).
    """
    given = ratings.round().long().clamp(1, logits.shape[-1]) - 1
    return F.cross_entropy(logits.float(), given)


def soft_targets(ratings: Tensor, chosen: bool, classes: int = CLASSES, sd: float = 1.0) -> Tensor:
    """Turn ratings into class distributions, the rating read as a degree of usefulness.

    A chosen response belongs in the upper half of the classes, a rejected one in the lower; how
    high within its half, its rating says. The centre is (classes + 1)/2 + h for a chosen response
    and 1 + h for a rejected one, h = (rating - 1)/2: a rejected response with the highest rating
    lies in the middle, a chosen one with the highest rating at the top. Around the centre the
    target is a normal density, normalised over the classes.

    Args:
        ratings: 1..classes, shape (rows,).
        chosen: whether these are the chosen responses of their pairs.
        classes: number of classes.
        sd: of the smoothing, in classes.

    Returns:
        Shape (rows, classes); each row sums to one.
    """
    centre = (ratings.float() - 1) / 2 + ((classes + 1) / 2 if chosen else 1)
    steps = torch.arange(1, classes + 1, device=ratings.device) - centre[:, None]
    return (-steps.square() / (2 * sd**2)).softmax(-1)


def soft_class_loss(
    chosen: Tensor, rejected: Tensor, chosen_ratings: Tensor, rejected_ratings: Tensor
) -> Tensor:
    """Mean of KL(target || prediction) over both responses of every pair, a scalar.

    Args:
        chosen: logits of the chosen responses, shape (pairs, classes).
        rejected: logits of the rejected responses, shape (pairs, classes).
        chosen_ratings: shape (pairs,).
        rejected_ratings: shape (pairs,).
    """
    classes = chosen.shape[-1]
    target = torch.cat(
        [
            soft_targets(chosen_ratings, True, classes),
            soft_targets(rejected_ratings, False, classes),
        ]
    )
    log_p = F.log_softmax(torch.cat([chosen, rejected]).float(), dim=-1)
    return F.kl_div(log_p, target, reduction="batchmean")


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


def rating_entropy(logits: Tensor) -> Tensor:
    """Entropy of the rating distribution in nats, 0..ln(classes); (..., classes) -> (...).

    It is as precise as the logits.
    """
    return torch.special.entr(logits.softmax(-1)).sum(-1)


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


def reward_from_logits(logits: Tensor) -> Tensor:
    """Read the reward off a head's outputs: one column is the reward, ten are a distribution."""
    return logits[:, 0] if logits.shape[-1] == 1 else expected_rating(logits)


def rating_minus_spread(logits: Tensor) -> Tensor:
    """Return E[I] - sd(I), I ~ softmax(logits); (rows, classes) -> (rows,).

    The doubtful response of two with the same mean is worth less.
    """
    return expected_rating(logits) - rating_spread(logits)
