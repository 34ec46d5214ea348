"""The tables of the reward-model study, from small made-up runs whose numbers are known."""

import math

import numpy as np
import pandas as pd
import pytest

from utils.data.sources import Group, PreferenceData, Response
from utils.files import ResultsError, append_csv, write_json, write_jsonl
from utils.rewards.losses import KINDS
from utils.statistics.reward_report import (
    accuracy_table,
    category_table,
    difference_table,
    ensemble_accuracy,
    learning_curve_table,
    versus_rules,
)
from utils.statistics.reward_runs import pair_frame, study_runs

SAMPLES = 400


def group(prompt_id, category, *ratings):
    """Responses to a prompt, the best first; what is rated 9 is a reference, not a sample."""
    turns = ({"role": "user", "content": f"{prompt_id}?"},)
    responses = tuple(
        Response(f"answer {r}", r, source="reference" if r == 9 else "model") for r in ratings
    )
    return Group(prompt_id, "test", category, turns, responses)


GROUPS = (group("p0", "a", 9.0, 5.0, 2.0), group("p1", "b", 4.0, 3.0), group("p2", "b", 2.5, 1.0))
# Best against second, best against third, second against third of p0; then p1; then p2.
PAIRS = PreferenceData(GROUPS, "f" * 16, {}).pairs("test")
# Rewards in the order of GROUPS: 9, 5, 2; 4, 3; 2.5, 1.
FIRST = [2.0, 0.5, 0.5, -1.0, 1.0, 1.5, 0.5]  # reward gaps 1.5, 1.5, 0, -2, 1
SECOND = [0.0, -0.5, -1.0, 0.5, 0.25, 0.0, -1.0]  # reward gaps 0.5, 1, 0.5, 0.25, 1
GAPS = np.array([[1.5, 1.5, 0, -2, 1], [0.5, 1, 0.5, 0.25, 1]])
CORRECT = [1, 1, 0.75, 0.5, 1]  # the first seed ties on the third pair and errs on the fourth
# Distributions over ratings, in the same order. P(win), P(lose) of the pairs:
# .5, 0; .875, 0; .75, 0; .5, .5; .25, .75. The rest are ties.
TEN = [{9: 0.5, 5: 0.5}, {5: 1}, {5: 0.25, 2: 0.75}, {3: 0.5, 6: 0.5}, {4: 1}]
TEN += [{1: 0.75, 3: 0.25}, {2: 1}]
LOG_WIN = np.log([0.5, 0.875, 0.75, 0.5, 0.25])


def logits(output):
    if not isinstance(output, dict):
        return [output]
    return [math.log(output[i]) if i in output else -40.0 for i in range(1, 11)]


def write_run(results, name, outputs, prompts=None, groups=GROUPS, **changes):
    """A published run: steps of 30 and of 60 or, with seed 1, 120 seconds; the scored responses."""
    arm, seed = name.rpartition("_s")[0], int(name.rpartition("_s")[2])
    folder = results / "cpu" / "reward_models" / arm / f"seed{seed}"
    kind = "ordinal" if isinstance(outputs[0], dict) else "scalar"
    config = {"kind": kind, "data.fingerprint": "f" * 16, "data.train_prompts": prompts}
    info = {"status": "finished", "seed": seed, "config": config, "seconds": 9e9, "threads": 2}
    info |= changes
    info["config"] = config | changes.get("config", {})
    write_json(folder / "run.json", info | {"data_fingerprint": info["config"]["data.fingerprint"]})
    for step, seconds in enumerate((30.0, 60.0 * (1 + seed)), start=1):
        append_csv(folder / "metrics.csv", {"step": step, "seconds": seconds})
    responses = [(g, place, r) for g in groups for place, r in enumerate(g.responses)]
    rows = [
        {
            "prompt_id": g.prompt_id,
            "batch": g.batch,
            "place": place,
            "category": g.category,
            "prompt": g.prompt[-1]["content"],
            "response": r.text,
            "rating": r.rating,
            "source": r.source,
            "temperature": None,
            "reward": output
            if kind == "scalar"
            else float(sum(rating * p for rating, p in output.items())),
            "logits": logits(output),
        }
        for (g, place, r), output in zip(responses, outputs, strict=True)
    ]
    write_jsonl(folder / "samples.jsonl", rows[::-1])
    return folder


