"""The gains of a run's policies over the SFT model, from small made-up evaluations."""

import pandas as pd
import pytest

from utils.experiments.comparison import category_gains, gains_table


def evaluation(scalar, ordinal):
    found = {"prompt_id": ["p0", "p1", "p2"], "category": ["a", "b", "b"], "finished": True}
    found |= {"response": "some words", "reward_scalar": scalar, "reward_ordinal": ordinal}
    return pd.DataFrame(found | {"kl": 1.0, "length": 9, "repetition": 0.0})


@pytest.fixture
def frames():
    return {
        "sft": evaluation([0.0, 1, 2], [0.0, 0, 0]),
        "sft_best": evaluation([1.0, 1, 2], [1.0, 1, 1]),
        "align_scalar": evaluation([1.0, 2, 3], [-1.0, -1, -1]),
        "align_ordinal": evaluation([0.0, 2, 1], [0.0, 3, 1]),
    }


def test_gains_of_a_run(frames):
    rows = gains_table(frames, 200)
    assert rows["policy"].tolist() == ["align_scalar"] * 2 + ["align_ordinal"] * 2
    assert rows["reward"].tolist() == ["scalar", "ordinal"] * 2
    first = rows.iloc[0]
    assert tuple(first[["difference", "low", "high", "win_rate"]]) == (1, 1, 1, 1)
    beyond = tuple(first[[f"beyond_best_{end}" for end in ("value", "low", "high")]])
    assert beyond == pytest.approx((2 / 3, 0, 1))
    assert rows["difference"].tolist() == pytest.approx([1, -1, 0, 4 / 3])
    assert rows["beyond_best_value"].tolist() == pytest.approx([2 / 3, -2, -1 / 3, 1 / 3])


def test_categories_of_a_run(frames):
    rows = category_gains(frames, 200).set_index(["policy", "category"])
    assert rows["value"].tolist() == [1, 1, 0, 2], "each by its own reward"
    assert rows["n"].tolist() == [1, 2, 1, 2]
    assert tuple(rows.loc[("align_ordinal", "b"), ["low", "high"]]) == (1, 3)
    frames["sft"]["category"] = None
    assert category_gains(frames, 200).empty
