"""Bootstrap intervals over prompts, and over prompts and seeds."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.statistics.bootstrap import (
    cluster_draws,
    clustered_interval,
    crossed_interval,
    crossed_sums,
    named,
    named_interval,
    percentile_interval,
    side,
)

SAMPLES = 2000


def draws(count, seed=0):
    return np.random.default_rng(seed).normal(size=count)


def width(interval):
    return interval["high"] - interval["low"]


def names(count, copies=1):
    return [f"p{i}" for i in range(count) for _ in range(copies)]


def ends(found):
    return found["value"], found["low"], found["high"]


# Prompts


def test_draws_by_hand():
    cluster, drawn = cluster_draws(["b", "a", "b", "c"], 500, seed=3)
    assert cluster.tolist() == [1, 0, 1, 2]
    assert drawn.shape == (501, 3)
    assert drawn[0].tolist() == [1, 1, 1], "the first row is the sample as it is"
    assert set(drawn.sum(axis=1)) == {3}, "as many clusters are drawn as there are"
    assert drawn[1:].mean(axis=0) == pytest.approx(1, abs=0.15)
    picks = np.random.default_rng(3).integers(0, 3, (500, 3))
    assert drawn[7].tolist() == np.bincount(picks[6], minlength=3).tolist()


def test_draws_make_the_interval_of_the_rows_repeated():
    values, clusters = draws(40), names(8, 5)
    cluster, drawn = cluster_draws(clusters, 200)
    slow = np.array([np.repeat(values, times[cluster]).mean() for times in drawn])
    expected = {**percentile_interval(slow), "n": 40}
    assert clustered_interval(values, clusters, 200) == pytest.approx(expected)


def test_percentiles_leave_out_the_sample_and_what_has_no_value():
    values = np.array([70.0, *range(41), math.nan])
    assert percentile_interval(values) == {"value": 70, "low": 1, "high": 39}
    named = percentile_interval(values, "auc", "auc_")
    assert named == {"auc": 70, "auc_low": 1, "auc_high": 39}
    none = percentile_interval(np.array([1.0, math.nan]))
    assert none == pytest.approx({"value": 1, "low": math.nan, "high": math.nan}, nan_ok=True)


def test_values_that_are_missing_do_not_count():
    found = clustered_interval([1, math.nan, 3], ["a", "b", "b"], 400)
    assert (found["value"], found["low"], found["high"]) == (2, 1, 3)


def test_interval_by_hand():
    """Two clusters: a resample is either of them twice, or both."""
    found = clustered_interval([1, 3, 10], ["a", "a", "b"], 4000)
    assert found["value"] == pytest.approx(14 / 3)
    assert found["n"] == 3
    assert (found["low"], found["high"]) == (2, 10)


@pytest.mark.parametrize(
    ("values", "clusters"), [([4.0] * 6, names(6)), ([1.0, 4.0, 7.0], ["a"] * 3), ([4.0], ["a"])]
)
def test_without_variation_between_prompts_the_interval_is_a_point(values, clusters):
    found = clustered_interval(values, clusters, 100)
    assert (found["value"], found["low"], found["high"]) == (4, 4, 4)


def test_copies_of_a_row_do_not_shrink_the_interval():
    values = draws(40)
    single = clustered_interval(values, names(40), 500)
    copied = clustered_interval(np.repeat(values, 9), names(40, 9), 500)
    for name in ("value", "low", "high"):
        assert copied[name] == pytest.approx(single[name]), (
            "rows are resampled instead of prompts: samples of one prompt pass for new prompts"
        )
    rows = clustered_interval(np.repeat(values, 9), map(str, range(360)), 500)
    assert width(rows) < 0.5 * width(single), "what resampling rows would give"
    assert copied["n"] == 360


def test_the_interval_is_a_function_of_its_seed():
    values = draws(30)
    first, same, other = (clustered_interval(values, names(30), 200, s) for s in (0, 0, 1))
    assert first == same
    assert first != other


def test_the_interval_does_not_depend_on_the_order_of_the_rows():
    values, clusters = draws(40), names(8, 5)
    order = np.random.default_rng(1).permutation(40)
    shuffled = clustered_interval(values[order], [clusters[i] for i in order], 300)
    assert shuffled == pytest.approx(clustered_interval(values, clusters, 300))


def test_the_interval_covers_the_mean_about_95_times_in_100():
    covered = 0
    for seed in range(200):
        values = np.repeat(draws(40, seed), 3) + 0.1 * draws(120, seed + 1000)
        found = clustered_interval(values, names(40, 3), 300)
        covered += found["low"] <= 0 <= found["high"]
    assert 0.88 <= covered / 200 <= 0.99


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12), st.floats(-1e3, 1e3))
def test_the_interval_moves_with_the_values(values, shift):
    plain = clustered_interval(values, names(len(values)), 50)
    moved = clustered_interval([v + shift for v in values], names(len(values)), 50)
    assert plain["low"] <= plain["high"]
    for name in ("value", "low", "high"):
        assert moved[name] == pytest.approx(plain[name] + shift, abs=1e-6)


# Prompts and seeds


def test_one_seed_is_the_bootstrap_over_prompts():
    values = np.random.default_rng(1).normal(size=(1, 12))
    prompts = [f"p{i:02}" for i in range(12)]
    found = crossed_interval(values, 500, seed=3)
    expected = clustered_interval(values[0], prompts, 500, seed=3)
    assert ends(found) == pytest.approx(ends(expected), abs=1e-12)
    assert (found["seeds"], found["n"]) == (1, 12)
    assert math.isnan(found["seed_sd"])
    assert math.isnan(found["seeds_agree"])


def test_seeds_that_differ_widen_the_interval_however_many_prompts():
    """Prompts that all say the same leave only the seeds: three draws of -1, 0 and 4."""
    values = np.repeat([[-1.0], [0.0], [4.0]], 200, axis=1)
    found = crossed_interval(values, SAMPLES)
    # The same seed three times has chance 1/27 > 2.5%; prompts alone would give an interval of 0.
    assert ends(found) == pytest.approx((1, -1, 4))
    assert found["seed_sd"] == pytest.approx(np.std([-1, 0, 4], ddof=1))
    assert found["seeds_agree"] is False
    assert crossed_interval(values + 2, 20)["seeds_agree"] is True
    assert crossed_interval(-values - 2, 20)["seeds_agree"] is True


def test_more_seeds_of_the_same_prompts_are_no_more_prompts():
    one = np.random.default_rng(0).normal(size=(1, 30))
    alone, tripled = (crossed_interval(np.repeat(one, k, axis=0), SAMPLES) for k in (1, 3))
    assert ends(tripled) == pytest.approx(ends(alone))
    pooled = crossed_interval(np.tile(one, 3), SAMPLES)  # the mistake: 90 independent rows
    assert pooled["high"] - pooled["low"] < 0.75 * (tripled["high"] - tripled["low"])


def test_both_factors_count():
    generator = np.random.default_rng(0)
    prompts, seeds = generator.normal(size=(1, 40)), np.array([[-1.0], [0.0], [1.0]])
    found = crossed_interval(prompts + seeds, SAMPLES)
    sd = (found["high"] - found["low"]) / 3.92
    expected = math.hypot(prompts.std() / math.sqrt(40), np.std([-1, 0, 1]) / math.sqrt(3))
    assert sd == pytest.approx(expected, rel=0.1)


def test_cells_without_a_value_do_not_count():
    values = np.array([[1.0, np.nan, 4.0], [3.0, np.nan, np.nan]])
    found = crossed_interval(values, SAMPLES)
    assert found["value"] == pytest.approx(8 / 3), "not the mean of the seeds', nor with zeros"
    assert (found["low"], found["high"], found["n"]) == (1, 4, 2)
    nothing = crossed_interval(np.full((2, 3), np.nan), 20)
    assert all(math.isnan(value) for value in ends(nothing))
    assert nothing["n"] == 0


def test_sums_start_with_the_plain_one_and_repeat():
    totals = np.arange(24.0).reshape(2, 3, 2, 2)
    sums = crossed_sums(totals, 50)
    assert sums.shape == (51, 2, 2)
    np.testing.assert_allclose(sums[0], totals.sum((0, 1)))
    np.testing.assert_array_equal(sums, crossed_sums(totals, 50))
    assert not np.array_equal(sums, crossed_sums(totals, 50, seed=1))
    # Each resample draws two seeds and three prompts, hence six cells.
    np.testing.assert_allclose(crossed_sums(np.ones((2, 3)), 50), 6)


# Reading


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.1, 0.2, 1), (-0.2, -0.1, -1), (-0.1, 0.1, 0), (1.8e-18, 0.1, 0), (-0.1, -1.8e-18, 0)],
)
def test_an_end_at_zero_but_for_rounding_holds_zero(low, high, expected):
    assert side(low, high) == expected


def test_a_value_and_its_interval_are_three_columns():
    found = {"value": 1, "low": 0, "high": 3}
    assert named("gain", found) == {"gain": 1, "gain_low": 0, "gain_high": 3}
    assert named_interval(named("gain", found), "gain") == found


def test_a_number_without_an_interval_has_no_ends():
    row = {"ece": 0.02, "nll": 0.4, "nll_low": 0.3, "nll_high": 0.5}
    assert named_interval(row, "ece") == {"value": 0.02}
    assert named_interval(row, "nll") == {"value": 0.4, "low": 0.3, "high": 0.5}
    with pytest.raises(KeyError):
        named_interval(row, "accuracy")
