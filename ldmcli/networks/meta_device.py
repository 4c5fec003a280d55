"""Networks without numbers: on torch's meta device tensors have shapes and no content."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _SkipInit(TorchFunctionMode):
    """Leaves weights uninitialised: on the meta device a random number loads torch's compiler (docs/experiments.md)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = kwargs or {}
        if getattr(function, "__module__", "") == nn.init.__name__:
            return args[0] if args else given["tensor"]
        return function(*args, **given)


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Context in which tensors and networks are made on the meta device."""
    with torch.device("meta"), _SkipInit():
        yield
