"""A second device that needs no hardware: tensors that keep their values on the CPU and lie elsewhere by name.

An operation that mixes devices raises `DeviceMismatch`, as CUDA does, and operations that would make the host wait for
the device are counted. The device can refuse float64, as MPS does. It is built on PyTorch's Python backend for
PrivateUse1, which is experimental.

What it cannot show: streams and asynchrony, kernels, and how much memory is used. PyTorch lets such a backend have one
device, so all tensors are of `far:0` to it, and what is written here tells them apart: `tensor.device` and
`tensor.to(device)` are right, and so are the places of results and gradients.
"""

import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import accelerate.utils.offload
import huggingface_hub.serialization._torch
import safetensors.torch
import torch
import transformers.modeling_utils
import transformers.pytorch_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from optimum_fwdprune import PruningConfig
from optimum_fwdprune.architectures import wrapping
from optimum_fwdprune.runs.devices import has_float64


sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from requests_for_devices import COMMON, REQUESTS


NAME = "far"
FIRST, SECOND = f"{NAME}:0", f"{NAME}:1"

# Operations that take tensors of two devices on CUDA as well.
_COPIES = ("aten.copy_", "aten._to_copy", "aten.set_")
_INDEXING = ("aten.index.Tensor", "aten.index_put", "aten._index_put_impl_")

# Operations whose result the host reads, so that it waits for all that the device was asked to do before.
_READ_BY_THE_HOST = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.masked_select", "aten._unique")


class DeviceMismatch(RuntimeError):
    """Tensors of two devices met in one operation."""


@dataclass
class State:
    """What the device has seen, and what it refuses.

    Args:
        waits (`list[str]`): operations that made the host wait, in order.
        present (`bool`): whether the machine has the device.
        refuses_float64 (`bool`): whether tensors of float64 raise a `TypeError`.
    """

    waits: list[str] = field(default_factory=list)
    present: bool = False
    refuses_float64: bool = False


STATE = State()


class _Call(threading.local):
    """Where the function that a thread calls at the moment computes; libraries load weights in several threads."""

    place = None


_CALL = _Call()


def request_of(name, **fields):
    """Return the request of a name in `REQUESTS`, with other fields."""
    return PruningConfig(**{**COMMON, **REQUESTS[name], **fields})


class _Hook(torch._C._acc.PrivateUse1Hooks):
    """What PyTorch asks a backend: the device is there in tests that ask for it, and in no other."""

    def is_available(self):
        return STATE.present

    def has_primary_context(self, device):
        return STATE.present

    def is_built(self):
        return True


class _Module:
    """The module `torch.far`."""

    def is_initialized(self):
        return True

    def is_available(self):
        return STATE.present

    def device_count(self):
        return 2 if STATE.present else 0

    def current_device(self):
        return 0

    def manual_seed_all(self, seed):
        pass

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device=None):
        STATE.waits.append("synchronize")

    def _is_in_bad_fork(self):
        return False


_setup_privateuseone_for_python_backend(NAME, _Module(), _Hook())


class FarTensor(torch.Tensor):
    """A tensor on the second device.

    Attributes:
        host (`Tensor`): its values.
        place (`torch.device`): where it lies.
    """

    @staticmethod
    def __new__(cls, host, device=FIRST, requires_grad=None):
        if requires_grad is not None:
            # accelerate builds parameters anew by the class of the old ones.
            return torch.nn.Parameter(host, requires_grad=requires_grad)
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=torch.device(FIRST),
            requires_grad=False,
        )
        tensor.host, tensor.place = host, torch.device(device)
        return tensor

    @property
    def device(self):
        return self.place

    def __repr__(self):
        return f"FarTensor({self.host!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to:
            return _moved(*args, **(kwargs or {}))
        before = _CALL.place
        leaves = (leaf for leaf in _leaves(args, kwargs) if isinstance(leaf, FarTensor))
        _CALL.place = next((leaf.place for leaf in leaves), before)
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        finally:
            _CALL.place = before

    def to(self, *args, **kwargs):
        return _moved(self, *args, **kwargs)

    def cpu(self, *args, **kwargs):
        return _moved(self, "cpu")

    def data_ptr(self):
        return self.host.data_ptr()

    def tolist(self):
        STATE.waits.append("tolist")
        return self.host.tolist()

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False):
        # The method of the base class makes a tensor of the CPU.
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device, requires_grad=requires_grad)

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {self.device} tensor to numpy. Use Tensor.cpu() first.")

    def __deepcopy__(self, memo):
        copied = FarTensor(self.host.clone(), self.device)
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied


