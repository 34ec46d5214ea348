"""The committed notebooks: valid, executed in order, thin, portable and fresh. Nothing is run."""

from __future__ import annotations

import ast
import base64
import builtins
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import pytest

from utils.colab import ADDRESS
from utils.experiments.publish import code_hash
from utils.experiments.run import REPO

FOLDER = REPO / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
CORE = ["01", "02", "03", "04", "05", "06"]
ABSOLUTE = re.compile(r"(?<![\w.:-])/(?:home|root|work|tmp)(?:/|\b)|\b[A-Z]:\\\\?\w")
SAVED = re.compile(r'save_figure\(figure, profile, "(\w+)"\)')
EMBEDDED_IMAGES = ("image/png", "image/jpeg")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@cache
def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def parse(source: str) -> ast.Module:
    """Parse a code cell; a line of IPython magic counts as `pass`."""
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M))


def nodes(path: Path) -> Iterator[ast.AST]:
    for cell in code_cells(path):
        yield from ast.walk(parse(cell.source))


def strings(value: Any) -> Iterator[str]:
    """Yield all texts of an output, but for embedded images."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in EMBEDDED_IMAGES:
                yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def test_the_six_core_notebooks_are_there():
    names = [path.name for path in NOTEBOOKS]
    assert [name[:2] for name in names][:6] == CORE, f"notebooks/ has {names}"
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", name) for name in names), names


@each_notebook
def test_format_is_valid(path: Path):
    nbformat.validate(read(path))
    assert path.stat().st_size < 5e6, "too large for GitHub's viewer"


@each_notebook
def test_was_executed_once_from_top_to_bottom(path: Path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))


@each_notebook
def test_outputs_are_clean(path: Path):
    outputs = [out for cell in code_cells(path) for out in cell.outputs]
    assert not [out.evalue for out in outputs if out.output_type == "error"]
    noise = [out.text for out in outputs if out.output_type == "stream" and out.name == "stderr"]
    assert not noise
    assert "widgets" not in read(path).metadata, "widget state breaks GitHub's viewer"
    kinds = {kind for out in outputs for kind in out.get("data", {})}
    assert "application/vnd.jupyter.widget-view+json" not in kinds


@each_notebook
def test_every_figure_is_embedded(path: Path):
    shown = []
    for cell in code_cells(path):
        images = [
            out.data["image/png"] for out in cell.outputs if "image/png" in out.get("data", {})
        ]
        assert len(images) >= cell.source.count("save_figure("), cell.source
        shown += images
    assert len(shown) == len(set(shown)), "a figure is shown twice"
    names = {name for cell in code_cells(path) for name in SAVED.findall(cell.source)}
    files = {path.stem: path.read_bytes() for path in (REPO / "results" / "figures").glob("*.png")}
    embedded = {base64.b64decode(image) for image in shown}
    assert names <= {name for name, content in files.items() if content in embedded}


@each_notebook
def test_outputs_are_of_the_present_code(path: Path):
    report = read(path).metadata.get("report", {})
    assert report.get("code_hash") == code_hash(read(path)), (
        "the code has changed since the execution: `make run`, then `make publish`"
    )


@each_notebook
def test_one_cell_sets_the_parameters(path: Path):
    tagged = [cell for cell in read(path).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert tagged[0].cell_type == "code"
    values = {
        ast.unparse(target): node.value
        for node in ast.walk(parse(tagged[0].source))
        if isinstance(node, ast.Assign)
        for target in node.targets
    }
    assert "PROFILE" in values
    assert ast.literal_eval(values["PROFILE"]) == "quick"


@each_notebook
def test_badge_opens_this_notebook(path: Path):
    """While the address is not set it is a comment: no link leads to a page that is not there."""
    title, shown, *_ = read(path).cells[0].source.split("\n\n")
    assert title.startswith("# ")
    colab, repository = "https://colab.research.google.com", ADDRESS.removeprefix("https://")
    page = f"{colab}/{repository.replace('.com', '')}/blob/main/notebooks/{path.name}"
    badge = f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({page})"
    assert shown == (f"<!-- {badge} -->" if "OWNER/REPOSITORY" in ADDRESS else badge)


def test_the_address_is_set_as_the_readme_says(tmp_path: Path):
    """By one line for the shell, in the notebooks and in `utils/colab.py`."""
    (line,) = re.findall(r"^sed .*OWNER/REPOSITORY.*$", (REPO / "README.md").read_text(), re.M)
    if "OWNER/REPOSITORY" not in ADDRESS or not shutil.which("sed"):
        pytest.skip("the address is set, or there is no sed")
    for name in ("notebooks/01_data.ipynb", "utils/colab.py"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(REPO / name, tmp_path / name)
    subprocess.run(line, shell=True, cwd=tmp_path, check=True)
    first, second, *_ = nbformat.read(tmp_path / "notebooks/01_data.ipynb", as_version=4).cells
    badge = first.source.split("\n\n")[1]
    assert badge.startswith("[![Open in Colab](")
    assert badge.endswith("/github/me/fork/blob/main/notebooks/01_data.ipynb)")
    assert "https://github.com/me/fork report" in second.source
    assert 'ADDRESS = "https://github.com/me/fork"' in (tmp_path / "utils/colab.py").read_text()


@each_notebook
def test_first_code_cell_prepares_colab(path: Path):
    first, second, *others = code_cells(path)
    assert first.metadata.get("tags") == ["colab"]
    assert second.metadata.get("tags") == ["parameters"]
    assert not [cell for cell in others if "colab" in cell.metadata.get("tags", [])]
    assert len(first.source.splitlines()) <= 12
    assert first.source == code_cells(NOTEBOOKS[0])[0].source, "it is the same in all notebooks"
    assert first.source.startswith("DRIVE = False"), "the one flag is hard to find"
    assert f" {ADDRESS} report\n" in first.source
    assert not first.outputs, "it does nothing where the outputs are made"


@each_notebook
def test_prose_stands_between_code_cells(path: Path):
    kinds = [cell.cell_type for cell in read(path).cells]
    pairs = list(itertools.pairwise(kinds))
    assert ("code", "code") not in pairs, f"after cell {pairs.index(('code', 'code'))}"
    assert kinds.count("markdown") >= kinds.count("code")
    assert not [cell for cell in read(path).cells if not cell.source.strip()], "an empty cell"


@each_notebook
def test_code_cells_are_short(path: Path):
    lines = [len(cell.source.splitlines()) for cell in code_cells(path)]
    assert max(lines) <= 25, f"lines per code cell: {lines}"


@each_notebook
def test_logic_lives_in_utils(path: Path):
    found = list(nodes(path))
    functions = [node.name for node in found if isinstance(node, ast.FunctionDef)]
    assert len(functions) <= 2, functions
    assert not [node for node in found if isinstance(node, ast.ClassDef | ast.While)]
    called = {node.func.attr for node in found if _is_method_call(node)}
    assert not called & {"backward", "zero_grad"}, "a training loop"


def _is_method_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)


@each_notebook
def test_paths_are_relative(path: Path):
    texts = [("source", cell.source) for cell in read(path).cells]
    texts += [("output", text) for cell in code_cells(path) for text in strings(cell.outputs)]
    found = [(kind, hit.group()) for kind, text in texts if (hit := ABSOLUTE.search(text))]
    assert not found


@each_notebook
def test_first_cell_has_title(path: Path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    assert re.search(r"^# \d\d · \S", first.source, re.M)


@each_notebook
def test_figures_say_what_they_show(path: Path):
    """A figure made by a cell is followed by prose, so that no number stands unread."""
    cells = read(path).cells
    for index, cell in enumerate(cells):
        outputs = cell.outputs if cell.cell_type == "code" else []
        if any("image/png" in out.get("data", {}) for out in outputs):
            assert index + 1 < len(cells), "a figure is the last cell"
            assert len(cells[index + 1].source) > 80, f"cell {index + 1} does not read the figure"


@cache
def undefined_names() -> list[dict[str, Any]]:
    command = ["-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F821,F822,F823"]
    done = subprocess.run(
        [sys.executable, *command, "--output-format", "json", str(FOLDER)],
        capture_output=True,
        text=True,
        check=False,
    )
    return json.loads(done.stdout or "[]")


@each_notebook
def test_names_are_bound(path: Path):
    found = [entry for entry in undefined_names() if Path(entry["filename"]).name == path.name]
    assert not [entry["message"] for entry in found]


@each_notebook
def test_names_are_bound_before_their_use(path: Path):
    """At cell level: what a cell reads was assigned in it or in an earlier one."""
    known = set(dir(builtins)) | {"get_ipython", "display", "__file__"}
    for number, cell in enumerate(code_cells(path), 1):
        tree = parse(cell.source)
        known |= set(_bound(tree))
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and _is_read(n)}
        assert used <= known, f"In [{number}] reads {sorted(used - known)}"


def _is_read(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)


def _bound(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not _is_read(node):
            yield node.id
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name
