"""Training logs of policies, from small made-up runs."""

import math

import pandas as pd
import pytest

from utils.arms.policies import ARMS, READOUTS, SETTINGS
from utils.files import RESULTS, ResultsError, append_csv, write_json
from utils.statistics import policy_logs
from utils.statistics.policy_logs import (
    average_table,
    baseline_table,
    clipped_steps,
    frontier_table,
    missing_logs,
    missing_trials,
    readout_table,
    training_logs,
    trial_table,
)
from utils.statistics.published_runs import seed_runs

LIMIT = {"reinforce.max_grad_norm": 10.0}
RUN = {"status": "finished", "seed": 0, "config": LIMIT, "data_fingerprint": "f" * 16, "seconds": 9}


def curve(rewards, judges, **columns):
    """An evaluation every second step, with a step between that has none."""
    rows = []
    for place, (reward, judge) in enumerate(zip(rewards, judges, strict=True)):
        ends = {"eval_reward_low": reward - 0.5, "eval_reward_high": reward + 0.5}
        measured = {"eval_reward": reward, **ends, "eval_kl": place**2 - 0.01, "eval_judge": judge}
        measured |= {"eval_mean_length": 50.0 - place}
        sizes = {"objective": 5.0, "baseline": 1.0, "advantage_std": 3.0, "grad_norm": 10.0}
        training = {"reward": 9.0, "kl": 7.0, **sizes, **columns}
        rows.append({"step": 2 * place, **dict.fromkeys(training), **measured})
        rows.append({"step": 2 * place + 1, **training, **dict.fromkeys(measured)})
    return pd.DataFrame(rows).assign(max_grad_norm=10.0).astype(float)


def write_run(results, name, log=None, **changes):
    folder = results / "cpu" / name
    write_json(folder / "run.json", RUN | changes)
    for row in (curve([0.0], [0.0]) if log is None else log).to_dict("records"):
        append_csv(folder / "metrics.csv", {k: None if v != v else v for k, v in row.items()})


# Reading


def test_logs_by_arm_and_seed(tmp_path):
    for seed in (10, 2):
        write_run(
            tmp_path, f"policies/scalar/seed{seed}", curve([0.0, seed], [0.0, 1.0]), seed=seed
        )
    write_run(tmp_path, "policies/scalar_ema/seed0")
    logs = training_logs(tmp_path, "scalar", "ordinal")
    assert {arm: [*own] for arm, own in logs.items()} == {"scalar": [2, 10], "ordinal": []}
    assert logs["scalar"][10]["eval_reward"].max() == 10
    assert set(logs["scalar"][10]["max_grad_norm"]) == {10.0}
    scalar, ordinal = ARMS["scalar"].label, ARMS["ordinal"].label
    assert missing_logs(logs) == [f"{scalar}, seed 0, 1", f"{ordinal}, seed 0, 1, 2"]
    assert missing_logs(training_logs(tmp_path, "scalar_ema")) == []


def test_runs_that_cannot_be_used_are_named(tmp_path):
    write_run(tmp_path, "policies/scalar/seed1")
    with pytest.raises(ResultsError, match="policies/scalar/seed1 was trained with seed 0"):
        training_logs(tmp_path, "scalar")
    write_run(tmp_path, "policies/ordinal/seed0", status="running")
    with pytest.raises(ResultsError, match="policies/ordinal/seed0 is not finished, its status is"):
        seed_runs(tmp_path, "policies/ordinal")


def test_averages_by_scale(tmp_path):
    assert average_table(tmp_path).empty
    for name, best, seeds in (
        ("average_ordinal", 1.0, "abc"),
        ("scaled_scalar", 1.0, "a"),
        ("average_scalar", 0.5, "abc"),
    ):
        folder = tmp_path / "cpu" / "sweeps" / name
        config = {"average_of": [*seeds]}
        write_json(folder / "run.json", RUN | {"scale": best, "config": config})
        for scale in (0.5, 1.0):
            row = {"scale": scale, "eval_reward": 3 * scale, "eval_judge": 2.0, "eval_kl": scale**2}
            row |= dict.fromkeys(("eval_reward_low", "eval_reward_high"), 0.0)
            append_csv(folder / "metrics.csv", row | {"eval_mean_length": 9.0})
    table = average_table(tmp_path)
    assert table["arm"].tolist() == ["scalar"] * 4 + ["ordinal"] * 2
    assert table["seeds"].tolist() == [3, 3, 1, 1, 3, 3]
    assert table["chosen"].tolist() == [True, False, False, True, False, True]
    assert table["reward"].tolist() == [1.5, 3.0] * 3
    assert table["sqrt_kl"].tolist() == [0.5, 1.0] * 3


