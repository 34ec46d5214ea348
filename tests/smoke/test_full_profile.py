"""The profile `full`, cut short: set and model come from a stand-in for the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import nbformat
import pytest

from tests.copied import copy_of_repository
from tests.fake_hub import FakeHub
from tests.hub_data import MARKED, pair, pairs, parquet
from utils.config import PROFILES, ModelConfig
from utils.files import read_json
from utils.models.weights import weights_path

pytestmark = pytest.mark.slow
SHORTER = {
    "profile": "full",
    **{"data.train_prompts": 8, "data.validation_prompts": 4, "data.test_prompts": 4},
    **{"reward.groups_per_step": 4, "reward.lora_r": 4, "reinforce.lora_r": 4},
    **{"reinforce.steps": 2, "reinforce.prompts_per_step": 4, "reinforce.eval_steps": 2},
    **{"reinforce.max_completion_length": 8, "evaluation.bootstrap_samples": 200},
    **{"evaluation.batch_size": 4, "evaluation.sft_temperatures": [0.5]},
}
COPIED = ("pyproject.toml", "notebooks", "results", "utils")


def rows() -> list[dict]:
    """Return 8,678 rows; the first prompts of a split, which the profile takes, are odd ones."""
    marked = [pair(MARKED.replace("One", f"{n} and one")) for n in range(60)]
    return [*marked, *pairs(8678 - len(marked))]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all notebooks in a copy of the repository."""
    copy = copy_of_repository(tmp_path_factory.mktemp("full") / "report", COPIED)
    (copy / "hub.json").write_text(json.dumps(SHORTER))
    with FakeHub() as hub:
        hub.add_dataset(
            "esfrankel17/HelpSteer2_binarized",
            {"data/average_rating_split-00000-of-00001.parquet": parquet(rows())},
        )
        hub.add_model(PROFILES["full"].model.name, weights_path(ModelConfig(name="tiny-random")))
        environment = {k: v for k, v in os.environ.items() if k != "REPORT_PROFILE"}
        ended = subprocess.run(
            [sys.executable, "-m", "utils.experiments.run", "--profile", "hub.json"],
            cwd=copy,
            env={**environment, **hub.environment(copy / "home")},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    assert ended.returncode == 0, f"{ended.stdout[-2000:]}\n{ended.stderr[-3000:]}"
    return copy


def test_all_notebooks_run_on_the_set_and_the_model_of_the_hub(done: Path):
    executed = sorted((done / "runs/hub/notebooks").glob("*.ipynb"))
    names = [path.name[:2] for path in executed]
    assert names == ["01", "02", "03", "04", "05", "06", "09"]
    (data, *_) = executed
    cells = [c for c in nbformat.read(data, as_version=4).cells if c.cell_type == "code"]
    text = "".join(out.text for c in cells for out in c.outputs if out.output_type == "stream")
    assert "esfrankel17/HelpSteer2_binarized:average_rating_split is used: 8,678 rows" in text
    assert "source: hub" in text
    assert not (done / ".cache").exists(), "the embedded model was taken instead"


def test_the_stages_are_those_of_the_profile(done: Path):
    for stage in product(("reward_models", "policies"), ("scalar", "ordinal")):
        info = read_json((done / "runs/hub").joinpath(*stage, "seed0", "run.json"))
        assert info["status"] == "finished"
        assert info["config"]["data.source"] == "hub"
        assert info["config"]["model.name"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
