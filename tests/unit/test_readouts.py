"""How a rating distribution becomes a reward: formulas, and what is refused."""

import pytest
import torch

from utils.rewards.losses import CLASSES, rating_minus_spread
from utils.rewards.readouts import PolicyReward

COLOUR = ({"role": "user", "content": "Name a colour."},)


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


def test_a_scalar_reward_is_its_logit_and_has_no_spread():
    model = Fixed("scalar", good=torch.tensor([2.5]), bad=torch.tensor([-40.0]))
    texts = ([COLOUR] * 2, ["good", "bad"], [True, True])
    assert PolicyReward(model, "mean").score(*texts).tolist() == [2.5, -40]
    with pytest.raises(ValueError, match=r"minus_spread.*needs a distribution.*ordinal"):
        PolicyReward(model, "minus_spread")
    with pytest.raises(ValueError, match="'median', expected mean, minus_spread"):
        PolicyReward(model, "median")
