"""Memory: halving, what fits, and whether the plan's numbers are those of real models."""

import dataclasses
import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from utils import attention, memory, memory_plan, model_size, models
from utils.config import ModelConfig
from utils.memory import BatchSize, MemoryTooSmall, fitting_size, free_memory_gb
from utils.memory_plan import (
    SIZES,
    T4,
    describe,
    largest_divisor,
    plan_table,
    policy_micro_batch,
    reward_micro_groups,
)
from utils.memory_plan import (
    memory_plan as plan_of,
)
from utils.model_size import Arithmetic, ModelSize, device_arithmetic
from utils.models import load_policy, load_reward_base
from utils.profiles import PROFILES
from utils.rollout import completion_logprobs
from utils.weights import transformers_config

MESSAGES = (
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory",
)

# Running out


@pytest.mark.parametrize("message", MESSAGES)
def test_the_batch_is_halved_until_it_fits_and_stays_so(capsys, message):
    batch, tried = BatchSize("rows read", 12), []

    def work(size):
        tried.append(size)
        if size > 3:
            raise RuntimeError(message)
        return f"read {size}"

    assert batch.run(work) == "read 3"
    assert tried == [12, 6, 3]
    assert capsys.readouterr().out.splitlines() == [
        "[memory] rows read: out of memory, going on with 6",
        "[memory] rows read: out of memory, going on with 3",
    ]
    assert batch.run(work) == "read 3"
    assert tried == [12, 6, 3, 3], "what did not fit once is not tried again"


def test_a_batch_of_one_that_does_not_fit_names_the_remedies():
    def work(size):
        raise torch.OutOfMemoryError(MESSAGES[0])

    batch = BatchSize("rows read", 2)
    with pytest.raises(MemoryTooSmall, match=r"^rows read: .*batch of 1.*max_length.*model\.name"):
        batch.run(work)


@pytest.mark.parametrize("error", [RuntimeError("shape '[3]' is invalid"), ValueError("memory")])
def test_other_errors_pass(error):
    def work(size):
        raise error

    batch = BatchSize("rows read", 4)
    with pytest.raises(type(error)) as caught:
        batch.run(work)
    assert caught.value is error
    assert batch.size == 4


def test_a_failed_attempt_is_gone_before_the_next():
    class Held:
        pass

    alive = []

    def work(size):
        assert not any(held() for held in alive), "its tensors would fill the memory again"
        held, self = Held(), Held()
        held.other, self.other = self, held  # a cycle, as trainers have
        alive.append(weakref.ref(held))
        if size > 1:
            raise RuntimeError(MESSAGES[0])
        return size

    gc.disable()
    try:
        assert BatchSize("rows read", 4).run(work) == 1
    finally:
        gc.enable()
    assert len(alive) == 3


# What fits


@pytest.mark.parametrize(
    ("row", "fixed", "free", "largest", "size"),
    [
        (1.0, 0.0, 10.0, 64, 8),  # 8 of the 8 GB that may be used
        (1.0, 0.1, 10.0, 64, 4),
        (1.0, 0.0, 10.0, 6, 4),  # a power of two
        (0.001, 0.0, 10.0, 64, 64),
        (1.0, 50.0, 10.0, 64, 1),  # the floor, whatever is free
    ],
)
def test_fitting_size(row, fixed, free, largest, size):
    assert fitting_size(row, fixed, free, largest) == size


@given(
    row=st.floats(1e-6, 10),
    fixed=st.floats(0, 20),
    free=st.floats(0, 100),
    largest=st.integers(1, 300),
)
def test_fitting_size_is_the_largest_that_fits(row, fixed, free, largest):
    size = fitting_size(row, fixed, free, largest)
    assert size.bit_count() == 1
    assert size <= largest
    assert size == 1 or fixed + size * row <= 0.8 * free
    assert 2 * size > largest or fixed + 2 * size * row > 0.8 * free


def test_free_memory(monkeypatch):
    assert 0.1 < free_memory_gb() < 1e4
    monkeypatch.setattr(memory, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (14_900_000_000, 15_600_000_000))
    assert free_memory_gb() == pytest.approx(14.9), "what is free, not the whole"


