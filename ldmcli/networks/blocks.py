"""Parts that the autoencoder, the UNet and the conditioners share.

Speed on a CPU, measured (two Zen 4 cores, bf16 autocast): attention by matrix products and softmax beats the fused
kernel 1.5 to 6 times where gradients are needed, and contiguous maps beat channels_last in GroupNorm's backward.
So there the memory format stays, and `attention` picks its way from dtype, device, length and head size.

On CUDA, where memory is what limits these networks, maps are channels_last, tokens come from them without a copy, and
norms read and write what autocast computes in; its own policy would have them in float32.
"""

import math
from contextvars import ContextVar, Token
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldmcli.core.errors import UsageError

Zeroed = TypeVar("Zeroed", bound=nn.Module)

# Score matrices up to this many entries a head go the plain way in bf16 on a CPU: beyond, memory decides.
PLAIN_SCORES = 2**20
PLAIN_SCORES_GRAD = 2**24
# CUDA's fast kernels of attention end at this head size; wider heads go the plain way, up to so many scores a head.
WIDEST_FUSED_HEAD = 256
PLAIN_SCORES_CUDA = 2**26
# Older versions turn a channels_last map into a contiguous one in GroupNorm on CUDA, and convolutions turn it back.
NORMS_TAKE_CHANNELS_LAST = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)


def cuda_autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes in where x is on CUDA and autocast is on, else None."""
    if x.device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
        return None
    return torch.get_autocast_dtype("cuda")


def as_autocast(x: Tensor) -> Tensor:
    """x in the dtype of CUDA's autocast: what a network begins with decides what its residual sums are kept in.
    Elsewhere, and without autocast, x itself."""
    return x.to(cuda_autocast_dtype(x) or x.dtype)


def as_maps(x: Tensor, *, first_stage: bool = False) -> Tensor:
    """(B, c, h, w) in the memory format that the layers behind it are fast in: channels_last on CUDA.

    first_stage: channels_last on a CPU, too, in bf16 without gradients: convolutions of large maps are an eighth faster
    in it, while a UNet, with its small ones, takes half as long again (docs/performance.md).
    """
    on_cuda = x.device.type == "cuda" and NORMS_TAKE_CHANNELS_LAST
    if on_cuda or (first_stage and _in_use_in_bf16(x)):
        return x.contiguous(memory_format=torch.channels_last)
    return x


def _in_use_in_bf16(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm that under CUDA's autocast reads and writes its dtype, with means and variances in float32."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, c, …) to the same."""
        dtype = cuda_autocast_dtype(input)
        if dtype is None:
            return super().forward(input)
        with torch.autocast("cuda", enabled=False):
            weight, bias = self.weight.to(dtype), self.bias.to(dtype)
            return F.group_norm(input.to(dtype), self.num_groups, weight, bias, self.eps)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that under CUDA's autocast reads and writes its dtype, with means and variances in float32."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, width) to the same."""
        dtype = cuda_autocast_dtype(input)
        if dtype is None:
            return super().forward(input)
        with torch.autocast("cuda", enabled=False):
            weight, bias = self.weight.to(dtype), self.bias.to(dtype)
            return F.layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps)


def group_norm(channels: int, eps: float, groups: int = 32) -> GroupNorm:
    """GroupNorm with `groups` groups, or the largest number below that divides `channels`."""
    groups = min(groups, channels)
    while channels % groups:
        groups -= 1
    return GroupNorm(groups, channels, eps=eps)


def set_checkpointing(network: nn.Module, on: bool) -> None:
    """Whether the blocks of a network (its `recomputable` modules) are computed again in the backward pass, and keep
    their inputs alone until then: less memory, a third more time."""
    for module in network.modules():
        if getattr(module, "recomputable", False):
            module.recomputes = on  # type: ignore[assignment]


def run_block(block: nn.Module, *args) -> Tensor:
    """block(*args), kept for the backward pass or computed again there, as `set_checkpointing` says."""
    if getattr(block, "recomputes", False) and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def zero_init(module: Zeroed) -> Zeroed:
    """The module with all its parameters set to zero: a residual branch that begins as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v. q: (B, heads, L, d); k, v: (B, heads, S, d); returns (B, heads, L, d)."""
    if q.device.type == "cuda":
        return _attention_on_cuda(q, k, v)
    if q.device.type == "meta":
        return _attention_of_shapes(q, k, v)
    if _plain_is_faster(q, k):
        return _plain_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(dim=-1).to(v.dtype) @ v


