"""The tables of the policy study, from small made-up evaluations whose numbers are known."""

import math

import numpy as np
import pandas as pd
import pytest

from utils.files import ResultsError, write_json, write_jsonl
from utils.statistics import policy_report
from utils.statistics.policy_length import (
    length_regression,
    length_table,
    level_table,
    matched_gains,
    regression_table,
)
from utils.statistics.policy_report import (
    best_of_n_table,
    policy_category_table,
    policy_table,
    seed_table,
    temperature_table,
)
from utils.statistics.policy_runs import (
    arms_of,
    frame_of,
    policies_of,
    policy_frames,
    rewards_of,
    seeds_of,
)

SAMPLES = 400
RUN = {"status": "finished", "seed": 0, "config": {}, "data_fingerprint": "f" * 16, "seconds": 9.0}
PLACE = "policies/scalar/seed0/test"
SCALES = {"scalar": [0.0, 1.0], "ordinal": [4.0, 2.0], "judge": [0.0, 1.0]}


def evaluation(judge, **columns):
    """Rows for three prompts, as many of each as fit; the other columns are told or constant."""
    each = len(judge) // 3
    place = np.repeat(np.arange(3), each)
    judge = np.asarray(judge, dtype=float)
    made = {
        "prompt_id": [f"p{i}" for i in place],
        "category": [("a", "b", "b")[i] for i in place],
        "prompt": [f"question {i}?" for i in place],
        "response": [f"answer {value} to {i}" for i, value in zip(place, judge, strict=True)],
        "finished": True,
        "length": 20,
        "repetition": 0.0,
        "kl": 1.5,
        "reward_scalar": judge * 2,
        "reward_ordinal": judge * 3,
        "reward_judge": judge,
        "temperature": 0.7,
    }
    return pd.DataFrame(made | columns)


def write_evaluation(results, place, frame, temperature=0.7, **changes):
    folder = results / "cpu" / place
    info = RUN | {"config": {"temperature": temperature}, "scales": SCALES}
    write_json(folder / "run.json", info | changes)
    write_jsonl(folder / "samples.jsonl", frame.drop(columns="temperature").to_dict("records"))


def write_controls(results):
    for name in ("sft", "sft_best", "sft_greedy"):
        write_evaluation(results, f"controls/{name}/test", SFT)
    write_evaluation(results, "controls/sft_pool/test", evaluation(range(12)))


def triple(row, name):
    return tuple(row[f"{name}{end}"] for end in ("", "_low", "_high"))


SFT = evaluation([0.0, 1, 2, 3, 4, 5])


@pytest.fixture
def frames():
    """Two seeds that gain 1, 1, 0 and 3, 1, 0 by prompt, and controls."""
    pool = evaluation([0.0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11], kl=math.nan)
    greedy = {"temperature": 0.0, "kl": 9.0}
    return {
        "sft": evaluation([0.0, 1, 2, 3, 4, 5], kl=0.0),
        "scalar_s0": evaluation([1.0, 2, 3, 4, 4, 5]),
        "scalar_s1": evaluation([3.0, 4, 3, 4, 4, 5], kl=2.5),
        "scalar_s0_greedy": evaluation([2.0, 2, 2, 2, 2, 2], **greedy),
        "sft_16bit": evaluation([0.0, 1, 2, 3, 4, 5], kl=math.nan),
        "sft_best": evaluation([2.0, 1, 2, 3, 4, 5], temperature=0.2),
        "sft_greedy": evaluation([1.0, 1, 1, 1, 1, 1], **greedy),
        "sft_pool": pool,
    }


# Reading