# The plan against real models

SHAPES = {
    "grouped": (64, 192, 3, 4, 2, 8),  # hidden, intermediate, layers, heads, groups, rank
    "ungrouped": (128, 256, 2, 4, 4, 16),
}
ROWS, TIME = 4, 96


@pytest.fixture(scope="module")
def shapes(tokenizer, tmp_path_factory):
    folders = {}
    for name, (hidden, inner, layers, heads, groups, _) in SHAPES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def saved_gb(model, forward):
    """What autograd keeps in a forward pass, the weights and their merged copies apart."""
    forward()  # makes the merged copies
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    merged = [getattr(module, "_merged", None) for module in model.modules()]
    own |= {t.untyped_storage().data_ptr() for t in merged if t is not None}
    kept = {}  # the tensors are held, so that no address is used twice

    def keep(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()
    found = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    del out
    return found / 1e9


def token_ids():
    return torch.randint(0, 1000, (ROWS, TIME), generator=torch.Generator().manual_seed(0))


def policy_pass(model):
    ids = token_ids().tolist()
    prompts, completions = [row[: TIME // 2] for row in ids], [row[TIME // 2 :] for row in ids]
    return lambda: completion_logprobs(model, prompts, completions, 1.0, 0)


def reward_pass(model, autocast):
    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(input_ids=token_ids(), use_cache=False).logits

    return forward


CASES = [
    ("tiny-random", False, 4),
    ("grouped", False, 8),
    ("ungrouped", False, 16),
    ("grouped", True, 8),
    ("ungrouped", True, 16),
]
each_case = pytest.mark.parametrize(("name", "four_bits", "rank"), CASES)


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def dtype(request, monkeypatch):
    for module in (models, model_size):
        monkeypatch.setattr(module, "compute_dtype", lambda where: request.param)
    return request.param


def model_config(shapes, name, four_bits):
    return ModelConfig(name=str(shapes.get(name, name)), expand_4bit=not four_bits)


@each_case
def test_activations_of_the_policy(shapes, dtype, name, four_bits, rank):
    config = model_config(shapes, name, four_bits)
    policy = load_policy(config, rank, 2 * rank, seed=0)
    size, how = ModelSize(transformers_config(config)), device_arithmetic(config)
    assert (how.dtype, how.four_bits) == (dtype, four_bits)
    found = saved_gb(policy, policy_pass(policy))
    assert size.activations_gb(ROWS * TIME, how, rank) == pytest.approx(found, rel=0.1)


@each_case
@pytest.mark.parametrize("first_layer", [0, 1])
def test_activations_of_the_reward_model(shapes, monkeypatch, name, four_bits, rank, first_layer):
    # peft asks for CUDA's autocast whatever the device, and would make fp32 copies here.
    real = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *of: real(*of) if of else four_bits)
    for module in (models, model_size):
        monkeypatch.setattr(module, "compute_dtype", lambda where: torch.bfloat16)
    config = model_config(shapes, name, four_bits)
    model = load_reward_base(config, 10, rank, 2 * rank, first_layer, seed=0)
    size, how = ModelSize(transformers_config(config)), device_arithmetic(config)
    found = saved_gb(model, reward_pass(model, four_bits))
    planned = size.activations_gb(ROWS * TIME, how, rank, first_layer, autocast=True)
    assert planned == pytest.approx(found, rel=0.15)


def test_activations_without_flash_attention(shapes, monkeypatch):
    """What a T4 keeps: repeated keys, no scores; the stock attention would keep those."""
    monkeypatch.setattr(models, "compute_dtype", lambda where: torch.bfloat16)
    config, tokens = model_config(shapes, "grouped", True), ROWS * TIME
    size = ModelSize(transformers_config(config))
    how = Arithmetic("a T4", torch.bfloat16, four_bits=True, grouped=False)
    stock = load_policy(config, 8, 16, seed=0)
    with sdpa_kernel(SDPBackend.MATH):  # what enable_gqa falls back to
        scores = saved_gb(stock, policy_pass(stock))
    monkeypatch.setattr(models, "attention_name", lambda where: attention.REPEATED)
    repeated = load_policy(config, 8, 16, seed=0)
    found = saved_gb(repeated, policy_pass(repeated))
    assert size.activations_gb(tokens, how, 8) == pytest.approx(found, rel=0.1)
    assert scores > 1.2 * found


@each_case
def test_weights_and_adapters(shapes, dtype, name, four_bits, rank):
    config = model_config(shapes, name, four_bits)
    policy = load_policy(config, rank, 2 * rank, seed=0)
    policy_pass(policy)()  # makes the merged copies
    size, how = ModelSize(transformers_config(config)), device_arithmetic(config)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert size.adapter_gb(rank, 0) == pytest.approx(16 * trained / 1e9)
    frozen = [p for p in policy.parameters() if not p.requires_grad]
    merged = [getattr(module, "_merged", None) for module in policy.modules()]
    held = [*frozen, *(t for t in merged if t is not None)]
    found = sum(t.numel() * t.element_size() for t in held) / 1e9
    # bitsandbytes holds its scales beside the parameters.
    scales = size.quantised(0) * (1 / 64 + 4 / (64 * 256)) / 1e9 if four_bits else 0
    assert size.weights_gb(how) == pytest.approx(found + scales, rel=1e-3)


def test_the_key_value_cache(shapes):
    config = model_config(shapes, "grouped", False)
    policy, found = load_policy(config, 8, 16, seed=0), transformers_config(config)
    cache = DynamicCache(config=found)
    with torch.no_grad():
        policy.get_base_model().model(token_ids(), None, None, cache, use_cache=True)
    held = sum(t.numel() * t.element_size() for x in cache.layers for t in (x.keys, x.values))
    planned = ModelSize(found).sampling_gb(ROWS, 0, TIME, device_arithmetic(config))
    assert planned == pytest.approx(held / 1e9)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("SmolLM2-135M", 134.5), ("SmolLM2-360M", 361.8), ("SmolLM2-1.7B", 1711.4)],
)
def test_parameters_of_the_three_sizes(name, millions):
    table = plan_table(PROFILES["full"])
    assert list(table.index) == list(SIZES)
    row = table.loc[name]
    assert row["parameters, millions"] == pytest.approx(millions, abs=0.06)
    assert row["weights in 16 bits, GB"] == pytest.approx(2 * millions / 1e3, rel=1e-3)
    assert row["weights in 4 bits, GB"] < row["weights in 16 bits, GB"] / 2
    assert row["plan with these, GB"] < 0.8 * 15, "it is meant to fit a T4"
    assert row["plan with batches of 1, GB"] <= row["plan with these, GB"]


