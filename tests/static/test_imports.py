"""Imports go one way, and the training loop needs nothing of the analysis."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from utils.files import ROOT

# Each may import what stands before it. `statistics` and `plots` read tables: of what runs a model
# they may import pure functions only, see `PURE`.
ORDER = ("files", "config", "arms", "data", "models", "rewards", "reinforce")
ORDER += ("statistics", "plots", "experiments")
PURE = {"rewards.losses", "rewards.perturbations"}
READS_TABLES = ("statistics", "plots")
RUNS_MODELS = ("models", "rewards", "reinforce")
MODULES = sorted((ROOT / "utils").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Return the modules below `utils` that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    known = {module_name(file) for file in MODULES}
    return {name.removeprefix("utils.") for name in found if name.removeprefix("utils.") in known}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "utils").with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_one_way(path: Path):
    own = module_name(path).split(".")[0]
    if own in ("colab", "__init__"):
        assert not imported(path)
        return
    for name in imported(path):
        other = name.split(".")[0]
        assert ORDER.index(other) <= ORDER.index(own), f"{module_name(path)} imports {name}"
        if own in READS_TABLES and other in RUNS_MODELS:
            assert name in PURE, f"{module_name(path)} reads tables, but imports {name}"


def test_no_module_imports_itself_by_way_of_others():
    edges = {module_name(path): imported(path) for path in MODULES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a cycle: {' -> '.join((*above, name))}"
        if name not in done:
            for other in edges[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_the_loop_loads_nothing_of_the_analysis():
    code = "import sys, utils.reinforce.loop; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folders = {name.split(".")[1] for name in done.stdout.split() if name.startswith("utils.")}
    assert not folders & {"statistics", "plots", "experiments"}, sorted(folders)
