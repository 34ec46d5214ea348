"""What a distribution adds: AUC over prompts, predictors of errors, and picking one of n."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from utils.data.pairs import Group, Response
from utils.rewards.losses import CLASSES, expected_rating
from utils.statistics.bootstrap import clustered_interval, percentile_interval
from utils.statistics.ranking import auc_draws, doubt_scores, error_predictors, pick_of_n

TURNS = ({"role": "user", "content": "?"},)


def given_p(**p):
    """Logits of a distribution written as r2=.5, r9=.5."""
    full = torch.zeros(CLASSES)
    for name, value in p.items():
        full[int(name[1:]) - 1] = value
    return full.log().clamp_min(-1e4)


def point(rating):
    return given_p(**{f"r{rating}": 1.0})


def names(count, copies=1):
    return [f"p{i:03d}" for i in range(count) for _ in range(copies)]


def width(found):
    return found["high"] - found["low"]


# The area under the curve


def clustered_auc(score, event, clusters, samples=2000):
    return percentile_interval(auc_draws(score, event, clusters, samples))


def test_auc_by_hand():
    found = clustered_auc([3, 1, 2, 2], [True, False, True, False], list("abcd"), 50)
    assert found["value"] == (1 + 1 + 1 + 0.5) / 4, "a tie is half a win"


def clustered_sample(prompts=60, copies=8, seed=0):
    """Pairs of a prompt are alike, so that resampling rows would claim too much."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=prompts)
    event = (np.repeat(shared, copies) + 0.3 * rng.normal(size=prompts * copies)) > 0.5
    score = np.repeat(shared + rng.normal(size=prompts), copies)
    return score, event, names(prompts, copies)


def test_the_interval_is_that_of_resampled_prompts():
    score, event, prompts = clustered_sample()
    found = clustered_auc(score, event, prompts)
    rng, rows = np.random.default_rng(5), np.arange(len(score)).reshape(60, 8)
    slow = []
    for _ in range(300):
        drawn = rows[rng.integers(0, 60, 60)].ravel()
        slow.append(roc_auc_score(event[drawn], score[drawn]))
    low, high = np.quantile(slow, [0.025, 0.975])
    assert found["low"] == pytest.approx(low, abs=0.03)
    assert found["high"] == pytest.approx(high, abs=0.03)
    by_row = clustered_auc(score, event, list(map(str, range(480))))
    assert width(by_row) < 0.6 * width(found), "what resampling rows would give"


def test_without_two_classes_there_is_no_auc():
    found = clustered_auc([1, 2, 3], [True] * 3, list("abc"), 20)
    assert np.isnan([found["value"], found["low"], found["high"]]).all()
    # Of two prompts, half of the resamples hold one of them twice and have none; they are skipped.
    found = clustered_auc([2, 1], [True, False], ["a", "b"], 100)
    assert (found["value"], found["low"], found["high"]) == (1, 1, 1)


# Quantities of a distribution


def test_doubt_by_hand():
    first, second = given_p(r4=0.5, r8=0.5), given_p(r4=0.5, r6=0.5)
    found = {name: score.item() for name, score in doubt_scores(first[None], second[None]).items()}
    spread = math.sqrt(2**2 + 1**2)
    assert found == pytest.approx(
        {
            "gap": -1,
            "spread": spread,
            "spread_given_gap": -1 / spread,
            "tie_or_doubt": 1 - (0.5 - 0.25),  # wins .5, ties .25, loses .25
            "entropy": math.log(2),
        },
        abs=1e-5,
    )
    flipped = doubt_scores(second[None], first[None])
    assert {name: score.item() for name, score in flipped.items()} == pytest.approx(found)


# Where the order errs


def scored_pairs(pairs):
    """Rows and pair frame of pairs (prompt, chosen logits, rejected logits, between samples)."""
    rows, table = [], []
    for i, (prompt, *both, between) in enumerate(pairs):
        entry = {"prompt_id": prompt, "between_samples": between}
        for side, logits in zip(("chosen", "rejected"), both, strict=True):
            reward = expected_rating(logits).item()
            row = {"prompt_id": prompt, "response": f"{side} {i}", "reward": reward}
            rows.append({**row, "logits": logits.tolist()})
            entry |= {side: row["response"], f"{side}_reward": reward}
        gap = entry["chosen_reward"] - entry["rejected_reward"]
        table.append({**entry, "correct": (np.sign(round(gap, 4)) + 1) / 2})
    return rows, pd.DataFrame(table)


