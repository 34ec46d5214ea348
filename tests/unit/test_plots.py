"""Figures on small made-up tables: they draw, survive unmeasured cells, and save byte for byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from utils.config import PROFILES
from utils.plots import report as plots
from utils.plots import style as plot_style

SMOKE = PROFILES["smoke"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(plot_style, "runs_dir", lambda profile: tmp_path / profile.name)
    return tmp_path / "smoke"


def responses() -> pd.DataFrame:
    rows = [
        (category, batch, temperature, rating, source, 10 * rating)
        for category in ("advice", "open_qa")
        for batch, temperature, rating, source in (
            *((1, 0.3, 4, "model"), (1, 1.0, 1, "model"), (2, 0.3, 5, "model")),
            (2, math.nan, 10, "reference"),
        )
    ]
    return pd.DataFrame(
        rows, columns=["category", "batch", "temperature", "rating", "source", "n_words"]
    )


def reward_metrics() -> pd.DataFrame:
    return pd.DataFrame({"step": [1, 2, 3], "loss": [0.9, 0.7, 0.5], "accuracy": [0.5, 0.6, 0.8]})


def differences(*names: str) -> pd.DataFrame:
    return pd.DataFrame({"policy": names, "difference": 0.5, "low": [-0.1, 0.2], "high": 0.9})


def band() -> pd.DataFrame:
    return pd.DataFrame({"step": [0, 4], "mean": [0.1, 0.4], "low": [0.0, 0.2], "high": [0.2, 0.6]})


FIGURES: dict[str, Callable[[], Figure]] = {
    "rating_histograms": lambda: plots.rating_histograms(responses()),
    "category_overview": lambda: plots.category_overview(responses()),
    "reward_training": lambda: plots.reward_training(reward_metrics(), "t", constant=0.7985),
    "reward_histograms": lambda: plots.reward_histograms([1.0, 2.0], [0.0, 1.0], "t"),
    "rating_distributions": lambda: plots.rating_distributions({"a": np.full(10, 0.1)}, "t"),
    "comparison_curves": lambda: plots.comparison_curves(
        {"align_scalar": band(), "sft": band()}, "t"
    ),
    "paired_differences": lambda: plots.paired_differences(
        differences("sft_best", "align_ordinal")
    ),
    "bandit_curves": lambda: plots.bandit_curves({"ema": [0.0, 0.5]}, 1.0, "t"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_and_names_its_axes(name: str):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    assert figure.get_figwidth() == 8
    assert figure.get_suptitle()
    labels = [figure.get_supxlabel(), *(ax.get_xlabel() for ax in figure.axes)]
    assert any(labels)


def test_every_figure_is_tested():
    public = {n for n, f in vars(plots).items() if getattr(f, "__module__", "") == plots.__name__}
    assert public == set(FIGURES)


def test_the_saved_figure_is_the_one_that_is_shown(folder: Path):
    seen = []
    for _ in range(2):
        shown = plot_style.save_figure(FIGURES["comparison_curves"](), SMOKE, "curves")
        seen.append((folder / "figures/curves.png").read_bytes())
        assert shown.data == seen[-1]
    assert seen[0] == seen[1], "the same figure has other bytes"
    assert seen[0].startswith(b"\x89PNG")
    assert [path.name for path in (folder / "figures").iterdir()] == ["curves.png"]


def test_tables_keep_a_named_index_only(folder: Path):
    frame = pd.DataFrame({"policy": ["a"], "gain": [1 / 3]})
    plot_style.save_table(frame, SMOKE, "gains")
    assert (folder / "tables/gains.csv").read_text() == "policy,gain\na,0.333333\n"
    plot_style.save_table(frame.set_index("policy"), SMOKE, "gains")
    assert (folder / "tables/gains.csv").read_text() == "policy,gain\na,0.333333\n"


def test_unmeasured_cells_are_left_out():
    frame = pd.DataFrame({"step": range(13), "loss": np.sin(np.arange(13.0)) + 2})
    frame["accuracy"] = np.where(frame["step"] % 4 == 0, 0.5, math.nan)
    frame.loc[0, "loss"] = math.nan
    left, right = plots.reward_training(frame, "t").axes
    assert list(right.lines[0].get_xdata()) == [0, 4, 8, 12]
    raw, mean = left.lines[:2]
    assert raw.get_xdata()[0] == 1
    assert np.isfinite(mean.get_ydata()).all()
    window = min(10, max(2, len(raw.get_ydata()) // 5))  # a fifth of the run, at most ten
    expected = np.mean(raw.get_ydata()[12 - window : 12])
    assert mean.get_ydata()[11] == pytest.approx(expected)


def test_the_reference_has_no_temperature():
    titles = [ax.get_title("left") for ax in plots.rating_histograms(responses()).axes]
    assert titles == [
        "temperature 0.3: mean 4.5, n = 4",
        "temperature 1.0: mean 1.0, n = 2",
        "reference: mean 10.0, n = 2",
    ]


def test_expected_rating_and_spread():
    two_peaks = np.zeros(10)
    two_peaks[[0, 9]] = 0.5
    figure = plots.rating_distributions({"torn": two_peaks}, "t")
    assert figure.axes[0].get_title("left") == "torn\nexpected 5.50, sd 4.50"


def test_an_interval_that_holds_zero_is_hollow():
    figure = FIGURES["paired_differences"]()
    faces = [x.get_markerfacecolor() for x in figure.axes[0].lines if x.get_marker() == "o"]
    assert faces == ["white", plot_style.COLORS["align_ordinal"]]
