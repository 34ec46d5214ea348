"""What to do when memory runs out: half the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

T = TypeVar("T")


class MemoryTooSmall(RuntimeError):
    """Not even a batch of one fits."""


@dataclass
class BatchSize:
    """A batch size that is halved whenever the device runs out of memory, and stays so.

    Attributes:
        what: names the batch in messages, e.g. "policy update".
        size: rows at a time.
    """

    what: str
    size: int

    def run(self, work: Callable[[int], T]) -> T:
        """Return `work(size)`; after an out-of-memory error, try again with half the size.

        Args:
            work: must be repeatable: nothing that a failed attempt did may count twice.

        Raises:
            MemoryTooSmall: if a batch of one runs out of memory, too.
        """
        while True:
            try:
                return work(self.size)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            # Outside the handler the error is gone, and with its traceback all that the failed
            # attempt had on the device.
            clear_device_cache(garbage_collection=True)
            if self.size == 1:
                raise MemoryTooSmall(
                    f"{self.what}: out of memory with a batch of 1; shorten "
                    "reinforce.max_completion_length or data.max_length, choose a smaller "
                    "model.name, or use a GPU with more memory"
                )
            self.size //= 2
            print(f"[memory] {self.what}: out of memory, going on with {self.size}", flush=True)
