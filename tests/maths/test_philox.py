"""Philox4x32-10: the published vectors, the same numbers wherever and with whatever they are made, normal ones."""

import pretend
import pytest
import torch

from ldmcli.maths import philox


@pytest.mark.parametrize(
    "counter, key, expected",
    [  # of the authors' Random123, kat_vectors
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_vectors(counter, key, expected):
    assert philox.philox(torch.tensor(counter), torch.tensor(key)).tolist() == list(expected)


def test_numbers_do_not_depend_on_device_or_batch():
    keys = philox.keys(3, [7, 8, 9], "noise")
    whole = philox.normal(keys, (3, 5, 5))
    assert torch.equal(philox.normal(keys[1:2], (3, 5, 5)), whole[1:2]) and len(keys.unique()) == 3
    assert not torch.equal(philox.keys(3, [7], "noise"), philox.keys(3, [7], "posterior"))
    with pretend.device("cuda") as device:
        there = philox.normal(keys.to(device), (3, 5, 5))
        assert there.device == device
        assert torch.equal(there.cpu(), whole)


def test_numbers_are_normal_and_independent():
    x = philox.normal(philox.keys(0, range(64), "noise"), (4, 32, 32)).double()
    n = x.numel()
    assert abs(float(x.mean())) < 5 / n**0.5 and abs(float(x.var()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float((x**4).mean()) - 3) < 5 * (96 / n) ** 0.5
    rows = x.reshape(64, -1)
    correlations = torch.corrcoef(rows) - torch.eye(64)
    assert float(correlations.abs().max()) < 6 / rows.shape[1] ** 0.5
    for lag in (1, 2, 3, 4):
        assert abs(float((rows[:, lag:] * rows[:, :-lag]).mean())) < 5 / n**0.5