class _Move(torch.autograd.Function):
    """A copy on another device, whose gradient goes back to where the original lies."""

    @staticmethod
    def forward(context, tensor, device, dtype, non_blocking):
        context.origin = tensor.device, tensor.dtype
        context.set_materialize_grads(False)
        if isinstance(tensor, FarTensor) and device.type == "cpu" and not non_blocking:
            STATE.waits.append("copy to the host")
        copied = _host_of(tensor.detach()).to(dtype, copy=True)
        return FarTensor(copied, device) if device.type == NAME else copied.to(device)

    @staticmethod
    def backward(context, gradient):
        return None if gradient is None else gradient.to(*context.origin), None, None, None


def _moved(tensor, *args, **kwargs):
    """`Tensor.to` where it or the tensor that it is made like lies on the second device."""
    like = next((value for value in (*args, kwargs.pop("other", None)) if isinstance(value, torch.Tensor)), None)
    if like is not None:
        args = (like.device, like.dtype)
    copy = kwargs.pop("copy", False)
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype = torch.device(device or tensor.device), dtype or tensor.dtype
    if device.type == NAME:
        device = torch.device(NAME, device.index or 0)
    if device == tensor.device and not copy:
        return tensor if dtype == tensor.dtype else torch.ops.aten._to_copy(tensor, dtype=dtype)
    if NAME in (device.type, tensor.device.type) and STATE.refuses_float64 and device.type == NAME:
        _refuse_float64(dtype)
    return _Move.apply(tensor, device, dtype, non_blocking)


class _FactoryMode(TorchDispatchMode):
    """Lets `device="far:0"` work in functions that have no tensor to start from."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_far(kwargs.get("device")) or any(isinstance(leaf, FarTensor) for leaf in _leaves(args, kwargs)):
            return _run(operation, args, kwargs)
        return operation(*args, **kwargs)


def _leaves(*values):
    """What stands in nested arguments of an operation."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _leaves(*value)
        elif isinstance(value, dict):
            yield from _leaves(*value.values())
        else:
            yield value


def _mapped(change, value):
    """Change what stands in nested arguments, or in the result, of an operation."""
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(change, part) for part in value])
    if isinstance(value, dict):
        return {name: _mapped(change, part) for name, part in value.items()}
    return change(value)


def _is_far(device):
    return device is not None and torch.device(device).type == NAME


def _host_of(value):
    return value.host if isinstance(value, FarTensor) else value


def _run(operation, args, kwargs):
    """Run an operation on the host's values, and put its result where a device would."""
    name = str(operation)
    tensors = [leaf for leaf in _leaves(args, kwargs) if isinstance(leaf, torch.Tensor)]
    _check_devices(name, args, tensors)
    target = kwargs.get("device")
    place = _place_of_result(name, args, tensors, target)
    _note_wait(name, args, kwargs, tensors, place)
    on_host = {**kwargs, "device": "cpu"} if _is_far(target) else kwargs
    if place is not None and STATE.refuses_float64:
        _refuse_float64(kwargs.get("dtype"))
    result = operation(*_mapped(_host_of, args), **_mapped(_host_of, on_host))
    function = name.split(".")[1]
    if args and isinstance(args[0], torch.Tensor) and function.endswith("_") and not function.endswith("__"):
        return args[0]
    if isinstance(kwargs.get("out"), FarTensor):
        return kwargs["out"]
    if place is None:
        return result

    def placed(leaf):
        if not isinstance(leaf, torch.Tensor) or leaf.device.type == "meta":
            return leaf
        if STATE.refuses_float64:
            _refuse_float64(leaf.dtype)
        return FarTensor(leaf, place)

    return _mapped(placed, result)


