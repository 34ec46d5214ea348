"""Attention without flash attention: keys and values repeated, and nothing else changed."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from utils.config import ModelConfig
from utils.models import body as models
from utils.models.attention import REPEATED, attention_name
from utils.models.body import load_policy

ROWS, TIME = 4, 96


@pytest.mark.parametrize(
    ("kind", "capability", "name"),
    [("cuda", (7, 5), REPEATED), ("cuda", (8, 0), None), ("cpu", None, None)],
)
def test_attention_of_a_device(monkeypatch, kind, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert attention_name(torch.device(kind)) == name


def token_ids():
    return torch.randint(0, 1000, (ROWS, TIME), generator=torch.Generator().manual_seed(0))


def test_repeated_keys_change_nothing(exact, monkeypatch, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), expand_4bit=True)
    stock = load_policy(config, 8, 16, seed=0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    name = attention_name(torch.device("cuda"))  # of a T4
    monkeypatch.setattr(models, "attention_name", lambda where: name)
    repeated = load_policy(config, 8, 16, seed=0)
    assert repeated.config._attn_implementation == REPEATED
    mask = torch.ones(ROWS, TIME).long()
    mask[1, :7] = 0
    inputs = (
        {"input_ids": token_ids()},
        {"input_ids": token_ids(), "attention_mask": mask},
        {"input_ids": token_ids()[:, :1]},
    )
    with torch.no_grad():
        for given in inputs:
            found, expected = (model(**given).logits for model in (repeated, stock))
            real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
            torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-4)
