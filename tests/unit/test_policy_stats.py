"""Statistics of the policy study, against values by hand and against their usual mistakes."""

import itertools

import numpy as np
import pandas as pd
import pytest

from utils.statistics.bootstrap import crossed_interval
from utils.statistics.policy_stats import outcomes, paired_gains, pick_weights, prompt_means


def frame(prompts, **columns):
    return pd.DataFrame({"prompt_id": list(prompts), **columns})


def ends(found):
    return found["value"], found["low"], found["high"]


# Prompts and seeds


def test_means_by_prompt_keep_the_order_of_the_prompts():
    part = frame("zzaa")
    found = prompt_means([part, part], [np.array([1, 3, 5, 5]), np.array([0, np.nan, 2, 4])])
    np.testing.assert_allclose(found, [[2, 5], [0, 3]])


def test_gains_are_paired():
    base = frame("aabb", reward=[0.0, 10.0, 20.0, 30.0])
    better = frame("aabb", reward=[1.0, 11.0, 21.0, 31.0])
    gains = paired_gains([better, base], [base, base], "reward")
    np.testing.assert_allclose(gains, [[1, 1], [0, 0]])
    assert ends(crossed_interval(gains[:1], 100)) == (1, 1, 1), "no spread of the prompts' own"


# Wins


def test_wins_ties_and_losses():
    base = pd.DataFrame({"judge": [0.0, 0, 0, 5]})
    found = outcomes(pd.DataFrame({"judge": [1.0, 0.05, -0.05, 5]}), base, "judge")
    assert found["win"].tolist() == [1, 1, 0, 0], "a small gap is a win, no tie"
    assert found["tie"].tolist() == [0, 0, 0, 1]
    assert found["loss"].tolist() == [0, 0, 1, 0]
    assert found["win_rate"].tolist() == [1, 1, 0, 0.5]


# Best of n


def brute_force(scores, values, n):
    """Average the pick's value over all subsets; ties share."""
    picks = []
    for subset in itertools.combinations(range(len(scores)), n):
        best = max(scores[i] for i in subset)
        picks.append(np.mean([values[i] for i in subset if scores[i] == best]))
    return np.mean(picks)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_exact_over_all_subsets(n):
    scores = np.array([[0.3, -1.0, 2.0, 0.5, 0.1], [0.0, 1.0, 2.0, 3.0, 4.0]])
    values = np.array([[5.0, 1.0, -3.0, 2.0, 7.0], [1.0, 0.0, 0.0, 0.0, 9.0]])
    weights = pick_weights(scores, n)
    np.testing.assert_allclose(weights.sum(1), 1)
    for row in range(2):
        expected = brute_force(scores[row], values[row], n)
        assert weights[row] @ values[row] == pytest.approx(expected)


def test_best_of_n_draws_without_replacement():
    """With replacement the best of four could still be the worst of four."""
    weights = pick_weights(np.array([[1.0, 2.0, 3.0, 4.0]]), 4)
    np.testing.assert_allclose(weights, [[0, 0, 0, 1]])
    pairs = pick_weights(np.array([[1.0, 2.0, 3.0, 4.0]]), 2)
    np.testing.assert_allclose(pairs, [[0, 1 / 6, 2 / 6, 3 / 6]])


def test_equal_scores_share_their_chance():
    np.testing.assert_allclose(pick_weights(np.ones((1, 4)), 3), [[0.25] * 4])
    found = pick_weights(np.array([[2.0, 1.0, 2.0]]), 2)
    np.testing.assert_allclose(found, [[0.5, 0, 0.5]])


@pytest.mark.parametrize("n", [0, 5])
def test_no_best_of_more_than_there_are(n):
    with pytest.raises(ValueError, match=f"no best of {n} among 4 samples: choose n from 1 to 4"):
        pick_weights(np.ones((2, 4)), n)
