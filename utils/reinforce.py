"""The REINFORCE training loop (Ahmadian et al. 2024, arXiv 2402.14740)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from utils.checkpoints import load_checkpoint, save_checkpoint
from utils.config import ReinforceConfig
from utils.data import Prompt
from utils.estimator import Baseline, kl_regularised, reinforce_loss
from utils.results import Run
from utils.rollout import Rollout, batched_logprobs, completion_logprobs, sample, sampling_noise
from utils.weights import encode_prompt

RewardFunction = Callable[[Sequence[Prompt], Rollout], Tensor]  # -> rewards, shape (rows,)
Monitor = Callable[[dict[str, Any], Sequence[Prompt], Rollout, Tensor], None]


class TrainingStopped(RuntimeError):
    """The policy diverged or collapsed; the last good checkpoint is kept."""


def step_prompts(
    prompts: Sequence[Prompt], step: int, rows: int, seed: int, num_generations: int = 1
) -> list[Prompt]:
    """Return a step's prompts: epochs of a seeded shuffle, a function of the step alone.

    A resumed run needs no state for it. Each prompt is repeated `num_generations` times, adjacent.
    """
    distinct = rows // num_generations
    chosen = []
    for index in range((step - 1) * distinct, step * distinct):
        epoch, place = divmod(index, len(prompts))
        order = torch.randperm(
            len(prompts), generator=torch.Generator().manual_seed(seed * 1009 + epoch)
        )
        chosen.append(prompts[int(order[place])])
    return [prompt for prompt in chosen for _ in range(num_generations)]


def train_policy(
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    reward_of: RewardFunction,
    config: ReinforceConfig,
    seed: int,
    run: Run,
    evaluate: Callable[[], dict[str, float]],
    monitor: Monitor | None = None,
) -> None:
    """Align a policy in place; goes on from the run's last good checkpoint if there is one.

    Args:
        policy: the language model with a trainable adapter; its reference is the adapter disabled.
        tokenizer: the policy's.
        prompts: training prompts.
        reward_of: scores a rollout, in SFT standard deviations.
        config: the hyper-parameters.
        seed: of the prompt order and the sampling noise.
        run: gets one row per step.
        evaluate: returns the `eval_*` metrics on held-out prompts.
        monitor: called after each step with its row, prompts, rollout and rewards.

    Raises:
        TrainingStopped: on a non-finite loss or reward, a runaway KL or a collapsed entropy.
    """
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.learning_rate, (0.9, 0.95), weight_decay=0.0)
    baseline = Baseline(config.baseline, config.ema_decay, config.window, config.num_generations)
    first = load_checkpoint(run.directory, policy, optimizer, baseline) + 1
    run.rewind(first - 1 if first > 1 else -1)  # a fresh start logs step 0 again
    if first == 1:
        run.log({**_row(), "step": 0, **evaluate()})
    for step in range(first, config.steps + 1):
        start = time.time()
        batch = step_prompts(prompts, step, config.prompts_per_step, seed, config.num_generations)
        rollout = _rollout(policy, tokenizer, batch, config, seed * 100_003 + step)
        rewards = reward_of(batch, rollout)
        log_probs, reference, entropy = _both_logprobs(policy, tokenizer, rollout, config)
        objective = kl_regularised(rewards, log_probs, reference, config.beta)
        base = baseline.value(objective)
        row = {**_row(), "step": step, **_describe(rollout, rewards, objective, base)}
        row["kl"] = (log_probs - reference).mean().item()
        row["entropy"] = (entropy.sum() / rollout.lengths().sum()).item()
        row["learning_rate"] = config.learning_rate * min(1.0, step / config.warmup_steps)
        _check(row, config, run)
        row |= _update(policy, optimizer, tokenizer, rollout, objective - base, config, row)
        _check(row, config, run)
        baseline.update(objective)
        row["seconds"] = time.time() - start
        if step % config.eval_steps == 0 or step == config.steps:
            row |= evaluate()
        run.log(row)
        if step % config.save_steps == 0 or step == config.steps:
            save_checkpoint(run.directory, step, policy, optimizer, baseline)
        if monitor:
            monitor(row, batch, rollout, rewards)


def _describe(
    rollout: Rollout, rewards: Tensor, objective: Tensor, base: Tensor
) -> dict[str, float]:
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std().item(),
        "objective": objective.mean().item(),
        "baseline": base.mean().item(),
        "advantage_std": (objective - base).std().item(),
        "completions/mean_length": rollout.lengths().mean().item(),
        "completions/clipped_ratio": 1 - sum(rollout.finished) / len(rollout),
    }


def _row() -> dict[str, float | None]:
    names = (
        "step loss learning_rate grad_norm reward reward_std kl objective baseline advantage_std "
        "entropy completions/mean_length completions/clipped_ratio eval_reward eval_reward_low "
        "eval_reward_high eval_kl eval_mean_length seconds"
    )
    return dict.fromkeys(names.split())


def _rollout(
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Prompt],
    config: ReinforceConfig,
    seed: int,
) -> Rollout:
    ids = [encode_prompt(tokenizer, prompt.messages) for prompt in batch]
    noise = sampling_noise(seed, len(ids), config.max_completion_length)
    return sample(policy, tokenizer, ids, noise, config.temperature)


def _both_logprobs(
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    config: ReinforceConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    pad = tokenizer.pad_token_id
    log_probs, entropy = batched_logprobs(policy, rollout, config.temperature, pad)
    with policy.disable_adapter():
        reference, _ = batched_logprobs(policy, rollout, config.temperature, pad)
    return log_probs, reference, entropy


def _update(
    policy: PeftModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    advantages: Tensor,
    config: ReinforceConfig,
    row: dict[str, Any],
) -> dict[str, float]:
    """Take one gradient step on the whole rollout, in micro-batches of like length."""
    lengths = [
        len(p) + len(c) for p, c in zip(rollout.prompt_ids, rollout.completion_ids, strict=True)
    ]
    order = sorted(range(len(rollout)), key=lengths.__getitem__)
    total = 0.0
    for start in range(0, len(order), config.micro_batch):
        rows = order[start : start + config.micro_batch]
        log_probs, _ = completion_logprobs(
            policy,
            [rollout.prompt_ids[r] for r in rows],
            [rollout.completion_ids[r] for r in rows],
            config.temperature,
            tokenizer.pad_token_id,
        )
        loss = reinforce_loss(advantages[rows].to(log_probs), log_probs) * len(rows) / len(order)
        loss.backward()
        total += loss.item()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm).item()
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = row["learning_rate"]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": total, "grad_norm": norm}


def _check(row: dict[str, Any], config: ReinforceConfig, run: Run) -> None:
    """Stop a run that cannot recover, before it writes a checkpoint of the damage."""
    kept = f"The last good checkpoint is in {run.directory.name}/checkpoints."
    where = f"[{run.directory.name}] step {row['step']}:"
    for name in ("reward", "kl", "loss", "grad_norm"):
        if row[name] is not None and not math.isfinite(row[name]):
            raise TrainingStopped(f"{where} {name} is {row[name]}; lower the learning rate. {kept}")
    if row["kl"] > config.max_kl:
        raise TrainingStopped(
            f"{where} KL {row['kl']:.1f} is above reinforce.max_kl = {config.max_kl}; raise "
            f"reinforce.beta or lower the learning rate. {kept}"
        )
    if row["entropy"] < config.min_entropy:
        raise TrainingStopped(
            f"{where} entropy {row['entropy']:.3f} is below reinforce.min_entropy = "
            f"{config.min_entropy}: the policy has collapsed. {kept}"
        )