def test_trials(tmp_path, monkeypatch):
    rate, beta = "reinforce.learning_rate", "reinforce.beta"
    trials = {"a": {rate: 1.0, beta: 0.5}, "b": {rate: SETTINGS[rate]}, "c": {}}
    monkeypatch.setattr(policy_logs, "TRIALS", trials)
    assert trial_table(tmp_path).empty
    assert missing_trials(trial_table(tmp_path)) == ["a", "b", "c"]
    for name in ("b", "a"):
        config = SETTINGS | trials[name]
        write_run(tmp_path, f"sweeps/{name}", curve([0.0, 0.75], [0.0, 0.5]), config=config)
    rows = trial_table(tmp_path).set_index("trial")
    assert rows["chosen"].to_dict() == {"a": False, "b": True}
    assert rows[rate].tolist() == [1.0, SETTINGS[rate]]
    assert rows[["step", "eval_reward", "eval_judge"]].to_numpy().tolist() == [[2, 0.75, 0.5]] * 2
    assert missing_trials(trial_table(tmp_path)) == ["c"]
    # The full length is that of the study's first policy.
    write_run(tmp_path, "policies/scalar/seed0", curve([0.0, 0.25], [0.0, 0.5]), config=SETTINGS)
    write_run(tmp_path, "policies/scalar/seed1", curve([0.0, 9.0], [0.0, 9.0]), config=SETTINGS)
    rows = trial_table(tmp_path)
    assert rows["trial"].tolist() == ["a", "b", "align_scalar_s0"]


# Baselines and readouts


def baselines():
    """The running mean gains 2 and 4, so half of it is 1.5."""
    return {
        "scalar": {0: curve([1.0, 2, 3], [0, 0, 0]), 1: curve([1.0, 3, 5], [0, 0, 0])},
        "scalar_ema": {0: curve([0.0, 1.4, 1.5], [0, 0, 0], baseline=5.0)},
        "scalar_none": {0: curve([0.0, 9, 1], [0, 0, 0], grad_norm=20.0)},
    }


def test_baselines():
    rows = baseline_table(baselines())
    assert rows["gain"].tolist() == [2, 4, 1.5, 1]
    assert rows["half_step"].tolist() == [4, 2, 4, 2], "2 less 1 is not yet 1.5"
    assert rows["baseline"].tolist() == ["running mean"] * 2 + ["EMA", "constant (SFT mean)"]
    assert rows["advantage_rms"].tolist() == pytest.approx([5, 5, 3, 5]), "3 and the mean 4 or 0"
    assert rows["advantage_std"].tolist() == [3] * 4
    never = baselines() | {"scalar_ema": {0: curve([0.0, 1], [0, 0])}}
    assert math.isnan(baseline_table(never).loc[2, "half_step"])
    lost = {"scalar": {0: curve([1.0, 0], [0, 0])}}
    assert baseline_table(lost)["half_step"].isna().all(), "there is no half of a loss"


def test_the_share_of_clipped_steps():
    """Of the training steps alone: two rows in three, not two in four."""
    log = pd.DataFrame({"step": range(4), "grad_norm": [None, 0.5, 1.1, 9.0]})
    assert clipped_steps(log, 1.0) == pytest.approx(2 / 3)
    assert clipped_steps(log, 9.0) == 0, "at the limit nothing is clipped"
    assert math.isnan(clipped_steps(log.head(1), 1.0))
    assert baseline_table(baselines())["clipped_steps"].tolist() == [0, 0, 0, 1]


def test_every_published_step_was_clipped():
    logs = training_logs(RESULTS, *ARMS)
    shares = [clipped_steps(f, f["max_grad_norm"]) for own in logs.values() for f in own.values()]
    assert len(shares) >= 9
    assert set(shares) == {1.0}


def test_readouts():
    logs = {arm: {0: curve([0.0, 1], [0.0, 0.5])} for arm in READOUTS}
    logs["ordinal"][1] = curve([0.0, 2], [0.0, 0.25])
    logs["ordinal_cautious"][0]["eval_judge"] += 1
    table = readout_table(logs)
    assert table["seed"].tolist() == [0, 1, 0]
    assert table.loc[1, ["step", "eval_reward", "eval_judge"]].tolist() == [2, 2, 0.25]
    assert table["eval_distinct_2"].isna().all(), "not measured"
    assert readout_table({}).empty


# Curves


def test_frontier():
    logs = {
        "ordinal_cautious": {0: curve([0.0, 1, 2, 3], [0.0, 2, 2, 1])},
        "scalar": {
            2: curve([0.0, 1, 2], [0.0, 0.5, 0.75]),
            10: curve([0.0, 1, 0.5], [0.0, 0.5, 0.75]),
        },
    }
    table = frontier_table(logs)
    assert table["arm"].tolist() == ["ordinal_cautious"] * 4 + ["scalar"] * 6
    assert table["seed"].tolist() == [0] * 4 + [2] * 3 + [10] * 3
    assert table["step"].tolist() == [0, 2, 4, 6, 0, 2, 4, 0, 2, 4]
    assert table["sqrt_kl"][0] == 0, "an estimate below zero has no root"
    assert table["sqrt_kl"][2] == pytest.approx(math.sqrt(3.99))
    columns = ["reward", "reward_low", "reward_high", "judge", "length"]
    assert table.loc[3, columns].tolist() == [3, 2.5, 3.5, 1, 47]
