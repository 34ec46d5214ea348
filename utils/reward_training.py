"""Train the two reward models on groups of rated responses."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import RewardConfig as TrlRewardConfig
from trl import RewardTrainer

from utils.config import Profile, RewardConfig
from utils.data import Group
from utils.losses import bradley_terry_loss, pair_indices, rating_pair_loss
from utils.models import device
from utils.results import Run, read_json
from utils.rewards import KINDS, RewardModel, reward_from_logits
from utils.weights import encode_dialogue, pad_right

ROWS_TOGETHER = 8  # responses of like length in one forward pass


@dataclass
class GroupCollator:
    """Stack the responses of several groups; each response is in the batch once.

    Returns `input_ids` (rows, time), `ratings` (rows,), `group` (rows,) and `lengths` (rows,) in
    tokens, the rows in order of their length.
    """

    pad_token_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate rows of the dataset made by `training_set`."""
        rows = [
            (ids, rating, group)
            for group, example in enumerate(examples)
            for ids, rating in zip(example["ids"], example["ratings"], strict=True)
        ]
        ids, ratings, groups = zip(*sorted(rows, key=lambda row: len(row[0])), strict=True)
        return {
            "input_ids": pad_right(ids, self.pad_token_id),
            "ratings": torch.tensor(ratings),
            "group": torch.tensor(groups),
            "lengths": torch.tensor([len(row) for row in ids]),
        }


