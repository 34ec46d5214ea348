"""Runs on disk: what survives a full disk or a kill, and when a run is used again."""

import errno
import gzip
import json
import os
from pathlib import Path

import pytest

from utils.experiments.storage import Run, prepare
from utils.files import (
    ResultsError,
    atomic_write,
    read_json,
    read_jsonl,
    stored,
    write_json,
    write_jsonl,
)

CONFIG = {"seed": 0, "reward.epochs": 1.0}


def start(directory, config=CONFIG):
    return Run(directory, config, seed=0, data_fingerprint="f" * 16)


def full_disk(path):
    path.write_text("half of")
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_in_a_folder(path):
    path.mkdir()
    (path / "weights").write_text("half of")
    # safetensors and torch wrap the system's error in their own
    raise RuntimeError("Error while serializing: No space left on device (os error 28)")


# Writing


@pytest.mark.parametrize("write", [full_disk, full_disk_in_a_folder])
def test_a_full_disk_keeps_the_old_file(tmp_path, write):
    path = tmp_path / "run.json"
    path.write_text("old")
    with pytest.raises(ResultsError, match=r"the disk is full: run.json .* last version was kept"):
        atomic_write(path, write)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"], "a partial file is left"


def test_an_interrupt_leaves_the_old_file_and_nothing_else(tmp_path):
    def interrupted(path):
        path.write_text("half of")
        raise KeyboardInterrupt

    path = tmp_path / "deep" / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, interrupted)
    assert read_json(path) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_what_a_kill_left_is_removed_when_it_is_old(tmp_path):
    old, new = (tmp_path / f".run.json.{name}.partial" for name in ("0a", "1b"))
    other = tmp_path / ".metrics.csv.0a.partial"
    for path in (old, new, other):
        path.write_text("half of")
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    write_json(tmp_path / "run.json", {"a": 2})
    assert set(tmp_path.iterdir()) == {tmp_path / "run.json", new, other}, (
        "one may be being written"
    )


def test_two_that_write_at_once_do_not_share_a_temporary_file(tmp_path):
    def write(path):
        path.write_text("first")
        write_json(tmp_path / "run.json", "second")
        assert path.read_text() == "first"

    atomic_write(tmp_path / "run.json", write)
    assert (tmp_path / "run.json").read_text() == "first"


def test_a_folder_that_cannot_be_replaced_is_put_back(tmp_path, monkeypatch):
    path, replace = tmp_path / "adapter", Path.replace
    path.mkdir()
    (path / "weights").write_text("old")

    def refuse(source, target):
        if source.suffix == ".partial":
            raise PermissionError(errno.EACCES, "Permission denied")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError):
        atomic_write(path, lambda p: p.mkdir())
    assert (path / "weights").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


# Reading


@pytest.mark.parametrize("content", [b"", b'{"status": "fini', b"\xff\xfe\x00"])
def test_a_damaged_run_json(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ResultsError, match=r"run\.json is cut short or damaged"):
        read_json(tmp_path / "run.json")


def test_samples_round_trip(tmp_path):
    texts = ["Grüße, 世界 🙂", 'a "quote"\nand\ta line', "\u2028 \x85 \x1c \r\n", ""]
    rows = [{"text": text, "reward": 0.5, "finished": True} for text in texts]
    write_jsonl(tmp_path / "samples.jsonl", rows)
    assert read_jsonl(tmp_path / "samples.jsonl") == rows
    raw = (tmp_path / "samples.jsonl").read_bytes()
    assert "Grüße, 世界".encode() in raw, "readable text, not escapes"
    assert raw.count(b"\n") == len(rows)
    (tmp_path / "samples.jsonl.gz").write_bytes(gzip.compress(raw))
    assert stored(tmp_path / "samples.jsonl").name == "samples.jsonl", "a plain file comes first"
    (tmp_path / "samples.jsonl").unlink()
    assert read_jsonl(tmp_path / "samples.jsonl") == rows


# Runs


