"""The held-out ensemble: reward models that share no prompt with any policy or its reward."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.data.pairs import PreferenceData, Prompt
from utils.rewards.model import RewardModel

FOLDS = 4


@dataclass(frozen=True)
class Member:
    """A reward model with the mean and standard deviation of its scores on its own fold."""

    reward_model: RewardModel
    mean: float
    std: float


class Judge:
    """Scores text as `RewardModel` does: the mean of the members' standardised rewards.

    Attributes:
        folds: the fold of each prompt that some members were trained on, by `prompt_key`.
        members: the members that may judge a fold, by fold.
    """

    kind = "judge"

    def __init__(self, folds: Mapping[str, int], members: Mapping[int, Sequence[Member]]) -> None:
        self.folds = folds
        self.members = members

    def score(
        self,
        prompts: Sequence[Sequence[Mapping[str, str]]],
        responses: Sequence[str],
        finished: Sequence[bool],
    ) -> Tensor:
        """Return one reward per response, shape (rows,), in standard deviations of the members.

        A prompt that no member was trained on is judged by all of them.
        """
        fold_of = [self.folds.get(prompt_key(prompt)) for prompt in prompts]
        total, count = torch.zeros(len(prompts)), torch.zeros(len(prompts))
        for fold, members in self.members.items():
            rows = [row for row, own in enumerate(fold_of) if own in (fold, None)]
            if not rows:
                continue
            arguments = [[values[row] for row in rows] for values in (prompts, responses, finished)]
            for member in members:
                rewards = member.reward_model.score(*arguments)
                total[rows] += (rewards - member.mean) / member.std
                count[rows] += 1
        return total / count


def prompt_key(messages: Sequence[Mapping[str, str]]) -> str:
    """Name a prompt by its turns."""
    return "\0".join(f"{message['role']}\1{message['content']}" for message in messages)


def judge_folds(data: PreferenceData) -> dict[str, int]:
    """Return the fold of every validation and test prompt, by `prompt_key`.

    Prompts are dealt out in turn, category by category, in the order of a hash of their text.
    """
    prompts = [prompt for split in ("validation", "test") for prompt in data.prompts(split)]

    def order(prompt: Prompt) -> tuple[str, str]:
        text = prompt_key(prompt.messages)
        return prompt.category or "", hashlib.sha256(text.encode()).hexdigest()

    dealt = enumerate(sorted(prompts, key=order))
    return {prompt_key(prompt.messages): place % FOLDS for place, prompt in dealt}
