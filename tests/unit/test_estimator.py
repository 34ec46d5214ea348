"""The estimator: baselines and gradients by hand, against the exact gradient of a bandit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.config import BASELINE_NAMES, ReinforceConfig
from utils.reinforce.bandit import train_bandit
from utils.reinforce.baselines import BASELINES, NoBaseline, kl_regularised, reinforce_loss

MEANS = torch.tensor([1.0, 0.2, 2.0, -0.5], dtype=torch.float64)  # reward of each arm
THETA = torch.tensor([0.3, -0.2, 0.0, 0.8], dtype=torch.float64)
HISTORY = ("none", "running_mean", "ema")  # kinds that do not look at the step's rewards


def rewards_of(*values):
    return torch.tensor(values, dtype=torch.float64)


def made(kind, **options):
    return BASELINES[kind](ReinforceConfig(**options))


class BatchMean(NoBaseline):
    """The mistake of counting a row among those it is compared with."""

    def value(self, rewards):
        return rewards.mean().expand_as(rewards)


def read(baseline, *batches):
    """Take batches into the history one after another; return what each was told beforehand."""
    found = []
    for batch in batches:
        found.append(baseline.value(rewards_of(*batch)).tolist())
        baseline.update(rewards_of(*batch))
    return found


def is_not(value, wrong, mistake):
    difference = (torch.as_tensor(value).double() - torch.as_tensor(wrong).double()).abs().max()
    assert difference > 1e-3, mistake


# Baselines


def test_the_configuration_names_the_classes():
    assert tuple(BASELINES) == BASELINE_NAMES


def test_none_is_zero():
    assert read(made("none"), [1, 3], [5, 7]) == [[0, 0], [0, 0]]


def test_running_mean_by_hand():
    first, second, third = read(made("running_mean"), [1, 3], [5, 5, 5, 5], [9])
    is_not(first, [2.0, 2.0], "the baseline was updated with the step's rewards before it was used")
    assert first == [0, 0]
    assert second == [2, 2, 2, 2]
    is_not(third, [3.5], "mean of the steps' means: every row of the history counts the same")
    is_not(third, [5.0], "the last step's mean alone")
    assert third == [4]


def test_ema_by_hand():
    first, second, third = read(made("ema", ema_decay=0.75), [1, 3], [4, 8], [0])
    assert first == [0, 0]
    is_not(second, [0.5, 0.5], "the average starts at its first value, not at 0")
    assert second == [2, 2]
    is_not(third, [0.25 * 2 + 0.75 * 6], "the decay weighs the new value instead of the old one")
    assert third == [0.75 * 2 + 0.25 * 6]


def test_rloo_by_hand():
    (found,) = read(made("rloo", num_generations=3), [1, 2, 6, 10, 20, 60])
    is_not(found, [3, 3, 3, 30, 30, 30], "a row is among those it is compared with")
    is_not(found, [40, 11, 15.5, 35.5, 6.5, 10], "the rows of a prompt are adjacent")
    assert found == [4, 3.5, 1.5, 40, 35, 15]


@pytest.mark.parametrize("kind", HISTORY)
def test_the_baseline_is_independent_of_the_steps_own_rewards(kind):
    baseline = made(kind)
    baseline.update(rewards_of(1, 2, 4))
    low, high = baseline.value(rewards_of(0, 0)), baseline.value(rewards_of(50, 90))
    assert torch.equal(low, high), "it depends on the action, so the gradient is biased"


@pytest.mark.parametrize("kind", BASELINE_NAMES)
def test_reading_changes_nothing(kind):
    baseline = made(kind, num_generations=2)
    baseline.update(rewards_of(1, 2))
    first = baseline.value(rewards_of(3, 5))
    assert torch.equal(baseline.value(rewards_of(3, 5)), first)
    assert first.shape == (2,)


@pytest.mark.parametrize("kind", BASELINE_NAMES)
def test_a_checkpoint_holds_the_history(kind):
    baseline, resumed = made(kind, num_generations=2), made(kind, num_generations=2)
    for step in ([1, 3], [4, 8]):
        baseline.update(rewards_of(*step))
    resumed.load_state_dict(baseline.state_dict())
    found = read(resumed, [0, 10], [2, 4])
    assert found == read(baseline, [0, 10], [2, 4])
    assert found != read(made(kind, num_generations=2), [0, 10], [2, 4]) or kind in ("none", "rloo")


REWARDS = st.lists(st.floats(-100, 100), min_size=12, max_size=12).map(lambda x: rewards_of(*x))


@settings(max_examples=50, deadline=None)
@given(rewards=REWARDS, shift=st.floats(-1000, 1000), k=st.sampled_from([2, 3, 4, 6, 12]))
def test_a_constant_added_to_all_rewards_changes_no_advantage(rewards, shift, k):
    baseline = made("rloo", num_generations=k)
    plain = rewards - baseline.value(rewards)
    shifted = rewards + shift
    torch.testing.assert_close(shifted - baseline.value(shifted), plain, atol=1e-9, rtol=1e-9)


@settings(max_examples=50, deadline=None)
@given(rewards=REWARDS, k=st.sampled_from([2, 3, 4, 6, 12]))
def test_rloo_is_the_mean_of_the_other_rows_of_the_prompt(rewards, k):
    found = made("rloo", num_generations=k).value(rewards)
    for row in range(12):
        first = row // k * k
        others = [rewards[i] for i in range(first, first + k) if i != row]
        assert found[row].item() == pytest.approx(float(sum(others)) / (k - 1), abs=1e-9)
    per_prompt = (rewards - found).view(-1, k).sum(1)
    torch.testing.assert_close(per_prompt, torch.zeros_like(per_prompt), atol=1e-9, rtol=0)


# Reward and loss


def test_kl_regularised_by_hand():
    found = kl_regularised(rewards_of(1, 1), rewards_of(-2, -5), rewards_of(-5, -2), beta=0.1)
    is_not(found, [1.3, 0.7], "KL sign: what the policy likes more than the reference costs reward")
    torch.testing.assert_close(found, rewards_of(0.7, 1.3))


def test_loss_and_gradient_by_hand():
    advantages, log_probs = rewards_of(1, -2), rewards_of(-3, -1).requires_grad_()
    loss = reinforce_loss(advantages, log_probs)
    loss.backward()
    is_not(loss.detach(), -0.5, "sign: descent on this loss lowers the reward")
    is_not(loss.detach(), 1.0, "sum over the rows instead of their mean")
    is_not(loss.detach(), -1.0, "batch-mean reward instead of each completion's own")
    assert loss.item() == 0.5
    is_not(log_probs.grad, [0.25, 0.25], "batch-mean reward instead of each completion's own")
    assert log_probs.grad.tolist() == [-0.5, 1.0]


def test_advantages_carry_no_gradient():
    beta, reference = 0.1, rewards_of(-5, -2)
    log_probs = rewards_of(-2, -3).requires_grad_()
    advantages = kl_regularised(rewards_of(1, 4), log_probs, reference, beta)
    assert advantages.requires_grad, "otherwise nothing is tested"
    (found,) = torch.autograd.grad(reinforce_loss(advantages, log_probs), log_probs)
    attached = -(advantages - beta * log_probs).detach() / 2
    is_not(found, attached, "advantage not detached: its own gradient is mixed in")
    torch.testing.assert_close(found, -advantages.detach() / 2)


# The bandit


def exact_gradient():
    """Return d/d theta of the expected reward of softmax(theta): p (r - p.r)."""
    policy = THETA.softmax(-1)
    return policy * (MEANS - policy @ MEANS)


def right(advantages, log_policy, arms):
    return reinforce_loss(advantages, log_policy[arms])


def full_vocabulary_mean(advantages, log_policy, arms):
    return -(advantages * log_policy.mean(-1)).mean()


def batch_mean_reward(advantages, log_policy, arms):
    return -(advantages.mean() * log_policy[arms].mean())


def estimates(kind, count, batch, estimate=right, offset=0.0, early=False, **options):
    """Return `count` gradient estimates at THETA, from `batch` pulls each, as ascent directions."""
    generator = torch.Generator().manual_seed(0)
    theta = THETA.clone().requires_grad_()
    baseline, found = kind if isinstance(kind, NoBaseline) else made(kind, **options), []
    for _ in range(count):
        log_policy = theta.log_softmax(-1)
        arms = torch.multinomial(log_policy.exp(), batch, replacement=True, generator=generator)
        noise = torch.randn(batch, generator=generator, dtype=torch.float64)
        rewards = MEANS[arms] + offset + 0.5 * noise
        if early:
            baseline.update(rewards)
        loss = estimate(rewards - baseline.value(rewards), log_policy, arms)
        found.append(-torch.autograd.grad(loss, theta)[0])
        if not early:
            baseline.update(rewards)
    return torch.stack(found)


def z_score(found, expected):
    """Return the largest deviation from the expected mean, in its standard errors."""
    error = found.std(0) / len(found) ** 0.5
    return ((found.mean(0) - expected) / error).abs().max().item()


def test_the_exact_gradient_is_right():
    theta = THETA.clone().requires_grad_()
    (found,) = torch.autograd.grad(theta.softmax(-1) @ MEANS, theta)
    torch.testing.assert_close(found, exact_gradient())


@pytest.mark.parametrize("kind", [*HISTORY, "rloo"])
def test_the_estimate_is_unbiased(kind):
    found = estimates(kind, count=3000, batch=4, num_generations=4)
    assert z_score(found, exact_gradient()) < 4, f"{kind} biases the gradient"
    assert z_score(found, 0 * THETA) > 8, "there are too few pulls to tell"


@pytest.mark.parametrize(
    ("mistake", "options"),
    [
        ("full-vocabulary mean", {"estimate": full_vocabulary_mean}),
        ("batch-mean reward instead of per-sample", {"estimate": batch_mean_reward}),
        ("baseline updated before use", {"kind": "ema", "early": True, "ema_decay": 0.0}),
    ],
)
def test_wrong_estimates_are_told_apart(mistake, options):
    found = estimates(**{"kind": "running_mean", "count": 3000, "batch": 4} | options)
    assert z_score(found, exact_gradient()) > 8, f"{mistake} would go unnoticed"


def test_the_batch_mean_shrinks_the_gradient():
    """A row's own reward is a share 1/n of the mean, so 1/n of the gradient is lost."""
    found = estimates(BatchMean(), count=3000, batch=4)
    assert z_score(found, 0.75 * exact_gradient()) < 4
    assert z_score(found, exact_gradient()) > 4


def test_a_baseline_lowers_the_variance():
    offset = 10.0
    noisy = estimates("none", 500, 4, offset=offset).var(0).sum()
    for kind in ("running_mean", "ema", "rloo"):
        calm = estimates(kind, 500, 4, offset=offset, num_generations=4)[50:].var(0).sum()
        assert calm < 0.1 * noisy, f"{kind}: variance {calm:.2f} against {noisy:.2f} without"


@pytest.mark.parametrize("kind", HISTORY)
def test_the_bandit_learns(kind):
    means = torch.tensor([0.0, 1.0, 0.3, 0.5])
    curve = train_bandit(means, kind)
    assert len(curve) == 301
    assert curve[0] == pytest.approx(0.45)
    assert curve[-1] >= 0.95, f"{kind}: {curve[-1]:.3f} of the best arm's 1"


def test_the_bandit_follows_its_seed():
    means = torch.tensor([0.0, 1.0])
    first, same, other = (train_bandit(means, "ema", steps=5, seed=seed) for seed in (0, 0, 1))
    assert first == same
    assert first != other
