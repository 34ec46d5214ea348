"""Profiles: overriding, precedence and hashing."""

from __future__ import annotations

import dataclasses

import pytest

from utils.config import (
    PROFILES,
    UNHASHED,
    ConfigError,
    DataConfig,
    Profile,
    ReinforceConfig,
    config_hash,
    flatten,
    known_fields,
    load_profile,
)
from utils.experiments import train


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REPORT_PROFILE", raising=False)


def test_the_default_is_quick():
    assert load_profile() == PROFILES["quick"]


@pytest.mark.parametrize(("typed", "meant"), [("quik", "quick"), ("smok", "smoke")])
def test_an_unknown_profile_names_the_near_ones(typed: str, meant: str):
    with pytest.raises(ConfigError, match=meant):
        load_profile(typed)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("reinforce.step", "reinforce.steps"),
        ("learning_rat", "learning_rate"),
        ("temperature", "reinforce.temperature"),
        ("name", "name"),  # a profile keeps its name
    ],
)
def test_an_unknown_field_names_the_near_ones(typed: str, meant: str):
    with pytest.raises(ConfigError, match="unknown field") as caught:
        load_profile("quick", {typed: 1})
    assert meant in str(caught.value)


def test_overrides_change_their_field_alone():
    changed = load_profile("quick", {"reinforce.steps": 5, "seed": 3, "reward.epochs": 2})
    assert (changed.reinforce.steps, changed.seed, changed.reward.epochs) == (5, 3, 2)
    before, after = flatten(PROFILES["quick"]), flatten(changed)
    assert {key for key in before if before[key] != after[key]} == {
        "reinforce.steps",
        "seed",
        "reward.epochs",
    }


def test_a_list_becomes_a_tuple_where_the_field_is_one():
    changed = load_profile("quick", {"evaluation.sft_temperatures": [0.3]})
    assert changed.evaluation.sft_temperatures == (0.3,)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reinforce.steps", 2.5),
        ("reinforce.steps", True),
        ("reinforce.temperature", "0.7"),
        ("reinforce.baseline", 3),
    ],
)
def test_a_value_of_another_type_is_refused(field: str, value: object):
    with pytest.raises(ConfigError, match=field):
        load_profile("quick", {field: value})


def test_the_environment_wins_over_the_argument(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REPORT_PROFILE", "smoke")
    assert load_profile("quick").name == "smoke"
    assert load_profile().name == "smoke"
    monkeypatch.setenv("REPORT_PROFILE", "")
    assert load_profile("cpu").name == "cpu"


def test_the_command_line_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REPORT_PROFILE", "cpu")
    made = []

    def stage(kind: str, profile: Profile):
        made.append(profile.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "reward_stage", stage)
    for options in ([], ["--profile", "smoke"]):
        with pytest.raises(KeyboardInterrupt):
            train.main(["reward", "scalar", *options])
    assert made == ["cpu", "smoke"]


def test_the_hash_is_stable_and_sensitive():
    fields = flatten(PROFILES["quick"])
    reordered = dict(reversed(fields.items()))
    assert config_hash(fields) == config_hash(reordered)
    assert config_hash({"a": 1}) == "015abd7f5cc57a2d"  # the same on every machine and release
    for name, value in fields.items():
        changed = config_hash({**fields, name: f"not {value}"})
        assert (changed == config_hash(fields)) == (name in UNHASHED), name


def test_a_new_option_at_its_default_changes_no_old_hash():
    fields = flatten(PROFILES["quick"])
    old = {name: value for name, value in fields.items() if name != "reinforce.ema_decay"}
    assert config_hash(old) == config_hash(fields)
    assert config_hash(old) != config_hash({**old, "reinforce.ema_decay": 0.5})


def test_every_field_is_flattened_once():
    names = known_fields(PROFILES["quick"])
    assert len(names) == len(set(names))
    assert set(names) == set(flatten(PROFILES["quick"]))
    assert "reinforce.beta" in names


def test_rloo_needs_two_samples_per_prompt():
    with pytest.raises(ConfigError, match="num_generations"):
        ReinforceConfig(baseline="rloo", num_generations=1)
    assert ReinforceConfig(baseline="rloo", num_generations=2).num_generations == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reinforce.baseline", "mean"),
        ("reinforce.temperature", 0.0),
        ("reinforce.steps", 0),
        ("reinforce.prompts_per_step", 0),
        ("reinforce.num_generations", 0),
        ("reinforce.eval_steps", 0),
        ("reinforce.save_steps", 0),
        ("reinforce.warmup_steps", -1),
        ("reward.save_steps", 0),
        ("reward.groups_per_step", 0),
        ("reward.warmup_ratio", 1.5),
        ("reinforce.min_distinct_2", -0.1),
        ("reinforce.min_distinct_2", 1.5),
        ("reinforce.kl_budget", 0.0),
        ("reward.micro_groups", 3),
        ("model.quantization", "int8"),
        ("data.source", "web"),
        ("data.rating_high", 1.0),
    ],
)
def test_a_value_out_of_range_names_its_field(field: str, value: object):
    with pytest.raises(ConfigError, match=field):
        load_profile("quick", {field: value})


