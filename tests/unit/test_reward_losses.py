"""The listwise, scaled, anchored and soft losses, and which field chooses which."""

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from utils.config import REWARD_CHOICES, ConfigError, RewardConfig
from utils.rewards.batch_loss import loss_totals, reward_loss
from utils.rewards.losses import (
    CLASSES,
    bradley_terry_loss,
    outcome_probabilities,
    pair_indices,
    plackett_luce_loss,
    rating_cross_entropy,
    rating_pair_loss,
    scaled_bradley_terry_loss,
    soft_class_loss,
    soft_targets,
    ties_half_loss,
)

ONE = torch.zeros(2, dtype=torch.long)
REWARD = st.floats(-5, 5, width=32)
SAMPLES, ANCHORED = torch.zeros(3, dtype=torch.bool), {"ordinal_loss": "anchored"}


def one_group(rows):
    return torch.zeros(rows, dtype=torch.long)


# Scaled Bradley-Terry


def test_scaled_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.5])
    scale = torch.tensor([3.0, 1.0])
    right = (3 * math.log(1 + math.exp(-1)) + math.log(1 + math.exp(0.5))) / 4
    assert scaled_bradley_terry_loss(chosen, rejected, scale).item() == pytest.approx(right)
    margin = bradley_terry_loss(chosen, rejected, scale).item()
    assert abs(margin - right) > 0.1, "a margin, not a weight"
    doubled = scaled_bradley_terry_loss(chosen, rejected, 2 * scale).item()
    assert doubled == pytest.approx(right), "only proportions count"


def test_scaled_with_equal_scales_is_bradley_terry():
    chosen, rejected = torch.randn(7), torch.randn(7)
    found = scaled_bradley_terry_loss(chosen, rejected, torch.full((7,), 2.5))
    torch.testing.assert_close(found, bradley_terry_loss(chosen, rejected))


# Plackett-Luce


@given(REWARD, REWARD, st.sampled_from([0.0, 0.3]))
@settings(deadline=None)
def test_plackett_luce_of_two_is_bradley_terry(first, second, center):
    rewards, ratings = torch.tensor([first, second]), torch.tensor([2.0, 7.0])
    found = plackett_luce_loss(rewards, ratings, ONE, center)
    expected = bradley_terry_loss(rewards[1:], rewards[:1], 0.0, center)
    torch.testing.assert_close(found, expected)


def test_plackett_luce_is_the_likelihood_of_the_ranking():
    rewards, ratings = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([5.0, 1.0, 9.0])
    e = rewards.exp()
    ranking = (e[2] / e.sum()) * (e[0] / (e[0] + e[1]))
    found = plackett_luce_loss(rewards, ratings, one_group(3))
    torch.testing.assert_close(found, -ranking.log() / 2, msg="the mean over two choices")
    total = sum(
        math.exp(-2 * plackett_luce_loss(rewards, torch.tensor(order), one_group(3)).item())
        for order in permutations([1.0, 2.0, 3.0])
    )
    assert total == pytest.approx(1.0), "the rankings' probabilities do not sum to one"


def test_tied_responses_are_not_compared_with_each_other():
    ratings = torch.tensor([8.0, 8.0, 1.0])
    rewards = torch.tensor([1.0, 3.0, 0.0], requires_grad=True)
    found = plackett_luce_loss(rewards, ratings, one_group(3))
    right = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-3))) / 2
    assert found.item() == pytest.approx(right)
    competing = (math.log(1 + math.exp(2) + math.exp(-1)) + right) / 2
    assert abs(found.item() - competing) > 1e-3, "a tied response is a competitor"
    swapped = plackett_luce_loss(rewards[[1, 0, 2]], ratings, one_group(3))
    assert swapped.item() == pytest.approx(right), "the order of tied responses counts"


def test_groups_do_not_compete():
    rewards, ratings = torch.randn(4), torch.tensor([3.0, 1.0, 9.0, 2.0])
    both = plackett_luce_loss(rewards, ratings, torch.tensor([0, 0, 1, 1]))
    apart = [plackett_luce_loss(rewards[s], ratings[s], ONE) for s in (slice(2), slice(2, 4))]
    torch.testing.assert_close(both, torch.stack(apart).mean())


def test_an_offset_costs_nothing_without_the_pull_to_zero():
    rewards, ratings = torch.randn(5), torch.tensor([1.0, 5.0, 5.0, 7.0, 2.0])
    plain = [plackett_luce_loss(rewards + c, ratings, one_group(5)).item() for c in (0.0, 40.0)]
    assert plain[0] == pytest.approx(plain[1], rel=1e-4)
    pulled = [plackett_luce_loss(rewards + c, ratings, one_group(5), 0.01) for c in (0.0, 4.0)]
    assert pulled[1] > pulled[0]


