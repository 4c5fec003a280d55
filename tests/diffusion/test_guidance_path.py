"""Which conditionings a guided sample needs: no null where none is used."""

from types import SimpleNamespace

import pytest
import torch

from ldmcli.core.errors import UsageError
from ldmcli.diffusion.guidance import guidance_path
from ldmcli.networks.conditioning import Conditioning

GIVEN = {"class.label": torch.tensor([1, 2])}


class WithoutNull:
    """A class model that has no class that means none."""

    def __init__(self):
        self.conditions = SimpleNamespace(kinds=("class",), null=self._null)

    def _null(self, n, given=None):
        raise UsageError("no class that means none")

    def embed(self, inputs, size, encode=None):
        return Conditioning(vector=inputs["class.label"].float())


def path(scale, negative=None):
    return guidance_path(WithoutNull(), scale, GIVEN, negative, 2, (4, 4))


def test_scale_1_needs_no_null():
    assert [one.vector.tolist() for one in path(1.0).conditionings] == [[1, 2]]


def test_another_scale_asks_for_it():
    with pytest.raises(UsageError, match="means none"):
        path(2.0)


def test_what_is_given_in_its_place_is_taken():
    found = path(3.0, {"class.label": torch.tensor([5, 5])})
    assert [one.vector.tolist() for one in found.conditionings] == [[5, 5], [1, 2]]
    assert found.weights() == [-2, 3]
