"""From the outputs for a batch of rated groups to the loss that `RewardConfig` names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.config import RewardConfig
from utils.rewards.losses import (
    bradley_terry_loss,
    pair_indices,
    plackett_luce_loss,
    rating_cross_entropy,
    rating_pair_loss,
    scaled_bradley_terry_loss,
    soft_class_loss,
    squared_sum,
    ties_half_loss,
)

Part = tuple[Tensor, float]  # a mean, a scalar, and over how much it is one


def reward_loss(
    logits: Tensor,
    ratings: Tensor,
    group: Tensor,
    reference: Tensor,
    reward: RewardConfig,
    totals: Sequence[float] | None = None,
) -> Tensor:
    """Return the mean loss over the comparisons within the groups, a scalar.

    With a `reward.reference_weight` w below 1 it is w times that over all comparisons and 1 - w
    times that over the comparisons between samples, where there are any.

    Args:
        logits: outputs of the head, shape (rows, 1), trained with `reward.scalar_loss`, or
            (rows, 10), trained with `reward.ordinal_loss`.
        ratings: on the scale 1..10, shape (rows,); in at least one group they differ.
        group: which responses were rated side by side, integers, shape (rows,).
        reference: which responses are references, no samples of a model, shape (rows,).
        reward: names the loss and its constants.
        totals: of `loss_totals`, for a batch that is a part of a step: the losses of the step's
            batches then add up to the loss of the step in one batch.
    """
    parts = _parts(logits, ratings, group, reference, reward)
    totals = [count for _, count in parts] if totals is None else totals
    own = zip(parts, totals, strict=True)
    return sum(mean * (count / total) for (mean, count), total in own if count)


def loss_totals(
    ratings: Tensor, group: Tensor, reference: Tensor, outputs: int, reward: RewardConfig
) -> Tensor:
    """Return over how much each mean in `reward_loss` is one, fp64, shape (means,).

    These are numbers of pairs, choices or responses, or a sum of weights: what the batches of a
    step have of them is added up. They do not depend on what a model says.

    Args:
        ratings: as in `reward_loss`, and so are the others.
        group: shape (rows,).
        reference: shape (rows,).
        outputs: of the head, 1 or 10.
        reward: names the loss.
    """
    parts = _parts(torch.zeros(len(ratings), outputs), ratings, group, reference, reward)
    return torch.tensor([count for _, count in parts], dtype=torch.float64)


def _parts(
    logits: Tensor, ratings: Tensor, group: Tensor, reference: Tensor, reward: RewardConfig
) -> list[Part]:
    weight, sample = reward.reference_weight, ~reference
    parts = [(weight * mean, n) for mean, n in _loss(logits, ratings, group, reward)]
    if weight == 1:
        return parts
    between = _loss(logits[sample], ratings[sample], group[sample], reward)
    return parts + [((1 - weight) * mean, n) for mean, n in between]


def _loss(logits: Tensor, ratings: Tensor, group: Tensor, reward: RewardConfig) -> list[Part]:
    first, second = pair_indices(ratings, group)
    if logits.shape[-1] == 1:
        return _scalar_loss(logits[:, 0], ratings, group, (first, second), reward)
    chosen, rejected, pairs = logits[first], logits[second], len(first)
    if reward.ordinal_loss == "ties_half":
        return [(ties_half_loss(chosen, rejected), pairs)]
    if reward.ordinal_loss == "soft_classes":
        return [(soft_class_loss(chosen, rejected, ratings[first], ratings[second]), pairs)]
    between = (rating_pair_loss(chosen, rejected), pairs)
    if reward.ordinal_loss == "anchored":
        return [between, (rating_cross_entropy(logits, ratings), len(ratings))]
    return [between]


def _scalar_loss(
    rewards: Tensor,
    ratings: Tensor,
    group: Tensor,
    pairs: tuple[Tensor, Tensor],
    reward: RewardConfig,
) -> list[Part]:
    center, (first, second) = reward.center_rewards_coefficient, pairs
    if reward.scalar_loss == "plackett_luce":
        choices = len(first.unique())  # one for each response that is above another
        return [(plackett_luce_loss(rewards, ratings, group, center), choices)]
    chosen, rejected, gap = rewards[first], rewards[second], ratings[first] - ratings[second]
    if reward.scalar_loss == "scaled_bradley_terry":
        pull = (center * squared_sum(chosen, rejected), len(first))
        return [(scaled_bradley_terry_loss(chosen, rejected, gap), gap.sum().item()), pull]
    margin = reward.margin_scale * gap
    return [(bradley_terry_loss(chosen, rejected, margin, center), len(first))]
