"""Execute the notebooks in order, and publish what a finished sequence made.

    python -m utils.run --profile quick               all notebooks
    python -m utils.run --profile quick --only 02 04  some of them
    python -m utils.run --profile quick --publish     copy the evidence to results/ and notebooks/
    python -m utils.run --profile own/mine.json       a profile of one's own, into runs/mine

Executed copies go to runs/<profile>/notebooks. The notebooks themselves change only by --publish.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient.exceptions import CellExecutionError, DeadKernelError

from utils.config import ConfigError
from utils.kernel import ReportClient, say
from utils.profiles import PROFILES, load_profile
from utils.publish import RunError, clean, list_notebooks, publish, read_record, write_file

REPO = Path(__file__).resolve().parents[1]
# Defaults for the kernels: large blocks stay with the process, which saves page faults on a CPU.
KERNEL_ENVIRONMENT = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_MMAP_THRESHOLD_": "8000000000",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "REPORT_WIDGETS": "0",  # nobody is looking: plain text instead of a live view
}


def execute(path: Path, profile: str, root: Path) -> dict[str, float]:
    """Execute one notebook into runs/<profile>/notebooks and return its cost.

    The kernel reads the profile from REPORT_PROFILE, which `main` has set.

    Raises:
        RunError: if a cell fails, the kernel dies, or the user stops it; what was executed is
            then in runs/<profile>/failed.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    client = ReportClient(notebook, path.parent)
    folder, started = root / "runs" / profile, time.monotonic()
    done, partial = folder / "notebooks" / path.name, folder / "failed" / path.name
    try:
        client.execute(env={**KERNEL_ENVIRONMENT, **os.environ})
        if client.stopped:  # the last cell survived the signal, but hardly its work
            raise RunError("stopped", 130)
    except (CellExecutionError, DeadKernelError, RunError) as error:
        write_file(partial, nbformat.writes(clean(notebook, profile, root)) + "\n")
        saved = f"what was executed is in {partial.relative_to(root)}"
        if client.stopped:
            raise RunError(f"stopped in {path.name}; {saved}", 130) from None
        reason = "the kernel died, most often for lack of memory"
        if isinstance(error, CellExecutionError):
            reason = f"{error.ename}: {error.evalue}".strip().splitlines()[-1]
        where = f"{path.name}, code cell {client.position} of {client.code_cells}"
        raise RunError(f"FAILED {where} ({client.heading}): {reason}\n{saved}") from None
    write_file(done, nbformat.writes(clean(notebook, profile, root)) + "\n")
    partial.unlink(missing_ok=True)
    seconds = round(time.monotonic() - started, 1)
    return {"seconds": seconds, "peak_rss_gb": round(client.peak_rss_gb, 2)}


def run(paths: Sequence[Path], profile: str, root: Path) -> None:
    """Execute notebooks in order, with the time used and left, and print what came out of it.

    `times.json` has the last duration of each notebook. `cost.json` has the largest, because a
    repeated run that reuses artefacts is not what the work costs; `make clean` resets it.
    """
    folder, started = root / "runs" / profile, time.monotonic()
    times, cost = read_record(folder / "times.json"), read_record(folder / "cost.json")
    measured: dict[str, dict[str, float]] = {}
    for number, path in enumerate(paths, 1):
        left = _left([rest.stem for rest in paths[number - 1 :]], times, list(measured))
        elapsed = _minutes(time.monotonic() - started)
        say(f"== {path.stem} ({number} of {len(paths)}), {elapsed} so far{left}")
        measured[path.stem] = now = execute(path, profile, root)
        times[path.stem] = now["seconds"]
        before = cost.get(path.stem, now)
        cost[path.stem] = {name: max(now[name], before[name]) for name in now}
        write_file(folder / "times.json", json.dumps(times, indent=1) + "\n")
        write_file(folder / "cost.json", json.dumps(cost, indent=1) + "\n")
        say(f"== {path.stem} done in {_minutes(now['seconds'])}")
    say(f"\nfinished in {_minutes(time.monotonic() - started)}")
    for name, values in measured.items():
        say(f"  {name:<32} {_minutes(values['seconds']):>9}  peak {values['peak_rss_gb']:.2f} GB")
    shown = folder.relative_to(root).as_posix()
    say(f"notebooks  {shown}/notebooks\nfigures    {shown}/figures\ntables     {shown}/tables")
    say(f"runs       {shown}/<run>")
    if profile in PROFILES:
        say(f"to publish all of it: make publish PROFILE={profile}")


def main(arguments: Sequence[str] | None = None, root: Path = REPO) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chosen = os.environ.get("REPORT_PROFILE") or "quick"
    profiles = " | ".join([*PROFILES, "a JSON file"])
    parser.add_argument("--profile", default=chosen, help=profiles)
    parser.add_argument("--only", nargs="+", metavar="NN", help="notebooks, by their first letters")
    parser.add_argument("--publish", action="store_true", help="copy runs/<profile> to results/")
    parser.add_argument("--list", action="store_true", help="list the notebooks and stop")
    options = parser.parse_args(arguments)
    try:
        profile = _chosen_profile(options.profile)
        paths = list_notebooks(root, options.only)
        if not paths:
            raise RunError("there are no notebooks")
        if options.list:
            times = read_record(root / "runs" / profile / "times.json")
            for path in paths:
                say(f"{path.stem:<32} {_minutes(times[path.stem]) if path.stem in times else '-'}")
        elif options.publish:
            if profile not in PROFILES:
                raise RunError(
                    f"{options.profile} is not published: that would replace the results and "
                    f"outputs of the report; what it made stays in runs/{profile}",
                    2,
                )
            publish(profile, root)
        else:
            run(paths, profile, root)
    except (RunError, KeyboardInterrupt) as error:
        code = error.code if isinstance(error, RunError) else 130
        print(str(error) or "stopped", file=sys.stderr)
        if code == 130:
            print("finished artefacts are kept; the same command continues", file=sys.stderr)
        return code
    return 0


def _chosen_profile(choice: str) -> str:
    """Make the choice that of the kernels, too, check it, and return the profile's name."""
    os.environ["REPORT_PROFILE"] = choice
    try:
        return load_profile().name
    except ConfigError as error:
        raise RunError(str(error), 2) from None


def _left(names: list[str], times: dict[str, float], measured: list[str]) -> str:
    """Estimate the time of `names`; an unknown notebook counts as the mean of those measured."""
    typical = sum(times[name] for name in measured) / len(measured) if measured else None
    expected = [times.get(name, typical) for name in names]
    return "" if None in expected else f", about {_minutes(sum(expected))} left"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


if __name__ == "__main__":
    sys.exit(main())
