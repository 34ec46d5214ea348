"""Figures from tables, and how figures and tables are saved and shown."""

from utils.plots.policies import (
    category_figure,
    length_figure,
    policy_bars,
    seeds_figure,
    win_bars,
)
from utils.plots.readings import readings_figure, with_intervals
from utils.plots.report import (
    bandit_curves,
    category_overview,
    comparison_curves,
    paired_differences,
    rating_distributions,
    rating_histograms,
    reward_histograms,
    reward_training,
)
from utils.plots.rewards import (
    arm_accuracies,
    learning_curve,
    rating_calibration_curve,
    reliability_curves,
    share_bars,
)
from utils.plots.style import save_figure, save_table
from utils.plots.training import baselines_figure, frontier, policy_curves

__all__ = [
    "arm_accuracies",
    "bandit_curves",
    "baselines_figure",
    "category_figure",
    "category_overview",
    "comparison_curves",
    "frontier",
    "learning_curve",
    "length_figure",
    "paired_differences",
    "policy_bars",
    "policy_curves",
    "rating_calibration_curve",
    "rating_distributions",
    "rating_histograms",
    "readings_figure",
    "reliability_curves",
    "reward_histograms",
    "reward_training",
    "save_figure",
    "save_table",
    "seeds_figure",
    "share_bars",
    "win_bars",
    "with_intervals",
]