# Plan and batches


@pytest.fixture
def full(tiny):
    """The profile that leaves its micro-batches open, with a model that is here."""
    return dataclasses.replace(PROFILES["full"], model=tiny)


@pytest.fixture
def gpu(monkeypatch):
    """Plan for a GPU with a number of GB free."""
    monkeypatch.setattr(memory_plan, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(memory_plan, "device_arithmetic", lambda config: T4)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 500_000_000)
    return lambda gb: monkeypatch.setattr(memory_plan, "free_memory_gb", lambda: gb - 0.5)


def test_the_plan_adds_up(full):
    plan = plan_of(full, micro_batch=8, micro_groups=16, sampled=4, how=T4)
    assert plan.total == max(
        sum(plan.reward.values()),
        sum(plan.alignment.values()) - min(plan.alignment["update"], plan.alignment["sampling"]),
    )
    one = plan_of(full, how=T4)
    for many, single, times in (
        (plan.reward, one.reward, {"update": 16}),
        (plan.alignment, one.alignment, {"update": 8, "sampling": 4}),
    ):
        grown = {name: many[name] / single[name] for name in many}
        assert grown == pytest.approx(dict.fromkeys(many, 1) | times)
    pairs = plan_of(full, micro_groups=16, how=T4, responses=2)
    assert pairs.reward["update"] == pytest.approx(plan.reward["update"] / 2)


