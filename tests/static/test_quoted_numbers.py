"""Numbers quoted in the READMEs and in the notebooks' prose stand in the tables that they name.

A comment after a paragraph, list or table names its files under results/:
`<!-- from: tables/06_policies.csv tables/06_length.csv -->`. What stands in backticks is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from utils.experiments.run import REPO

COMMENT = re.compile(r"<!-- from: ([^>]+) -->")
# A decimal number or a percentage; a sign counts where nothing stands before it.
NUMBER = re.compile(r"(?<![\w.])([+-]?)(\d*\.\d+|\d+(?=%))(%?)(?!\w)")
WITH_QUOTES = ["README.md", *(f"{name}.ipynb" for name in ("04_align_scalar", "06_compare"))]
WITH_QUOTES += ["09_reward_losses.ipynb"]


def prose() -> dict[str, str]:
    texts = {"README.md": (REPO / "README.md").read_text(encoding="utf-8")}
    for path in sorted((REPO / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        texts[path.name] = "\n\n".join(c.source for c in cells if c.cell_type == "markdown")
    return texts


def values(folder: Path, names: str) -> np.ndarray:
    tables = [pd.read_csv(folder / name) for name in names.split()]
    return np.concatenate([table.select_dtypes("number").to_numpy().ravel() for table in tables])


def stands_in(found: np.ndarray, sign: str, digits: str, percent: str) -> bool:
    """Tell whether a value rounds to this number; without a sign, whether its size does."""
    scaled = found * 100 if percent else found
    scaled = scaled if sign else np.abs(scaled)
    places = len(digits.partition(".")[2])
    return any(float(f"{value:.{places}f}") == float(sign + digits) for value in scaled)


def unfounded(text: str, folder: Path) -> Iterator[str]:
    """Yield the numbers before a comment, back to the empty line, that its files do not have."""
    for comment in COMMENT.finditer(text):
        block = text[: comment.start()].rstrip().rpartition("\n\n")[2]
        found = values(folder, comment[1])
        quoted = list(NUMBER.finditer(re.sub(r"`[^`]*`", "", block)))
        yield from (n[0] for n in quoted if not stands_in(found, *n.groups()))


@pytest.mark.parametrize("name", [*prose()])
def test_quoted_numbers_stand_in_the_tables(name: str):
    assert name not in WITH_QUOTES or COMMENT.search(prose()[name]), "it names no table"
    assert not [*unfounded(prose()[name], REPO / "results")]


def test_a_wrong_digit_is_found(tmp_path: Path):
    (tmp_path / "a.csv").write_text("policy,gain,low,high\nscalar,0.363,-0.17,0.5649\n")
    right = "None 9.99 here.\n\nIt gains .36 [-.17, .56], 36%; by .17 (`x_1.5`), 0.363.\n"
    comment = "<!-- from: a.csv -->"
    assert not [*unfounded(right + comment, tmp_path)]
    wrong = "- .35, +0.17, -0.36\n- 37%, .3630 and .57%\n\n"
    expected = [".35", "+0.17", "-0.36", "37%", ".57%"]
    assert [*unfounded(wrong + comment, tmp_path)] == expected