def test_a_path_goes_with_the_source_file_only():
    with pytest.raises(ConfigError, match="path"):
        DataConfig(source="file")
    assert DataConfig(source="file", path="pairs.jsonl").path == "pairs.jsonl"


def test_the_seed_is_replaced_only_if_it_is_given():
    assert load_profile("quick", {}, 3).seed == 3
    assert load_profile("quick", {"seed": 4}, 3).seed == 4
    assert load_profile("quick", {"seed": 4}, None).seed == 4


def test_none_is_taken_where_the_field_may_be_none():
    assert load_profile("quick", {"data.train_prompts": None}).data.train_prompts is None
    assert load_profile("quick", {"reinforce.micro_batch": None}).reinforce.micro_batch is None
    with pytest.raises(ConfigError, match="steps"):
        load_profile("quick", {"reinforce.steps": None})


def test_fields_that_belong_together_are_replaced_together():
    fields = {"data.source": "file", "data.path": "own/pairs.jsonl", "data.rating_low": 0.0}
    data = load_profile("quick", fields).data
    assert (data.source, data.path, data.rating_low) == ("file", "own/pairs.jsonl", 0.0)


def test_a_data_set_is_pinned_only_where_it_is_named():
    with pytest.raises(ConfigError, match="revision"):
        DataConfig(source="hub", revision="main")
    with pytest.raises(ConfigError, match=r"data\.name"):
        DataConfig(source="hub", name="owner/name")  # without a split
    assert DataConfig(source="hub", name="owner/name:train", revision="v1").revision == "v1"


def test_a_profile_may_come_from_a_file(tmp_path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "mine.json"
    path.write_text('{"profile": "smoke", "reinforce.steps": 5}')
    monkeypatch.setenv("REPORT_PROFILE", str(path))
    profile = load_profile("quick", {"seed": 2})
    assert (profile.name, profile.seed, profile.reinforce.steps) == ("mine", 2, 5)
    assert profile.model == PROFILES["smoke"].model


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mine.json", None, "cannot be read"),
        ("mine.json", "{", "cannot be read"),
        ("mine.json", "[1]", "cannot be read"),
        ("mine.json", '{"profile": "quik"}', "did you mean quick"),
        ("mine.json", '{"reinforce.step": 1}', "did you mean reinforce.steps"),
        ("quick.json", "{}", "rename the file"),
    ],
)
def test_a_bad_profile_file_says_what_is_wrong(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_profile(str(path))


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_profiles_are_frozen_and_named_after_their_key(profile):
    assert PROFILES[profile.name] is profile
    with pytest.raises(dataclasses.FrozenInstanceError):
        profile.seed = 1
