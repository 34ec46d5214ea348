"""Simple rules that a reward model has to beat: of two responses, which would each of them pick?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import vstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from utils.data.pairs import DataError, Pair, PreferenceData, Response
from utils.statistics.bootstrap import clustered_interval, named

# The higher value wins; None: the rule has nothing to judge by.
_VALUES: dict[str, Callable[[Response], float | None]] = {
    "longer": lambda r: len(r.text),
    "shorter": lambda r: -len(r.text),
    "finished": lambda r: float(r.finished),
    "cooler": lambda r: None if r.temperature is None else -r.temperature,
}
# What a reader of the answer could follow; that it was finished shows in its end token. The
# sampling temperature shows nowhere, so "cooler" is a yardstick and not a rule to beat.
TEXT_RULES = ("longer", "shorter", "finished", "bag_of_words")
RULES = (*TEXT_RULES, "cooler")
STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # of C, from the strongest regularisation to the weakest


@dataclass(frozen=True)
class BagOfWords:
    """A weight for each word and pair of neighbouring words, fitted by `bag_of_words`."""

    vectorizer: TfidfVectorizer
    weights: np.ndarray

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Return a score for each text; the difference of two is the log-odds of the first."""
        return self.vectorizer.transform(texts) @ self.weights


def bag_of_words(train_pairs: Sequence[Pair], validation_pairs: Sequence[Pair]) -> BagOfWords:
    """Fit a Bradley-Terry model whose reward is linear in the words of a response.

    Args:
        train_pairs: what the words and their weights are learnt from.
        validation_pairs: what C is chosen on, by accuracy; the smallest of those that do equally
            well, so also if there are no such pairs.

    Returns:
        The fitted scorer. It reads neither the prompt nor the order of more than two words.

    Raises:
        DataError: if there are no training pairs, or no words in them.
    """
    texts = list(dict.fromkeys(r.text for p in train_pairs for r in (p.chosen, p.rejected)))
    # Norm 1 and sublinear counts keep a long or repetitive text from speaking the loudest.
    vectorizer = TfidfVectorizer(token_pattern=r"\b\w+\b", ngram_range=(1, 2), sublinear_tf=True)
    try:
        vectorizer.fit(texts)
    except ValueError as error:
        raise DataError(
            f"the bag of words has no words to learn from in {len(train_pairs)} training pairs "
            f"({error}); use data whose train split has pairs of responses with words"
        ) from error
    chosen, rejected = (
        vectorizer.transform([getattr(pair, side).text for pair in train_pairs])
        for side in ("chosen", "rejected")
    )
    # Each pair in both orders, without an intercept: swapping two responses swaps the verdict.
    features = vstack([chosen - rejected, rejected - chosen]).tocsr()
    first_wins = np.repeat([1, 0], len(train_pairs))

    def fitted(c: float) -> BagOfWords:
        # The default tolerance stops early, which regularises further, and not by C alone.
        model = LogisticRegression(C=c, fit_intercept=False, tol=1e-8, max_iter=1000)
        return BagOfWords(vectorizer, model.fit(features, first_wins).coef_[0])

    return max(map(fitted, STRENGTHS), key=lambda bag: rule_accuracy(validation_pairs, bag)[0])


def rule_correct(pairs: Iterable[Pair], rule: str | BagOfWords) -> pd.Series:
    """Return for each pair whether a rule picks the chosen response.

    Args:
        pairs: pairs to judge.
        rule: "longer" or "shorter" (in characters), "finished", "cooler" (lower sampling
            temperature), or a fitted bag of words.

    Returns:
        1 or 0 for each pair, .5 for a tie, and NaN where the rule cannot judge: "cooler", if a
        response has no temperature.

    Raises:
        DataError: if the rule is unknown or has yet to be fitted.
    """
    pairs = list(pairs)
    if not isinstance(rule, BagOfWords) and rule not in _VALUES:
        raise DataError(
            f"unknown rule {rule!r}, expected one of {', '.join(_VALUES)}, or what "
            "bag_of_words(train_pairs, validation_pairs) returns"
        )
    if not pairs:
        return pd.Series(dtype=float)
    sides = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    if isinstance(rule, BagOfWords):
        better, worse = (rule.score([r.text for r in side]) for side in sides)
    else:
        better, worse = (np.array([_VALUES[rule](r) for r in side], float) for side in sides)
    return pd.Series((np.sign(better - worse) + 1) / 2)


def rule_accuracy(pairs: Iterable[Pair], rule: str | BagOfWords) -> tuple[float, int]:
    """Return how often a rule picks the chosen response, and of how many pairs; see `rule_correct`.

    Returns:
        A share in 0..1, a tie counting half (NaN if no pair could be judged), and the number of
        pairs judged.
    """
    correct = rule_correct(pairs, rule).dropna()
    return float(correct.mean()), len(correct)


def rules_correct(data: PreferenceData, split: str) -> pd.DataFrame:
    """Judge the pairs of a split by every rule: `rule_correct`, a row per pair, a column per rule.

    The bag of words is trained on the train split and its C chosen on the validation split.
    """
    pairs = data.pairs(split)
    bag = bag_of_words(data.pairs("train"), data.pairs("validation"))
    return pd.DataFrame(
        {name: rule_correct(pairs, bag if name == "bag_of_words" else name) for name in RULES}
    )


def rules_table(data: PreferenceData, split: str, samples: int) -> pd.DataFrame:
    """Measure every rule on the pairs of a split.

    The bag of words saw the other two splits, so only on the test split is it a fair rival.

    Args:
        data: the rated responses of all splits.
        split: whose pairs are judged.
        samples: bootstrap resamples of the intervals, which are over prompts.

    Returns:
        One row per rule of `RULES`: `reads_text`; `accuracy`, `accuracy_low`, `accuracy_high` and
        `n` over all pairs that the rule can judge; `model_pairs`, `model_pairs_low`,
        `model_pairs_high` and `model_pairs_n` over those between two samples of the model. NaN and
        an `n` of 0 where it can judge none.
    """
    pairs = data.pairs(split)
    between = np.array([pair.between_samples for pair in pairs], bool)
    prompts = pd.Series([pair.prompt_id for pair in pairs], dtype=object)
    rows = []
    for name, correct in rules_correct(data, split).items():
        row = {"rule": name, "reads_text": name in TEXT_RULES}
        for prefix, judged in {"accuracy": correct, "model_pairs": correct[between]}.items():
            found = _interval(judged.dropna(), prompts, samples)
            row |= named(prefix, found)
            row["n" if prefix == "accuracy" else f"{prefix}_n"] = found["n"]
        rows.append(row)
    return pd.DataFrame(rows)


def _interval(correct: pd.Series, prompts: pd.Series, samples: int) -> dict[str, float]:
    if correct.empty:
        return {"value": np.nan, "low": np.nan, "high": np.nan, "n": 0}
    return clustered_interval(correct, prompts[correct.index], samples)
