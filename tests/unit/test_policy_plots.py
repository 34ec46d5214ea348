"""Figures of the policy study: what they draw, and that they do with few arms or missing values."""

from __future__ import annotations

import math
from collections.abc import Callable

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils.arms.policies import ARMS
from utils.plots import policies as policy_plots
from utils.plots import style as look
from utils.plots import training


def metrics(shift: float = 0.0, steps: int = 16, start: float = 0.1) -> pd.DataFrame:
    """Return rows as a training run logs them; every value of a column is linear in the step."""
    step = np.arange(steps + 1.0)
    names = "reward baseline kl entropy grad_norm advantage_std completions/mean_length"
    slopes = {name: place + 1.0 for place, name in enumerate(names.split())}
    frame = pd.DataFrame({"step": step} | {n: s * step + shift for n, s in slopes.items()})
    frame["completions/clipped_ratio"] = 0.25
    frame.loc[0, frame.columns[1:]] = math.nan
    held_out = {"eval_reward": start + step + shift * (step > 0), "eval_kl": 0.5 * step}
    held_out |= {"eval_mean_length": 70 - step, "eval_finished": 0.5 + step / 100}
    for name, values in held_out.items():
        frame[name] = np.where(step % 8 == 0, values, math.nan)
    return frame.assign(
        eval_reward_low=frame["eval_reward"] - 0.3, eval_reward_high=frame["eval_reward"] + 0.2
    )


def logs(**arms: list[pd.DataFrame]) -> dict[str, dict[int, pd.DataFrame]]:
    return {arm: dict(enumerate(own)) for arm, own in arms.items()}


def curve(*arms: str, seeds: int = 1) -> pd.DataFrame:
    """Return rows of `frontier_table`: the reward grows from 0.2, the judge from 0.1 and falls."""
    points = [(0, 0.0, 0.2, 0.1), (8, 1.0, 0.8, 0.5), (16, 2.0, 1.2, 0.3)]
    rows = [
        (arm, seed, step, kl**2, kl, reward + 0.1 * seed * (step > 0), judge)
        for arm in arms
        for seed in range(seeds)
        for step, kl, reward, judge in points
    ]
    return pd.DataFrame(rows, columns=["arm", "seed", "step", "kl", "sqrt_kl", "reward", "judge"])


def picks() -> pd.DataFrame:
    rows = [("scalar", 4, 0.8, 0.6, 0.3), ("scalar", 2, 0.4, 0.4, 0.2), ("ordinal", 2, 0.4, 9, 8)]
    frame = pd.DataFrame(rows, columns=["proxy", "n", "sqrt_kl", "reward_gain", "judge_gain"])
    frame["reward"] = frame["judge"] = 77.0  # gains are drawn, not levels
    for name in ("reward_gain", "judge_gain"):
        frame[f"{name}_low"], frame[f"{name}_high"] = frame[name] - 0.1, frame[name] + 0.05
    return frame


def averages(*arms: str) -> pd.DataFrame:
    """Return rows of `average_table`, of scale 1 above 0.5, and of a seed that is scaled."""
    points = (3, 1.0, 2.0, 1.8, 1.1), (3, 0.5, 1.0, 1.2, 0.7), (1, 0.5, 9.0, 9.0, 9.0)
    rows = [(arm, *point) for arm in arms for point in points]
    return pd.DataFrame(rows, columns=["arm", "seeds", "scale", "sqrt_kl", "reward", "judge"])


def policies(*names: str) -> pd.DataFrame:
    """Return rows of `policy_table`; the first gain's interval holds 0."""
    frame = pd.DataFrame({"policy": names})
    frame["group"] = [
        "arm" if name in ARMS else "average" if name.endswith("average") else "control"
        for name in names
    ]
    for place, reward in enumerate(("scalar", "ordinal", "judge")):
        gain = 0.1 + place + frame.index / 2
        frame[f"gain_{reward}"] = gain
        frame[f"gain_{reward}_low"] = gain - 0.2 - place
        frame[f"gain_{reward}_high"] = gain + 0.3
    for ending, win in {"": 0.5, "_best": 0.4}.items():
        frame[f"win{ending}"], frame[f"tie{ending}"] = win + frame.index / 100, 0.2
        frame[f"loss{ending}"] = 0.8 - frame[f"win{ending}"]
        rate = frame[f"win{ending}"] + 0.1
        frame[f"win_rate{ending}"] = rate
        frame[f"win_rate{ending}_low"], frame[f"win_rate{ending}_high"] = rate - 0.05, rate + 0.04
    return frame


def seeds(**arms: list[float]) -> pd.DataFrame:
    rows = [(arm, seed, gain) for arm, own in arms.items() for seed, gain in enumerate(own)]
    frame = pd.DataFrame(rows, columns=["policy", "seed", "gain_judge"])
    low, high = frame["gain_judge"] - 0.1, frame["gain_judge"] + 0.2
    return frame.assign(gain_judge_low=low, gain_judge_high=high)


