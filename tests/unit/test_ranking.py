"""What a distribution adds: AUC over prompts, predictors of errors, and picking one of n."""

import math
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from utils.data import Group, Pair, Response
from utils.intervals import clustered_interval, percentile_interval
from utils.losses import CLASSES, expected_rating
from utils.ranking import (
    CRITERIA,
    auc_draws,
    doubt_scores,
    error_predictors,
    pick_of_n,
    rating_quantile,
)
from utils.results import write_jsonl
from utils.reward_evaluation import pair_metrics, scored_responses

FINITE = st.floats(-20, 20, width=32)
LOGITS = st.lists(FINITE, min_size=CLASSES, max_size=CLASSES).map(torch.tensor)
UNIFORM = [0.0] * CLASSES
TURNS = ({"role": "user", "content": "?"},)


def given_p(**p):
    """Logits of a distribution written as r2=.5, r9=.5."""
    full = torch.zeros(CLASSES)
    for name, value in p.items():
        full[int(name[1:]) - 1] = value
    return full.log().clamp_min(-1e4)


def point(rating):
    return given_p(**{f"r{rating}": 1.0})


def normals(count, seed=0):
    return np.random.default_rng(seed).normal(size=count)


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


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_that_of_sklearn(seed):
    rng = np.random.default_rng(seed)
    score, event = rng.integers(0, 6, 200), rng.random(200) < 0.3
    found = clustered_auc(score, event, rng.integers(0, 30, 200).astype(str), 20)
    assert found["value"] == pytest.approx(roc_auc_score(event, score))


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


def test_copies_of_a_row_do_not_shrink_the_interval():
    score, event = normals(50), normals(50, 1) > 0
    single = clustered_auc(score, event, names(50), 300)
    copied = clustered_auc(np.repeat(score, 4), np.repeat(event, 4), names(50, 4), 300)
    assert copied == pytest.approx(single)


def test_resamples_of_one_class_are_skipped():
    """Of two prompts, half of the resamples hold one of them twice and have no AUC."""
    found = clustered_auc([2, 1], [True, False], ["a", "b"], 100)
    assert (found["value"], found["low"], found["high"]) == (1, 1, 1)


@pytest.mark.parametrize("event", [[True] * 3, [False] * 3])
def test_without_two_classes_there_is_no_auc(event):
    found = clustered_auc([1, 2, 3], event, list("abc"), 20)
    assert np.isnan([found["value"], found["low"], found["high"]]).all()


def test_auc_is_reproducible_and_independent_of_the_order():
    score, event, prompts = clustered_sample()
    first = clustered_auc(score, event, prompts, 200)
    assert clustered_auc(score, event, prompts, 200) == first
    order = np.random.default_rng(1).permutation(len(score))
    shuffled = clustered_auc(score[order], event[order], [prompts[i] for i in order], 200)
    assert shuffled == pytest.approx(first)


def test_2000_resamples_of_the_test_pairs_take_seconds():
    started = time.process_time()
    clusters = np.random.default_rng(0).integers(0, 168, 1453).astype(str)
    clustered_auc(normals(1453), normals(1453, 1) > 1, clusters)
    assert time.process_time() - started < 5


# Quantities of a distribution


def test_quantiles_by_hand():
    uniform = torch.tensor(UNIFORM)
    assert [rating_quantile(uniform, q).item() for q in (0.1, 0.25, 0.5)] == pytest.approx(
        [1.5, 3.0, 5.5]
    )
    assert rating_quantile(point(7), 0.25).item() == pytest.approx(6.75), "a class is one wide"
    two = given_p(r2=0.5, r9=0.5)
    assert [rating_quantile(two, q).item() for q in (0.25, 0.75)] == pytest.approx([2, 9])
    assert rating_quantile(torch.stack([uniform, two]), 0.25).tolist() == pytest.approx([3, 2])
    assert rating_quantile(point(10), 1.0).item() == pytest.approx(10.5)
    assert rating_quantile(point(1), 0.0).item() == pytest.approx(0.5)


@settings(max_examples=50, deadline=None)
@given(LOGITS, st.floats(0.01, 0.99))
def test_the_quantile_inverts_the_interpolated_distribution(logits, share):
    p = logits.double().softmax(-1).numpy()
    edges = np.arange(CLASSES + 1) + 0.5
    at = rating_quantile(logits, share).item()
    reached = np.interp(at, edges, np.concatenate([[0], p.cumsum()]))
    assert reached == pytest.approx(share, abs=1e-6)


