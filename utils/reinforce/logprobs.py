"""Log-probabilities of tokens under a large vocabulary, without ever holding its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _TokenLogProbs(torch.autograd.Function):
    """log softmax((h W^T + c) / T)[y] and the entropy, a few rows at a time.

    The gradient for a row's hidden state is its upstream gradient times (W_y - sum_v p_v W_v) / T.
    That one vector a row is made in the forward pass, while the row's logits are there, so the
    backward pass needs no logits. W is frozen and gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        temperature: float,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        log_probs, entropies, directions = [], [], []
        for h, y in zip(hidden.split(rows), target.split(rows), strict=True):
            logits = F.linear(h, weight, bias).float().div_(temperature)
            normaliser = logits.logsumexp(-1)
            log_probs.append(logits.gather(-1, y[:, None])[:, 0] - normaliser)
            probabilities = (logits - normaliser[:, None]).exp_()
            entropies.append(normaliser - torch.linalg.vecdot(probabilities, logits))
            if ctx.needs_input_grad[0]:
                one = torch.ones_like(y[:, None], dtype=probabilities.dtype)
                residual = probabilities.neg_().scatter_add_(1, y[:, None], one)
                directions.append((residual.to(weight.dtype) @ weight).div_(temperature))
        if directions:
            ctx.save_for_backward(torch.cat(directions))
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(log_probs), entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (direction,) = ctx.saved_tensors
        return (grad[:, None] * direction).to(direction.dtype), None, None, None, None, None


def token_logprobs(
    hidden: Tensor, head: nn.Linear, target: Tensor, temperature: float, rows: int
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(head(hidden) / temperature).

    Args:
        hidden: last hidden states of the positions that predict the targets, shape (tokens, size).
        head: frozen output layer, size -> vocabulary.
        target: token ids, shape (tokens,).
        temperature: of the sampling policy, > 0.
        rows: tokens whose logits are held at once.

    Returns:
        log pi(target), shape (tokens,), differentiable in `hidden`; and the entropy of the
        distribution, shape (tokens,), without gradient; fp32, nats.
    """
    return _TokenLogProbs.apply(hidden, head.weight, head.bias, target, temperature, rows)
