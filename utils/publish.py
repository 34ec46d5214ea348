"""What an executed notebook keeps, and which results of a run are published.

A notebook is stamped with a hash of the code that made its outputs; outputs of other code are
never published.
"""

from __future__ import annotations

import ast
import datetime
import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

PATTERN = "[0-9][0-9]_*.ipynb"
# They change no number in an output.
UNHASHED = ("address.py", "colab.py", "kernel.py", "run.py", "publish.py", "summary.py")
UNHASHED += ("train.py", "widgets.py", "locks.py")
LARGE = 300_000  # bytes of a samples.jsonl, above which it is published compressed


class RunError(Exception):
    """A message for the user and the exit code that goes with it."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def code_hash(notebook: NotebookNode, utils_dir: Path) -> str:
    """Return a hash of the code behind a notebook's outputs; comments and docstrings are left out.

    Args:
        notebook: its code cells enter in order, but for the one that prepares a Colab machine.
        utils_dir: all Python files in it enter, but for `UNHASHED`.
    """
    cells = [cell for cell in notebook.cells if "colab" not in cell.metadata.get("tags", [])]
    parts = [_shape(cell.source) for cell in cells if is_code(cell)]
    files = [path for path in sorted(utils_dir.glob("*.py")) if path.name not in UNHASHED]
    parts += [path.name + _shape(path.read_text(encoding="utf-8")) for path in files]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def clean(notebook: NotebookNode, profile: str, root: Path) -> NotebookNode:
    """Remove, in place, what would differ on another machine, and stamp the notebook."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["report"] = {
        "profile": profile,
        "code_hash": code_hash(notebook, root / "utils"),
        "executed": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [_scrub(out, root) for out in cell.outputs if not _only_widget(out)]
    return notebook


def publish(profile: str, root: Path) -> None:
    """Copy finished runs, figures, tables and outputs of runs/<profile> to results/ and notebooks/.

    Raises:
        RunError: if there is nothing to publish, or the code has changed since the execution.
    """
    source, results = root / "runs" / profile, root / "results"
    executed = {path: nbformat.read(path, as_version=4) for path in list_notebooks(source)}
    if not executed:
        raise RunError(f"nothing to publish: first `make run PROFILE={profile}`")
    current = {path.name: nbformat.read(path, as_version=4) for path in list_notebooks(root)}
    fresh = {name: code_hash(notebook, root / "utils") for name, notebook in current.items()}
    for path, notebook in executed.items():
        if notebook.metadata.report["code_hash"] != fresh.get(path.name):
            raise RunError(
                f"not published: {path.name} or utils/ has changed since it was executed; "
                f"first `make run PROFILE={profile}`"
            )
    for path, notebook in executed.items():  # the outputs move, later edits of the prose stay
        target = current[path.name]
        pairs = zip(_code(target), _code(notebook), strict=True)
        for cell, done in pairs:
            cell.update(outputs=done.outputs, execution_count=done.execution_count)
        target.metadata.update(notebook.metadata)
        target.metadata.pop("widgets", None)
        write_file(root / "notebooks" / path.name, nbformat.writes(target) + "\n")
    for record in sorted(source.glob("[!.]*/run.json")):
        if "@" in record.parent.name:  # set aside: made with another configuration
            continue
        if read_record(record).get("status") == "finished":
            copy_run(record.parent, results / f"{profile}-{record.parent.name}")
        else:
            print(f"left out {record.parent.name}: not finished")
    copies = [(path, results / path.parent.name / path.name) for path in source.glob("figures/*")]
    copies += [(path, results / path.parent.name / path.name) for path in source.glob("tables/*")]
    copies += [(path, results / f"{profile}-{path.name}") for path in source.glob("cost.json")]
    for path, target in copies:
        write_file(target, path.read_bytes())
    print(f"published {len(executed)} notebooks and {len(copies)} other files of {profile}")


def list_notebooks(folder: Path, prefixes: Sequence[str] | None = None) -> list[Path]:
    """Return the notebooks of a sequence, in order; with prefixes, those that start with one."""
    paths = sorted((folder / "notebooks").glob(PATTERN))
    for prefix in prefixes or []:
        if not any(path.name.startswith(prefix) for path in paths):
            known = ", ".join(path.stem for path in paths)
            raise RunError(f"no notebook starts with {prefix!r}; there are: {known}", 2)
    return [path for path in paths if not prefixes or path.name.startswith(tuple(prefixes))]


def is_code(cell: NotebookNode) -> bool:
    """Tell whether a cell holds code to execute."""
    return cell.cell_type == "code" and bool(cell.source.strip())


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file under another name first, so that a kill leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    unfinished.replace(path)


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, empty if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if is_code(cell)]


def _shape(source: str) -> str:
    try:
        return _node_shape(ast.parse(source))
    except SyntaxError:  # IPython magics
        return source


def _node_shape(node: Any) -> str:
    """Write a syntax tree without docstrings, positions and empty fields (they vary by Python)."""
    if isinstance(node, list):
        return "[" + ",".join(map(_node_shape, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    kept = [f"{k}={_node_shape(v)}" for k, v in fields.items() if v is not None and v != []]
    return f"{type(node).__name__}({','.join(kept)})"


def _only_widget(output: NotebookNode) -> bool:
    """Drop the reference to a widget; tell whether nothing but its text form is left."""
    data = output.get("data", {})
    widget = data.pop("application/vnd.jupyter.widget-view+json", None)
    return widget is not None and set(data) <= {"text/plain"}


def _scrub(value: Any, root: Path) -> Any:
    """Replace absolute paths in all strings, but for embedded images."""
    if isinstance(value, dict):
        keep = ("image/png", "image/jpeg")
        return type(value)({k: v if k in keep else _scrub(v, root) for k, v in value.items()})
    if isinstance(value, list):
        return [_scrub(item, root) for item in value]
    if not isinstance(value, str):
        return value
    value = re.sub(rf"{re.escape(str(root))}/(?=\w|\.)", "", value)
    value = re.sub(rf"{re.escape(str(root))}(?![\w.-])", ".", value)
    value = re.sub(rf"(?<![\w.-]){re.escape(str(Path.home()))}(?![\w.-])", "~", value)
    return re.sub(r"/[\w./+-]*ipykernel_\d+/\d+\.py", "<cell>", value)


def copy_run(source: Path, target: Path) -> None:
    """Replace a published run by the small files of a finished one."""
    fresh, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    for pattern in ("*.json", "*.csv", "samples.jsonl*"):
        for path in source.glob(pattern):
            if path.suffix == ".jsonl" and path.stat().st_size > LARGE:
                # Without a time, so that the same rows are the same bytes.
                packed = gzip.compress(path.read_bytes(), mtime=0)
                (fresh / f"{path.name}.gz").write_bytes(packed)
            else:
                shutil.copyfile(path, fresh / path.name)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
