"""Runs on disk: `run.json`, `metrics.csv`, `samples.jsonl[.gz]`; a kill loses nothing of them."""

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
from typing import Any

import pandas as pd
import torch

from utils.config import Profile, config_hash
from utils.distributed import processes
from utils.environment import ROOT, environment, peak_rss_gb
from utils.locks import hold, release

ABANDONED = 3600.0  # seconds after which what a kill left half written is removed


class ResultsError(RuntimeError):
    """A run folder that cannot be written, read or reused."""


def runs_dir(profile: Profile) -> Path:
    """Return the scratch folder of a profile, `runs/<profile>` below the repository root."""
    return ROOT / "runs" / profile.name


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


class Run:
    """One run's folder. Rows are appended line by line; `run.json` says whether it finished.

    Attributes:
        directory: the folder.
        info: the content of `run.json`.
    """

    def __init__(
        self, directory: Path, config: Mapping[str, Any], seed: int, data_fingerprint: str
    ) -> None:
        self.directory = directory
        self._before, self._start = 0.0, time.time()
        if (existing := directory / "run.json").exists():
            self.info = read_json(existing)
            self._before = self.info["seconds"]
            return
        self.info = {
            "name": directory.name,
            "status": "running",
            "config": dict(config),
            "config_hash": config_hash(config),
            "seed": seed,
            "data_fingerprint": data_fingerprint,
            **environment(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": 0.0,
            "peak_rss_gb": 0.0,
        }
        self.save()

    def save(self, **facts: Any) -> None:
        """Add facts, wall time and peak memory to `run.json`; of several processes one writes."""
        self.info.update(facts)
        self.info["seconds"] = round(self._before + time.time() - self._start, 1)
        self.info["peak_rss_gb"] = peak_rss_gb()
        if torch.cuda.is_available():
            self.info["peak_cuda_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        if processes().is_main_process:
            write_json(self.directory / "run.json", self.info)

    def finish(self, **facts: Any) -> None:
        """Mark the run as finished, and let other processes have its folder."""
        self.save(status="finished", **facts)
        release(self.directory)

    def log(self, row: Mapping[str, float | int | None]) -> None:
        """Append one row to `metrics.csv`; blank where a value was not measured."""
        append_csv(self.directory / "metrics.csv", row)

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`: what a killed run logged beyond its last checkpoint."""
        path = self.directory / "metrics.csv"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if not lines or not lines[0].endswith("\n"):
            path.unlink(missing_ok=True)
            return
        width = lines[0].count(",")
        kept = [
            line
            for line in lines[1:]
            if line.endswith("\n") and line.count(",") == width and int(line.split(",")[0]) <= step
        ]
        atomic_write(path, lambda p: p.write_text("".join([lines[0], *kept])))

    def metrics(self) -> pd.DataFrame:
        """Return `metrics.csv`, one row per step."""
        return pd.read_csv(self.directory / "metrics.csv")


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


def prepare(directory: Path, config: Mapping[str, Any]) -> str:
    """Decide what an artefact's folder is good for, and say so.

    A finished run is reused, and an unfinished one continued, only if its configuration is the one
    asked for. Otherwise the fields that differ are printed and the old folder is set aside. Unless
    it is reused, the folder is this process's until `Run.finish`; of several processes of one
    launch, the first one's.

    Returns:
        "reuse", "resume" or "new".

    Raises:
        FolderInUse: if another process writes into the folder.
    """
    label, info, damage = f"[{directory.name}]", {}, None
    try:
        info = read_json(directory / "run.json")
        if not isinstance(info, dict) or not {"config", "config_hash", "started"} <= set(info):
            raise ResultsError("run.json is damaged: it does not describe a run")
    except ResultsError as error:
        damage = error
    same = not damage and info["config_hash"] == config_hash(config)
    if same and info["status"] == "finished":
        release(directory)
        print(f"{label} reuse: finished {info['started']}, config {info['config_hash']}")
        return "reuse"
    if processes().is_main_process and hold(directory):
        return prepare(directory, config)  # as it is now that no other process can change it
    if same:
        print(f"{label} unfinished: going on from its last checkpoint")
        return "resume"
    if not damage:
        old = info["config"]
        for name in sorted({*old, *config}):
            if old.get(name) != config.get(name):
                print(f"{label} {name}: was {old.get(name)!r}, now {config.get(name)!r}")
        print(f"{label} the configuration differs: kept aside, starting anew")
        set_aside(directory, f"{directory.name}@{info['config_hash']}")
    elif (directory / "run.json").exists():
        print(f"{label} {damage}; set aside, starting anew")
        set_aside(directory, f"{directory.name}@damaged")
    return "new"


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