def _attention_of_shapes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As fused kernels keep it, without a matrix of scores: where costs are counted there are none."""
    if not torch.is_grad_enabled():
        return q.new_empty(*q.shape[:-1], v.shape[-1])
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


def _attention_on_cuda(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Never by the unfused kernel, whose scores are products in float32: that is taken where a head's values do not
    lie side by side, and where heads are wide the fused one that is left is slow."""
    low = q.dtype in (torch.bfloat16, torch.float16)
    if low and q.shape[-1] > WIDEST_FUSED_HEAD and q.shape[-2] * k.shape[-2] <= PLAIN_SCORES_CUDA:
        with torch.autocast("cuda", enabled=False):  # softmax adds up in float32 whatever it reads and writes
            return _plain_attention(q, k, v)
    q, k, v = (part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


def _plain_is_faster(q: Tensor, k: Tensor) -> bool:
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return False
    needs_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return q.shape[-2] * k.shape[-2] <= (PLAIN_SCORES_GRAD if needs_gradient else PLAIN_SCORES)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, heads·d) to (B, heads, L, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def split_qkv(x: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(B, L, heads·3·d), its channels ordered (head, {q, k, v}, d), to q, k and v: (B, heads, L, d) each."""
    if x.device.type == "cuda":
        return tuple(part.transpose(1, 2) for part in x.unflatten(-1, (heads, 3, -1)).unbind(3))
    # in the order of memory, in which gradients come back as well
    return tuple(part.transpose(-1, -2) for part in x.transpose(1, 2).unflatten(1, (heads, 3, -1)).unbind(2))


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, L, d) to (B, L, heads·d)."""
    return x.transpose(1, 2).flatten(2)


def map_to_tokens(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution of a map (B, c, h, w), as tokens (B, h·w, c'). On CUDA a linear map of tokens, whose channels
    lie side by side as attention needs them."""
    if x.device.type == "cuda":
        return F.linear(x.flatten(2).transpose(1, 2), conv.weight.flatten(1), conv.bias)
    x = x.flatten(2) if isinstance(conv, nn.Conv1d) else x
    return conv(x).flatten(2).transpose(1, 2)


def heads_to_map(conv: nn.Conv1d | nn.Conv2d, x: Tensor, size: torch.Size) -> Tensor:
    """A 1x1 convolution of attention's result (B, heads, h·w, d), as a map of `size` (B, c, h, w)."""
    if x.device.type == "cuda":
        return F.linear(join_heads(x), conv.weight.flatten(1), conv.bias).transpose(1, 2).unflatten(2, size[2:])
    joined = x.transpose(-1, -2).flatten(1, 2)
    return (conv(joined) if isinstance(conv, nn.Conv1d) else conv(joined.reshape(size))).reshape(size)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """[cos(t·w), sin(t·w)] with w from 1 down to about 1e-4, in fp32. t: (B,), any float or integer; returns (B, dim).

    The order of operations is the original's: in fp32 another one moves the angle at t = 999 by 1e-5.
    """
    half = dim // 2
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[:, None].float() * exponents.exp()
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def check_divisible(height: int, width: int, factor: int, what: str) -> None:
    """Raises UsageError with the nearest size that fits unless both sides are multiples of `factor`."""
    if height % factor or width % factor or height < factor or width < factor:
        near = [max(factor, (side + factor // 2) // factor * factor) for side in (height, width)]
        raise UsageError(
            f"{what} of {height}x{width}: both sides must be multiples of {factor}; the nearest is {near[0]}x{near[1]}"
        )


_kept: ContextVar["KeptKeys | None"] = ContextVar("kept keys", default=None)


class KeptKeys:
    """Keys and values of tokens that many passes see, as all steps of a sampler do: within `with`, each layer makes
    them once for each tensor of tokens. Tokens must not be changed in place. Compiled networks make them anew."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._before: list[Token] = []

    def __enter__(self) -> "KeptKeys":
        self._before.append(_kept.set(self))
        return self

    def __exit__(self, *exc) -> None:
        _kept.reset(self._before.pop())

    def of(self, layer: "CrossAttention", tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`layer.keys_and_values(tokens)`."""
        place = (id(layer), id(tokens))
        if place in self._made:
            return self._made[place][1:]
        keys, values = layer.keys_and_values(tokens)
        if not keys.requires_grad:  # else they belong to the graph of one pass
            self._made[place] = (tokens, keys, values)  # with the tokens: of freed ones another tensor gets the id
        return keys, values


class CrossAttention(nn.Module):
    """Multi-head attention over tokens; keys and values from `context`, or from x itself without one.

    x: (B, L, width), context: (B, M, context_dim). No bias in q, k, v (ldm/modules/attention.py).
    """

    def __init__(self, width: int, heads: int, head_channels: int, context_dim: int | None = None):
        super().__init__()
        self.heads = heads
        inner = heads * head_channels
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(context_dim or width, inner, bias=False)
        self.to_v = nn.Linear(context_dim or width, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, L, width); shapes as above."""
        kept = None if context is None or torch.compiler.is_compiling() else _kept.get()
        source = x if context is None else context
        q = split_heads(self.to_q(x), self.heads)  # first: gradients of x are added up in this order
        k, v = self.keys_and_values(source) if kept is None else kept.of(self, source)
        return self.to_out(join_heads(attention(q, k, v)))

    def keys_and_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """(B, heads, M, d) each, of tokens (B, M, context_dim)."""
        return split_heads(self.to_k(source), self.heads), split_heads(self.to_v(source), self.heads)


class GEGLU(nn.Module):
    """value · gelu(gate), both from one linear map; erf form. (…, width) to (…, inner)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU of four times the width, dropout, and back."""

    def __init__(self, width: int, dropout: float = 0.0):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Dropout(dropout), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) to the same."""
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention, feed-forward, each residual. Tokens (B, L, width) in and out.

    Tab. 16 of the paper lists the feed-forward between the attentions; its code has it last, and so do the weights.
    """

    def __init__(self, width: int, heads: int, head_channels: int, context_dim: int | None, dropout: float = 0.0):
        super().__init__()
        self.attn1 = CrossAttention(width, heads, head_channels)
        self.attn2 = CrossAttention(width, heads, head_channels, context_dim)
        self.ff = FeedForward(width, dropout)
        self.norm1 = LayerNorm(width)
        self.norm2 = LayerNorm(width)
        self.norm3 = LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """x (B, L, width), context (B, M, context_dim) or None: (B, L, width)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))