@pytest.fixture
def results(tmp_path):
    """Two seeds of a scalar arm, two of a ten-class arm, which are the same."""
    for seed, rewards in enumerate((FIRST, SECOND)):
        write_run(tmp_path, f"margin_s{seed}", rewards)
        write_run(tmp_path, f"pairwise_s{seed}", TEN)
    return tmp_path


def triple(row, name):
    return tuple(row[f"{name}{end}"] for end in ("", "_low", "_high"))


# Runs


def test_runs_of_an_arm_by_seed_and_no_others(tmp_path):
    for name in ("margin/seed1@0123", "margin/.seed1.0a.partial", "margin_10/seed0"):
        (tmp_path / "cpu" / "reward_models" / name).mkdir(parents=True)
    for seed in (10, 2, 7, 0, 31, 4):
        write_run(tmp_path, f"margin_s{seed}", FIRST)
    write_run(tmp_path, "margin_10_s0", FIRST)
    runs = study_runs(tmp_path, "margin")
    assert [run.info["seed"] for run in runs] == [0, 2, 4, 7, 10, 31]
    assert [run.label for run in runs[:2]] == [f"reward_models/margin/seed{s}" for s in (0, 2)]
    assert study_runs(tmp_path, "soft") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"status": "running"},
            "reward_models/margin/seed1 is not finished, its status is 'running'",
        ),
        ({"seed": 0}, "reward_models/margin/seed1 was trained with seed 0: .* the run with seed 1"),
    ],
)
def test_a_run_that_is_not_what_its_name_says(tmp_path, change, message):
    write_run(tmp_path, "margin_s0", FIRST)
    write_run(tmp_path, "margin_s1", SECOND, **change)
    with pytest.raises(ResultsError, match=message):
        study_runs(tmp_path, "margin")


# Pairs


def test_pairs_are_averaged_over_seeds(results):
    frame = pair_frame(study_runs(results, "margin"), PAIRS)
    assert frame["prompt_id"].tolist() == ["p0", "p0", "p0", "p1", "p2"]
    assert frame["gap"].tolist() == [4, 7, 3, 1, 1.5]
    assert frame["between_samples"].tolist() == [False, False, True, True, True]
    assert frame["correct"].tolist() == CORRECT
    losses = np.log1p(np.exp(-GAPS)).mean(axis=0)
    np.testing.assert_allclose(frame["nll"], losses, rtol=1e-5)
    np.testing.assert_allclose(frame["nll_untied"], losses, rtol=1e-5)
    np.testing.assert_allclose(frame[["p_0", "p_1"]].T, 1 / (1 + np.exp(-GAPS)), rtol=1e-5)


def test_a_tie_of_two_distributions_costs_only_the_strict_loss(results):
    frame = pair_frame(study_runs(results, "pairwise"), PAIRS)
    np.testing.assert_allclose(frame["nll"], -LOG_WIN, rtol=1e-5)
    np.testing.assert_allclose(frame["p_1"], [1, 1, 1, 0.5, 0.25], rtol=1e-5)
    np.testing.assert_allclose(
        frame["nll_untied"], [0, 0, 0, math.log(2), math.log(4)], rtol=1e-5, atol=1e-6
    )
    assert frame["correct"].tolist() == [1, 1, 1, 1, 0]


# Tables


def test_accuracy_by_hand(results):
    table = accuracy_table(results, ["soft", "margin", "pairwise"], PAIRS, 4000)
    assert table["arm"].tolist() == ["margin", "pairwise"], "an arm without runs has no row"
    assert table["label"].tolist() == ["Bradley-Terry with margin", "ten classes, pairwise"]
    assert table["kind"].tolist() == list(KINDS)
    row = table.loc[0]
    assert row["seeds"] == 2
    # Over prompts the extremes of three draws of three are p1 and p2 alone (1 in 27 each).
    assert triple(row, "accuracy") == pytest.approx((4.25 / 5, 0.5, 1))
    assert triple(row, "model_pairs") == pytest.approx((2.25 / 3, 0.5, 1))
    assert row["accuracy_sd"] == pytest.approx(0.3 / math.sqrt(2)), "the seeds have .7 and 1"
    assert [row[f"gap_{n}"] for n in (1, 2, 3)] == pytest.approx([0.5, 1, 2.75 / 3])
    assert row["minutes"] == pytest.approx((1.5 + 2.5) / 2)


