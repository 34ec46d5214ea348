"""A copy of parts of the repository, to run the notebooks in without touching it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from utils.experiments.run import REPO


def copy_of_repository(target: Path, names: Iterable[str]) -> Path:
    """Make the folder `target` and copy these files and folders into it."""
    target.mkdir()
    for name in names:
        if (REPO / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPO / name, target / name, ignore=ignored)
        else:
            shutil.copy2(REPO / name, target / name)
    return target
