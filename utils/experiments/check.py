"""Whether a model suits the report: what its configuration tells, and one early try of it."""

from __future__ import annotations

from functools import cache

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedTokenizerBase

from utils.config import ModelConfig, Profile
from utils.models.body import device, load_policy, load_reward_base
from utils.models.memory import MemoryTooSmall
from utils.models.weights import (
    ModelError,
    encode_prompt,
    load_tokenizer,
    pad_right,
    transformers_config,
)
from utils.reinforce.sampling import completion_logprobs, sample, sampling_noise

ADVICE = "use a decoder-only chat model such as those of the Llama, Qwen2 and SmolLM families"


def check_config(profile: Profile) -> None:
    """Refuse a model whose configuration says that some stage could not work with it.

    Raises:
        ModelError: naming what does not suit, and what to change.
    """
    name, found = profile.model.name, transformers_config(profile.model)
    if found.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder model; {ADVICE}")
    if found.get_text_config() is not found:
        raise ModelError(f"{name} reads more than text; {ADVICE}")
    if quantized := getattr(found, "quantization_config", None):
        method = dict(quantized).get("quant_method", "unknown method")
        raise ModelError(f"the weights of {name} are quantised already ({method}); {ADVICE}")
    if (first := profile.reward.first_layer) >= found.num_hidden_layers:
        raise ModelError(
            f"reward.first_layer = {first}, but {name} has {found.num_hidden_layers} layers, "
            "counted from 0; choose a lower one (0 puts adapters on all)"
        )
    _check_lengths(profile, found)


@cache
def try_model(config: ModelConfig, first_layer: int) -> None:
    """Let a model sample, learn and score a short dialogue; once per process, some seconds.

    What does not suit the policy must not show after two reward models are trained.

    Args:
        config: which model.
        first_layer: the lowest layer of the reward model that gets an adapter.

    Raises:
        ModelError: with the library's own error.
        MemoryTooSmall: if there is not even the memory for this.
    """
    tokenizer = load_tokenizer(config)
    try:
        ids = _try_policy(config, tokenizer)
        _try_reward_model(config, first_layer, pad_right([ids], tokenizer.pad_token_id))
    except (ModelError, MemoryTooSmall, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelError(
            f"model.name = {config.name!r} failed in a first try of sampling, training and "
            f"scoring: {reason}; {ADVICE}"
        ) from error


def _check_lengths(profile: Profile, found: PreTrainedConfig) -> None:
    """Refuse texts longer than the positions that the model knows."""
    data, name = profile.data, profile.model.name
    decoded = data.max_prompt_length + profile.reinforce.max_completion_length
    lengths = {
        "data.max_length": data.max_length,
        "data.max_prompt_length + reinforce.max_completion_length": decoded,
    }
    positions = getattr(found, "max_position_embeddings", None)
    for fields, length in lengths.items():
        if positions is not None and length > positions:
            raise ModelError(
                f"{fields} = {length} tokens, but {name} has positions for {positions} "
                f"(max_position_embeddings); lower {fields}"
            )
    # The mask of a decoding step covers the whole text; a cache that forgets would not fit it.
    layers = DynamicCache(config=found).layers
    window = min((x.sliding_window for x in layers if x.is_sliding), default=decoded)
    if decoded > window:
        raise ModelError(
            f"data.max_prompt_length + reinforce.max_completion_length = {decoded} tokens, but "
            f"layers of {name} see only the last {window} (sliding window); lower one of the two"
        )


def _try_policy(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Sample two tokens and hold all log-probabilities against the model's own forward pass."""
    policy = load_policy(config, lora_r=1, lora_alpha=1, seed=0)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "Hi"}])
    drawn = sample(policy, tokenizer, [prompt], sampling_noise(0, 1, 2), temperature=0)
    ids = [*prompt, *drawn.completion_ids[0]]
    # Of the prompt's tokens, too: what scales or caps logits shows where a token is unlikely.
    found, _ = completion_logprobs(policy, [ids[:1]], [ids[1:]], 1.0, tokenizer.pad_token_id)
    found.sum().backward()
    text = torch.tensor([ids], device=device())
    with torch.no_grad():
        rows = policy(input_ids=text).logits[0, :-1].float().log_softmax(-1)
    tokens = rows.gather(-1, text[0, 1:, None])[:, 0]
    if not abs(found.item() - tokens.sum().item()) <= 0.02 * abs(tokens.sum().item()):
        raise ValueError(
            "its log-probabilities are not those of its body and output layer alone: "
            f"{found.item():.2f} nats, and {tokens.sum().item():.2f} by its own forward pass"
        )
    if (rows.amax(-1) - tokens)[len(prompt) - 1 :].max() > 1:
        raise ValueError("with a cache it takes other tokens than without")
    return ids


def _try_reward_model(config: ModelConfig, first_layer: int, ids: torch.Tensor) -> None:
    """Score a text of shape (1, time) and ask where the gradient arrives."""
    model = load_reward_base(config, 1, 1, 1, first_layer, seed=0)
    score = model(input_ids=ids.to(device()), use_cache=False).logits
    score.sum().backward()
    reached = [name for name, p in model.named_parameters() if p.grad is not None]
    if not any("score" in name for name in reached):
        raise ValueError("its score does not come from the head 'score'")