def test_a_run_records_where_it_came_from(tmp_path):
    run = start(tmp_path / "a")
    run.finish(note="done")
    info = read_json(tmp_path / "a" / "run.json")
    assert info["status"] == "finished"
    assert info["note"] == "done"
    assert info["config"] == CONFIG
    assert {"torch", "trl", "peft"} <= set(info["versions"])
    assert {"device", "python", "git_commit", "git_dirty", "seconds"} <= set(info)
    assert 0.05 < info["peak_rss_gb"] < 100
    assert str(tmp_path) not in json.dumps(info)


@pytest.mark.parametrize("profile", ["runs/cpu", "results/quick", "results/own/mine"])
def test_messages_name_a_run_by_its_path_below_the_profile(tmp_path, profile):
    for label in ("policies/scalar/seed0", "policies/scalar/seed0/test", "ensemble/margin_fold1"):
        assert start(tmp_path / profile / label).label == label
    assert start(tmp_path / "align").label == "align"


HEAD = "step,loss,kl\n"
ROWS = ["1,0.5,0.1\n", "2,0.4,0.2\n", "3,0.3,0.3\n"]


@pytest.mark.parametrize(
    ("text", "step", "left"),
    [
        (HEAD + "".join(ROWS), 2, HEAD + "".join(ROWS[:2])),
        (HEAD + "".join(ROWS), 0, HEAD),
        (HEAD + ROWS[0] + "2,0.4", 2, HEAD + ROWS[0]),  # torn
        (HEAD + ROWS[0] + "2,0.4,0.", 2, HEAD + ROWS[0]),  # torn within the last value
        (HEAD + ROWS[0] + "2,0.4" + ROWS[2], 3, HEAD + ROWS[0]),  # torn, then appended to
        ("step,lo", 2, None),  # torn within the header
        (None, 2, None),
    ],
)
def test_rewind(tmp_path, text, step, left):
    run = start(tmp_path / "a")
    path = tmp_path / "a" / "metrics.csv"
    if text is not None:
        path.write_text(text)
    run.rewind(step)
    assert (path.read_text() if path.exists() else None) == left
    run.log({"step": step + 1, "loss": 0.25, "kl": 0.5})
    assert path.read_text() == (left or HEAD) + f"{step + 1},0.25,0.5\n"
    assert run.metrics().step.iloc[-1] == step + 1


# New, resume or reuse


def test_prepare_new_resume_reuse(tmp_path, capsys):
    directory = tmp_path / "reward"
    assert prepare(directory, CONFIG) == "new"
    run = start(directory)
    assert prepare(directory, CONFIG) == "resume"
    assert "[reward] unfinished" in capsys.readouterr().out
    run.finish()
    assert prepare(directory, CONFIG) == "reuse"
    out = capsys.readouterr().out
    assert "[reward] reuse" in out
    assert run.info["config_hash"] in out


def test_a_different_configuration_is_never_reused(tmp_path, capsys):
    directory = tmp_path / "reward"
    run = start(directory)
    run.finish()
    changed = CONFIG | {"reward.epochs": 2.0, "reward.new": True}
    assert prepare(directory, changed) == "new"
    out = capsys.readouterr().out
    assert "reward.epochs: was 1.0, now 2.0" in out
    assert "reward.new: was None, now True" in out
    assert "seed" not in out, "fields that agree are not printed"
    assert not directory.exists()
    aside = tmp_path / f"reward@{run.info['config_hash']}"
    assert read_json(aside / "run.json")["config"] == CONFIG


def test_nothing_that_was_set_aside_is_deleted(tmp_path):
    directory = tmp_path / "reward"
    for number, config in enumerate((CONFIG, {"seed": 1}, CONFIG, {"seed": 1}, CONFIG)):
        assert prepare(directory, config) == "new"
        start(directory, config).finish(number=number)
    numbers = {read_json(p / "run.json")["number"] for p in tmp_path.glob("[!.]*")}
    assert numbers == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("content", ['{"status": "fini', "[]", '{"status": "finished"}'])
def test_a_damaged_run_is_set_aside(tmp_path, capsys, content):
    directory = tmp_path / "reward"
    directory.mkdir()
    (directory / "run.json").write_text(content)
    assert prepare(directory, CONFIG) == "new"
    assert "damaged" in capsys.readouterr().out
    assert (tmp_path / "reward@damaged" / "run.json").read_text() == content
