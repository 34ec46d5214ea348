"""Attention on GPUs without flash attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

REPEATED = "sdpa_repeated_keys"


def attention_name(where: torch.device) -> str | None:
    """Return the attention for a device, made known to transformers; None leaves it to them.

    On CUDA only flash attention lets heads share keys and values, from compute capability 8 on.
    Before, torch would silently take the plain computation, which keeps the scores of all pairs of
    positions in fp32.
    """
    if where.type != "cuda" or torch.cuda.get_device_capability(where) >= (8, 0):
        return None
    AttentionInterface.register(REPEATED, _repeated_attention)
    AttentionMaskInterface.register(REPEATED, sdpa_mask)
    return REPEATED


def _repeated_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Repeat keys and values for every head, which memory-efficient attention can then read."""
    heads = query.shape[1] // key.shape[1]
    out = F.scaled_dot_product_attention(
        query,
        repeat_kv(key, heads),
        repeat_kv(value, heads),
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=attention_mask is None and query.shape[2] > 1,
    )
    return out.transpose(1, 2).contiguous(), None
