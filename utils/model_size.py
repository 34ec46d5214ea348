"""Bytes of a model's weights, adapters, activations and caches, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from utils.architecture import INSIDE, linear_layers
from utils.attention import groups_keys
from utils.config import ModelConfig
from utils.models import NF4_BYTES, compute_dtype, device
from utils.rollout import LOGIT_ROWS

GB = 1e9


@dataclass(frozen=True)
class Arithmetic:
    """What of a device decides the bytes of weights and activations.

    Attributes:
        name: the kind of device.
        dtype: of weights that are not quantised, and of activations.
        four_bits: the layers are used in 4 bits, with peft's adapters beside them; otherwise in
            `dtype`, with the adapters merged into a copy.
        grouped: attention keeps one key and value for each group of heads.
    """

    name: str
    dtype: torch.dtype
    four_bits: bool
    grouped: bool


def device_arithmetic(config: ModelConfig) -> Arithmetic:
    """Return how this machine's device computes with a model."""
    where = device()
    expand = where.type == "cpu" if config.expand_4bit is None else config.expand_4bit
    four_bits = config.quantization == "nf4" and not expand
    name = torch.cuda.get_device_name() if where.type == "cuda" else "the CPU"
    return Arithmetic(name, compute_dtype(where), four_bits, groups_keys(where))


class ModelSize:
    """Sizes of a language model, counted on a copy without weights.

    Attributes:
        linear: layer number, inputs and outputs of every linear layer that is quantised.
        other: number of the other parameters: embeddings, norms, an output layer of its own.
        parameters: all of them.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        modules = [(name, model.get_submodule(name)) for name in linear_layers(model)]
        self.linear = [
            (int(INSIDE.search(name).group(1)), module.in_features, module.out_features)
            for name, module in modules
        ]
        self.parameters = sum(p.numel() for p in model.parameters())
        self.other = self.parameters - self.quantised(0)
        self.layers, self.vocabulary = config.num_hidden_layers, config.vocab_size
        self.hidden, self.heads = config.hidden_size, config.num_attention_heads
        self.inner = getattr(config, "intermediate_size", None) or 4 * self.hidden
        self.head = getattr(config, "head_dim", None) or self.hidden // self.heads
        self.groups = getattr(config, "num_key_value_heads", None) or self.heads

    def quantised(self, first_layer: int) -> int:
        """Return the number of weights in the linear layers from `first_layer` up."""
        return sum(rows * columns for layer, rows, columns in self.linear if layer >= first_layer)

    def adapter_gb(self, r: int, first_layer: int) -> float:
        """Return adapters of rank `r` in fp32, with their gradient and AdamW's two moments."""
        sides = sum(rows + columns for layer, rows, columns in self.linear if layer >= first_layer)
        return 4 * 4 * r * sides / GB

    def weights_gb(self, how: Arithmetic, first_layer: int = 0) -> float:
        """Return the frozen weights, with the merged copies from `first_layer` up if there are."""
        wide, linear = how.dtype.itemsize, self.quantised(0)
        if how.four_bits:
            return (linear * NF4_BYTES + self.other * wide) / GB
        return wide * (linear + self.quantised(first_layer) + self.other) / GB

    def activations_gb(
        self, tokens: int, how: Arithmetic, r: int, first_layer: int = 0, autocast: bool = False
    ) -> float:
        """Return what autograd keeps of `tokens` that are read with gradient.

        Of each layer from `first_layer` up: the gate before and after its activation and what it
        multiplies; queries, keys, values, output and normaliser of the attention; the inputs of
        the two norms in fp32; and what the linear layers read. Adapters of peft read it in their
        own fp32, each layer from a copy of its own, unless autocast lets them read the original.
        """
        wide, attention = how.dtype.itemsize, self.heads * self.head
        keys = self.groups * self.head if how.grouped else attention
        layer = wide * (3 * self.inner + 2 * attention + 2 * keys) + 8 * self.hidden
        layer += 4 * self.heads
        if how.four_bits and not autocast and wide < 4:
            layer += 4 * (5 * self.hidden + attention + self.inner + 7 * r)
        else:
            layer += wide * (2 * self.hidden + self.inner + (7 * r if how.four_bits else 0))
        return tokens * ((self.layers - first_layer) * layer + 8 * self.hidden) / GB

    def sampling_gb(self, rows: int, prompt: int, completion: int, how: Arithmetic) -> float:
        """Return a batch's key-value cache, with the widest layer while it reads the prompts."""
        wide = how.dtype.itemsize
        cache = (prompt + completion) * 2 * self.groups * self.head * self.layers * wide
        return rows * (cache + prompt * self.inner * (3 * wide + 4)) / GB

    def logits_gb(self) -> float:
        """Return the logits of one chunk and what is made of them: three tables in fp32."""
        return 3 * LOGIT_ROWS * self.vocabulary * 4 / GB
