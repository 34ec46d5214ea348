"""What a run ran on, and which messages are silenced."""

import os
import subprocess
import sys

import pytest
import torch

from utils.experiments.environment import environment, peak_rss_gb


def test_quiet_hides_the_known_messages_and_no_others():
    code = """
import logging, warnings
from utils.experiments.environment import quiet
quiet()
quiet()
import bitsandbytes
warnings.warn("`is_gradient_checkpointing` is deprecated and will go", FutureWarning)
warnings.warn("another deprecation", FutureWarning)
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("another message")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert "gemm_4bit_forward" not in done.stderr
    assert "is_gradient_checkpointing" not in done.stderr
    assert "another deprecation" in done.stderr
    assert "another message" in done.stderr


def test_environment_names_what_it_ran_on():
    found = environment()
    assert found["versions"]["torch"] == torch.__version__
    assert found["device"]
    assert isinstance(found["git_dirty"], bool)
    assert 0.05 < peak_rss_gb() < 1000


def test_a_machine_without_git_is_no_crash(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = environment()
    assert (found["git_commit"], found["git_dirty"]) == (None, False)


def test_it_needs_no_module_that_windows_lacks():
    code = "import psutil, sys, torch; sys.modules['resource'] = None\n"
    code += "import utils.experiments.environment"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_peak_is_that_of_the_process_asked_for():
    block = bytearray(200_000_000)
    peak = peak_rss_gb()
    del block
    assert peak_rss_gb(os.getpid()) >= peak > 0.2, "not the memory now"
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert 0 < peak_rss_gb(child.pid) < 0.1
        child.kill()
    assert peak_rss_gb(2**22 + 1) == 0, "no such process"
