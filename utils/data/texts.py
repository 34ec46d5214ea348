"""Text statistics: how much of a text repeats itself or others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Share of different n-grams among all n-grams of words (Li et al. 2016); NaN if none."""
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def distinct_of_words(texts: Sequence[str], words: int, n: int = 2, seed: int = 0) -> float:
    """Share of different n-grams in the first `words` words of the texts, in a shuffled order.

    The more text, the more repeats: `distinct_n` of few or short texts is higher for that alone,
    which a fixed number of words undoes. The order is the same for any texts of that number.
    """
    kept, left = [], words
    for place in np.random.default_rng(seed).permutation(len(texts)):
        taken = texts[place].split()[:left]
        kept.append(" ".join(taken))
        left -= len(taken)
    return distinct_n(kept, n)


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's word n-grams that occurred before in it; 0 if it is too short."""
    grams = _grams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))
