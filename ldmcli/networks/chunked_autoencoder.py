"""The paper's first stages on pictures whose activations don't fit: one operation after the other, each in pieces.

Cut into tiles that go through the whole network, these networks change: GroupNorm averages over the whole map, and
attention looks at all of it. Here every map is whole, in memory or in a file, and an operation reads pieces of it with
the one position around them that a 3x3 convolution sees, and writes pieces of the next. Averages are pooled from those
of the pieces in float64. The result is that of the network itself but for rounding, whatever the size of the pieces:
1e-5 to 7e-5 of 255 grey levels on average, 1e-3 at most, for trained and random networks at 160 to 1024 px.

The result itself and, while attention runs, its keys and values (at most 1 GiB) come on top of the bound's halves.
docs/experiments.md has the memory that was measured.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmcli.core.console import warn_once
from ldmcli.core.errors import ResourceError
from ldmcli.networks.autoencoder import (
    AttnBlock,
    Autoencoder,
    Decoder,
    Downsample,
    Encoder,
    Level,
    Middle,
    ResnetBlock,
    Upsample,
)
from ldmcli.networks.blocks import attention

Pointwise = Callable[[Tensor], Tensor]
SAME = nn.Identity()
Place = tuple[slice, slice]  # rows, columns

COPIES = 10  # maps of a piece that an operation holds at a time, those inside a convolution among them
MAPS = 4  # whole maps at a time that the other part of the bound is for
ATTENDED = 2**18  # positions that attention looks at exactly; 2048 px at f = 4
RESERVE = getattr(os, "posix_fallocate", lambda file, start, size: os.ftruncate(file, start + size))
SCORES = 2**26  # scores at a time, where a machine's attention keeps them


@dataclass(frozen=True)
class Pieces:
    """How work is cut: pieces of at most `side` positions a side, all in all about `memory` bytes, half of it for a
    piece's work and half for whole maps; larger maps go to a file (in TMPDIR, gone when they are)."""

    side: int
    memory: int

    @torch.no_grad()
    def moments(self, network: Autoencoder, x: Tensor) -> Tensor:
        """`Autoencoder.moments` of a network of family "paper"."""
        assert isinstance(network.encoder, Encoder) and isinstance(network.quant_conv, nn.Conv2d)
        h = self._encoder(network.encoder, x)
        return network.quant_conv(h.to(network.quant_conv.weight.device))

    @torch.no_grad()
    def decode(self, network: Autoencoder, z: Tensor) -> Tensor:
        """`Autoencoder.decode` of a network of family "paper"."""
        assert isinstance(network.decoder, Decoder)
        z = network.quantize(z).z if network.is_vq else z
        return self._decoder(network.decoder, network.post_quant_conv(z)).to(z.device)

    def _encoder(self, encoder: Encoder, x: Tensor) -> Tensor:
        h = self._conv(encoder.conv_in, x)
        for level in encoder.down:
            h = self._level(level, h)
            if isinstance(resample := getattr(level, "downsample", None), Downsample):
                h = self._conv(resample.conv, h)
        h = self._middle(encoder.mid, h)
        return self._conv(encoder.conv_out, h, self._norm(encoder.norm_out, h, F.silu))

    def _decoder(self, decoder: Decoder, z: Tensor) -> Tensor:
        h = self._middle(decoder.mid, self._conv(decoder.conv_in, z))
        for level in reversed(decoder.up):
            h = self._level(level, h)
            if isinstance(resample := getattr(level, "upsample", None), Upsample):
                h = self._conv(resample.conv, h, up=2)
        return self._conv(decoder.conv_out, h, self._norm(decoder.norm_out, h, F.silu))

    def _level(self, level: nn.Module, h: Tensor) -> Tensor:
        assert isinstance(level, Level)
        for i, block in enumerate(level.block):
            h = self._block(block, h)
            if len(level.attn):
                h = self._attention(level.attn[i], h)
        return h

    def _middle(self, middle: Middle, h: Tensor) -> Tensor:
        h = self._block(middle.block_1, h)
        if isinstance(middle.attn_1, AttnBlock):
            h = self._attention(middle.attn_1, h)
        return self._block(middle.block_2, h)

    def _block(self, block: nn.Module, x: Tensor) -> Tensor:
        """Where the width doesn't grow the result takes the place of x, each piece after it was read."""
        assert isinstance(block, ResnetBlock)
        h = self._conv(block.conv1, x, self._norm(block.norm1, x, F.silu))
        out = x[:, : h.shape[1]] if h.shape[1] <= x.shape[1] else self._map(h.shape, h)
        norm = self._norm(block.norm2, h, F.silu)
        device = block.conv2.weight.device

        def shortcut(place: Place) -> Tensor:
            return block.nin_shortcut(x[(..., *place)].to(device))

        return self._conv(block.conv2, h, norm, out=out, added=shortcut)

    def _attention(self, block: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(block, AttnBlock)
        norm, device = self._norm(block.norm, x), block.q.weight.device
        height, width = x.shape[-2:]
        step = math.ceil(math.sqrt(height * width / ATTENDED))
        if step > 1:
            warn_once(
                "attended",
                f"attention of the autoencoder looks at one of {step} rows and columns of "
                f"{width}x{height} positions; all of them would take hours",
            )
        seen = x[..., ::step, ::step]
        k, v = (block.q.weight.new_empty(len(x), *seen.shape[-2:], x.shape[1]) for _ in range(2))
        for place in self._places(seen.shape[-2:], x.shape[:2]):
            piece = norm(seen[(..., *place)].to(device))
            k[:, *place], v[:, *place] = (conv(piece).permute(0, 2, 3, 1) for conv in (block.k, block.v))
        k, v = (part.flatten(1, 2).unsqueeze(1) for part in (k, v))  # (B, 1, positions, width)
        for place in self._places((height, width), x.shape[:2]):
            piece = x[(..., *place)].to(device)
            q = block.q(norm(piece)).flatten(2).mT.unsqueeze(1).contiguous()
            parts = [attention(part, k, v) for part in q.split(max(1, SCORES // k.shape[2]), dim=2)]
            found = torch.cat(parts, dim=2).squeeze(1).mT.reshape(piece.shape)
            x[(..., *place)] = piece + block.proj_out(found)
        return x

    def _norm(self, norm: nn.GroupNorm, x: Tensor, then: Pointwise = SAME) -> Pointwise:
        """then(norm(·)) for pieces of x, with the averages over all of x."""
        device, counts, found = norm.weight.device, [], []
        for place in self._places(x.shape[-2:], x.shape[:2]):
            piece = x[(..., *place)].to(device).float().unflatten(1, (norm.num_groups, -1)).flatten(2)
            counts.append(piece.shape[2])
            found.append(torch.stack(torch.var_mean(piece, 2, correction=0)))
        share = torch.tensor(counts, dtype=torch.double)[:, None, None] / sum(counts)
        variances, means = torch.stack(found).cpu().double().unbind(1)  # each (pieces, B, groups)
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean).square())).sum(0)
        each = x.shape[1] // norm.num_groups
        scale = (variance + norm.eps).rsqrt().repeat_interleave(each, 1) * norm.weight.cpu()
        shift = norm.bias.cpu() - mean.repeat_interleave(each, 1) * scale
        scale, shift = (part[:, :, None, None].to(norm.weight) for part in (scale, shift))
        return lambda piece: then(torch.addcmul(shift, piece, scale))

    def _conv(
        self,
        conv: nn.Conv2d,
        x: Tensor,
        before: Pointwise = SAME,
        *,
        up: int = 1,
        out: Tensor | None = None,
        added: Callable[[Place], Tensor] | None = None,
    ) -> Tensor:
        """conv(before(x)) + added, into `out` where it is given. up: x is made that much larger first (nearest)."""
        stride, device = conv.stride[0], conv.weight.device
        size = [length * up // stride for length in x.shape[-2:]]
        if out is None:
            out = self._map((x.shape[0], conv.out_channels, *size), conv.weight)
        around = (0, 0) if conv.kernel_size == (1, 1) else (0, 1) if stride == 2 else (1, 1)
        for place in self._places(size, (x.shape[0], max(conv.in_channels, conv.out_channels)), even=up):
            window = _window(
                x, [(p.start * stride // up, p.stop * stride // up) for p in place], around, before, device
            )
            if up > 1:
                window = F.interpolate(window, scale_factor=float(up), mode="nearest")[..., 1:-1, 1:-1]
            piece = F.conv2d(window, conv.weight, conv.bias, stride)
            out[(..., *place)] = piece if added is None else piece + added(place)
        return out

    def _places(self, size: Sequence[int], maps: Sequence[int], even: int = 1) -> Iterator[Place]:
        """Pieces that cover `size` = (height, width) once, for maps of (B, channels); corners are multiples of
        `even`."""
        side = math.isqrt(self.memory // (2 * COPIES * 4 * math.prod(maps)))
        side = max(8, min(self.side, side)) // even * even
        height, width = size
        for top in range(0, height, side):
            for left in range(0, width, side):
                yield slice(top, min(top + side, height)), slice(left, min(left + side, width))

    def _map(self, shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
        """Room for a map: beside `like` where it is small, else in a file that nothing else sees."""
        count = math.prod(shape)
        if count * like.element_size() <= self.memory // (2 * MAPS):
            return like.new_empty(shape)
        with tempfile.NamedTemporaryFile(prefix="ldm-map-") as file:
            try:  # the place is taken now: a full disk met while writing would end the process
                RESERVE(file.fileno(), 0, count * like.element_size())
            except OSError as error:
                need = count * like.element_size() / 2**30
                raise ResourceError(
                    f"{tempfile.gettempdir()}: no place for {need:.1f} GiB of a picture this large "
                    f"({error.strerror}); set TMPDIR to a larger disk, or raise --max-memory"
                ) from None
            return torch.from_file(file.name, shared=True, size=count, dtype=like.dtype).view(shape)


def _window(
    x: Tensor, ranges: list[tuple[int, int]], around: tuple[int, int], before: Pointwise, device: torch.device
) -> Tensor:
    """before(x) in rows and columns `ranges` and `around` = (before, after) them, zero outside of x."""
    places: list[slice] = []
    pads: list[tuple[int, int]] = []
    for (start, stop), length in zip(ranges, x.shape[-2:]):
        start, stop = start - around[0], stop + around[1]
        places.append(slice(max(start, 0), min(stop, length)))
        pads.append((max(-start, 0), max(stop - length, 0)))
    rows, columns = places
    return F.pad(before(x[..., rows, columns].to(device)), (*pads[1], *pads[0]))