NARROW = point(5), point(6)
WIDE = given_p(r1=0.5, r9=0.5), given_p(r2=0.5, r10=0.5)  # the same means


def test_a_spread_that_knows_where_the_order_errs():
    pairs = [(f"p{i}", NARROW[1], NARROW[0], i % 2 == 0) for i in range(12)]
    pairs += [(f"p{i}", WIDE[0], WIDE[1], i % 2 == 0) for i in range(12)]
    pairs += [("p0", NARROW[0], NARROW[0], True), ("p1", WIDE[0], WIDE[0], False)]
    rows, frame = scored_pairs(pairs)
    frame.index = frame.index[::-1]  # a filtered frame has any index
    table = error_predictors(rows, frame, 200)
    assert table["pairs"].tolist() == ["all"] * 5 + ["between samples"] * 5
    found = table.set_index(["pairs", "predictor"])
    whole, between = found.loc["all"], found.loc["between samples"]
    assert set(whole[["n", "wrong", "ties"]].itertuples(index=False, name=None)) == {(24, 12, 2)}
    assert set(between[["n", "wrong", "ties"]].itertuples(index=False, name=None)) == {(12, 6, 1)}
    for part in (whole, between):
        assert part.loc["gap", ["auc", "added", "added_low", "added_high"]].tolist() == (
            pytest.approx([0.5, 0, 0, 0], abs=1e-6)
        )
        for name in ("spread", "spread_given_gap", "tie_or_doubt", "entropy"):
            row = part.loc[name]
            assert row[["auc", "low", "high"]].tolist() == [1, 1, 1], f"{name}: sign of the score"
            assert row[["added", "added_low", "added_high"]].tolist() == pytest.approx([0.5] * 3)


def test_the_difference_to_the_mean_is_paired():
    """Distributions of one width: the gap in units of the spread orders as the gap does."""
    rng = np.random.default_rng(0)
    tilts = rng.normal(size=(80, 2))
    ratings = torch.arange(CLASSES) / 1.0
    shape = -((ratings - 4.5) ** 2) / 2  # discrete normal: a tilt moves it and keeps its spread
    pairs = [
        (f"p{i % 40}", shape + float(a) * ratings, shape + float(b) * ratings, True)
        for i, (a, b) in enumerate(tilts)
    ]
    table = error_predictors(*scored_pairs(pairs), 300).set_index(["pairs", "predictor"])
    row = table.loc[("all", "spread_given_gap")]
    assert row["high"] - row["low"] > 0.1
    assert row["added_high"] - row["added_low"] < 0.03, "the resamples differ between predictors"


def test_rows_of_another_run_are_refused():
    rows, frame = scored_pairs([("p0", *NARROW, True), ("p1", *WIDE, True)])
    with pytest.raises(ValueError, match="one ten-class run"):
        error_predictors([{**row, "reward": row["reward"] + 0.5} for row in rows], frame, 10)


# Picking one of n


def group_of(prompt, entries, batch=1):
    """A group of (rating, logits, source), and the rows of its responses."""
    entries = [(*entry, "model")[:3] for entry in entries]
    responses = tuple(
        Response(f"{prompt} {batch} {i}", rating, source=source)
        for i, (rating, _, source) in enumerate(entries)
    )
    rows = [
        {"prompt_id": prompt, "batch": batch, "place": i, "response": response.text}
        | {"rating": response.rating, "source": response.source}
        | {"logits": list(map(float, entry[1]))}
        for i, (response, entry) in enumerate(zip(responses, entries, strict=True))
    ]
    return Group(prompt, "test", None, TURNS, responses, batch), rows


def picks(groups, samples=50):
    rows = [row for _, own in groups for row in own]
    return pick_of_n(rows, [group for group, _ in groups], samples).set_index("criterion")