def test_evaluations_as_published(tmp_path):
    for place in ("scalar/seed10", "scalar/seed2", "ordinal/seed0", "scalar_average"):
        write_evaluation(tmp_path, f"policies/{place}/test", SFT)
    write_evaluation(tmp_path, "policies/scalar/seed2/test_greedy", SFT, 0.0)
    for aside in ("scalar/seed2@0123/test", "scalar/seed2/test@0123", "scalar/seed2/test@damaged"):
        write_evaluation(tmp_path, f"policies/{aside}", SFT, status="running")
    write_evaluation(tmp_path, "controls/sft_16bit/test", SFT.assign(kl=math.nan))
    write_evaluation(tmp_path, "controls/sft_T0.2/validation", SFT[:2])
    write_controls(tmp_path)
    found = policy_frames(tmp_path)
    pd.testing.assert_frame_equal(found["sft"], SFT, check_dtype=False)
    assert next(iter(found)) == "sft"
    assert arms_of(found) == ["ordinal", "scalar"]
    others = ["sft", "scalar_average", "scalar_s2_greedy", "sft_16bit", "sft_best", "sft_greedy"]
    assert policies_of(found) == ["ordinal", "scalar", *others]
    assert [*seeds_of(found, "scalar")] == [2, 10]
    assert [*seeds_of(found, "sft_16bit")] == [None]
    assert found["sft_16bit"]["kl"].isna().all()
    assert found["scalar_s2_greedy"]["temperature"].eq(0).all()
    with pytest.raises(ResultsError, match="no evaluation of 'sft_4bit', only of sft, ordinal_s0"):
        frame_of(found, "sft_4bit")


def test_own_rewards():
    assert rewards_of("sft_best") == {"judge": "reward_judge"}
    assert rewards_of("scalar_none")["own"] == rewards_of("scalar_s0_greedy")["own"]
    assert rewards_of("ordinal_average")["own"] == "reward_ordinal"
    for name in ("ordinal_cautious", "ordinal_cautious_s0_greedy"):
        assert rewards_of(name) == {"judge": "reward_judge"}, "the mean is not what it learned from"


@pytest.mark.parametrize(
    ("frame", "changes", "message"),
    [
        (SFT, {"status": "running"}, f"{PLACE} is not finished, its status is 'running'"),
        (SFT.drop(columns="reward_judge"), {}, rf"{PLACE} lacks the reward of \['judge'"),
        (SFT[::-1], {}, f"controls/sft/test and {PLACE} have other prompts, another order"),
        (SFT, {"scales": {}}, f"{PLACE} measured rewards on different scales"),
    ],
)
def test_evaluations_that_do_not_compare_are_named(tmp_path, frame, changes, message):
    write_controls(tmp_path)
    write_evaluation(tmp_path, PLACE, frame, **changes)
    with pytest.raises(ResultsError, match=message):
        policy_frames(tmp_path)


def test_tables_of_nothing_are_empty():
    tables = (policy_table, seed_table, best_of_n_table, policy_category_table, temperature_table)
    for table in (*tables, length_table, regression_table, level_table):
        assert table({}, SAMPLES).empty, table.__name__


# All policies


def test_policies_by_hand(frames):
    table = policy_table(frames, 4000).set_index("policy")
    assert [*table.index] == ["scalar", "sft", "scalar_s0_greedy", *[*frames][4:7]], "no pool"
    row = table.loc["scalar"]
    assert (row["group"], row["seeds"], row["n"]) == ("arm", 2, 3)
    # Prompts gain 1, 1, 0 with one seed and 3, 1, 0 with the other: p2 thrice has 1/27.
    assert triple(row, "gain_judge") == pytest.approx((1, 0, 7 / 3))
    assert row["gain_judge_sd"] == pytest.approx((4 / 3 - 2 / 3) / math.sqrt(2))
    assert row["gain_judge_agree"] is True
    assert row["gain_ordinal"] == pytest.approx(3)
    assert row["reward_scalar"] == pytest.approx(2 * 3.5)
    assert row["reward_judge_high"] - row["reward_judge_low"] > 1, "prompts differ, gains less"
    assert row["kl"] == pytest.approx(2)
    assert (row["win"], row["tie"], row["loss"]) == pytest.approx((2 / 3, 1 / 3, 0))
    assert row["win_rate"] == pytest.approx(5 / 6)
    # Against 2, 1, 2, 3, 4, 5: one seed loses a row and wins three, the other wins four.
    assert (row["win_best"], row["tie_best"]) == pytest.approx((7 / 12, 4 / 12))
    assert row["loss_best"] == pytest.approx(1 / 12)
    assert row["win_rate_best"] == pytest.approx(9 / 12)
    sft = table.loc["sft"]
    assert triple(sft, "gain_judge") == (0, 0, 0)
    assert (sft["group"], sft["seeds"], sft["tie"], sft["win_rate"]) == ("control", 1, 1, 0.5)
    assert math.isnan(sft["gain_judge_sd"])
    assert math.isnan(table.loc["sft_16bit", "kl"])
    averaged = policy_table(frames | {"scalar_average": frames["scalar_s1"]}, 50)
    row = averaged.set_index("policy").loc["scalar_average"]
    assert (row["group"], row["seeds"], row["gain_judge"]) == ("average", 1, pytest.approx(4 / 3))


