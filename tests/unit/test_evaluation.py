"""Held-out evaluation: text statistics, pairing, and pair metrics."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from utils.config import PROFILES, EvaluationConfig
from utils.data.pairs import Pair, Prompt, response_key
from utils.data.sources import Group, Response
from utils.data.texts import distinct_n, distinct_of_words, repetition
from utils.experiments.alignment import held_out_metrics
from utils.files import write_jsonl
from utils.models import body as models
from utils.reinforce import sampling as rollout
from utils.reinforce.evaluation import evaluate_policy, sequence_kl
from utils.reinforce.sampling import batched_logprobs, sample, sampling_noise
from utils.rewards.evaluation import scored_responses
from utils.statistics.bootstrap import clustered_interval
from utils.statistics.pairs import pair_metrics
from utils.statistics.policy_stats import compare

PROFILE = dataclasses.replace(
    PROFILES["smoke"], evaluation=EvaluationConfig(samples_per_prompt=2, batch_size=3)
)
PROMPTS = [
    Prompt(f"p{i}", "test", category, ({"role": "user", "content": text},))
    for i, (category, text) in enumerate([("a", "Name a colour."), ("b", "Hi"), (None, "Why not?")])
]
COLUMNS = "prompt_id category prompt response finished length repetition kl"


def draws(count, seed=0):
    return np.random.default_rng(seed).normal(size=count)


def names(count, copies=1):
    return [f"p{i}" for i in range(count) for _ in range(copies)]


# Texts


def test_distinct_by_hand():
    assert distinct_n(["a b a b", "a b"]) == 2 / 4, "over all texts together, not text by text"
    assert distinct_n(["a b c"], n=1) == 1
    assert math.isnan(distinct_n(["", "a"])), "no bigram, no share"


def test_distinct_bigrams_of_as_many_words():
    short = ["a b c", "d e f"]
    long = ["a b c d e f g h a b c d e f g h", "a b c d e f g h"]
    assert distinct_n(long) < 0.6
    assert distinct_of_words(short, 6) == 1
    assert distinct_of_words(long, 6) == 1, "its first six words repeat nothing"
    assert distinct_of_words(long, 99) == distinct_n(long)
    halves = distinct_of_words(["a a a a", "b b b b"], 6)
    assert halves == 2 / 4, "three bigrams of one text and one of the other; none spans both"


def test_texts_are_taken_in_a_shuffled_order_that_is_the_same_for_all():
    texts = ["x x x"] * 10 + [f"{i} {i + 1} {i + 2}" for i in range(0, 30, 3)]
    assert distinct_of_words(texts, 30) > 0.3, "in the given order all are x"
    assert distinct_of_words(texts, 30) == distinct_of_words([t.upper() for t in texts], 30)


def test_repetition_by_hand():
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("a a a a a a") == pytest.approx(2 / 3)
    assert repetition("a b a b", n=2) == pytest.approx(1 / 3)
    assert repetition("a b c") == 0


# Comparison


def frame(rewards, prompt_ids, response="a b c"):
    count = len(rewards)
    return pd.DataFrame(
        {
            "prompt_id": prompt_ids,
            "reward_x": np.asarray(rewards, dtype=float),
            "kl": np.arange(count, dtype=float),
            "length": 4,
            "finished": [True, False] * (count // 2),
            "response": response,
            "repetition": 0.25,
        }
    )


def test_compare_by_hand():
    base = frame([1, 2, 3, 4], names(2, 2))
    other = frame([2, 2, 1, 9], names(2, 2))
    table = compare({"sft": base, "other": other}, "reward_x", 200).set_index("policy")
    first, second = table.loc["sft"], table.loc["other"]
    assert first[["difference", "low", "high"]].tolist() == [0, 0, 0]
    assert first.win_rate == 0.5, "against itself every row ties, and a tie is half a win"
    assert second.win_rate == (2 + 0.5) / 4
    assert (first.reward, second.reward, second.difference) == (2.5, 3.5, 1)
    assert second[["kl", "length", "finished", "repetition", "n"]].tolist() == [
        1.5,
        4,
        0.5,
        0.25,
        4,
    ]
    assert second.distinct_2 == 2 / 8


def test_the_difference_is_paired():
    """Prompts differ more than policies do; pairing takes that out."""
    prompt = 10 * draws(60)
    base, other = frame(prompt, names(60)), frame(prompt + 0.5 + 0.1 * draws(60, 1), names(60))
    row = compare({"sft": base, "other": other}, "reward_x", 500).iloc[1]
    assert row.low > 0.4, "unpaired: the difference is lost in that between prompts"
    assert row.high < 0.6
    assert row.reward_high - row.reward_low > 10 * (row.high - row.low)


def test_the_interval_of_the_difference_is_over_prompts():
    gain, ids = np.repeat(draws(40), 4), names(40, 4)
    tables = {"sft": frame(np.zeros(160), ids), "other": frame(gain, ids)}
    row = compare(tables, "reward_x", 500).iloc[1]
    over_prompts = clustered_interval(gain, ids, 500)
    assert (row.low, row.high) == (over_prompts["low"], over_prompts["high"]), (
        "samples of one prompt pass for new prompts"
    )


# Policies


@pytest.fixture(scope="module")
def policy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "compute_dtype", lambda where: torch.float32)
        for module in (models, rollout):
            patch.setattr(module, "device", lambda: torch.device("cpu"))
        yield models.load_policy(PROFILE.model, 4, 8, seed=0)


@pytest.fixture
def moved(policy):
    """The policy with its adapter off the identity, for one test."""
    factors = [p for name, p in policy.named_parameters() if "lora_B" in name]
    torch.manual_seed(0)
    for factor in factors:
        nn.init.normal_(factor, std=0.3)
    yield policy
    for factor in factors:
        nn.init.zeros_(factor)


class Length:
    """A reward model that counts characters, and checks what it is given."""

    def score(self, messages, texts, finished):
        assert len(messages) == len(texts) == len(finished)
        assert all(isinstance(turns[-1]["content"], str) for turns in messages)
        return torch.tensor([float(len(text)) for text in texts])


class Words:
    """Another one, on another scale."""

    def score(self, messages, texts, finished):
        return torch.tensor([float(len(text.split())) for text in texts])


def evaluated(policy, tokenizer, temperature=0.7, **options):
    models_by_name = {"length": Length()}
    return evaluate_policy(
        policy, tokenizer, PROMPTS, PROFILE, temperature, models_by_name, **options
    )


def test_evaluation_of_the_sft_model(policy, tokenizer):
    found = evaluated(policy, tokenizer)
    assert list(found) == [*COLUMNS.split(), "reward_length"]
    assert found.prompt_id.tolist() == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert found.prompt.tolist() == [p.messages[-1]["content"] for p in PROMPTS for _ in range(2)]
    assert found.category[:4].tolist() == ["a", "a", "b", "b"]
    assert found.category[4:].isna().all()
    assert (found.reward_length == found.response.str.len()).all()
    assert (found.kl == 0).all()
    assert found.response[0] != found.response[1], "two samples of a prompt share their noise"
    with policy.disable_adapter():
        off = evaluated(policy, tokenizer)
    pd.testing.assert_frame_equal(off, found)


def test_all_policies_get_the_same_noise(policy, tokenizer):
    first = evaluated(policy, tokenizer)
    torch.manual_seed(99)  # nothing may depend on the global state
    pd.testing.assert_frame_equal(evaluated(policy, tokenizer), first)


def test_a_moved_policy_has_a_kl_and_its_reference_has_none(moved, tokenizer):
    on = evaluated(moved, tokenizer)
    with moved.disable_adapter():
        off = evaluated(moved, tokenizer)
        assert evaluated(moved, tokenizer).equals(off), "the adapter came on inside the context"
    assert (on.kl != 0).all()
    assert (off.kl == 0).all()
    assert (on.response != off.response).any()
    assert evaluated(moved, tokenizer, reference=False).kl.isna().all()


def test_held_out_metrics_by_hand(moved, tokenizer):
    frame = evaluated(moved, tokenizer)
    scorers, scales = {"own": Length(), "judge": Words()}, {"own": (3, 2), "judge": (-1, 0.5)}
    found = held_out_metrics(moved, tokenizer, PROMPTS, PROFILE, scorers, scales)
    samples = PROFILE.evaluation.bootstrap_samples
    own = clustered_interval((frame.reward_length - 3) / 2, frame.prompt_id, samples)
    words = frame.response.str.split().str.len()
    assert found == {
        "eval_reward": pytest.approx(own["value"]),
        "eval_reward_low": pytest.approx(own["low"]),
        "eval_reward_high": pytest.approx(own["high"]),
        "eval_kl": pytest.approx(frame.kl.mean()),
        "eval_mean_length": frame.length.mean(),
        "eval_finished": frame.finished.mean(),
        "eval_distinct_2": distinct_n(frame.response),
        "eval_judge": pytest.approx(((words + 1) / 0.5).mean()),
    }


def test_without_a_judge_its_metric_is_blank(policy, tokenizer):
    scorers, scales = {"own": Length()}, {"own": (0, 1)}
    found = held_out_metrics(policy, tokenizer, PROMPTS, PROFILE, scorers, scales)
    assert found["eval_judge"] is None
    assert found["eval_finished"] == evaluated(policy, tokenizer).finished.mean()


def test_the_kl_of_samples_and_of_greedy_completions(moved, tokenizer):
    ids, training = [[5, 6, 7], [8, 9]], PROFILE.reinforce.temperature
    drawn = sample(moved, tokenizer, ids, sampling_noise(0, 2, 5), 0.3)
    pad = tokenizer.pad_token_id
    own, _ = batched_logprobs(moved, drawn, 0.3, pad)
    with moved.disable_adapter():
        reference, _ = batched_logprobs(moved, drawn, training, pad)
    found = sequence_kl(moved, tokenizer, drawn, 0.3, PROFILE)
    assert np.abs(found + (own - reference).numpy()).min() > 1e-3, "KL sign"
    np.testing.assert_allclose(found, own - reference, rtol=1e-5)
    greedy = sequence_kl(moved, tokenizer, drawn, 0.0, PROFILE)
    np.testing.assert_allclose(greedy, -reference, rtol=1e-5)
    assert (greedy > 0).all(), "a greedy completion has probability one under its own policy"


# Pairs of rated responses


def responses(*ratings, source="sample"):
    return tuple(Response(f"text {r} {i}", r, source=source) for i, r in enumerate(ratings))


def fake_run(tmp_path, pairs, logits):
    """A run whose `samples.jsonl` gives the responses, in order of appearance, these outputs."""
    run, keys = SimpleNamespace(directory=tmp_path), {}
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            keys.setdefault(response_key(pair, response), (pair, response))
    rows = [
        {
            **dict(zip(("prompt_id", "batch", "place"), key, strict=True)),
            "category": pair.category,
            "prompt": "?",
            "response": response.text,
            "rating": response.rating,
            "reward": float(np.dot(p, np.arange(1, 11)) if len(p) == 10 else p[0]),
            "logits": list(np.log(p)) if len(p) == 10 else p,
        }
        for (key, (pair, response)), p in zip(keys.items(), logits, strict=True)
    ]
    write_jsonl(tmp_path / "samples.jsonl", rows[::-1])
    return run


def all_pairs(group):
    best_first = sorted(group.responses, key=lambda r: -r.rating)
    return [Pair(group, a, b) for i, a in enumerate(best_first) for b in best_first[i + 1 :]]


def test_pair_metrics_by_hand(tmp_path):
    turns = ({"role": "user", "content": "?"},)
    reference = Response("best", 9.0, source="reference")
    first = Group("p0", "test", "a", turns, (*responses(2.0, 5.0), reference))
    second = Group("p1", "test", None, turns, responses(3.0, 4.0))
    pairs = [*all_pairs(first), *all_pairs(second)]
    # In order of appearance: 9.0 and 5.0 of p0, its 2.0, then 4.0 and 3.0 of p1.
    run = fake_run(tmp_path, pairs, [[2.0], [0.5], [0.5], [-1.0], [1.0]])
    found, metrics = pair_metrics(run, pairs, 200)
    assert found.prompt_id.tolist() == ["p0", "p0", "p0", "p1"]
    assert found.gap.tolist() == [4, 7, 3, 1]
    assert found.correct.tolist() == [1, 1, 0.5, 0], "a tie is half right"
    assert found.between_samples.tolist() == [False, False, True, True]
    assert found.chosen.tolist()[:2] == ["best", "best"]
    losses = [math.log1p(math.exp(-gap)) for gap in (1.5, 1.5, 0, -2)]
    assert (-found.log_p).tolist() == pytest.approx(losses)
    assert metrics["accuracy"]["value"] == 2.5 / 4
    assert metrics["accuracy_model_pairs"]["value"] == 0.25, "pairs with the reference are easier"
    assert (metrics["accuracy"]["n"], metrics["accuracy_model_pairs"]["n"]) == (4, 2)
    assert metrics["nll"]["value"] == pytest.approx(sum(losses) / 4)
    assert (metrics["accuracy"]["low"], metrics["accuracy"]["high"]) == (0, 2.5 / 3)


def test_pair_metrics_of_ten_classes(tmp_path):
    group = Group("p0", "test", None, (), responses(8.0, 2.0, source=None))
    low, high = np.full(10, 0.01), np.full(10, 0.01)
    low[1], high[7] = 0.91, 0.91
    found, metrics = pair_metrics(
        fake_run(tmp_path, all_pairs(group), [high.tolist(), low.tolist()]), all_pairs(group), 50
    )
    win = sum(high[i] * low[j] for i in range(10) for j in range(i))
    assert found.log_p[0] == pytest.approx(math.log(win), abs=1e-5)
    assert metrics["nll"]["value"] == pytest.approx(-math.log(win), abs=1e-5)
    assert metrics["accuracy"]["value"] == 1
    assert "accuracy_model_pairs" not in metrics, "no pair is known to be of two samples"


def test_every_response_is_scored_once():
    turns = ({"role": "user", "content": "?"},)
    groups = [Group("p0", "test", "a", turns, responses(1.0, 2.0, 3.0), batch=b) for b in (0, 1)]
    pairs = [pair for group in groups for pair in all_pairs(group)]
    asked = []

    def logits(prompts, texts, finished):
        asked.extend(texts)
        return torch.tensor([[float(text.split()[1])] for text in texts])

    rows = scored_responses(SimpleNamespace(logits=logits), pairs)
    assert len(pairs) == 6
    assert len(rows) == len(asked) == 6, "a response in several pairs is scored once"
    assert {(r["batch"], r["place"]) for r in rows} == {(b, i) for b in (0, 1) for i in range(3)}
    assert all(row["reward"] == row["rating"] for row in rows), "a score went to another response"
    assert all(row["logits"] == [row["reward"]] for row in rows)


def test_scored_responses_feed_pair_metrics(tmp_path):
    turns = ({"role": "user", "content": "?"},)
    pairs = all_pairs(Group("p0", "test", None, turns, responses(1.0, 2.0, 3.0)))
    scorer = SimpleNamespace(
        logits=lambda p, texts, f: torch.tensor([[float(t[5])] for t in texts])
    )
    write_jsonl(tmp_path / "samples.jsonl", scored_responses(scorer, pairs))
    _, metrics = pair_metrics(SimpleNamespace(directory=tmp_path), pairs, 20)
    assert metrics["accuracy"]["value"] == 1
