"""Sentences on evaluated policies, from rows whose numbers are known."""

import math

import pandas as pd
import pytest

from utils import policy_words
from utils.comparison import category_gains, gains_table
from utils.intervals import ends, named
from utils.policy_arms import ARMS
from utils.targets import target_row
from utils.wording import listed

SCALAR, ORDINAL = ARMS["scalar"].label, ARMS["ordinal"].label
NONE = "No policy is published yet."
NOTHING = pd.DataFrame()


def span(name, value, low, high):
    return named(name, {"value": value, "low": low, "high": high})


def row(policy, judge, own=(1.0, 0.5, 1.5), seeds=3, agree=True):
    found = {"policy": policy, "seeds": seeds, "gain_judge_agree": agree, "kl": 4.0, "length": 30}
    found |= span("gain_judge", *judge)
    return found | span("gain_scalar", *own) | span("gain_ordinal", -own[0], -own[2], -own[1])


def test_a_value_and_its_interval_are_three_columns():
    assert ends("gain") == ["gain", "gain_low", "gain_high"]
    assert span("gain", 1, 0, 3) == {"gain": 1, "gain_low": 0, "gain_high": 3}


def test_lists():
    assert listed(["a", "b"]) == "- a\n- b"
    assert listed([], "nothing") == "nothing"
    assert listed(line for line in ()) == ""


def test_gains():
    table = pd.DataFrame(
        [
            row("sft", (0.0, 0.0, 0.0)),
            row("ordinal", (-0.25, -0.5, -0.125), agree=False),
            row("scalar_ema", (0.25, -0.125, 0.5), seeds=1, agree=math.nan),
            row("scalar", (0.25, 0.125, 0.5)),
            row("scalar_s0_greedy", (9.0, 9.0, 9.0)),
        ]
    )
    scalar, ordinal, ema = policy_words.gain_words(table).split("\n")
    assert scalar == (
        f"- **{SCALAR}**: under its own reward model +1.00 [+0.50, +1.50], above zero; under the "
        "judge +0.25 [+0.12, +0.50], above zero (all seeds have its sign)."
    )
    assert ordinal == (
        f"- **{ORDINAL}**: under its own reward model -1.00 [-1.50, -0.50], below zero; under the "
        "judge -0.25 [-0.50, -0.12], below zero (the seeds disagree)."
    )
    assert "+0.25 [-0.12, +0.50], inconclusive (one seed)" in ema
    cautious = policy_words.gain_words(pd.DataFrame([row("ordinal_cautious", (1, 0.5, 2))]))
    assert "own" not in cautious, "the mean rating is not what it was trained on"
    assert policy_words.gain_words(NOTHING) == NONE


def test_best_of_n():
    pick = {"kl": 1.8, "length": 50} | span("judge_gain", 0.5, 0.25, 0.75)
    best = pd.DataFrame(
        [
            {"proxy": proxy, "n": n} | pick | ({"judge_gain": 7.0} if (proxy, n) in wrong else {})
            for wrong in [{("scalar", 2), ("ordinal", 16)}]
            for proxy in ("scalar", "ordinal")
            for n in (16, 2)
        ]
    )
    table = pd.DataFrame([row(name, (0.25, -0.5, 1.0)) for name in ("scalar", "scalar_ema")])
    assert policy_words.best_of_n_words(best, table) == (
        f"- Under the judge, the best of 16 by the {SCALAR} gains +0.50 [+0.25, +0.75], above "
        "zero, at 1.8 nats and 50 tokens; the policy gains +0.25 [-0.50, +1.00], inconclusive, at "
        "4.0 nats and 30 tokens."
    )
    assert policy_words.best_of_n_words(NOTHING, NOTHING) == NONE


def level(method, value, low, high, **changes):
    found = {"first": "scalar", "second": "ordinal", "method": method, "value": value, "low": low}
    found |= {"high": high, "seeds": 3, "seeds_agree": True, "kl_first": 2.0, "kl_second": 4.0}
    return found | {"length_first": 20.0, "length_second": 30.0} | changes


