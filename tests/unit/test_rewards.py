"""Reward models: scoring, training on groups, and surviving kills and bad numbers."""

import dataclasses
import shutil

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import RewardConfig as TrlRewardConfig
from trl import RewardTrainer

from utils import models, reward_training, rewards
from utils.config import RewardConfig
from utils.data import Group, Response
from utils.losses import expected_rating
from utils.profiles import PROFILES
from utils.results import Run
from utils.reward_training import (
    GroupCollator,
    GroupRewardTrainer,
    train_reward_model,
    training_set,
)
from utils.rewards import RewardModel, reward_from_logits
from utils.weights import ModelError, encode_dialogue

PROMPT = ({"role": "user", "content": "Name a colour."},)
REWARD = RewardConfig(
    groups_per_step=2, micro_groups=1, first_layer=1, lora_r=4, save_steps=1, learning_rate=1e-2
)
PROFILE = dataclasses.replace(PROFILES["smoke"], reward=REWARD)
STEPS = 4
TEXTS = ["Blue.", "I like red, green, and a little bit of yellow.", "x" * 30, "A", "No idea " * 9]


def group(number, ratings):
    responses = tuple(
        Response(f"{TEXTS[(i + number) % 5]} {number}", r, finished=i != 1)
        for i, r in enumerate(ratings)
    )
    return Group(f"p{number}", "train", None, PROMPT, responses)


GROUPS = [group(n, [8.0, 2.0 + n % 3, 5.0]) for n in range(2 * STEPS)]
PAIRS = [group(n, ratings) for n, ratings in enumerate([(9.0, 2.0), (3.0, 4.0), (7.0, 1.0)])]


