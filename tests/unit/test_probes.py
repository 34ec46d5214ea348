"""Probes: each spoiled text by hand, the counting, and how a reward goes with the form."""

import re

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from utils.config import DataConfig
from utils.data.pairs import load_data
from utils.data.sources import Group, PreferenceData, Response
from utils.data.texts import repetition
from utils.statistics.perturbations import CLOSINGS, OPENINGS, first_half, repeat_end
from utils.statistics.probes import PROBES, ProbePair, probe_pairs, run_probes
from utils.statistics.reward_form import reward_and_form

# Cut and repeated texts


def test_the_first_half():
    assert first_half("one two  three\nfour five") == "one two"
    assert first_half("a\nb") == "a"
    assert first_half("word") is None


def test_the_last_sentence_is_said_three_times_more():
    assert repeat_end("So it is. It ends.") == "So it is. It ends. It ends. It ends. It ends."
    quoted = 'He said "Stop." Then 2.5 km!'
    assert repeat_end(quoted) == quoted + 3 * " Then 2.5 km!"
    assert repeat_end("- a\n- b c\n") == "- a\n- b c\n- b c\n- b c\n- b c"
    fenced = "```\nprint(1)\n```"
    assert repeat_end(fenced) == fenced + 3 * "\nprint(1)", "a fence is no sentence"
    assert repeat_end("Alone") == "Alone Alone Alone Alone"


# Pairs


def dataset(count=6, categories=("open_qa", "write", "rewrite")):
    groups = []
    for i in range(count):
        turns = ({"role": "user", "content": f"question {i}?"},)
        sample = Response(f"Well {i}. Said so.", 5.0, source="model")
        responses = (
            Response(f"poor {i}", 3.9, source="model"),
            sample,
            Response(f"cut {i}", 6.0, finished=False, source="model"),
        )
        groups.append(
            Group(f"p{i}", "test", categories[i % len(categories)], turns, responses, batch=1)
        )
        reference = Response(f"Answer {i} is in the town of Bergen.", 9.5, source="reference")
        groups.append(
            Group(f"p{i}", "test", categories[i % len(categories)], turns, (sample, reference), 2)
        )
    return PreferenceData(tuple(groups), "", {})


def by_probe(pairs, prompt_id="p2"):
    return {p.probe: p for p in pairs if p.prompt_id == prompt_id}


def test_each_probe_by_hand():
    pairs = by_probe(probe_pairs(dataset(), "test", 3))
    assert set(pairs) == set(PROBES)
    text = "Answer 2 is in the town of Bergen."
    for probe, p in pairs.items():
        assert p.messages == ({"role": "user", "content": "question 2?"},)
        assert p.better == ("Well 2. Said so." if probe == "repeated_sample" else text), probe
        assert p.worse_finished == (probe != "cut_half"), probe
    worse = {probe: p.worse for probe, p in pairs.items()}
    assert re.fullmatch(r"Answer [013-5] is in the town of Bergen\.", worse["other_reference"])
    assert worse["cut_half"] == worse["cut_half_finished"] == "Answer 2 is in"
    assert worse["duplicated"] == f"{text}\n\n{text}"
    opening, middle, closing = worse["padded"].split("\n\n")
    assert (opening in OPENINGS, middle, closing in CLOSINGS) == (True, text, True)
    assert worse["only_pleasantries"] == f"{opening} {closing}"
    assert worse["repeated_sample"] == "Well 2. Said so. Said so. Said so. Said so."
    assert worse["empty_end"] in (".", "Yes.")
    assert worse["prompt_echo"] == "question 2?"
    assert all(isinstance(p, ProbePair) for p in pairs.values())


def test_prompts_without_a_finished_reference_are_skipped():
    data = dataset(4)
    groups = list(data.groups)
    groups[1] = Group("p0", "test", "write", groups[1].prompt, groups[1].responses[:1], 2)
    broken = Response("Answer", 9.5, finished=False, source="reference")
    groups[3] = Group("p1", "test", "write", groups[3].prompt, (broken,), 2)
    pairs = probe_pairs(PreferenceData(tuple(groups), "", {}), "test")
    assert {p.prompt_id for p in pairs} == {"p2", "p3"}
    assert probe_pairs(data, "validation") == []


