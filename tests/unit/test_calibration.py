"""Calibration of pairs and ratings, against models whose calibration is known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from utils.statistics.calibration import (
    entropy_against_error,
    expected_calibration_error,
    rating_calibration,
    reliability,
    squeeze,
)


def bets(count, seed=0, believed=lambda c: c):
    """Return p of a model whose bets are right with probability c, but which states believed(c)."""
    draw = np.random.default_rng(seed)
    confidence = draw.uniform(0.5, 0.99, count)
    right = draw.random(count) < confidence
    stated = believed(confidence)
    return np.where(right, stated, 1 - stated)


def prompts(count, each=9):
    return [f"p{i // each}" for i in range(count)]


def test_reliability_by_hand():
    p = [0.9, 0.2, 0.6, 0.55, 0.7, 0.1]  # confidence .9 .8 .6 .55 .7 .9
    table = reliability(p, list("aabbcc"), bins=2, samples=200)
    assert list(table.columns) == ["confidence", "accuracy", "low", "high", "n"]
    assert table["n"].tolist() == [3, 3]
    assert table["confidence"].tolist() == pytest.approx([1.85 / 3, 2.6 / 3])
    assert table["accuracy"].tolist() == pytest.approx([1, 1 / 3])
    assert table.loc[1, ["low", "high"]].tolist() == pytest.approx([0, 0.5])  # a: 1 of 2, c: 0 of 1


def test_a_calibrated_model_lies_on_the_diagonal():
    p = bets(6000)
    table = reliability(p, prompts(6000), samples=500)
    assert table["n"].tolist() == [600] * 10
    assert (table["confidence"] - table["accuracy"]).abs().max() < 0.06
    assert table["confidence"].is_monotonic_increasing
    held = (table["low"] <= table["confidence"]) & (table["confidence"] <= table["high"])
    assert held.sum() >= 8
    assert expected_calibration_error(p) < 0.025


def test_the_error_of_an_overconfident_model_by_hand():
    """It says .9 and is right in 7 of 10: off by .2; it says .6 and is right in 5 of 10: by .1."""
    p = [0.9] * 7 + [0.1] * 3 + [0.6] * 5 + [0.4] * 5
    assert expected_calibration_error(p, bins=2) == pytest.approx(0.15)
    # Errors of opposite sign cancel in the mean, and not in the calibration error.
    opposite = [0.9] * 7 + [0.1] * 3 + [0.6] * 8 + [0.4] * 2
    assert expected_calibration_error(opposite, bins=2) == pytest.approx(0.2)
    assert expected_calibration_error(opposite, bins=1) == pytest.approx(0)


def test_ties_share_a_bin():
    """Half of the pairs tie: cut by place, they would make bins that differ by chance only."""
    p = [0.8, 0.2] * 30 + list(np.linspace(0.81, 0.99, 60))
    table = reliability(p, range(120), bins=10, samples=50)
    assert table["n"].sum() == 120
    assert table.loc[0, ["confidence", "accuracy", "n"]].tolist() == pytest.approx([0.8, 0.5, 60])
    assert table["confidence"].min() > 0.799
    assert table["n"].tolist() == [60, 12, 12, 12, 12, 12]
    constant = reliability([0.7, 0.3, 0.7], "abc", samples=50)  # 1 - .3 is not quite .7
    assert constant[["confidence", "n"]].values.tolist() == [pytest.approx([0.7, 3])]


# Ratings


def rated(given, expected, logits=None, each=4):
    """Return rows of a samples.jsonl; the logits are flat unless given."""
    logits = np.zeros((len(given), 10)) if logits is None else logits
    return [
        {"prompt_id": f"p{i // each}", "rating": float(g), "reward": float(e), "logits": list(row)}
        for i, (g, e, row) in enumerate(zip(given, expected, logits, strict=True))
    ]


def test_expected_by_given_rating():
    rows = rated([1, 1, 1.4, 9, 3], [2, 4, 6, 8, 5], each=2)
    table = rating_calibration(rows, 400)
    assert list(table.columns) == ["rating", "expected", "low", "high", "sd", "n"]
    assert table["rating"].tolist() == [1, 3, 9]
    assert table["expected"].tolist() == [4, 5, 8]
    assert table["sd"].tolist() == pytest.approx([np.std([2, 4, 6]), 0, 0])
    assert table["n"].tolist() == [3, 1, 1]
    assert table.loc[0, ["low", "high"]].tolist() == [3, 6]  # p0 has 2 and 4, p1 has 6


def test_squeeze_into_the_middle():
    given = np.tile(np.arange(1, 11), 20)
    found = squeeze(rated(given, 5 + (given - 5) / 4))
    assert found["slope"] == pytest.approx(0.25)
    assert found["slope_back"] == pytest.approx(4)
    assert [found["mean_given"], found["mean_expected"]] == pytest.approx([5.5, 5.125])
    assert found["sd_given"] == pytest.approx(given.std())
    assert found["sd_expected"] == pytest.approx(given.std() / 4)
    assert found["middle_given"] == pytest.approx(0.3)
    assert found["middle_expected"] == pytest.approx(0.9)  # ratings 1 to 9 become 4 to 6
    assert found["n"] == 200
    assert np.isnan(squeeze(rated([1, 2, 3, 4], [5, 5, 5, 5]))["slope_back"])


def test_a_calibrated_model_is_not_called_squeezed():
    """It knows half of the rating's variance: the slope is .5, the slope back 1."""
    draw = np.random.default_rng(0)
    expected = draw.normal(5, 1, 20000)
    found = squeeze(rated(expected + draw.normal(0, 1, 20000), expected))
    assert found["slope"] == pytest.approx(0.5, abs=0.02)
    assert found["slope_back"] == pytest.approx(1, abs=0.03)


