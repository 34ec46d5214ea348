"""What both studies ask of a published run: that it is finished, and of the seed in its path."""

from __future__ import annotations

import re
from pathlib import Path

from utils.files import ResultsError, RunFolder

PROFILE = "cpu"  # the profile that the arms vary; their folders are below results/cpu


def finished_run(path: Path, seed: int | None = None) -> RunFolder:
    """Return the published run in a folder.

    Raises:
        ResultsError: if it is not finished, or has another seed than `seed`, that of its name.
    """
    run = RunFolder(path)
    info = run.info
    if info["status"] != "finished":
        raise ResultsError(
            f"{run.label} is not finished, its status is {info['status']!r}: let it finish and "
            "publish it again, or remove its folder"
        )
    if seed not in (None, info["seed"]):
        raise ResultsError(
            f"{run.label} was trained with seed {info['seed']}: name its folder after that "
            f"seed, or publish the run with seed {seed}"
        )
    return run


def seed_runs(results: Path, name: str) -> dict[int, RunFolder]:
    """Return the runs in the folders `seed<seed>` of results/cpu/<name>, by seed; maybe none.

    Args:
        results: the folder of published runs.
        name: of the arm's folder, such as `policies/scalar`.

    Raises:
        ResultsError: if a run is not finished, or has another seed than its name says.
    """
    paths = (results / PROFILE / name).glob("seed*")
    found = {int(m[1]): path for path in paths if (m := re.fullmatch(r"seed(\d+)", path.name))}
    return {seed: finished_run(path, seed) for seed, path in sorted(found.items())}
