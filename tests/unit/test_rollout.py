"""Sampling and log-probabilities against slow loops, one row and one token at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from utils.config import ModelConfig
from utils.models import body as models
from utils.reinforce import sampling as rollout
from utils.reinforce.sampling import (
    batched_logprobs,
    choose_tokens,
    completion_logprobs,
    sample,
    sampling_noise,
)

TEMPERATURE = 0.7
LIMIT = 7
LENGTHS = (3, 11, 1, 6, 9, 2, 14, 5)
TINY = dict(atol=2e-4, rtol=1e-4)  # fp32 sums over a vocabulary of 49,152


def is_not(value, wrong, mistake):
    assert (value - wrong).abs().min() > 1e-2, mistake


def sharpened(policy, eos, seed=1):
    """Untie the head, make it choosy and quick to end, and move the adapter off the identity."""
    base = policy.get_base_model()
    head = nn.Linear(base.lm_head.in_features, base.lm_head.out_features)
    with torch.no_grad():
        head.weight.copy_(30 * base.lm_head.weight)
        head.bias.zero_()[eos] = 13.0
        torch.manual_seed(seed)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    base.lm_head = head.requires_grad_(False).to(base.lm_head.weight)
    return policy


@pytest.fixture(scope="module")
def policy(tokenizer):
    """A policy in fp32 on the CPU whose completions often end before the limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "compute_dtype", lambda where: torch.float32)
        for module in (models, rollout):
            patch.setattr(module, "device", lambda: torch.device("cpu"))
        tiny = models.load_policy(ModelConfig(name="tiny-random"), 4, 8, seed=0)
        yield sharpened(tiny, tokenizer.eos_token_id)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(100, 40000, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def noise():
    return sampling_noise(5, len(LENGTHS), LIMIT)


@pytest.fixture(scope="module")
def drawn(policy, tokenizer, prompts, noise):
    return sample(policy, tokenizer, prompts, noise, TEMPERATURE)


def all_logits(policy, ids):
    """Return the logits at every position of one row, by one plain forward pass."""
    return policy(input_ids=torch.tensor([ids])).logits[0].double()


@torch.no_grad()
def slow_sample(policy, prompt, uniforms, temperature, eos):
    """Sample one row without a cache, token by token."""
    completion = []
    for uniform in uniforms.double():
        logits = all_logits(policy, [*prompt, *completion])[-1]
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(((logits / temperature).softmax(-1).cumsum(-1) <= uniform).sum())
        completion.append(token)
        if token == eos:
            break
    return completion


def slow_logprobs(policy, prompt, completion, temperature=TEMPERATURE):
    """Return log-softmax of one row, shape (completion, vocabulary), at its own tokens' places."""
    logits = all_logits(policy, [*prompt, *completion]) / temperature
    return logits.log_softmax(-1)[len(prompt) - 1 : -1]


def own(log_policy, tokens):
    return log_policy[range(len(tokens)), list(tokens)].sum()


# Choosing tokens


def frequencies(logits, temperature, count=40_000):
    uniform = sampling_noise(0, 1, count)[0]
    tokens = choose_tokens(logits.expand(count, -1), uniform, temperature)
    return tokens.bincount(minlength=logits.shape[-1]) / count


def test_the_inverse_cdf_draws_from_the_softmax():
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0, -float("inf"), 1.5])
    found, wanted = frequencies(logits, TEMPERATURE), (logits / TEMPERATURE).softmax(-1)
    error = (wanted * (1 - wanted) / 40_000).sqrt()
    assert ((found - wanted).abs() <= 4 * error).all()
    assert found[4] == 0
    for mistake, wrong in {
        "temperature left out": logits,
        "temperature applied twice": logits / TEMPERATURE**2,
        "multiplied by the temperature": logits * TEMPERATURE,
    }.items():
        assert ((found - wrong.softmax(-1)).abs() > 8 * error).any(), mistake


def test_tokens_by_hand():
    logits = torch.tensor([0.2, 0.3, 0.5]).log()
    uniform = torch.tensor([0.0, 0.19, 0.21, 0.49, 0.51, 0.999999])
    tokens = choose_tokens(logits.expand(6, -1), uniform, 1.0)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]