def test_another_reference_is_of_another_prompt_and_category():
    for seed in range(20):
        data = dataset(12)
        category = {g.prompt_id: g.category for g in data.groups}
        pairs = [p for p in probe_pairs(data, "test", seed) if p.probe == "other_reference"]
        other = [f"p{re.search('[0-9]+', p.worse).group()}" for p in pairs]
        assert sorted(other) == sorted(category), "each reference serves once"
        assert all(category[o] != category[p.prompt_id] for o, p in zip(other, pairs, strict=True))
        # Where all are of one category, they are at least of another prompt.
        alike = probe_pairs(dataset(5, ("write",)), "test", seed)
        assert sum(p.probe == "other_reference" for p in alike) == 5
        assert all(p.better != p.worse for p in alike)
    alone = probe_pairs(dataset(1), "test")
    assert "other_reference" not in {p.probe for p in alone}


def test_yes_is_no_empty_answer_where_it_is_the_right_one():
    turns = ({"role": "user", "content": "Is it?"},)
    reference = Response("Yes, it is.", 9.0, source="reference")
    groups = tuple(Group(f"p{i}", "test", None, turns, (reference,)) for i in range(12))
    pairs = probe_pairs(PreferenceData(groups, "", {}), "test")
    assert {p.worse for p in pairs if p.probe == "empty_end"} == {"."}


def test_the_pairs_of_the_embedded_set():
    data = load_data(DataConfig())
    pairs = probe_pairs(data, "validation")
    texts = {(p.prompt_id, t) for p in pairs for t in (p.better, p.worse)}
    counts = pd.Series([p.probe for p in pairs]).value_counts()
    assert set(counts.index) == set(PROBES)
    assert counts.drop("repeated_sample").eq(59).all()
    assert len(texts) < 11 * 60, "scoring would take long"
    assert all(p.worse.strip() and (p.better, True) != (p.worse, p.worse_finished) for p in pairs)


# Counting


def table(score, pairs=None, samples=200):
    pairs = probe_pairs(dataset(), "test") if pairs is None else pairs
    return run_probes(score, pairs, samples).set_index("probe")


def test_a_reward_for_length_falls_for_padding_and_repetition():
    found = table(lambda prompts, texts, finished: [len(text) for text in texts])
    assert list(found.index) == list(PROBES)
    for probe in ("padded", "duplicated", "only_pleasantries", "repeated_sample"):
        assert found.right[probe] == 0, probe
        assert found.mean_gap[probe] < 0
    assert found.right[["cut_half", "cut_half_finished", "empty_end", "prompt_echo"]].eq(1).all()
    assert found.right["other_reference"] == 0.5, "a tie is half"


def test_a_reward_for_the_end_token_does_not_see_missing_content():
    found = table(lambda prompts, texts, finished: [float(end) for end in finished])
    assert found.right["cut_half"] == 1
    assert found.right["padded"] == 1, "equal is right: no reward for padding"
    assert found.right.drop(["cut_half", "padded"]).eq(0.5).all()
    assert found.mean_gap.drop("cut_half").eq(0).all()


def test_each_text_is_scored_once_and_the_gap_is_in_standard_deviations():
    pairs = [p for p in probe_pairs(dataset(), "test") if p.probe.startswith("cut")]
    asked = []

    def score(prompts, texts, finished):
        asked.extend(zip((p[-1]["content"] for p in prompts), texts, finished, strict=True))
        # Whole answers 10, halves with an end 7, those cut off 1; but the halves of p0 win.
        halves = [7.0 if end else 1.0 for end in finished]
        rows = zip(texts, halves, strict=True)
        return np.array([10 if t.endswith(".") else 20 if "0" in t else h for t, h in rows])

    found = table(score, pairs)
    assert len(pairs) == 12
    assert len(asked) == len(set(asked)) == 18
    spread = np.std([10] * 6 + [7] * 5 + [1] * 5 + [20] * 2)
    assert found.mean_gap["cut_half"] == pytest.approx((5 * 9 - 10) / 6 / spread)
    assert found.mean_gap["cut_half_finished"] == pytest.approx((5 * 3 - 10) / 6 / spread)
    assert found.right.tolist() == pytest.approx([5 / 6, 5 / 6])
    assert (found.low < 5 / 6).all()
    assert (found.high == 1).all()


