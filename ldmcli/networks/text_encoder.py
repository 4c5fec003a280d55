"""Conditioners with weights: the paper's text transformer, class embedding and map rescaler (App. E.2.1)."""

import torch.nn.functional as F
from torch import Tensor, nn

from ldmcli.core.errors import UsageError
from ldmcli.networks.blocks import LayerNorm, as_autocast, attention, join_heads, run_block, split_heads

EMBEDDING_STD = 0.02


class SelfAttention(nn.Module):
    """Multi-head self-attention over all tokens, no mask; the inner width is heads · head_channels."""

    recomputable = True

    def __init__(self, width: int, heads: int, head_channels: int):
        super().__init__()
        self.heads = heads
        inner = heads * head_channels
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.to_out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, width) to the same."""
        q, k, v = (split_heads(linear(x), self.heads) for linear in (self.to_q, self.to_k, self.to_v))
        return self.to_out(join_heads(attention(q, k, v)))


class FeedForward(nn.Module):
    """Linear to four times the width, GELU (erf), and back."""

    recomputable = True

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU()), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Layers(nn.Module):
    """Pre-norm layers, attention and feed-forward in turn: entry 2i attends, 2i + 1 feeds forward."""

    def __init__(self, width: int, layers: int, heads: int, head_channels: int):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(layers):
            self.layers.append(nn.ModuleList([LayerNorm(width), SelfAttention(width, heads, head_channels)]))
            self.layers.append(nn.ModuleList([LayerNorm(width), FeedForward(width)]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, M, width) to the same."""
        for pair in self.layers:
            assert isinstance(pair, nn.ModuleList)
            norm, layer = pair
            x = x + run_block(layer, norm(x))
        return x


class PositionEmbedding(nn.Module):
    """One learned vector a place."""

    def __init__(self, length: int, width: int, std: float):
        super().__init__()
        self.emb = nn.Embedding(length, width)
        nn.init.normal_(self.emb.weight, std=std)

    def forward(self, length: int) -> Tensor:
        return self.emb.weight[:length]


class TokenTransformer(nn.Module):
    """Embeddings, layers and the last norm; `to_logits` exists only where a checkpoint carries it, and is frozen: no
    forward pass uses it, and data-parallel training would wait for its gradients."""

    def __init__(self, vocab_size: int, length: int, layers: Layers, width: int, logits_head: bool, std: float):
        super().__init__()
        self.token_emb = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.token_emb.weight, std=std)
        self.pos_emb = PositionEmbedding(length, width, std)
        self.attn_layers = layers
        self.norm = LayerNorm(width)
        if logits_head:
            self.to_logits = nn.Linear(width, vocab_size).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = as_autocast(self.token_emb(tokens) + self.pos_emb(tokens.shape[1]))
        return self.norm(self.attn_layers(x))


class TextTransformer(nn.Module):
    """τ of the text models: tokens (B, M) int64, M <= length, to (B, M, width). Padding takes part, as in the original.

    heads · head_channels is the inner width of attention, 8 · 64 in all published models whatever `width` is.
    embedding_std is the spread of new token and place embeddings, 0.02 in the original.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        layers: int,
        length: int,
        heads: int = 8,
        head_channels: int = 64,
        logits_head: bool = False,
        embedding_std: float = EMBEDDING_STD,
    ):
        super().__init__()
        self.length, self.width = length, width
        stack = Layers(width, layers, heads, head_channels)
        self.transformer = TokenTransformer(vocab_size, length, stack, width, logits_head, embedding_std)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > self.length:
            raise UsageError(f"a text of {tokens.shape[1]} tokens: this model reads at most {self.length}")
        return self.transformer(tokens)

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, M, vocab_size) of the head that only converted checkpoints have."""
        return self.transformer.to_logits(self(tokens))


class SpatialRescaler(nn.Module):
    """Halves a map `stages` times (bilinear, no antialias), then mixes channels: (B, in, H, W) to (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, stages: int):
        super().__init__()
        self.stages = stages
        self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.stages):
            x = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
        return self.channel_mapper(x)


def pooled(tokens: Tensor) -> Tensor:
    """Sum over tokens / √M: keeps the size of a single token's code. (B, M, d) to (B, d)."""
    return tokens.sum(dim=1) / tokens.shape[1] ** 0.5


def vector_of_tokens(width: int) -> nn.Sequential:
    """What makes a vector for the time embedding of pooled tokens (B, width)."""
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
