"""Sample completions, and recompute the log-probabilities of the sampled tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedTokenizerBase

from utils.models.body import device
from utils.models.memory import BatchSize
from utils.models.weights import pad_right
from utils.reinforce.logprobs import token_logprobs

DECODED, READ = 32, 16  # sequences that are sampled, or read, together if the caller does not say
LOGIT_ROWS = 256  # positions whose full-vocabulary logits are held at once: 50 MB in fp32


@dataclass
class Rollout:
    """Sampled completions, one entry per row.

    Attributes:
        prompt_ids: token ids of the templated prompts.
        completion_ids: sampled token ids, the end-of-turn token included where there is one.
        finished: whether the completion ended by itself.
        texts: the completions as text, without special tokens.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    finished: list[bool]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def lengths(self) -> Tensor:
        """Return the number of sampled tokens of each row, fp32, shape (rows,)."""
        return torch.tensor([float(len(ids)) for ids in self.completion_ids])

    def by_length(self, size: int) -> Iterator[list[int]]:
        """Yield the rows, `size` at a time, those of like length together."""
        pairs = list(zip(self.prompt_ids, self.completion_ids, strict=True))
        order = sorted(range(len(self)), key=lambda row: sum(map(len, pairs[row])))
        for start in range(0, len(order), size):
            yield order[start : start + size]


def sampling_noise(seed: int, rows: int, length: int) -> Tensor:
    """Return uniform noise in [0, 1), shape (rows, length): one number decides one token.

    Fixing it fixes the sample whatever batch a row is in, and two policies that share it differ
    only where their distributions do (common random numbers).
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, length, generator=generator)


def choose_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Draw from softmax(logits / temperature) by inverting its cumulative distribution.

    Args:
        logits: shape (rows, vocabulary).
        uniform: noise in [0, 1), shape (rows,).
        temperature: 0 takes the most likely token instead.

    Returns:
        Token ids, shape (rows,).
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    threshold = uniform.to(cumulative) * cumulative[:, -1]
    tokens = torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0]
    return tokens.clamp_max(logits.shape[-1] - 1)


def sample(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    noise: Tensor,
    temperature: float,
    batch_size: int | BatchSize = DECODED,
) -> Rollout:
    """Sample one completion per row, without top-k or top-p: the sampler is the policy.

    Args:
        model: the policy (inside `disable_adapter()` the reference).
        tokenizer: decides the end and pad tokens.
        prompt_ids: templated prompts, one list of token ids per row.
        noise: from `sampling_noise`, shape (rows, longest completion in tokens).
        temperature: 0 is greedy.
        batch_size: rows that are decoded together, shorter prompts first, to pad little; a caller
            that keeps one of `batches` finds out only once what memory allows.
    """
    order = sorted(range(len(prompt_ids)), key=lambda index: len(prompt_ids[index]))
    completions: list[list[int]] = [[] for _ in order]

    def decode(size: int) -> None:
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            ids = [prompt_ids[r] for r in rows]
            drawn = _decode(model, tokenizer, ids, noise[rows], temperature)
            for row, tokens in zip(rows, drawn, strict=True):
                completions[row] = tokens

    batches("decoded", batch_size).run(decode)
    return Rollout(
        prompt_ids=[list(ids) for ids in prompt_ids],
        completion_ids=completions,
        finished=[tokens[-1] == tokenizer.eos_token_id for tokens in completions],
        texts=[tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in completions],
    )


def completion_logprobs(
    model: PeftModel,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    temperature: float,
    pad_token_id: int,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each sampled completion under softmax(logits / temperature).

    Only the positions that predict a sampled token reach the output layer: the last prompt token
    predicts the first completion token, and the end token is predicted like any other. No prompt
    token and no pad is counted. The logits exist for `LOGIT_ROWS` positions at a time.

    Args:
        model: the policy (inside `disable_adapter()` the reference).
        prompt_ids: templated prompts.
        completion_ids: sampled tokens.
        temperature: of the sampling policy.
        pad_token_id: for right padding.

    Returns:
        Sums over the completion's tokens of log pi, shape (rows,), and of the policy's entropy per
        sampled token, detached, shape (rows,); both fp32, nats.
    """
    pairs = list(zip(prompt_ids, completion_ids, strict=True))
    ids = pad_right([[*prompt, *completion] for prompt, completion in pairs], pad_token_id, 16)
    body, head = _parts(model)
    hidden = body(input_ids=ids.to(device()), use_cache=False).last_hidden_state
    row = torch.tensor([i for i, (_, c) in enumerate(pairs) for _ in c], device=hidden.device)
    position = torch.tensor(
        [len(p) - 1 + t for p, c in pairs for t in range(len(c))], device=hidden.device
    )
    target = torch.tensor([token for _, c in pairs for token in c], device=hidden.device)
    log_prob, entropy = token_logprobs(hidden[row, position], head, target, temperature, LOGIT_ROWS)
    zeros = torch.zeros(len(pairs), device=hidden.device)
    return zeros.index_add(0, row, log_prob), zeros.index_add(0, row, entropy)