def test_the_plan_in_words(full, monkeypatch):
    monkeypatch.setattr(memory_plan, "_available_gb", lambda: 15.0)
    plan = plan_of(full, 8, 16, 32, how=T4)
    lines = describe(plan).splitlines()
    total = f"{plan.total:.1f} GB of tensors at most, 15.0 GB are there"
    assert lines[0] == f"[memory] plan for full on a T4: {total}; in GB,"
    assert lines[1].startswith("[memory] reward model, 16 groups in a pass: weights 0.0")
    stage = "[memory] alignment, 8 sequences in a pass, 32 sampled together: policy 0.0"
    assert lines[2].startswith(stage)


def test_micro_batches_that_are_given_are_taken(tiny):
    quick = dataclasses.replace(PROFILES["quick"], model=tiny)
    assert (policy_micro_batch(quick), reward_micro_groups(quick)) == (8, 4)


def test_micro_batches_follow_from_the_free_memory(full, gpu):
    one = plan_of(full, how=T4)
    row, group = one.alignment["update"], one.reward["update"]
    fixed = sum(one.alignment.values()) - row - one.alignment["sampling"]
    for fitting in (1, 4, 32):
        gpu((fixed + fitting * row) / 0.8 + 1e-6)
        assert policy_micro_batch(full) == fitting
        gpu((sum(one.reward.values()) - group + fitting * group) / 0.8 + 1e-6)
        assert reward_micro_groups(full) == fitting
        assert reward_micro_groups(full, responses=2) == min(2 * fitting, 32)
    gpu(1000)
    assert policy_micro_batch(full) == full.reinforce.prompts_per_step
    assert reward_micro_groups(full) == full.reward.groups_per_step
    twelve = dataclasses.replace(full.reward, groups_per_step=12)
    assert reward_micro_groups(dataclasses.replace(full, reward=twelve)) == 6, "divides 12"


def test_a_gpu_that_is_too_small_is_refused(full, gpu):
    one = plan_of(full, how=T4)
    needed = sum(one.alignment.values()) - one.alignment["sampling"]
    gpu(needed + 1e-6)
    assert policy_micro_batch(full) == 1, "the floor needs no reserve"
    gpu(0.11)
    with pytest.raises(MemoryTooSmall, match=r"alignment needs 0\.\d GB .* has 0\.1 GB .*smaller"):
        policy_micro_batch(full)
    given = dataclasses.replace(full, reinforce=PROFILES["quick"].reinforce)
    with pytest.raises(MemoryTooSmall):
        policy_micro_batch(given)
    gpu(0.01)
    with pytest.raises(MemoryTooSmall, match="training the reward model needs"):
        reward_micro_groups(full)


def test_a_cpu_is_never_refused(full, monkeypatch):
    monkeypatch.setattr(memory_plan, "_available_gb", lambda: 0.0)
    assert (policy_micro_batch(full), reward_micro_groups(full)) == (1, 1)


@pytest.mark.parametrize(("number", "limit", "divisor"), [(12, 8, 6), (7, 4, 1), (8, 8, 8)])
def test_largest_divisor(number, limit, divisor):
    assert largest_divisor(number, limit) == divisor


# Attention without flash attention


@pytest.mark.parametrize(
    ("kind", "capability", "name"),
    [
        ("cuda", (7, 5), attention.REPEATED),
        ("cuda", (8, 0), None),
        ("cpu", None, None),
    ],
)
def test_attention_of_a_device(monkeypatch, kind, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert attention.attention_name(torch.device(kind)) == name


def test_repeated_keys_change_nothing(exact, shapes, monkeypatch):
    config = model_config(shapes, "grouped", False)
    stock = load_policy(config, 8, 16, seed=0)
    monkeypatch.setattr(models, "attention_name", lambda where: attention.REPEATED)
    repeated = load_policy(config, 8, 16, seed=0)
    assert repeated.config._attn_implementation == attention.REPEATED
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
        whole = repeated(input_ids=token_ids()).logits
        assert not torch.allclose(
            whole[:, -1], repeated(input_ids=token_ids()[:, -1:]).logits[:, 0]
        )