def test_seeds_pooled_are_not_independent_prompts(frames):
    """The same answers under three seeds give the interval of one seed, not a narrower one."""
    frames = {"sft": frames["sft"], "sft_best": frames["sft_best"]}
    once = policy_table({**frames, "scalar_s0": SFT * 1}, SAMPLES)
    copies = {f"scalar_s{seed}": SFT for seed in range(3)}
    thrice = policy_table({**frames, **copies}, SAMPLES)
    for name in ("reward_judge", "gain_judge", "win_rate_best"):
        assert triple(thrice.loc[0], name) == pytest.approx(triple(once.loc[0], name))
    columns = ["distinct_2", "distinct2_ratio", "distinct_2_words", "distinct2_ratio_words"]
    pd.testing.assert_frame_equal(thrice[columns], once[columns])
    assert thrice.loc[0, "distinct2_ratio"] == 1, "seeds that say the same repeat nothing"


def test_diversity_on_as_many_words(frames):
    """SFT says twelve different words per text, the policy two: few words repeat less."""
    long = [" ".join(f"w{(i * 12 + j) % 36}" for j in range(12)) for i in range(6)]
    short = [f"x{i} y{i}" for i in range(6)]
    given = {"sft": frames["sft"].assign(response=long), "sft_best": frames["sft_best"]}
    given["sft_best"] = given["sft_best"].assign(response=long)
    table = policy_table({**given, "scalar_s0": frames["scalar_s0"].assign(response=short)}, 50)
    row = table.set_index("policy").loc["scalar"]
    assert row["words"] == 12
    assert row["distinct2_ratio"] == pytest.approx(2), "all the policy's, half of the SFT model's"
    assert row["distinct2_ratio_words"] == pytest.approx(1), "twelve words repeat nothing"


def test_seeds(frames):
    table = seed_table(frames, 4000)
    assert table["seed"].tolist() == [0, 1]
    assert table["policy"].tolist() == ["scalar"] * 2
    assert triple(table.loc[0], "gain_judge") == pytest.approx((2 / 3, 0, 1))
    assert triple(table.loc[1], "gain_own") == pytest.approx((8 / 3, 0, 6))
    assert table["kl"].tolist() == [1.5, 2.5]


def test_categories(frames):
    rows = policy_category_table(frames, 4000).set_index(["policy", "reward", "category"])
    columns = ["value", "low", "high", "n"]
    assert len(rows) == 4
    assert tuple(rows.loc[("scalar", "judge", "a"), columns]) == pytest.approx((2, 1, 3, 1))
    assert tuple(rows.loc[("scalar", "own", "b"), columns]) == pytest.approx((1, 0, 2, 2))


def test_temperature(frames):
    table = temperature_table(frames, SAMPLES)
    rows = table.set_index(["decoding", "against"])
    assert [*rows.index] == [
        (decoding, against)
        for decoding in ("sampled", "greedy")
        for against in ("sft_best", "sft_greedy")
    ]
    assert rows["temperature"].tolist() == [0.7, 0.7, 0, 0]
    assert rows["seeds"].tolist() == [2, 2, 1, 1]
    # Means: arm 3.5, its greedy decoding 2, SFT at its best 17/6, greedy 1; own rewards twice that.
    assert rows["judge"].tolist() == pytest.approx([3.5 - 17 / 6, 2.5, 2 - 17 / 6, 1])
    assert rows["own"].tolist() == pytest.approx((2 * rows["judge"]).tolist())
    assert triple(rows.loc[("greedy", "sft_greedy")], "judge") == (1, 1, 1)