def batched_logprobs(
    model: PeftModel,
    rollout: Rollout,
    temperature: float,
    pad_token_id: int,
    batch_size: int | BatchSize = READ,
) -> tuple[Tensor, Tensor]:
    """`completion_logprobs` of a whole rollout without gradient, in batches of like length."""
    log_probs, entropies = torch.empty(len(rollout)), torch.empty(len(rollout))

    def measure(size: int) -> None:
        for rows in rollout.by_length(size):
            log_prob, entropy = completion_logprobs(
                model,
                [rollout.prompt_ids[r] for r in rows],
                [rollout.completion_ids[r] for r in rows],
                temperature,
                pad_token_id,
            )
            log_probs[rows], entropies[rows] = log_prob.cpu(), entropy.cpu()

    with torch.no_grad():
        batches("read", batch_size).run(measure)
    return log_probs, entropies


def batches(what: str, size: int | BatchSize) -> BatchSize:
    """Return what remembers how many sequences memory lets be "decoded" or "read" together."""
    return size if isinstance(size, BatchSize) else BatchSize(f"sequences {what} together", size)


def _parts(model: PeftModel) -> tuple[nn.Module, nn.Module]:
    base = model.get_base_model()
    return getattr(base, base.base_model_prefix), base.get_output_embeddings()


@torch.no_grad()
def _decode(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Sequence[int]],
    noise: Tensor,
    temperature: float,
) -> list[list[int]]:
    """Decode one batch with a key-value cache; rows that have ended leave the batch."""
    body, head = _parts(model)
    where = device()
    real = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(
        real, batch_first=True, padding_value=tokenizer.pad_token_id, padding_side="left"
    )
    ones = [torch.ones_like(row) for row in real]
    padding = pad_sequence(ones, batch_first=True, padding_side="left")
    position = (padding.cumsum(-1) - 1).clamp_min(0).to(where)
    cache = DynamicCache(config=model.get_base_model().config)
    # By position: minor releases of transformers rename the cache's keyword.
    out = body(ids.to(where), padding.to(where), position, cache, use_cache=True)
    # A float mask in the shape of the attention scores: a boolean one is converted in every layer.
    steps = noise.shape[1]
    bias = torch.zeros(len(prompts), 1, 1, ids.shape[1] + steps, dtype=out.last_hidden_state.dtype)
    bias[..., : ids.shape[1]].masked_fill_(padding[:, None, None] == 0, torch.finfo(bias.dtype).min)
    bias, position, noise = bias.to(where), position[:, -1:], noise.to(where)
    completions: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    for step in range(steps):
        tokens = choose_tokens(head(out.last_hidden_state[:, -1]), noise[rows, step], temperature)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            completions[row].append(token)
        going = (tokens != tokenizer.eos_token_id).nonzero()[:, 0]
        if len(going) == 0 or step + 1 == steps:
            break
        if len(going) < len(rows):
            rows = [rows[i] for i in going.tolist()]
            cache.batch_select_indices(going)
            bias, position, tokens = bias[going], position[going], tokens[going]
        position = position + 1
        seen = bias[..., : ids.shape[1] + step + 1]
        out = body(tokens[:, None], seen, position, cache, use_cache=True)
    return completions
