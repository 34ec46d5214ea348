"""The REINFORCE training loop (Ahmadian et al. 2024, arXiv 2402.14740)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from utils.checkpoints import load_checkpoint, save_checkpoint
from utils.config import ReinforceConfig
from utils.data import Prompt
from utils.distributed import gather_rows, own_rows, processes
from utils.estimator import Baseline, kl_regularised
from utils.results import Run
from utils.rollout import Rollout, batched_logprobs, sample, sampling_noise
from utils.update import PolicyUpdate
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

    Under `accelerate launch`, each process samples and scores its part of a step's prompts; the
    baseline and the logged numbers are those of the whole step, and the first process writes.

    Args:
        policy: the language model with a trainable adapter; its reference is the adapter disabled.
        tokenizer: the policy's.
        prompts: training prompts.
        reward_of: scores a rollout, in SFT standard deviations.
        config: the hyper-parameters.
        seed: of the prompt order and the sampling noise.
        run: gets one row per step.
        evaluate: returns the `eval_*` metrics on held-out prompts.
        monitor: called after each step with its row and this process's prompts, rollout, rewards.

    Raises:
        TrainingStopped: on a non-finite loss or reward, a runaway KL or a collapsed entropy.
    """
    optimizer = _optimizer(policy, config)
    baseline = Baseline(config.baseline, config.ema_decay, config.window, config.num_generations)
    update = PolicyUpdate(policy, optimizer, config, tokenizer.pad_token_id)
    done = _open(run, policy, optimizer, baseline, evaluate)
    for step in range(done + 1, config.steps + 1):
        start = time.time()
        batch = step_prompts(prompts, step, config.prompts_per_step, seed, config.num_generations)
        own = own_rows(len(batch))
        own_batch = [batch[row] for row in own]
        rollout = _rollout(policy, tokenizer, batch, own, config, seed * 100_003 + step)
        rewards = reward_of(own_batch, rollout)
        measured = _measure(policy, tokenizer, rollout, rewards, own, config)
        objective = measured.objective(config.beta)
        base = baseline.value(objective)
        rate = config.learning_rate * min(1.0, step / config.warmup_steps)
        row = _row() | {"step": step, "learning_rate": rate} | _describe(measured, objective, base)
        _check(row, config, run)
        row |= update.step(rollout, (objective - base)[list(own)], len(batch), rate)
        _check(row, config, run)
        baseline.update(objective)
        row["seconds"] = time.time() - start
        if not processes().is_main_process:
            continue
        if step % config.eval_steps == 0 or step == config.steps:
            row |= evaluate()
        run.log(row)
        if step % config.save_steps == 0 or step == config.steps:
            save_checkpoint(run.directory, step, policy, optimizer, baseline)
        if monitor:
            monitor(row, own_batch, rollout, rewards)


def _optimizer(policy: PeftModel, config: ReinforceConfig) -> torch.optim.Optimizer:
    trained = [p for p in policy.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, config.learning_rate, (0.9, 0.95), weight_decay=0.0)


def _open(
    run: Run,
    policy: PeftModel,
    optimizer: torch.optim.Optimizer,
    baseline: Baseline,
    evaluate: Callable[[], dict[str, float]],
) -> int:
    """Load the last checkpoint, drop the rows after it, and return its step; 0 starts anew."""
    with processes().main_process_first():  # the first one removes checkpoints that are damaged
        done = load_checkpoint(run.directory, policy, optimizer, baseline)
    if processes().is_main_process:
        run.rewind(done or -1)
        if not done:
            run.log({**_row(), "step": 0, **evaluate()})
    return done


@dataclass
class Measured:
    """What one step's completions amount to, over all processes; fp32, shape (rows,) each."""

    reward: Tensor
    log_prob: Tensor
    reference: Tensor
    entropy: Tensor
    length: Tensor
    finished: Tensor

    def objective(self, beta: float) -> Tensor:
        """Return the reward less the KL's share of it, which is what is maximised."""
        return kl_regularised(self.reward, self.log_prob, self.reference, beta)


def _measure(
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    rewards: Tensor,
    own: range,
    config: ReinforceConfig,
) -> Measured:
    """Compute the log-probabilities of this process's rows, and gather all rows."""
    pad = tokenizer.pad_token_id
    log_probs, entropy = batched_logprobs(policy, rollout, config.temperature, pad)
    with policy.disable_adapter():
        reference, _ = batched_logprobs(policy, rollout, config.temperature, pad)
    finished = torch.tensor(rollout.finished, dtype=torch.float32)
    columns = [rewards, log_probs, reference, entropy, rollout.lengths(), finished]
    return Measured(*gather_rows(own, torch.stack(columns, dim=1)).unbind(1))


def _describe(measured: Measured, objective: Tensor, base: Tensor) -> dict[str, float]:
    return {
        "reward": measured.reward.mean().item(),
        "reward_std": measured.reward.std().item(),
        "kl": (measured.log_prob - measured.reference).mean().item(),
        "objective": objective.mean().item(),
        "baseline": base.mean().item(),
        "advantage_std": (objective - base).std().item(),
        "entropy": (measured.entropy.sum() / measured.length.sum()).item(),
        "completions/mean_length": measured.length.mean().item(),
        "completions/clipped_ratio": 1 - measured.finished.mean().item(),
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
    own: range,
    config: ReinforceConfig,
    seed: int,
) -> Rollout:
    """Sample this process's rows; the noise is that of the whole batch, however it is shared."""
    ids = [encode_prompt(tokenizer, batch[row].messages) for row in own]
    noise = sampling_noise(seed, len(batch), config.max_completion_length)
    return sample(policy, tokenizer, ids, noise[list(own)], config.temperature)


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