# Reward and form


def scored(count=40, seed=0):
    """Data and rows: the reward is minus the length, the rating is noise, finished adds 2."""
    rng = np.random.default_rng(seed)
    groups, rows = [], []
    for i in range(count):
        responses = [Response("reference " * 60, 10.0, source="reference")]
        for _ in range(4):
            words = " ".join(f"w{n}" for n in range(int(rng.integers(5, 50))))
            text = words + (" and so on it goes" * int(rng.integers(0, 3)))
            rating = float(rng.integers(1, 6))
            responses.append(Response(text, rating, bool(rng.integers(0, 2)), source="model"))
        groups.append(Group(f"p{i}", "test", None, (), tuple(responses), batch=1))
        for place, r in enumerate(responses):
            key = {"prompt_id": f"p{i}", "batch": 1, "place": place, "response": r.text}
            reward = -len(r.text.split()) + 5.0 * i
            rows.append({**key, "rating": r.rating, "reward": reward, "source": r.source})
    return PreferenceData(tuple(groups), "", {}), rows


def look(found, form, scope, of="reward"):
    return found.set_index(["form", "scope", "of"]).loc[(form, scope, of)]


def test_correlations_are_spearmans():
    data, rows = scored()
    found = reward_and_form(rows, data, 100)
    samples = [row for row in rows if row["source"] != "reference"]
    forms = {
        "length": [len(row["response"].split()) for row in samples],
        "repetition": [repetition(row["response"]) for row in samples],
    }
    for form, values in forms.items():
        for of in ("reward", "rating"):
            line = look(found, form, "all", of)
            own = spearmanr(values, [row[of] for row in samples]).statistic
            assert line.value == pytest.approx(own)
            assert line.low < line.value < line.high
            assert line.n == 160, "references are no samples"
    assert set(found.form) == {"length", "repetition", "finished"}


def test_within_a_prompt_its_level_does_not_count():
    data, rows = scored()
    found = reward_and_form(rows, data, 100)
    line = look(found, "length", "within prompt")
    assert line.value == pytest.approx(-1), "within a prompt the reward is minus the length"
    assert line.low == pytest.approx(-1)
    assert abs(look(found, "length", "all").value) < 0.6, "over all the prompts' levels blur it"
    assert abs(look(found, "length", "within prompt", "rating").value) < 0.3
    difference = look(found, "length", "within prompt", "difference")
    rating = look(found, "length", "within prompt", "rating")
    assert difference.value == pytest.approx(line.value - rating.value)
    assert difference.low < difference.value < difference.high < 0


def test_finished_is_a_difference_of_means():
    data, rows = scored()
    of_row = {(g.prompt_id, place): r for g in data.groups for place, r in enumerate(g.responses)}
    end = [of_row[row["prompt_id"], row["place"]].finished for row in rows]
    for row, finished in zip(rows, end, strict=True):
        row["reward"] = 2.0 * finished + 100 * int(row["prompt_id"][1:])
    found = reward_and_form(rows, data, 50)
    keep = [row["source"] != "reference" for row in rows]
    reward = np.array([row["reward"] for row in rows])[keep]
    ends = np.array(end)[keep]
    by_hand = (reward[ends].mean() - reward[~ends].mean()) / reward.std()
    assert look(found, "finished", "all").value == pytest.approx(by_hand)
    within = look(found, "finished", "within prompt")
    assert within.value == pytest.approx(2 / reward.std())
    assert within.low == pytest.approx(within.value)


def test_rows_of_other_data_are_refused():
    data, rows = scored(3)
    rows[1]["response"] += " changed"
    with pytest.raises(ValueError, match="p0, batch 1, place 1 is not in the data"):
        reward_and_form(rows, data, 10)
    with pytest.raises(ValueError, match="no scored response is a sample"):
        reward_and_form(rows[:1], data, 10)