def lengths(*names: str) -> pd.DataFrame:
    rows = [
        (policy, reward, method, value + 5 * (reward == "own") + place)
        for place, policy in enumerate(names)
        for reward in ("judge", "own")
        for value, method in enumerate(policy_plots.METHODS)
    ]
    frame = pd.DataFrame(rows, columns=["policy", "reward", "method", "value"])
    return frame.assign(low=frame["value"] - 0.2, high=frame["value"] + 0.1)


def fits(*names: str) -> pd.DataFrame:
    rows = [
        (policy, reward, 0.5 + (reward == "own"), -0.2)
        for policy in names
        for reward in ("own", "judge")
    ]
    return pd.DataFrame(rows, columns=["policy", "reward", "unchanged", "per_10_tokens"])


def frames() -> dict[str, pd.DataFrame]:
    def rows(length: list[int], finished: list[bool], judge: list[float]) -> pd.DataFrame:
        return pd.DataFrame({"length": length, "finished": finished, "reward_judge": judge})

    return {
        "sft": rows([50, 60], [True, False], [0.0, 1.0]),
        "scalar_s0": rows([40, 30], [True, True], [1.0, 3.0]),
        "scalar_s1": rows([55, 20], [True, False], [0.5, 1.5]),
        "ordinal_s0": rows([50, 60], [False, False], [1.0, 1.0]),
        "sft_best": rows([50, 60], [True, False], [0.0, 1.0]),
    }


def categories(*names: str) -> pd.DataFrame:
    rows = [
        (policy, category, value + place, n)
        for place, policy in enumerate(names)
        for category, value, n in (("write", 0.9, 14), ("open_qa", 0.1, 8))
    ]
    frame = pd.DataFrame(rows, columns=["policy", "category", "value", "n"])
    return frame.assign(low=frame["value"] - 0.3, high=frame["value"] + 0.2)


FIGURES: dict[str, Callable[[], Figure]] = {
    "policy_curves": lambda: training.policy_curves(logs(scalar=[metrics()]), "t"),
    "baselines_figure": lambda: training.baselines_figure(logs(scalar=[metrics()]), "t"),
    "frontier": lambda: training.frontier(curve("scalar"), picks(), averages("scalar"), "t"),
    "policy_bars": lambda: policy_plots.policy_bars(policies("scalar"), "judge", "t"),
    "win_bars": lambda: policy_plots.win_bars(policies("scalar"), "t"),
    "length_figure": lambda: policy_plots.length_figure(
        lengths("scalar"), fits("scalar"), frames(), "t"
    ),
    "category_figure": lambda: policy_plots.category_figure(categories("scalar"), "t"),
    "seeds_figure": lambda: policy_plots.seeds_figure(seeds(scalar=[1]), policies("scalar"), "t"),
}


def lines(ax: Axes, marker: str = "o") -> list[Line2D]:
    """Return the lines with a marker, but for those that only make an entry in the legend."""
    return [line for line in ax.lines if line.get_marker() == marker and len(line.get_xdata())]


def points(ax: Axes, marker: str = "o") -> list[tuple[float, float]]:
    return [tuple(point) for line in lines(ax, marker) for point in line.get_xydata()]


def spans(ax: Axes) -> list[list[float]]:
    """Return the ends of the horizontal intervals, from the top."""
    flat = [line for line in ax.lines if len(set(line.get_ydata())) == 1 != len(line.get_xdata())]
    return [list(line.get_xdata()) for line in flat]


def thick(ax: Axes, style: str = "-") -> list[Line2D]:
    return [
        line for line in ax.lines if line.get_linewidth() == 2 and line.get_linestyle() == style
    ]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for box in figure.legends for text in box.get_texts()]


def rows_named(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_yticklabels()]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_and_names_its_axes(name: str):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    assert figure.get_figwidth() == look.WIDTH
    assert figure.get_suptitle() == "t"
    bottom = [ax for ax in figure.axes if ax.get_subplotspec().is_last_row()]
    assert all(ax.get_xlabel() for ax in bottom)
    assert "" not in legend(figure)
    assert all(len(box.get_texts()) for box in figure.legends)


def test_every_figure_is_tested():
    made = {
        name
        for module in (policy_plots, training)
        for name, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
    }
    assert made == set(FIGURES)


