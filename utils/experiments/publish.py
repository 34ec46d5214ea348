"""What an executed notebook keeps, and which results of a run are published.

A notebook is stamped with a hash of the code in its cells; outputs of other cells are never
published. That `utils` still gives the published numbers is what recomputed tables test.
"""

from __future__ import annotations

import datetime
import gzip
import hashlib
import io
import json
import shutil
import tokenize
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from utils.config import PROFILES
from utils.files import atomic_write, run_label

NUMBERED = "[0-9][0-9]_*.ipynb"
LARGE = 300_000  # bytes of a samples.jsonl, above which it is published compressed


class RunError(Exception):
    """A message for the user."""


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the cells that hold code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_hash(notebook: NotebookNode) -> str:
    """Return a hash of a notebook's code, but for comments and what prepares a Colab machine."""
    cells = [c.source for c in code_cells(notebook) if "colab" not in c.metadata.get("tags", [])]
    return hashlib.sha256("\0".join(map(_without_comments, cells)).encode()).hexdigest()[:16]


def save_notebook(notebook: NotebookNode, path: Path, profile: str, root: Path) -> None:
    """Write an executed notebook, stamped, and without the folders of this machine."""
    executed = datetime.datetime.now(datetime.UTC).date().isoformat()
    stamp = {"profile": profile, "code_hash": code_hash(notebook), "executed": executed}
    notebook.metadata["report"] = stamp
    text = nbformat.writes(notebook).replace(f"{root}/", "").replace(f"{Path.home()}/", "~/")
    atomic_write(path, lambda partial: partial.write_text(text + "\n", encoding="utf-8"))


def publish(profile: str, root: Path) -> None:
    """Copy finished runs, figures, tables and outputs of runs/<profile> to results/ and notebooks/.

    Raises:
        RunError: if the profile is the user's own, if there is nothing to publish, or if a
            notebook has changed since its execution.
    """
    source, results = root / "runs" / profile, root / "results"
    if profile not in PROFILES:
        raise RunError(f"not published: the report is no place for what stays in runs/{profile}")
    executed = sorted((source / "notebooks").glob(NUMBERED))
    if not executed:
        raise RunError(f"nothing to publish: first `make run PROFILE={profile}`")
    ready = []
    for path in executed:  # the outputs move, later edits of the prose stay
        target = root / "notebooks" / path.name
        done, current = (nbformat.read(place, as_version=4) for place in (path, target))
        if code_hash(done) != code_hash(current):
            raise RunError(f"not published: {path.name} has changed since; first run it again")
        for cell, outputs in zip(code_cells(current), code_cells(done), strict=True):
            cell.update(outputs=outputs.outputs, execution_count=outputs.execution_count)
        current.metadata.update(done.metadata)
        ready.append((current, target))
    for notebook, target in ready:
        nbformat.write(notebook, target)
    for run in run_folders(source):
        if finished(run):
            copy_run(run, results / profile / run.relative_to(source))
        else:
            print(f"left out {run_label(run)}: not finished")
    for folder in ("figures", "tables"):
        shutil.copytree(source / folder, results / folder, dirs_exist_ok=True)
    (results / profile).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "cost.json", results / profile / "cost.json")
    print(f"published {len(executed)} notebooks of {profile}, with runs, figures and tables")


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, empty if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def run_folders(source: Path) -> list[Path]:
    """Return the folders of runs below runs/<profile>, but for those set aside or half written."""
    runs = sorted(path.parent for path in source.rglob("run.json"))
    names = [run.relative_to(source).parts for run in runs]
    kept = [not any("@" in name or name[0] == "." for name in parts) for parts in names]
    return [run for run, keep in zip(runs, kept, strict=True) if keep]


def finished(run: Path) -> bool:
    """Tell whether a folder holds a finished run."""
    return read_record(run / "run.json").get("status") == "finished"


def copy_run(source: Path, target: Path) -> None:
    """Replace a published run by the small files of a finished one; runs nested in it stay."""

    def copy(folder: Path) -> None:
        folder.mkdir()
        patterns = ("*.json", "*.csv", "samples.jsonl*")
        for path in (path for pattern in patterns for path in source.glob(pattern)):
            if path.suffix == ".jsonl" and path.stat().st_size > LARGE:
                # Without a time, so that the same rows are the same bytes.
                packed = gzip.compress(path.read_bytes(), mtime=0)
                (folder / f"{path.name}.gz").write_bytes(packed)
            else:
                shutil.copyfile(path, folder / path.name)
        for nested in (record.parent for record in target.glob("[!.]*/run.json")):
            shutil.copytree(nested, folder / nested.name)

    atomic_write(target, copy)


def _without_comments(source: str) -> str:
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    return "\n".join(line.rstrip() for line in lines if line.strip())
