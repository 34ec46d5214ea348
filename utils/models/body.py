"""Load, quantise and wrap the language model; device and dtype are decided here."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    set_seed,
)
from trl.trainer.reward_trainer import suppress_seqcls_warning

from utils.config import ModelConfig
from utils.models.attention import attention_name
from utils.models.lora import merged_lora
from utils.models.weights import ModelError, load_tokenizer, weights_path

INSIDE = re.compile(r"\.(\d+)\.")  # the layer's number in a module name; a head has none
# A 4-bit weight: half a byte, one byte of scale per 64 weights, and an fp32 scale of the scales
# per 256 blocks (QLoRA, Dettmers et al. 2023, sec. 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


def device() -> torch.device:
    """Return the CUDA device if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(where: torch.device) -> torch.dtype:
    """Return bf16 where the device really has it, else fp16 on CUDA, else fp32.

    torch reports bf16 on a T4, too, but emulates it; compute capability 8 is where it is real.
    """
    if where.type == "cuda":
        capability = torch.cuda.get_device_capability(where)
        return torch.bfloat16 if capability >= (8, 0) else torch.float16
    # Public only since torch.cpu.get_capabilities, which Colab's torch may not have yet.
    real = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if real else torch.float32


class FloatHead(nn.Linear):
    """A reward head in fp32 whatever the body's dtype: bf16 would round rewards to 1/128."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., hidden_size) to fp32 logits (..., out_features)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float())


def load_policy(config: ModelConfig, lora_r: int, lora_alpha: int, seed: int) -> PeftModel:
    """Load the 4-bit language model with a fresh LoRA adapter on every linear layer.

    The adapter starts as the identity, so the new policy is the SFT model; the reference policy is
    this same model inside `disable_adapter()`.
    """
    set_seed(seed)
    base = _load(AutoModelForCausalLM, config)
    return _adapt(base, lora_r, lora_alpha, "CAUSAL_LM")


def load_reward_base(
    config: ModelConfig, num_labels: int, lora_r: int, lora_alpha: int, first_layer: int, seed: int
) -> PreTrainedModel | PeftModel:
    """Load the body with a fresh fp32 head of `num_labels` outputs and LoRA adapters.

    Args:
        config: which weights.
        num_labels: 1 for the scalar reward, 10 for the rating distribution.
        lora_r: rank of the adapters; 0: none, the linear layers themselves are trained, in fp32.
        lora_alpha: the adapters' scale is lora_alpha / lora_r.
        first_layer: layers below this one stay as they are, no gradient is computed for them.
        seed: of the head's and the adapters' first values.

    Raises:
        ModelError: if weights in 4 bits were to be trained.
    """
    if not lora_r and config.quantization != "none":
        raise ModelError(
            "weights in 4 bits cannot be trained: with reward.lora_r = 0, set "
            'model.quantization = "none"'
        )
    set_seed(seed)
    dtype = None if lora_r else torch.float32
    base = _load(AutoModelForSequenceClassification, config, dtype, num_labels=num_labels)
    head = FloatHead(base.config.hidden_size, num_labels, bias=False)
    nn.init.normal_(head.weight, std=base.config.hidden_size**-0.5 / 10)
    base.score = head.to(base.device)
    base.config.pad_token_id = load_tokenizer(config).pad_token_id
    if lora_r:
        return _adapt(base, lora_r, lora_alpha, "SEQ_CLS", first_layer, modules_to_save=["score"])
    for name in [*linear_layers(base, first_layer), "score"]:
        base.get_submodule(name).requires_grad_(True)
    return base


def linear_layers(model: nn.Module, first_layer: int = 0) -> list[str]:
    """Return the names of the linear modules in the numbered layers from `first_layer` up."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (number := INSIDE.search(name))
        and int(number.group(1)) >= first_layer
    ]


def memory_table(model: PeftModel, config: ModelConfig) -> dict[str, float]:
    """Return megabytes (10^6) of the weights in 16 and in 4 bits, and parameter counts in millions.

    The 4-bit figures are computed from shapes, see `NF4_BYTES`.
    """
    linear = sum(m.get_base_layer().weight.numel() for m in _lora_layers(model))
    if config.quantization == "nf4" and not is_expanded(model):
        linear *= 2  # bitsandbytes packs two weights into one byte
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    other = sum(
        p.numel() for n, p in model.named_parameters() if "lora_" not in n and "base_layer" not in n
    )
    return {
        "quantised parameters, millions": linear / 1e6,
        "other parameters, millions": other / 1e6,
        "trainable parameters, millions": trainable / 1e6,
        "weights in 16 bits, MB": 2 * (linear + other) / 1e6,
        "weights in 4 bits, MB": (linear * NF4_BYTES + 2 * other) / 1e6,
    }


def is_expanded(model: nn.Module) -> bool:
    """Tell whether the linear layers hold 16-bit weights (expanded NF4, or never quantised)."""
    return not any(type(module).__name__ == "Linear4bit" for module in model.modules())


def expand_4bit(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace each 4-bit layer by a plain one that holds the same numbers in `dtype`.

    Must come before any forward pass: bitsandbytes repacks the weights in its first CPU forward,
    and what they would expand to afterwards is garbage.

    Raises:
        ModelError: if a forward pass has repacked the weights.
    """
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, bnb.nn.Linear4bit):
                continue
            if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
                raise ModelError("expand_4bit must come before the first forward pass; load anew")
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            plain.bias = layer.bias
            setattr(parent, name, plain)
    model.is_loaded_in_4bit = False
    model.is_quantized = False
    return model


def _load(
    auto_class: Any, config: ModelConfig, dtype: torch.dtype | None = None, **kwargs: Any
) -> PreTrainedModel:
    where = device()
    dtype = dtype or compute_dtype(where)
    if config.quantization == "nf4":
        _check_kernels(where)
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    with suppress_seqcls_warning():
        model = auto_class.from_pretrained(
            weights_path(config),
            dtype=dtype,
            device_map={"": where},
            attn_implementation=attention_name(where),
            **kwargs,
        )
    expand = where.type == "cpu" if config.expand_4bit is None else config.expand_4bit
    if config.quantization == "nf4" and expand:
        model = expand_4bit(model, dtype)
    # Gradients flow through the frozen body; nothing below the adapters is trained.
    return model.requires_grad_(False).eval()


def _check_kernels(where: torch.device) -> None:
    """Refuse a bitsandbytes that would fail at its first use, after all weights are loaded."""
    import bitsandbytes as bnb

    if where.type != "cuda":
        return
    try:
        bnb.functional.quantize_4bit(torch.zeros(64, device=where), quant_type="nf4")
    except Exception as error:
        raise ModelError(
            f"bitsandbytes cannot quantise on CUDA {torch.version.cuda} ({error}): "
            "`pip install --upgrade --force-reinstall --no-deps bitsandbytes` and restart, or set "
            'model.quantization = "none" to train in 16 bits'
        ) from error


def _adapt(
    base: PreTrainedModel,
    lora_r: int,
    lora_alpha: int,
    task: str,
    first_layer: int = 0,
    modules_to_save: list[str] | None = None,
) -> PeftModel:
    config = LoraConfig(
        r=lora_r,
        lora_alpha=lora_alpha,
        target_modules=linear_layers(base, first_layer),
        modules_to_save=modules_to_save,
        task_type=task,
    )
    if is_expanded(base):
        config = merged_lora(config)
    return get_peft_model(base, config)


def _lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]
