"""What a run ran on: versions, device, memory and commit; and which known noise is silenced."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import resource
import subprocess
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"  # what is published
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


def peak_rss_gb() -> float:
    """Return the peak resident memory of this process in GB (10^9 bytes)."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def device_name() -> str:
    """Return the accelerator's name, or the kind and number of CPU cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def _git_state() -> dict[str, Any]:
    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {"git_commit": git("rev-parse", "HEAD") or None, "git_dirty": bool(git("status", "-s"))}
