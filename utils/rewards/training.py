"""Train a reward model: steps, checkpoints, and micro-batches that fit in memory."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import RewardConfig as TrlRewardConfig
from trl import RewardTrainer

from utils.config import Profile, RewardConfig
from utils.data.pairs import Group
from utils.files import RunLog, set_aside
from utils.models.body import compute_dtype, device
from utils.models.memory import BatchSize
from utils.models.tensors import Damaged, read_tensors, read_whole
from utils.rewards.losses import KINDS
from utils.rewards.model import RewardModel
from utils.rewards.trainer import GroupCollator, GroupRewardTrainer, pair_set, training_set

MICRO_GROUPS = 8  # groups in one pass, to begin with, if the configuration leaves it open


class _Progress(TrainerCallback):
    """Write one metrics row and one line of text per optimiser step."""

    def __init__(self, run: RunLog, steps: int) -> None:
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
        # trl's own trainer calls the reward gap "margin".
        logs = {"reward_gap": logs.get("margin"), **logs}
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
                f"[{self.run.label}] step {state.global_step}/{self.steps} "
                f"loss {logs['loss']:.3f} accuracy {logs['accuracy']:.2f}, about {left:.0f} s left",
                flush=True,
            )


def train_reward_model(
    kind: str, profile: Profile, groups: Sequence[Group], run: RunLog
) -> RewardModel:
    """Train a reward model and save it in the run's folder; goes on from a checkpoint if any.

    When memory runs out, training goes on from the last checkpoint with half the groups in a pass
    and twice the passes in a step: up to rounding, the steps stay the same.

    Args:
        kind: "scalar" or "ordinal"; the profile names the loss of each.
        profile: where `reward`, `model` and `seed` come from.
        groups: training groups.
        run: the run to log to.
    """
    size = profile.reward.micro_groups or MICRO_GROUPS
    micro = BatchSize(f"{run.label}, groups in one pass", size)
    return micro.run(lambda size: _train(kind, profile, groups, run, size))


def _train(
    kind: str, profile: Profile, groups: Sequence[Group], run: RunLog, size: int
) -> RewardModel:
    """Train with at most `size` groups in one pass, from the last checkpoint or from scratch."""
    reward = profile.reward
    whole = reward.groups_per_step
    micro_groups = next(n for n in range(min(size, whole), 0, -1) if whole % n == 0)
    reward_model = RewardModel.fresh(kind, profile)
    dataset = training_set(groups, reward_model.tokenizer, reward)
    steps = math.ceil(reward.epochs * math.ceil(len(dataset) / reward.groups_per_step))
    trainer = _trainer(
        reward_model,
        reward,
        dataset,
        _trainer_arguments(
            reward, micro_groups, profile.seed, run.directory / "checkpoints", steps
        ),
    )
    trainer.add_callback(_Progress(run, steps))
    trainer.remove_callback(PrinterCallback)  # `_Progress` prints instead
    checkpoint = _last_good_checkpoint(run.directory / "checkpoints")
    run.rewind(int(checkpoint.rpartition("-")[2]) if checkpoint else 0)
    trainer.train(resume_from_checkpoint=checkpoint)
    # The trainer has wrapped the model in autocast; a reward must not depend on whether the model
    # that gives it was trained or loaded by this process.
    trainer.accelerator.unwrap_model(reward_model.model, keep_fp32_wrapper=False)
    if not reward.lora_r:
        reward_model.round()
    reward_model.model.eval()
    reward_model.save(run.directory)
    return reward_model


def _trainer(
    reward_model: RewardModel, reward: RewardConfig, dataset: Dataset, args: TrlRewardConfig
) -> RewardTrainer:
    """Return the trainer of groups, or trl's own of pairs with as many pairs in a step."""
    model, tokenizer = reward_model.model, reward_model.tokenizer
    shared = {"model": model, "args": args, "processing_class": tokenizer}
    if reward.trainer == "groups":
        collator = GroupCollator(tokenizer.pad_token_id)
        outputs = KINDS[reward_model.kind]
        return GroupRewardTrainer(
            reward=reward, outputs=outputs, train_dataset=dataset, data_collator=collator, **shared
        )
    pairs = pair_set(dataset, reward.margin_scale)
    args.per_device_train_batch_size *= round(len(pairs) / len(dataset))
    args.center_rewards_coefficient = reward.center_rewards_coefficient
    return RewardTrainer(train_dataset=pairs, **shared)


def _trainer_arguments(
    reward: RewardConfig, micro_groups: int, seed: int, directory: Path, steps: int
) -> TrlRewardConfig:
    where = device()
    # Merged adapters on a CPU are in the model's dtype already; all else needs autocast.
    dtype = compute_dtype(where) if where.type == "cuda" or not reward.lora_r else None
    return TrlRewardConfig(
        output_dir=str(directory),
        seed=seed,
        max_steps=steps,
        learning_rate=reward.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(reward.warmup_ratio * steps)),
        per_device_train_batch_size=micro_groups,
        gradient_accumulation_steps=reward.groups_per_step // micro_groups,
        max_grad_norm=reward.max_grad_norm,
        max_length=None,
        # In fp16 autocast comes with a scaled loss.
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=where.type == "cpu",
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
    """Return the newest complete checkpoint; a damaged one is set aside.

    Raises:
        ResultsError: if a checkpoint cannot be read, but is not known to be damaged.
    """
    while directory.exists() and (last := get_last_checkpoint(directory)):
        try:
            _require_complete(Path(last))
            return last
        except Damaged as error:
            # A name that starts with "checkpoint-" would count as an old one, which are deleted.
            kept = set_aside(Path(last), f"damaged-{Path(last).name}")
            print(f"[{directory.parent.name}] {Path(last).name}: {error}; set aside as {kept.name}")
    return None


def _require_complete(checkpoint: Path) -> None:
    """Read what the trainer reads when it goes on.

    Raises:
        Damaged: naming a file that is missing, cut short or changed.
        ResultsError: naming one that cannot be read.
    """
    names = {path.name for path in checkpoint.iterdir()}
    weights = names & {"adapter_model.safetensors", "model.safetensors"}
    if len(weights) != 1:
        raise Damaged("the weights are missing")
    for name, read in ((*weights, load), ("trainer_state.json", json.loads)):
        try:
            read(read_whole(checkpoint / name))
        except (SafetensorError, ValueError) as error:
            raise Damaged(f"{name} is cut short or damaged: {error}") from error
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", *(names & {"scaler.pt"})):
        read_tensors(checkpoint / name)
