"""LoRA with merged weights: one matrix product per layer, forward and backward.

peft adds the low-rank update beside the frozen product, which on a CPU costs more than the product
itself. Here the update is folded into a 16-bit copy of the weight once per optimiser step, and the
gradient of the two small factors is computed from the layer's input and output gradient. The model
that samples, the one that is trained and the one that a reader would deploy with merged adapters
are then one and the same.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook


class _MergedLinear(torch.autograd.Function):
    """y = x W' + bias, W' = W + s B A; gradients for x, A and B (Hu et al. 2021, eq. 3)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        merged: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        ctx.save_for_backward(x, merged, a, b)
        ctx.scaling = scaling
        return F.linear(x, merged, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, a, b = ctx.saved_tensors
        grad_x = grad @ merged if ctx.needs_input_grad[0] else None
        x, grad = x.flatten(0, -2), grad.flatten(0, -2)
        grad_b = grad.T @ (x @ a.T.to(x.dtype))
        grad_a = (grad @ b.to(x.dtype)).T @ x
        grad_a, grad_b = ctx.scaling * grad_a.float(), ctx.scaling * grad_b.float()
        return grad_x, None, None, grad_a, grad_b, None


class MergedLoraLinear(PeftLoraLinear):
    """peft's LoRA layer with `_MergedLinear` as its forward. No dropout, one adapter.

    The merged weight is remade after any optimiser step and after any other write to a factor,
    which its address and torch's version counter tell.
    """

    steps = 0  # of any optimiser, since the first of these layers was made
    _merged: Tensor | None = None
    _made_from: tuple[int, ...] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _count_steps()

    def merged_weight(self) -> Tensor:
        """Return W + s B A in the dtype of W, shape (out_features, in_features)."""
        name = self._adapter()
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        state = (a.data_ptr(), a._version, b.data_ptr(), b._version, MergedLoraLinear.steps)
        if self._made_from != state:
            weight = self.get_base_layer().weight
            with torch.no_grad():
                update = self.scaling[name] * (b @ a)
                self._merged = (weight.float() + update).to(weight.dtype)
            self._made_from = state
        return self._merged

    def _adapter(self) -> str:
        """Return the name of the active adapter; a ValueError if there is not exactly one."""
        if len(self.active_adapters) != 1:
            raise ValueError(f"one adapter can be active at a time, not {self.active_adapters}")
        return self.active_adapters[0]

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the adapter is in the merged weight already, and would be counted twice."""
        raise NotImplementedError(
            "these layers merge their adapter by themselves; to deploy merged weights, load the "
            "saved adapter into the plain model with peft and merge it there"
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer to `x`, shape (..., in_features); plain W while adapters are disabled."""
        base = self.get_base_layer()
        if self.disable_adapters:
            return F.linear(x, base.weight, base.bias)
        if not torch.is_grad_enabled():
            return F.linear(x, self.merged_weight(), base.bias)
        name = self._adapter()
        return _MergedLinear.apply(
            x,
            self.merged_weight(),
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )


@functools.cache  # once
def _count_steps() -> None:
    """Count the steps of all optimisers.

    Fused ones write the weights without raising torch's version counters, so those alone would
    leave the merged weights as they were before the first step.
    """

    def count(*_: Any) -> None:
        MergedLoraLinear.steps += 1

    register_optimizer_step_post_hook(count)


def merged_lora(config: LoraConfig) -> LoraConfig:
    """Make peft build `MergedLoraLinear` for every plain linear layer.

    The hook is the one that peft documents for custom modules; it has no public name.
    """
    config._register_custom_module({nn.Linear: MergedLoraLinear})
    return config
