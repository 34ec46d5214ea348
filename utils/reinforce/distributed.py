"""Several processes on one run: rows are shared out, numbers are gathered, one process writes.

`accelerate launch` starts the processes. Without it there is one, and nothing here costs anything.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn

from utils.config import ConfigError


def processes() -> PartialState:
    """Return accelerate's view of the processes; the first call connects them."""
    return PartialState(cpu=not torch.cuda.is_available())


def own_rows(rows: int) -> range:
    """Return the rows of a batch that are this process's part: every n-th.

    Raises:
        ConfigError: if there are fewer rows than processes.
    """
    state = processes()
    if rows < state.num_processes:
        raise ConfigError(
            f"{rows} rows cannot be shared by {state.num_processes} processes; raise "
            "reinforce.prompts_per_step or launch fewer processes"
        )
    return range(state.process_index, rows, state.num_processes)


def gather_rows(rows: range, columns: Tensor) -> Tensor:
    """Return the columns of all rows of the batch, in their order, on every process.

    Args:
        rows: from `own_rows`.
        columns: fp32 on the CPU, shape (own rows, columns).
    """
    gathered = gather_object(list(zip(rows, columns.tolist(), strict=True)))
    return torch.tensor([values for _, values in sorted(gathered)])


def sum_gradients(parameters: Iterable[nn.Parameter], loss: float) -> float:
    """Add up the gradients of all processes, in place, and return the sum of their losses."""
    if processes().num_processes > 1:
        for parameter in parameters:
            parameter.grad.copy_(reduce(parameter.grad, "sum"))
    return sum(gather_object([loss]))
