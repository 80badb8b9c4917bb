"""The processes of one run, as `accelerate launch` starts them: what each does, and how that comes together.

All of them run the same program on the same model, each does its share of the measuring, and all know the whole
result. In a single process every function here returns what it was given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar


if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

T = TypeVar("T")

# The others wait as long as the main process times layers or uploads a checkpoint; a launcher ends those of a run that
# failed.
LONGEST_WAIT = timedelta(days=1)


def rank() -> int:
    """Return the number of this process, from 0; 0 is the main one."""
    return _state().process_index


def world_size() -> int:
    """Return how many processes there are."""
    return _state().num_processes


def own_device() -> torch.device:
    """Return the device of this process: its own accelerator where there are any."""
    return _state().device


def is_main() -> bool:
    """Whether this is the process that writes files."""
    return rank() == 0


def launched_as() -> int:
    """Return the number of this process by what its launcher says; unlike [`rank`], asking starts nothing."""
    return int(os.environ.get("RANK", "0"))


def speaks() -> bool:
    """Whether this is the main process by what its launcher says; unlike [`is_main`], asking starts nothing."""
    return launched_as() == 0


def own(items: Sequence[T]) -> Sequence[T]:
    """Return this process's share of the items: neighbours go to different processes."""
    return items[rank() :: world_size()]


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum over processes, bit for bit the same in all of them; `tensor` may be overwritten."""
    import torch

    state = _state()
    if state.num_processes == 1:
        return tensor
    shared = tensor.detach().to(state.device).contiguous()
    torch.distributed.all_reduce(shared)
    return shared.to(tensor.device)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensors of all processes in the order of their numbers: `[processes, *shape]`."""
    from accelerate.utils import gather

    return gather(tensor.detach().to(_state().device)[None].contiguous()).to(tensor.device)


def from_main(make: Callable[[], T]) -> T:
    """Let the main process alone call `make`, and return in all of them what it returned, a JSON value.

    Raises:
        Exception: in the main process what `make` raised.
        RuntimeError: in the others, where it raised something.
    """
    if world_size() == 1:
        return make()
    result: dict[str, Any] = {}
    failure: Exception | None = None
    if is_main():
        try:
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
    """Let the main process alone make an int64 tensor, and return it in all of them; errors are those of
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
    """Return in all processes what the main one was given."""
    import torch
    from accelerate.utils import broadcast

    state = _state()
    if state.num_processes == 1:
        return content
    length = broadcast(torch.tensor([len(content)], device=state.device))
    shared = torch.zeros(int(length), dtype=torch.uint8, device=state.device)
    if is_main() and content:
        shared.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    return broadcast(shared).cpu().numpy().tobytes() if len(shared) else b""


def _state() -> PartialState:
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    if not PartialState._shared_state:
        # Without a word about it, accelerate takes several processes on a CPU for runs of their own.
        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        return PartialState(cpu=on_cpu, **({"timeout": LONGEST_WAIT} if several else {}))
    return PartialState()