def _check_devices(name, args, tensors):
    far = [tensor for tensor in tensors if isinstance(tensor, FarTensor)]
    # A tensor of the CPU without dimensions is a number to every device.
    near = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.dim()]
    mixed = len({tensor.device for tensor in far}) > 1 or (far and near)
    if not mixed or name.startswith(_COPIES):
        return
    if name.startswith(_INDEXING):
        # Positions may come from the CPU; what is indexed, and what is put there, may not be apart.
        values = [leaf for leaf in _leaves(args[2:3]) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        positions = [leaf for leaf in _leaves(args[1:2]) if isinstance(leaf, torch.Tensor)]
        apart = any(value.device != args[0].device for value in values)
        if not apart and all(position.device in (args[0].device, torch.device("cpu")) for position in positions):
            return
    places = sorted({str(tensor.device) for tensor in (*far, *near)})
    raise DeviceMismatch(
        f"{name}: expected all tensors to be on the same device, got {places} of the shapes "
        f"{[tuple(tensor.shape) for tensor in tensors]}."
    )


def _place_of_result(name, args, tensors, target):
    if _is_far(target) and any(isinstance(tensor, FarTensor) for tensor in tensors):
        # PyTorch asks for a tensor where another one is, and knows one device only.
        return next(tensor.device for tensor in tensors if isinstance(tensor, FarTensor))
    if _is_far(target) and _CALL.place is not None:
        return _CALL.place
    if target is not None:
        return torch.device(NAME, torch.device(target).index or 0) if _is_far(target) else None
    if name.startswith(("aten._to_copy", *_INDEXING)):
        return args[0].device if isinstance(args[0], FarTensor) else None
    return next((tensor.device for tensor in tensors if isinstance(tensor, FarTensor)), None)


def _note_wait(name, args, kwargs, tensors, place):
    if not any(isinstance(tensor, FarTensor) for tensor in tensors):
        return
    if name.startswith("aten._to_copy"):
        waits = isinstance(args[0], FarTensor) and place is None and not kwargs.get("non_blocking")
    elif name.startswith("aten.copy_"):
        waits = isinstance(args[1], FarTensor) and not isinstance(args[0], FarTensor)
    elif name.startswith(_INDEXING):
        # A mask becomes positions, whose number the host must know.
        positions = (leaf for leaf in _leaves(args[1:2]) if isinstance(leaf, FarTensor))
        waits = any(position.dtype == torch.bool for position in positions)
    else:
        waits = name.startswith(_READ_BY_THE_HOST)
    if waits:
        STATE.waits.append(name)


def _refuse_float64(dtype):
    if dtype == torch.float64:
        raise TypeError(
            "Cannot convert a tensor of the second device to float64 dtype as the device doesn't support float64. "
            "Please use float32 instead."
        )


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return FarTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"), _CALL.place or device or FIRST)


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return FarTensor(torch.empty(size, dtype=dtype, device="cpu"), _CALL.place or device or FIRST)


def _copy(self, source, non_blocking=False):
    _host_of(self).copy_(_host_of(source))
    return self


_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
_LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
_LIBRARY.impl("copy_", _copy, "PrivateUse1")


@contextmanager
def second_device(monkeypatch):
    """Have the second device while the context is open, as a machine's accelerator.

    Args:
        monkeypatch (`pytest.MonkeyPatch`): undoes what libraries are told about the device.
    """
    generator, flatten, open_file = torch.Generator, safetensors.torch._flatten_as_ptr, safetensors.safe_open
    STATE.waits, STATE.present, STATE.refuses_float64 = [], True, False
    # Its noise is the CPU's, so that results can be compared.
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_args, **_kwargs: torch.device(FIRST))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: STATE.waits.append("synchronize"))

    # safetensors reads memory by its address, and knows no device of this name.
    def flatten_on_host(tensors, keep_alive):
        return flatten({name: _host_of(tensor.detach()) for name, tensor in tensors.items()}, keep_alive)

    class Opened:
        def __init__(self, file, framework="pt", device="cpu"):
            self._place, self._file = device, open_file(file, framework, device="cpu" if _is_far(device) else device)

        def __enter__(self):
            self._file.__enter__()
            return self

        def __exit__(self, *error):
            return self._file.__exit__(*error)

        def get_tensor(self, name):
            return self._file.get_tensor(name).to(self._place)

    monkeypatch.setattr(safetensors.torch, "_flatten_as_ptr", flatten_on_host)
    monkeypatch.setattr(accelerate.utils.offload, "safe_open", Opened)
    # transformers and huggingface_hub tell tied weights by the addresses of their storages.
    address = huggingface_hub.serialization._torch.storage_ptr
    monkeypatch.setattr(
        huggingface_hub.serialization._torch, "storage_ptr", lambda tensor: address(_host_of(tensor.detach()))
    )
    identify = transformers.pytorch_utils.id_tensor_storage
    for module in (transformers.pytorch_utils, transformers.modeling_utils):
        monkeypatch.setattr(module, "id_tensor_storage", lambda tensor: identify(_host_of(tensor.detach())))
    monkeypatch.setattr(wrapping, "PLAIN_TENSORS", (*wrapping.PLAIN_TENSORS, FarTensor))
    has_float64.cache_clear()
    try:
        with _FactoryMode():
            yield STATE
    finally:
        STATE.present = False
