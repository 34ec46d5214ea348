"""Files of the report: where they lie, written whole or not at all, read with a clear error."""

from __future__ import annotations

import csv
import errno
import glob
import gzip
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"  # what is published
# The folders of runs below runs/<profile> and results/<profile>.
SORTS = ("reward_models", "ensemble", "policies", "controls", "sweeps")
ABANDONED = 3600.0  # seconds after which what a kill left half written is removed


class ResultsError(RuntimeError):
    """A run folder that cannot be written, read or reused."""


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file or folder by calling `write` with a temporary path, then rename it.

    The parent of `path` is made. A file is replaced by one rename. A folder takes two, so that a
    kill between them leaves the old one, whole, under a name that ends in ".old".

    Raises:
        ResultsError: if the disk is full; whatever was at `path` before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):  # by a kill
        if time.time() - left.stat().st_mtime > ABANDONED:
            _remove(left)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    old = temporary.with_suffix(".old")
    try:
        write(temporary)
        if path.is_dir():
            path.replace(old)
        temporary.replace(path)
        _remove(old)
    except BaseException as error:  # a Ctrl-C, too
        _remove(temporary)
        if old.exists() and not path.exists():
            old.replace(path)
        # safetensors and torch wrap the system's error in one of their own.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise ResultsError(
                f"the disk is full: {path.name} was not written and its last version was kept. "
                "Free some space and start the same command again; it goes on from there."
            ) from error
        raise


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    atomic_write(path, lambda p: p.write_text(json.dumps(content, indent=2) + "\n"))


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ResultsError: naming the file if it is missing or cut short.
    """
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ResultsError(f"{shown} is missing; run the notebook that makes it") from error
    except ValueError as error:
        raise ResultsError(f"{shown} is cut short or damaged: {error}") from error


def run_label(directory: Path) -> str:
    """Return a run's path below runs/<profile> or results/<profile>; elsewhere its name."""
    parts = directory.parts
    return "/".join(parts[next((i for i, part in enumerate(parts) if part in SORTS), -1) :])


class RunFolder:
    """A run as it lies on disk: what tables are made from.

    Attributes:
        directory: the folder.
        info: the content of `run.json`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.info: dict[str, Any] = read_json(directory / "run.json")

    @property
    def label(self) -> str:
        """Return what messages call the run, see `run_label`."""
        return run_label(self.directory)

    def metrics(self) -> pd.DataFrame:
        """Return `metrics.csv`, one row per step."""
        return pd.read_csv(self.directory / "metrics.csv")


class RunLog(Protocol):
    """What a training loop needs of its run; `utils.experiments.storage.Run` is one.

    Attributes:
        directory: where checkpoints go.
        label: what messages call the run.
    """

    directory: Path

    @property
    def label(self) -> str:
        """Return what messages call the run."""

    def log(self, row: Mapping[str, float | int | None]) -> None:
        """Append a row to the log."""

    def rewind(self, step: int) -> None:
        """Drop the rows after a step."""

    def save(self, **facts: Any) -> None:
        """Keep facts with the run."""


def append_csv(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row with one write; the first row also writes the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:  # buffered: what is written leaves at its end
        writer = csv.writer(file, lineterminator="\n")
        if not file.tell():
            writer.writerow(row)
        writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in row.values())


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON Lines, atomically; NaN, which JSON does not know, becomes null."""
    plain = ({k: None if v != v else v for k, v in row.items()} for row in rows)
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in plain]
    atomic_write(path, lambda p: p.write_bytes("".join(lines).encode()))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON Lines, `stored` either way; bytes, so that only newlines part the rows."""
    path = stored(path)
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        return [json.loads(line) for line in file]


def stored(path: Path) -> Path:
    """Return `path`, or `path` + ".gz" if only that is there: large published files are packed."""
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.exists() and not path.exists() else path


def set_aside(path: Path, name: str) -> Path:
    """Rename a file or folder to `name`, or `name`-2 and so on if it is taken; return the path."""
    names = (name + (f"-{n}" if n > 1 else "") for n in count(1))
    free = next(p for p in map(path.with_name, names) if not p.exists())
    return path.replace(free)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
