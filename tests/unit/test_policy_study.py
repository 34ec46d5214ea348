"""The policies of the study, with a tiny model and reward models that look at the text alone."""

import dataclasses
import hashlib
import json
import shutil

import pandas as pd
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from utils import config
from utils.arms import policies as policy_arms
from utils.arms.policies import (
    ARMS,
    AVERAGE_SCALES,
    SEEDS,
    SETTINGS,
    TRIALS,
    PolicyArm,
    policy_profile,
)
from utils.config import PROFILES, flatten
from utils.experiments import comparison, pipeline, policy_stages, policy_study, published
from utils.experiments.pipeline import prepared_data, sft_stage
from utils.files import ResultsError, read_json, read_jsonl
from utils.reinforce.checkpoints import load_adapter
from utils.reinforce.evaluation import evaluate_policy
from utils.rewards.losses import CLASSES, KINDS, expected_rating, rating_minus_spread
from utils.rewards.readouts import READOUTS
from utils.statistics.policy_runs import _evaluations

LAZY = {"reinforce.learning_rate": 0.0}  # never leaves the SFT model
SMALL = {
    "scalar": PolicyArm("scalar", "moves", seeds=(0, 1)),
    "lazy": PolicyArm("scalar", "stays", changes=LAZY),
    "careful": PolicyArm("ordinal", "careful", "minus_spread"),
    "untrained": PolicyArm("scalar", "is not trained"),
}
SUMS = {"scalar": ["aa"], "ordinal": ["bb"], "judge": ["cc", "dd"]}


class Wordy:
    """Rates by the number of characters, with a doubt that depends on the first one."""

    def __init__(self, kind):
        self.kind = kind

    def logits(self, prompts, responses, finished):
        size = torch.tensor([float(len(text) % 23) for text in responses])[:, None]
        if self.kind == "scalar":
            return size
        first = torch.tensor([float(ord(text[:1] or " ") % 5) for text in responses])[:, None]
        return -(torch.arange(CLASSES) - size / 3).square() / (1 + first)

    def score(self, *texts):
        logits = self.logits(*texts)
        return expected_rating(logits) if self.kind == "ordinal" else logits[:, 0]


