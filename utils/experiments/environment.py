"""What a run ran on: versions, device, memory and commit; and which known noise is silenced."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import re
import subprocess
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch

from utils.files import ROOT

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "numpy")


def environment() -> dict[str, Any]:
    """Return versions, device, threads, and the commit with its dirty flag."""
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        **_git_state(),
    }


def quiet() -> None:
    """Silence three known messages that a reader can do nothing about, and no others.

    A missing optional 4-bit CPU kernel of bitsandbytes (the weights are expanded on a CPU anyway),
    a deprecation inside peft and trl, and progress bars, whose widgets break committed notebooks.
    May be called before or after the libraries are imported, and more than once.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_no_kernel_message)
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _no_kernel_message(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")


def peak_rss_gb(pid: int | None = None) -> float:
    """Return the peak resident memory of a process (None: this one) in GB (10^9 bytes).

    Where the system keeps no peak (macOS), it is the memory now; 0 if there is no such process.
    """
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid or os.getpid()}/status").read_text()
        if peak := re.search(r"VmHWM:\s+(\d+) kB", status):
            return round(int(peak[1]) * 1024 / 1e9, 3)
    with contextlib.suppress(psutil.Error):
        memory = psutil.Process(pid).memory_info()
        return round(getattr(memory, "peak_wset", memory.rss) / 1e9, 3)
    return 0.0


def device_name() -> str:
    """Return the accelerator's name, or the kind and number of CPU cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def _git_state() -> dict[str, Any]:
    def git(*args: str) -> str:
        with contextlib.suppress(OSError):  # no git on this machine
            command = ["git", *args]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            return done.stdout.strip()
        return ""

    return {"git_commit": git("rev-parse", "HEAD") or None, "git_dirty": bool(git("status", "-s"))}