def test_best_of_n_by_hand(monkeypatch):
    """Four samples per prompt; the judge prefers what the proxy puts second."""
    proxy = [0.0, 1, 2, 3] * 3
    judge = [0.0, 0, 6, 0, 1, 1, 7, 1, 2, 2, 8, 2]
    pool = evaluation(judge, reward_scalar=proxy, length=[10, 20, 30, 40] * 3)
    pool["finished"] = [True, True, True, False] * 3
    monkeypatch.setattr(policy_report, "PROXIES", ["scalar"])
    monkeypatch.setattr(policy_report, "PICKED_FROM", [1, 2, 4])
    table = best_of_n_table({"sft_pool": pool}, SAMPLES)
    assert table["kl"].tolist() == pytest.approx([0, math.log(2) - 0.5, math.log(4) - 0.75])
    assert table["sqrt_kl"].tolist() == pytest.approx([k**0.5 for k in table["kl"]])
    assert table["reward"].tolist() == pytest.approx([1.5, (1 + 2 * 2 + 3 * 3) / 6, 3])
    assert table["reward_gain"].tolist() == pytest.approx([0, 14 / 6 - 1.5, 1.5])
    assert table["judge"].tolist() == pytest.approx([2.5, 3, 1])
    assert table["length"].tolist() == pytest.approx([25, 200 / 6, 40])
    assert table["finished"].tolist() == pytest.approx([0.75, 0.5, 0])
    assert triple(table.loc[1], "judge_gain") == pytest.approx((0.5, 0.5, 0.5)), "paired"
    assert table.loc[1, "judge_low"] < 3 < table.loc[1, "judge_high"], "over prompts"


# Equal length


def lengths(values, judge, **columns):
    return evaluation(judge, length=values, **columns)


def test_a_match_is_the_nearest_of_the_same_prompt():
    policy = lengths([10, 60, 30], [5.0, 5, 5])
    pool = lengths([16, 15, 48, 72, 10, 60], [0.0, 1, 2, 4, 9, 9])
    found = matched_gains(policy, pool, "reward_judge")
    # 15 is five tokens from 10; 48 and 72 are both 20% from 60, so their mean; 10 and 60 are the
    # very lengths of the other prompts, and far from 30.
    np.testing.assert_allclose(found, [4, 2, np.nan])
    np.testing.assert_allclose(matched_gains(policy, pool, "length"), [-5, 0, np.nan])
    just_over = lengths([9, 60, 30], [5.0, 5, 5])
    apart = lengths([15, 15, 47, 73, 10, 60], [0.0, 1, 2, 4, 9, 9])
    assert np.isnan(matched_gains(just_over, apart, "reward_judge")).all()


def test_a_match_may_have_to_end_alike():
    policy = lengths([20, 20, 20], [5.0, 5, 5], finished=[True, False, True])
    ended = [False, True, False, True, False, False]
    pool = lengths([20, 22, 20, 20, 20, 20], [0.0, 1, 2, 3, 4, 4], finished=ended)
    np.testing.assert_allclose(matched_gains(policy, pool, "reward_judge"), [5, 2.5, 1])
    alike = matched_gains(policy, pool, "reward_judge", same_finish=True)
    np.testing.assert_allclose(alike, [4, 3, np.nan])


def linear(generator, gain, slope, finish, shift):
    """An SFT evaluation and one whose gain is linear in what changed, and else `gain`."""
    before = generator.integers(40, 96, 12)
    after = np.maximum(before + shift - generator.integers(0, 20, 12), 2)
    ended = [generator.integers(0, 2, 12).astype(bool) for _ in range(2)]
    start = generator.normal(size=12)
    change = slope * (after - before) / 10 + finish * (ended[1].astype(int) - ended[0])
    base = lengths(before, start, finished=ended[0])
    return base, lengths(after, start + gain + change, finished=ended[1])