def forget():
    """Do as a new process would."""
    for function in (sft_stage, prepared_data):
        function.cache_clear()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The study at the size of `smoke`: three arms trained, one of them with two seeds."""
    root = tmp_path_factory.mktemp("study")
    profile = dataclasses.replace(PROFILES["smoke"], name="cpu")
    settings = {
        "evaluation.samples_per_prompt": 2,
        "evaluation.sft_temperatures": [0.2],
        "reinforce.learning_rate": 3e-2,
        "reinforce.steps": 2,
        "reinforce.eval_steps": 1,
        "reinforce.kl_budget": 1e6,
        "data.test_prompts": 3,
    }
    models = root / "results" / "models"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPORT_PROFILE", "quick")
        patch.setattr(policy_arms, "PROFILES", {"cpu": profile})
        patch.setattr(policy_arms, "SETTINGS", settings)
        patch.setattr(policy_arms, "TRIALS", {"short": {"reinforce.steps": 1}})
        for module in (policy_arms, policy_stages, policy_study):
            patch.setattr(module, "ARMS", SMALL)
        patch.setattr(published, "POLICY_ARMS", SMALL)
        for module in (policy_stages, policy_study):
            patch.setattr(module, "load_published", lambda name: Wordy(name))
            patch.setattr(module, "published_sums", lambda names: {n: SUMS[n] for n in names})
        patch.setattr(config, "ROOT", root)
        patch.setattr(published, "RESULTS", root / "results")
        patch.setattr(published, "MODELS", models)
        patch.setattr(published, "INDEX", models / "index.json")
        forget()
        for name, seed in (("scalar", 0), ("scalar", 1), ("lazy", 0), ("careful", 0)):
            policy_stages.policy_stage(name, seed)
        patch.frames = policy_study.evaluation_stages()
        patch.runs, patch.root = root / "runs" / "cpu", root
        yield patch
    forget()


def samples(world, name):
    return pd.DataFrame(read_jsonl(world.runs / name / "samples.jsonl"))


# What the arms are


def test_every_arm_is_a_profile_and_differs_in_what_it_names_only():
    base = flatten(PROFILES["cpu"])
    for name, arm in ARMS.items():
        found = flatten(policy_profile(name, 7))
        changed = {key for key, value in found.items() if value != base[key]}
        assert changed - set(SETTINGS) - set(arm.changes) == {"seed"}, name
        assert {key: found[key] for key in SETTINGS} == SETTINGS | {
            key: value for key, value in arm.changes.items() if key in SETTINGS
        }
        assert arm.reward in KINDS
        assert arm.readout in READOUTS
    assert {name for name, arm in ARMS.items() if arm.seeds == SEEDS} == {"scalar", "ordinal"}
    assert len({arm.label for arm in ARMS.values()}) == len(ARMS)
    assert {arm.readout for arm in ARMS.values()} == set(READOUTS)


def test_a_trial_has_its_own_settings_and_a_short_one_no_end_at_a_kl():
    for name, changes in TRIALS.items():
        found = flatten(policy_arms.trial_profile(name))
        assert {key: found[key] for key in SETTINGS} == SETTINGS | changes
        samples = found["reinforce.steps"] * found["reinforce.prompts_per_step"]
        assert samples <= SETTINGS["reinforce.steps"] * SETTINGS["reinforce.prompts_per_step"]
        assert (found["reinforce.kl_budget"] is None) == (not name.startswith("long_"))
    tried = [SETTINGS | changes for changes in TRIALS.values()]
    assert SETTINGS not in tried, "the study's own settings are those of its first policy"


# Training


def test_training_and_held_out_rewards(world):
    info = read_json(world.runs / "policies/careful/seed0" / "run.json")
    assert info["status"] == "finished"
    texts = [samples(world, "controls/sft_training_prompts")["response"]] * 3
    own = rating_minus_spread(Wordy("ordinal").logits(*texts))
    assert info["reward_mean"] == pytest.approx(own.mean().item()), "not the mean rating's"
    metrics = pd.read_csv(world.runs / "policies/careful/seed0" / "metrics.csv")
    assert metrics["step"].tolist() == [0, 1, 2]
    assert metrics["eval_judge"].notna().all()
    # The curve is that of the expected rating, in its own unit, so that arms compare.
    profile = policy_arms.policy_profile("careful", 0)
    policy, tokenizer = pipeline.load_sft(profile)
    load_adapter(world.runs / "policies/careful/seed0", policy)
    prompts = prepared_data(profile).prompts("validation")
    models = {"own": Wordy("ordinal"), "judge": Wordy("judge")}
    frame = evaluate_policy(policy, tokenizer, prompts, profile, 0.7, models)
    unit = [samples(world, "controls/sft_training_prompts")["response"]] * 3
    for name, column in (("own", "eval_reward"), ("judge", "eval_judge")):
        rewards = models[name].score(*unit)
        mean, std = rewards.mean().item(), rewards.std().item()
        expected = (frame[f"reward_{name}"].mean() - mean) / std
        assert metrics[column].iloc[-1] == pytest.approx(expected, abs=1e-3)
    assert metrics["eval_reward"].iloc[0] != metrics["eval_reward"].iloc[-1]


def test_a_run_says_what_it_was_rewarded_by(world):
    made_with = read_json(world.runs / "policies/careful/seed0" / "run.json")["config"]
    assert (made_with["reward"], made_with["readout"]) == ("ordinal", "minus_spread")
    assert made_with["models"] == {"ordinal": ["bb"]}, "the judge only watches"
    assert read_json(world.runs / "policies/scalar/seed1" / "run.json")["seed"] == 1
    assert not list(world.runs.rglob("*@*")), "seeds share the unit of the reward"


def test_finished_policies_are_reused_until_a_reward_model_changes(world, monkeypatch, capsys):
    def forbidden(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(policy_stages, "align_policy", forbidden)
    forget()
    policy_stages.policy_stage("scalar", 0)
    assert "[policies/scalar/seed0] reuse" in capsys.readouterr().out
    record = world.runs / "policies/scalar/seed0" / "run.json"
    before = record.read_bytes()
    changed = {**SUMS, "scalar": ["ee"]}
    monkeypatch.setattr(
        policy_stages, "published_sums", lambda names: {n: changed[n] for n in names}
    )
    assert not [seed for name, seed, _ in policy_stages.trained_policies() if name == "scalar"]
    assert record.read_bytes() == before, "asking what is trained sets nothing aside"
    with pytest.raises(AssertionError, match="trained again"):
        policy_stages.policy_stage("scalar", 0)
    aside = next(world.runs.glob("policies/scalar/seed0@*"))
    assert (aside / "test" / "run.json").exists(), "an evaluation goes with its policy"
    new = world.runs / "policies/scalar/seed0"
    assert json.loads((new / "run.json").read_text())["config"]["models"]["scalar"] == ["ee"]
    (new / "run.json").unlink()
    new.rmdir()
    aside.rename(new)


def test_trials_never_touch_the_test_prompts(world, monkeypatch):
    # Loaded before: what is left out for its length is left out of all splits.
    data = prepared_data(policy_arms.trial_profile("short"))
    asked = []

    def prompts(self, split):
        asked.append(split)
        return original(self, split)

    original = type(data).prompts
    monkeypatch.setattr(type(data), "prompts", prompts)
    run = policy_stages.trial_stage("short")
    assert run.label == "sweeps/short"
    assert run.metrics()["step"].tolist() == [0, 1], "its own number of steps"
    assert set(asked) == {"train", "validation"}


# Evaluation


def test_what_is_trained_is_evaluated_beside_the_controls(world):
    controls = ["sft", "sft_best", "sft_greedy", "sft_16bit", "sft_pool"]
    trained = ["scalar_s0", "scalar_s0_greedy", "scalar_s1", "lazy_s0", "lazy_s0_greedy"]
    trained += ["careful_s0", "careful_s0_greedy", "scalar_average"]
    assert list(world.frames) == [*controls, *trained]
    places = _evaluations(world.runs)
    test = prepared_data(policy_arms.policy_profile("scalar", 0)).prompts("test")
    for name, frame in world.frames.items():
        each = 16 if name == "sft_pool" else 2
        assert frame["prompt_id"].tolist() == [p.id for p in test for _ in range(each)], name
        for reward in policy_study.REWARDS:
            assert frame[f"reward_{reward}"].notna().all()
        assert frame.equals(samples(world, places[name])), "another policy's"
    infos = [read_json(places[name] / "run.json") for name in world.frames]
    assert len({json.dumps(info["scales"]) for info in infos}) == 1
    assert infos[0]["config"]["models"] == SUMS


def test_policies_meet_the_same_dice_and_the_pool_others(world):
    frames = world.frames
    assert frames["lazy_s0"]["response"].equals(frames["sft"]["response"])
    assert frames["lazy_s0"]["kl"].abs().max() < 1e-3
    assert frames["lazy_s0_greedy"]["response"].equals(frames["sft_greedy"]["response"])
    assert (frames["scalar_s0"]["response"] != frames["sft"]["response"]).any(), "no adapter"
    assert (frames["scalar_s0"]["response"] != frames["scalar_s1"]["response"]).any()
    pool = frames["sft_pool"].groupby("prompt_id")["response"].nunique()
    assert (pool > 2).all(), "sixteen samples of a prompt are sixteen draws"
    # The pool's first two rows would be the evaluation's if it had the same noise.
    assert frames["sft_pool"]["response"][:2].tolist() != frames["sft"]["response"][:2].tolist()


# Averages of seeds


def updates(policy):
    """Return what the active adapters add to each weight."""
    return {
        name: module.get_delta_weight(module.active_adapters[0])
        for name, module in policy.named_modules()
        if isinstance(module, LoraLayer)
    }


def test_an_average_is_the_mean_of_the_updates_times_the_scale(world):
    seeds = [updates(policy_stages.load_trained("scalar", seed)[0]) for seed in (0, 1)]
    average = updates(policy_study._load_average("scalar", (0, 1), 1.5)[0])
    assert average.keys() == seeds[0].keys()
    for name, update in average.items():
        first, second = (seed[name] for seed in seeds)
        assert (first - second).abs().max() > 0
        expected = 1.5 * (first + second) / 2
        assert (update - expected).abs().max() < 0.01 * expected.abs().max(), name
    same, _ = policy_study._load_average("scalar", (0, 1), 0.0)
    assert all(update.abs().max() == 0 for update in updates(same).values()), "the SFT model"


def test_averages_and_one_scaled_seed_are_measured(world):
    runs = {name: world.runs / "sweeps" / f"{name}_scalar" for name in ("average", "scaled")}
    infos = {name: read_json(run / "run.json") for name, run in runs.items()}
    tables = {name: pd.read_csv(run / "metrics.csv") for name, run in runs.items()}
    for name, table in tables.items():
        assert table["scale"].tolist() == [*AVERAGE_SCALES]
        assert infos[name]["scale"] == table.loc[table["eval_reward"].idxmax(), "scale"]
    hashes = [
        shaped_by for name, _, shaped_by in policy_stages.trained_policies() if name == "scalar"
    ]
    assert infos["average"]["config"]["average_of"] == hashes
    assert infos["scaled"]["config"]["average_of"] == hashes[:1]
    log = pd.read_csv(world.runs / "policies/scalar/seed0" / "metrics.csv").iloc[-1]
    one = tables["scaled"].set_index("scale").loc[1.0]
    assert one["eval_kl"] == pytest.approx(log["eval_kl"], abs=1e-3), "seed 0 as it is"
    tested = read_json(world.runs / "policies/scalar_average/test" / "run.json")["config"]
    assert (tested["scale"], tested["trained"]) == (infos["average"]["scale"], hashes)


def test_the_scale_is_the_best_within_the_kl_budget_on_validation_prompts(world, monkeypatch):
    kls, rewards, asked = [1, 2, 3, 4, 2e6], [1.0, 4.0, 3.0, 2.0, 9.0], []

    def metrics(policy, tokenizer, prompts, *_):
        asked.append(prompts)
        return {"eval_reward": rewards[len(asked) - 1], "eval_kl": kls[len(asked) - 1]}

    monkeypatch.setattr(policy_study, "held_out_metrics", metrics)
    run = policy_study.average_stage("of_two", "scalar", {0: "a", 1: "b"})
    assert run.info["scale"] == AVERAGE_SCALES[1]
    validation = prepared_data(policy_arms.policy_profile("scalar", 0)).prompts("validation")
    assert asked == [validation] * len(AVERAGE_SCALES)
    asked.clear()
    kls[:] = [2e6] * len(AVERAGE_SCALES)
    with pytest.raises(ResultsError, match=r"of_one: no scale is within 1000000\.0 nats"):
        policy_study.average_stage("of_one", "scalar", {0: "a"})


def test_units_are_measured_once_and_then_read(world, monkeypatch):
    def measure(*arguments):
        raise AssertionError("measured again: other rounding would be another unit")

    monkeypatch.setattr(policy_stages, "reward_scale", measure)
    monkeypatch.setattr(comparison, "reward_scale", measure)
    scales = {name: policy_stages.scale_stage(name) for name in policy_study.REWARDS}
    used = read_json(world.runs / "policies/scalar/seed1/test" / "run.json")["scales"]
    assert {name: list(scale) for name, scale in scales.items()} == used
    policy_study.evaluation_stages()
    careful = read_json(world.runs / "policies/careful/seed0" / "run.json")
    own = policy_stages.scale_stage("ordinal", "minus_spread")
    assert own == (careful["reward_mean"], careful["reward_std"])
    assert own != scales["ordinal"]


def test_finished_evaluations_are_read_and_a_policy_trained_anew_is_evaluated_anew(
    world, monkeypatch, capsys
):
    sampled = []

    def evaluate(*arguments):
        sampled.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "evaluate_policy", evaluate)
    again = policy_study.evaluation_stages()
    assert all(frame.equals(world.frames[name]) for name, frame in again.items())
    assert "[policies/untrained/seed0] is not trained yet" in capsys.readouterr().out
    hashes = [(name, seed, "other") for name, seed, _ in policy_stages.trained_policies()]
    monkeypatch.setattr(policy_study, "trained_policies", lambda: hashes)
    with pytest.raises(KeyboardInterrupt):
        policy_study.evaluation_stages()
    assert "[policies/scalar/seed0/test] trained: was" in capsys.readouterr().out
    aside = next(world.runs.glob("policies/scalar/seed0/test@*"))
    new = world.runs / "policies/scalar/seed0/test"
    (new / "run.json").unlink()
    new.rmdir()
    aside.rename(new)


# Publishing


def test_publish_and_load(world, capsys):
    kept = {"scalar": [{"file": "scalar.safetensors", "sha256": "00"}]}
    published.MODELS.mkdir(parents=True, exist_ok=True)
    published.INDEX.write_text(json.dumps(kept))
    world.setattr(published, "probe_stage", lambda profile, names: None)
    published.main()
    index = read_json(published.INDEX)
    assert index["scalar"] == kept["scalar"], "what was not trained here was lost"
    assert set(index["policies"]) == {"scalar", "lazy", "careful"}
    place = world.root / "results" / "cpu"
    names = {path.parent.relative_to(place).as_posix() for path in place.rglob("run.json")}
    assert {"policies/scalar/seed1", "policies/careful/seed0/test"} <= names
    assert {"sweeps/average_scalar", "sweeps/scaled_scalar"} <= names
    assert {"controls/sft_T0.2/validation", "controls/scale_judge_mean"} <= names
    assert {*_evaluations(place)} == {*world.frames}
    assert index["policies"]["lazy"]["run"] == "cpu/policies/lazy/seed0"
    assert not [name for name in names if "@" in name]

    # In a clone there are finished runs without checkpoints.
    shutil.rmtree(world.runs / "policies/lazy/seed0" / "checkpoints")
    published.main()
    assert read_json(published.INDEX) == index

    entry = index["policies"]["scalar"]
    path = published.MODELS / entry["file"]
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {value.dtype for value in load_file(path).values()} == {torch.bfloat16}
    loaded, _ = published.load_aligned("scalar")
    tested, _ = policy_stages.load_trained("scalar", 0)
    factors = dict(tested.named_parameters())
    assert any(p.abs().max() > 0 for name, p in factors.items() if "lora_B" in name)
    for name, value in loaded.named_parameters():
        assert torch.equal(value, factors[name]), f"{name}: published is not what was tested"

    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(ResultsError, match="not the file that was published"):
        published.load_aligned("scalar")
    with pytest.raises(ResultsError, match=r"no published policy 'best'.*scalar.*make study"):
        published.load_aligned("best")
    with pytest.raises(ResultsError, match="no published model 'policies'"):
        published.load_published("policies")