def test_the_ends_of_the_noise_pick_no_impossible_token():
    never = -float("inf")
    logits = torch.tensor([never, never, 1.0, never, 0.0, never]).expand(2, -1)
    found = choose_tokens(logits, torch.tensor([0.0, 1 - 2**-24]), 1.0)
    assert found.tolist() == [2, 4], "no strict inequality against the cumulative sum"


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=9),
    st.floats(0, 1, exclude_max=True, width=32),
    st.floats(0.1, 3),
)
def test_any_noise_picks_a_token_that_can_be(logits, uniform, temperature):
    logits = torch.tensor([[-float("inf"), *logits, -float("inf")]])
    (token,) = choose_tokens(logits, torch.tensor([uniform]), temperature).tolist()
    assert 1 <= token <= logits.shape[1] - 2


def test_temperature_zero_is_greedy():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]])
    assert choose_tokens(logits, torch.tensor([0.99, 0.99]), 0).tolist() == [1, 0]
    assert choose_tokens(logits, torch.tensor([0.99, 0.99]), 1e-3).tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_are_no_trouble(dtype):
    logits = 100 * torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = choose_tokens(logits, torch.full((4,), 0.5), TEMPERATURE)
    assert torch.equal(found, logits.argmax(-1)), "the softmax overflowed"
    head, hidden = nn.Linear(4, 1000, bias=False).to(dtype), torch.eye(4).to(dtype)
    head.weight.data = logits.T.contiguous()
    values = rollout.token_logprobs(hidden, head, found, TEMPERATURE, 2)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in values)


