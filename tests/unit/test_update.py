"""The gradient step where memory is short, and in fp16 with its loss scale."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from utils.config import ReinforceConfig
from utils.models import body as models
from utils.models.memory import BatchSize, MemoryTooSmall
from utils.reinforce import sampling as rollout
from utils.reinforce import update
from utils.reinforce.sampling import Rollout, batched_logprobs, sample, sampling_noise
from utils.reinforce.update import OVERFLOWS, PolicyUpdate

CONFIG = ReinforceConfig(temperature=1.0, lora_r=4, micro_batch=4, max_grad_norm=1e9)
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])


@pytest.fixture(scope="module", autouse=True)
def _pinned():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "compute_dtype", lambda where: torch.float32)
        for module in (models, rollout, update):
            patch.setattr(module, "device", lambda: torch.device("cpu"))
        yield


def fresh(tiny):
    policy = models.load_policy(tiny, 4, 8, seed=0)
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return policy


@pytest.fixture
def policy(tiny):
    return fresh(tiny)


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 500, (n,), generator=generator).tolist() for n in (9, 4, 6, 8, 5)]
    return Rollout(prompt_ids=rows, completion_ids=rows[::-1], finished=[True] * 5, texts=[""] * 5)


@pytest.fixture
def drop(monkeypatch):
    """Let a function of `utils` run out of memory whenever it gets more than so many rows."""

    def install(module, name, limit, rows_of):
        right = getattr(module, name)
        failures = []

        def scarce(*args):
            if len(rows_of(args)) > limit:
                failures.append(len(rows_of(args)))
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return right(*args)

        monkeypatch.setattr(module, name, scarce)
        return failures

    return install


def trained(policy):
    return [p for p in policy.parameters() if p.requires_grad]


def moved(policy, drawn, config=CONFIG, scaler=None):
    """Return how far one step of gradient descent with rate 1 moves the adapters."""
    before = [p.detach().clone() for p in trained(policy)]
    step = PolicyUpdate(policy, torch.optim.SGD(trained(policy)), config, pad_token_id=0)
    step.scaler = scaler or step.scaler
    found = step.step(drawn, ADVANTAGES, len(drawn), learning_rate=1.0)
    change = torch.cat([(b - p).flatten() for b, p in zip(before, trained(policy), strict=True)])
    return change.detach(), found, step


def test_a_smaller_pass_makes_the_same_step(policy, drawn, drop, capsys):
    expected, logged, _ = moved(copy.deepcopy(policy), drawn)
    failures = drop(update, "completion_logprobs", 1, lambda args: args[1])
    change, found, step = moved(policy, drawn)
    torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-4)
    assert found["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    assert failures == [4, 2], "halved until it fitted; the gradients of a failed try are dropped"
    assert step.micro_batch.size == 1, "later steps start from what fitted"
    assert capsys.readouterr().out.count("[memory]") == 2


def test_a_step_that_fits_in_no_way_says_what_to_do(policy, drawn, drop):
    drop(update, "completion_logprobs", 0, lambda args: args[1])
    with pytest.raises(MemoryTooSmall, match="max_completion_length"):
        moved(policy, drawn)


def test_any_other_error_is_not_taken_for_a_lack_of_memory(policy, drawn, monkeypatch):
    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(update, "completion_logprobs", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        moved(policy, drawn)


def test_sampling_in_smaller_batches_draws_the_same(policy, tokenizer, drop):
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14], [15, 16]]
    noise = sampling_noise(0, 5, 6)
    expected = sample(policy, tokenizer, prompts, noise, 1.0, batch_size=5)
    failures = drop(rollout, "_decode", 2, lambda args: args[2])
    kept = BatchSize("sequences", 5)
    assert sample(policy, tokenizer, prompts, noise, 1.0, kept) == expected
    assert failures == [5]
    assert sample(policy, tokenizer, prompts, noise, 1.0, kept) == expected
    assert failures == [5], "it tried the size that had failed once more"


def test_reading_in_smaller_batches_reads_the_same(policy, drawn, drop):
    expected = batched_logprobs(policy, drawn, 1.0, 0, batch_size=4)
    failures = drop(rollout, "completion_logprobs", 1, lambda args: args[1])
    found = batched_logprobs(policy, drawn, 1.0, 0, batch_size=4)
    torch.testing.assert_close(found, expected)
    assert failures == [4, 2]


# fp16


def half(monkeypatch):
    for module in (models, update):
        monkeypatch.setattr(module, "compute_dtype", lambda where: torch.float16)


def test_the_scaler_is_on_in_fp16_alone(policy, drawn, monkeypatch):
    assert not moved(policy, drawn)[2].scaler.is_enabled()
    half(monkeypatch)
    assert moved(policy, drawn)[2].scaler.is_enabled()


def test_fp16_moves_fp32_adapters_as_fp32_does(policy, drawn, tiny, monkeypatch):
    expected, logged, _ = moved(policy, drawn)
    half(monkeypatch)
    half_policy = fresh(tiny)
    assert half_policy.get_base_model().dtype == torch.float16
    assert {p.dtype for p in trained(half_policy)} == {torch.float32}
    change, found, _ = moved(half_policy, drawn)
    cosine = torch.cosine_similarity(change, expected, dim=0).item()
    assert cosine > 0.999, "the direction of the step"
    assert change.norm().item() == pytest.approx(expected.norm().item(), rel=0.02), "unscaled"
    assert found["grad_norm"] == pytest.approx(logged["grad_norm"], rel=0.02)
    assert found["loss"] == pytest.approx(logged["loss"], rel=0.02)


def test_an_overflow_costs_a_retry_and_no_step(policy, drawn):
    expected, _, _ = moved(copy.deepcopy(policy), drawn)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # the gradients overflow in fp32
    change, found, _ = moved(policy, drawn, scaler=scaler)
    assert math.isfinite(found["grad_norm"])
    assert 1 < scaler.get_scale() < 2.0**127, "halved until nothing overflowed"
    torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-3)


def test_a_gradient_that_is_never_finite_leaves_the_weights(policy, drawn, monkeypatch):
    right, calls = update.reinforce_loss, []

    def spoiled(*args):
        calls.append(1)
        return right(*args) * float("nan")

    monkeypatch.setattr(update, "reinforce_loss", spoiled)
    config = dataclasses.replace(CONFIG, micro_batch=8)
    change, found, _ = moved(policy, drawn, config)
    assert not math.isfinite(found["grad_norm"])
    assert change.abs().max() == 0
    assert len(calls) == 1, "without a loss scale there is nothing to try again"
    change, _, _ = moved(policy, drawn, config, torch.amp.GradScaler("cpu"))
    assert change.abs().max() == 0
    assert len(calls) == 1 + OVERFLOWS
