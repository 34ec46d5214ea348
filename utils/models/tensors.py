"""Tensors read from files without running code, and which file is damaged."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_pt_utils import safe_globals

from utils.files import ResultsError


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
