"""Conditioners τ_θ (Sec. 3.3), and what the UNet gets of them: tokens, planes, a vector."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldmcli.core.settings import ConditionSettings

Encode = Callable[[Tensor], Tensor]  # pixels (B, 3, H, W) in [-1, 1] to normalised latents (B, c, h, w)


@dataclass
class Conditioning:
    """τ_θ(y): `context` (B, M, d) for cross-attention, `concat` (B, c, h, w) beside z_t on the input, `vector` (B, v)
    added to the time embedding. Any of the three may be absent."""

    context: Tensor | None = None
    concat: Tensor | None = None
    vector: Tensor | None = None

    def joined(self, other: "Conditioning") -> "Conditioning":
        """Tokens join, planes stack, vectors add."""
        return Conditioning(
            _both(self.context, other.context, lambda a, b: torch.cat([a, b], dim=1)),
            _both(self.concat, other.concat, lambda a, b: torch.cat([a, b], dim=1)),
            _both(self.vector, other.vector, lambda a, b: a + b),
        )


def _both(a, b, join):
    return join(a, b) if a is not None and b is not None else (a if b is None else b)


class Conditioner(nn.Module):
    """τ_θ of one condition. Built with (settings, spec, tokenizer); a spec is what it learned from data ahead, as JSON.

    Subclasses give `prepare` (values -> tensors with n rows each, *inputs*), `forward` (inputs -> `Conditioning`) and,
    where the condition can be left out, `null` (the inputs that mean nothing, n times).
    """

    droppable = True  # has a null: condition dropout in training, guidance when sampling
    guidance_rank = 4  # guided one by one, conditions are switched on in this order
    gives_tokens = False  # for cross-attention, of width `context_dim`
    channels = 0  # planes beside z_t
    takes_size = False  # forward(inputs, (h, w) of the latent)
    encodes = False  # forward(inputs, the first stage's encoder)
    names: Sequence[str] = ()  # of its classes or categories

    @staticmethod
    def gives_vector(settings: ConditionSettings) -> bool:
        """Whether a vector of width `context_dim` comes along."""
        return False

    def prepare(self, values: list) -> dict[str, Tensor]:
        """Values -> tensors with one row each."""
        raise NotImplementedError

    def example(self, size: tuple[int, int]) -> dict[str, Tensor]:
        """Inputs of one row for pictures of (height, width) px, to count what it costs: shapes count, content does
        not."""
        raise NotImplementedError

    def count_only(self) -> None:
        """Leaves out of `forward` what looks at content and keeps nothing for gradients: shapes have none."""

    def complete(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs with what is made of them once, on their device and without weights. `forward` does it where it was
        not done; done before, it stays out of what is compiled."""
        return inputs

    def null(self, n: int, given: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The inputs that stand for no condition, n times. given: inputs that they replace, for their size."""
        raise NotImplementedError
