"""The training loop: one step by hand, what it logs, what stops it, and surviving kills."""

import dataclasses
import errno
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from utils.config import ModelConfig, ReinforceConfig
from utils.data.pairs import Prompt
from utils.data.texts import distinct_n
from utils.experiments.storage import Run
from utils.files import RESULTS, ROOT, ResultsError, read_jsonl
from utils.models import body as models
from utils.models.weights import load_tokenizer
from utils.reinforce import checkpoints as checkpoint_files
from utils.reinforce import loop as reinforce
from utils.reinforce import sampling as rollout
from utils.reinforce import update
from utils.reinforce.checkpoints import last_checkpoint, load_adapter
from utils.reinforce.loop import COLUMNS, TrainingStopped, step_prompts, train_policy
from utils.reinforce.update import PolicyUpdate

TINY = ModelConfig(name="tiny-random")
CONFIG = ReinforceConfig(
    steps=6,
    prompts_per_step=4,
    max_completion_length=6,
    temperature=1.0,
    learning_rate=1e-3,
    warmup_steps=2,
    lora_r=4,
    micro_batch=3,
    eval_steps=2,
    save_steps=2,
)
QUESTIONS = ["Name a colour.", "What is two and two?", "Hi", "Write a haiku about rain.", "Why?"]
PROMPTS = [
    Prompt(f"p{i}", "train", None, ({"role": "user", "content": text},))
    for i, text in enumerate(QUESTIONS)
]


@pytest.fixture(scope="module", autouse=True)
def _pinned():
    with pytest.MonkeyPatch.context() as patch:
        pin(patch.setattr)
        yield


def pin(set_attribute):
    """Compute in fp32 on the CPU."""
    set_attribute(models, "compute_dtype", lambda where: torch.float32)
    for module in (models, rollout, update):
        set_attribute(module, "device", lambda: torch.device("cpu"))


@cache
def words():
    return load_tokenizer(TINY)


def shorter(batch, drawn):
    return -drawn.lengths()


def quick_policy():
    """A policy of 512 words that ends a completion every few of them."""
    policy = models.load_policy(TINY, CONFIG.lora_r, CONFIG.lora_alpha, seed=0)
    base = policy.get_base_model()
    head = nn.Linear(base.lm_head.in_features, 512)
    with torch.no_grad():
        head.weight.copy_(15 * base.lm_head.weight[:512])
        head.bias.zero_()[base.config.eos_token_id] = 8.0
    base.lm_head = head.requires_grad_(False)
    return policy


def train(directory, reward_of=shorter, monitor=None, seed=0, **changes):
    """Train, or go on training, in `directory`; the held-out metric tells the exact adapter."""
    config = dataclasses.replace(CONFIG, **changes)
    policy, run = quick_policy(), Run(directory, {}, seed, "f" * 16)

    def evaluate():
        return {"eval_kl": size_of(policy)}

    train_policy(policy, words(), PROMPTS, reward_of, config, seed, run, evaluate, monitor)
    return policy, run


def trained(policy):
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def size_of(policy):
    return sum(p.abs().sum().item() for p in trained(policy).values())


def assert_same_adapter(policy, expected):
    for name, parameter in trained(policy).items():
        assert torch.equal(parameter, trained(expected)[name]), name


def rows_of(run):
    return run.metrics().drop(columns="seconds")


def assert_same_rows(run, whole):
    found, expected = rows_of(run), rows_of(whole)
    assert found.step.tolist() == expected.step.tolist(), "a step is missing or logged twice"
    assert found.equals(expected), f"a resumed run differs:\n{found.compare(expected)}"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return train(tmp_path_factory.mktemp("unbroken") / "align")


# The order of the prompts


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_an_epoch_covers_every_prompt_once(count, distinct, generations, seed):
    prompts = [Prompt(str(i), "train", None, ()) for i in range(count)]
    seen = []
    for step in range(1, 2 * count + 1):
        batch = step_prompts(prompts, step, distinct * generations, seed, generations)
        assert batch == step_prompts(prompts, step, distinct * generations, seed, generations)
        assert len(batch) == distinct * generations
        for first in range(0, len(batch), generations):
            assert len(set(batch[first : first + generations])) == 1, "generations are adjacent"
        seen += [prompt.id for prompt in batch[::generations]]
    for epoch in range(2 * distinct):
        assert Counter(seen[epoch * count : (epoch + 1) * count]) == Counter(map(str, range(count)))


