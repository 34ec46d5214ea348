"""Sentences and targets of the reward-model study, from small tables whose verdicts are known."""

import math

import pandas as pd
import pytest

from utils import reward_words as words
from utils.reward_targets import BEST, reward_targets
from utils.targets import target_words
from utils.wording import verdict, with_interval

NAN = math.nan


def spread(name, value, low, high):
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def difference(arm, accuracy, model_pairs=(0.0, -0.1, 0.1), seeds=3):
    named = {"arm": arm, "label": f"the {arm}", "reference": "margin", "seeds": seeds}
    return named | spread("accuracy", *accuracy) | spread("model_pairs", *model_pairs)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.1, 0.3, "better"),
        (-0.3, -0.1, "worse"),
        (-0.1, 0.1, "inconclusive"),
        (0.0, 0.2, "inconclusive"),  # an interval that touches zero says nothing
        (-0.2, 0.0, "inconclusive"),
        (1.8e-18, 0.2, "inconclusive"),  # zero but for rounding
        (-0.2, -1.8e-18, "inconclusive"),
    ],
)
def test_a_verdict_needs_an_interval_clear_of_zero(low, high, word):
    assert verdict(low, high, ("better", "worse", "inconclusive")) == word


def test_an_interval_keeps_its_ends_and_signs():
    row = spread("gain", 0.125, -0.5, 0.75)
    assert with_interval(row, "gain", "+.3f") == "+0.125 [-0.500, +0.750]"


def study_table():
    rows = [
        ("margin", 3, 0.83, 0.76, 0.40, 0.02, 7.5),
        ("pairwise", 3, 0.84, 0.78, 0.50, 0.04, 9.0),
        ("margin_samples", 1, 0.67, 0.90, 0.60, 0.03, NAN),  # best between samples, of one seed
    ]
    return pd.DataFrame(
        {"arm": arm, "label": f"the {arm}", "seeds": seeds, "minutes": minutes}
        | spread("accuracy", accuracy, accuracy - 0.02, accuracy + 0.02)
        | spread("model_pairs", between, between - 0.03, between + 0.03)
        | spread("nll", nll, nll - 0.05, nll + 0.05)
        | {"ece": ece}
        for arm, seeds, accuracy, between, nll, ece, minutes in rows
    )


def against_table():
    rows = [("margin", True), ("pairwise", True), ("margin_samples", False)]
    return pd.DataFrame(
        {
            "arm": arm,
            "pairs": pairs,
            "difference_low": 0.01 if above or pairs != "all pairs" else 1.8e-18,
        }
        for pairs in ("all pairs", "between samples")
        for arm, above in rows
    )


def targets(pairwise_less_margin=0.01):
    differences = pd.DataFrame(
        [
            difference("pairwise", (pairwise_less_margin, -0.01, 0.03)),
            difference("anchored", (-0.5, -0.6, -0.4)),
        ]
    )
    return reward_targets(study_table(), against_table(), differences)


def test_targets_are_judged_on_the_right_arms_and_sides():
    found = targets()
    reached = dict(zip(found["target"].str[:22], found["reached"], strict=True))
    assert reached == {
        "arms clearly above the": False,  # two of three; between samples it is three of three
        "best accuracy between ": False,  # the arm with 0.90 has one seed
        "best accuracy on all p": False,
        "accuracy of ten classe": True,
        "-log P, the pairwise": False,
        "calibration error, the": True,
        "minutes of training, t": False,  # of both levels the last, ten classes: 9 minutes
    }
    assert list(found[found["target"].str.startswith("minutes")]["reached"]) == [True, False]
    between = found[found["target"].str.contains("between")].iloc[0]
    assert between["value"] == 0.78
    assert between["wanted"] == f"at least {BEST['model_pairs'][1]:.3f}"
    assert "(the pairwise)" in between["target"]
    assert not targets(-0.02)["reached"][3]


def test_a_target_is_told_with_its_number_bound_and_outcome():
    lines = target_words(targets()).split("\n")
    assert lines[0].endswith("all pairs: 2, wanted at least 3: **not reached**")
    assert lines[3].endswith("+0.010 [-0.010, +0.030], wanted at least -0.010: reached")


def test_only_clearly_weak_probes_are_told_the_worst_first():
    rows = [("a", 0.85, 0.80, 0.95), ("b", 0.80, 0.70, 0.88), ("c", 0.30, 0.20, 0.40)]
    probes = pd.DataFrame(
        {"series": "judge", "probe": p, "value": v, "low": a, "high": b, "n": 9}
        for p, v, a, b in rows
    )
    assert words.probe_words(probes) == (
        "- judge, `c`: right in 30% [20%, 40%] of 9\n- judge, `b`: right in 80% [70%, 88%] of 9"
    )


def test_what_the_distribution_adds_is_judged_by_the_added_area():
    gap = {"predictor": "gap", "auc": 0.7, "low": 0.6, "high": 0.8} | spread("added", 0, 0, 0)
    wide = {"predictor": "spread", "auc": 0.6, "low": 0.55, "high": 0.65}
    doubt = {"predictor": "tie_or_doubt", "auc": 0.75, "low": 0.7, "high": 0.8}
    table = pd.DataFrame([gap, wide, doubt | spread("added", 0.05, 0.01, 0.09)]).assign(arm="ten")
    assert "add +0.050 [+0.010, +0.090]: more than the gap" in words.predictor_words(table)
    table.loc[2, "added_low"] = -0.01
    assert "[-0.010, +0.090]: not clearly more" in words.predictor_words(table)


def test_picks_leave_out_the_mean_chance_and_the_best_possible():
    rows = [("random", -0.7, -0.8, -0.6), ("quantile_25", 0.1, 0.02, 0.2), ("spread", 0.1, -1, 1)]
    picks = pd.DataFrame(
        {"arm": "ten", "criterion": c, "difference": v, "low": a, "high": b} for c, v, a, b in rows
    )
    assert words.pick_words(picks) == "- ten: quantile_25 +0.10."
    assert words.pick_words(picks.iloc[::2]) == "- ten: none differs clearly from the mean."


def test_entropy_is_told_by_arm():
    ranks = pd.DataFrame({"ten": {"value": 0.2, "low": 0.1, "high": 0.3}}).T
    assert words.entropy_words(ranks).endswith("of entropy and error +0.20 [+0.10, +0.30]")
