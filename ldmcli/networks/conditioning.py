"""What the UNet gets of the conditions: tokens, planes, a vector."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Conditioning:
    """`context` (B, M, d) for cross-attention, `concat` (B, c, h, w) beside z_t on the input, `vector` (B, v) added to
    the time embedding. Any of the three may be absent."""

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
