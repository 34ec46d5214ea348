"""Fixtures that several unit tests share: the tiny model, its tokenizer, and fp32 arithmetic."""

import pytest
import torch

from utils.config import ModelConfig
from utils.experiments.environment import quiet


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    quiet()
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny():
    """Two layers with random weights and the real tokenizer."""
    return ModelConfig(name="tiny-random")


@pytest.fixture(scope="session")
def tokenizer(tiny):
    from utils.models.weights import load_tokenizer

    return load_tokenizer(tiny)


@pytest.fixture
def exact(monkeypatch):
    """Load models on the CPU in fp32, so that equal means equal up to rounding."""
    from utils.models import body as models

    monkeypatch.setattr(models, "compute_dtype", lambda where: torch.float32)
    monkeypatch.setattr(models, "device", lambda: torch.device("cpu"))
