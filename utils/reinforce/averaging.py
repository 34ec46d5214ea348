"""One policy from several seeds: the mean of what they learned, times a scale.

What a seed learned is what the reward asks for and what the noise of its samples made of it. Seeds
share the first and not the second, so that their mean may have the same gain at less KL; a scale
above one spends what was saved (Wortsman et al. 2022, arXiv 2203.05482; for aligned policies Rame
et al. 2024, arXiv 2406.16768).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel

from utils.reinforce.checkpoints import load_adapter

NAME = "average"  # of the adapter


def average_adapters(policy: PeftModel, directories: Sequence[Path], scale: float) -> None:
    """Make `scale` times the mean update of trained runs the active adapter of a policy.

    The updates s B A are averaged, not their factors, which have no common basis: the adapter's
    rank is the sum of theirs.

    Args:
        policy: the SFT model with an adapter like those of the runs.
        directories: of the runs, with checkpoints.
        scale: 0 is the SFT model, 1 the mean.

    Raises:
        ResultsError: if a run has no checkpoint that can be read.
    """
    names = [directory.name for directory in directories]
    for name, directory in zip(names, directories, strict=True):
        policy.add_adapter(name, policy.peft_config["default"])
        load_adapter(directory, policy, name)
    weights = [scale / len(names)] * len(names)
    policy.add_weighted_adapter(names, weights, NAME, combination_type="cat")
    policy.set_adapter(NAME)