def unsure(count, honest=True, seed=0):
    """Return rows whose error grows with their entropy, or shrinks; logits peak at the rating 5."""
    draw = np.random.default_rng(seed)
    peak = draw.uniform(0, 6, count)
    logits = np.zeros((count, 10))
    logits[:, 4] = peak
    size = draw.random(count) * (6 - peak if honest else peak)
    return rated(5 + size * draw.choice([-1, 1], count) / 2, np.full(count, 5.0), logits)


def test_entropy_and_error_by_hand():
    logits = np.zeros((8, 10))
    logits[:4, 0] = 50  # sure of the rating 1: no entropy
    rows = rated([1, 1, 2, 2, 1, 10, 1, 10], [1.0] * 4 + [5.5] * 4, logits, each=2)
    table, rank = entropy_against_error(rows, 300)
    assert table["quarter"].tolist() == [2, 4]  # of ties: the first half, and the last
    assert table["entropy"].tolist() == pytest.approx([0, np.log(10)], abs=1e-6)
    assert table["error"].tolist() == pytest.approx([0.5, 4.5])
    assert table["n"].tolist() == [4, 4]
    assert table.loc[0, ["low", "high"]].tolist() == [0, 1]
    assert rank["value"] == pytest.approx(spearmanr([0] * 4 + [1] * 4, [0, 0, 1, 1] + [4.5] * 4)[0])


@pytest.mark.parametrize("honest", [True, False])
def test_the_sign_of_the_rank_correlation(honest: bool):
    table, rank = entropy_against_error(unsure(400, honest), 200)
    assert table["quarter"].tolist() == [1, 2, 3, 4]
    assert table["n"].tolist() == [100] * 4
    assert table["entropy"].is_monotonic_increasing
    assert table["error"].is_monotonic_increasing == honest
    assert (rank["low"] > 0.2) if honest else (rank["high"] < -0.2)
    assert rank["low"] < rank["value"] < rank["high"]


def test_what_has_no_calibration_is_refused():
    with pytest.raises(ValueError, match="column p"):
        reliability([1.7, 0.4], "aa")
    row = {"prompt_id": "a", "rating": 3.0, "reward": 0.2, "logits": [0.2]}
    with pytest.raises(ValueError, match="kind ordinal"):
        squeeze([row])
