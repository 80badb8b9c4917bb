"""The processes of one run, as `accelerate launch` starts them: how they share work, and how they exchange results.

All of them run the same program on the same model. Each measures its share, and all of them get the whole result. In a
single process every function here returns its argument.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar


if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

T = TypeVar("T")

# The other processes wait while the main one times layers or uploads a checkpoint, which may take long. If it fails,
# the launcher ends them.
LONGEST_WAIT = timedelta(days=1)

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Let every function here do as in a single process, for work that only one of the processes does: an exchange
    in which the others take no part would wait for them for ever."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def rank() -> int:
    """Return the number of this process; the main process is 0."""
    return 0 if _ALONE.get() else _state().process_index


def world_size() -> int:
    """Return the number of processes."""
    return 1 if _ALONE.get() else _state().num_processes


def own_device() -> torch.device:
    """Return the device of this process: its own accelerator, or the CPU where there is none."""
    return _state().device


def is_main() -> bool:
    """Return whether this is the main process, which writes files."""
    return rank() == 0


def launched_as() -> int:
    """Return the number of this process by its launcher's variables; unlike [`rank`], it does not set up processes."""
    return int(os.environ.get("RANK", "0"))


def speaks() -> bool:
    """Return whether this process prints and logs, which the main one does; unlike [`is_main`], it sets up nothing."""
    return launched_as() == 0


def own(items: Sequence[T]) -> Sequence[T]:
    """Return this process's share of the items; neighbouring items belong to different processes."""
    return items[rank() :: world_size()]


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum over processes, which is bit-equal in all of them; `tensor` may be overwritten."""
    import torch

    if world_size() == 1:
        return tensor
    shared = tensor.detach().to(own_device()).contiguous()
    torch.distributed.all_reduce(shared)
    return shared.to(tensor.device)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensors of all processes in the order of their numbers: `[processes, *shape]`."""
    from accelerate.utils import gather

    if world_size() == 1:
        return tensor.detach()[None]
    return gather(tensor.detach().to(own_device())[None].contiguous()).to(tensor.device)


def from_main(make: Callable[[], T]) -> T:
    """Call `make` in the main process only, and return its result, a JSON value, in all processes.

    Raises:
        Exception: in the main process, the error of `make`.
        RuntimeError: in the others, where `make` raised an error.
    """
    if world_size() == 1:
        return make()
    result: dict[str, Any] = {}
    failure: Exception | None = None
    if is_main():
        try:
            with alone():
                result["value"] = make()
        except Exception as error:
            failure, result["error"] = error, f"{type(error).__name__}: {error}"
    result = json.loads(bytes_from_main(json.dumps(result).encode()))
    if failure is not None:
        raise failure
    if "error" in result:
        raise RuntimeError(f"The main process failed: {result['error']}")
    return result["value"]


def tensor_from_main(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Call `make` in the main process only, and return its int64 tensor in all processes; errors are those of
    [`from_main`]."""
    import torch

    if world_size() == 1:
        return make()
    made: list[torch.Tensor] = []

    def shape() -> list[int]:
        made.append(make().cpu())
        return list(made[0].shape)

    sizes = from_main(shape)
    content = made[0].numpy().tobytes() if made else b""
    return torch.frombuffer(bytearray(bytes_from_main(content)), dtype=torch.int64).view(sizes)


def bytes_from_main(content: bytes) -> bytes:
    """Return the main process's `content` in all processes."""
    import torch
    from accelerate.utils import broadcast

    if world_size() == 1:
        return content
    length = broadcast(torch.tensor([len(content)], device=own_device()))
    shared = torch.zeros(int(length), dtype=torch.uint8, device=own_device())
    if is_main() and content:
        shared.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    return broadcast(shared).cpu().numpy().tobytes() if len(shared) else b""


def _state() -> PartialState:
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    if not PartialState._shared_state:
        # Unless `cpu` is set, accelerate treats several processes on a CPU as separate runs.
        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        return PartialState(cpu=on_cpu, **({"timeout": LONGEST_WAIT} if several else {}))
    return PartialState()
