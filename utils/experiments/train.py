"""Make one stage from the command line: for long runs in the background, and for several GPUs.

    python -m utils.experiments.train reward scalar --profile cpu
    python -m utils.experiments.train align scalar --profile cpu --set reinforce.steps=100
    accelerate launch --num_processes 2 -m utils.experiments.train align scalar --profile full

The stage lands in runs/<profile>, where the notebooks look for it. A stage that was stopped goes on
from its last checkpoint; a finished one is reused.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from utils.config import ConfigError, load_profile
from utils.data.hub import HubError
from utils.data.sources import DataError
from utils.experiments.environment import quiet
from utils.experiments.locks import FolderInUse
from utils.experiments.pipeline import align_stage, reward_stage
from utils.files import ResultsError
from utils.models.memory import MemoryTooSmall
from utils.models.weights import ModelError
from utils.reinforce.distributed import processes
from utils.reinforce.loop import TrainingStopped
from utils.rewards.losses import KINDS

# Errors that speak to the user: a message is enough.
EXPECTED = (ConfigError, DataError, FolderInUse, HubError, MemoryTooSmall, ModelError)
EXPECTED += (ResultsError, TrainingStopped)


def parse_setting(text: str) -> tuple[str, Any]:
    """Split "section.field=value"; the value is JSON, or else a text.

    Raises:
        ConfigError: if there is no "=".
    """
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--set {text!r}: expected section.field=value")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.experiments.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=("reward", "align"))
    parser.add_argument("kind", choices=tuple(KINDS))
    parser.add_argument(
        "--profile", help="a profile or a JSON file (default: that of REPORT_PROFILE, or quick)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="replace one field"
    )
    options = parser.parse_args(arguments)
    quiet()
    if options.profile:  # it wins over the environment
        os.environ["REPORT_PROFILE"] = options.profile
    profile = load_profile(options.profile, dict(map(parse_setting, options.set)))
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        if not processes().is_main_process:  # one process speaks for all
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        if options.stage == "reward":
            _, run = reward_stage(options.kind, profile)
        else:
            _, _, run = align_stage(options.kind, profile, monitor=_show)
        print(f"[{run.label}] finished, in runs/{profile.name}/{run.label}")


def _show(row: dict[str, Any], *_: Any) -> None:
    print(
        f"step {row['step']:4d}  reward {row['reward']:+.3f}  KL {row['kl']:.2f}  length "
        f"{row['completions/mean_length']:.0f}  {row['seconds']:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    except EXPECTED as error:
        sys.exit(f"{type(error).__name__}: {error}")
