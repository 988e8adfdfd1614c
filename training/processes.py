"""The processes of a run: one, or as many as `accelerate launch` starts, each with its own device.

Every process runs the same code. Only process 0 writes; the others call `wait` and then read its files.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import nn

T = TypeVar("T")
PATIENCE = timedelta(hours=12)
"""How long processes wait for one that is writing, fitting or evaluating alone."""


def state() -> PartialState:
    """Rank, count and device of this process. Without a launcher: rank 0 of 1, on a GPU if there is one."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def device() -> torch.device:
    """The device of this process."""
    current: torch.device = state().device
    return current


def is_main() -> bool:
    """Whether this is process 0, which writes."""
    return bool(state().is_main_process)


def wait() -> None:
    """Block until every process has called this."""
    state().wait_for_everyone()


def parallel(model: nn.Module) -> nn.Module:
    """The model on this process's device, its gradients averaged over all processes (DistributedDataParallel)."""
    on_cpu = state().device.type == "cpu"
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    wrapped: nn.Module = accelerator.prepare_model(model)
    return wrapped


def gather(mine: Sequence[T]) -> list[T]:
    """The items of all processes, concatenated; the same in every process."""
    joined: list[T] = list(mine) if state().num_processes == 1 else gather_object(list(mine))
    return joined
