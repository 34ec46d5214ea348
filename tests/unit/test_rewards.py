"""Reward models: scoring, training on groups, and surviving kills and bad numbers."""

import dataclasses
import errno
import os
import pickle
import shutil
import weakref
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import RewardConfig as TrlRewardConfig
from trl import RewardTrainer

from utils.config import PROFILES, RewardConfig
from utils.data.pairs import Group, Response
from utils.experiments.storage import Run
from utils.files import ResultsError
from utils.models import body as models
from utils.models.weights import ModelError
from utils.rewards import model as rewards
from utils.rewards import trainer as reward_trainer
from utils.rewards import training as reward_training
from utils.rewards.losses import expected_rating, reward_from_logits
from utils.rewards.model import RewardModel
from utils.rewards.trainer import GroupCollator, GroupRewardTrainer, pair_set, training_set
from utils.rewards.training import train_reward_model

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


def scored(reward_model, size, columns=None):
    reward_model.batch.size = size
    return reward_model.logits(*(columns or rows()))


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


# Scoring


@pytest.mark.parametrize("kind", ["scalar", "ordinal"])
def test_scores_do_not_depend_on_the_batch(pinned, kind):
    reward_model = stirred(kind)
    alone = scored(reward_model, 1)
    assert alone.shape == (9, 1 if kind == "scalar" else 10)
    assert alone.dtype == torch.float32
    assert alone.std(0).max() > 1e-2, "the rows must differ, or their order is not tested"
    for size in (2, 4, 32):
        together = scored(reward_model, size)
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
        found = scored(reward_model, size, shuffled)
        torch.testing.assert_close(found, expected[list(order)], atol=2e-5, rtol=1e-4)

    check()


def test_scoring_goes_on_with_half_the_batch(pinned, monkeypatch, capsys):
    reward_model = stirred("ordinal")
    expected = reward_model.logits(*rows())
    forward, read = reward_model.model.forward, []

    def small(input_ids, **kwargs):
        read.append(len(input_ids))
        # The second batch of four is one too many: the first was read, and must not count twice.
        if len(input_ids) == 8 or read == [8, 4, 4]:
            out_of_memory()
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(reward_model.model, "forward", small)
    torch.testing.assert_close(scored(reward_model, 8), expected, atol=2e-5, rtol=1e-4)
    assert read == [8, 4, 4, 2, 2, 2, 2, 1]
    assert reward_model.batch.size == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["4", "2"]


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
        outputs=1,
        model=model,
        args=trainer_arguments(tmp_path),
        train_dataset=(dataset := training_set(PAIRS, tokenizer, REWARD)),
        processing_class=tokenizer,
        data_collator=GroupCollator(tokenizer.pad_token_id),
    )
    pairs = pair_set(dataset, REWARD.margin_scale)
    assert sorted(pairs["margin"]) == pytest.approx([0.1, 0.6, 0.7])
    stock = RewardTrainer(
        model=model,
        args=trainer_arguments(tmp_path),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    results = []
    for trainer, batch in ((ours, list(dataset)), (stock, list(pairs))):
        loss = trainer.compute_loss(model.train(), trainer.data_collator(batch))
        gradients = torch.autograd.grad(loss, list(trainable(model).values()))
        trainer.log(logs := {})
        results.append((loss, gradients, logs["accuracy"]))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-4)
    assert all(gradient.abs().max() > 0 for gradient in results[0][1])


