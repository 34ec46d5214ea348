"""Align a policy with any reward: the training stage, whatever scores its completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from utils.config import Profile
from utils.data.pairs import PreferenceData, Prompt
from utils.data.texts import distinct_n
from utils.experiments.storage import Run
from utils.reinforce.distributed import processes
from utils.reinforce.evaluation import Scorer, evaluate_policy
from utils.reinforce.loop import Monitor, train_policy
from utils.reinforce.sampling import Rollout
from utils.statistics.bootstrap import clustered_interval
from utils.statistics.policy_logs import clipped_steps

Scale = tuple[float, float]  # mean and standard deviation of the SFT model's raw reward


def align_policy(
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    profile: Profile,
    data: PreferenceData,
    run: Run,
    training: tuple[Scorer, Scale],
    held_out: Mapping[str, tuple[Scorer, Scale]],
    monitor: Monitor | None = None,
) -> None:
    """Align a policy in place on the training prompts and finish its run.

    `run.json` then holds `reward_mean` and `reward_std`, the scale of the training reward, and
    `clipped_steps`, the share of steps in which the gradient was clipped.

    Args:
        policy: the SFT model with an adapter; goes on from the run's last checkpoint if there is
            one.
        tokenizer: the policy's.
        profile: the hyper-parameters.
        data: training prompts, and validation prompts for the held-out metrics.
        run: where it is written.
        training: what scores the completions that are learned from, and its scale.
        held_out: what scores the validation prompts, and its scale: "own" gives `eval_reward`,
            "judge", where there is one, `eval_judge`.
        monitor: see `train_policy`.

    Raises:
        TrainingStopped: see `train_policy`.
    """
    scorer, (mean, std) = training
    run.save(reward_mean=mean, reward_std=std)

    def reward_of(batch: Sequence[Prompt], rollout: Rollout) -> Tensor:
        messages = [prompt.messages for prompt in batch]
        return (scorer.score(messages, rollout.texts, rollout.finished) - mean) / std

    train_policy(
        policy,
        tokenizer,
        data.prompts("train"),
        reward_of,
        profile.reinforce,
        profile.seed,
        run,
        partial(
            held_out_metrics,
            *(policy, tokenizer, data.prompts("validation"), profile),
            {name: scorer for name, (scorer, _) in held_out.items()},
            {name: scale for name, (_, scale) in held_out.items()},
        ),
        monitor,
    )
    facts = {}
    if processes().is_main_process:  # the one that has the log
        facts["clipped_steps"] = clipped_steps(run.metrics(), profile.reinforce.max_grad_norm)
    run.finish(**facts)


def held_out_metrics(
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    profile: Profile,
    reward_models: Mapping[str, Scorer],
    scales: Mapping[str, tuple[float, float]],
) -> dict[str, float | None]:
    """Return the `eval_*` metrics of the policy.

    Args:
        policy: the policy.
        tokenizer: the policy's.
        prompts: held-out prompts.
        profile: temperature, length limit, samples per prompt and seed.
        reward_models: "own", which gives `eval_reward`, and perhaps "judge", `eval_judge`.
        scales: of each, mean and standard deviation of the SFT model's raw reward.
    """
    temperature = profile.reinforce.temperature
    frame = evaluate_policy(policy, tokenizer, prompts, profile, temperature, reward_models)
    rewards = {name: (frame[f"reward_{name}"] - mean) / std for name, (mean, std) in scales.items()}
    reward = clustered_interval(
        rewards["own"], frame["prompt_id"], profile.evaluation.bootstrap_samples
    )
    return {
        "eval_reward": reward["value"],
        "eval_reward_low": reward["low"],
        "eval_reward_high": reward["high"],
        "eval_kl": float(frame["kl"].mean()),
        "eval_mean_length": float(frame["length"].mean()),
        "eval_finished": float(frame["finished"].mean()),
        "eval_distinct_2": distinct_n(frame["response"]),
        "eval_judge": float(rewards["judge"].mean()) if "judge" in rewards else None,
    }
