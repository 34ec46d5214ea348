"""Runs on disk: `run.json`, `metrics.csv`, `samples.jsonl[.gz]`; a kill loses nothing of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from utils.config import config_hash
from utils.experiments.environment import environment, peak_rss_gb
from utils.experiments.locks import hold, release
from utils.files import (
    ResultsError,
    RunFolder,
    append_csv,
    atomic_write,
    read_json,
    run_label,
    set_aside,
    write_json,
)
from utils.reinforce.distributed import processes


class Run(RunFolder):
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
            "name": self.label,
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
    label, info, damage = f"[{run_label(directory)}]", {}, None
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
