"""The trainer of reward models: trl's, on groups of rated responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardTrainer

from utils.config import RewardConfig
from utils.data.pairs import Group
from utils.models.weights import encode_dialogue, pad_right
from utils.rewards.batch_loss import loss_totals, reward_loss
from utils.rewards.losses import pair_indices, reward_from_logits

ROWS_TOGETHER = 8  # responses of like length in one forward pass


@dataclass
class GroupCollator:
    """Stack the responses of several groups; each response is in the batch once.

    Returns `input_ids` (rows, time), `ratings` (rows,), `group` (rows,), `reference` (rows,), which
    are no samples of a model, and `lengths` (rows,) in tokens, the rows in order of their length.
    """

    pad_token_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate rows of the dataset made by `training_set`."""
        rows = [
            (ids, rating, reference, group)
            for group, example in enumerate(examples)
            for ids, rating, reference in zip(
                example["ids"], example["ratings"], example["reference"], strict=True
            )
        ]
        by_length = sorted(rows, key=lambda row: len(row[0]))
        ids, ratings, references, groups = zip(*by_length, strict=True)
        return {
            "input_ids": pad_right(ids, self.pad_token_id),
            "ratings": torch.tensor(ratings),
            "group": torch.tensor(groups),
            "reference": torch.tensor(references),
            "lengths": torch.tensor([len(row) for row in ids]),
        }


class GroupRewardTrainer(RewardTrainer):
    """`trl.RewardTrainer` on groups of rated responses instead of on single pairs.

    Four responses make up to six pairs. A trainer of pairs reads twelve texts for them, this one
    four, for the same loss. It also accepts ten outputs, which trl's trainer refuses.
    """

    loss_is_scaled_for_ga = True  # by `compute_loss`: the losses of a step's passes add up

    def __init__(
        self,
        *,
        reward: RewardConfig,
        outputs: int,
        model: PreTrainedModel | PeftModel,
        **kwargs: Any,
    ) -> None:
        self.reward, self.outputs = reward, outputs
        self.pairs: list[tuple[float, float]] = []  # of a step: is it right, its reward gap
        kwargs["args"].remove_unused_columns = False  # the forward pass names none of a group's
        # RewardTrainer insists on one label, only because its own compute_loss does.
        model.config.num_labels = 1
        # It also casts what is trained on 4-bit weights to bf16. An update of a few ten-thousandths
        # is lost in that, and the loss scaling that a T4 needs does not know the type.
        exact = {p: p.data for p in model.parameters() if p.requires_grad}
        super().__init__(model=model, **kwargs)
        for parameter, data in exact.items():
            parameter.data = data
        model.config.num_labels = outputs

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        """Leave the dataset to `training_set`; trl has no public way to skip its tokenisation."""
        return dataset

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Return the batches of a step and the sum of their `loss_totals`."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        facts = [(b["ratings"], b["group"], b["reference"]) for b in batches]
        return batches, sum(loss_totals(*fact, self.outputs, self.reward) for fact in facts)

    def compute_loss(
        self,
        model: PreTrainedModel | PeftModel,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Return the mean loss over all comparisons within the groups of the batch.

        With `num_items_in_batch`, the `loss_totals` of the whole step, it is this batch's share in
        the loss of the step, which is the same however its groups are cut into batches.
        """
        logits = self._logits(model, inputs["input_ids"], inputs["lengths"])
        ratings, group = inputs["ratings"], inputs["group"]
        chosen, rejected = pair_indices(ratings, group)
        totals = None if num_items_in_batch is None else num_items_in_batch.tolist()
        loss = reward_loss(logits, ratings, group, inputs["reference"], self.reward, totals)
        reward = reward_from_logits(logits.detach())
        gap = reward[chosen] - reward[rejected]
        self.pairs += zip((gap > 0).float().tolist(), gap.tolist(), strict=True)
        return (loss, logits) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `accuracy` and `reward_gap` too, the means over the pairs since the last time."""
        if self.pairs:
            means = torch.tensor(self.pairs).mean(0).tolist()
            logs |= dict(zip(("accuracy", "reward_gap"), means, strict=True))
            self.pairs.clear()
        super().log(logs, start_time)

    @staticmethod
    def _logits(model: PreTrainedModel | PeftModel, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Read the rows a few at a time, each few cut to its longest: a fifth less padding."""
        parts = []
        for rows in torch.arange(len(lengths)).split(ROWS_TOGETHER):
            width = min(-(-int(lengths[rows].max()) // 32) * 32, input_ids.shape[1])
            parts.append(model(input_ids=input_ids[rows, :width], use_cache=False).logits)
        return torch.cat(parts)


def training_set(
    groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase, reward: RewardConfig
) -> Dataset:
    """Tokenise groups for `GroupRewardTrainer`; those in which all ratings tie are left out."""
    rows, limit = [], reward.train_max_length
    for group in groups:
        encoded = [
            (
                encode_dialogue(tokenizer, group.prompt, r.text, r.finished),
                r.rating,
                r.source == "reference",
            )
            for r in group.responses
            if reward.reference_weight or r.source != "reference"
        ]
        kept = [row for row in encoded if limit is None or len(row[0]) <= limit]
        if len({rating for _, rating, _ in kept}) < 2:
            continue
        ids, ratings, references = zip(*kept, strict=True)
        rows.append({"ids": ids, "ratings": ratings, "reference": references})
    return Dataset.from_list(rows)


def pair_set(groups: Dataset, margin_scale: float) -> Dataset:
    """Turn the rows of `training_set` into a row per pair, as `trl.RewardTrainer` reads them."""
    rows = []
    for ids, ratings in zip(groups["ids"], groups["ratings"], strict=True):
        chosen, rejected = pair_indices(torch.tensor(ratings), torch.zeros(len(ratings)))
        for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True):
            margin = margin_scale * (ratings[c] - ratings[r])
            rows.append({"chosen_ids": ids[c], "rejected_ids": ids[r], "margin": margin})
    return Dataset.from_list(rows)
