"""The rules to beat: each by hand, the learnt one on planted words, and what the table holds."""

import math
import random

import numpy as np
import pandas as pd
import pytest

from utils.config import DataConfig
from utils.data.pairs import DataError, Group, Pair, PreferenceData, Response, load_data
from utils.statistics import rules
from utils.statistics.rules import (
    RULES,
    TEXT_RULES,
    BagOfWords,
    bag_of_words,
    rule_accuracy,
    rule_correct,
    rules_table,
)

FILLER = [f"word{i}" for i in range(40)]


@pytest.fixture(scope="module")
def embedded():
    return load_data(DataConfig())


def group(name, *responses, split="test"):
    turns = ({"role": "user", "content": f"Prompt {name}?"},)
    return Group(name, split, None, turns, responses)


def sample(text, rating, temperature=0.7, finished=True):
    return Response(text, rating, finished=finished, source="m", temperature=temperature)


def reference(text, rating):
    return Response(text, rating, source="reference")


def texts_pair(chosen, rejected, name="p"):
    both = sample(chosen, 8.0), sample(rejected, 2.0)
    return Pair(group(name, *both), *both)


def planted(n, seed, better="good", worse="bad"):
    """Pairs of random words; `better` is in each chosen response, `worse` in each rejected one."""
    draw = random.Random(seed)
    pairs = []
    for i in range(n):
        sides = [[*draw.choices(FILLER, k=6), word] for word in (better, worse)]
        for words in sides:
            draw.shuffle(words)
        pairs.append(texts_pair(*(" ".join(words) for words in sides), name=f"p{i}"))
    return pairs


@pytest.fixture(scope="module")
def bag():
    return bag_of_words(planted(60, 0), planted(30, 1))


# Rules that are computed


def test_rules_by_hand():
    long_hot = sample("one two three", 5.0, temperature=1.0, finished=False)
    short_cool = sample("one", 2.0, temperature=0.2)
    good = reference("two", 9.0)
    g = group("p", long_hot, short_cool, good)
    pairs = [Pair(g, long_hot, short_cool), Pair(g, good, short_cool), Pair(g, good, long_hot)]
    expected = {
        "longer": [1, 0.5, 0],
        "shorter": [0, 0.5, 1],
        "finished": [0, 0.5, 1],
        "cooler": [0, math.nan, math.nan],  # a reference has no temperature
    }
    for rule, correct in expected.items():
        assert rule_correct(pairs, rule).tolist() == pytest.approx(correct, nan_ok=True), rule
    assert rule_accuracy(pairs, "longer") == (0.5, 3)
    assert rule_accuracy(pairs[:2], "longer") == (0.75, 2)  # a win and a tie
    assert rule_accuracy(pairs[:2], "shorter") == (0.25, 2)
    assert rule_accuracy(pairs, "cooler") == (0.0, 1)
    swapped = [Pair(g, pair.rejected, pair.chosen) for pair in pairs]
    assert rule_accuracy(swapped, "cooler") == (1.0, 1)


@pytest.mark.parametrize(
    ("rule", "samples_only", "share"),
    [
        ("longer", True, 0.514),
        ("finished", True, 0.525),
        ("cooler", True, 0.782),
        ("longer", False, 0.406),
        ("shorter", False, 0.594),
    ],
)
def test_embedded_rules(embedded, rule, samples_only, share):
    pairs = [p for p in embedded.pairs("test") if p.between_samples or not samples_only]
    accuracy, count = rule_accuracy(pairs, rule)
    assert accuracy == pytest.approx(share, abs=5e-4)
    assert count == len(pairs)


# The bag of words


def test_a_planted_word_is_learnt(bag):
    assert rule_accuracy(planted(50, 2), bag) == (1.0, 50)
    assert rule_accuracy(planted(50, 2, better="bad", worse="good"), bag) == (0.0, 50)
    weights = dict(zip(bag.vectorizer.get_feature_names_out(), bag.weights, strict=True))
    assert max(weights, key=weights.get) == "good"
    assert min(weights, key=weights.get) == "bad"


