"""Tokens made by an encoder that is not part of the model."""

from ldmcli.conditions.condition import Condition
from ldmcli.networks.conditioners import PrecomputedTokens


class Tokens(Condition):
    """τ_θ(y) itself, (M, d), for cross-attention; no null."""

    name, conditioner = "tokens", PrecomputedTokens
    option = "context"
    user_given = False
    missing = "this model reads tokens of an encoder that it does not carry; use sample_latents(context=…)"
