"""How good a reward model is on held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from utils.data.pairs import Key, Pair, Response, response_key
from utils.rewards.losses import reward_from_logits
from utils.rewards.model import RewardModel


def scored_responses(reward_model: RewardModel, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Score every response of the pairs once; one JSON-ready row each, with the head's outputs."""
    found: dict[Key, tuple[Pair, Response]] = {
        response_key(pair, response): (pair, response)
        for pair in pairs
        for response in (pair.chosen, pair.rejected)
    }
    logits = reward_model.logits(
        [pair.group.prompt for pair, _ in found.values()],
        [response.text for _, response in found.values()],
        [response.finished for _, response in found.values()],
    )
    rewards = reward_from_logits(logits).tolist()
    return [
        {
            "prompt_id": prompt_id,
            "batch": batch,
            "place": place,
            "category": pair.category,
            "prompt": pair.group.prompt[-1]["content"],
            "response": response.text,
            "rating": response.rating,
            "source": response.source,
            "temperature": response.temperature,
            "reward": reward,
            "logits": [round(value, 5) for value in row],
        }
        for ((prompt_id, batch, place), (pair, response)), reward, row in zip(
            found.items(), rewards, logits.tolist(), strict=True
        )
    ]
