"""The arms of the study, the judge's folds, and models by name, with a tiny model."""

import dataclasses
import gzip
import hashlib
import json

import pandas as pd
import pytest
import torch

from utils.arms.rewards import ARMS, HEADLINE_SEEDS, arm_profile
from utils.config import PROFILES, RewardConfig, load_profile
from utils.experiments import judge, published, study
from utils.experiments.judge import member_data
from utils.experiments.pipeline import prepared_data
from utils.files import ResultsError
from utils.rewards.ensemble import FOLDS, Judge, Member, judge_folds, prompt_key

ASK = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Arms on the profile `smoke`, runs and models in a temporary folder."""
    for module in (study, judge, published):
        monkeypatch.setattr(
            module, "arm_profile", lambda name, seed: load_profile("smoke", {}, seed)
        )
    monkeypatch.setattr("utils.experiments.pipeline.runs_dir", lambda profile: tmp_path / "runs")
    monkeypatch.setattr(published, "runs_dir", lambda profile: tmp_path / "runs")
    monkeypatch.setattr(published, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(published, "MODELS", tmp_path / "results" / "models")
    monkeypatch.setattr(published, "INDEX", tmp_path / "results" / "models" / "index.json")
    return tmp_path


def test_every_arm_is_a_profile():
    for name, arm in ARMS.items():
        profile = arm_profile(name, 5)
        assert profile.seed == 5
        assert arm.kind in ("scalar", "ordinal")
        assert arm.label not in {other.label for key, other in ARMS.items() if key != name}
    headline = {name for name, arm in ARMS.items() if tuple(arm.seeds) == HEADLINE_SEEDS}
    assert headline == {
        *("margin", "pairwise", "anchored", "plackett_luce"),
        *("margin_light", "pairwise_light"),
    }


def test_arms_differ_from_the_profile_in_what_they_name_only():
    base = dataclasses.asdict(PROFILES["cpu"])
    for name, arm in ARMS.items():
        found = dataclasses.asdict(arm_profile(name, 0))
        changed = {
            f"{section}.{field}"
            for section, fields in base.items()
            if isinstance(fields, dict)
            for field, value in fields.items()
            if found[section][field] != value
        }
        assert changed == set(arm.changes), name


def test_the_study_does_not_follow_the_notebooks_profile(monkeypatch):
    monkeypatch.setenv("REPORT_PROFILE", "smoke")
    assert arm_profile("margin", 0) == dataclasses.replace(PROFILES["cpu"], seed=0)


def test_wrong_arms_are_named(capsys):
    with pytest.raises(SystemExit):
        study.main(["margin", "margn"])
    assert "unknown: margn" in capsys.readouterr().err


# The judge


def test_folds_are_balanced_disjoint_and_leave_the_training_prompts_alone():
    data = prepared_data(PROFILES["cpu"])
    folds = judge_folds(data)
    training = {prompt_key(prompt.messages) for prompt in data.prompts("train")}
    assert not training & set(folds), "the judge would share prompts with the rewards"
    assert len(folds) == len(data.prompts("validation")) + len(data.prompts("test"))
    sizes = [list(folds.values()).count(fold) for fold in range(FOLDS)]
    assert max(sizes) - min(sizes) <= 1
    judged = 0
    for fold in range(FOLDS):
        groups, pairs = member_data(data, fold)
        assert {folds[prompt_key(group.prompt)] for group in groups} == set(range(FOLDS)) - {fold}
        assert {folds[prompt_key(pair.group.prompt)] for pair in pairs} == {fold}
        judged += len(pairs)
    assert judged == len(data.pairs("validation")) + len(data.pairs("test"))


class Constant:
    def __init__(self, value):
        self.value, self.read = value, []

    def score(self, prompts, responses, finished):
        self.read += responses
        return torch.full((len(prompts),), self.value)


def test_a_member_never_judges_a_prompt_it_was_trained_on():
    other = [{"role": "user", "content": "Name a bird."}]
    new = [{"role": "user", "content": "Name a fish."}]
    first, second = Constant(3.0), Constant(10.0)
    folds = {prompt_key(ASK): 0, prompt_key(other): 1}
    found = Judge(folds, {0: [Member(first, 1.0, 2.0)], 1: [Member(second, 0.0, 5.0)]})
    rewards = found.score([other, ASK, new], ["b", "a", "c"], [True] * 3)
    assert rewards.tolist() == [2.0, 1.0, 1.5]
    assert first.read == ["a", "c"]
    assert second.read == ["b", "c"]


# Training and publishing


def test_train_publish_load(small, capsys):
    for name, (arm, seed) in published.CHOSEN.items():
        run = study.study_stage(arm, seed)
        assert run.label == f"reward_models/{arm}/seed{seed}", name
    assert len(judge.member_runs()) == len(judge.MEMBERS) * FOLDS
    for name in judge.member_runs():
        run = judge.judge_stage(name)
        assert run.label == f"ensemble/{name}"
    data = prepared_data(PROFILES["smoke"])
    assert json.loads((run.directory / "run.json").read_text())["config"]["fold"] == FOLDS - 1
    published.main()
    said = capsys.readouterr().out
    assert "published 11 runs" in said
    assert "not trained" not in said
    probes = pd.read_csv(small / "results/cpu/controls/probes/probes.csv")
    assert set(probes["series"]) == {"scalar", "ordinal", "judge"}
    table = judge.judge_accuracy(small / "results", data.pairs("test"), 50)
    assert table["judge"].tolist()[:2] == ["judge"] * 2
    plain = small / "results/cpu/ensemble/pairwise_light_fold1/samples.jsonl"
    plain.with_name("samples.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    packed = judge.judge_accuracy(small / "results", data.pairs("test"), 50)
    pd.testing.assert_frame_equal(packed, table)
    assert judge.judge_accuracy(small, data.pairs("test"), 50).empty

    arguments = ([ASK, ASK], ["Blue.", "It depends on the light"], [True, False])
    for name in published.CHOSEN:
        reward_model = published.load_published(name)
        assert reward_model.kind == name
        assert reward_model.score(*arguments).shape == (2,)
    rewards = published.load_published("judge").score(*arguments)
    assert rewards.shape == (2,)
    assert rewards.isfinite().all()
    assert rewards[0] != rewards[1]

    path = small / "results" / "models" / "scalar.safetensors"
    entry = json.loads((path.parent / "index.json").read_text())["scalar"][0]
    assert (small / "results" / entry["run"] / "run.json").exists()
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ResultsError, match="not the file that was published"):
        published.load_published("scalar")
    path.unlink()
    with pytest.raises(ResultsError, match="missing"):
        published.load_published("scalar")
    with pytest.raises(ResultsError, match="no published model 'best'"):
        published.load_published("best")


def test_what_is_not_trained_yet_is_not_published(small, capsys):
    published.main()
    said = capsys.readouterr().out
    assert said.count("not trained yet") == 3
    assert "published 0 runs" in said
    with pytest.raises(ResultsError, match="no published model 'judge'"):
        published.load_published("judge")


def test_all_weights_are_trained_without_adapters(small, exact):
    changes = {"model.quantization": "none", "reward.lora_r": 0}
    profile = load_profile("smoke", changes)
    from utils.rewards.model import RewardModel

    model = RewardModel.fresh("scalar", profile).model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "score.weight" in trained
    assert all(".layers.1." in name or name == "score.weight" for name in trained), trained
    assert any("q_proj" in name for name in trained)
    assert RewardConfig().lora_r, "adapters are the default"


def test_weights_in_four_bits_cannot_be_trained_in_full():
    from utils.models.weights import ModelError
    from utils.rewards.model import RewardModel

    with pytest.raises(ModelError, match=r"reward\.lora_r = 0.*quantization"):
        RewardModel.fresh("scalar", load_profile("smoke", {"reward.lora_r": 0}))
