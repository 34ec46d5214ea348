"""Figures of the training runs of the study of policies: curves, baselines, reward against KL.

An arm without a run is left out. What several seeds have in common is their mean, and it ends where
the first of them does, so that it does not jump there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.arms.policies import BASELINES
from utils.plots import style as look
from utils.plots.look import UNIT, arm_look, in_order
from utils.plots.report import SFT_SD
from utils.plots.style import style
from utils.statistics.bootstrap import ends
from utils.statistics.policy_logs import Logs

# Column: its panel's title, and the held-out column of the same quantity.
CURVES = {
    "reward": (f"reward, {SFT_SD} (line: training, moving average; thin: a seed)", "eval_reward"),
    "baseline": (f"baseline, {UNIT}", None),
    "kl": ("KL to SFT, nats per sequence", "eval_kl"),
    "entropy": ("entropy, nats per token", None),
    "completions/mean_length": ("mean length, tokens", "eval_mean_length"),
    "finished": ("finished share", "eval_finished"),
    "grad_norm": ("gradient norm", None),
    "advantage_std": (f"sd of advantages, {UNIT}", None),
}


@style()
def policy_curves(logs: Logs, title: str) -> Figure:
    """Show training by step: the mean over an arm's seeds, each seed thin, their range shaded.

    Lines are moving averages but for the baseline, which is one; dots are held-out means over the
    seeds. SFT is the held-out measurement at step 0, shaded its 95% interval over prompts; where
    the arms measure it in rewards of their own, it has their colours. Of a run that is shown alone
    each step is a faint point, and the baseline is drawn beside its reward, too.
    """
    fig, *axes = look.panels(3, 3, 7.6, title)
    axes.pop(1).remove()  # the first panel is two wide
    axes[0].set_subplotspec(axes[0].get_gridspec()[0, :2])
    arms = _with_rows(logs)
    alone = sum(map(len, arms.values())) == 1
    for ax, (column, (label, held_out)) in zip(axes, CURVES.items(), strict=True):
        if held_out:
            _sft_level(ax, arms, held_out)
        for place, (arm, frames) in enumerate(arms.items()):
            name, color = arm_look(arm, place)
            for values in _by_step(frames, column) if alone and column != "baseline" else []:
                ax.plot(values.index, values, ".", ms=5, color=color, alpha=0.35)
            _lines(ax, _by_step(frames, column, smooth=column != "baseline"), color, name)
            if held_out:
                _dots(ax, frames, held_out, color)
        ax.set_title(label, fontsize=9)
        ax.set_xlabel("optimiser step" if ax in axes[5:] else "")
    if alone:
        ((log,),) = arms.values()
        axes[0].plot(*look.measured(log, "baseline"), color=look.DARK, ls=":", label="baseline")
        axes[0].plot([], [], ".", ms=5, color=look.GREY, label="one step")
    axes[0].plot([], [], "o", ms=5, color=look.DARK, label="held-out")
    axes[0].plot([], [], color=look.GREY, ls="--", label="SFT (shaded: 95% interval)")
    look.legend_below(fig, axes[0])
    return fig


@style()
def baselines_figure(logs: Logs, title: str) -> Figure:
    """Compare arms that differ in the baseline: held-out reward, spread of advantages, gradient.

    Means over seeds as in `policy_curves`; the held-out reward is no moving average.
    """
    fig, *axes = look.panels(1, 3, 3.3, title)
    arms = _with_rows(logs)
    _sft_level(axes[0], arms, "eval_reward")
    titles = {"eval_reward": f"held-out reward, {UNIT}"}
    titles |= {column: CURVES[column][0] for column in ("advantage_std", "grad_norm")}
    for ax, (column, label) in zip(axes, titles.items(), strict=True):
        for place, (arm, frames) in enumerate(arms.items()):
            name, color = arm_look(arm, place)
            seeds = _by_step(frames, column, smooth=column != "eval_reward")
            _lines(ax, seeds, color, BASELINES.get(arm, name))
            if column == "eval_reward":
                _dots(ax, frames, column, color)
        ax.set_title(label, fontsize=9)
        ax.set_xlabel("optimiser step")
    axes[0].plot([], [], color=look.GREY, ls="--", label="SFT (shaded: 95% interval)")
    look.legend_below(fig, axes[0], 4)
    return fig


@style()
def frontier(
    table: pd.DataFrame, best_of_n: pd.DataFrame, averages: pd.DataFrame, title: str
) -> Figure:
    """Show what each arm gains per KL, by its own reward model and the judge.

    Both are gains over SFT on the same prompts, since the curves are measured on the validation
    prompts and best of n on the test prompts.

    Args:
        table: of `frontier_table`; a panel per arm, means over seeds, thin each seed.
        best_of_n: of `best_of_n_table`; shown where the arm's reward model picks.
        averages: of `average_table`, those of several seeds; their gain is over what the arm's runs
            have at step 0.
        title: of the figure.
    """
    start = table[table["step"] == 0].set_index(["arm", "seed"])[["reward", "judge"]]
    from_sft = start.loc[pd.MultiIndex.from_frame(table[["arm", "seed"]])].to_numpy()
    table = table.assign(**(table[["reward", "judge"]] - from_sft))
    sft = start.groupby("arm").mean()  # the same prompts and dice for all of an arm's seeds
    averages = averages[averages["arm"].isin(sft.index) & (averages["seeds"] > 1)]
    from_sft = sft.loc[averages["arm"]].to_numpy()
    averages = averages.assign(**(averages[["reward", "judge"]] - from_sft))
    arms = [(arm, table[table["arm"] == arm]) for arm in in_order(table["arm"])]
    columns = 2 if len(arms) == 4 else min(3, len(arms))
    rows = math.ceil(len(arms) / columns)
    fig, *axes = look.panels(rows, columns, 1.2 + 2.5 * rows, title, sharex=True, sharey=True)
    for place, (ax, (arm, runs)) in enumerate(zip(axes, arms, strict=False)):
        label, color = arm_look(arm, place)
        _frontier_lines(ax, runs, color)
        _best_of_n(ax, best_of_n[best_of_n["proxy"] == arm.partition("_")[0]])
        average = averages[averages["arm"] == arm].sort_values("sqrt_kl")
        for column, ls, face in (("reward", "-", look.DARK), ("judge", "--", "white")):
            style = {"color": look.DARK, "ls": ls, "lw": 1, "marker": "^", "mfc": face}
            ax.plot(average["sqrt_kl"], average[column], ms=5, **style)
        ax.set_title(label, fontsize=9)
        ax.tick_params(labelbottom=place + columns >= len(arms))
        ax.set_xlabel("√KL to SFT, KL in nats" if place + columns >= len(arms) else "")
    for ax in axes[len(arms) :]:
        ax.set_visible(False)
    for ls, marker, name in (("-", "o", "own reward model"), ("--", "s", "judge")):
        axes[0].plot([], [], ls=ls, marker=marker, ms=4, color=look.DARK, label=name)
    if len(averages):
        text = "average of the seeds, scaled (hollow: judge)"
        axes[0].plot([], [], "^-", ms=5, lw=1, color=look.DARK, label=text)
    for face, name in ((look.GREY, "own reward model"), ("white", "judge")):
        if len(best_of_n):
            text = f"best of n SFT samples, {name}"
            axes[0].plot([], [], "D", ms=5, color=look.GREY, markerfacecolor=face, label=text)
    fig.supylabel(f"gain over SFT, {SFT_SD}", fontsize=10)
    look.legend_below(fig, axes[0])
    return fig


def _frontier_lines(ax: Axes, runs: pd.DataFrame, color: str) -> None:
    if runs["seed"].nunique() > 1:
        for _, run in runs.groupby("seed"):
            for column, ls in (("reward", "-"), ("judge", "--")):
                ax.plot(run["sqrt_kl"], run[column], ls=ls, color=color, lw=0.7, alpha=0.6)
    steps = runs.groupby("step")
    mean = steps[["sqrt_kl", "reward", "judge"]].mean()[steps.size() == runs["seed"].nunique()]
    x = mean["sqrt_kl"]
    ax.fill_between(x, mean["reward"], mean["judge"], color=color, alpha=0.12, lw=0)
    ax.plot(x, mean["reward"], "o-", color=color, lw=2, ms=4)
    ax.plot(x, mean["judge"], "s--", color=color, lw=2, ms=4)


def _best_of_n(ax: Axes, picks: pd.DataFrame) -> None:
    picks = picks.sort_values("sqrt_kl")
    for name, face in (("reward_gain", look.GREY), ("judge_gain", "white")):
        value, low, high = picks[ends(name)].to_numpy(float).T
        ax.vlines(picks["sqrt_kl"], low, high, color=look.GREY, lw=1.2)
        ax.plot(picks["sqrt_kl"], value, "D", ms=5, color=look.GREY, mfc=face, zorder=3)


def _with_rows(logs: Logs) -> dict[str, list[pd.DataFrame]]:
    """Drop arms without a run, and add the share of completions that ended by themselves."""
    arms = {arm: [log for log in own.values() if len(log)] for arm, own in logs.items()}
    return {
        arm: [f.assign(finished=1 - f["completions/clipped_ratio"]) for f in frames]
        for arm, frames in arms.items()
        if frames
    }


def _by_step(frames: Sequence[pd.DataFrame], column: str, smooth: bool = False) -> list[pd.Series]:
    """Return a column by step for each seed in which it was measured."""
    found = [frame.set_index("step")[column].dropna() for frame in frames if column in frame]
    found = [values for values in found if len(values)]
    if smooth:
        found = [look.moving_average(values) for values in found]
    return found


def _lines(ax: Axes, seeds: Sequence[pd.Series], color: str, label: str) -> None:
    if not seeds:
        return
    table = pd.concat(seeds, axis=1, join="inner")
    if len(seeds) > 1:
        for values in seeds:
            ax.plot(values.index, values, color=color, lw=0.7, alpha=0.6)
        span = table.min(axis=1), table.max(axis=1)
        ax.fill_between(table.index, *span, color=color, alpha=0.15, lw=0)
    ax.plot(table.index, table.mean(axis=1), color=color, lw=2, label=label)


def _dots(ax: Axes, frames: Sequence[pd.DataFrame], column: str, color: str) -> None:
    if seeds := _by_step(frames, column):
        mean = pd.concat(seeds, axis=1, join="inner").mean(axis=1)
        ax.plot(mean.index, mean, "o", ms=6, color=color, mec="white", zorder=3)


def _sft_level(ax: Axes, arms: Mapping[str, Sequence[pd.DataFrame]], column: str) -> None:
    """Draw what was measured at step 0: grey if all arms agree, else in the arms' colours."""
    levels: dict[tuple[float, ...], str] = {}
    for place, (arm, frames) in enumerate(arms.items()):
        start = frames[0][frames[0]["step"] == 0].reindex(columns=ends(column))
        for value, low, high in start.to_numpy(float):
            if not np.isnan(value):
                span = (value, value) if np.isnan(low) else (low, high)
                levels.setdefault((value, *span), arm_look(arm, place)[1])
    for (value, low, high), own in levels.items():
        color = look.GREY if len(levels) == 1 else own
        ax.axhspan(low, high, color=color, alpha=0.15, lw=0)
        ax.axhline(value, color=color, ls="--", lw=1.2)
