"""What a run ran on, and which messages are silenced."""

import subprocess
import sys

import torch

from utils.environment import environment, peak_rss_gb


def test_quiet_hides_the_known_messages_and_no_others():
    code = """
import logging, warnings
from utils.environment import quiet
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
