"""Runs on disk: `run.json`, `metrics.csv`, `samples.jsonl[.gz]`; a kill loses nothing of them."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from utils.config import Profile, config_hash
from utils.distributed import processes
from utils.environment import ROOT, environment, peak_rss_gb
from utils.glossary import GLOSSARY


class ResultsError(RuntimeError):
    """A run folder that cannot be written, read or reused."""


def runs_dir(profile: Profile) -> Path:
    """Return the scratch folder of a profile, `runs/<profile>` below the repository root."""
    return ROOT / "runs" / profile.name


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file or folder by calling `write` with a temporary path, then rename it.

    The parent of `path` is made.

    Raises:
        ResultsError: if the disk is full; whatever was at `path` before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    _remove(temporary)
    try:
        write(temporary)
        if path.is_dir():
            _remove(path)
        os.replace(temporary, path)
    except Exception as error:
        _remove(temporary)
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
        """Mark the run as finished."""
        self.save(status="finished", **facts)

    def log(self, row: Mapping[str, float | int | None]) -> None:
        """Append one row to `metrics.csv`; blank where a value was not measured."""
        if unknown := sorted(set(row) - set(GLOSSARY)):
            raise ResultsError(f"metrics without a line in the glossary: {unknown}")
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
    asked for. Otherwise the fields that differ are printed and the old folder is set aside.

    Returns:
        "reuse", "resume" or "new".
    """
    label = f"[{directory.name}]"
    try:
        info = read_json(directory / "run.json")
        if not isinstance(info, dict) or not {"config", "config_hash", "started"} <= set(info):
            raise ResultsError("run.json is damaged: it does not describe a run")
    except ResultsError as error:
        if (directory / "run.json").exists():
            print(f"{label} {error}; set aside, starting anew")
            set_aside(directory, f"{directory.name}@damaged")
        return "new"
    if info["config_hash"] != config_hash(config):
        old = info["config"]
        for name in sorted({*old, *config}):
            if old.get(name) != config.get(name):
                print(f"{label} {name}: was {old.get(name)!r}, now {config.get(name)!r}")
        print(f"{label} the configuration differs: kept aside, starting anew")
        set_aside(directory, f"{directory.name}@{info['config_hash']}")
        return "new"
    if info["status"] == "finished":
        print(f"{label} reuse: finished {info['started']}, config {info['config_hash']}")
        return "reuse"
    print(f"{label} unfinished: going on from its last checkpoint")
    return "resume"


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
