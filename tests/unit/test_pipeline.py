"""The stages: made on demand, reused, rebuilt when what shaped them changes, and continued."""

import shutil

import pandas as pd
import pytest
import torch

from utils import config
from utils.config import load_profile
from utils.experiments import pipeline
from utils.experiments.pipeline import (
    align_run,
    align_stage,
    before_and_after,
    prepared_data,
    reward_stage,
    sft_stage,
)
from utils.files import read_json, read_jsonl
from utils.models import body as models
from utils.models.weights import ModelError
from utils.reinforce import sampling as rollout
from utils.rewards import model as rewards
from utils.rewards import training as reward_training
from utils.rewards.training import GroupRewardTrainer

CACHED = (prepared_data, reward_stage, sft_stage)
MODULES = (models, rollout, rewards, reward_training)
# Few prompts and a rate that shows: what is tested here is which stage runs.
FAST = {"reinforce.learning_rate": 3e-2, "data.train_prompts": 4, "data.test_prompts": 2}


def profile(**changes):
    return load_profile("smoke", FAST | {k.replace("__", "."): v for k, v in changes.items()})


def forget():
    """Do as a new process would: keep what is on disk alone."""
    for function in CACHED:
        function.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def _pinned(tokenizer):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("REPORT_PROFILE", raising=False)
        patch.setattr(models, "compute_dtype", lambda where: torch.float32)
        for module in MODULES:
            patch.setattr(module, "device", lambda: torch.device("cpu"))
        for module in (models, rewards, pipeline):
            patch.setattr(module, "load_tokenizer", lambda config: tokenizer)
        patch.setattr(GroupRewardTrainer, "create_model_card", lambda *_, **__: None)
        yield
    forget()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder in which every stage has run, by asking for the last one alone."""
    root = tmp_path_factory.mktemp("built")
    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "ROOT", root)
        align_stage("scalar", profile())
    return root


@pytest.fixture
def folder(built, tmp_path, monkeypatch):
    """A copy of it, as a new process finds it."""
    shutil.copytree(built / "runs", tmp_path / "runs")
    monkeypatch.setattr(config, "ROOT", tmp_path)
    forget()
    return tmp_path / "runs" / "smoke"


@pytest.fixture
def untrained(folder, monkeypatch):
    """The same without the aligned policy."""
    shutil.rmtree(folder / "policies/scalar/seed0")
    return folder


def forbid(monkeypatch, *names):
    for name in names:
        monkeypatch.setattr(pipeline, name, lambda *_, name=name: pytest.fail(f"{name} ran again"))


def test_the_last_stage_makes_those_before_it(built):
    folder = built / "runs" / "smoke"
    stages = {
        "reward_models/scalar/seed0",
        "controls/sft_training_prompts",
        "policies/scalar/seed0",
    }
    runs = {path.parent.relative_to(folder).as_posix() for path in folder.rglob("run.json")}
    assert runs == stages
    infos = {name: read_json(folder / name / "run.json") for name in stages}
    assert {info["status"] for info in infos.values()} == {"finished"}
    assert {"accuracy", "nll"} <= set(infos["reward_models/scalar/seed0"]["metrics"])
    assert infos["policies/scalar/seed0"]["reward_std"] > 0
    assert 0 <= infos["policies/scalar/seed0"]["clipped_steps"] <= 1
    assert len(pd.read_csv(folder / "policies/scalar/seed0" / "metrics.csv")) == 4


def test_the_reward_is_in_sft_standard_deviations(folder):
    reward_model, _ = reward_stage("scalar", profile())
    rows = read_jsonl(folder / "controls/sft_training_prompts" / "samples.jsonl")
    messages = {p.id: p.messages for p in prepared_data(profile()).prompts("train")}
    values = reward_model.score(
        [messages[row["prompt_id"]] for row in rows],
        [row["response"] for row in rows],
        [row["finished"] for row in rows],
    )
    info = read_json(folder / "policies/scalar/seed0" / "run.json")
    assert info["reward_mean"] == pytest.approx(values.mean().item(), rel=1e-4)
    assert info["reward_std"] == pytest.approx(values.std().item(), rel=1e-4)


def test_training_and_held_out_rewards_have_that_unit(untrained):
    seen = []

    def monitor(row, batch, drawn, rewards):
        seen.append((batch, drawn, rewards))

    policy, tokenizer, run = align_stage("scalar", profile(), monitor)
    reward_model, info = reward_stage("scalar", profile())[0], run.info
    for batch, drawn, found in seen:
        raw = reward_model.score([p.messages for p in batch], drawn.texts, drawn.finished)
        torch.testing.assert_close(found, (raw - info["reward_mean"]) / info["reward_std"])
    prompts, temperature = prepared_data(profile()).prompts("validation"), 0.7
    arguments = (policy, tokenizer, prompts, profile(), temperature, {"scalar": reward_model})
    raw = pipeline.evaluate_policy(*arguments).reward_scalar.mean()
    expected = (raw - info["reward_mean"]) / info["reward_std"]
    assert run.metrics().eval_reward.iloc[-1] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_finished_run_is_read_without_its_policy(folder, monkeypatch):
    forbid(monkeypatch, "load_sft", "align_policy")
    assert align_run("scalar", profile()).metrics()["eval_reward"].notna().any()


def test_finished_stages_are_reused(folder, monkeypatch, capsys):
    forbid(monkeypatch, "train_reward_model", "align_policy", "evaluate_policy", "try_model")
    policy, _, _ = align_stage("scalar", profile())
    reward_stage("scalar", profile())
    sft_stage(profile())
    lines = capsys.readouterr().out.splitlines()
    for name in (
        "policies/scalar/seed0",
        "reward_models/scalar/seed0",
        "controls/sft_training_prompts",
    ):
        (line,) = [line for line in lines if line.startswith(f"[{name}] ")]
        assert line.startswith(f"[{name}] reuse: finished ")
    factors = [p for name, p in policy.named_parameters() if "lora_B" in name]
    assert all(factor.abs().max() > 0 for factor in factors), "the trained adapter was not loaded"
    reward_stage("scalar", profile())
    assert capsys.readouterr().out == "", "within one process nothing is read twice"


def test_a_reused_reward_model_scores_as_the_trained_one(untrained, tmp_path):
    texts = ([({"role": "user", "content": "Hi"},)] * 2, ["Hello.", "No."], [True, False])
    loaded = reward_stage("scalar", profile())[0].score(*texts)
    shutil.rmtree(untrained)
    forget()
    trained = reward_stage("scalar", profile())[0].score(*texts)
    assert torch.equal(loaded, trained)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"reward__lora_r": 2}, "reward.lora_r: was 4, now 2"),
        ({"reward__learning_rate": 1e-3}, "reward.learning_rate: was 0.0003, now 0.001"),
        ({"data__test_prompts": 3}, "data.test_prompts: was 2, now 3"),
    ],
)
def test_a_field_that_shapes_a_stage_rebuilds_it(untrained, capsys, change, line):
    before = (untrained / "reward_models/scalar/seed0" / "run.json").read_bytes()
    reward_stage("scalar", profile(**change))
    out = capsys.readouterr().out
    assert f"[reward_models/scalar/seed0] {line}\n" in out
    assert (
        "[reward_models/scalar/seed0] the configuration differs: kept aside, starting anew\n" in out
    )
    (aside,) = untrained.glob("reward_models/scalar/seed0@*")
    assert (aside / "run.json").read_bytes() == before, "nothing is lost"
    assert read_json(untrained / "reward_models/scalar/seed0" / "run.json")["status"] == "finished"


@pytest.mark.parametrize(
    "change",
    [{"reinforce__steps": 9}, {"reinforce__baseline": "ema"}, {"reinforce__beta": 0.5}],
)
def test_a_field_that_does_not_shape_a_stage_leaves_it(folder, monkeypatch, capsys, change):
    forbid(monkeypatch, "train_reward_model")
    reward_stage("scalar", profile(**change))
    assert capsys.readouterr().out.startswith("[reward_models/scalar/seed0] reuse: ")


@pytest.mark.parametrize(("kind", "seed"), [("ordinal", 0), ("scalar", 1)])
def test_kinds_and_seeds_have_stages_of_their_own(folder, capsys, kind, seed):
    _, run = reward_stage(kind, profile(seed=seed))
    assert run.directory == folder / "reward_models" / kind / f"seed{seed}"
    assert "reuse" not in capsys.readouterr().out
    assert (folder / "reward_models/scalar/seed0" / "run.json").exists()


def test_a_model_that_fails_its_first_try_is_not_trained(folder, monkeypatch):
    def refuse(*_):
        raise ModelError("does not suit")

    monkeypatch.setattr(pipeline, "try_model", refuse)
    forbid(monkeypatch, "train_reward_model")
    with pytest.raises(ModelError, match="does not suit"):
        reward_stage("ordinal", profile())


@pytest.mark.parametrize("step", [1, 2, 3])
def test_an_interrupted_alignment_is_continued(built, untrained, capsys, step):
    seen = []

    def monitor(row, *_):
        seen.append(row["step"])
        if seen == list(range(1, step + 1)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        align_stage("scalar", profile(), monitor)
    assert read_json(untrained / "policies/scalar/seed0" / "run.json")["status"] != "finished"
    capsys.readouterr()
    forget()
    align_stage("scalar", profile(), monitor)
    out = capsys.readouterr().out
    assert "[policies/scalar/seed0] unfinished: going on from its last checkpoint\n" in out
    assert f"[policies/scalar/seed0] goes on after step {step}\n" in out
    assert seen == [1, 2, 3], "no step was made twice"
    found, whole = (
        pd.read_csv(path / "policies/scalar/seed0" / "metrics.csv").drop(columns="seconds")
        for path in (untrained, built / "runs" / "smoke")
    )
    assert found.equals(whole), "a continued run differs from an unbroken one"
    assert read_json(untrained / "policies/scalar/seed0" / "run.json")["status"] == "finished"


def test_before_and_after(folder):
    policy, tokenizer, _ = align_stage("scalar", profile())
    table = before_and_after("scalar", profile(), policy, tokenizer, "test", 2)
    assert list(table) == ["prompt", "before", "after", "reward_before", "reward_after"]
    assert len(table) == 2
    fresh, _ = pipeline.load_sft(profile())
    sft = before_and_after("scalar", profile(), fresh, tokenizer, "test", 2)
    assert table.before.tolist() == sft.before.tolist() == sft.after.tolist()
    assert (table.before != table.after).any(), "the adapter took no part"
    torch.testing.assert_close(
        torch.tensor(table.reward_before), torch.tensor(sft.reward_before), atol=1e-4, rtol=1e-4
    )
    same = table.before == table.after
    assert (table.reward_before[same] == table.reward_after[same]).all()
