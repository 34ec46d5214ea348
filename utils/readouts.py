"""How a rating distribution becomes one reward: mean, mean less spread, or a contest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from utils.judge import prompt_key
from utils.losses import expected_rating, outcome_probabilities, rating_spread
from utils.rewards import RewardModel, reward_from_logits

READOUTS = ("mean", "minus_spread", "beats_sft")


def rating_minus_spread(logits: Tensor) -> Tensor:
    """Return E[I] - sd(I), I ~ softmax(logits); (rows, classes) -> (rows,).

    The doubtful response of two with the same mean is worth less.
    """
    return expected_rating(logits) - rating_spread(logits)


def win_share(logits: Tensor, rivals: Tensor) -> Tensor:
    """Return P(I > J) + P(I = J) / 2, I ~ softmax(logits), J ~ softmax(rivals), within 0..1.

    Args:
        logits: shape (rows, classes).
        rivals: the distribution that each row has to beat, log-probabilities or logits, same shape.

    Returns:
        Shape (rows,).
    """
    win, tie, _ = outcome_probabilities(logits, rivals).unbind(-1)
    return win + tie / 2


def rival_distributions(
    reward_model: RewardModel,
    prompts: Sequence[Sequence[Mapping[str, str]]],
    responses: Sequence[str],
    finished: Sequence[bool],
) -> dict[str, Tensor]:
    """Return what rating to expect of a prompt's responses: log (1/n) sum_k softmax(logits_k).

    P(I > J) + P(I = J) / 2 is linear in the distribution of J. So against this mixture it is the
    mean over the n responses, as if each was met in turn.

    Args:
        reward_model: a ten-class model.
        prompts: the turns before each response; a prompt may occur often.
        responses: the rivals.
        finished: whether each ended by itself.

    Returns:
        Log-probabilities by `prompt_key`, shape (classes,) each.
    """
    log_p = reward_model.logits(prompts, responses, finished).log_softmax(-1)
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt_key(prompt), []).append(row)
    return {key: log_p[own].logsumexp(0).log_softmax(-1) for key, own in rows.items()}


class PolicyReward:
    """A reward model with the readout that a policy is trained on; scores text as it does.

    Attributes:
        reward_model: the model whose distribution is read.
        readout: "mean", the reward of the model itself; "minus_spread", see `rating_minus_spread`;
            "beats_sft", see `win_share`.
        rivals: for "beats_sft", the rivals of each prompt, from `rival_distributions`.
    """

    def __init__(
        self,
        reward_model: RewardModel,
        readout: str,
        rivals: Mapping[str, Tensor] | None = None,
    ) -> None:
        if readout not in READOUTS:
            raise ValueError(f"readout {readout!r}, expected {', '.join(READOUTS)}")
        if readout != "mean" and reward_model.kind == "scalar":
            raise ValueError(
                f"readout {readout!r} needs a distribution over ratings, and a scalar reward model "
                'has none; take the ordinal one, or the readout "mean"'
            )
        self.reward_model = reward_model
        self.readout = readout
        self.rivals = rivals or {}

    def score(
        self,
        prompts: Sequence[Sequence[Mapping[str, str]]],
        responses: Sequence[str],
        finished: Sequence[bool],
    ) -> Tensor:
        """Return one reward per response, shape (rows,).

        Raises:
            ValueError: if a prompt has no rivals to beat.
        """
        logits = self.reward_model.logits(prompts, responses, finished)
        if self.readout == "mean":
            return reward_from_logits(logits)
        if self.readout == "minus_spread":
            return rating_minus_spread(logits)
        return win_share(logits, torch.stack([self._rival(prompt) for prompt in prompts]))

    def _rival(self, prompt: Sequence[Mapping[str, str]]) -> Tensor:
        found = self.rivals.get(prompt_key(prompt))
        if found is None:
            raise ValueError(
                f"no SFT sample to beat for the prompt {prompt[-1]['content'][:60]!r}: the readout "
                '"beats_sft" scores prompts that `rival_distributions` was given; sample the SFT '
                "model on this one, too"
            )
        return found
