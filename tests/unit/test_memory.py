"""Out of memory: the batch is halved, the work is repeated, and a batch of one names remedies."""

import gc
import weakref

import pytest
import torch

from utils.models.memory import BatchSize, MemoryTooSmall

MESSAGES = (
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory",
)


@pytest.mark.parametrize("message", MESSAGES)
def test_the_batch_is_halved_until_it_fits_and_stays_so(capsys, message):
    batch, tried = BatchSize("rows read", 12), []

    def work(size):
        tried.append(size)
        if size > 3:
            raise RuntimeError(message)
        return f"read {size}"

    assert batch.run(work) == "read 3"
    assert tried == [12, 6, 3]
    assert capsys.readouterr().out.splitlines() == [
        "[memory] rows read: out of memory, going on with 6",
        "[memory] rows read: out of memory, going on with 3",
    ]
    assert batch.run(work) == "read 3"
    assert tried == [12, 6, 3, 3], "what did not fit once is not tried again"


def test_a_batch_of_one_that_does_not_fit_names_the_remedies():
    def work(size):
        raise torch.OutOfMemoryError(MESSAGES[0])

    batch = BatchSize("rows read", 2)
    with pytest.raises(MemoryTooSmall, match=r"^rows read: .*batch of 1.*max_length.*model\.name"):
        batch.run(work)


@pytest.mark.parametrize("error", [RuntimeError("shape '[3]' is invalid"), ValueError("memory")])
def test_other_errors_pass(error):
    def work(size):
        raise error

    batch = BatchSize("rows read", 4)
    with pytest.raises(type(error)) as caught:
        batch.run(work)
    assert caught.value is error
    assert batch.size == 4


def test_a_failed_attempt_is_gone_before_the_next():
    class Held:
        pass

    alive = []

    def work(size):
        assert not any(held() for held in alive), "its tensors would fill the memory again"
        held, self = Held(), Held()
        held.other, self.other = self, held  # a cycle, as trainers have
        alive.append(weakref.ref(held))
        if size > 1:
            raise RuntimeError(MESSAGES[0])
        return size

    gc.disable()
    try:
        assert BatchSize("rows read", 4).run(work) == 1
    finally:
        gc.enable()
    assert len(alive) == 3
