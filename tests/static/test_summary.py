"""The headline numbers and the README's tables follow from the published runs."""

from __future__ import annotations

import pandas as pd
import pytest

from utils import front_page, published, summary
from utils.memory_plan import plan_table
from utils.profiles import PROFILES
from utils.results import ROOT, read_json


def test_summary_is_what_the_published_runs_give():
    assert read_json(summary.RESULTS / "summary.json") == summary.headline()


def test_readme_shows_the_published_numbers():
    text = (ROOT / "README.md").read_text()
    parts = front_page.render()
    assert text == front_page.fill(text, parts), "run `python -m utils.summary`"


def test_the_table_of_policies_has_the_blind_ratings_and_the_best_of_16():
    header, _, *rows = front_page.render()["policies"].split("\n")
    cells = {row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ") for row in rows}
    assert {len(row) for row in cells.values()} <= {len(header.strip("| ").split(" | "))}
    assert not [name for name in cells if "greedy" in name]
    blind = pd.read_csv(summary.RESULTS / "tables" / "06_blind_policies.csv").set_index("policy")
    best = cells["SFT, best of 16 by scalar reward"]
    assert (best[2][:5], best[3][:5], best[7]) == ("+1.20", "+1.12", "at most 1.84")
    for name, policy in {
        "SFT, best of 16 by scalar reward": "sft_best_of_16",
        "scalar reward": "scalar_s0",
        "scalar reward, average of the seeds": "scalar_average",
    }.items():
        assert cells[name][5].startswith(f"{blind.loc[policy, 'rating']:.2f} [")
        assert cells[name][6].startswith(f"{blind.loc[policy, 'win_rate']:.0%} [")
    assert cells["SFT, 16 bits"][5:7] == ["", ""], "not rated"


def test_the_memory_plan_is_that_of_the_code():
    plans = pd.read_csv(summary.RESULTS / "tables" / "memory_plan.csv", index_col=0)
    expected = plan_table(PROFILES["full"])
    pd.testing.assert_frame_equal(plans, expected, rtol=1e-3, check_dtype=False)


def test_the_summary_speaks_of_the_published_models():
    assert summary.CHOSEN == published.CHOSEN


def test_every_headline_number_lies_in_its_interval():
    for name, entry in read_json(summary.RESULTS / "summary.json").items():
        # Resampling adds the calibration error's bias once more: its interval may lie above it.
        if entry["low"] is not None and not name.endswith(".ece"):
            assert entry["low"] <= entry["value"] <= entry["high"], name


def test_fill_replaces_only_between_the_markers():
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb"
    assert front_page.fill(text, {"x": "new"}) == "a\n<!-- x -->\nnew\n<!-- /x -->\nb"
    assert front_page.fill("<!-- x -->\n\n<!-- /x -->", {"x": "n"}) == "<!-- x -->\nn\n<!-- /x -->"
    with pytest.raises(ValueError, match="'y'"):
        front_page.fill(text, {"y": "new"})