def test_noise_is_a_function_of_the_seed():
    first, same, other = (sampling_noise(seed, 3, 5) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.shape == (3, 5)
    assert 0 <= first.min() <= first.max() < 1
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sampling_noise(7, 3, 5)
    assert torch.equal(torch.get_rng_state(), before), "it must leave the global state alone"


# Sampling


def test_sampling_equals_a_slow_loop(policy, tokenizer, prompts, noise, drawn):
    eos = tokenizer.eos_token_id
    lengths = [len(ids) for ids in drawn.completion_ids]
    assert min(lengths) < LIMIT, "some row must end early, or compaction is not tested"
    assert len(set(lengths)) > 3
    for row, prompt in enumerate(prompts):
        expected = slow_sample(policy, prompt, noise[row], TEMPERATURE, eos)
        assert drawn.completion_ids[row] == expected, f"row {row} of prompt length {len(prompt)}"
    assert drawn.prompt_ids == prompts
    assert drawn.lengths().tolist() == lengths


def test_a_completion_ends_with_the_end_token_exactly_if_it_finished(tokenizer, drawn):
    eos = tokenizer.eos_token_id
    for tokens, finished in zip(drawn.completion_ids, drawn.finished, strict=True):
        assert eos not in tokens[:-1]
        assert finished == (tokens[-1] == eos)
        assert finished or len(tokens) == LIMIT
    assert set(drawn.finished) == {True, False}
    for text, tokens in zip(drawn.texts, drawn.completion_ids, strict=True):
        assert text == tokenizer.decode([t for t in tokens if t != eos]).strip()


def test_a_completion_depends_on_its_prompt_and_noise_alone(
    policy, tokenizer, prompts, noise, drawn
):
    @settings(max_examples=15, deadline=None)
    @given(st.permutations(range(len(LENGTHS))), st.integers(1, 8), st.integers(1, 8))
    def check(order, rows, batch_size):
        chosen = order[:rows]
        found = sample(
            *(policy, tokenizer, [prompts[r] for r in chosen], noise[chosen], TEMPERATURE),
            batch_size=batch_size,
        )
        assert found.completion_ids == [drawn.completion_ids[r] for r in chosen]
        assert found.finished == [drawn.finished[r] for r in chosen]
        assert found.texts == [drawn.texts[r] for r in chosen]

    check()


def test_greedy_equals_generate(policy, tokenizer, prompts, noise):
    found = sample(policy, tokenizer, prompts, noise, 0)
    for prompt, tokens in zip(prompts, found.completion_ids, strict=True):
        ids = torch.tensor([prompt])
        out = policy.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=LIMIT,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert tokens == out[0, len(prompt) :].tolist()
    again = sample(policy, tokenizer, prompts, 0 * noise, 0)
    assert again.completion_ids == found.completion_ids, "greedy needs no noise"


def test_the_adapter_takes_part(policy, tokenizer, prompts, noise, drawn):
    with policy.disable_adapter():
        reference = sample(policy, tokenizer, prompts, noise, TEMPERATURE)
        expected = slow_sample(policy, prompts[0], noise[0], TEMPERATURE, tokenizer.eos_token_id)
    assert reference.completion_ids[0] == expected
    assert reference.completion_ids != drawn.completion_ids


def test_the_sampler_is_the_policy(policy, tokenizer, prompts, noise, drawn, monkeypatch):
    """The probability with which a token was drawn is the one that the gradient is taken of."""
    choose, taken = rollout.choose_tokens, []

    def watched(logits, uniform, temperature):
        tokens = choose(logits, uniform, temperature)
        taken.append((logits / temperature).log_softmax(-1)[0, tokens[0]])
        return tokens

    monkeypatch.setattr(rollout, "choose_tokens", watched)
    found, _ = batched_logprobs(policy, drawn, TEMPERATURE, tokenizer.pad_token_id)
    for row, prompt in enumerate(prompts):
        taken.clear()
        sample(policy, tokenizer, [prompt], noise[[row]], TEMPERATURE)
        torch.testing.assert_close(torch.stack(taken).sum(), found[row], **TINY)


# Log-probabilities


@pytest.fixture(scope="module")
def slow(policy, drawn):
    """Return the log-probability and the entropy of each row from plain log-softmax."""
    with torch.no_grad():
        rows = list(zip(drawn.prompt_ids, drawn.completion_ids, strict=True))
        log_policies = [slow_logprobs(policy, *row) for row in rows]
        log_probs = torch.stack([own(lp, c) for lp, (_, c) in zip(log_policies, rows, strict=True)])
        entropies = torch.stack([-(lp.exp() * lp).sum() for lp in log_policies])
    return log_probs.float(), entropies.float()


def fast(policy, drawn, temperature=TEMPERATURE, pad=0):
    return completion_logprobs(policy, drawn.prompt_ids, drawn.completion_ids, temperature, pad)


@torch.no_grad()
def test_logprobs_equal_a_slow_loop(policy, drawn, slow):
    log_probs, entropies = fast(policy, drawn)
    torch.testing.assert_close(log_probs, slow[0], **TINY)
    torch.testing.assert_close(entropies, slow[1], **TINY)
    assert log_probs.dtype == entropies.dtype == torch.float32


@torch.no_grad()
def test_the_known_mistakes_give_other_logprobs(policy, tokenizer, drawn):
    found, _ = fast(policy, drawn)
    wrong = {name: [] for name in ("prompt", "shift", "pad", "temperature", "mean", "end")}
    for prompt, completion in zip(drawn.prompt_ids, drawn.completion_ids, strict=True):
        whole, pads = [*prompt, *completion], [tokenizer.pad_token_id] * 3
        everything = (all_logits(policy, whole) / TEMPERATURE).log_softmax(-1)
        log_policy = slow_logprobs(policy, prompt, completion)
        right = own(log_policy, completion)
        shifted = own(everything[len(prompt) :], completion)
        wrong["prompt"].append(own(everything[:-1], whole[1:]) if len(prompt) > 1 else math.inf)
        wrong["shift"].append(shifted)
        wrong["pad"].append(
            own(slow_logprobs(policy, prompt, completion + pads), completion + pads)
        )
        wrong["temperature"].append(own(slow_logprobs(policy, prompt, completion, 1), completion))
        wrong["mean"].append(log_policy.mean())
        wrong["end"].append(right - log_policy[-1, completion[-1]])
    named = {
        "prompt": "prompt tokens are included",
        "shift": "off-by-one gather: a position predicts the next token, not its own",
        "pad": "pads are counted",
        "temperature": "the temperature is missing, so it is another policy's log-probability",
        "mean": "mean over the whole vocabulary instead of the sampled token",
        "end": "the last token, which may be the end token, is left out",
    }
    for name, values in wrong.items():
        is_not(found, torch.tensor(values), named[name])


@torch.no_grad()
def test_a_lone_end_token_is_predicted_like_any_other(policy, tokenizer, prompts):
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    found, _ = completion_logprobs(policy, prompts[:1], [[eos]], TEMPERATURE, pad)
    expected = slow_logprobs(policy, prompts[0], [eos])[0, eos]
    assert found[0] < -1e-2
    assert found.item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("logit_rows", [1, 3, 1000])
def test_gradients_through_chunks_equal_the_direct_ones(policy, drawn, monkeypatch, logit_rows):
    monkeypatch.setattr(rollout, "LOGIT_ROWS", logit_rows)
    weights = torch.linspace(-1, 2, len(drawn))
    parameters = [p for p in policy.parameters() if p.requires_grad]
    log_probs, entropies = fast(policy, drawn)
    assert not entropies.requires_grad
    found = torch.autograd.grad(weights @ log_probs, parameters)
    direct = [
        own(slow_logprobs(policy, p, c), c)
        for p, c in zip(drawn.prompt_ids, drawn.completion_ids, strict=True)
    ]
    expected = torch.autograd.grad(weights.double() @ torch.stack(direct), parameters)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert max(gradient.abs().max() for gradient in expected) > 0.1


def test_logprobs_depend_on_no_other_row(policy, drawn, slow):
    @torch.no_grad()
    @settings(max_examples=15, deadline=None)
    @given(st.permutations(range(len(LENGTHS))), st.integers(1, 8), st.integers(0, 40000))
    def check(order, rows, pad):
        chosen = order[:rows]
        part = [[column[r] for r in chosen] for column in (drawn.prompt_ids, drawn.completion_ids)]
        found = completion_logprobs(policy, *part, TEMPERATURE, pad)
        torch.testing.assert_close(found, tuple(s[chosen] for s in slow), **TINY)

    check()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batches_keep_the_order_of_the_rows(policy, drawn, slow, batch_size):
    found = batched_logprobs(policy, drawn, TEMPERATURE, 0, batch_size)
    torch.testing.assert_close(found, slow, **TINY)
    assert not found[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kl_of_a_fresh_adapter_is_exactly_zero(
    exact, tiny, tokenizer, prompts, noise, monkeypatch, dtype
):
    monkeypatch.setattr(models, "compute_dtype", lambda where: dtype)
    monkeypatch.setattr(rollout, "device", lambda: torch.device("cpu"))
    fresh = models.load_policy(tiny, 4, 8, seed=0)
    found = sample(fresh, tokenizer, prompts, noise, TEMPERATURE)
    with fresh.disable_adapter():
        same = sample(fresh, tokenizer, prompts, noise, TEMPERATURE)
        reference, _ = batched_logprobs(fresh, found, TEMPERATURE, tokenizer.pad_token_id)
    log_probs, entropies = batched_logprobs(fresh, found, TEMPERATURE, tokenizer.pad_token_id)
    assert found.completion_ids == same.completion_ids
    assert torch.equal(log_probs, reference)
    assert (entropies > 0).all()


def test_the_mean_log_ratio_estimates_the_kl(policy, tokenizer, prompts):
    """Over many samples of one token it is the exact sum over the vocabulary."""
    rows, pad = 300, tokenizer.pad_token_id
    drawn = sample(
        policy, tokenizer, prompts[:1] * rows, sampling_noise(2, rows, 1), TEMPERATURE, rows
    )
    ratio, _ = batched_logprobs(policy, drawn, TEMPERATURE, pad)
    with torch.no_grad():
        log_policy = (all_logits(policy, prompts[0])[-1] / TEMPERATURE).log_softmax(-1)
        with policy.disable_adapter():
            ratio -= batched_logprobs(policy, drawn, TEMPERATURE, pad)[0]
            reference = (all_logits(policy, prompts[0])[-1] / TEMPERATURE).log_softmax(-1)
    exact = (log_policy.exp() * (log_policy - reference)).sum()
    error = ratio.std() / math.sqrt(rows)
    assert abs(ratio.mean() - exact) < 4 * error
    assert abs(ratio.mean() + exact) > 4 * error, "KL sign"