def test_curves_are_means_of_the_seeds_with_their_range():
    figure = training.policy_curves(logs(scalar=[metrics(0), metrics(1), metrics(5)]), "t")
    by_title = {ax.get_title("left"): ax for ax in figure.axes}
    baseline = by_title["baseline, SFT sd"]
    (mean,) = thick(baseline)
    assert mean.get_ydata()[:3] == pytest.approx(2 * np.arange(1, 4) + 2)  # 2, not the median 1
    assert [list(line.get_ydata()[:1]) for line in baseline.lines[:3]] == [[2], [3], [7]]
    (band,) = baseline.collections
    edge = band.get_paths()[0].vertices
    at_end = edge[edge[:, 0] == 16][:, 1]
    assert [at_end.min(), at_end.max()] == [32, 37]
    finished = by_title["finished share"]
    assert set(thick(finished)[0].get_ydata()) == {0.75}  # not the clipped share
    assert points(finished) == [(0, 0.5), (8, pytest.approx(0.58)), (16, pytest.approx(0.66))]


def test_baselines_side_by_side():
    runs = logs(scalar=[metrics(), metrics(2)], scalar_ema=[metrics(3)], scalar_none=[])
    figure = training.baselines_figure(runs, "t")
    titles = ["held-out reward, SFT sd", "sd of advantages, SFT sd", "gradient norm"]
    assert [ax.get_title("left") for ax in figure.axes] == titles
    first, second = thick(figure.axes[0])
    assert first.get_xydata() == pytest.approx(np.array([[0, 0.1], [8, 9.1], [16, 17.1]]))
    assert second.get_ydata() == pytest.approx([0.1, 11.1, 19.1])
    assert legend(figure) == ["running mean", "EMA", "SFT (shaded: 95% interval)"]


def test_the_frontier_starts_at_sft():
    shown = averages("scalar", "ordinal")
    figure = training.frontier(curve("scalar", seeds=3), picks(), shown, "t")
    (ax,) = figure.axes
    (own,), (judge,) = thick(ax), thick(ax, "--")
    assert own.get_xydata() == pytest.approx(np.array([[0, 0], [1, 0.7], [2, 1.1]]))
    assert judge.get_xydata() == pytest.approx(np.array([[0, 0], [1, 0.4], [2, 0.2]]))
    picked, _ = lines(ax, "D")
    assert picked.get_xydata() == pytest.approx(np.array([[0.4, 0.4], [0.8, 0.6]])), "of its own"
    average, _ = lines(ax, "^")  # above what SFT has at step 0, by KL
    assert average.get_xydata() == pytest.approx(np.array([[1, 1.0], [2, 1.6]]))


def test_a_gain_whose_interval_holds_zero_is_hollow():
    table = policies("scalar", "ordinal")
    (ax,) = policy_plots.policy_bars(table, "scalar", "t").axes
    assert [line.get_markerfacecolor() for line in lines(ax)] == ["white", look.ORANGE]
    assert spans(ax) == [pytest.approx([-0.1, 0.4]), pytest.approx([0.4, 0.9])]
    assert rows_named(ax) == ["aligned", ARMS["scalar"].label, ARMS["ordinal"].label]


def test_wins_ties_and_losses_fill_the_bar():
    table = policies("sft", "scalar", "sft_best")
    figure = policy_plots.win_bars(table, "t")
    for ax, ending, shown in zip(figure.axes, ("", "_best"), ([1, 2], [1]), strict=True):
        assert [box.datavalues.tolist() for box in ax.containers] == [
            pytest.approx((table[f"{name}{ending}"][shown] * 100).tolist())
            for name in ("win", "tie", "loss")
        ]
        right = [box.get_x() + box.get_width() for box in ax.containers[2]]
        assert right == pytest.approx([100] * len(shown))
        rates = [x for x, _ in points(ax) if x > 0]
        assert rates == pytest.approx((table[f"win_rate{ending}"][shown] * 100).tolist())
        assert [50, 50] in [list(line.get_xdata()) for line in ax.lines]


def test_categories_side_by_side():
    figure = policy_plots.category_figure(categories("ordinal", "scalar"), "t")
    (ax,) = figure.axes
    assert rows_named(ax) == ["open qa, n = 8", "write, n = 14"]
    assert [x for x, _ in points(ax)] == [1.9, 1.1, 0.9, 0.1]  # scalar comes first
    assert legend(figure) == [ARMS["scalar"].label, ARMS["ordinal"].label]


def test_seeds_lie_below_their_arm():
    table = policies("ordinal", "scalar", "scalar_none", "sft")
    figure = policy_plots.seeds_figure(seeds(scalar=[2.0, 3.0], ordinal=[1.5]), table, "t")
    (ax,) = figure.axes
    assert rows_named(ax) == [ARMS["scalar"].label, ARMS["ordinal"].label]
    gains = table.set_index("policy")["gain_judge"]
    (scalar, above), (ordinal, _) = points(ax)
    assert [scalar, ordinal] == [gains["scalar"], gains["ordinal"]]
    found = points(ax, "s")
    assert [x for x, _ in found] == [2, 3, 1.5]
    assert above < found[0][1] < found[1][1] < 0.5 < found[2][1] < 1.5
    assert spans(ax)[1] == pytest.approx([1.9, 2.2])
    assert legend(figure) == ["all seeds", "one seed"]