@settings(max_examples=10, deadline=None)
@given(LOGITS)
def test_the_quantiles_average_to_the_mean(logits):
    shares = (np.arange(100) + 0.5) / 100
    average = np.mean([rating_quantile(logits, share).item() for share in shares])
    assert average == pytest.approx(expected_rating(logits).item(), abs=0.05), (
        "the interpolation moved the mean"
    )


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


def test_certain_ratings_can_be_compared():
    found = doubt_scores(torch.stack([point(7), point(7)]), torch.stack([point(3), point(7)]))
    assert all(np.isfinite(score).all() for score in found.values())
    assert found["spread_given_gap"][0] < found["spread_given_gap"][1]


@settings(max_examples=25, deadline=None)
@given(LOGITS, LOGITS, st.floats(-50, 50), st.floats(-50, 50))
def test_a_constant_on_the_logits_changes_nothing(first, second, a, b):
    plain, moved = doubt_scores(first, second), doubt_scores(first + a, second + b)
    for name, score in plain.items():
        assert moved[name] == pytest.approx(score, abs=2e-2 if "given" in name else 1e-3), name
    for share in (0.1, 0.25):
        same = pytest.approx(rating_quantile(first, share).item(), abs=1e-2)
        # A share that falls between two far classes is not continuous.
        nearby = [rating_quantile(first + a, share + d).item() for d in (-1e-4, 0, 1e-4)]
        assert nearby[1] == same or nearby[0] <= rating_quantile(first, share) <= nearby[2]


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


def test_without_pairs_between_samples_they_have_no_rows():
    pairs = [(f"p{i}", *NARROW[:: 1 if i else -1], False) for i in range(4)]
    table = error_predictors(*scored_pairs(pairs), 20)
    assert table["pairs"].tolist() == ["all"] * 5
    assert (table["n"] == 4).all()


def test_rows_of_another_run_are_refused():
    rows, frame = scored_pairs([("p0", *NARROW, True), ("p1", *WIDE, True)])
    with pytest.raises(ValueError, match="one ten-class run"):
        error_predictors([{**row, "reward": row["reward"] + 0.5} for row in rows], frame, 10)
    with pytest.raises(ValueError, match="ten-class run"):
        error_predictors([{**row, "logits": row["logits"][:1]} for row in rows], frame, 10)


# Picking one of n


def group_of(prompt, entries, batch=1):
    """A group of (rating, logits, source, temperature), and the rows of its responses."""
    entries = [(*entry, *("model", 1.0)[len(entry) - 2 :]) for entry in entries]
    responses = tuple(
        Response(f"{prompt} {batch} {i}", rating, source=source, temperature=temperature)
        for i, (rating, _, source, temperature) in enumerate(entries)
    )
    rows = [
        {"prompt_id": prompt, "batch": batch, "place": i, "response": response.text}
        | {"rating": response.rating, "source": response.source}
        | {"temperature": response.temperature, "logits": list(map(float, entry[1]))}
        for i, (response, entry) in enumerate(zip(responses, entries, strict=True))
    ]
    return Group(prompt, "test", None, TURNS, responses, batch), rows


def picks(groups, samples=50):
    """Pick from the groups; another prompt's sample is what `beats_sft` compares with."""
    groups = [*groups, group_of("rival", [(1.0, UNIFORM, "model", 0.7)])]
    rows = [row for _, own in groups for row in own]
    return pick_of_n(rows, [group for group, _ in groups], samples).set_index("criterion")


GAMBLE = given_p(r1=0.35, r10=0.65)  # mean 6.85, spread 4.29, 25%: 1.21, 10%: 0.79
LIKELY = given_p(r1=0.15, r7=0.85)  # mean 6.1, spread 2.14, 25%: 6.62, 10%: 1.17
SURE = point(5)  # mean 5, spread 0, 25%: 4.75, 10%: 4.6
RATED = {"gamble": (2.0, GAMBLE), "likely": (7.0, LIKELY), "sure": (3.0, SURE)}


