"""Figures of the reward study: what they draw, and that they do with one arm or missing values."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from utils.plots import rewards as reward_plots
from utils.plots import style as look


def curve(shift: float = 0.0) -> pd.DataFrame:
    frame = pd.DataFrame({"confidence": [0.55, 0.7, 0.9], "accuracy": [0.5, 0.72, 0.95]})
    frame["accuracy"] -= shift
    return frame.assign(low=frame["accuracy"] - 0.1, high=frame["accuracy"] + 0.04, n=10)


def arms(*names: str) -> pd.DataFrame:
    frame = pd.DataFrame({"arm": names, "kind": "scalar"})
    for place, column in enumerate(("accuracy", "model_pairs")):
        frame[column] = 0.75 - 0.05 * place + 0.01 * frame.index
        frame[f"{column}_low"], frame[f"{column}_high"] = frame[column] - 0.03, frame[column] + 0.02
    return frame


def growth(*kinds: str) -> pd.DataFrame:
    rows = [(kind, n, 0.6 + n / 1e4) for kind in kinds for n in (400, 40, 100)]
    frame = pd.DataFrame(rows, columns=["kind", "prompts", "value"])
    low, high = frame["value"] - 0.02, frame["value"] + 0.03
    return frame.assign(low=low, high=high, pairs="all pairs")


def shares(*series: str) -> pd.DataFrame:
    rows = [
        (name, probe, 0.4 + 0.1 * i, 0.2, 0.8)
        for i, name in enumerate(series)
        for probe in ("longer", "with_a_list")
    ]
    return pd.DataFrame(rows, columns=["series", "probe", "value", "low", "high"])


def errors(*names: str) -> dict[str, float]:
    return dict.fromkeys(names, 0.1234)


def ratings() -> pd.DataFrame:
    rows = [(1, 4.4, 4.2, 4.7, 1.6, 301), (2, 5.1, 4.7, 5.4, 1.7, 133), (9, 7.6, 7.4, 7.8, 0.5, 48)]
    return pd.DataFrame(rows, columns=["rating", "expected", "low", "high", "sd", "n"])


RULE = (0.78, 0.7)
FIGURES: dict[str, Callable[[], Figure]] = {
    "reliability_curves": lambda: reward_plots.reliability_curves({"a": curve()}, "t", errors("a")),
    "arm_accuracies": lambda: reward_plots.arm_accuracies(arms("bt"), "t", RULE),
    "learning_curve": lambda: reward_plots.learning_curve(growth("scalar"), "t"),
    "share_bars": lambda: reward_plots.share_bars(shares("a"), "probe", "t", "share"),
    "rating_calibration_curve": lambda: reward_plots.rating_calibration_curve(ratings(), "t"),
}


def dots(ax: Axes) -> list[np.ndarray]:
    """Return the points of each set of dots."""
    return [line.get_xydata() for line in ax.lines if line.get_marker() == "o"]


def bars(ax: Axes) -> list[list[np.ndarray]]:
    """Return the segments of each set of intervals."""
    return [c.get_segments() for c in ax.collections if isinstance(c, LineCollection)]


def dashed(ax: Axes) -> list[list[float]]:
    return [list(line.get_xdata()) for line in ax.lines if line.get_linestyle() == "--"]


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
    assert figure.get_supxlabel() or figure.axes[0].get_xlabel()


def test_every_figure_is_tested():
    module = reward_plots.__name__
    made = {n for n, f in vars(reward_plots).items() if getattr(f, "__module__", "") == module}
    assert {name for name in made if not name.startswith("_")} == set(FIGURES)


def test_accuracy_is_drawn_against_confidence():
    curves = {"margin": curve(), "plackett_luce": curve(0.2)}
    figure = reward_plots.reliability_curves(curves, "t", errors(*curves))
    for ax, table in zip(figure.axes, curves.values(), strict=True):
        (points,) = dots(ax)
        assert points == pytest.approx(table[["confidence", "accuracy"]].to_numpy())
        (segments,) = bars(ax)
        assert segments[1] == pytest.approx(
            np.array([[0.7, table["low"][1]], [0.7, table["high"][1]]])
        )
        (diagonal,) = (line for line in ax.lines if line.get_linestyle() == "--")
        assert diagonal.get_xydata().tolist() == [[0.5, 0.5], [1, 1]]
    titles = [ax.get_title("left") for ax in figure.axes]
    assert titles == [f"{name}\nECE 0.123" for name in ("margin", "plackett luce")]


def test_each_arm_has_a_line_in_both_panels():
    table = arms("bt", "plackett_luce", "margin")
    figure = reward_plots.arm_accuracies(table, "t", RULE)
    assert [ax.get_title("left") for ax in figure.axes] == ["all pairs", "pairs of two samples"]
    for ax, column, rule in zip(figure.axes, ("accuracy", "model_pairs"), RULE, strict=True):
        (points,) = dots(ax)
        assert points == pytest.approx(np.column_stack([table[column], range(3)]))
        (segments,) = bars(ax)
        ends = np.array([[table[f"{column}_low"][2], 2], [table[f"{column}_high"][2], 2]])
        assert segments[2] == pytest.approx(ends)
        assert dashed(ax) == [[rule, rule]]
        assert ax.yaxis_inverted()
    assert rows_named(figure.axes[0]) == ["bt", "plackett luce", "margin"]
    assert legend(figure) == ["scalar", "best rule that reads only the text"]


def test_accuracy_grows_from_left_to_right():
    figure = reward_plots.learning_curve(growth("scalar", "ordinal"), "t")
    (ax,) = figure.axes
    joined = [line for line in ax.lines if line.get_marker() in ("", "None")]
    assert [line.get_color() for line in joined] == [look.BLUE, look.ORANGE]
    for line, points in zip(joined, dots(ax), strict=True):
        assert line.get_xydata() == pytest.approx(points)
        assert points[:, 0] == pytest.approx([40, 100, 400], rel=0.02)
        assert points[:, 1] == pytest.approx([0.604, 0.61, 0.64])
    assert (dots(ax)[0][:, 0] < dots(ax)[1][:, 0]).all(), "one kind hides the other"


def test_shares_of_several_models_lie_side_by_side():
    figure = reward_plots.share_bars(shares("margin", "pairwise"), "probe", "t", "share")
    (ax,) = figure.axes
    first, second = dots(ax)
    assert first[:, 0].tolist() == pytest.approx([0.4, 0.4])
    assert second[:, 0].tolist() == pytest.approx([0.5, 0.5])
    assert rows_named(ax) == ["longer", "with a list"]
    assert dashed(ax) == [[0.5, 0.5]]
    assert legend(figure) == ["margin", "pairwise"]


def test_expected_rating_against_the_given_one():
    figure = reward_plots.rating_calibration_curve(ratings(), "t")
    (ax,) = figure.axes
    assert dots(ax)[0].tolist() == [[1, 4.4], [2, 5.1], [9, 7.6]]
    assert bars(ax)[0][2].tolist() == [[9, 7.4], [9, 7.8]]
    assert dashed(ax) == [[1, 10]]
