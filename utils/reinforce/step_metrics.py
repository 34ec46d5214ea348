"""What is measured of a training step's completions, over all processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from utils.config import ReinforceConfig
from utils.data.texts import distinct_n
from utils.models.memory import BatchSize
from utils.reinforce.baselines import kl_regularised
from utils.reinforce.distributed import gather_rows
from utils.reinforce.sampling import Rollout, batched_logprobs


@dataclass
class Measured:
    """What one step's completions amount to, over all processes; tensors fp32, shape (rows,)."""

    reward: Tensor
    log_prob: Tensor
    reference: Tensor
    entropy: Tensor
    length: Tensor
    finished: Tensor
    texts: list[str]

    def objective(self, beta: float) -> Tensor:
        """Return the reward less the KL's share of it, which is what is maximised."""
        return kl_regularised(self.reward, self.log_prob, self.reference, beta)

    def metrics(self, objective: Tensor, base: Tensor, advantage: Tensor) -> dict[str, float]:
        """Return the logged means; the arguments have shape (rows,), too."""
        return {
            "reward": self.reward.mean().item(),
            "reward_std": self.reward.std().item(),
            "kl": (self.log_prob - self.reference).mean().item(),
            "objective": objective.mean().item(),
            "baseline": base.mean().item(),
            "advantage_std": advantage.std().item(),
            "entropy": (self.entropy.sum() / self.length.sum()).item(),
            "completions/mean_length": self.length.mean().item(),
            "completions/clipped_ratio": 1 - self.finished.mean().item(),
            "completions/distinct_2": distinct_n(self.texts),
        }


def measure_step(
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    rewards: Tensor,
    own: range,
    config: ReinforceConfig,
    read: BatchSize,
) -> Measured:
    """Compute the log-probabilities of this process's rows, and gather all rows."""
    pad = tokenizer.pad_token_id
    log_probs, entropy = batched_logprobs(policy, rollout, config.temperature, pad, read)
    with policy.disable_adapter():
        reference, _ = batched_logprobs(policy, rollout, config.temperature, pad, read)
    finished = torch.tensor(rollout.finished, dtype=torch.float32)
    columns = [rewards, log_probs, reference, entropy, rollout.lengths(), finished]
    gathered = gather_rows(own, torch.stack(columns, dim=1)).unbind(1)
    return Measured(*gathered, texts=gather_object(rollout.texts))