def test_only_runs_with_both_cores_are_timed(results):
    write_run(results, "margin_s1", SECOND, threads=1)
    write_run(results, "pairwise_s0", TEN, threads=1)
    write_run(results, "pairwise_s1", TEN, threads=1)
    margin, pairwise = accuracy_table(results, ["margin", "pairwise"], PAIRS, 20)["minutes"]
    assert margin == pytest.approx(1.5)
    assert math.isnan(pairwise)


def test_likelihood_and_its_constant_by_hand(results):
    scalar, ten = accuracy_table(results, ["margin", "pairwise"], PAIRS, 4000).to_dict("records")
    losses = np.log1p(np.exp(-GAPS)).mean(axis=0)
    worst, best = losses[3], losses[4]
    assert triple(scalar, "nll") == pytest.approx((losses.mean(), best, worst), rel=1e-5)
    assert triple(ten, "nll") == pytest.approx(
        (-LOG_WIN.mean(), -LOG_WIN[:3].mean(), -LOG_WIN[4]), rel=1e-5
    )
    assert triple(scalar, "nll_untied") == pytest.approx(triple(scalar, "nll"), rel=1e-5)
    # Given no tie, the ten classes are sure of the pairs of p0, toss a coin on p1, err on p2.
    assert triple(ten, "nll_untied") == pytest.approx((math.log(8) / 5, 0, math.log(4)), abs=1e-6)
    columns = list(scalar)
    assert columns.index("nll_untied") == columns.index("nll_high") + 1
    assert ten["accuracy_sd"] == 0


def test_calibration_error_is_the_mean_of_the_seeds(results, monkeypatch):
    row = accuracy_table(results, ["margin"], PAIRS, SAMPLES).loc[0]
    sure = 1 / (1 + np.exp(-np.abs(GAPS)))
    # The tie is right by half and half sure; what errs is as wrong as it is sure.
    first = (2 * (1 - sure[0, 0]) + 0 + sure[0, 3] + (1 - sure[0, 4])) / 5
    assert row["ece"] == pytest.approx((first + (1 - sure[1]).mean()) / 2, rel=1e-5)
    calls = []

    def error(p, bins):
        calls.append((p.tolist(), bins))
        return len(calls)

    monkeypatch.setattr("utils.statistics.reward_report.expected_calibration_error", error)
    row = accuracy_table(results, ["margin"], PAIRS, SAMPLES).loc[0]
    assert row["ece"] == 1.5
    np.testing.assert_allclose([call[0] for call in calls], 1 / (1 + np.exp(-GAPS)), rtol=1e-5)
    assert calls[0][1] == 10


def test_one_seed_has_no_spread(tmp_path):
    write_run(tmp_path, "margin_s3", FIRST)
    row = accuracy_table(tmp_path, ["margin"], PAIRS, SAMPLES).loc[0]
    assert row["seeds"] == 1
    assert math.isnan(row["accuracy_sd"])
    assert row["accuracy"] == pytest.approx(0.7)
    assert "p_3" in pair_frame(study_runs(tmp_path, "margin"), PAIRS)


def test_no_runs_no_rows(tmp_path):
    for table in (accuracy_table, category_table):
        assert table(tmp_path, ["margin"], PAIRS, SAMPLES).empty
    assert learning_curve_table(tmp_path / "missing", PAIRS, SAMPLES).empty


def test_categories(results):
    table = category_table(results, ["margin", "pairwise", "soft"], PAIRS, 4000)
    assert table.columns.tolist() == ["arm", "category", "value", "low", "high", "n"]
    rows = table.set_index(["arm", "category"])
    assert tuple(rows.loc[("margin", "a")]) == pytest.approx((2.75 / 3, 2.75 / 3, 2.75 / 3, 3))
    assert tuple(rows.loc[("margin", "b")]) == pytest.approx((0.75, 0.5, 1, 2))
    assert tuple(rows.loc[("pairwise", "b")]) == pytest.approx((0.5, 0, 1, 2))
    assert len(rows) == 4