@pytest.mark.parametrize(
    ("criterion", "pick"),
    [
        ("mean", "gamble"),
        ("quantile_25", "likely"),
        ("quantile_10", "sure"),
        ("mean_minus_half_spread", "likely"),  # 5.03 against 5 and 4.71
        ("mean_minus_spread", "sure"),
        ("beats_sft", "likely"),  # .85 against .65 and a tie
    ],
)
def test_each_criterion_picks_by_hand(criterion, pick):
    best = (10.0, point(10), "reference", None)
    sft = group_of("p0", [(1.0, point(5), "model", 0.7)], batch=2)
    found = picks([group_of("p0", [*RATED.values(), best]), sft])
    row, rating = found.loc[criterion], RATED[pick][0]
    assert row["rating"] == rating, f"expected the {pick} one"
    assert row["top"] == (rating == 7), "the reference is no candidate"
    assert row["difference"] == rating - 2, "the mean picks the gamble"
    assert row["n"] == 1


def test_random_and_best_are_exact():
    found = picks([group_of("p0", RATED.values())])
    assert found.loc["best", ["rating", "top", "difference"]].tolist() == [7, 1, 5]
    assert found.loc["random", ["rating", "top", "difference"]].tolist() == pytest.approx(
        [4, 1 / 3, 2]
    )


def beats(groups):
    rows = [row for _, own in groups for row in own]
    logits = torch.tensor([row["logits"] for row in rows])
    return CRITERIA["beats_sft"](rows, logits).tolist()


def test_beats_sft_by_hand():
    own = group_of("p0", [(1.0, point(5)), (2.0, point(6)), (3.0, point(9), "model", 0.7)])
    other = group_of("p0", [(1.0, point(5), "model", 0.7), (1.0, point(9), "model", 0.5)], batch=2)
    found = beats([own, other])
    assert found[:3] == pytest.approx([0.5, 1, 1]), (
        "a tie is half a win; the samples of the own batch, and those at 0.5, are not compared with"
    )
    assert found[3] == pytest.approx(0), "and the other batch meets the sample of this one"


def test_beats_sft_averages_the_samples_of_the_other_batch():
    own = group_of("p0", [(1.0, point(5))])
    rivals = [(1.0, point(rating), "model", 0.7) for rating in (3, 5, 8, 9)]
    assert beats([own, group_of("p0", rivals, batch=2)])[0] == pytest.approx((1 + 0.5) / 4)
    wide = np.random.default_rng(0).normal(size=(3, CLASSES)) * 2
    first, *others = [np.exp(z) / np.exp(z).sum() for z in wide]
    counts = np.tri(CLASSES, k=-1) + np.eye(CLASSES) / 2  # of rating i against j
    rivals = [(1.0, z, "model", 0.7) for z in wide[1:]]
    found = beats([group_of("p0", [(1.0, wide[0])]), group_of("p0", rivals, batch=2)])
    assert found[0] == pytest.approx(first @ counts @ np.mean(others, axis=0), abs=1e-6), (
        "probabilities are averaged, not their logarithms"
    )


def test_without_an_sft_sample_those_of_the_other_prompts_are_averaged():
    own = group_of("p0", [(1.0, point(5)), (1.0, point(2), "model", 0.7)])
    others = [
        group_of(f"p{i}", [(1.0, point(rating), "model", 0.7)])
        for i, rating in enumerate((3, 4, 8), 1)
    ]
    assert beats([own, *others])[0] == pytest.approx(2 / 3), "and the own batch is left out"


def test_an_oracle_distribution_picks_the_best_by_every_criterion():
    rng = np.random.default_rng(0)
    groups = []
    for i in range(20):
        entries = [(float(r), point(r)) for r in rng.permutation(10)[:4] + 1]
        groups.append(group_of(f"p{i}", entries))
        groups.append(group_of(f"p{i}", [(1.0, UNIFORM, "model", 0.7)], batch=2))
    found = picks(groups)
    assert found.index.tolist() == list(CRITERIA)
    for name in CRITERIA.keys() - {"random"}:
        row = found.loc[name]
        assert row["rating"] == found.loc["best", "rating"], name
        assert row[["top", "top_low", "top_high", "difference"]].tolist() == [1, 1, 1, 0]
    assert found.loc["random", "high"] < 0
    turned = [
        (group, [{**row, "logits": row["logits"][::-1]} for row in rows]) for group, rows in groups
    ]
    assert picks(turned).loc["mean", "top"] == 0, "the worst is taken for the best"