class GroupRewardTrainer(RewardTrainer):
    """`trl.RewardTrainer` on groups of rated responses instead of on single pairs.

    Four responses make up to six pairs. A trainer of pairs reads twelve texts for them, this one
    four, for the same loss. It also accepts ten outputs, which trl's trainer refuses.
    """

    def __init__(self, *, reward: RewardConfig, kind: str, model: PeftModel, **kwargs: Any) -> None:
        self.reward = reward
        self.kind = kind
        # RewardTrainer insists on one label, only because its own compute_loss does.
        model.config.num_labels = 1
        super().__init__(model=model, **kwargs)
        model.config.num_labels = KINDS[kind]

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset  # tokenised by `training_set`

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["ids", "ratings"]

    def compute_loss(
        self,
        model: PeftModel,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Return the mean loss over all ordered pairs within the groups of the batch."""
        logits = self._logits(model, inputs["input_ids"], inputs["lengths"])
        ratings = inputs["ratings"]
        chosen, rejected = pair_indices(ratings, inputs["group"])
        if self.kind == "scalar":
            loss = bradley_terry_loss(
                logits[chosen, 0],
                logits[rejected, 0],
                self.reward.margin_scale * (ratings[chosen] - ratings[rejected]),
                self.reward.center_rewards_coefficient,
            )
        else:
            loss = rating_pair_loss(logits[chosen], logits[rejected])
        reward = reward_from_logits(logits.detach())
        gap = reward[chosen] - reward[rejected]
        metrics = self._metrics["train" if model.training else "eval"]
        metrics["accuracy"].append((gap > 0).float().mean().item())
        metrics["reward_gap"].append(gap.mean().item())
        return (loss, logits) if return_outputs else loss

    @staticmethod
    def _logits(model: PeftModel, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Read the rows a few at a time, each few cut to its longest: a fifth less padding."""
        parts = []
        for rows in torch.arange(len(lengths)).split(ROWS_TOGETHER):
            width = min(-(-int(lengths[rows].max()) // 32) * 32, input_ids.shape[1])
            parts.append(model(input_ids=input_ids[rows, :width], use_cache=False).logits)
        return torch.cat(parts)


def training_set(groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Tokenise groups for `GroupRewardTrainer`; groups in which all ratings tie are left out."""
    rows = []
    for group in groups:
        ratings = [response.rating for response in group.responses]
        if len(set(ratings)) == 1:
            continue
        ids = [
            encode_dialogue(tokenizer, group.prompt, response.text, response.finished)
            for response in group.responses
        ]
        rows.append({"ids": ids, "ratings": ratings})
    return Dataset.from_list(rows)


class _Progress(TrainerCallback):
    """Write one metrics row and one line of text per optimiser step."""

    def __init__(self, run: Run, steps: int) -> None:
        self.run, self.steps, self.last = run, steps, time.time()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Log the step; the trainer's closing summary has no loss and is skipped."""
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"the loss of step {state.global_step} is {logs['loss']}; lower "
                "reward.learning_rate. The last good checkpoint is kept."
            )
        names = ("loss", "learning_rate", "grad_norm", "accuracy", "reward_gap")
        now, self.last = self.last, time.time()
        self.run.log(
            {"step": state.global_step}
            | {name: float(logs[name]) for name in names}
            | {"seconds": self.last - now}
        )
        if state.global_step % 10 == 0 or state.global_step == self.steps:
            left = (self.steps - state.global_step) * (self.last - now)
            print(
                f"[{self.run.directory.name}] step {state.global_step}/{self.steps} "
                f"loss {logs['loss']:.3f} accuracy {logs['accuracy']:.2f}, about {left:.0f} s left",
                flush=True,
            )


def train_reward_model(
    kind: str, profile: Profile, groups: Sequence[Group], run: Run
) -> RewardModel:
    """Train a reward model and save it in the run's folder; goes on from a checkpoint if any.

    Args:
        kind: "scalar" (Bradley-Terry with margin) or "ordinal" (ten classes, pairwise loss).
        profile: where `reward`, `model` and `seed` come from.
        groups: training groups.
        run: the run to log to.
    """
    reward = profile.reward
    reward_model = RewardModel.fresh(kind, profile)
    dataset = training_set(groups, reward_model.tokenizer)
    steps = math.ceil(reward.epochs * math.ceil(len(dataset) / reward.groups_per_step))
    trainer = GroupRewardTrainer(
        reward=reward,
        kind=kind,
        model=reward_model.model,
        args=_trainer_arguments(reward, profile.seed, run.directory / "checkpoints", steps),
        train_dataset=dataset,
        processing_class=reward_model.tokenizer,
        data_collator=GroupCollator(reward_model.tokenizer.pad_token_id),
        callbacks=[_Progress(run, steps)],
    )
    trainer.remove_callback(PrinterCallback)  # `_Progress` prints instead
    checkpoint = _last_good_checkpoint(run.directory / "checkpoints")
    run.rewind(int(checkpoint.rpartition("-")[2]) if checkpoint else 0)
    trainer.train(resume_from_checkpoint=checkpoint)
    reward_model.model.eval()
    reward_model.save(run.directory)
    return reward_model


def _trainer_arguments(
    reward: RewardConfig, seed: int, directory: Path, steps: int
) -> TrlRewardConfig:
    return TrlRewardConfig(
        output_dir=str(directory),
        seed=seed,
        max_steps=steps,
        learning_rate=reward.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(reward.warmup_ratio * steps)),
        per_device_train_batch_size=reward.micro_groups,
        gradient_accumulation_steps=reward.groups_per_step // reward.micro_groups,
        max_grad_norm=reward.max_grad_norm,
        max_length=None,
        # The model runs in its own dtype; autocast is for the plain peft layers on CUDA.
        bf16=device().type == "cuda" and torch.cuda.get_device_capability() >= (8, 0),
        fp16=False,
        use_cpu=device().type == "cpu",
        activation_checkpointing=False,
        save_strategy="steps",
        save_steps=reward.save_steps,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would log a mean in place of a loss that is not finite
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def _last_good_checkpoint(directory: Path) -> str | None:
    """Return the newest complete checkpoint; one that a kill cut short is removed."""
    while directory.exists() and (last := get_last_checkpoint(directory)):
        try:
            load_file(Path(last) / "adapter_model.safetensors")
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
                torch.load(Path(last) / name, weights_only=False)
            read_json(Path(last) / "trainer_state.json")
            return last
        except Exception as error:
            print(f"[{directory.parent.name}] {Path(last).name} is incomplete, removed: {error}")
        shutil.rmtree(last)
    return None