@pytest.mark.parametrize(("kind", "labels"), [("scalar", 1), ("ordinal", 10)])
def test_the_trainer_accepts_one_and_ten_labels(pinned, tmp_path, kind, labels):
    reward_model = stirred(kind)
    dataset = training_set(GROUPS[:2], reward_model.tokenizer, REWARD)
    trainer = GroupRewardTrainer(
        reward=REWARD,
        outputs=labels,
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
    dataset = training_set(PAIRS, reward_model.tokenizer, REWARD)
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
    dataset = training_set(PAIRS, reward_model.tokenizer, REWARD)
    batch = GroupCollator(reward_model.tokenizer.pad_token_id)(list(dataset))
    model = reward_model.model.eval()
    with torch.no_grad():
        whole = model(input_ids=batch["input_ids"]).logits
        for rows in (1, 2, 4):
            monkeypatch.setattr(reward_trainer, "ROWS_TOGETHER", rows)
            parts = GroupRewardTrainer._logits(model, batch["input_ids"], batch["lengths"])
            torch.testing.assert_close(parts, whole, atol=2e-5, rtol=1e-4)


def test_the_collator_keeps_each_text_with_its_rating_and_group(tokenizer):
    dataset = list(training_set(GROUPS[:3], tokenizer, REWARD))
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


TIED = [group(0, [5.0, 5.0]), group(1, [5.0, 5.0, 6.0])]


def test_groups_in_which_all_ratings_tie_are_left_out(tokenizer):
    dataset = training_set(TIED, tokenizer, REWARD)
    assert len(dataset) == 1
    batch = GroupCollator(tokenizer.pad_token_id)(list(dataset))
    assert sorted(batch["ratings"].tolist()) == [5.0, 5.0, 6.0]
    assert batch["group"].tolist() == [0, 0, 0]


def test_long_rows_are_left_out_of_training_only_where_a_limit_says_so(tokenizer):
    ids = [len(ids) for row in training_set(TIED, tokenizer, REWARD) for ids in row["ids"]]
    limited = dataclasses.replace(REWARD, train_max_length=max(ids))
    assert len(training_set(TIED, tokenizer, limited)) == 1
    limited = dataclasses.replace(REWARD, train_max_length=min(ids) - 1)
    assert len(training_set(TIED, tokenizer, limited)) == 0


def test_references_can_be_left_out(tokenizer):
    def response(text, rating, source):
        return Response(text, rating, source=source)

    mixed = [response("a", 3.0, "m"), response("b", 5.0, "m"), response("c", 9.0, "reference")]
    tied = [response("a", 3.0, "m"), response("b", 3.0, "m"), response("c", 9.0, "reference")]
    unknown = [response("a", 3.0, None), response("b", 5.0, None)]
    turns = GROUPS[0].prompt
    groups = [
        dataclasses.replace(GROUPS[0], prompt=turns, responses=tuple(responses))
        for responses in (mixed, tied, unknown)
    ]
    everything = training_set(groups, tokenizer, REWARD)
    assert [sorted(row["ratings"]) for row in everything] == [[3, 5, 9], [3, 3, 9], [3, 5]]
    batch = GroupCollator(tokenizer.pad_token_id)(list(everything))
    assert batch["ratings"][batch["reference"]].tolist() == [9, 9]
    samples = dataclasses.replace(REWARD, reference_weight=0.0)
    assert [sorted(row["ratings"]) for row in training_set(groups, tokenizer, samples)] == [
        [3, 5],
        [3, 5],
    ]


# Precision


def test_what_is_trained_stays_in_fp32(tmp_path):
    """The stock trainer makes them bf16 on 4-bit weights, which a T4's loss scaling cannot take."""
    config = dataclasses.replace(PROFILE.model, expand_4bit=False)
    reward_model = RewardModel.fresh("scalar", dataclasses.replace(PROFILE, model=config))
    model, tokenizer = reward_model.model, reward_model.tokenizer
    assert model.is_loaded_in_4bit
    before = {name: p.clone() for name, p in trainable(model).items()}
    GroupRewardTrainer(
        reward=REWARD,
        outputs=1,
        model=model,
        args=trainer_arguments(tmp_path),
        train_dataset=training_set(PAIRS, tokenizer, REWARD),
        processing_class=tokenizer,
        data_collator=GroupCollator(tokenizer.pad_token_id),
    )
    after = trainable(model)
    assert {p.dtype for p in after.values()} == {torch.float32}
    changed = [name for name, p in after.items() if not torch.equal(p, before[name])]
    assert not changed, "rounded on the way"
    rounded = [not torch.equal(p, p.bfloat16().float()) for p in before.values()]
    assert any(rounded), "these values would not show a rounding"


@pytest.mark.parametrize(
    ("kind", "capability", "bf16", "fp16"),
    [
        ("cuda", (7, 5), False, True),
        ("cuda", (8, 0), True, False),
        ("cuda", (9, 0), True, False),
        ("cpu", None, False, False),
    ],
)
def test_autocast_has_the_dtype_of_the_device(monkeypatch, tmp_path, kind, capability, bf16, fp16):
    monkeypatch.setattr(reward_training, "device", lambda: torch.device(kind))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(reward_training, "TrlRewardConfig", lambda **fields: fields)
    arguments = reward_training._trainer_arguments(REWARD, 1, 0, tmp_path, STEPS)
    assert (arguments["bf16"], arguments["fp16"]) == (bf16, fp16)
    assert arguments["use_cpu"] == (kind == "cpu")


def test_scores_do_not_keep_the_autocast_of_training(pinned, run, monkeypatch):
    arguments, fresh, autocast = reward_training._trainer_arguments, RewardModel.fresh, []

    def watched(kind, profile):
        reward_model = fresh(kind, profile)
        reward_model.model.get_base_model().register_forward_pre_hook(
            lambda *_: autocast.append(torch.is_autocast_enabled("cpu"))
        )
        return reward_model

    def as_on_cuda(*given):
        return dataclasses.replace(arguments(*given), bf16=True)

    monkeypatch.setattr(models, "compute_dtype", lambda where: torch.bfloat16)
    monkeypatch.setattr(reward_training, "_trainer_arguments", as_on_cuda)
    monkeypatch.setattr(RewardModel, "fresh", watched)
    trained = train_reward_model("scalar", PROFILE, GROUPS[:4], run)
    assert autocast, "no pass was seen"
    assert all(autocast), "training is in autocast"
    autocast.clear()
    trained.logits(*rows())
    assert autocast == [False]


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


@pytest.mark.parametrize("kind", ["scalar", "ordinal"])
def test_weights_trained_in_full_are_saved_and_loaded(kind, run):
    """In bf16, as they are read: what was trained in fp32 is rounded once, not at each load."""
    profile = dataclasses.replace(
        PROFILE,
        model=dataclasses.replace(PROFILE.model, quantization="none"),
        reward=dataclasses.replace(REWARD, lora_r=0),
    )
    trained = train_reward_model(kind, profile, GROUPS, run)
    loaded = RewardModel.load(kind, profile, run.directory)
    assert torch.equal(loaded.logits(*rows()), trained.logits(*rows()))
    dtypes = [{n: p.dtype for n, p in m.model.named_parameters()} for m in (loaded, trained)]
    assert dtypes[0] == dtypes[1]
    assert dtypes[0]["score.weight"] == torch.float32
    fresh = RewardModel.fresh(kind, profile)
    assert not torch.allclose(fresh.logits(*rows()), trained.logits(*rows()))
    last = reward_training._last_good_checkpoint(run.directory / "checkpoints")
    assert last.endswith(f"-{STEPS}"), "a killed run would not go on"
    (run.directory / "adapter" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"^rm: the saved adapter cannot be read"):
        RewardModel.load(kind, profile, run.directory)


def test_training_learns(pinned, run):
    profile = dataclasses.replace(PROFILE, reward=dataclasses.replace(REWARD, epochs=2.0))
    train_reward_model("ordinal", profile, GROUPS, run)
    metrics = run.metrics()
    assert metrics.loss[-3:].mean() < metrics.loss[:3].mean() - 0.05


UNEQUAL = [group(n, [8.0, 2.0, 5.0] if n % 2 else [7.0, 3.0]) for n in range(2 * STEPS)]


def test_the_micro_batch_does_not_change_the_steps(pinned, tmp_path):
    """Groups of three pairs and of one: a mean of means would weigh their pairs differently."""
    found = []
    for micro in (2, 1):
        reward = dataclasses.replace(REWARD, micro_groups=micro)
        profile = dataclasses.replace(PROFILE, reward=reward)
        run = Run(tmp_path / str(micro), {}, seed=0, data_fingerprint="f" * 16)
        trained = train_reward_model("ordinal", profile, UNEQUAL, run)
        found.append((run.metrics().drop(columns="seconds"), trained.logits(*rows())))
    (whole, expected), (cut, logits) = found
    pd.testing.assert_frame_equal(cut, whole, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("step", "checkpoint"), [(1, 0), (2, 0), (4, 2)])
def test_training_goes_on_with_half_the_groups(
    pinned, tmp_path, monkeypatch, capsys, step, checkpoint
):
    reward = dataclasses.replace(REWARD, micro_groups=2, save_steps=2)
    profile = dataclasses.replace(PROFILE, reward=reward)
    runs = [Run(tmp_path / n, {}, seed=0, data_fingerprint="f" * 16) for n in ("whole", "rm")]
    expected = train_reward_model("scalar", profile, UNEQUAL, runs[0])
    capsys.readouterr()
    loss, fresh, sizes, models_made = GroupRewardTrainer.compute_loss, RewardModel.fresh, [], []

    def tight(self, model, inputs, *args, **kwargs):
        size = int(inputs["group"].max()) + 1
        sizes.append(size)
        if size == 2 and self.state.global_step == step - 1:
            out_of_memory()
        return loss(self, model, inputs, *args, **kwargs)

    def only_one(kind, profile):
        assert not any(made() for made in models_made), "the failed attempt is still in memory"
        reward_model = fresh(kind, profile)
        models_made.append(weakref.ref(reward_model.model))
        return reward_model

    monkeypatch.setattr(GroupRewardTrainer, "compute_loss", tight)
    monkeypatch.setattr(RewardModel, "fresh", only_one)
    trained = train_reward_model("scalar", profile, UNEQUAL, runs[1])
    assert sizes == [2] * step + [1] * 2 * (STEPS - checkpoint), "half the groups, twice the passes"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[memory]")]
    assert lines == ["[memory] rm, groups in one pass: out of memory, going on with 1"]
    whole, found = (run.metrics().drop(columns="seconds") for run in runs)
    assert list(found.step) == [1, 2, 3, 4]
    pd.testing.assert_frame_equal(found, whole, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(trained.logits(*rows()), expected.logits(*rows()), atol=1e-4, rtol=0)


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
    folder = killed.directory / "checkpoints"
    if cut_short:
        path = folder / "checkpoint-2" / "adapter_model.safetensors"
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
    left = ["checkpoint-3", "checkpoint-4", *["damaged-checkpoint-2"] * cut_short]
    assert sorted(path.name for path in folder.iterdir()) == left, "old ones go, damaged ones stay"


CHECKPOINT_FILES = (
    "adapter_model.safetensors optimizer.pt scheduler.pt rng_state.pth trainer_state.json"
)


@pytest.mark.parametrize("name", CHECKPOINT_FILES.split())
@pytest.mark.parametrize("keep", [0.0, 0.5, None])
def test_a_checkpoint_cut_short_is_set_aside(killed, capsys, name, keep):
    folder = killed.directory / "checkpoints"
    path = folder / "checkpoint-2" / name
    content = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(content[: int(len(content) * keep)])
    left = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    last = reward_training._last_good_checkpoint(folder)
    assert last == str(folder / "checkpoint-1")
    assert "set aside as damaged-checkpoint-2" in capsys.readouterr().out
    assert not (folder / "checkpoint-2").exists()
    aside = folder / "damaged-checkpoint-2"
    assert {p.name: p.read_bytes() for p in aside.iterdir()} == left, "its bytes are kept"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("name", CHECKPOINT_FILES.split())
def test_a_disk_that_does_not_answer_costs_no_checkpoint(killed, monkeypatch, name, number):
    folder, read = killed.directory / "checkpoints", Path.read_bytes

    def fail(path):
        if path.name == name:
            raise OSError(number, os.strerror(number))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(ResultsError, match=f"checkpoint-2/{name} was not read, and left as it is"):
        reward_training._last_good_checkpoint(folder)
    monkeypatch.undo()
    assert reward_training._last_good_checkpoint(folder) == str(folder / "checkpoint-2")


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_no_pickle_of_a_checkpoint_is_run(killed, tmp_path, monkeypatch, name):
    path = killed.directory / "checkpoints" / "checkpoint-2" / name
    state = torch.load(path, weights_only=False)
    torch.save({**state, "more": Malicious(tmp_path / "made")}, path)
    with pytest.raises(ResultsError, match=f"{name} was not read, and left as it is"):
        train_reward_model("scalar", PROFILE, GROUPS, killed)
    # Nor does the trainer itself run it.
    monkeypatch.setattr(reward_training, "_last_good_checkpoint", lambda _: str(path.parent))
    with pytest.raises(pickle.UnpicklingError):
        train_reward_model("scalar", PROFILE, GROUPS, killed)
    assert not (tmp_path / "made").exists()
    torch.load(path, weights_only=False)["more"].close()
    assert (tmp_path / "made").exists(), "it would have been run"


def test_a_bare_pickle_is_no_checkpoint(killed, tmp_path):
    folder = killed.directory / "checkpoints"
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(
        pickle.dumps(Malicious(tmp_path / "made"))
    )
    assert reward_training._last_good_checkpoint(folder) == str(folder / "checkpoint-1")
    assert not (tmp_path / "made").exists()


def test_no_checkpoint_at_all(tmp_path):
    assert reward_training._last_good_checkpoint(tmp_path / "checkpoints") is None
    (tmp_path / "checkpoints").mkdir()
    assert reward_training._last_good_checkpoint(tmp_path / "checkpoints") is None


@pytest.mark.parametrize(("bad", "step"), [(float("inf"), 1), (float("nan"), 3)])
def test_a_loss_that_is_not_finite_stops_the_run(run, monkeypatch, bad, step):
    loss, calls = reward_trainer.reward_loss, []

    def spoiled(*args):
        calls.append(1)  # two micro batches a step
        return loss(*args) * (bad if len(calls) > 2 * (step - 1) else 1.0)

    monkeypatch.setattr(reward_trainer, "reward_loss", spoiled)
    with pytest.raises(FloatingPointError, match=rf"loss of step {step} .*learning_rate"):
        train_reward_model("scalar", PROFILE, GROUPS, run)
    last = reward_training._last_good_checkpoint(run.directory / "checkpoints")
    assert (last or "-0").endswith(f"-{step - 1}"), "the last good checkpoint is kept"