def test_shuffled_labels_leave_chance():
    draw = random.Random(0)

    def shuffled(pairs):
        texts = [(p.chosen.text, p.rejected.text) for p in pairs]
        return [texts_pair(*draw.sample(both, 2)) for both in texts]

    fitted = bag_of_words(shuffled(planted(400, 0)), shuffled(planted(50, 1)))
    share, judged = rule_accuracy(shuffled(planted(400, 2)), fitted)
    assert judged == 400
    assert share == pytest.approx(0.5, abs=0.1)  # four standard errors


def conflict():
    """Training pairs whose verdict on ("rare", "common") hangs on C.

    A strong regularisation goes by "common", which is in many pairs, a weak one by "rare".
    """
    often = [texts_pair(f"common {w}", f"plain {w}") for w in FILLER]
    seldom = [texts_pair("rare", "common")] * 3
    return often + seldom


def test_c_is_chosen_on_validation_pairs():
    train, probe = conflict(), texts_pair("rare", "common")
    weak = bag_of_words(train, [probe])
    strong = bag_of_words(train, [texts_pair("common", "rare")])
    assert np.linalg.norm(strong.weights) < np.linalg.norm(weak.weights)
    assert rule_accuracy([probe], weak) == (1.0, 1)
    assert rule_accuracy([probe], strong) == (0.0, 1)


@pytest.mark.parametrize("pairs", [[], [texts_pair("?!", "...")]])
def test_nothing_to_learn_from(pairs):
    with pytest.raises(DataError, match=f"no words to learn from in {len(pairs)} training pairs"):
        bag_of_words(pairs, [])


# The table


def rated(split, seed, n=6, better="good", worse="bad"):
    """Groups of a hot sample that is chosen, a cool one that is not, and a reference above both."""
    groups = []
    for p in planted(n, seed, better, worse):
        hot, cool = (sample(p.chosen.text, 6.0, 1.0), sample(p.rejected.text, 2.0, 0.2))
        best = reference("good", 9.0)
        groups.append(group(f"{split}{p.prompt_id}", hot, cool, best, split=split))
    return groups


def bundle(*groups):
    return PreferenceData(tuple(g for some in groups for g in some), "", {})


def test_table():
    data = bundle(rated("train", 0, 20), rated("validation", 1), rated("test", 2))
    table = rules_table(data, "test", 100).set_index("rule")
    assert tuple(table.index) == RULES
    assert table.index[table["reads_text"]].tolist() == list(TEXT_RULES)
    intervals = ["", "_low", "_high"]
    assert table.columns.tolist() == [
        "reads_text",
        *[f"accuracy{end}" for end in intervals],
        "n",
        *[f"model_pairs{end}" for end in intervals],
        "model_pairs_n",
    ]
    assert table["n"].to_dict() == {**dict.fromkeys(TEXT_RULES, 18), "cooler": 6}
    assert set(table["model_pairs_n"]) == {6}
    assert table.loc["cooler", ["accuracy", "model_pairs"]].tolist() == [0, 0]
    assert table.loc["bag_of_words", ["accuracy", "model_pairs"]].tolist() == [1, 1]
    assert table.loc["finished", ["accuracy_low", "accuracy_high"]].tolist() == [0.5, 0.5]


def test_the_table_never_fits_on_the_judged_split(monkeypatch):
    data = bundle(rated("train", 0), rated("validation", 1), rated("test", 2))
    seen = []

    def spy(train_pairs, validation_pairs):
        seen.extend([train_pairs, validation_pairs])
        return bag_of_words(train_pairs, validation_pairs)

    monkeypatch.setattr(rules, "bag_of_words", spy)
    assert isinstance(rules_table(data, "test", 10), pd.DataFrame)
    assert seen == [data.pairs("train"), data.pairs("validation")]
    upside_down = bundle(
        rated("train", 0), rated("validation", 1), rated("test", 2, 6, "bad", "good")
    )
    table = rules_table(upside_down, "test", 10).set_index("rule")
    assert table.loc["bag_of_words", "model_pairs"] == 0  # flipped test ratings change no weight
    assert isinstance(bag_of_words(data.pairs("train"), []), BagOfWords)
