"""Two processes do what one does, and one of them writes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch

from utils.config import ConfigError
from utils.experiments.train import parse_setting
from utils.files import ROOT, read_json, read_jsonl
from utils.reinforce.checkpoints import _all
from utils.reinforce.distributed import processes

SETTINGS = ["reinforce.steps=4", "reinforce.prompts_per_step=6", "reinforce.max_kl=1e9"]
SETTINGS += ["reinforce.learning_rate=0.003", "data.train_prompts=6", "data.test_prompts=2"]


def run(root: Path, stage: str, *launcher: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m utils.experiments.train` in fp32, with its runs below `root`."""
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [*launcher, __file__, str(root), stage, "scalar", "--profile", "smoke", *settings]
    environment = {k: v for k, v in os.environ.items() if k != "REPORT_PROFILE"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


# What `accelerate launch` calls on GPUs; on CPUs it starts one process, or asks for mpirun.
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same alignment by one process and by two, from the same reward model."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    done = run(one, "reward")
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(one / "runs", two / "runs")
    for root, prefix in ((one, ()), (two, TWO)):
        done = run(root, "align", *prefix)
        assert done.returncode == 0, done.stderr[-3000:]
        (root / "stdout").write_text(done.stdout)
    return {"one": one, "two": two}


def test_the_rows_are_those_of_one_process(folders):
    one, two = (
        pd.read_csv(root / "runs/smoke/policies/scalar/seed0/metrics.csv")
        for root in folders.values()
    )
    assert list(two["step"]) == [0, 1, 2, 3, 4], "one row a step, written by one process"
    assert two["kl"].max() > 1e-4, "the policy did not move"
    pd.testing.assert_frame_equal(
        one.drop(columns="seconds"), two.drop(columns="seconds"), rtol=1e-3, atol=1e-4
    )


def test_the_baseline_is_that_of_all_rows(folders):
    rows = pd.read_csv(folders["two"] / "runs/smoke/policies/scalar/seed0/metrics.csv")[1:]
    expected = rows["objective"].expanding().mean().shift(fill_value=0.0)
    torch.testing.assert_close(
        torch.tensor(rows["baseline"].to_numpy()),
        torch.tensor(expected.to_numpy()),
        atol=1e-4,
        rtol=1e-4,
    )


def test_the_policies_are_the_same(folders):
    one, two = (
        torch.load(_all(root / "runs/smoke/policies/scalar/seed0")[-1], weights_only=True)
        for root in folders.values()
    )
    assert one["step"] == two["step"] == 4
    for name, value in one["adapter"].items():
        torch.testing.assert_close(two["adapter"][name], value, atol=2e-4, rtol=1e-2)


def test_there_were_two(folders):
    assert (folders["one"] / "world").read_text() == "1"
    assert (folders["two"] / "world").read_text() == "2"


def test_one_process_speaks_and_writes(folders):
    root = folders["two"]
    info = read_json(root / "runs/smoke/policies/scalar/seed0/run.json")
    assert info["status"] == "finished"
    lines = Counter((root / "stdout").read_text().splitlines())
    assert {line.split()[1]: n for line, n in lines.items() if line.startswith("step ")} == {
        str(step): 1 for step in range(1, 5)
    }
    samples = [
        read_jsonl(r / "runs/smoke/controls/sft_training_prompts/samples.jsonl")
        for r in folders.values()
    ]
    assert samples[0] == samples[1]


def test_several_processes_do_not_train_a_reward_model(tmp_path):
    done = run(tmp_path, "align", *TWO)
    assert done.returncode != 0
    assert "python -m utils.experiments.train reward scalar --profile smoke" in done.stderr


def test_a_setting_is_json_or_text():
    assert parse_setting("reinforce.steps=5") == ("reinforce.steps", 5)
    assert parse_setting("data.path=own/a=b.jsonl") == ("data.path", "own/a=b.jsonl")
    assert parse_setting("reinforce.micro_batch=null") == ("reinforce.micro_batch", None)
    with pytest.raises(ConfigError, match="expected section"):
        parse_setting("seed")


def _worker() -> None:
    from utils import config
    from utils.experiments import train
    from utils.models import body as models

    models.compute_dtype = lambda where: torch.float32
    config.ROOT = Path(sys.argv[1])
    torch.set_num_threads(1)
    train.main(sys.argv[2:])
    (config.ROOT / "world").write_text(str(processes().num_processes))


if __name__ == "__main__":
    _worker()
