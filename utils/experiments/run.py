"""Execute the notebooks in order, and publish what a finished sequence made.

    python -m utils.experiments.run --profile quick  # all notebooks
    python -m utils.experiments.run --profile quick --only 02 04  # some of them
    python -m utils.experiments.run --profile quick --publish  # copy to results/ and notebooks/
    python -m utils.experiments.run --profile own/mine.json  # one's own, into runs/mine

Executed copies go to runs/<profile>/notebooks. The notebooks themselves change only by --publish.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

from utils.config import ConfigError, load_profile
from utils.experiments.environment import peak_rss_gb
from utils.experiments.publish import (
    NUMBERED,
    RunError,
    code_cells,
    publish,
    read_record,
    save_notebook,
)
from utils.files import ROOT as REPO
from utils.files import write_json

# Defaults for the kernels: large blocks stay with the process, which saves page faults on a CPU.
KERNEL_ENVIRONMENT = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_MMAP_THRESHOLD_": "8000000000",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "REPORT_WIDGETS": "0",  # nobody is looking: plain text instead of a live view
}


class ReportClient(NotebookClient):
    """Executes one notebook in a kernel of the running interpreter and shows its progress.

    Ctrl-C interrupts the cell, so that it can save its work; a second one ends the kernel.
    """

    def __init__(self, notebook: NotebookNode) -> None:
        specs = KernelSpecManager(kernel_dirs=[])  # not the kernels that the user has registered
        super().__init__(
            notebook,
            km=AsyncKernelManager(kernel_spec_manager=specs, transport_encryption="auto"),
            record_timing=False,
            coalesce_streams=True,
            on_notebook_start=self._listen,
            on_cell_start=self._announce,
            on_cell_executed=self._measure,
        )
        self.place, self.heading, self.unfinished = 0, "", ""
        self.peak_rss_gb, self.stopped = 0.0, False

    def output(self, outs: Any, msg: dict[str, Any], *where: Any) -> NotebookNode | None:
        """Keep the output, and show at once the progress lines, which start with a bracket."""
        if msg["content"].get("name") == "stdout":
            *lines, self.unfinished = re.split("[\r\n]+", self.unfinished + msg["content"]["text"])
            for line in lines:
                if line.startswith("["):
                    print(f"    {line}", flush=True)
        return super().output(outs, msg, *where)

    def _listen(self, **_: Any) -> None:
        with contextlib.suppress(RuntimeError):  # Windows has no such handlers
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._stop)

    def _stop(self) -> None:
        end = self.km.shutdown_kernel(now=True) if self.stopped else self.km.interrupt_kernel()
        self.stopped, self._ending = True, asyncio.ensure_future(end)

    def _announce(self, cell: NotebookNode, **_: Any) -> None:
        if self.stopped:  # the cell before has survived the signal
            raise RunError("stopped")
        if cell.cell_type == "code":
            self.place += 1
            print(f"  cell {self.place}/{len(code_cells(self.nb))}  {self.heading}", flush=True)
        elif heading := re.search(r"^#+ +(.+)$", cell.source, re.M):
            self.heading = heading[1]

    def _measure(self, **_: Any) -> None:
        self.peak_rss_gb = max(self.peak_rss_gb, peak_rss_gb(self.km.provisioner.pid))


def execute(path: Path, profile: str, root: Path) -> dict[str, float]:
    """Execute one notebook into runs/<profile>/notebooks, or failed, and return its cost.

    Raises:
        RunError: if a cell fails or the kernel dies.
        KeyboardInterrupt: if the user stops it.
    """
    notebook, started = nbformat.read(path, as_version=4), time.monotonic()
    cells, folder = code_cells(notebook), root / "runs" / profile
    for cell in cells:
        cell.update(outputs=[], execution_count=None)
    client, reason = ReportClient(notebook), ""
    try:
        environment = {**KERNEL_ENVIRONMENT, **os.environ}
        client.execute(env=environment, cwd=str(path.parent), cleanup_kc=True)
    except CellExecutionError as error:
        reason = f"{error.ename}: {error.evalue}".strip().splitlines()[-1]
    except DeadKernelError:
        reason = "the kernel died, most often for lack of memory"
    except RunError:  # stopped between two cells
        pass
    partial = folder / "failed" / path.name
    if reason or client.stopped:
        save_notebook(notebook, partial, profile, root)
        where = f"{path.name}, code cell {client.place} of {len(cells)} ({client.heading})"
        saved = f"what was executed is in {partial.relative_to(root)}"
        if client.stopped:
            raise KeyboardInterrupt(f"stopped in {where}; {saved}")
        raise RunError(f"FAILED {where}: {reason}\n{saved}")
    save_notebook(notebook, folder / "notebooks" / path.name, profile, root)
    partial.unlink(missing_ok=True)
    seconds = round(time.monotonic() - started, 1)
    return {"seconds": seconds, "peak_rss_gb": round(client.peak_rss_gb, 2)}


def run(paths: Sequence[Path], profile: str, root: Path) -> None:
    """Execute notebooks in order, with the time used, and left by what is known of their cost.

    `cost.json` has the largest cost of each notebook, because a repeated run that reuses artefacts
    is not what the work costs; `make clean` resets it.
    """
    folder, started = root / "runs" / profile, time.monotonic()
    cost = read_record(folder / "cost.json")
    known = read_record(root / "results" / profile / "cost.json") | cost
    for number, path in enumerate(paths, 1):
        left = [known.get(rest.stem, {}).get("seconds") for rest in paths[number - 1 :]]
        about = "" if None in left else f", at most {sum(left) / 60:.1f} left"
        used = (time.monotonic() - started) / 60
        print(f"== {path.stem} ({number} of {len(paths)}), {used:.1f} min used{about}", flush=True)
        now = execute(path, profile, root)
        before = cost.get(path.stem, now)
        cost[path.stem] = {name: max(now[name], before[name]) for name in now}
        write_json(folder / "cost.json", cost)
        print(f"== done in {now['seconds']:.0f} s, peak {now['peak_rss_gb']:.2f} GB", flush=True)
    minutes = (time.monotonic() - started) / 60
    print(f"finished in {minutes:.1f} min; all that was made is in runs/{profile}")


def main(arguments: Sequence[str] | None = None, root: Path = REPO) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.experiments.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = os.environ.get("REPORT_PROFILE") or "quick"
    parser.add_argument("--profile", default=default, help="its name, or a JSON file")
    parser.add_argument("--only", nargs="+", default=[""], help="notebooks, by their first letters")
    parser.add_argument("--publish", action="store_true", help="copy runs/<profile> to results/")
    options = parser.parse_args(arguments)
    os.environ["REPORT_PROFILE"] = options.profile  # the kernels take it from there
    try:
        profile, paths = load_profile().name, sorted((root / "notebooks").glob(NUMBERED))
        chosen = [path for path in paths if path.name.startswith(tuple(options.only))]
        if not chosen:
            known = ", ".join(path.stem for path in paths)
            raise RunError(f"no notebook starts with {' or '.join(options.only)}: {known}")
        publish(profile, root) if options.publish else run(chosen, profile, root)
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"{error}\nwhat is finished is kept; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
