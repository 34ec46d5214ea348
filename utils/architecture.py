"""Whether a model suits the report, told from its configuration before any weights are read.

The checks build the model without memory for its weights (torch's meta device), so that they can
come before the first training: what does not suit the policy must not show after two reward models.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from utils.config import ModelConfig, Profile
from utils.weights import ModelError, transformers_config

INSIDE = re.compile(r"\.(\d+)\.")  # the layer's number in a module name; a head has none


def check_model(profile: Profile) -> None:
    """Refuse a model that some stage of the report could not work with.

    Raises:
        ModelError: naming what does not suit, and what to change.
    """
    check_architecture(profile.model, profile.reward.first_layer)
    check_lengths(profile)


def check_architecture(config: ModelConfig, first_layer: int = 0) -> None:
    """Refuse a model whose parts are not where sampling, training and scoring look for them.

    Args:
        config: which model.
        first_layer: the lowest layer that gets an adapter; the model must have it.

    Raises:
        ModelError: naming the part, e.g. the class of the layers that are not linear.
    """
    found = transformers_config(config)
    try:
        _check_kind(found)
        policy = _skeleton(AutoModelForCausalLM, found)
        _check_layers(policy)
        _check_policy(policy)
        _check_head(_skeleton(AutoModelForSequenceClassification, found))
        _check_cache(found)
    except ModelError as error:
        raise ModelError(
            f"model.name = {config.name!r} ({found.model_type}): {error}; use a decoder-only chat "
            "model such as those of the Llama, Qwen2 and SmolLM families"
        ) from error
    if first_layer >= found.num_hidden_layers:
        raise ModelError(
            f"reward.first_layer = {first_layer}, but {config.name} has {found.num_hidden_layers} "
            "layers, counted from 0; choose a lower one (0 puts adapters on all)"
        )


def check_lengths(profile: Profile) -> None:
    """Refuse texts longer than the positions that the model knows.

    Raises:
        ModelError: naming the fields and the limit.
    """
    data, found = profile.data, transformers_config(profile.model)
    decoded = data.max_prompt_length + profile.reinforce.max_completion_length
    lengths = {
        "data.max_length": data.max_length,
        "data.max_prompt_length + reinforce.max_completion_length": decoded,
    }
    positions = getattr(found, "max_position_embeddings", None)
    for fields, length in lengths.items():
        if positions is not None and length > positions:
            raise ModelError(
                f"{fields} = {length} tokens, but {profile.model.name} has positions for "
                f"{positions} (max_position_embeddings); lower {fields}"
            )
    # The mask of a decoding step covers the whole text; a cache that forgets would not fit it.
    layers = DynamicCache(config=found).layers
    window = min((x.sliding_window for x in layers if x.is_sliding), default=decoded)
    if decoded > window:
        raise ModelError(
            f"data.max_prompt_length + reinforce.max_completion_length = {decoded} tokens, but "
            f"layers of {profile.model.name} see only the last {window} (sliding window); lower "
            "one of the two"
        )


def linear_layers(model: nn.Module, first_layer: int = 0) -> list[str]:
    """Return the names of the linear modules in the numbered layers from `first_layer` up."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (number := INSIDE.search(name))
        and int(number.group(1)) >= first_layer
    ]


def _check_kind(found: PreTrainedConfig) -> None:
    if found.is_encoder_decoder:
        raise ModelError("is an encoder-decoder model")
    if found.get_text_config() is not found:
        raise ModelError("reads more than text")
    if quantized := getattr(found, "quantization_config", None):
        method = dict(quantized).get("quant_method", "unknown method")
        raise ModelError(f"its weights are quantised already ({method})")


def _skeleton(auto_class: Any, found: PreTrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return auto_class.from_config(found, trust_remote_code=False)
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"transformers builds no {auto_class.__name__} of it ({reason})"
        ) from error


def _check_layers(policy: PreTrainedModel) -> None:
    odd = {
        type(module).__name__
        for name, module in policy.named_modules()
        if INSIDE.search(f"{name}.")
        and not isinstance(module, nn.Linear)
        and any(weight.dim() > 1 for weight in module.parameters(recurse=False))
    }
    if odd:
        raise ModelError(
            f"its layers hold weights in {', '.join(sorted(odd))}, not in plain linear layers, "
            "which are what is quantised and adapted"
        )
    if not linear_layers(policy):
        raise ModelError("it has no numbered layers with linear ones inside")


def _check_policy(policy: PreTrainedModel) -> None:
    """The body must decode as `rollout` asks it to, and the logits be the output layer's alone."""
    body, head = getattr(policy, policy.base_model_prefix, None), policy.get_output_embeddings()
    if body is None or not isinstance(head, nn.Linear):
        raise ModelError(f"it has no body {policy.base_model_prefix!r} with a linear output layer")
    try:
        cached = _decode_three(body)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"its body does not decode with a cache ({reason})") from error
    if cached != 3:
        raise ModelError(f"its body kept {cached} of 3 decoded tokens in the cache")
    few = 8  # outputs of a small identity in the place of the output layer
    head.weight, head.bias = nn.Parameter(torch.eye(few, head.in_features)), None
    hidden = torch.linspace(1, 100, 2 * head.in_features).reshape(1, 2, -1)
    answer = BaseModelOutputWithPast(last_hidden_state=hidden)
    hook = body.register_forward_hook(lambda *_: answer)
    try:
        with torch.no_grad():
            logits = policy(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta")).logits
    except Exception as error:
        raise ModelError("its logits do not come from its body and output layer alone") from error
    finally:
        hook.remove()
    if not torch.allclose(logits.float(), hidden[..., :few]):
        raise ModelError("it scales or caps the logits after its output layer")


@torch.no_grad()
def _decode_three(body: nn.Module) -> int:
    """Read two tokens, then one more, as sampling does; return how many the cache holds."""
    cache = DynamicCache(config=body.config)
    for new, seen in ((2, 2), (1, 3)):
        ids = torch.zeros(1, new, dtype=torch.long, device="meta")
        bias = torch.zeros(1, 1, new, seen, dtype=body.dtype, device="meta")
        body(ids, bias, ids, cache, use_cache=True)
    return cache.get_seq_length()


def _check_head(reward: PreTrainedModel) -> None:
    head = getattr(reward, "score", None)
    if not isinstance(head, nn.Linear) or head.in_features != reward.config.hidden_size:
        raise ModelError(
            f"the head of {type(reward).__name__} is no linear layer 'score' on the hidden states"
        )


def _check_cache(found: PreTrainedConfig) -> None:
    kinds = {type(layer) for layer in DynamicCache(config=found).layers}
    odd = sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer})
    if odd:
        raise ModelError(f"its layers keep more than keys and values ({', '.join(odd)})")