# Ten classes


def test_ties_half():
    chosen, rejected = torch.randn(6, CLASSES), torch.randn(6, CLASSES)
    win, tie, _ = outcome_probabilities(chosen, rejected).unbind(-1)
    torch.testing.assert_close(ties_half_loss(chosen, rejected), -(win + tie / 2).log().mean())
    same = torch.randn(1, CLASSES)
    assert ties_half_loss(same, same).item() == pytest.approx(math.log(2), abs=1e-5)
    assert ties_half_loss(100 * chosen, 100 * rejected).isfinite()


def test_anchored_adds_the_cross_entropy_of_every_response_once():
    logits, ratings = torch.randn(3, CLASSES), torch.tensor([10.0, 1.0, 4.4])
    first, second = pair_indices(ratings, one_group(3))
    given_class = torch.tensor([9, 0, 3])
    torch.testing.assert_close(
        rating_cross_entropy(logits, ratings), F.cross_entropy(logits, given_class)
    )
    right = rating_pair_loss(logits[first], logits[second]) + F.cross_entropy(logits, given_class)
    found = reward_loss(logits, ratings, one_group(3), SAMPLES, RewardConfig(**ANCHORED))
    torch.testing.assert_close(found, right)
    shifted = F.cross_entropy(logits, (given_class + 1).clamp(max=9))
    assert abs(found - rating_pair_loss(logits[first], logits[second]) - shifted) > 1e-3


@pytest.mark.parametrize(
    ("rating", "chosen", "centre"),
    [(1, False, 1), (10, False, 5.5), (1, True, 5.5), (10, True, 10)],
)
def test_soft_targets_by_hand(rating, chosen, centre):
    (target,) = soft_targets(torch.tensor([float(rating)]), chosen)
    assert target.sum().item() == pytest.approx(1)
    density = torch.tensor([math.exp(-((i - centre) ** 2) / 2) for i in range(1, 11)])
    torch.testing.assert_close(target, density / density.sum())


@given(st.floats(1, 10, width=32), st.floats(1, 10, width=32))
@settings(deadline=None)
def test_a_chosen_response_is_never_below_the_rejected_one(first, second):
    better, worse = max(first, second), min(first, second)
    ratings = torch.arange(1.0, CLASSES + 1)
    chosen = soft_targets(torch.tensor([better]), True)[0] @ ratings
    rejected = soft_targets(torch.tensor([worse]), False)[0] @ ratings
    assert chosen > rejected


def test_soft_class_loss_is_a_divergence():
    ratings = torch.tensor([9.0, 6.0]), torch.tensor([3.0, 5.0])
    perfect = [soft_targets(r, c).log() for r, c in zip(ratings, (True, False), strict=True)]
    assert soft_class_loss(*perfect, *ratings).item() == pytest.approx(0, abs=1e-6)
    assert soft_class_loss(*reversed(perfect), *ratings) > 1, "chosen and rejected are swapped"
    chosen, rejected = torch.randn(2, CLASSES), torch.randn(2, CLASSES)
    targets = torch.cat([soft_targets(ratings[0], True), soft_targets(ratings[1], False)])
    log_p = torch.cat([chosen, rejected]).log_softmax(-1)
    right = (targets * (targets.log() - log_p)).sum(-1).mean()
    torch.testing.assert_close(soft_class_loss(chosen, rejected, *ratings), right)


# The choice


@pytest.mark.parametrize(
    ("outputs", "field"), [(1, "scalar_loss"), (CLASSES, "ordinal_loss")], ids=["scalar", "ten"]
)
def test_each_name_is_another_loss(outputs, field):
    logits = torch.randn(5, outputs, generator=torch.Generator().manual_seed(0))
    ratings, group = torch.tensor([1.0, 4.0, 4.0, 9.0, 2.0]), torch.tensor([0, 0, 0, 0, 0])
    samples = torch.zeros(5, dtype=torch.bool)
    found = {
        name: reward_loss(
            logits, ratings, group, samples, replace(RewardConfig(), **{field: name})
        ).item()
        for name in REWARD_CHOICES[field]
    }
    assert len({round(value, 5) for value in found.values()}) == len(found), found
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("loss", REWARD_CHOICES["scalar_loss"])
def test_references_count_as_much_as_their_weight(loss):
    rewards = torch.randn(4, 1, generator=torch.Generator().manual_seed(0))
    ratings, group = torch.tensor([1.0, 4.0, 6.0, 9.0]), torch.zeros(4, dtype=torch.long)
    last = torch.tensor([False, False, False, True])

    def pays(weight, reference, rows=slice(None)):
        reward = RewardConfig(scalar_loss=loss, reference_weight=weight)
        return reward_loss(rewards[rows], ratings[rows], group[rows], reference[rows], reward)

    everything, between = pays(1.0, last), pays(1.0, last, slice(3))
    torch.testing.assert_close(pays(0.25, last), 0.25 * everything + 0.75 * between)
    assert not torch.isclose(everything, between)
    # Without a comparison between samples there is nothing to take the mean of.
    only = torch.tensor([True, False, False, True])
    ratings[1] = ratings[2]
    torch.testing.assert_close(pays(0.25, only), 0.25 * pays(1.0, only))