GAMBLE = given_p(r1=0.35, r10=0.65)  # mean 6.85, spread 4.29
LIKELY = given_p(r1=0.15, r7=0.85)  # mean 6.1, spread 2.14
SURE = point(5)  # mean 5, spread 0
RATED = {"gamble": (2.0, GAMBLE), "likely": (7.0, LIKELY), "sure": (3.0, SURE)}


@pytest.mark.parametrize(("criterion", "pick"), [("mean", "gamble"), ("mean_minus_spread", "sure")])
def test_each_criterion_picks_by_hand(criterion, pick):
    best = (10.0, point(10), "reference")
    found = picks([group_of("p0", [*RATED.values(), best])])
    row, rating = found.loc[criterion], RATED[pick][0]
    assert row["rating"] == rating, f"expected the {pick} one"
    assert row["top"] == 0
    assert found.loc["best", "rating"] == 7, "the reference is no candidate"
    assert row["difference"] == rating - 2, "the mean picks the gamble"
    assert row["n"] == 1


def test_random_and_best_are_exact():
    found = picks([group_of("p0", RATED.values())])
    assert found.loc["best", ["rating", "top", "difference"]].tolist() == [7, 1, 5]
    assert found.loc["random", ["rating", "top", "difference"]].tolist() == pytest.approx(
        [4, 1 / 3, 2]
    )


def test_groups_in_which_all_samples_tie_are_left_out():
    tied = group_of("p1", [(1.0, SURE), (1.0, GAMBLE), (9.0, point(9), "reference")])
    found = picks([group_of("p0", RATED.values()), tied])
    assert found.loc["mean", ["n", "rating"]].tolist() == [1, 2]
    with pytest.raises(ValueError, match="no group of differently rated samples"):
        picks([tied])


def test_ties_of_the_criterion_are_averaged():
    entries = [(1.0, SURE), (6.0, SURE), (8.0, point(4))]
    found = picks([group_of("p0", entries)]).loc[["mean", "mean_minus_spread"]]
    assert found["rating"].tolist() == [3.5, 3.5], "the first of two equals was taken"
    assert found["top"].tolist() == [0, 0]
    means = [given_p(r3=0.5 - more, r4=0.5 + more) for more in (0, 4e-6, 1e-4)]
    half = picks([group_of("p0", [(1.0, means[0]), (6.0, means[1])])]).loc["mean"]
    assert half[["rating", "top"]].tolist() == [3.5, 0.5], "the last decimal is rounding"
    clear = picks([group_of("p0", [(1.0, means[0]), (6.0, means[2])])]).loc["mean"]
    assert clear[["rating", "top"]].tolist() == [6, 1]


def test_the_intervals_are_over_prompts_and_the_difference_is_paired():
    rng = np.random.default_rng(0)
    groups, by_mean, by_chance = [], [], []
    for i in range(40):
        base, lift = rng.integers(1, 5), rng.integers(0, 4)
        ratings = [float(base), float(base + 1), float(base + lift)]
        logits = [point(1), point(2), point(3)]
        for batch in (1, 2, 3):
            groups.append(group_of(f"p{i:03d}", list(zip(ratings, logits, strict=True)), batch))
            by_mean.append(ratings[2])
            by_chance.append(np.mean(ratings))
    prompts = names(40, 3)
    row = picks(groups, 400).loc["random"]
    rating = clustered_interval(by_chance, prompts, 400)
    paired = clustered_interval(np.subtract(by_chance, by_mean), prompts, 400)
    assert row[["rating", "rating_low", "rating_high"]].tolist() == pytest.approx(
        [rating[k] for k in ("value", "low", "high")]
    )
    assert row[["difference", "low", "high"]].tolist() == pytest.approx(
        [paired[k] for k in ("value", "low", "high")]
    )
    assert row["n"] == 120


def test_what_cannot_be_picked_is_refused():
    group, rows = group_of("p0", RATED.values())
    with pytest.raises(ValueError, match="not scored; pass the test groups"):
        pick_of_n([{**row, "response": "other data"} for row in rows], [group], 10)