def test_learning_curve(results):
    own = {"data.fingerprint": "e" * 16}
    write_run(results, "margin_10_s0", FIRST, 46, config=own)
    table = learning_curve_table(results, PAIRS, 4000)
    rows = table.set_index(["arm", "pairs"])
    assert table["arm"].tolist() == ["margin_10"] * 2 + ["margin"] * 2 + ["pairwise"] * 2
    assert table["kind"].tolist() == ["scalar"] * 4 + ["ordinal"] * 2
    assert table["prompts"].tolist() == [46] * 2 + [460] * 4, "all are those of the embedded set"
    assert table["seeds"].tolist() == [1, 1, 2, 2, 2, 2]
    columns = ["value", "low", "high", "n"]
    assert tuple(rows.loc[("margin", "all pairs"), columns]) == pytest.approx((0.85, 0.5, 1, 5))
    between = rows.loc[("margin_10", "between samples"), columns]
    assert tuple(between) == pytest.approx((0.5, 0, 1, 3))


def test_difference_over_shared_seeds(results):
    write_run(results, "bt_s1", FIRST)
    write_run(results, "bt_s2", SECOND)
    table = difference_table(results, ["bt", "margin", "soft", "pairwise"], "margin", PAIRS, 4000)
    assert table["arm"].tolist() == ["bt", "pairwise"]
    assert table["reference"].tolist() == ["margin"] * 2
    bt, ten = table.to_dict("records")
    assert (bt["label"], bt["seeds"], ten["seeds"]) == ("Bradley-Terry", 1, 2)
    # Only seed 1 is in both: FIRST less SECOND, that is 0, 0, -.5, -1, 0 of a pair.
    assert triple(bt, "accuracy") == pytest.approx((-1.5 / 5, -1, 0))
    assert triple(bt, "model_pairs") == pytest.approx((-1.5 / 3, -1, 0))
    losses = np.log1p(np.exp(-GAPS[0])) - np.log1p(np.exp(-GAPS[1]))
    by_prompt = losses[:3].mean(), losses[3], losses[4]
    expected = (losses.mean(), min(by_prompt), max(by_prompt))
    assert triple(bt, "nll") == pytest.approx(expected, rel=1e-4, abs=1e-6)
    # The ten classes are right on 1, 1, 1, 1, 0.
    assert triple(ten, "accuracy") == pytest.approx((-0.25 / 5, -1, 0.5))
    assert all(math.isnan(value) for value in triple(ten, "nll")), "ties are paid by one kind only"


def test_an_arm_does_not_differ_from_itself(results):
    for seed, rewards in enumerate((FIRST, SECOND)):
        write_run(results, f"trl_s{seed}", rewards)
    row = difference_table(results, ["trl"], "margin", PAIRS, 100).loc[0]
    for name in ("accuracy", "model_pairs", "nll"):
        assert triple(row, name) == (0, 0, 0)


def test_a_difference_needs_a_reference_and_a_shared_seed(results):
    write_run(results, "bt_s2", FIRST)
    with pytest.raises(ResultsError, match="'soft' has no run: publish reward_models/soft/seed0"):
        difference_table(results, ["margin"], "soft", PAIRS, 20)
    with pytest.raises(ResultsError, match="'bt' and 'margin' have no seed in common"):
        difference_table(results, ["bt"], "margin", PAIRS, 20)


def test_an_ensemble_weighs_its_seeds_alike(tmp_path):
    """The first seed's scale is a hundred times the second's; where it is unsure, it gives way."""
    loud = [900.0, 0, -900, 0, 100, 0, 0]
    quiet = [1.0, 0, -1, 2, -2, -1, 1]
    for seed, rewards in enumerate((loud, quiet)):
        write_run(tmp_path, f"margin_s{seed}", rewards)
    runs = study_runs(tmp_path, "margin")
    found = ensemble_accuracy(runs, PAIRS, 4000)
    assert found == {"value": 0.8, "low": 0, "high": 1, "n": 5}
    alone = [ensemble_accuracy([run], PAIRS, 20)["value"] for run in runs]
    assert alone == [3.5 / 5, 4 / 5], "the loud one errs on p1 and ties on p2"


