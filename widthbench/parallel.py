"""One run in several processes, a GPU each: all do the same, training shares each batch, the first
one writes.

Started by ``torchrun`` or ``accelerate launch``; accelerate sets the processes up (nccl between
GPUs, gloo between CPUs). In a plain process everything here is a no-op. Nothing heavy is imported
before it is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
_state: Any = None
_shared = (1, 1)


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start(*, cpu: bool | None = None) -> None:
    """Join the other processes, where there are any.

    Args:
        cpu: Talk between CPUs; None: where there is no GPU.
    """
    global _state
    if not launched() or _state is not None:
        return
    import torch
    from accelerate import PartialState

    _state = PartialState(cpu=not torch.cuda.is_available() if cpu is None else cpu)


def stop() -> None:
    """Leave the other processes."""
    global _state
    if _state is not None:
        _state.destroy_process_group()
        _state = None


def world() -> int:
    """Number of processes."""
    return 1 if _state is None else int(_state.num_processes)


def rank() -> int:
    """This process's place among them."""
    return 0 if _state is None else int(_state.process_index)


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if _state is not None:
        _state.wait_for_everyone()


def broadcast(find: Callable[[], T], *, everywhere: bool = False) -> T:
    """What the first process finds, in all of them.

    Args:
        find: Called in the first process.
        everywhere: Call it in all of them, where finding needs all.
    """
    if _state is None:
        return find()
    from accelerate.utils import broadcast_object_list

    value = [find() if is_main() or everywhere else None]
    broadcast_object_list(value)
    return value[0]  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """Each process's value, in their order."""
    if _state is None:
        return [value]
    from accelerate.utils import gather_object

    values: list[T] = gather_object([value])
    return values


@contextmanager
def held(lock: AbstractContextManager[Any]) -> Iterator[None]:
    """Hold a lock that the first process takes for all."""
    if not is_main():
        barrier()
        yield
        return
    with lock:
        barrier()
        yield


def add_up(tensors: Sequence[Tensor]) -> None:
    """Sum tensors of one device over all processes, in place."""
    if _state is None or not tensors:
        return
    import torch
    from accelerate.utils import reduce
    from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

    by_type: dict[torch.dtype, list[Tensor]] = {}
    for t in tensors:
        by_type.setdefault(t.dtype, []).append(t)
    for some in by_type.values():
        total = reduce(_flatten_dense_tensors([t.contiguous() for t in some]), "sum")
        for t, new in zip(some, _unflatten_dense_tensors(total, some), strict=True):
            t.copy_(new)


def part(count: int) -> slice:
    """This process's part of a batch of so many samples: consecutive, sizes equal but for one."""
    each, more = divmod(count, world())
    begin = rank() * each + min(rank(), more)
    return slice(begin, begin + each + (rank() < more))


@contextmanager
def sharing(whole: int, mine: int) -> Iterator[None]:
    """A step on this process's part of a batch: bills count the whole batch.

    Args:
        whole: Samples in the batch.
        mine: Of them, this process's.
    """
    global _shared
    before, _shared = _shared, (whole, mine)
    try:
        yield
    finally:
        _shared = before


@contextmanager
def alike() -> Iterator[None]:
    """Work inside such a step that every process does in full: bills count it as it is."""
    with sharing(1, 1):
        yield


def billed(samples: int) -> int:
    """Samples that a bill counts for so many that pass through this process."""
    whole, mine = _shared
    return round(samples * whole / mine)


def batch_statistics() -> AbstractContextManager[Any]:
    """Within it, BatchNorm in training mode normalises by the statistics of all processes' parts of
    a batch.

    ``SyncBatchNorm`` does this on GPUs only, and would replace layers that techniques hold on to.
    """
    from contextlib import nullcontext

    if _state is None:
        return nullcontext()
    from widthbench._shared_statistics import SharedStatistics

    return SharedStatistics()
