"""Blind ratings: what is refused, tables against values by hand, and the committed tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from utils.data.sources import DataError
from utils.files import RESULTS
from utils.plots import style as look
from utils.plots.readings import readings_figure, with_intervals
from utils.statistics.policy_runs import policy_frames
from utils.statistics.readings import (
    SORTS,
    agreement_table,
    echo_table,
    load_readings,
    policy_readings,
    rated_answers,
)

SAMPLES = 200
PROMPTS = ("p2", "p0", "p1", "p3")
# By policy, the ratings of the answers to the four prompts, and how the judge rewards them.
RATINGS = {
    "sft": (1, 1, 2, 5),
    "sft_best": (1, 1, 2, 4),
    "sft_best_of_16": (2, 1, 2, 6),
    "scalar_s0": (2, 1, 2, 4),
    "ordinal_s0": (1, 1, 2, 5),
    "scalar_average": (3, 2, 4, 6),
}
JUDGE = {
    "sft": (0.0, 0.0, 0.0, 0.0),
    "sft_best": (0.0, 0.0, 0.0, 1.0),
    "sft_best_of_16": (1.0, 1.0, 1.0, 1.0),
    "scalar_s0": (1.0, 1.0, 1.0, 1.0),
    "ordinal_s0": (1.0, 0.0, 1.0, 1.0),
    "scalar_average": (0.5, 1.0, 1.0, 2.0),
}
ECHOES = {("scalar_s0", "p0"), ("ordinal_s0", "p0")}


def text(policy: str, prompt: str) -> str:
    return f"{policy} answers {prompt}"


def lines() -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": prompt,
            "prompt": f"{prompt}?",
            "policy": policy,
            "response": text(policy, prompt),
            "finished": True,
            "overall": rating,
            "echo": int((policy, prompt) in ECHOES),
        }
        for policy, ratings in RATINGS.items()
        for prompt, rating in zip(PROMPTS, ratings, strict=True)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluation(policy: str, samples: int = 2) -> pd.DataFrame:
    """Rows as evaluated, the first sample of each prompt being the rated one."""
    rows = [
        {
            "prompt_id": prompt,
            "response": text(policy, prompt) + f", sample {n}" * (n > 0),
            "finished": n == 0,
            "length": 10 + n,
            "reward_scalar": 2 * judge - n,
            "reward_ordinal": -judge,
            "reward_judge": judge,
        }
        for prompt, judge in zip(PROMPTS, JUDGE[policy], strict=True)
        for n in range(samples)
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def frames() -> dict[str, pd.DataFrame]:
    found = {policy: evaluation(policy) for policy in SORTS if policy != "sft_best_of_16"}
    pool = evaluation("sft_best_of_16", 16)
    return found | {"sft_pool": pool[::-1].reset_index(drop=True)}  # the best one comes last


@pytest.fixture
def rated(tmp_path: Path, frames: dict[str, pd.DataFrame]) -> pd.DataFrame:
    return rated_answers(load_readings(write(tmp_path / "test.jsonl", lines())), frames)


def span(row: pd.Series, name: str) -> tuple[float, ...]:
    return tuple(row[f"{name}{end}"] for end in ("", "_low", "_high"))


# Reading


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"echo": None}, "line 3: echo is None, expected 0 or 1"),
        ({"policy": "sft_greedy"}, "line 3: policy 'sft_greedy', expected sft, sft_best, "),
        ({"overall": 0.9}, "line 3: overall is 0.9, expected a number in 1..10"),
        ({"overall": 10.1}, "line 3: overall is 10.1"),
        ({"overall": "5"}, "line 3: overall is '5'"),
        ({"overall": float("nan")}, "line 3: overall is nan"),
        ({"prompt_id": "p2"}, "line 3: sft is rated again on p2, first in line 1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, change: dict[str, Any], message: str):
    rows = lines()
    rows[2] |= change
    with pytest.raises(DataError, match=message) as error:
        load_readings(write(tmp_path / "test.jsonl", rows))
    assert "test.jsonl" in str(error.value)


def test_missing_columns_and_answers_are_named(tmp_path: Path):
    rows = lines()
    del rows[1]["overall"]
    with pytest.raises(DataError, match=r"test\.jsonl, line 2: no column 'overall', expected"):
        load_readings(write(tmp_path / "test.jsonl", rows))
    message = r"test\.jsonl: prompt p2 has no rated answer of sft$"
    with pytest.raises(DataError, match=message):
        load_readings(write(tmp_path / "test.jsonl", lines()[1:]))


def test_one_decimal_is_allowed(tmp_path: Path):
    rows = lines()
    rows[0]["overall"] = 1.5
    assert load_readings(write(tmp_path / "test.jsonl", rows))["overall"].iloc[0] == 1.5


# Joining with what was published


def test_ratings_meet_their_answers_whatever_the_order(tmp_path: Path, frames, rated):
    again = rated_answers(load_readings(write(tmp_path / "r.jsonl", lines()[::-1])), frames)
    pd.testing.assert_frame_equal(again, rated)
    texts = map(text, rated["policy"], rated["prompt_id"])
    assert rated["response"].tolist() == [*texts]
    row = rated.set_index(["policy", "prompt_id"]).loc[("scalar_average", "p1")]
    assert (row["overall"], row["reward_judge"]) == (4, 1), "not the rating of the second line"
    shuffled = policy_readings(rated.sample(frac=1, random_state=1), SAMPLES)
    pd.testing.assert_frame_equal(shuffled, policy_readings(rated, SAMPLES))


@pytest.mark.parametrize("policy", ["ordinal_s0", "sft_best_of_16"])
def test_another_text_is_refused(tmp_path: Path, frames, policy: str):
    rows = lines()
    (row,) = (r for r in rows if (r["policy"], r["prompt_id"]) == (policy, "p1"))
    row["response"] += " "
    with pytest.raises(DataError, match=f"prompt p1: the rated answer of {policy} is not"):
        rated_answers(load_readings(write(tmp_path / "test.jsonl", rows)), frames)


def test_a_prompt_of_one_side_is_refused(tmp_path: Path, frames):
    readings = load_readings(write(tmp_path / "test.jsonl", lines()))
    with pytest.raises(DataError, match="prompt p3: the rated answer"):
        rated_answers(readings[readings["prompt_id"] != "p3"], frames)
    short = {name: frame[frame["prompt_id"] != "p0"] for name, frame in frames.items()}
    with pytest.raises(DataError, match="prompt p0: the rated answer"):
        rated_answers(readings, short)


# Tables


def test_policies_as_the_reader_sees_them(rated):
    table = policy_readings(rated, SAMPLES).set_index("policy")
    assert [*table.index] == [*SORTS]
    row = table.loc["scalar_s0"]
    assert (row["rating"], row["gain"], row["n"]) == (9 / 4, 0, 4)
    assert row["win_rate"] == (1 + 1 / 2 + 1 / 2 + 0) / 4, "a tie is no loss"
    assert row["tied"] == 2 / 4
    assert row["win_rate_best"] == (1 + 3 / 2) / 4
    assert row["win_rate_best_of_16"] == (3 / 2 + 0) / 4
    assert row["judge_win_rate"] == 1
    assert (row["echo_share"], row["echo_gain"], row["good_share"]) == (1 / 4, 1 / 4, 1 / 4)
    assert (row["length"], row["finished"]) == (10, 1), "of the rated samples alone"
    assert table.loc["ordinal_s0", "judge_win_rate"] == (1 + 1 / 2 + 1 + 1) / 4


def test_gains_in_rating_are_paired(rated):
    """Unpaired, the spread between prompts would be in the interval."""
    shifted = rated.assign(overall=rated["overall"] + (rated["policy"] == "ordinal_s0"))
    row = policy_readings(shifted, SAMPLES).set_index("policy").loc["ordinal_s0"]
    assert span(row, "gain") == (1, 1, 1)
    assert row["rating_low"] < row["rating"] < row["rating_high"]


def test_agreement_is_over_the_pairs_that_the_reader_decides(rated):
    table = agreement_table(rated, SAMPLES).set_index("kind")
    row = table.loc["SFT with SFT"]
    assert (row["pairs"], row["decided"], row["prompts"]) == (4, 1, 1)
    assert (row["judge"], row["ordinal"], row["version"]) == (0, 1, 1)
    row = table.loc["policy with policy"]
    # Scalar against ordinal on p2 and p3, then the average against each on all four.
    assert (row["pairs"], row["decided"], row["prompts"]) == (12, 10, 4)
    judge = [0.5, 0.5, 0, 0.5, 0.5, 1, 0, 1, 0.5, 1]
    assert row["judge"] == pytest.approx(sum(judge) / 10)
    assert row["scalar"] == row["judge"] == pytest.approx(1 - row["ordinal"])
    assert row["version"] == pytest.approx((1 / 2 + 1 / 2 + 8) / 10)
    assert row["judge_beyond"] == pytest.approx(row["judge"] - row["version"])
    assert table.loc["best of 16 with policy", "pairs"] == 12
    assert table["pairs"].sum() == 15 * 4, "each two policies are of one kind"


def test_what_echoes_earn(rated):
    table = echo_table(rated, SAMPLES).set_index("answers")
    assert table["n"].to_dict() == {"echo": 2, "honest bad": 5, "good": 4}
    assert table["prompts"].to_dict() == {"echo": 1, "honest bad": 3, "good": 2}
    assert table["judge"].to_dict() == {"echo": 0.5, "honest bad": 1, "good": 5 / 4}
    assert table["judge_over_echoes"].to_dict() == {"echo": 0, "honest bad": 0.5, "good": 0.75}
    assert span(table.loc["echo"], "judge_over_echoes") == (0, 0, 0)
    assert table.loc["good", "rating"] == 19 / 4


@pytest.mark.parametrize(
    ("name", "make"),
    [("policies", policy_readings), ("agreement", agreement_table), ("echoes", echo_table)],
)
def test_the_committed_tables_follow_from_the_published_rows(tmp_path: Path, name: str, make):
    ratings = load_readings(RESULTS / "readings" / "test.jsonl")
    table = make(rated_answers(ratings, policy_frames(RESULTS)), 2000)
    table.to_csv(tmp_path / "table.csv", index=False, float_format="%.6g")
    again = pd.read_csv(tmp_path / "table.csv")
    committed = pd.read_csv(RESULTS / "tables" / f"06_blind_{name}.csv")
    pd.testing.assert_frame_equal(again, committed, rtol=1e-5)


# As it is shown


def test_the_figure_puts_the_reader_beside_the_judge(rated):
    table = policy_readings(rated, SAMPLES)
    figure = readings_figure(table, "t")
    left, right = figure.axes
    shown = [line for line in left.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in shown] == table["rating"].tolist()
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels[2] == look.NAMES["sft_best_of_16"]
    for marker, name in (("o", "win_rate"), ("s", "judge_win_rate")):
        drawn = [line for line in right.lines if line.get_marker() == marker]
        values = [line.get_xdata()[0] for line in drawn if len(line.get_xdata())]
        assert values == (table[name] * 100).tolist()[1:], "SFT is not held against itself"


def test_intervals_stand_beside_their_value():
    table = pd.DataFrame({"a": [0.5], "a_low": [0.25], "a_high": [1.0], "n": [3]}, index=["x"])
    found = with_intervals(table, ["a"])
    assert found.loc["x"].to_dict() == {"a": "0.50 [0.25, 1.00]"}