# Runs that do not compare


def test_runs_on_different_data_are_named(results):
    write_run(results, "bt_s0", FIRST, config={"data.fingerprint": "e" * 16})
    message = (
        "margin/seed0 and reward_models/bt/seed0 were trained on different data .fingerprints f+ "
    )
    for table in (accuracy_table, category_table):
        with pytest.raises(ResultsError, match=message):
            table(results, ["margin", "bt"], PAIRS, 20)
    with pytest.raises(ResultsError, match=message):
        difference_table(results, ["bt"], "margin", PAIRS, 20)
    assert len(accuracy_table(results, ["bt"], PAIRS, 20)) == 1


def test_only_the_learning_curve_may_mix_sizes(results):
    write_run(results, "margin_10_s0", FIRST, 46, config={"data.fingerprint": "e" * 16})
    with pytest.raises(
        ResultsError, match="reward_models/margin_10/seed0 were trained on different data"
    ):
        accuracy_table(results, ["margin", "margin_10"], PAIRS, 20)
    write_run(results, "pairwise_10_s0", TEN, 46, config={"data.fingerprint": "d" * 16})
    message = "margin_10/seed0 and reward_models/pairwise_10/seed0 were trained on different data"
    with pytest.raises(ResultsError, match=message):
        learning_curve_table(results, PAIRS, 20)


def test_runs_that_scored_different_responses_are_named(results):
    write_run(results, "bt_s0", FIRST, groups=(*GROUPS[:2], group("p2", "b", 2.5, 1.25)))
    message = "reward_models/margin/seed0 and reward_models/bt/seed0 scored different responses"
    with pytest.raises(ResultsError, match=message):
        accuracy_table(results, ["margin", "bt"], PAIRS, 20)


@pytest.mark.parametrize("groups", [GROUPS[:2], (*GROUPS[:2], group("p2", "b", 2.5, 1.25))])
def test_a_run_that_scored_other_responses_than_the_pairs(tmp_path, groups):
    responses = sum(len(g.responses) for g in groups)
    write_run(tmp_path, "bt_s0", FIRST[:responses], groups=groups)
    with pytest.raises(
        ResultsError, match="reward_models/bt/seed0 scored other responses than those of"
    ):
        accuracy_table(tmp_path, ["bt"], PAIRS, 20)


# Against rules


def test_arms_against_the_best_rule_pair_by_pair(results):
    rules = pd.DataFrame({"longer": [1.0, 1, 1, 0, 0], "shorter": 0.0, "finished": 0.5})
    rules["bag_of_words"] = [0.0, 0, 0, 1, 1]
    rules["cooler"] = [1.0, 1, 1, 1, 1]
    found = versus_rules(results, ["soft", "margin", "pairwise"], PAIRS, rules, 4000)
    assert found["pairs"].tolist() == ["all pairs"] * 2 + ["between samples"] * 2
    assert found["rule"].tolist() == ["longer"] * 2 + ["bag_of_words"] * 2, "cooler reads no text"
    assert found["arm"].tolist() == ["margin", "pairwise"] * 2
    margin, ten, between, _ = found.to_dict("records")
    assert (margin["seeds"], margin["accuracy"], margin["rule_accuracy"]) == (2, 0.85, 0.6)
    # CORRECT less the rule's: 0, 0, -.25, .5, 1; the extremes over prompts are p0 and p2 thrice.
    assert triple(margin, "difference") == pytest.approx((0.25, -0.25 / 3, 1))
    # The ten classes are right on 1, 1, 1, 1, 0: as the rule is but for p1, so never worse, where
    # the separate intervals, [0, 1] both, would overlap whatever the two have in common.
    assert triple(ten, "difference") == pytest.approx((0.2, 0, 1))
    # Between samples, CORRECT is .75, .5, 1 and the rule's 0, 1, 1.
    assert (between["accuracy"], between["rule_accuracy"]) == (0.75, 2 / 3)
    assert triple(between, "difference") == pytest.approx((0.25 / 3, -0.5, 0.75))
