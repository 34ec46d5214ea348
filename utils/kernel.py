"""One notebook in a kernel: its progress, its peak memory, and a Ctrl-C that reaches the cell."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets import default

from utils.environment import peak_rss_gb
from utils.publish import RunError, is_code


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
                    say(f"    {line}")
        return super().output(outs, msg, display_id, cell_index)

    def _announce(self, cell: NotebookNode, cell_index: int) -> None:
        if self.stopped:  # the signal came between two cells, or the cell survived it
            raise RunError("stopped", 130)
        headings = re.findall(r"^#+ +(.+)$", cell.source, re.M) if cell.cell_type != "code" else []
        self.heading = headings[0] if headings else self.heading
        if is_code(cell):
            self.position += 1
            say(f"  cell {self.position}/{self.code_cells}  {self.heading}")

    def _measure(self, cell: NotebookNode, cell_index: int, execute_reply: Any) -> None:
        pid = getattr(self.km.provisioner, "pid", None) if self.km else None
        if pid:
            self.peak_rss_gb = max(self.peak_rss_gb, peak_rss_gb(pid))

    def _stop(self) -> None:
        end = self.km.shutdown_kernel(now=True) if self.stopped else self.km.interrupt_kernel()
        self._ending = asyncio.ensure_future(end)
        self.stopped = True


def say(text: str) -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)
