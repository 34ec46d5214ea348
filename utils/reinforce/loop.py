"""The REINFORCE training loop (Ahmadian et al. 2024, arXiv 2402.14740)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from utils.config import ReinforceConfig
from utils.data.pairs import Prompt
from utils.files import RunLog
from utils.models.memory import BatchSize
from utils.models.weights import encode_prompt
from utils.reinforce.baselines import BASELINES, NoBaseline
from utils.reinforce.checkpoints import (
    last_checkpoint,
    load_adapter,
    load_checkpoint,
    save_checkpoint,
)
from utils.reinforce.distributed import own_rows, processes
from utils.reinforce.sampling import DECODED, READ, Rollout, batches, sample, sampling_noise
from utils.reinforce.step_metrics import measure_step
from utils.reinforce.update import PolicyUpdate

RewardFunction = Callable[[Sequence[Prompt], Rollout], Tensor]  # -> rewards, shape (rows,)
Evaluate = Callable[[], dict[str, float | None]]
Monitor = Callable[[dict[str, Any], Sequence[Prompt], Rollout, Tensor], None]
# The columns of metrics.csv, in order; what they mean is in results/README.md.
COLUMNS = (
    *("step", "loss", "learning_rate", "grad_norm", "reward", "reward_std", "kl", "objective"),
    *("baseline", "advantage_std", "entropy", "completions/mean_length"),
    *("completions/clipped_ratio", "completions/distinct_2"),
    *("eval_reward", "eval_reward_low", "eval_reward_high", "eval_kl", "eval_mean_length"),
    *("eval_finished", "eval_distinct_2", "eval_judge", "seconds"),
)
EMPTY: dict[str, Any] = dict.fromkeys(COLUMNS)


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
    run: RunLog,
    evaluate: Evaluate,
    monitor: Monitor | None = None,
) -> None:
    """Align a policy in place; goes on from the run's last good checkpoint if there is one.

    Under `accelerate launch` each process has a part of a step; baseline and log are of the whole.
    An evaluation above `config.kl_budget` ends the training with the policy of the one before it.

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
        TrainingStopped: on a non-finite loss or reward, a runaway KL or a collapsed policy.
    """
    optimizer = _optimizer(policy, config)
    baseline = BASELINES[config.baseline](config)
    update = PolicyUpdate(policy, optimizer, config, tokenizer.pad_token_id)
    decoded, read = batches("decoded", DECODED), batches("read", READ)
    done = _open(run, policy, optimizer, baseline, evaluate, config)
    for step in range(done + 1, config.steps + 1):
        start = time.time()
        batch = step_prompts(prompts, step, config.prompts_per_step, seed, config.num_generations)
        own = own_rows(len(batch))
        own_batch = [batch[row] for row in own]
        rollout = _rollout(policy, tokenizer, batch, own, config, seed * 100_003 + step, decoded)
        rewards = reward_of(own_batch, rollout)
        measured = measure_step(policy, tokenizer, rollout, rewards, own, config, read)
        objective = measured.objective(config.beta)
        base = baseline.value(objective)
        advantage = objective - base
        row = EMPTY | {"step": step} | measured.metrics(objective, base, advantage)
        _check(row, config, run)
        row |= update.step(rollout, advantage[list(own)], len(batch), _rate(step, config))
        _check(row, config, run)
        baseline.update(objective)
        row |= {"seconds": time.time() - start} | _held_out(step, config, evaluate)
        if _over_budget(row, config):
            return _end_within_budget(row, config, run, policy)
        if processes().is_main_process:
            run.log(row)
            if _saves(step, config):
                save_checkpoint(run.directory, step, policy, optimizer, baseline)
            if monitor:
                monitor(row, own_batch, rollout, rewards)


def _optimizer(policy: PeftModel, config: ReinforceConfig) -> torch.optim.Optimizer:
    trained = [p for p in policy.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, config.learning_rate, (0.9, 0.95), weight_decay=0.0)


def _open(
    run: RunLog,
    policy: PeftModel,
    optimizer: torch.optim.Optimizer,
    baseline: NoBaseline,
    evaluate: Evaluate,
    config: ReinforceConfig,
) -> int:
    """Load the last checkpoint, drop the rows after it, and return its step; 0 starts anew."""
    with processes().main_process_first():  # the first one removes checkpoints that are damaged
        done = load_checkpoint(run.directory, policy, optimizer, baseline)
    if processes().is_main_process:
        run.rewind(done or -1)
        if not done:
            run.log({**EMPTY, "step": 0, **evaluate()})
            if config.kl_budget is not None:  # what the first evaluation may go back to
                save_checkpoint(run.directory, 0, policy, optimizer, baseline)
    return done


def _rate(step: int, config: ReinforceConfig) -> float:
    """Return the learning rate, which rises to its value over the first steps."""
    return config.learning_rate * min(1.0, step / max(1, config.warmup_steps))


def _evaluates(step: int, config: ReinforceConfig) -> bool:
    return step % config.eval_steps == 0 or step == config.steps


def _held_out(step: int, config: ReinforceConfig, evaluate: Evaluate) -> dict[str, float | None]:
    """Evaluate at the steps for it, in the first process."""
    return evaluate() if _evaluates(step, config) and processes().is_main_process else {}


def _saves(step: int, config: ReinforceConfig) -> bool:
    """With a budget, the newest checkpoint has to be that of the last evaluation within it."""
    if config.kl_budget is not None:
        return _evaluates(step, config)
    return step % config.save_steps == 0 or step == config.steps


def _rollout(
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Prompt],
    own: range,
    config: ReinforceConfig,
    seed: int,
    decoded: BatchSize,
) -> Rollout:
    """Sample this process's rows; the noise is that of the whole batch, however it is shared."""
    ids = [encode_prompt(tokenizer, batch[row].messages) for row in own]
    noise = sampling_noise(seed, len(batch), config.max_completion_length)
    return sample(policy, tokenizer, ids, noise[list(own)], config.temperature, decoded)


def _check(row: dict[str, Any], config: ReinforceConfig, run: RunLog) -> None:
    """Stop a run that cannot recover, before it writes a checkpoint of the damage."""
    kept = last_checkpoint(run.directory)
    where = f"[{run.label}] step {row['step']}:"
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
    # NaN, where no completion has two words, passes: short is not yet repetitive.
    if row["completions/distinct_2"] < config.min_distinct_2:
        raise TrainingStopped(
            f"{where} distinct-2 {row['completions/distinct_2']:.3f} is below "
            f"reinforce.min_distinct_2 = {config.min_distinct_2}: the policy repeats itself; raise "
            f"reinforce.beta or lower the learning rate. {kept}"
        )


def _over_budget(row: dict[str, Any], config: ReinforceConfig) -> bool:
    """Whether the evaluation of the first process, the only one that has it, is over budget."""
    if config.kl_budget is None:
        return False
    return any(gather_object([(row["eval_kl"] or 0.0) > config.kl_budget]))


def _end_within_budget(
    row: dict[str, Any], config: ReinforceConfig, run: RunLog, policy: PeftModel
) -> None:
    """Go back to the policy of the evaluation before; a killed run comes here again."""
    kept = load_adapter(run.directory, policy)
    if processes().is_main_process:
        run.rewind(kept)
        ended = (
            f"eval_kl {row['eval_kl']:.2f} at step {row['step']} is above reinforce.kl_budget = "
            f"{config.kl_budget}; the policy is that of step {kept}"
        )
        print(f"[{run.label}] {ended}", flush=True)
        run.save(ended=ended)