def test_epochs_and_seeds_have_their_own_order():
    prompts = [Prompt(str(i), "train", None, ()) for i in range(30)]
    first, second = (step_prompts(prompts, step, 30, 0) for step in (1, 2))
    other = step_prompts(prompts, 1, 30, 1)
    assert len({tuple(p.id for p in order) for order in (prompts, first, second, other)}) == 4


# One step


def test_one_step_by_hand(tmp_path):
    """The gradient that reaches the optimiser is that of -mean_i [A_i sum_t log pi]."""
    policy, tokenizer = quick_policy(), words()
    torch.manual_seed(1)
    for name, parameter in trained(policy).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    batch = step_prompts(PROMPTS, 1, 5, 0)
    drawn = reinforce._rollout(policy, tokenizer, batch, range(5), CONFIG, 0, rollout.DECODED)
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])
    log_probs = []
    for prompt, completion in zip(drawn.prompt_ids, drawn.completion_ids, strict=True):
        logits = policy(input_ids=torch.tensor([prompt + completion])).logits[0]
        log_policy = logits[len(prompt) - 1 : -1].log_softmax(-1)
        log_probs.append(log_policy[range(len(completion)), completion].sum())
    loss = -(advantages * torch.stack(log_probs)).mean()
    expected = torch.autograd.grad(loss, list(trained(policy).values()))
    before = [p.detach().clone() for p in trained(policy).values()]
    for micro_batch in (1, 2, 5):
        with torch.no_grad():
            for parameter, value in zip(trained(policy).values(), before, strict=True):
                parameter.copy_(value)
        config = dataclasses.replace(CONFIG, micro_batch=micro_batch, max_grad_norm=1e9)
        optimizer = torch.optim.SGD(trained(policy).values())
        steps = PolicyUpdate(policy, optimizer, config, tokenizer.pad_token_id)
        found = steps.step(drawn, advantages, len(drawn), learning_rate=1.0)
        moved = [b - p for b, p in zip(before, trained(policy).values(), strict=True)]
        torch.testing.assert_close(moved, list(expected), atol=1e-3, rtol=1e-3)
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-4)
        norm = torch.cat([gradient.flatten() for gradient in expected]).norm().item()
        assert found["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_the_gradient_is_clipped_and_its_norm_logged_before(tmp_path):
    policy, tokenizer = quick_policy(), words()
    drawn = reinforce._rollout(policy, tokenizer, PROMPTS, range(5), CONFIG, 0, rollout.DECODED)
    before = {name: p.detach().clone() for name, p in trained(policy).items()}
    config = dataclasses.replace(CONFIG, max_grad_norm=1e-2)
    optimizer = torch.optim.SGD(trained(policy).values())
    steps = PolicyUpdate(policy, optimizer, config, tokenizer.pad_token_id)
    found = steps.step(drawn, shorter(None, drawn), len(drawn), learning_rate=1.0)
    moved = torch.cat([(p - before[n]).flatten() for n, p in trained(policy).items()]).norm()
    assert found["grad_norm"] > 1, "the norm must be that before clipping"
    assert moved.item() == pytest.approx(1e-2, rel=1e-2), "the gradient was not clipped"


# What is logged


def test_rows(unbroken):
    _, run = unbroken
    metrics = run.metrics()
    assert tuple(metrics) == COLUMNS
    assert metrics.step.tolist() == list(range(CONFIG.steps + 1))
    start = metrics.iloc[0].dropna()
    assert set(start.index) == {"step", "eval_kl"}, "before training there is an evaluation alone"
    assert metrics.step[metrics.eval_kl.notna()].tolist() == [0, 2, 4, 6]
    steps = metrics.iloc[1:]
    words_needed = {"completions/distinct_2"}
    own = [name for name in steps if not name.startswith("eval_") and name not in words_needed]
    assert steps[own].notna().all(axis=None)
    rates = CONFIG.learning_rate * torch.tensor([1 / 2, 1, 1, 1, 1, 1])
    assert steps.learning_rate.tolist() == pytest.approx(rates.tolist())
    assert steps.kl.iloc[0] == 0, "the first rollout is the SFT policy's"
    assert steps.kl.iloc[-1] != 0
    assert (steps.reward + steps["completions/mean_length"]).abs().max() < 1e-5
    regularised = steps.reward - CONFIG.beta * steps.kl
    assert steps.objective.tolist() == pytest.approx(regularised.tolist(), rel=1e-4), "KL sign"
    assert steps["completions/clipped_ratio"].between(0, 1).all()


def test_the_baseline_is_read_before_it_is_updated(unbroken):
    steps = rows_of(unbroken[1]).iloc[1:]
    assert steps.baseline.iloc[0] == 0, "baseline updated before use"
    seen = steps.objective.expanding().mean().shift().iloc[1:]
    assert steps.baseline.iloc[1:].tolist() == pytest.approx(seen.tolist(), rel=1e-4)
    ungiven = steps.reward.expanding().mean().shift().iloc[1:]
    assert abs(seen - ungiven).max() > 1e-3, "the KL is part of what the baseline averages"


def test_the_adapter_is_trained_and_nothing_else(unbroken):
    before, after = (dict(p.named_parameters()) for p in (quick_policy(), unbroken[0]))
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == set(trained(unbroken[0]))


@pytest.mark.parametrize("sign", [1, -1], ids=["shorter", "longer"])
def test_the_reward_rises(tmp_path, sign):
    _, run = train(
        tmp_path / "align",
        lambda batch, drawn: sign * shorter(batch, drawn),
        steps=10,
        prompts_per_step=8,
        micro_batch=8,
        max_kl=1e9,
        min_entropy=0.0,
        min_distinct_2=0.0,
        learning_rate=3e-3,
        beta=0.0,
    )
    reward = run.metrics().reward[1:]
    assert reward[-5:].mean() > reward[:3].mean() + 0.5


@pytest.mark.parametrize("baseline", ["none", "ema", "rloo"])
def test_every_baseline_runs_and_resumes(tmp_path, baseline):
    options = {"steps": 4, "baseline": baseline, "num_generations": 2}
    _, whole = train(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "align", monitor=stop_at(3), **options)
    assert_same_rows(train(tmp_path / "align", **options)[1], whole)


def test_the_monitor_sees_every_step(tmp_path):
    seen = []

    def monitor(row, batch, drawn, rewards):
        seen.append((row["step"], len(batch), len(drawn), rewards.mean().item() == row["reward"]))

    train(tmp_path / "align", monitor=monitor, steps=2)
    assert seen == [(1, 4, 4, True), (2, 4, 4, True)]


def test_distinct_2_is_that_of_all_texts_of_the_step(monkeypatch, tmp_path):
    """Text by text, each of these would have 1."""
    right = reinforce.sample

    def spoken(*args):
        drawn = right(*args)
        drawn.texts = ["a b c", "a b c", "a b d", "c"]
        return drawn

    monkeypatch.setattr(reinforce, "sample", spoken)
    _, run = train(tmp_path / "align", steps=1)
    assert run.metrics()["completions/distinct_2"].iloc[1] == 3 / 6


# Kills


def stop_at(step):
    def monitor(row, *_):
        if row["step"] == step:
            raise KeyboardInterrupt

    return monitor


@pytest.mark.parametrize(("warmup", "rates"), [(0, [1, 1, 1]), (2, [0.5, 1, 1])])
def test_warm_up(tmp_path, warmup, rates):
    _, run = train(tmp_path / "align", steps=3, warmup_steps=warmup)
    found = run.metrics()["learning_rate"].iloc[1:] / CONFIG.learning_rate
    assert found.tolist() == pytest.approx(rates)


def test_the_seed_decides_the_run(tmp_path, unbroken):
    assert_same_rows(train(tmp_path / "same")[1], unbroken[1])
    _, other = train(tmp_path / "other", seed=1)
    assert not rows_of(other).equals(rows_of(unbroken[1]))


@pytest.mark.parametrize("step", range(1, CONFIG.steps))
def test_an_interrupted_run_gives_the_same_rows(tmp_path, unbroken, step):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "align", monitor=stop_at(step))
    policy, run = train(tmp_path / "align")
    assert_same_rows(run, unbroken[1])
    assert_same_adapter(policy, unbroken[0])


