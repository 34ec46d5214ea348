"""The headline numbers follow from the published runs."""

from __future__ import annotations

from utils.experiments import published, summary
from utils.files import read_json


def test_summary_is_what_the_published_runs_give():
    assert read_json(summary.RESULTS / "summary.json") == summary.headline()


def test_the_summary_speaks_of_the_published_models():
    assert summary.CHOSEN == published.CHOSEN


def test_every_headline_number_lies_in_its_interval():
    for name, entry in read_json(summary.RESULTS / "summary.json").items():
        # Resampling adds the calibration error's bias once more: its interval may lie above it.
        if entry["low"] is not None and not name.endswith(".ece"):
            assert entry["low"] <= entry["value"] <= entry["high"], name