def test_levels():
    rows = [level("raw", 0.5, 0.25, 0.75), level("length", -0.5, -0.75, -0.25)]
    one = {"second": "ordinal_cautious", "first": "ordinal", "seeds": 1, "seeds_agree": math.nan}
    rows += [level("raw", 0.5, -0.25, 0.75, **one), level("length", 0.5, 0.25, 0.75, **one)]
    assert policy_words.level_words(pd.DataFrame(rows)) == (
        f"- **{ORDINAL}** against **{SCALAR}**: +0.50 [+0.25, +0.75] under the judge, **better**; "
        "at equal length -0.50 [-0.75, -0.25], worse. KL 4.0 against 2.0 nats, length 30 against "
        "20 tokens; 3 seeds. The seeds agree."
    ), "no verdict on one seed"
    apart = pd.DataFrame([entry | {"seeds_agree": False} for entry in rows[:2]])
    assert policy_words.level_words(apart).endswith("The seeds do not agree in sign.")
    assert policy_words.level_words(NOTHING) == "The arms to compare are not published yet."


def test_lengths():
    facts = {"policy": "scalar", "reward": "judge", "matched": 0.5, "raw_there": 0.375}
    ends_at = {"low": 0.25, "high": 0.75, "length_change": -12.0}
    values = {"raw": 1.0, "length": 0.5, "length and finish": 0.25}
    rows = [facts | ends_at | {"method": name, "value": v} for name, v in values.items()]
    rows[2] |= {"low": -0.5}
    rows += [entry | {"reward": "own", "value": 9.0} for entry in rows]
    rows += [entry | {"policy": "sft_greedy"} for entry in rows]
    fit = {"policy": "scalar", "reward": "judge", "per_10_tokens": -0.1, "per_finish": 0.2}
    fit |= span("unchanged", -0.5, -0.75, -0.25)
    fits = pd.DataFrame([fit | {"reward": "own", "per_finish": 9.0}, fit])
    assert policy_words.length_words(pd.DataFrame(rows), fits) == (
        f"- **{SCALAR}**, -12 tokens: +1.00 as it is, +0.50 [+0.25, +0.75] at equal length (above "
        "zero; 50% of the completions, which gain +0.38 unmatched), +0.25 [-0.50, +0.75] if the "
        "ending is matched too (inconclusive), and by regression -0.50 [-0.75, -0.25], below zero. "
        "Ten tokens more: -0.10; an ending: +0.20."
    )
    assert policy_words.length_words(NOTHING, NOTHING) == NONE


def test_temperature():
    rows = [
        {"policy": "scalar", "decoding": decoding, "against": against, **span("own", 2, 1, 3)}
        | span("judge", judge, judge - 0.25, judge + 0.25)
        for decoding, against, judge in (
            ("sampled", "sft_best", 0.5),
            ("greedy", "sft_greedy", 0.125),
            ("greedy", "sft_best", 0.25),
        )
    ]
    assert policy_words.temperature_words(pd.DataFrame(rows)) == (
        f"- {SCALAR}: 1 of 3 comparisons under the judge are above zero; the least is greedy "
        "against SFT, greedy: +0.12 [-0.12, +0.38], inconclusive."
    )
    assert policy_words.temperature_words(NOTHING) == NONE


def test_categories():
    rows = [
        {"policy": "scalar", "reward": reward, "category": name, "value": v, "low": lo, "high": hi}
        for reward, shift in (("judge", 0.0), ("own", 5.0))
        for name, v, lo, hi in (
            *(("write", 1.0 + shift, 0.5, 1.5), ("qa", 0.5 + shift, -0.5, 1.5)),
            ("list", -1.0 + shift, -2.0, -0.5),
        )
    ]
    assert policy_words.category_words(pd.DataFrame(rows)) == (
        f"- {SCALAR}: of 3 categories 2 gain, 1 clearly, and 1 clearly lose; least list (-1.00), "
        "most write (+1.00)."
    )
    assert policy_words.category_words(NOTHING).endswith("or the set has no categories.")