def test_a_run_killed_before_its_first_step_evaluates_once(tmp_path, unbroken):
    def fail(batch, drawn):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "align", fail)
    assert_same_rows(train(tmp_path / "align")[1], unbroken[1])


@pytest.mark.parametrize(("moment", "held"), [("within a step", CONFIG.steps), ("between", 3)])
def test_a_run_killed_by_the_system_gives_the_same_run(tmp_path, unbroken, moment, held):
    """A real SIGKILL: nothing gets a chance to tidy up."""
    directory = tmp_path / "align"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(directory), str(held)]
    path = directory / "metrics.csv"
    with subprocess.Popen(command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}) as child:
        deadline = time.time() + 300
        while child.poll() is None and time.time() < deadline:
            if path.exists() and path.read_bytes().count(b"\n") > 4:
                break
            time.sleep(0.005)
        if moment == "within a step":
            pause = random.random() * unbroken[1].metrics().seconds.mean()
            print(f"killed {pause:.3f} s into step 4")  # shown if it fails
            time.sleep(pause)
        child.kill()
    assert child.returncode == -signal.SIGKILL, "it ended by itself"
    assert len(Run(directory, {}, 0, "f" * 16).metrics()) >= 4
    policy, run = train(directory)
    assert_same_rows(run, unbroken[1])
    assert_same_adapter(policy, unbroken[0])


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed after step 5; its checkpoints are those of steps 2 and 4."""
    directory = tmp_path_factory.mktemp("killed") / "align"
    with pytest.raises(KeyboardInterrupt):
        train(directory, monitor=stop_at(5))
    assert checkpoints(directory) == ["step-000002.pt", "step-000004.pt"]
    return directory


def checkpoints(directory):
    return sorted(path.name for path in (directory / "checkpoints").glob("step-*"))


def cut(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    killed, tmp_path, unbroken, capsys, keep
):
    shutil.copytree(killed, tmp_path / "align")
    path = tmp_path / "align" / "checkpoints" / "step-000004.pt"
    cut(path, keep)
    content = path.read_bytes()
    _, run = train(tmp_path / "align")
    printed = capsys.readouterr().out
    assert "set aside as damaged-step-000004.pt" in printed
    assert path.with_name("damaged-step-000004.pt").read_bytes() == content
    assert "[align] goes on after step 2" in printed
    assert_same_rows(run, unbroken[1])


def test_without_a_readable_checkpoint_the_run_starts_anew(killed, tmp_path, unbroken):
    shutil.copytree(killed, tmp_path / "align")
    for path in (tmp_path / "align" / "checkpoints").glob("step-*"):
        cut(path, 0.3)
    assert_same_rows(train(tmp_path / "align")[1], unbroken[1])


def test_a_byte_that_changed_is_damage(killed, tmp_path, capsys):
    """Torch itself does not look at the checksums."""
    shutil.copytree(killed, tmp_path / "align")
    path = tmp_path / "align" / "checkpoints" / "step-000004.pt"
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        tensor = next(entry for entry in archive.infolist() if "/data/" in entry.filename)
        content[content.index(archive.read(tensor))] ^= 1  # and not the padding between
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    train(tmp_path / "align")
    assert "the checksum of " in capsys.readouterr().out


class Unreadable(dict):
    """A type that is not read from a checkpoint: of another version, or made to run code."""


@pytest.mark.parametrize("kind", ["disk", "type"])
def test_a_checkpoint_that_is_not_damaged_stays(killed, tmp_path, monkeypatch, unbroken, kind):
    shutil.copytree(killed, tmp_path / "align")
    path = tmp_path / "align" / "checkpoints" / "step-000004.pt"
    content, read = path.read_bytes(), Path.read_bytes

    def fail(path):
        if path.name == "step-000004.pt":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    if kind == "disk":
        monkeypatch.setattr(Path, "read_bytes", fail)
    else:
        torch.save(Unreadable(torch.load(path)), path)
    message = "checkpoints/step-000004.pt was not read, and left as it is: "
    with pytest.raises(ResultsError, match=message):
        train(tmp_path / "align")
    with pytest.raises(ResultsError, match=message):
        load_adapter(tmp_path / "align", quick_policy())
    monkeypatch.undo()
    assert path.exists()
    path.write_bytes(content)
    assert_same_rows(train(tmp_path / "align")[1], unbroken[1])


def test_the_last_adapter_is_loaded_for_evaluation(unbroken, tmp_path):
    policy = quick_policy()
    assert load_adapter(unbroken[1].directory, policy) == CONFIG.steps
    assert_same_adapter(policy, unbroken[0])
    with pytest.raises(ResultsError, match="align has no checkpoint; remove the folder align"):
        load_adapter(tmp_path / "align", policy)
    for name, content in {"step-000001.pt": b"", "step-000002.pt": b"PK cut short"}.items():
        path = tmp_path / "align" / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        with pytest.raises(ResultsError, match=f"{name} is cut short .*; remove the folder align"):
            load_adapter(tmp_path / "align", policy)


# What stops a run

KEPT = r"The last good checkpoint is that of step 2: .*align/checkpoints/step-000002\.pt\.$"
NONE_YET = r"There is no checkpoint yet\.$"


def test_the_last_checkpoint_is_named_by_step_and_path(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "ROOT", tmp_path)
    directory = tmp_path / "runs" / "cpu" / "policies" / "scalar" / "seed0"
    assert last_checkpoint(directory) == "There is no checkpoint yet."
    (directory / "checkpoints").mkdir(parents=True)
    for name in ("step-000004.pt", "step-000012.pt", ".step-000016.pt.partial"):
        (directory / "checkpoints" / name).touch()
    assert last_checkpoint(directory) == (
        "The last good checkpoint is that of step 12: "
        "runs/cpu/policies/scalar/seed0/checkpoints/step-000012.pt."
    )


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_a_reward_that_is_not_finite_stops_the_run(tmp_path, unbroken, bad):
    calls = []

    def spoiled(batch, drawn):
        calls.append(1)
        rewards = shorter(batch, drawn)
        rewards[0] = bad if len(calls) == 4 else rewards[0]
        return rewards

    with pytest.raises(TrainingStopped, match=r"^\[align\] step 4: reward is .* " + KEPT):
        train(tmp_path / "align", spoiled)
    assert checkpoints(tmp_path / "align") == ["step-000002.pt"], "the last good one is kept"
    assert_same_rows(train(tmp_path / "align")[1], unbroken[1])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, unbroken):
    right, calls = update.reinforce_loss, []

    def spoiled(*args):
        calls.append(1)  # two micro-batches a step
        return right(*args) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(update, "reinforce_loss", spoiled)
    with pytest.raises(TrainingStopped, match=r"^\[align\] step 3: loss is nan.* " + KEPT):
        train(tmp_path / "align")
    assert checkpoints(tmp_path / "align") == ["step-000002.pt"]
    monkeypatch.undo()
    assert_same_rows(train(tmp_path / "align")[1], unbroken[1])


@pytest.mark.parametrize(
    ("limit", "message", "checkpoint"),
    [
        ({"max_kl": 1e-4}, r"step 3: KL .* is above reinforce\.max_kl = 0\.0001; raise", KEPT),
        ({"min_entropy": 99.0}, r"step 1: entropy .*min_entropy = 99\.0: .*collapsed", NONE_YET),
    ],
)
def test_a_runaway_or_collapsed_policy_stops_the_run(tmp_path, limit, message, checkpoint):
    with pytest.raises(TrainingStopped, match=message + ".* " + checkpoint):
        train(tmp_path / "align", **limit)


@pytest.mark.parametrize(("share", "stops"), [(0.099, True), (0.1, False), (math.nan, False)])
def test_a_policy_that_repeats_itself_stops_the_run(tmp_path, share, stops):
    row = dict.fromkeys(("reward", "kl", "loss", "grad_norm"), 0.0)
    row |= {"step": 3, "entropy": 1.0, "completions/distinct_2": share}
    run = Run(tmp_path / "align", {}, 0, "f" * 16)
    if not stops:
        return reinforce._check(row, CONFIG, run)
    message = r"^\[align\] step 3: distinct-2 0\.099 is below reinforce\.min_distinct_2 = 0\.1: "
    with pytest.raises(TrainingStopped, match=message + ".* " + NONE_YET):
        reinforce._check(row, CONFIG, run)


def test_only_a_collapsed_policy_is_below_the_default_floor():
    samples = read_jsonl(RESULTS / "quick/controls/sft_greedy/test/samples.jsonl")[:32]
    greedy = [row["response"] for row in samples]
    floor = ReinforceConfig().min_distinct_2
    assert distinct_n(greedy) > 4 * floor, "the least varied decoding of a sound model"
    longest = max(greedy, key=len)
    assert distinct_n([longest] * 32) < floor / 2, "one answer to every prompt"
    assert distinct_n(["yes " * 40] * 32) < floor / 2


# The KL budget; here the held-out KL is the size of the adapter


def held_out_sizes(run):
    sizes = run.metrics().set_index("step").eval_kl.dropna()
    assert sizes.index.tolist() == [0, 2, 4, 6]
    assert sizes.is_monotonic_increasing, "the tests below need a size that grows"
    return sizes


@pytest.mark.parametrize(
    ("kept", "stopped_at"), [(0, None), (0, 1), (2, None), (2, 1), (2, 3), (4, 5)]
)
def test_a_spent_budget_ends_the_run_with_the_last_policy_within(
    tmp_path, unbroken, kept, stopped_at
):
    sizes = held_out_sizes(unbroken[1])
    options = {"kl_budget": (sizes[kept] + sizes[kept + 2]) / 2, "save_steps": 1}
    if stopped_at:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "align", monitor=stop_at(stopped_at), **options)
    policy, run = train(tmp_path / "align", **options)
    rows = rows_of(unbroken[1])
    assert rows_of(run).equals(rows[rows.step <= kept]), "rows of a policy that was given up"
    assert size_of(policy) == pytest.approx(sizes[kept], rel=1e-5), "the adapter of another step"
    stored = quick_policy()
    assert load_adapter(run.directory, stored) == kept
    assert_same_adapter(stored, policy)
    assert f"at step {kept + 2} is above reinforce.kl_budget" in run.info["ended"]
    assert run.info["ended"].endswith(f"the policy is that of step {kept}")


def test_a_run_killed_while_it_ends_ends_the_same(tmp_path, unbroken, monkeypatch):
    sizes = held_out_sizes(unbroken[1])
    options = {"kl_budget": (sizes[2] + sizes[4]) / 2}
    rewind = Run.rewind

    def killed(run, step):
        rewind(run, step)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "rewind", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "align", **options)
    monkeypatch.undo()
    policy, run = train(tmp_path / "align", **options)
    assert run.metrics().step.tolist() == [0, 1, 2]
    assert size_of(policy) == pytest.approx(sizes[2], rel=1e-5)


def test_a_budget_that_is_not_spent_changes_nothing(tmp_path, unbroken):
    policy, run = train(tmp_path / "align", kl_budget=2 * held_out_sizes(unbroken[1]).max())
    assert_same_rows(run, unbroken[1])
    assert_same_adapter(policy, unbroken[0])
    assert "ended" not in run.info


def hold_at(step):
    def monitor(row, *_):
        if row["step"] == step:
            time.sleep(600)

    return monitor


if __name__ == "__main__":  # the run that is killed
    torch.set_num_threads(1)
    pin(setattr)
    train(Path(sys.argv[1]), monitor=hold_at(int(sys.argv[2])))
