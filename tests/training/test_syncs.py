"""The counter of waits counts each of them, on fake CUDA tensors and on the pretended device, and nothing else."""

import contextlib

import pretend
import pytest
import syncs
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


@contextlib.contextmanager
def fake():
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("cuda")


PLACES = {"fake": fake, "pretended": pretend.device}
WAITS = {
    "a number": lambda x, d: torch.tensor([1.0, 2.0], device=d),
    "a number like another": lambda x, d: x.new_tensor(1.0),
    "to the device": lambda x, d: torch.zeros(3).to(d),
    "to the host": lambda x, d: x.cpu(),
    "into a tensor": lambda x, d: x.copy_(torch.zeros(3)),
    "item": lambda x, d: x.sum().item(),
    "float": lambda x, d: float(x.sum()),
    "bool": lambda x, d: bool(x.sum() > 0),
    "a mask": lambda x, d: x[x > 0],
    "indices": lambda x, d: x[torch.tensor([1])],
    "nonzero": lambda x, d: x.nonzero(),
    "unique": lambda x, d: x.unique(),
    "bincount": lambda x, d: x.long().bincount(minlength=3),
}
FREE = {
    "arithmetic": lambda x, d: (x + 1) * torch.tensor(2.0),
    "made there": lambda x, d: torch.arange(3, device=d) + torch.full((3,), 2.0, device=d),
    "to the device": lambda x, d: torch.zeros(3).to(d, non_blocking=True),
    "into a tensor": lambda x, d: x.copy_(torch.zeros(3), non_blocking=True),
    "chosen": lambda x, d: torch.where(x > 0, x, x.masked_fill(x < 0, 1.0)),
    "indices": lambda x, d: x[torch.arange(2, device=d)],
}


@pytest.mark.parametrize("place", PLACES)
def test_every_wait_is_counted_and_nothing_else(place):
    with PLACES[place]() as device:
        for name, call in WAITS.items():
            x = torch.ones(3, device=device)
            with syncs.counted() as waits, contextlib.suppress(Exception):  # fake tensors have no sizes that depend
                call(x, device)
            assert waits, name
        for name, call in FREE.items():
            x = torch.ones(3, device=device)
            with syncs.counted() as waits:
                call(x, device)
            assert waits == [], name