def test_groups_in_which_all_samples_tie_are_left_out():
    tied = group_of("p1", [(1.0, SURE), (1.0, GAMBLE), (9.0, point(9), "reference", None)])
    found = picks([group_of("p0", RATED.values()), tied])
    assert found.loc["mean", ["n", "rating"]].tolist() == [1, 2]
    with pytest.raises(ValueError, match="no group of differently rated samples"):
        picks([tied])


def test_ties_of_the_criterion_are_averaged():
    entries = [(1.0, SURE), (6.0, SURE), (8.0, point(4))]
    found = picks([group_of("p0", entries)]).loc[["mean", "quantile_10"]]
    assert found["rating"].tolist() == [3.5, 3.5], "the first of two equals was taken"
    assert found["top"].tolist() == [0, 0]
    means = [given_p(r3=0.5 - more, r4=0.5 + more) for more in (0, 4e-6, 1e-4)]
    half = picks([group_of("p0", [(1.0, means[0]), (6.0, means[1])])]).loc["mean"]
    assert half[["rating", "top"]].tolist() == [3.5, 0.5], "the last decimal is rounding"
    clear = picks([group_of("p0", [(1.0, means[0]), (6.0, means[2])])]).loc["mean"]
    assert clear[["rating", "top"]].tolist() == [6, 1]


def test_copies_of_a_response_are_candidates_of_their_own():
    """Two equal responses of a group are scored once, in one row."""
    group, rows = group_of("p0", [(6.0, SURE), (6.0, SURE), (3.0, LIKELY)])
    copy = group.responses[0]
    group = Group("p0", "test", None, TURNS, (copy, copy, group.responses[2]))
    found = picks([(group, [rows[0], rows[2]])])
    assert found.loc["random", "rating"] == 5


def test_a_constant_on_the_logits_changes_no_pick():
    rng = np.random.default_rng(0)
    plain, moved = [], []
    for i in range(30):
        entries = [(float(rng.integers(1, 8)), rng.normal(size=10)) for _ in range(4)]
        entries = [(*e, "model", t) for e, t in zip(entries, (1.0, 0.7, 0.3, 0.2), strict=True)]
        plain.append(group_of(f"p{i // 2}", entries, batch=i % 2))
        offset = [(r, z + rng.normal() * 5, *rest) for r, z, *rest in entries]
        moved.append(group_of(f"p{i // 2}", offset, batch=i % 2))
    pd.testing.assert_frame_equal(picks(plain), picks(moved))
    pd.testing.assert_frame_equal(picks(plain), picks(plain))


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
        pick_of_n(rows[:2], [group], 10)
    with pytest.raises(ValueError, match="not scored; pass the test groups"):
        pick_of_n([{**row, "response": "other data"} for row in rows], [group], 10)
    with pytest.raises(ValueError, match="beats_sft needs samples at the training"):
        pick_of_n(rows, [group], 10)


def test_rows_and_pairs_as_a_run_writes_them(tmp_path):
    """From `scored_responses` through `pair_metrics`, with a text that occurs in both batches."""
    texts = [("good", 8.0), ("fair", 5.0), ("poor", 1.0)]
    responses = tuple(Response(*text, source="m", temperature=0.7) for text in texts)
    groups = [
        Group(f"p{i}", "test", None, TURNS, responses, batch) for i in range(3) for batch in (1, 2)
    ]
    pairs = [
        Pair(group, group.responses[i], group.responses[j])
        for group in groups
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    logits = {"good": LIKELY, "fair": GAMBLE, "poor": SURE}  # by the mean, fair beats good
    scorer = SimpleNamespace(logits=lambda p, t, f: torch.stack([logits[text] for text in t]))
    rows = scored_responses(scorer, pairs)
    write_jsonl(tmp_path / "samples.jsonl", rows)
    frame, _ = pair_metrics(SimpleNamespace(directory=tmp_path), pairs, 20)
    table = error_predictors(rows, frame, 20).set_index(["pairs", "predictor"])
    assert table.loc[("between samples", "gap"), ["n", "wrong"]].tolist() == [18, 6]
    assert table.loc[("all", "spread"), "auc"] == 1
    picked = pick_of_n(rows, groups, 20).set_index("criterion").loc[["mean", "quantile_25"]]
    assert picked[["rating", "n"]].to_numpy().tolist() == [[5, 6], [8, 6]]