def test_regression_finds_what_length_and_ending_do_not_explain():
    generator = np.random.default_rng(0)
    base, own = linear(generator, gain=0.25, slope=-0.5, finish=1.5, shift=-30)
    assert (own["reward_judge"] - base["reward_judge"]).mean() > 1, "mostly by being shorter"
    found = length_regression([own], [base], "reward_judge", SAMPLES)
    for name, value in (("unchanged", 0.25), ("per_10_tokens", -0.5), ("per_finish", 1.5)):
        assert triple(found, name) == pytest.approx((value,) * 3, abs=1e-6)


def test_length_table(frames):
    frames["scalar_s0"]["length"] = [20, 20, 90, 90, 20, 90]
    rows = length_table(frames, SAMPLES).set_index(["policy", "reward", "method"])
    assert not {"sft", "sft_pool"} & {*rows.index.get_level_values("policy")}
    assert {*rows.loc["sft_greedy"].index.get_level_values("reward")} == {"judge"}
    raw, near, even, fitted = rows.loc[("scalar", "judge")].to_dict("records")
    assert raw["value"] == pytest.approx(1)
    assert (raw["matched"], raw["raw_there"], raw["seeds"], raw["n"]) == (1, raw["value"], 2, 3)
    assert raw["length_change"] == pytest.approx(210 / 12)
    # The pool has 1.5, 5.5, 9.5 on the prompts; of the first seed p1 has no match, p2 has one.
    cells = [0, -5.5, 2, -2, -5]
    assert near["value"] == pytest.approx(np.mean(cells)) == even["value"]
    assert near["matched"] == pytest.approx(9 / 12)
    assert near["raw_there"] == pytest.approx((1 + 0 + 3 + 1 + 0) / 5), "prompts, as in the value"
    assert near["length_change"] == 0
    assert near["n"] == 3, "p1 has a match under the other seed"
    slopes = regression_table(frames, SAMPLES).set_index(["policy", "reward"])
    columns = ["unchanged", "unchanged_low", "unchanged_high"]
    expected = slopes.loc[("scalar", "judge"), columns].tolist()
    assert [fitted[end] for end in ("value", "low", "high")] == expected


def test_levels_seed_by_seed(frames):
    frames["ordinal_s0"] = evaluation([2.0, 3, 3, 4, 4, 5], length=10, kl=4.0)
    frames["ordinal_s1"] = evaluation([4.0, 5, 3, 4, 4, 5], length=30, kl=4.0)
    frames["ordinal_s7"] = evaluation([99.0] * 6)
    frames["ordinal_s1"].loc[2:3, "length"] = 90
    table = level_table(frames, SAMPLES)
    assert {*zip(table["first"], table["second"], strict=True)} == {("scalar", "ordinal")}
    rows = table.set_index("method")
    raw = rows.loc["raw"]
    # Each seed gains 1 on p0 over its own twin; with the other seed it would be 3 or -1.
    assert (raw["value"], raw["low"], raw["high"]) == pytest.approx((1 / 3, 0, 1))
    assert (raw["seed_sd"], raw["seeds_agree"], raw["seeds"]) == (0, True, 2)
    assert (raw["kl_first"], raw["kl_second"]) == (2, 4)
    assert (raw["length_first"], raw["length_second"]) == (20, 30)
    assert rows["n"].tolist() == [3, 0, 0, 3], "no match within six tokens of 10, 30 or 90"
    frames["ordinal_cautious_s1"] = frames["ordinal_s0"].assign(reward_judge=0.0)
    pairs = level_table(frames, SAMPLES).groupby(["first", "second"], sort=False)["value"].first()
    assert [*pairs.index] == [("scalar", "ordinal"), ("ordinal", "ordinal_cautious")]
    assert pairs.iloc[1] == pytest.approx(-25 / 6), "against seed 1 alone"
    frames["ordinal_cautious_s5"] = frames.pop("ordinal_cautious_s1")
    with pytest.raises(ResultsError, match="'ordinal' and 'ordinal_cautious' have no seed in com"):
        level_table(frames, SAMPLES)


# Samples


# Real data
