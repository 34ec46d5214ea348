"""How a rating distribution becomes one reward: its mean, or its mean less its spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from utils.rewards.losses import rating_minus_spread, reward_from_logits
from utils.rewards.model import RewardModel

READOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": reward_from_logits,
    "minus_spread": rating_minus_spread,
}


class PolicyReward:
    """A reward model with the readout that a policy is trained on; scores text as it does.

    Attributes:
        reward_model: the model whose distribution is read.
        readout: "mean", the reward of the model itself; "minus_spread", see `rating_minus_spread`.
    """

    def __init__(self, reward_model: RewardModel, readout: str) -> None:
        if readout not in READOUTS:
            raise ValueError(f"readout {readout!r}, expected {', '.join(READOUTS)}")
        if readout != "mean" and reward_model.kind == "scalar":
            raise ValueError(
                f"readout {readout!r} needs a distribution over ratings, and a scalar reward model "
                'has none; take the ordinal one, or the readout "mean"'
            )
        self.reward_model = reward_model
        self.readout = readout

    def score(
        self,
        prompts: Sequence[Sequence[Mapping[str, str]]],
        responses: Sequence[str],
        finished: Sequence[bool],
    ) -> Tensor:
        """Return one reward per response, shape (rows,)."""
        return READOUTS[self.readout](self.reward_model.logits(prompts, responses, finished))
