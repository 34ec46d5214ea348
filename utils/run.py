"""Execute the notebooks in order, and publish what a finished sequence made.

    python -m utils.run --profile quick               all notebooks
    python -m utils.run --profile quick --only 02 04  some of them
    python -m utils.run --profile quick --publish     copy the evidence to results/ and notebooks/

Executed copies go to runs/<profile>/notebooks. The notebooks themselves change only by --publish.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import psutil
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from traitlets import default

from utils.profiles import PROFILES
from utils.publish import RunError, clean, is_code, list_notebooks, publish, read_record, write_file

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


class OwnKernel(AsyncKernelManager):
    """A kernel of the running interpreter, whatever kernels the user has registered."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """Return the specification of that kernel."""
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, metadata={"supported_encryption": ["curve"]})

    @default("transport_encryption")
    def _encrypt_if_possible(self) -> str:
        return "auto"


class ReportClient(NotebookClient):
    """Executes one notebook, shows its progress and measures its memory."""

    def __init__(self, notebook: NotebookNode, folder: Path) -> None:
        super().__init__(
            notebook,
            timeout=None,
            kernel_name="python3",
            kernel_manager_class=OwnKernel,
            resources={"metadata": {"path": str(folder)}},
            store_widget_state=False,
            record_timing=False,
            coalesce_streams=True,
        )
        self.on_cell_start = self._announce
        self.on_cell_executed = self._measure
        self.code_cells = sum(is_code(cell) for cell in notebook.cells)
        self.position, self.heading, self.peak_rss_gb, self.stopped = 0, "", 0.0, False
        self._unfinished_line = ""

    async def async_start_new_kernel_client(self) -> Any:
        """Start the client; from then on Ctrl-C interrupts the cell, not only this process."""
        client = await super().async_start_new_kernel_client()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError, RuntimeError):
                asyncio.get_running_loop().add_signal_handler(number, self._stop)
        return client

    def output(
        self, outs: list[NotebookNode], msg: dict[str, Any], display_id: str | None, cell_index: int
    ) -> NotebookNode | None:
        """Keep the output, and show at once the progress lines, which start with a bracket."""
        if msg["msg_type"] == "stream" and msg["content"]["name"] == "stdout":
            text = self._unfinished_line + msg["content"]["text"]
            *lines, self._unfinished_line = re.split(r"[\r\n]+", text)
            for line in lines:
                if line.startswith("["):
                    _say(f"    {line}")
        return super().output(outs, msg, display_id, cell_index)

    def _announce(self, cell: NotebookNode, cell_index: int) -> None:
        if self.stopped:  # the signal came between two cells, or the cell survived it
            raise RunError("stopped", 130)
        headings = re.findall(r"^#+ +(.+)$", cell.source, re.M) if cell.cell_type != "code" else []
        self.heading = headings[0] if headings else self.heading
        if is_code(cell):
            self.position += 1
            _say(f"  cell {self.position}/{self.code_cells}  {self.heading}")

    def _measure(self, cell: NotebookNode, cell_index: int, execute_reply: Any) -> None:
        pid = getattr(self.km.provisioner, "pid", None) if self.km else None
        if pid:
            self.peak_rss_gb = max(self.peak_rss_gb, kernel_peak_gb(pid))

    def _stop(self) -> None:
        end = self.km.shutdown_kernel(now=True) if self.stopped else self.km.interrupt_kernel()
        self._ending = asyncio.ensure_future(end)
        self.stopped = True


def kernel_peak_gb(pid: int) -> float:
    """Return the peak memory of a process in GB (on systems that keep no peak: its memory now)."""
    with contextlib.suppress(OSError):
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(peak[1]) / 1024**2 if peak else 0.0
    with contextlib.suppress(psutil.Error):
        memory = psutil.Process(pid).memory_info()
        return getattr(memory, "peak_wset", memory.rss) / 1024**3
    return 0.0


def execute(path: Path, profile: str, root: Path) -> dict[str, float]:
    """Execute one notebook into runs/<profile>/notebooks and return its cost.

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
        client.execute(env={**KERNEL_ENVIRONMENT, **os.environ, "REPORT_PROFILE": profile})
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
        _say(f"== {path.stem} ({number} of {len(paths)}), {elapsed} so far{left}")
        measured[path.stem] = now = execute(path, profile, root)
        times[path.stem] = now["seconds"]
        before = cost.get(path.stem, now)
        cost[path.stem] = {name: max(now[name], before[name]) for name in now}
        write_file(folder / "times.json", json.dumps(times, indent=1) + "\n")
        write_file(folder / "cost.json", json.dumps(cost, indent=1) + "\n")
        _say(f"== {path.stem} done in {_minutes(now['seconds'])}")
    _say(f"\nfinished in {_minutes(time.monotonic() - started)}")
    for name, values in measured.items():
        _say(f"  {name:<32} {_minutes(values['seconds']):>9}  peak {values['peak_rss_gb']:.2f} GB")
    shown = folder.relative_to(root).as_posix()
    _say(f"notebooks  {shown}/notebooks\nfigures    {shown}/figures\ntables     {shown}/tables")
    _say(f"runs       {shown}/<run>\nto publish all of it: make publish PROFILE={profile}")


def main(arguments: Sequence[str] | None = None, root: Path = REPO) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chosen = os.environ.get("REPORT_PROFILE") or "quick"
    parser.add_argument("--profile", default=chosen, help=" | ".join(PROFILES))
    parser.add_argument("--only", nargs="+", metavar="NN", help="notebooks, by their first letters")
    parser.add_argument("--publish", action="store_true", help="copy runs/<profile> to results/")
    parser.add_argument("--list", action="store_true", help="list the notebooks and stop")
    options = parser.parse_args(arguments)
    try:
        if options.profile not in PROFILES:
            raise RunError(f"unknown profile {options.profile!r}: {', '.join(PROFILES)}", 2)
        paths = list_notebooks(root, options.only)
        if not paths:
            raise RunError("there are no notebooks")
        if options.list:
            times = read_record(root / "runs" / options.profile / "times.json")
            for path in paths:
                _say(f"{path.stem:<32} {_minutes(times[path.stem]) if path.stem in times else '-'}")
        elif options.publish:
            publish(options.profile, root)
        else:
            run(paths, options.profile, root)
    except (RunError, KeyboardInterrupt) as error:
        code = error.code if isinstance(error, RunError) else 130
        print(str(error) or "stopped", file=sys.stderr)
        if code == 130:
            print("finished artefacts are kept; the same command continues", file=sys.stderr)
        return code
    return 0


def _left(names: list[str], times: dict[str, float], measured: list[str]) -> str:
    """Estimate the time of `names`; an unknown notebook counts as the mean of those measured."""
    typical = sum(times[name] for name in measured) / len(measured) if measured else None
    expected = [times.get(name, typical) for name in names]
    return "" if None in expected else f", about {_minutes(sum(expected))} left"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
