"""How a reward goes with the form of an answer: its length, its repetitions, whether it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from utils.data.sources import PreferenceData
from utils.data.texts import repetition
from utils.statistics.bootstrap import cluster_draws, percentile_interval


def reward_and_form(
    rows: Sequence[Mapping[str, Any]], data: PreferenceData, samples: int
) -> pd.DataFrame:
    """Tell how the reward of a model's samples goes with their form, and how their rating does.

    `length` (words) and `repetition` are Spearman's rank correlations; `finished` is the mean of
    the finished samples less that of those cut off, in standard deviations. "within prompt" looks
    at each group rated side by side: ranks among its samples (or values), less their mean.

    Ratings are coarse and noisy, which alone draws their correlations towards zero. So a reward
    exaggerates what the raters do only if it goes well beyond them, or the other way.

    Args:
        rows: of a reward model's `samples.jsonl`; references are left out.
        data: the responses that were scored, for what the rows do not say.
        samples: bootstrap resamples, of prompts.

    Returns:
        A row per `form` that varies, `scope` ("all", "within prompt") and `of` ("reward",
        "rating", and the "difference" of the two) with `value`, `low`, `high` and `n`.
    """
    frame = _with_form(rows, data)
    table = []
    for form in ("length", "repetition", "finished"):
        if frame[form].nunique() < 2:
            continue
        ranked = form != "finished"
        raw = frame[[form, "reward", "rating"]].astype(float)
        if not ranked:
            raw[["reward", "rating"]] /= raw[["reward", "rating"]].std(ddof=0)
        side_by_side = [frame["prompt_id"], frame["batch"]]
        own = raw.groupby(side_by_side).rank() if ranked else raw
        within = own - own.groupby(side_by_side).transform("mean")
        for scope, values in {"all": raw, "within prompt": within}.items():
            found = _association(
                values.to_numpy(), frame["prompt_id"], samples, ranked, ranked and scope == "all"
            )
            table += [{"form": form, "scope": scope, **row} for row in found]
    return pd.DataFrame(table, columns=["form", "scope", "of", "value", "low", "high", "n"])


def _with_form(rows: Sequence[Mapping[str, Any]], data: PreferenceData) -> pd.DataFrame:
    responses = {
        (group.prompt_id, group.batch, place): response
        for group in data.groups
        for place, response in enumerate(group.responses)
    }
    table = []
    for row in rows:
        response = responses.get((row["prompt_id"], row["batch"], row["place"]))
        if response is None or response.text != row["response"]:
            raise ValueError(
                f"the scored response {row['prompt_id']}, batch {row['batch']}, place "
                f"{row['place']} is not in the data, or is another text there: pass the data that "
                "the run was made with (`prepared_data` of its profile)"
            )
        if response.source != "reference":
            form = {"finished": response.finished, "length": len(response.text.split())}
            table.append({**row, **form, "repetition": repetition(response.text)})
    if not table:
        raise ValueError("no scored response is a sample of a model: there is no form to look at")
    return pd.DataFrame(table)


def _association(
    values: np.ndarray, clusters: pd.Series, samples: int, ranked: bool, rerank: bool
) -> list[dict[str, Any]]:
    """Associate the first column (form) with the others (reward, rating); resample clusters.

    Args:
        values: shape (rows, 3).
        clusters: the prompt of each row.
        samples: bootstrap resamples.
        ranked: correlation; otherwise the slope on a form that is 0 or 1, a difference of means.
        rerank: rank anew in each resample; ranks within a prompt do not depend on the others.
    """

    def statistic(rows: np.ndarray) -> np.ndarray:
        x = rankdata(rows, axis=0) if rerank else rows
        x = x - x.mean(axis=0)
        squares = (x * x).sum(axis=0)
        norm = np.sqrt(squares[0] * (squares if ranked else squares[0]))
        with np.errstate(invalid="ignore"):  # a resample in which one of them is constant
            _, reward, rating = x[:, 0] @ x / norm
        return np.array([reward, rating, reward - rating])

    cluster, drawn = cluster_draws(clusters, samples)
    draws = np.array([statistic(np.repeat(values, times[cluster], axis=0)) for times in drawn])
    return [
        {"of": of, **percentile_interval(found), "n": len(values)}
        for of, found in zip(("reward", "rating", "difference"), draws.T, strict=True)
    ]
