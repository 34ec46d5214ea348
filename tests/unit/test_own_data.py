"""The README's section on one's own data, followed literally in a copy of the repository."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from tests.copied import copy_of_repository
from utils.config import DataConfig
from utils.data.pairs import PreferenceData, load_data
from utils.experiments.run import REPO

pytestmark = pytest.mark.slow
COPIED = ("README.md", "Makefile", "pyproject.toml", "requirements-lock.txt")
COPIED += ("notebooks", "results", "utils")
PROMPTS = 40
TEXTS = (
    'Say "no", then\nsay why, in\r\ntwo lines; commas, too',
    "🙂 naïve café — 東京, 100%\t\\n {not} <b>markup</b> & $x_1$",
    "None",  # the words that a reader of CSV takes for a missing value
    "007",
)


def table() -> list[tuple[str, str, str]]:
    """Three ratings for each prompt, 0 to 4; every fifth prompt has a text twice, one has a gap."""
    rows = []
    for n in range(PROMPTS):
        prompt = f'Query {n}: "why", she asked,\nand {TEXTS[n % 2]}'
        texts = [TEXTS[n % 4], TEXTS[(n + 1) % 4], TEXTS[(n + (1 if n % 5 == 0 else 2)) % 4]]
        ratings = ["0", "1.5", "4"] if n % 2 else ["4", "2", "3"]
        rows += [(prompt, text, rating) for text, rating in zip(texts, ratings, strict=True)]
    prompt, text, _ = rows[3]
    rows[3] = (prompt, text, "")
    return rows


def steps(kind: str) -> list[str]:
    """Return the section's code blocks of a kind."""
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Your own data\n(.*?)(?=^## )", readme, re.M | re.S)
    assert section
    return re.findall(rf"^```{kind}\n(.*?)^```", section[1], re.M | re.S)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the repository, with a CSV as a spreadsheet saves it: a byte order mark and CRLF."""
    target = copy_of_repository(tmp_path_factory.mktemp("own") / "report", COPIED)
    (target / "own").mkdir()
    with open(target / "own" / "ratings.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("prompt", "response", "rating"), *table()])
    return target


def follow(copy: Path, command: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("REPORT_PROFILE", "PYTHONPATH")}
    done = subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def data(copy: Path) -> PreferenceData:
    """Convert the CSV as the section says, and write its profile."""
    (convert,) = steps("python")
    profile, _ = steps("sh")
    follow(copy, [sys.executable, "-c", convert])
    follow(copy, ["sh", "-c", profile.replace('"quick"', '"smoke"')])
    fields = json.loads((copy / "own" / "mine.json").read_text())
    assert fields.pop("profile") == "smoke"
    fields = {name.removeprefix("data."): value for name, value in fields.items()}
    return load_data(DataConfig(**{**fields, "path": str(copy / fields["path"])}))


@pytest.fixture(scope="module")
def outputs(copy: Path, data: PreferenceData) -> dict[str, str]:
    """Run the section's command with the interpreter of this test instead of a fresh .venv."""
    _, run = steps("sh")
    assert run.split() == ["make", "run", "PROFILE=own/mine.json"]
    # Makefile is a file that is there and needs nothing: so is, then, the installation's stamp.
    follow(copy, [*run.split(), f"BIN={sys.executable}", "STAMP=Makefile"])
    return {path.name[:2]: path.read_text() for path in executed(copy)}


def executed(copy: Path) -> list[Path]:
    return sorted((copy / "runs" / "mine" / "notebooks").glob("*.ipynb"))


def test_every_text_and_rating_arrives(data: PreferenceData):
    """But for the unrated response, and a text's second rating, which is dropped and counted."""
    first: dict[tuple[str, str], float] = {}
    for prompt, text, rating in table():
        if rating:
            first.setdefault((prompt, text), float(rating))
    arrived = {
        (group.prompt[-1]["content"], response.text): (response.rating - 1) * 4 / 9
        for group in data.groups
        for response in group.responses
    }
    assert len(arrived) == 3 * PROMPTS - 1 - PROMPTS // 5
    assert arrived == pytest.approx(first)
    assert data.dropped == {"identical texts": PROMPTS // 5}


def test_answers_that_are_numbers_stay_texts(tmp_path: Path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/ratings.csv").write_text("prompt,response,rating\n1+6,7,4\n1+6,007,1.5\n")
    (convert,) = steps("python")
    follow(tmp_path, [sys.executable, "-c", convert])
    (row,) = map(json.loads, (tmp_path / "own/ratings.jsonl").read_text().splitlines())
    rated = [{"response": "7", "rating": 4.0}, {"response": "007", "rating": 1.5}]
    assert row == {"prompt": "1+6", "responses": rated}


def test_the_run_is_of_this_data(copy: Path, outputs: dict[str, str], data: PreferenceData):
    assert list(outputs) == ["01", "02", "03", "04", "05", "06", "09"]
    assert not any(path.parent.name == "failed" for path in copy.glob("runs/mine/*/*.ipynb"))
    counts = pd.read_csv(copy / "runs/mine/tables/01_counts.csv").set_index("split")
    assert counts["prompts"].to_dict() == {"train": 8, "validation": 4, "test": 4}
    for split, prompts in counts["prompts"].items():
        groups = data.groups_of(split)[:prompts]
        ratings = [response.rating for group in groups for response in group.responses]
        assert counts.loc[split, "responses"] == len(ratings)
        assert counts.loc[split, "mean_rating"] == pytest.approx(sum(ratings) / len(ratings), 1e-4)
    folder = copy / "runs" / "mine"
    runs = {path.parent.relative_to(folder).as_posix() for path in folder.rglob("run.json")}
    for kind in ("scalar", "ordinal"):
        assert runs >= {f"{sort}/{kind}/seed0" for sort in ("reward_models", "policies")}
    assert "controls/sft/test" in runs
    assert (copy / "runs/mine/figures/06_curves.png").exists()
    published = [{path.name for path in (root / "results").iterdir()} for root in (copy, REPO)]
    assert published[0] == published[1], "nothing of one's own data is published"


def lines(path: Path) -> set[str]:
    cells = nbformat.read(path, as_version=4).cells
    streams = [out for cell in cells for out in cell.get("outputs", []) if "text" in out]
    return {line for out in streams for line in out.text.splitlines()}


def test_the_notebooks_say_what_the_data_lacks(copy: Path, outputs: dict[str, str]):
    """And no row of a table is without a number."""
    first, *_, last, study = executed(copy)
    assert study.name.startswith("09"), "it speaks of the embedded set, whatever the data"
    assert (
        "this set has no temperatures, no references, no names of what wrote a response, "
        "no categories, no responses that were cut off"
    ) in lines(first)
    assert "this set has no categories" in lines(first) & lines(last)
    for path in (copy / "runs/mine/tables").glob("*.csv"):
        frame = pd.read_csv(path)
        assert len(frame), f"{path.name} is empty"
        numbers = frame.select_dtypes("number")
        if numbers.empty:  # the settings are text
            continue
        assert not numbers.isna().all(axis=1).any(), f"{path.name} has a row without a number"
    panel = pd.read_csv(copy / "runs/mine/tables/06_panel.csv")
    assert len(panel) == 4, "one prompt of the test split was taken for all of a category"
