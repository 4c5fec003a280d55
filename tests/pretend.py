"""A GPU that is none: tensors that are moved to it stay in the CPU's memory with a label, and are computed with.

What a GPU refuses is refused here, too: tensors of two devices in one operation, float64 (Apple GPUs have none), an
array of a tensor that was not brought back. Everything else runs, backward passes as well, with the CPU's numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_MIXING = ("aten::copy_", "aten::_to_copy")  # from one device to the other
_BY_INDEX = (
    "aten::index",
    "aten::_unsafe_index",
    "aten::index_put_",
    "aten::index_put",
    "aten::_index_put_impl_",
)  # indices may be the CPU's
_GETTERS = {
    getattr(Tensor, name).__get__: kind for name, kind in (("is_cuda", "cuda"), ("is_mps", "mps"), ("is_cpu", "cpu"))
}
_DEVICE = Tensor.device.__get__
_OF_NUMBERS = (torch.tensor, torch.as_tensor)  # what they make on a device is copied there, and waited for

WATCHERS: list[Callable[[bool], None]] = []  # told of every copy to and from the device: whether it is non_blocking


def is_on(tensor: Tensor) -> bool:
    """Whether a tensor lies on the pretended device."""
    return tensor.device.type == "cpu" and hasattr(tensor.untyped_storage(), "_pretended")


def _labelled(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return is_on(tensor)


def _label(tensor: Tensor) -> Tensor:
    if tensor.dtype in (torch.float64, torch.complex128):
        raise TypeError(f"the pretended device has no {tensor.dtype}")
    with torch._C.DisableTorchFunction():
        tensor.untyped_storage()._pretended = True
    return tensor


class _Operations(TorchDispatchMode):
    """Results are where their operands are; operands are all in one place."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        labelled = [tensor for tensor in tensors if _labelled(tensor)]
        name = function._schema.name
        if labelled and len(labelled) < len(tensors) and name not in _MIXING:
            looked = tensors[:1] if name in _BY_INDEX else tensors
            strangers = [t for t in looked if not _labelled(t) and t.ndim]
            if strangers:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device: {function} of "
                    f"{[(tuple(t.shape), 'gpu' if _labelled(t) else 'cpu') for t in tensors]}"
                )
        out = function(*args, **(kwargs or {}))
        if labelled and name != "aten::copy_":
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and not _labelled(leaf):
                    _label(leaf)
        return out


class _Calls(TorchFunctionMode):
    """What code says of devices: `.device`, `.to`, `device=`."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def _is_ours(self, device) -> bool:
        return device is not None and not isinstance(device, Tensor) and torch.device(device).type == self.device.type

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == _DEVICE:
            return self.device if _labelled(args[0]) else function(*args)
        if function in _GETTERS:
            kind = self.device.type if _labelled(args[0]) else "cpu"
            return _GETTERS[function] == kind
        if function in (Tensor.numpy, Tensor.__array__) and _labelled(args[0]):
            raise TypeError(f"can't convert {self.device} tensor to numpy")
        if function is Tensor.to:
            return self._moved(*args, **kwargs)
        if function is Tensor.cpu:
            return self._moved(args[0], "cpu")
        if function is Tensor.new_tensor and _labelled(args[0]):
            _tell(False)
            return _label(function(*args, **kwargs))
        if self._is_ours(kwargs.get("device")):
            if function in _OF_NUMBERS:
                _tell(False)
            return _label(function(*args, **{**kwargs, "device": "cpu"}))
        if kwargs.get("device") is not None and str(kwargs["device"]) == "cpu":
            return _unlabelled(function(*args, **kwargs))
        return function(*args, **kwargs)

    def _moved(self, tensor: Tensor, *args, **kwargs) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args, kwargs = (
                (),
                {**kwargs, "device": self.device if _labelled(args[0]) else "cpu", "dtype": args[0].dtype},
            )
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(
            *args, **{k: v for k, v in kwargs.items() if k != "copy"}
        )
        if device is not None and not self._is_ours(device) and device.type != "cpu":
            return tensor.to(*args, **kwargs)
        ours = self._is_ours(device) if device is not None else _labelled(tensor)
        if ours and (dtype or tensor.dtype) in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a tensor of {dtype or tensor.dtype} to {self.device}: it has no float64")
        options = {} if layout is None else {"memory_format": layout}
        moves = ours != _labelled(tensor)
        if moves:
            _tell(non_blocking)
        if moves and not ours:  # float64 is allowed from here on
            tensor = _unlabelled(tensor.clone())
        out = tensor.to(dtype or tensor.dtype, copy=(moves and ours) or kwargs.get("copy", False), **options)
        return _label(out) if ours else out


def _tell(non_blocking: bool) -> None:
    for watcher in WATCHERS:
        watcher(non_blocking)


def _unlabelled(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        storage = tensor.untyped_storage()
        if hasattr(storage, "_pretended"):
            del storage._pretended
    return tensor


@contextmanager
def device(kind: str = "mps") -> Iterator[torch.device]:
    """The pretended device, by the name of a real one, in this thread and while the context lasts."""
    chosen = torch.device(kind)
    with _Operations(), _Calls(chosen):
        yield chosen