# A step of four groups, cut into batches: group, rating, reference. Ratings tie, groups have two to
# five rows, the second has no pair of samples, the third no reference.
STEP = [
    *((0, 3.0, False), (0, 7.0, False), (0, 7.0, False), (0, 9.0, True)),
    *((1, 2.0, False), (1, 8.0, True)),
    *((2, 1.0, False), (2, 4.0, False), (2, 10.0, False)),
    *((3, 5.0, False), (3, 5.0, True), (3, 6.0, False), (3, 2.0, False), (3, 2.0, False)),
]
LOSSES = [(1, "scalar_loss", name) for name in REWARD_CHOICES["scalar_loss"]]
LOSSES += [(CLASSES, "ordinal_loss", name) for name in REWARD_CHOICES["ordinal_loss"]]


def step_in_batches(logits, groups, reward):
    """Return the loss of `STEP` as a sum over batches of so many groups, and its gradient."""
    group, ratings, reference = (torch.tensor(column) for column in zip(*STEP, strict=True))
    logits = logits.clone().requires_grad_()
    cuts = [(group // groups) == n for n in range(4 // groups)]
    facts = [(ratings[cut], group[cut], reference[cut]) for cut in cuts]
    totals = sum(loss_totals(*fact, logits.shape[1], reward) for fact in facts).tolist()
    losses = [
        reward_loss(logits[cut], *fact, reward, totals)
        for cut, fact in zip(cuts, facts, strict=True)
    ]
    for loss in losses:
        loss.backward()
    return sum(losses).item(), logits.grad


@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize(("outputs", "field", "name"), LOSSES, ids=[loss[2] for loss in LOSSES])
def test_a_step_is_the_same_however_it_is_cut_into_batches(outputs, field, name, weight):
    logits = torch.randn(len(STEP), outputs, generator=torch.Generator().manual_seed(0))
    reward = RewardConfig(**{field: name}, reference_weight=weight)
    whole, gradient = step_in_batches(logits, 4, reward)
    group, ratings, reference = (torch.tensor(column) for column in zip(*STEP, strict=True))
    assert whole == reward_loss(logits, ratings, group, reference, reward).item(), "bit for bit"
    for groups in (2, 1):
        loss, grad = step_in_batches(logits, groups, reward)
        assert loss == pytest.approx(whole, rel=1e-6)
        torch.testing.assert_close(grad, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("field", "name", "weight"),
    [
        ("scalar_loss", "bradley_terry", 0.3),
        ("scalar_loss", "plackett_luce", 1.0),
        ("scalar_loss", "scaled_bradley_terry", 1.0),
        ("ordinal_loss", "anchored", 1.0),
    ],
)
def test_a_batch_weighed_by_its_pairs_changes_the_step(field, name, weight):
    outputs = 1 if field == "scalar_loss" else CLASSES
    logits = torch.randn(len(STEP), outputs, generator=torch.Generator().manual_seed(0))
    reward = RewardConfig(**{field: name}, reference_weight=weight)
    whole, _ = step_in_batches(logits, 4, reward)
    group, ratings, reference = (torch.tensor(column) for column in zip(*STEP, strict=True))
    pairs, losses = [], []
    for cut in (group == n for n in range(4)):
        pairs.append(len(pair_indices(ratings[cut], group[cut])[0]))
        losses.append(reward_loss(logits[cut], ratings[cut], group[cut], reference[cut], reward))
    wrong = sum(n * loss.item() for n, loss in zip(pairs, losses, strict=True)) / sum(pairs)
    assert abs(wrong - whole) > 1e-3


def test_trl_knows_no_weight_of_references():
    with pytest.raises(
        ConfigError, match=r"reward\.reference_weight = 0\.1, expected 0\.\.1, and 1"
    ):
        RewardConfig(trainer="pairs", reference_weight=0.1)


def test_an_unknown_loss_is_refused():
    with pytest.raises(ConfigError, match=r"reward\.scalar_loss = 'hinge', expected bradley_terry"):
        RewardConfig(scalar_loss="hinge")
