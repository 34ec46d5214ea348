"""All notebooks, executed in order with the tiny model, in a copy of the repository."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from utils.experiments.run import REPO

pytestmark = pytest.mark.slow
NOT_COPIED = (".git", ".venv", "runs", "__pycache__", ".*_cache", ".hypothesis", ".cache")


def hashes(folder: Path) -> dict[str, str]:
    """Return a digest for each file outside runs/ and the caches."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = [path.relative_to(folder) for path in files]
    ignored = {"runs", "__pycache__", ".cache"}
    return {
        name.as_posix(): hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in names
        if not ignored & set(name.parts)
    }


def run_smoke(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("REPORT_PROFILE", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, "-m", "utils.experiments.run", "--profile", "smoke"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what a clone would have."""
    target = tmp_path_factory.mktemp("sequence") / "report"
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    if not shutil.which("git") or not (REPO / ".git").exists():
        return shutil.copytree(REPO, target, ignore=shutil.ignore_patterns(*NOT_COPIED))
    names = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (REPO / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, target / name)
    return target


@pytest.fixture(scope="module")
def before(copy: Path) -> dict[str, str]:
    return hashes(copy)


@pytest.fixture(scope="module")
def first(copy: Path, before: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return run_smoke(copy)


@pytest.fixture(scope="module")
def second(copy: Path, first: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    if first.returncode:
        pytest.skip("the first run failed")
    return run_smoke(copy)


def assert_figures_are_shown(cell: nbformat.NotebookNode) -> None:
    """A figure that a cell saves, also one in a loop, is among the cell's outputs."""
    shown = sum("image/png" in out.get("data", {}) for out in cell.outputs)
    assert shown >= cell.source.count("save_figure("), f"{shown} figures shown by\n{cell.source}"


def report(done: subprocess.CompletedProcess[str]) -> str:
    return f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_all_notebooks_run(copy: Path, first: subprocess.CompletedProcess[str]):
    assert first.returncode == 0, report(first)
    executed = sorted((copy / "runs" / "smoke" / "notebooks").glob("*.ipynb"))
    assert [path.name for path in executed] == sorted(
        path.name for path in (REPO / "notebooks").glob("*.ipynb")
    )
    assert [path.name[:2] for path in executed][:6] == ["01", "02", "03", "04", "05", "06"]
    for path in executed:
        cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        for cell in cells:
            assert_figures_are_shown(cell)


def test_figures_and_runs_are_written(copy: Path, first: subprocess.CompletedProcess[str]):
    folder = copy / "runs" / "smoke"
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert len(figures) >= 6, f"{sorted(figures)}: at least one for each notebook"
    assert list(folder.rglob("run.json"))
    assert list(folder.rglob("metrics.csv"))
    assert (folder / "cost.json").exists()


def test_a_second_run_reuses_and_agrees(
    copy: Path,
    first: subprocess.CompletedProcess[str],
    second: subprocess.CompletedProcess[str],
):
    assert second.returncode == 0, report(second)
    outputs = [path.read_text() for path in (copy / "runs/smoke/notebooks").glob("*.ipynb")]
    assert "reus" in second.stdout + "".join(outputs), "no artefact was reused, or it was not said"


def test_nothing_else_is_touched(
    copy: Path, before: dict[str, str], second: subprocess.CompletedProcess[str]
):
    assert hashes(copy) == before