def test_targets():
    gain = target_row("gain", {"value": 0.5, "low": 0.25, "high": 0.75}, "above", 0)
    kl = target_row("KL, nats", {"value": 12.0}, "at most", 10)
    table = pd.DataFrame([gain, kl]).assign(arm="scalar")
    assert policy_words.arm_target_words(table) == (
        f"**Aligned with the {SCALAR}**, 1 of 2 targets reached:\n\n"
        "- gain: 0.50 [0.25, 0.75], wanted above 0.00: reached\n"
        "- KL, nats: 12.00, wanted at most 10.00: **not reached**"
    )
    both = pd.concat([table, table.head(1).assign(arm="scalar_average")])
    *_, average = policy_words.arm_target_words(both).split("\n\n**")
    assert average.startswith(f"Aligned with the {SCALAR}, average of the seeds**, 1 of 1 targets")
    assert "not published yet" in policy_words.arm_target_words(NOTHING)


def test_averages():
    average = row("scalar_average", (2.0, 1.5, 2.5), own=(1.5, 1.0, 2.0)) | {"kl": 9.0}
    table = pd.DataFrame([row("scalar", (1.0, 0.5, 1.5)), row("ordinal", (1, 0, 2)), average])
    assert policy_words.average_words(table) == (
        f"- **{SCALAR}**: the average of the seeds gains +1.50 [+1.00, +2.00] under its own reward "
        "model and +2.00 [+1.50, +2.50] under the judge at 9.0 nats; a seed alone +1.00 [+0.50, "
        "+1.50] and +1.00 [+0.50, +1.50] at 4.0. For the root of a nat the own gain is 0.50 "
        "against 0.50."
    )
    assert policy_words.average_words(table.head(2)) == "No average is published yet."
    assert policy_words.average_words(NOTHING) == "No average is published yet."


# One run


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
    text = policy_words.control_words(rows).split("\n")
    assert text[0] == (
        "- `align_scalar` under the scalar reward: **+1.00** to SFT (above zero), win rate 1.00; "
        "**+0.67** to SFT at its best temperature (inconclusive)"
    )
    assert "under the ordinal reward: **-1.00** to SFT (below zero), win rate 0.00" in text[1]


def test_categories_of_a_run(frames):
    rows = category_gains(frames, 200).set_index(["policy", "category"])
    assert rows["value"].tolist() == [1, 1, 0, 2], "each by its own reward"
    assert rows["n"].tolist() == [1, 2, 1, 2]
    assert tuple(rows.loc[("align_ordinal", "b"), ["low", "high"]]) == (1, 3)
    frames["sft"]["category"] = None
    assert category_gains(frames, 200).empty


def test_a_run_in_words():
    def table(name, gain, low, high):
        facts = {"difference": [0.0, gain], "low": [0.0, low], "high": [0.0, high]}
        facts |= {"kl": [0.0, 4.0], "length": [70.0, 30.0]}
        return pd.DataFrame({"policy": ["sft", f"align_{name}"]} | facts)

    tables = {"scalar": table("scalar", 1, 0.5, 1.5), "ordinal": table("ordinal", 0.5, -1, 2)}
    scalar, ordinal = policy_words.run_words(tables).split("\n")
    assert scalar == (
        "- **scalar**: the mean reward on held-out prompts rose by +1.00 SFT sd [+0.50, +1.50] at "
        "4.0 nats; length 30 tokens against 70."
    )
    assert "did not clearly change: +0.50 SFT sd" in ordinal
    fell = policy_words.run_words({"scalar": table("scalar", -1, -2, -0.5)})
    assert "fell by -1.00" in fell
