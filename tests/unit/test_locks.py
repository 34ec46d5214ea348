"""Two processes and one run: the second is told who has the folder, and a dead one has nothing."""

import errno
import json
import os
import platform
import subprocess
import sys
from contextlib import contextmanager

import pytest
from filelock import FileLock

from utils.experiments import locks
from utils.experiments.locks import FolderInUse, hold, release
from utils.experiments.storage import Run, prepare
from utils.files import ROOT

CONFIG = {"seed": 0}
HERE = platform.node()
CHILD = """
import sys, time
from pathlib import Path
from utils.experiments.storage import Run, prepare
directory = Path(sys.argv[1])
state = prepare(directory, {"seed": 0})
Run(directory, {"seed": 0}, 0, "f" * 16)
print(state, flush=True)
time.sleep(600)
"""


@contextmanager
def other_process(directory):
    """Another process that has prepared the run and trains it; killed at the end."""
    command = [sys.executable, "-c", CHILD, str(directory)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "new\n"
        try:
            yield child
        finally:
            child.kill()


def leave_note(directory, idle, **owner):
    """Write what another process left, `idle` seconds ago."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run.json").write_text("{}")
    note = directory.parent / ".locks" / f"{directory.name}.json"
    note.parent.mkdir(exist_ok=True)
    note.write_text(json.dumps(owner))
    then = note.stat().st_mtime - idle
    for path in (note, directory / "run.json"):
        os.utime(path, (then, then))
    return note


def no_locks(self, *_, **__):
    raise OSError(errno.ENOTSUP, "Operation not supported")


def test_the_second_process_is_told_who_has_the_folder_until_that_one_dies(tmp_path):
    directory = tmp_path / "align_scalar"
    with other_process(directory) as child:
        for config in (CONFIG, {"seed": 1}):  # the folder is not set aside from under a run, either
            with pytest.raises(FolderInUse) as caught:
                prepare(directory, config)
        message = str(caught.value)
        assert message.startswith(
            f"{directory.as_posix()} is in use by process {child.pid} on {HERE}"
        )
        assert "wait until it has finished, or stop it" in message
        assert "delete" not in message, "there is nothing to delete on one machine"
        assert (directory / "run.json").exists()
    assert prepare(directory, CONFIG) == "resume", "a killed process still has the folder"
    Run(directory, CONFIG, 0, "f" * 16).finish()


def test_a_finished_run_is_read_whoever_has_its_folder(tmp_path):
    directory = tmp_path / "align_scalar"
    with other_process(directory):
        Run(directory, CONFIG, 0, "f" * 16).finish()
        assert prepare(directory, CONFIG) == "reuse"


def test_one_process_may_open_a_stage_twice_and_gives_it_back_at_the_end(tmp_path):
    directory = tmp_path / "align_scalar"
    assert hold(directory)
    assert not hold(directory)
    assert [prepare(directory, CONFIG) for _ in range(2)] == ["new", "new"]
    run = Run(directory, CONFIG, 0, "f" * 16)
    assert prepare(directory, CONFIG) == "resume"
    run.finish()
    assert directory not in locks._held
    assert [path.name for path in (tmp_path / ".locks").iterdir()] == ["align_scalar.lock"]
    with other_process(directory / "test"):
        assert prepare(directory, CONFIG) == "reuse", "runs do not share a lock"


def test_another_machine_that_writes_has_the_folder(tmp_path):
    """On a mounted Drive the lock of one machine is not seen by the other, its note is."""
    directory = tmp_path / "align_scalar"
    note = leave_note(directory, locks.STALE - 60, pid=4, host="elsewhere")
    with pytest.raises(
        FolderInUse, match=r"process 4 on elsewhere: .* delete .*align_scalar\.json"
    ):
        hold(directory)
    note.unlink()  # as the message says
    assert hold(directory)
    assert json.loads(note.read_text()) == {"pid": os.getpid(), "host": HERE}
    release(directory)
    leave_note(directory, locks.STALE + 60, pid=4, host="elsewhere")
    assert hold(directory), "a machine that is gone still has the folder"
    release(directory)
    leave_note(directory, locks.STALE + 60, pid=4, host="elsewhere")
    (directory / "metrics.csv").write_text("step\n1\n")
    with pytest.raises(FolderInUse):
        hold(directory)


def test_a_disk_without_locks_is_used_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FileLock, "acquire", no_locks)
    directory = tmp_path / "align_scalar"
    leave_note(directory, 0, pid=os.getppid(), host=HERE)  # a process that runs
    with pytest.raises(FolderInUse):
        hold(directory)
    leave_note(directory, 0, pid=2**22 + 1, host=HERE)  # one that cannot be there
    assert hold(directory)
    assert "[align_scalar] no lock on this disk" in capsys.readouterr().out
    release(directory)


@pytest.mark.parametrize("content", ["", "{"])
def test_a_note_that_was_cut_short_is_nobodys(tmp_path, content):
    directory = tmp_path / "align_scalar"
    leave_note(directory, 0).write_text(content)
    assert hold(directory)
    release(directory)
