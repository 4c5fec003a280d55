"""Packed weights: the rule that the card states, to the bit, and what it leaves alone."""

import pytest
import torch

from ldmcli.core.errors import ModelError
from ldmcli.formats.packed_weights import KINDS, SCALE, pack, unpack


def tensors() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    kernel = torch.randn(6, 3, 3, 3, generator=rng) * torch.logspace(-6, 2, 6)[:, None, None, None]
    kernel[2] = 0.0
    return {
        "kernel": kernel,
        "matrix": torch.randn(4, 5, generator=rng),
        "bias": torch.randn(7, generator=rng),
        "gain": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "count": torch.tensor([3, 2**40]),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_unpacked_weights_have_names_and_shapes_of_before_in_float32(kind):
    before, after = tensors(), unpack(pack(tensors(), kind))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].shape == tensor.shape and after[name].dtype == tensor.dtype, name
    assert torch.equal(after["count"], before["count"])
    for name in ("bias", "gain"):
        assert torch.equal(after[name], before[name].half().float())


def test_half_precision_is_rounding_and_nothing_else():
    packed = pack(tensors(), "float16")
    assert packed.keys() == tensors().keys()
    assert all(torch.equal(packed[name], tensor.half()) for name, tensor in tensors().items() if name != "count")


def test_whole_numbers_are_rows_over_a_127th_of_their_largest_weight():
    packed, after = pack(tensors(), "int8"), unpack(pack(tensors(), "int8"))
    for name in ("kernel", "matrix"):
        rows = tensors()[name].flatten(1)
        q, scale = packed[name].flatten(1), packed[name + SCALE]
        assert q.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (len(rows),)
        assert torch.equal(scale, rows.abs().amax(1) / 127)
        assert torch.equal(after[name].flatten(1), q.float() * scale[:, None])
        assert ((after[name].flatten(1) - rows).abs() <= scale[:, None] * 0.50001).all()
    assert packed["kernel"].abs().max() == 127 and not after["kernel"][2].any()
    assert set(packed) - set(tensors()) == {f"{name}{SCALE}" for name in ("kernel", "matrix", "empty")}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_half_precision_does_not_hold_are_refused_by_name(kind):
    with pytest.raises(ModelError, match="here: NaN or Inf in bias"):
        pack({"bias": torch.tensor([1e6]), "gain": torch.tensor(1.0)}, kind, "here")
