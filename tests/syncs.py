"""Where the host waits for a GPU, found without one: every copy and every read that blocks, with its line.

Counts on fake CUDA tensors (`FakeTensorMode`: enter it first) and on the pretended device (`pretend.device`):

    with syncs.counted() as waits:
        loss_of(batch)
    assert waits == []

What counts: copies between host and device without `non_blocking`, tensors made on the device of Python's numbers,
reads of a value (`.item()`, `bool()`, `float()`, `.tolist()`), and operations whose result has a size that the values
decide (`nonzero`, `unique`, `bincount`, `masked_select`, indexing by a mask, indices that lie on the host).
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pretend
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_COPIES = ("aten::_to_copy", "aten::copy_")
_READS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"}
_SIZED_BY_VALUES = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::repeat_interleave",
}
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_ANY = {True: 1.0, False: 1}
_HERE = Path(__file__).parent.parent


def _place(tensor: Tensor) -> str:
    return "device" if pretend.is_on(tensor) or tensor.device.type not in ("cpu", "meta") else "host"


def _line() -> str:
    """The innermost line of the package that led here."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(_HERE / "ldmcli"):
            return f"{path.relative_to(_HERE)}:{frame.lineno}"
    return "no line of ldmcli"


def _reason(name: str, args, kwargs) -> str:
    """Why an operation on tensors of the device waits, "" where it does not."""
    if name in _READS:
        return "a value is read"
    if name in _SIZED_BY_VALUES and not (name == "aten::repeat_interleave" and kwargs.get("output_size")):
        return "its size depends on values"
    if name in _INDEXING:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return "indexing by a mask"
        if any(_place(index) == "host" for index in indices):
            return "indices on the host"
    return ""


class _Watch(TorchDispatchMode):
    def __init__(self, waits: list[str]):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        with torch._C.DisableTorchFunction():
            places = {_place(tensor) for tensor in tensors}
            if "device" in places and (why := _reason(name, args, kwargs)):
                self.waits.append(f"{name} ({why}) at {_line()}")
                if name == "aten::_local_scalar_dense" and args[0].device.type != "cpu":
                    return _ANY[args[0].dtype.is_floating_point]  # fake tensors have no value
            out = function(*args, **kwargs)
            if name in _COPIES and not (kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:3] == (True,))):
                if len(places | {_place(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}) > 1:
                    self.waits.append(f"{name} (a blocking copy) at {_line()}")
        return out


@contextmanager
def counted() -> Iterator[list[str]]:
    """A list that grows by a line for every wait of the host within the context."""
    waits: list[str] = []

    def moved(non_blocking: bool) -> None:
        if not non_blocking:
            waits.append(f"a blocking copy at {_line()}")

    pretend.WATCHERS.append(moved)
    try:
        with _Watch(waits):
            yield waits
    finally:
        pretend.WATCHERS.remove(moved)
