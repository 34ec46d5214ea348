"""From the outputs for a batch of rated groups to the loss that `RewardConfig` names."""

from __future__ import annotations

from torch import Tensor

from utils.config import RewardConfig
from utils.losses import (
    anchored_loss,
    bradley_terry_loss,
    pair_indices,
    plackett_luce_loss,
    rating_pair_loss,
    scaled_bradley_terry_loss,
    soft_class_loss,
    ties_half_loss,
)


def reward_loss(
    logits: Tensor, ratings: Tensor, group: Tensor, reference: Tensor, reward: RewardConfig
) -> Tensor:
    """Return the mean loss over the comparisons within the groups, a scalar.

    With a `reward.reference_weight` w below 1 it is w times that over all comparisons and 1 - w
    times that over the comparisons between samples, where there are any.

    Args:
        logits: outputs of the head, shape (rows, 1), trained with `reward.scalar_loss`, or
            (rows, 10), trained with `reward.ordinal_loss`.
        ratings: on the scale 1..10, shape (rows,).
        group: which responses were rated side by side, integers, shape (rows,).
        reference: which responses are references, no samples of a model, shape (rows,).
        reward: names the loss and its constants.
    """
    weight, sample = reward.reference_weight, ~reference
    loss = _loss(logits, ratings, group, reward)
    if weight == 1 or not len(pair_indices(ratings[sample], group[sample])[0]):
        return weight * loss
    between = _loss(logits[sample], ratings[sample], group[sample], reward)
    return weight * loss + (1 - weight) * between


def _loss(logits: Tensor, ratings: Tensor, group: Tensor, reward: RewardConfig) -> Tensor:
    if logits.shape[-1] == 1:
        return _scalar_loss(logits[:, 0], ratings, group, reward)
    first, second = pair_indices(ratings, group)
    chosen, rejected = logits[first], logits[second]
    if reward.ordinal_loss == "ties_half":
        return ties_half_loss(chosen, rejected)
    if reward.ordinal_loss == "anchored":
        return anchored_loss(chosen, rejected, logits, ratings)
    if reward.ordinal_loss == "soft_classes":
        return soft_class_loss(chosen, rejected, ratings[first], ratings[second])
    return rating_pair_loss(chosen, rejected)


def _scalar_loss(rewards: Tensor, ratings: Tensor, group: Tensor, reward: RewardConfig) -> Tensor:
    center = reward.center_rewards_coefficient
    if reward.scalar_loss == "plackett_luce":
        return plackett_luce_loss(rewards, ratings, group, center)
    chosen, rejected = pair_indices(ratings, group)
    gap = ratings[chosen] - ratings[rejected]
    if reward.scalar_loss == "scaled_bradley_terry":
        return scaled_bradley_terry_loss(rewards[chosen], rewards[rejected], gap, center)
    margin = reward.margin_scale * gap
    return bradley_terry_loss(rewards[chosen], rewards[rejected], margin, center)
