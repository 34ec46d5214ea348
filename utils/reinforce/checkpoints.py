"""Checkpoints of a REINFORCE run (adapter, optimiser, baseline, step), and which file is damaged.

The prompt order and the sampling noise are functions of seed and step, so a checkpoint needs no
random state: a resumed run draws what the unbroken one would have drawn.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from utils.files import ROOT, ResultsError, atomic_write, run_label, set_aside
from utils.models.tensors import Damaged, read_tensors
from utils.reinforce.baselines import NoBaseline

KEPT = 2


def save_checkpoint(
    directory: Path,
    step: int,
    policy: PeftModel,
    optimizer: torch.optim.Optimizer,
    baseline: NoBaseline,
) -> None:
    """Write `checkpoints/step-NNNNNN.pt` in `directory`, atomically, and keep the last two."""
    state = {
        "step": step,
        "adapter": get_peft_model_state_dict(policy),
        "optimizer": optimizer.state_dict(),
        "baseline": baseline.state_dict(),
    }
    atomic_write(_folder(directory) / f"step-{step:06d}.pt", lambda path: torch.save(state, path))
    for old in _all(directory)[:-KEPT]:
        old.unlink()


def load_checkpoint(
    directory: Path, policy: PeftModel, optimizer: torch.optim.Optimizer, baseline: NoBaseline
) -> int:
    """Restore the newest sound checkpoint in place and return its step; 0 if there is none.

    A damaged one (a disk that lost power, a copy cut short) is named and set aside, and the one
    before it is tried.

    Raises:
        ResultsError: if a checkpoint cannot be read, but is not known to be damaged.
    """
    for path in reversed(_all(directory)):
        try:
            state = read_tensors(path)
        except Damaged as error:
            kept = set_aside(path, f"damaged-{path.name}")
            print(f"[{run_label(directory)}] {error}; set aside as {kept.name}")
            continue
        set_peft_model_state_dict(policy, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        baseline.load_state_dict(state["baseline"])
        print(f"[{run_label(directory)}] goes on after step {state['step']}")
        return state["step"]
    return 0


def load_adapter(directory: Path, policy: PeftModel, adapter: str = "default") -> int:
    """Load the newest checkpoint into an adapter of `policy`, and return the checkpoint's step.

    Raises:
        ResultsError: if the run has no checkpoint, or the last one is damaged or cannot be read.
    """
    remedy = f"remove the folder {run_label(directory)} of this run and train the policy again"
    newest = _all(directory)
    if not newest:
        raise ResultsError(f"{run_label(directory)} has no checkpoint; {remedy}")
    try:
        state = read_tensors(newest[-1])
    except Damaged as error:
        raise ResultsError(f"{error}; {remedy}") from error
    set_peft_model_state_dict(policy, state["adapter"], adapter_name=adapter)
    return state["step"]


def last_checkpoint(directory: Path) -> str:
    """Say in a sentence which checkpoint of a run is the last one, and where it is."""
    if not (found := _all(directory)):
        return "There is no checkpoint yet."
    newest = found[-1]
    path = newest.relative_to(ROOT) if newest.is_relative_to(ROOT) else newest
    step = int(newest.stem.removeprefix("step-"))
    return f"The last good checkpoint is that of step {step}: {path.as_posix()}."


def _folder(directory: Path) -> Path:
    return directory / "checkpoints"


def _all(directory: Path) -> list[Path]:
    return sorted(_folder(directory).glob("step-*.pt"))
