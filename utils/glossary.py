"""What every column of every metrics.csv means: the README's glossary."""

from __future__ import annotations

GLOSSARY = {
    "step": "optimiser step, from 1",
    "loss": "the quantity that was minimised, mean over the step's batch",
    "learning_rate": "learning rate of the step",
    "grad_norm": "gradient norm before clipping",
    "accuracy": "share of training pairs in the step whose chosen response scored higher",
    "reward_gap": "mean score difference, chosen minus rejected, in the step",
    "reward": "mean reward of the step's completions, in SFT standard deviations",
    "reward_std": "standard deviation of that reward over the step's completions",
    "kl": "mean sequence KL to the SFT policy, estimated on the sampled tokens, nats",
    "objective": "mean of reward - beta * KL: what REINFORCE maximises",
    "baseline": "baseline used in the step, read before it saw the step's rewards",
    "advantage_std": "standard deviation of the advantages",
    "entropy": "mean entropy of the policy per sampled token, nats",
    "completions/mean_length": "mean number of sampled tokens, the end token included",
    "completions/clipped_ratio": "share of completions that ran into the length limit",
    "completions/distinct_2": "share of different word pairs among those of the step's completions",
    "eval_reward": "mean reward on the validation prompts (blank where not measured)",
    "eval_reward_low": "lower end of that mean's 95% interval over prompts",
    "eval_reward_high": "upper end of that interval",
    "eval_kl": "mean sequence KL on the validation prompts, nats",
    "eval_mean_length": "mean completion length on the validation prompts, tokens",
    "eval_finished": "share of completions there that ended by themselves",
    "eval_distinct_2": "share of different word pairs among those of the completions there",
    "eval_judge": "mean reward there under the judge, in SFT standard deviations (blank: no judge)",
    "scale": "of an average of policies: what their mean update is multiplied by",
    "seconds": "wall time of the step, evaluation and checkpoint excluded",
}
