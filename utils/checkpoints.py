"""Checkpoints of a REINFORCE run (adapter, optimiser, baseline, step), and which file is damaged.

The prompt order and the sampling noise are functions of seed and step, so a checkpoint needs no
random state: a resumed run draws what the unbroken one would have drawn.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers.trainer_pt_utils import safe_globals

from utils.environment import ROOT
from utils.estimator import NoBaseline
from utils.results import ResultsError, atomic_write, set_aside

KEPT = 2


class Damaged(ResultsError):
    """A file of a checkpoint that is missing, cut short, or not what was written."""


def read_whole(path: Path) -> bytes:
    """Return the content of a checkpoint's file.

    Raises:
        Damaged: if there is no such file.
        ResultsError: if the disk does not answer; the file is left as it is.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise Damaged(f"{path.name} is missing") from error
    except OSError as error:
        raise _unread(path, error) from error


def read_tensors(path: Path) -> Any:
    """Return what `torch.save` wrote to `path`, on the CPU; no code in the file is run.

    Damage is told by the checksums of the archive, so that it is not mistaken for memory that ran
    out or a file of another version. The types that are read are those that transformers allows
    when it resumes.

    Raises:
        Damaged: if the file is missing, cut short, or changed since it was written.
        ResultsError: if it cannot be read now, or not without running code from it.
    """
    content = io.BytesIO(read_whole(path))
    try:
        broken = zipfile.ZipFile(content).testzip()
    except MemoryError:
        raise
    except Exception as error:  # of many kinds; the content is in memory, so it is at fault
        raise Damaged(f"{path.name} is cut short or damaged: {error}") from error
    if broken is not None:
        raise Damaged(f"{path.name} is damaged: the checksum of {broken} is wrong")
    content.seek(0)
    try:
        with safe_globals():
            return torch.load(content, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise _unread(path, error) from error


def _unread(path: Path, error: Exception) -> ResultsError:
    """Return the error for a file that may be sound, but was not read."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ResultsError(
        f"{path.parent.name}/{path.name} was not read, and left as it is: {reason}. Start again if "
        "the disk did not answer, with the versions of the libraries that wrote it if they have "
        "changed since; move the file away to go on from the checkpoint before"
    )


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
            print(f"[{directory.name}] {error}; set aside as {kept.name}")
            continue
        set_peft_model_state_dict(policy, state["adapter"])
        optimizer.load_state_dict(state["optimizer"])
        baseline.load_state_dict(state["baseline"])
        print(f"[{directory.name}] goes on after step {state['step']}")
        return state["step"]
    return 0


def load_adapter(directory: Path, policy: PeftModel, adapter: str = "default") -> int:
    """Load the newest checkpoint into an adapter of `policy`, and return the checkpoint's step.

    Raises:
        ResultsError: if the run has no checkpoint, or the last one is damaged or cannot be read.
    """
    remedy = f"remove the folder {directory.name} of this run and train the policy again"
    newest = _all(directory)
    if not newest:
        raise ResultsError(f"{directory.name} has no checkpoint; {remedy}")
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
