"""How a rating distribution becomes a reward: formulas, rivals, and what is refused."""

import pytest
import torch

from utils.judge import prompt_key
from utils.losses import CLASSES
from utils.readouts import PolicyReward, rating_minus_spread, rival_distributions, win_share

COLOUR, BIRD, FISH = (
    ({"role": "user", "content": f"Name a {what}."},) for what in ("colour", "bird", "fish")
)


def distribution(**shares):
    """Return logits of the shares by rating, `r6=1.0`; what is not named is next to impossible."""
    p = torch.full((CLASSES,), 1e-12)
    for name, share in shares.items():
        p[int(name[1:]) - 1] = share
    return p.log()


SURE = distribution(r6=1.0)
UNSURE = distribution(r2=0.5, r10=0.5)


class Fixed:
    """A ten-class model that knows the distribution of each response by its text."""

    def __init__(self, kind="ordinal", **known):
        self.kind, self.known = kind, known

    def logits(self, prompts, responses, finished):
        assert len(prompts) == len(responses) == len(finished)
        return torch.stack([self.known[response] for response in responses])


def test_a_sure_six_and_an_unsure_six():
    model = Fixed(sure=SURE, unsure=UNSURE)
    texts = ([COLOUR] * 2, ["sure", "unsure"], [True, True])
    assert PolicyReward(model, "mean").score(*texts).tolist() == pytest.approx([6, 6])
    # Spread, not variance: the ratings 2 and 10 have standard deviation 4.
    cautious = PolicyReward(model, "minus_spread").score(*texts)
    assert cautious.tolist() == pytest.approx([6, 2], abs=1e-3)
    torch.testing.assert_close(cautious, rating_minus_spread(torch.stack([SURE, UNSURE])))


def test_a_tie_is_half_a_win():
    halves = distribution(r6=0.5, r10=0.5)
    assert win_share(SURE, SURE) == pytest.approx(0.5)
    assert win_share(SURE, halves) == pytest.approx(0.25), "tie .5, win 0"
    assert win_share(halves, SURE) == pytest.approx(0.75)
    assert win_share(SURE, distribution(r5=1.0)) == pytest.approx(1, abs=1e-6)
    assert win_share(SURE, distribution(r7=1.0)) == pytest.approx(0, abs=1e-6)


def test_win_shares_lie_within_0_and_1_and_add_up():
    torch.manual_seed(0)
    first, second = 30 * torch.randn(2, 500, CLASSES)
    share = win_share(first, second)
    assert share.min() >= 0
    assert share.max() <= 1 + 1e-6
    assert share.min() < 0.01, "the draw is wide enough to show an overflow"
    torch.testing.assert_close(share + win_share(second, first), torch.ones(500))


def test_against_a_mixture_is_the_mean_against_each():
    torch.manual_seed(0)
    rivals = {name: 3 * torch.randn(CLASSES) for name in ("a", "b", "c")}
    own = torch.randn(CLASSES)
    found = rival_distributions(Fixed(**rivals), [COLOUR] * 3, list("abc"), [True] * 3)
    (mixture,) = found.values()
    assert mixture.exp().sum() == pytest.approx(1)
    each = torch.stack([win_share(own, rival) for rival in rivals.values()])
    torch.testing.assert_close(win_share(own, mixture), each.mean())
    mean_logits = torch.stack(list(rivals.values())).mean(0)
    assert abs(win_share(own, mixture) - win_share(own, mean_logits)) > 0.01


def test_a_response_meets_the_rivals_of_its_own_prompt():
    model = Fixed(weak=distribution(r2=1.0), strong=distribution(r9=1.0), own=SURE)
    prompts, rivals = [BIRD, COLOUR, BIRD, COLOUR], ["strong", "weak", "own", "own"]
    found = rival_distributions(model, prompts, rivals, [True] * 4)
    assert set(found) == {prompt_key(COLOUR), prompt_key(BIRD)}
    reward = PolicyReward(model, "beats_sft", found)
    # A win and a tie against the colour's, a loss and a tie against the bird's.
    shares = reward.score([COLOUR, BIRD, COLOUR], ["own"] * 3, [True] * 3)
    assert shares.tolist() == pytest.approx([0.75, 0.25, 0.75])


def test_a_prompt_without_rivals_is_refused():
    model = Fixed(own=SURE)
    reward = PolicyReward(model, "beats_sft", rival_distributions(model, [BIRD], ["own"], [True]))
    with pytest.raises(ValueError, match=r"no SFT sample to beat .*Name a fish.*rival_distrib"):
        reward.score([BIRD, FISH], ["own", "own"], [True, True])


def test_a_scalar_reward_is_its_logit_and_has_no_spread():
    model = Fixed("scalar", good=torch.tensor([2.5]), bad=torch.tensor([-40.0]))
    texts = ([COLOUR] * 2, ["good", "bad"], [True, True])
    assert PolicyReward(model, "mean").score(*texts).tolist() == [2.5, -40]
    for readout in ("minus_spread", "beats_sft"):
        with pytest.raises(ValueError, match=f"{readout}.*needs a distribution.*ordinal"):
            PolicyReward(model, readout)
    with pytest.raises(ValueError, match="'median', expected mean, minus_spread, beats_sft"):
        PolicyReward(model, "median")
