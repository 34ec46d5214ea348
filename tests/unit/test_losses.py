"""The reward losses: the right value, and the mistakes that are easy to make, by name."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from utils.rewards.losses import (
    CLASSES,
    bradley_terry_loss,
    expected_rating,
    log_win_probability,
    outcome_probabilities,
    pair_indices,
    rating_entropy,
    rating_pair_loss,
    rating_spread,
)

LOGIT = st.floats(-20, 20, width=32)
LOGITS = st.lists(LOGIT, min_size=CLASSES, max_size=CLASSES).map(torch.tensor)
FIRST = torch.tensor([0.2, 0.3, 0.5]).log()  # three classes, worked by hand below
SECOND = torch.tensor([0.5, 0.3, 0.2]).log()


def is_not(value, wrong, mistake):
    assert abs(float(value) - wrong) > 1e-3, mistake


def point(rating, height=1e4):
    return F.one_hot(torch.tensor(rating - 1), CLASSES) * height


def by_double_loop(first, second):
    """P(win), P(tie), P(lose) in float64, one pair of ratings at a time."""
    p, q = (x.double().softmax(-1).numpy() for x in (first, second))
    out = np.zeros(3)
    for i in range(CLASSES):
        for j in range(CLASSES):
            out[0 if i > j else 1 if i == j else 2] += p[i] * q[j]
    return out


# Bradley-Terry


def test_bradley_terry_by_hand():
    chosen, rejected, margin = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.5]), 0.5
    found = bradley_terry_loss(chosen, rejected, margin)
    right = (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(1.0))) / 2
    added = (math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(0.0))) / 2
    is_not(
        found, added, "the margin is added, but a larger rating gap asks for a larger reward gap"
    )
    is_not(found, 2 * right, "sum over the pairs instead of their mean")
    flipped = (math.log(1 + math.exp(1.5)) + math.log(1 + math.exp(0.0))) / 2
    is_not(found, flipped, "chosen and rejected are swapped")
    assert found.item() == pytest.approx(right, abs=1e-6)


def test_a_larger_margin_asks_for_more():
    chosen, rejected = torch.tensor([1.0]), torch.tensor([0.0])
    losses = [bradley_terry_loss(chosen, rejected, margin).item() for margin in (0.0, 0.5, 1.0)]
    assert losses == sorted(losses), "margin sign: the loss must rise with the margin"
    assert losses[2] == pytest.approx(math.log(2)), "at a gap equal to the margin the loss is ln 2"


def test_margin_is_per_pair():
    chosen, rejected = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0])
    found = bradley_terry_loss(chosen, rejected, torch.tensor([0.0, 1.0]))
    assert found.item() == pytest.approx((-math.log(1 / (1 + math.exp(-1))) + math.log(2)) / 2)


def test_centre_term():
    chosen, rejected = torch.tensor([3.0]), torch.tensor([1.0])
    plain = bradley_terry_loss(chosen, rejected)
    pull = bradley_terry_loss(chosen, rejected, 0.0, center=0.01) - plain
    is_not(pull, 0.01 * 4, "the difference is squared, but it is the sum that must be near zero")
    assert pull.item() == pytest.approx(0.01 * 16, abs=1e-6)


def test_bradley_terry_is_trls_formula():
    chosen, rejected, margin = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    trl = -F.logsigmoid(chosen - rejected - margin).mean()
    trl = trl + 0.01 * torch.mean((chosen + rejected) ** 2)
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected, margin, 0.01), trl)


def test_bradley_terry_is_finite_for_large_rewards():
    chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = bradley_terry_loss(chosen, -chosen.detach())
    loss.backward()
    assert loss.isfinite(), "log(sigmoid(x)) instead of logsigmoid(x) underflows"
    assert chosen.grad[0].item() == pytest.approx(-0.5), "the pair that is wrong keeps its gradient"


# P(chosen beats rejected)


def test_three_classes_by_hand():
    # win: .3 * .5 + .5 * (.5 + .3); tie: .2 * .5 + .3 * .3 + .5 * .2; lose: .2 * .5 + .3 * .2
    win = log_win_probability(FIRST, SECOND).exp()
    is_not(win, 0.84, "the cumulative distribution is inclusive: a tie counts as a win")
    is_not(win, 0.16, "the axes are transposed: this is P(rejected > chosen)")
    is_not(win, 0.45, "the tie is taken off the second axis alone")
    assert win.item() == pytest.approx(0.55, abs=1e-6)
    found = outcome_probabilities(FIRST, SECOND)
    torch.testing.assert_close(found, torch.tensor([0.55, 0.29, 0.16]))
    assert rating_pair_loss(FIRST[None], SECOND[None]).item() == pytest.approx(-math.log(0.55))


@settings(max_examples=60, deadline=None)
@given(LOGITS, LOGITS)
def test_outcomes_equal_a_double_loop(first, second):
    found = outcome_probabilities(first, second).double().numpy()
    np.testing.assert_allclose(found, by_double_loop(first, second), atol=2e-6)
    assert found.sum() == pytest.approx(1, abs=1e-5), "P(win) + P(tie) + P(lose) must be 1"
    back = outcome_probabilities(second, first).flip(-1)
    np.testing.assert_allclose(found, back.double().numpy(), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(LOGITS, LOGITS, st.floats(-50, 50), st.floats(-50, 50))
def test_only_differences_of_logits_count(first, second, up, down):
    expected = log_win_probability(first, second)
    shifted = log_win_probability(first + up, second + down)
    torch.testing.assert_close(shifted, expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(
        expected_rating(first + up), expected_rating(first), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("rating", [1, 5, 10])
def test_identical_point_masses_never_win(rating):
    same = point(rating)
    assert log_win_probability(same, same).exp() == 0, (
        "two certain and equal ratings tie; an inclusive cumulative distribution calls it a win"
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "outcome"), [(9, 2, 0), (2, 2, 1), (2, 9, 2), (10, 9, 0), (1, 2, 2)]
)
def test_point_masses(chosen, rejected, outcome):
    found = outcome_probabilities(point(chosen), point(rejected))
    assert found.tolist() == [float(outcome == i) for i in range(3)]


@pytest.mark.parametrize("scale", [1, 100, 1e4])
def test_large_logits_stay_finite(scale):
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = (scale * torch.randn(64, CLASSES, generator=generator) for _ in range(2))
    chosen[0], rejected[0] = point(1, scale), point(10, scale)  # certain, and wrong
    chosen[1], rejected[1] = point(4, scale), point(4, scale)  # certain of a tie
    chosen.requires_grad_()
    rejected.requires_grad_()
    loss = rating_pair_loss(chosen, rejected)
    loss.backward()
    assert loss.isfinite(), "log(p @ cumsum(q)) underflows; the sum belongs in log space"
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()
    assert chosen.grad[0].abs().sum() > 1e-3, "the worst pair must not lose its gradient"


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected():
    chosen, rejected = torch.zeros(2, 1, CLASSES, requires_grad=True).unbind()
    up, down = torch.autograd.grad(rating_pair_loss(chosen, rejected), (chosen, rejected))
    with torch.no_grad():
        assert expected_rating(chosen - up) > 5.5 > expected_rating(rejected - down)


def test_no_underflow_in_bf16():
    chosen, rejected = torch.randn(2, 8, CLASSES, generator=torch.Generator().manual_seed(2))
    half = log_win_probability(chosen.bfloat16(), rejected.bfloat16())
    assert half.dtype == torch.float32
    rounded = log_win_probability(chosen.bfloat16().float(), rejected.bfloat16().float())
    torch.testing.assert_close(half, rounded)


def test_uniform_is_the_best_constant():
    uniform = torch.zeros(1, CLASSES)
    loss = rating_pair_loss(uniform, uniform).item()
    is_not(loss, math.log(2), "ln 2 would count half of the ties as wins")
    is_not(loss, -math.log(0.55), "ties count as wins")
    assert loss == pytest.approx(-math.log(0.45), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(LOGITS)
def test_no_other_constant_is_better(logits):
    assume((logits - logits.mean()).abs().max() > 0.1)
    loss = rating_pair_loss(logits[None], logits[None]).item()
    p = logits.double().softmax(-1)
    assert loss > -math.log(0.45)
    assert math.exp(-loss) == pytest.approx(((1 - p.square().sum()) / 2).item(), abs=1e-5)


def test_a_batch_is_the_mean_of_its_rows():
    chosen, rejected = torch.randn(2, 7, CLASSES, generator=torch.Generator().manual_seed(3))
    rows = [rating_pair_loss(c[None], r[None]) for c, r in zip(chosen, rejected, strict=True)]
    torch.testing.assert_close(rating_pair_loss(chosen, rejected), torch.stack(rows).mean())


# What is read from a distribution


@pytest.mark.parametrize("rating", range(1, CLASSES + 1))
def test_expected_rating_of_a_point_mass(rating):
    found = expected_rating(point(rating)[None].float())
    is_not(found, rating - 1, "classes are counted from 0, ratings from 1")
    assert found.item() == pytest.approx(rating)
    assert rating_spread(point(rating)).item() == pytest.approx(0, abs=1e-3)


def test_expected_rating_reads_the_order_of_the_classes():
    logits = torch.linspace(-2, 2, CLASSES)
    sigmoid_mean = logits.sigmoid().mean()
    torch.testing.assert_close(sigmoid_mean, logits.flip(0).sigmoid().mean())
    assert expected_rating(logits) - expected_rating(logits.flip(0)) > 1, (
        "the mean of ten sigmoids does not change when the classes are permuted, a rating must"
    )
    torch.testing.assert_close(
        expected_rating(logits + 3),
        expected_rating(logits),
        msg="adding 3 to every logit is no better rating; the mean of ten sigmoids would rise",
    )
    assert expected_rating(torch.zeros(CLASSES)).item() == pytest.approx(5.5)


def test_spread():
    ends = torch.full((CLASSES,), -1e4)
    ends[[0, 9]] = 0.0
    assert rating_spread(ends).item() == pytest.approx(4.5)
    assert rating_spread(torch.zeros(CLASSES)).item() == pytest.approx(math.sqrt(8.25), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(LOGITS)
def test_mean_and_spread_equal_numpy(logits):
    p, ratings = logits.double().softmax(-1).numpy(), np.arange(1, 11)
    mean = (p * ratings).sum()
    assert expected_rating(logits).item() == pytest.approx(mean, abs=1e-4)
    spread = math.sqrt((p * (ratings - mean) ** 2).sum())
    assert rating_spread(logits).item() == pytest.approx(spread, abs=2e-2)


def test_entropy_by_hand():
    halves = torch.full((CLASSES,), -1e4)
    halves[[0, 9]] = 0.0
    three = torch.stack([torch.zeros(CLASSES), point(4), halves])
    expected = [math.log(CLASSES), 0, math.log(2)]
    assert rating_entropy(three).tolist() == pytest.approx(expected, abs=1e-6)
    precise = rating_entropy(three.double()).tolist()
    assert precise == pytest.approx(expected, abs=1e-14), "double logits were rounded"


# Pairs within groups


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), max_size=10))
def test_pairs_equal_a_slow_loop(rows):
    ratings = torch.tensor([float(r) for r, _ in rows])
    group = torch.tensor([g for _, g in rows])
    found = set(zip(*(index.tolist() for index in pair_indices(ratings, group)), strict=True))
    slow = {
        (i, j)
        for i, (better, one) in enumerate(rows)
        for j, (worse, other) in enumerate(rows)
        if one == other and better > worse
    }
    assert found == slow


def test_ties_give_no_pair():
    chosen, rejected = pair_indices(torch.tensor([5.0, 5.0]), torch.tensor([0, 0]))
    assert len(chosen) == len(rejected) == 0
