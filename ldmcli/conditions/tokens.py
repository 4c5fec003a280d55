"""Tokens made by an encoder that is not part of the model."""

from typing import TYPE_CHECKING, NoReturn

from ldmcli.conditions.condition import Condition, View
from ldmcli.core.errors import UsageError
from ldmcli.networks.conditioners import PrecomputedTokens

if TYPE_CHECKING:
    from ldmcli.conditions.dataset import ConditionDataset


class Tokens(Condition):
    """τ_θ(y) itself, (M, d), for cross-attention; no null."""

    name, conditioner = "tokens", PrecomputedTokens
    option = "context"
    user_given = False
    missing = "this model reads tokens of an encoder that it does not carry; use sample_latents(context=…)"

    def from_row(self, dataset: "ConditionDataset", view: View) -> NoReturn:
        """Nothing of a row stands for them."""
        raise UsageError(f"{self.missing} from Python, and measure its pictures with --images")