@pytest.fixture(scope="module", autouse=True)
def _lean(tokenizer):
    """Load the tokenizer once and write no model cards: most of the time of a tiny training."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (models, rewards):
            patch.setattr(module, "load_tokenizer", lambda config: tokenizer)
        patch.setattr(GroupRewardTrainer, "create_model_card", lambda *_, **__: None)
        yield


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "rm", {}, seed=0, data_fingerprint="f" * 16)


@pytest.fixture
def pinned(exact, monkeypatch):
    """In fp32 on the CPU, as `exact`, for training too."""
    for module in (rewards, reward_training):
        monkeypatch.setattr(module, "device", lambda: torch.device("cpu"))


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def stirred(kind):
    """A reward model whose adapters are no longer the identity."""
    reward_model = RewardModel.fresh(kind, PROFILE)
    torch.manual_seed(1)
    for name, parameter in trainable(reward_model.model).items():
        torch.nn.init.normal_(parameter, std=0.5 if "score" in name else 0.1)
    return reward_model


def rows(count=9):
    texts = [TEXTS[i % 5] * (1 + i // 5) for i in range(count)]
    return [PROMPT] * count, texts, [i % 2 == 0 for i in range(count)]


# Scoring


@pytest.mark.parametrize("kind", ["scalar", "ordinal"])
def test_scores_do_not_depend_on_the_batch(pinned, kind):
    reward_model = stirred(kind)
    alone = reward_model.logits(*rows(), batch_size=1)
    assert alone.shape == (9, 1 if kind == "scalar" else 10)
    assert alone.dtype == torch.float32
    assert alone.std(0).max() > 1e-2, "the rows must differ, or their order is not tested"
    for size in (2, 4, 32):
        together = reward_model.logits(*rows(), batch_size=size)
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)
    read = alone[:, 0] if kind == "scalar" else expected_rating(alone)
    torch.testing.assert_close(reward_model.score(*rows()), read, atol=1e-4, rtol=1e-4)


def test_scores_follow_the_order_of_the_rows(pinned):
    reward_model = stirred("ordinal")
    expected = reward_model.logits(*rows())

    @settings(max_examples=10, deadline=None)
    @given(order=st.permutations(range(9)), size=st.integers(1, 9))
    def check(order, size):
        shuffled = [[column[i] for i in order] for column in rows()]
        found = reward_model.logits(*shuffled, batch_size=size)
        torch.testing.assert_close(found, expected[list(order)], atol=2e-5, rtol=1e-4)

    check()


def test_an_ended_answer_scores_otherwise_than_a_cut_one(pinned):
    reward_model = stirred("scalar")
    ended, cut = reward_model.score([PROMPT] * 2, ["Blue."] * 2, [True, False])
    assert abs(ended - cut) > 1e-4


def test_rewards_are_read_from_the_logits():
    assert reward_from_logits(torch.tensor([[2.5], [-1.0]])).tolist() == [2.5, -1.0]
    assert reward_from_logits(torch.zeros(1, 10)).item() == pytest.approx(5.5)


# The trainer against trl's own


def trainer_arguments(folder):
    return TrlRewardConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        max_length=None,
        report_to="none",
        gradient_checkpointing=False,
        remove_unused_columns=False,
        center_rewards_coefficient=REWARD.center_rewards_coefficient,
    )


def test_groups_of_two_equal_trls_pairs(pinned, tmp_path):
    reward_model = stirred("scalar")
    tokenizer, model = reward_model.tokenizer, reward_model.model
    ours = GroupRewardTrainer(
        reward=REWARD,
        kind="scalar",
        model=model,
        args=trainer_arguments(tmp_path),
        train_dataset=(dataset := training_set(PAIRS, tokenizer)),
        processing_class=tokenizer,
        data_collator=GroupCollator(tokenizer.pad_token_id),
    )
    pairs = []
    for pair in PAIRS:
        chosen, rejected = sorted(pair.responses, key=lambda r: -r.rating)
        ids = [encode_dialogue(tokenizer, PROMPT, r.text, r.finished) for r in (chosen, rejected)]
        margin = REWARD.margin_scale * (chosen.rating - rejected.rating)
        pairs.append({"chosen_ids": ids[0], "rejected_ids": ids[1], "margin": margin})
    stock = RewardTrainer(
        model=model,
        args=trainer_arguments(tmp_path),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    results = []
    for trainer, batch in ((ours, list(dataset)), (stock, pairs)):
        loss = trainer.compute_loss(model.train(), trainer.data_collator(batch))
        gradients = torch.autograd.grad(loss, list(trainable(model).values()))
        results.append((loss, gradients, trainer._metrics["train"]["accuracy"]))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-4)
    assert all(gradient.abs().max() > 0 for gradient in results[0][1])


@pytest.mark.parametrize(("kind", "labels"), [("scalar", 1), ("ordinal", 10)])
def test_the_trainer_accepts_one_and_ten_labels(pinned, tmp_path, kind, labels):
    reward_model = stirred(kind)
    dataset = training_set(GROUPS[:2], reward_model.tokenizer)
    trainer = GroupRewardTrainer(
        reward=REWARD,
        kind=kind,
        model=reward_model.model,
        args=trainer_arguments(tmp_path),
        train_dataset=dataset,
        processing_class=reward_model.tokenizer,
        data_collator=GroupCollator(reward_model.tokenizer.pad_token_id),
    )
    assert reward_model.model.config.num_labels == labels
    batch = trainer.data_collator(list(dataset))
    loss, logits = trainer.compute_loss(reward_model.model, batch, return_outputs=True)
    assert logits.shape == (6, labels)
    assert loss.isfinite()


def test_training_reads_what_scoring_reads(pinned):
    """The two ways to the same text give the same reward."""
    reward_model = stirred("ordinal")
    dataset = training_set(PAIRS, reward_model.tokenizer)
    batch = GroupCollator(reward_model.tokenizer.pad_token_id)(list(dataset))
    with torch.no_grad():
        trained = reward_model.model.eval()(input_ids=batch["input_ids"]).logits
    responses = [r for g in PAIRS for r in g.responses]
    scored = reward_model.logits(
        [PROMPT] * 6, [r.text for r in responses], [r.finished for r in responses]
    )
    texts = [ids for row in dataset for ids in row["ids"]]
    order = sorted(range(6), key=lambda index: len(texts[index]))  # as the collator sorts
    torch.testing.assert_close(trained, scored[order], atol=2e-5, rtol=1e-4)


def test_a_batch_read_a_few_rows_at_a_time_gives_the_same_logits(pinned, monkeypatch):
    """Cutting each few rows to their longest must lose no token."""
    reward_model = stirred("ordinal")
    dataset = training_set(PAIRS, reward_model.tokenizer)
    batch = GroupCollator(reward_model.tokenizer.pad_token_id)(list(dataset))
    model = reward_model.model.eval()
    with torch.no_grad():
        whole = model(input_ids=batch["input_ids"]).logits
        for rows in (1, 2, 4):
            monkeypatch.setattr(reward_training, "ROWS_TOGETHER", rows)
            parts = GroupRewardTrainer._logits(model, batch["input_ids"], batch["lengths"])
            torch.testing.assert_close(parts, whole, atol=2e-5, rtol=1e-4)


def test_the_collator_keeps_each_text_with_its_rating_and_group(tokenizer):
    dataset = list(training_set(GROUPS[:3], tokenizer))
    batch = GroupCollator(tokenizer.pad_token_id)(dataset)
    expected = {
        (tuple(ids), rating, number)
        for number, row in enumerate(dataset)
        for ids, rating in zip(row["ids"], row["ratings"], strict=True)
    }
    found = {
        (tuple(ids[:length].tolist()), rating.item(), number.item())
        for ids, length, rating, number in zip(
            batch["input_ids"], batch["lengths"], batch["ratings"], batch["group"], strict=True
        )
    }
    assert found == expected
    assert batch["lengths"].tolist() == sorted(batch["lengths"].tolist())


def test_groups_in_which_all_ratings_tie_are_left_out(tokenizer):
    dataset = training_set([group(0, [5.0, 5.0]), group(1, [5.0, 5.0, 6.0])], tokenizer)
    assert len(dataset) == 1
    batch = GroupCollator(tokenizer.pad_token_id)(list(dataset))
    assert sorted(batch["ratings"].tolist()) == [5.0, 5.0, 6.0]
    assert batch["group"].tolist() == [0, 0, 0]


# Training


@pytest.mark.parametrize("kind", ["scalar", "ordinal"])
def test_training_moves_adapters_and_head_alone(run, kind, capsys):
    # Three steps: the warm-up starts at a rate of 0, then B leaves 0, then A has a gradient.
    before = {n: p.clone() for n, p in RewardModel.fresh(kind, PROFILE).model.named_parameters()}
    trained = train_reward_model(kind, PROFILE, GROUPS[:6], run)
    (line,) = capsys.readouterr().out.splitlines()  # and none of the trainer's own
    assert line.startswith("[rm] step 3/3 loss ")
    after = dict(trained.model.named_parameters())
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert moved == set(trainable(trained.model)), "adapters and head move, the body does not"
    assert list(run.metrics().step) == [1, 2, 3]
    loaded = RewardModel.load(kind, PROFILE, run.directory)
    assert torch.equal(loaded.logits(*rows()), trained.logits(*rows()))
    fresh = RewardModel.fresh(kind, PROFILE)
    assert not torch.allclose(fresh.logits(*rows()), trained.logits(*rows()))


def test_training_learns(pinned, run):
    profile = dataclasses.replace(PROFILE, reward=dataclasses.replace(REWARD, epochs=2.0))
    train_reward_model("ordinal", profile, GROUPS, run)
    metrics = run.metrics()
    assert metrics.loss[-3:].mean() < metrics.loss[:3].mean() - 0.05


def test_an_unreadable_adapter_names_its_run(run):
    RewardModel.fresh("scalar", PROFILE).save(run.directory)
    path = run.directory / "adapter" / "adapter_model.safetensors"
    content = path.read_bytes()
    for left in (content[:200], content[:-1], b"", None):
        path.unlink()
        if left is not None:
            path.write_bytes(left)
        with pytest.raises(ModelError, match=r"^rm: the saved adapter cannot be read"):
            RewardModel.load("scalar", PROFILE, run.directory)


# Kills and bad numbers


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("unbroken") / "rm", {}, seed=0, data_fingerprint="f" * 16)
    return run, train_reward_model("scalar", PROFILE, GROUPS, run)


@pytest.fixture(scope="module")
def killed_folder(tmp_path_factory):
    """A run that was killed right after it logged step 3; its last checkpoint is that of step 2."""
    run = Run(tmp_path_factory.mktemp("killed") / "rm", {}, seed=0, data_fingerprint="f" * 16)
    log = Run.log

    def log_and_die(self, row):
        log(self, row)
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log_and_die)
        with pytest.raises(KeyboardInterrupt):
            train_reward_model("scalar", PROFILE, GROUPS, run)
    assert list(run.metrics().step) == [1, 2, 3]
    names = sorted(p.name for p in (run.directory / "checkpoints").glob("checkpoint-*"))
    assert names == ["checkpoint-1", "checkpoint-2"]
    return run.directory


@pytest.fixture
def killed(killed_folder, tmp_path):
    shutil.copytree(killed_folder, tmp_path / "rm")
    return Run(tmp_path / "rm", {}, seed=0, data_fingerprint="f" * 16)


@pytest.mark.parametrize(("cut_short", "steps"), [(False, [3, 4]), (True, [2, 3, 4])])
def test_a_killed_run_gives_the_same_rows(killed, unbroken, monkeypatch, cut_short, steps):
    if cut_short:
        path = killed.directory / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:100])
    run, expected = unbroken
    log, logged = Run.log, []
    monkeypatch.setattr(Run, "log", lambda self, row: (logged.append(row["step"]), log(self, row)))
    resumed = train_reward_model("scalar", PROFILE, GROUPS, killed)
    assert logged == steps, "training must go on from the last complete checkpoint"
    assert list(killed.metrics().step) == [1, 2, 3, 4]
    found, whole = (r.metrics().drop(columns="seconds") for r in (killed, run))
    assert found.equals(whole), "a resumed run differs from an unbroken one"
    assert torch.equal(resumed.logits(*rows()), expected.logits(*rows()))


CHECKPOINT_FILES = (
    "adapter_model.safetensors optimizer.pt scheduler.pt rng_state.pth trainer_state.json"
)


@pytest.mark.parametrize("name", CHECKPOINT_FILES.split())
@pytest.mark.parametrize("keep", [0.0, 0.5, None])
def test_a_checkpoint_cut_short_is_removed(killed, capsys, name, keep):
    folder = killed.directory / "checkpoints"
    path = folder / "checkpoint-2" / name
    content = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(content[: int(len(content) * keep)])
    last = reward_training._last_good_checkpoint(folder)
    assert last == str(folder / "checkpoint-1")
    assert "[rm] checkpoint-2 is incomplete, removed" in capsys.readouterr().out
    assert not (folder / "checkpoint-2").exists()


def test_no_checkpoint_at_all(tmp_path):
    assert reward_training._last_good_checkpoint(tmp_path / "checkpoints") is None
    (tmp_path / "checkpoints").mkdir()
    assert reward_training._last_good_checkpoint(tmp_path / "checkpoints") is None


@pytest.mark.parametrize(("bad", "step"), [(float("inf"), 1), (float("nan"), 3)])
def test_a_loss_that_is_not_finite_stops_the_run(run, monkeypatch, bad, step):
    loss, calls = reward_training.bradley_terry_loss, []

    def spoiled(*args):
        calls.append(1)  # two micro batches a step
        return loss(*args) * (bad if len(calls) > 2 * (step - 1) else 1.0)

    monkeypatch.setattr(reward_training, "bradley_terry_loss", spoiled)
    with pytest.raises(FloatingPointError, match=rf"loss of step {step} .*learning_rate"):
        train_reward_model("scalar", PROFILE, GROUPS, run)
    last = reward_training._last_good_checkpoint(run.directory / "checkpoints")
    assert (last or "-0").endswith(f"-{step - 1}"), "the last good checkpoint is kept"
