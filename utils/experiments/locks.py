"""One process at a time writes into a run's folder."""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import BaseFileLock, FileLock, Timeout

from utils.files import ROOT, run_label

STALE = 600.0  # seconds without a write, after which a process on another machine counts as gone
_held: dict[Path, BaseFileLock] = {}


class FolderInUse(RuntimeError):
    """Another process writes into the folder of a run."""


def hold(directory: Path) -> bool:
    """Take a run's folder for this process, until `release` or its end.

    The system drops its lock with the process, however that ends, so a killed one leaves nothing
    to remove. A disk that machines share, such as a mounted Drive, may not carry locks from one to
    the other, or have none at all. There the note beside the lock counts, which names the process;
    it is out of date if the process, on this machine, is gone, or if, on another one, nothing was
    written into the folder for `STALE` seconds.

    Raises:
        FolderInUse: naming the folder, the process that has it, and what to do.
    """
    if directory in _held:
        return False
    note, path = _note(directory), _note(directory).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    # It belongs to the process: any thread of a notebook's kernel may release it.
    lock, owner = FileLock(path, thread_local=False), _read(note)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FolderInUse(_message(directory, owner)) from None
    except (OSError, NotImplementedError) as error:
        label = run_label(directory)
        print(f"[{label}] no lock on this disk ({error}): keep other processes out of it")
    if owner and _alive(owner, directory, lock.is_locked):
        lock.release()
        raise FolderInUse(_message(directory, owner))
    note.write_text(json.dumps({"pid": os.getpid(), "host": platform.node()}))
    _held[directory] = lock
    return True


def release(directory: Path) -> None:
    """Give a folder back, if this process has it."""
    if lock := _held.pop(directory, None):
        _note(directory).unlink(missing_ok=True)
        lock.release()


def _note(directory: Path) -> Path:
    """Return a path beside the folder, since the folder itself may be renamed."""
    return directory.parent / ".locks" / f"{directory.name}.json"


def _read(note: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return json.loads(note.read_text())
    return {}


def _alive(owner: dict[str, Any], directory: Path, locked: bool) -> bool:
    """Tell whether the process of a note still runs; a lock that was got says so on one machine."""
    if owner["host"] != platform.node():
        return _idle_seconds(directory) < STALE
    return not locked and owner["pid"] != os.getpid() and psutil.pid_exists(owner["pid"])


def _idle_seconds(directory: Path) -> float:
    """Return the time since the last write into the folder, or since it was taken."""
    written = []
    for path in (_note(directory), *directory.glob("*")):
        with suppress(OSError):
            written.append(path.stat().st_mtime)
    return time.time() - max(written, default=0.0)


def _message(directory: Path, owner: dict[str, Any]) -> str:
    shown, note = (
        (path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).as_posix()
        for path in (directory, _note(directory))
    )
    who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
    remedy = "wait until it has finished, or stop it (a notebook that was interrupted keeps its "
    remedy += "folder until its kernel is restarted), and start again"
    if owner and owner["host"] != platform.node():
        remedy += f"; if that machine is gone, delete {note}, or wait {STALE / 60:.0f} minutes"
    return f"{shown} is in use by {who}: {remedy}"
