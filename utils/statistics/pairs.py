"""The scored pairs of a reward model's run, as a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from utils.data.pairs import Pair, response_key
from utils.files import RunFolder, read_jsonl
from utils.rewards.losses import CLASSES, log_win_probability
from utils.statistics.bootstrap import clustered_interval


def pair_rows(run: RunFolder, pairs: Sequence[Pair]) -> pd.DataFrame:
    """Pair up the scored responses of a run.

    Args:
        run: a reward model's run with its `samples.jsonl`.
        pairs: the pairs that were scored.

    Returns:
        A row per pair: prompt_id, category, prompt, `gap` (in rating), between_samples, chosen,
        rejected, and their rewards; `correct` is 1, 0, or .5 for a tie; `log_p` is
        log P(chosen beats rejected), a tie being no win; `p` is that probability given that the
        two do not tie.
    """
    scored = pd.DataFrame(read_jsonl(run.directory / "samples.jsonl"))
    keys = zip(scored["prompt_id"], scored["batch"], scored["place"], strict=True)
    row_of = {key: row for row, key in enumerate(keys)}
    better, worse = (
        scored.iloc[[row_of[response_key(pair, getattr(pair, side))] for pair in pairs]]
        for side in ("chosen", "rejected")
    )
    better, worse = better.reset_index(drop=True), worse.reset_index(drop=True)
    frame = better[["prompt_id", "category", "prompt"]].copy()
    frame["gap"] = better["rating"] - worse["rating"]
    frame["between_samples"] = [pair.between_samples for pair in pairs]
    for name, side in {"chosen": better, "rejected": worse}.items():
        frame[name], frame[f"{name}_reward"] = side["response"], side["reward"]
    logits = (torch.tensor(side["logits"].tolist()) for side in (better, worse))
    frame["log_p"], frame["p"] = (values.numpy() for values in _preference(*logits))
    frame["correct"] = (np.sign(frame["chosen_reward"] - frame["rejected_reward"]) + 1) / 2
    return frame


def pair_metrics(
    run: RunFolder, pairs: Sequence[Pair], samples: int
) -> tuple[pd.DataFrame, dict[str, dict[str, float]]]:
    """Measure the scored pairs of a run.

    Args:
        run: see `pair_rows`.
        pairs: see `pair_rows`.
        samples: bootstrap resamples of the intervals.

    Returns:
        The frame of `pair_rows`, and the metrics: `accuracy` over all pairs,
        `accuracy_model_pairs` over those between two samples of the model, and `nll`, the mean of
        `-log_p` over all; each as `clustered_interval` gives it.
    """
    frame = pair_rows(run, pairs)

    def interval(values: pd.Series) -> dict[str, float]:
        return clustered_interval(values, frame.loc[values.index, "prompt_id"], samples)

    metrics = {"accuracy": interval(frame["correct"]), "nll": interval(-frame["log_p"])}
    if frame["between_samples"].any():
        between = frame.loc[frame["between_samples"], "correct"]
        metrics["accuracy_model_pairs"] = interval(between)
    return frame, metrics


def _preference(chosen: torch.Tensor, rejected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log P(chosen beats rejected) and that probability given that there is no tie."""
    if chosen.shape[1] == CLASSES:
        log_win = log_win_probability(chosen, rejected)
        return log_win, torch.sigmoid(log_win - log_win_probability(rejected, chosen))
    gap = (chosen - rejected)[:, 0]
    return F.logsigmoid(gap), torch.sigmoid(gap)
