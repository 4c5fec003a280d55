"""First stage: the autoencoder of Rombach et al. 2022 (Sec. 3.1, App. G) and a small one that trains on a CPU.

Pixels x: (B, in_channels, H, W) in [-1, 1]. Latents z here are unscaled: (B, embed_dim, H/f, W/f).
State-dict keys of family "paper" are those of the original checkpoints.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmcli.core.errors import UsageError
from ldmcli.core.settings import AutoencoderSettings
from ldmcli.networks.blocks import (
    as_maps,
    attention,
    check_divisible,
    group_norm,
    heads_to_map,
    map_to_tokens,
    run_block,
)
from ldmcli.networks.vector_quantizer import VectorQuantizer

NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class AutoencoderOutput:
    """What a training step needs. codebook_loss: scalar, 0 for KL; indices: (B, h, w) for VQ, else None."""

    reconstruction: Tensor
    moments: Tensor
    z: Tensor
    codebook_loss: Tensor
    indices: Tensor | None = None


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance, the latter clamped to [-30, 20]. (B, 2c, h, w) to two of (B, c, h, w)."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def posterior_sample(moments: Tensor, noise: Tensor | None) -> Tensor:
    """mean + std · noise; the mode where noise is None. moments: (B, 2c, h, w), noise: (B, c, h, w)."""
    mean, logvar = split_moments(moments)
    return mean if noise is None else mean + (0.5 * logvar).exp() * noise


def kl_divergence(moments: Tensor) -> Tensor:
    """KL of the posterior from N(0, 1) in nats, summed over C, H, W: (B, 2c, h, w) to (B,), in fp32."""
    mean, logvar = split_moments(moments.float())
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, 3x3, twice, plus a shortcut (1x1 where the width changes). No time embedding."""

    recomputable = True

    def __init__(self, in_width: int, out_width: int, dropout: float, groups: int):
        super().__init__()
        self.norm1 = group_norm(in_width, NORM_EPS, groups)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.norm2 = group_norm(out_width, NORM_EPS, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.nin_shortcut = nn.Identity() if in_width == out_width else nn.Conv2d(in_width, out_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """One attention head as wide as the map, over all positions, residual. (B, c, h, w) in and out."""

    recomputable = True

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = group_norm(width, NORM_EPS, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (map_to_tokens(conv, h).unsqueeze(1) for conv in (self.q, self.k, self.v))
        if not torch.is_grad_enabled():  # other strides keep the fused kernel away, whose memory is linear
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        return x + heads_to_map(self.proj_out, attention(q, k, v), x.shape)


class Downsample(nn.Module):
    """3x3 convolution of stride 2 with one zero on the right and at the bottom only, as the weights expect."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour twice as large, then a 3x3 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where `with_attention`."""

    def __init__(self, in_width: int, out_width: int, depth: int, with_attention: bool, settings: AutoencoderSettings):
        super().__init__()
        widths = [in_width] + [out_width] * depth
        dropout, groups = settings.dropout, settings.groups
        self.block = nn.ModuleList(ResnetBlock(a, b, dropout, groups) for a, b in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(AttnBlock(out_width, groups) for _ in range(depth if with_attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = run_block(block, x)
            if len(self.attn):
                x = run_block(self.attn[i], x)
        return x


class Middle(nn.Module):
    """Residual block, attention (unless it is off), residual block."""

    def __init__(self, width: int, settings: AutoencoderSettings):
        super().__init__()
        self.block_1 = ResnetBlock(width, width, settings.dropout, settings.groups)
        self.attn_1 = AttnBlock(width, settings.groups) if settings.mid_attention else nn.Identity()
        self.block_2 = ResnetBlock(width, width, settings.dropout, settings.groups)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.block_1, self.attn_1, self.block_2):
            x = run_block(block, x)
        return x


def _level_plan(settings: AutoencoderSettings) -> list[tuple[int, bool]]:
    """(width, has attention) of each level. Attention goes by the nominal resolution, never by the real image."""
    return [
        (round(settings.channels * mult), settings.resolution // 2**i in settings.attn_resolutions)
        for i, mult in enumerate(settings.channel_mult)
    ]


class Encoder(nn.Module):
    """Pixels (B, in_channels, H, W) to (B, out_channels, H/f, W/f)."""

    def __init__(self, settings: AutoencoderSettings, out_channels: int):
        super().__init__()
        plan, width = _level_plan(settings), settings.channels
        self.conv_in = nn.Conv2d(settings.in_channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (out_width, attends) in enumerate(plan):
            level = Level(width, out_width, settings.num_res_blocks, attends, settings)
            width = out_width
            if i < len(plan) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(width, settings)
        self.norm_out = group_norm(width, NORM_EPS, settings.groups)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(as_maps(x, first_stage=True))
        for level in self.down:
            h = level(h)
            if isinstance(resample := getattr(level, "downsample", None), Downsample):
                h = resample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """(B, z_channels, h, w) to pixels (B, in_channels, h·f, w·f); linear output, not clamped.

    `up.0` is the highest resolution and runs last; a level holds one block more than the encoder's.
    """

    def __init__(self, settings: AutoencoderSettings):
        super().__init__()
        plan = _level_plan(settings)
        width = plan[-1][0]
        self.conv_in = nn.Conv2d(settings.z_channels, width, 3, padding=1)
        self.mid = Middle(width, settings)
        levels: list[Level] = []
        for i, (out_width, attends) in reversed(list(enumerate(plan))):
            level = Level(width, out_width, settings.num_res_blocks + 1, attends, settings)
            width = out_width
            if i > 0:
                level.upsample = Upsample(width)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = group_norm(width, NORM_EPS, settings.groups)
        self.conv_out = nn.Conv2d(width, settings.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(as_maps(z, first_stage=True)))
        for level in reversed(self.up):
            h = level(h)
            if isinstance(resample := getattr(level, "upsample", None), Upsample):
                h = resample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def _conv(in_width: int, out_width: int, kernel: int, gain: float = 1.0) -> nn.Conv2d:
    """Convolution that keeps the variance times gain²: without norms the signal's size is set here."""
    conv = nn.Conv2d(in_width, out_width, kernel, padding=kernel // 2)
    nn.init.normal_(conv.weight, std=gain * (in_width * kernel**2) ** -0.5)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


class FastBlock(nn.Module):
    """x + scale · conv(silu(conv(x))) without normalisation; scale = 1/√(number of blocks) bounds the sum."""

    recomputable = True

    def __init__(self, width: int, scale: float):
        super().__init__()
        self.scale = scale
        self.conv1 = _conv(width, width, 3)
        self.conv2 = _conv(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.conv2(F.silu(self.conv1(x)))


def _fast_plan(settings: AutoencoderSettings) -> tuple[int, list[tuple[int, int]]]:
    """Unshuffle factor of the stem, then (width, further factor 1 or 2 on entering) of each level.

    The stem takes up to 4, the last transitions the rest; the last width repeats where levels are missing.
    """
    stem = min(settings.f, 4)
    halvings = (settings.f // stem).bit_length() - 1
    mults = list(settings.channel_mult)
    mults += [mults[-1]] * (halvings + 1 - len(mults))
    factors = [1] * (len(mults) - halvings) + [2] * halvings
    return stem, [(round(settings.channels * mult), factor) for mult, factor in zip(mults, factors)]


class FastEncoder(nn.Module):
    """Pixel-unshuffle stem and residual convolutions. (B, in_channels, H, W) to (B, out_channels, H/f, W/f)."""

    def __init__(self, settings: AutoencoderSettings, out_channels: int):
        super().__init__()
        self.stem, plan = _fast_plan(settings)
        width, scale = plan[0][0], (settings.num_res_blocks * len(plan)) ** -0.5
        self.conv_in = _conv(settings.in_channels * self.stem**2, width, 3)
        layers: list[nn.Module] = []
        for out_width, factor in plan:
            if factor > 1:
                layers += [nn.PixelUnshuffle(factor), _conv(width * factor**2, out_width, 1)]
            elif width != out_width:
                layers.append(_conv(width, out_width, 1))
            width = out_width
            layers += [FastBlock(width, scale) for _ in range(settings.num_res_blocks)]
        self.blocks = nn.Sequential(*layers)
        self.conv_out = _conv(width, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(as_maps(F.pixel_unshuffle(x, self.stem)))
        for block in self.blocks:
            h = run_block(block, h)
        return self.conv_out(F.silu(h))


class FastDecoder(nn.Module):
    """The encoder's mirror with a pixel-shuffle head. (B, z_channels, h, w) to (B, in_channels, h·f, w·f)."""

    def __init__(self, settings: AutoencoderSettings, in_channels: int):
        super().__init__()
        self.head, plan = _fast_plan(settings)
        width, scale = plan[-1][0], (settings.num_res_blocks * len(plan)) ** -0.5
        self.conv_in = _conv(in_channels, width, 3)
        layers: list[nn.Module] = []
        below = [width for width, _ in plan[:-1]]
        for (_, factor), next_width in zip(reversed(plan), [*reversed(below), None]):
            layers += [FastBlock(width, scale) for _ in range(settings.num_res_blocks)]
            if next_width is None:
                break
            if factor > 1:
                layers += [_conv(width, next_width * factor**2, 1), nn.PixelShuffle(factor)]
            elif width != next_width:
                layers.append(_conv(width, next_width, 1))
            width = next_width
        self.blocks = nn.Sequential(*layers)
        self.conv_out = _conv(width, settings.in_channels * self.head**2, 3, gain=0.1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(as_maps(z))
        for block in self.blocks:
            h = run_block(block, h)
        return F.pixel_shuffle(self.conv_out(F.silu(h)), self.head)


class Autoencoder(nn.Module):
    """Encoder, regulariser and decoder by settings.

    f = 1 is the identity without parameters, except for family "paper" with a channel_mult of one entry: a network
    that does not reduce, as one converted from elsewhere can be.
    VQ models hold the quantiser as `quantize`: `ae.quantize(z)` gives a `Quantized`.
    """

    encoder: Encoder | FastEncoder
    decoder: Decoder | FastDecoder
    quant_conv: nn.Conv2d | nn.Identity
    post_quant_conv: nn.Conv2d | nn.Identity

    def __init__(self, settings: AutoencoderSettings):
        super().__init__()
        self.settings = settings
        if self.is_identity:
            return
        parts = 2 if settings.reg == "kl" else 1
        if settings.family == "paper":
            self.encoder = Encoder(settings, parts * settings.z_channels)
            self.quant_conv = nn.Conv2d(parts * settings.z_channels, parts * settings.embed_dim, 1)
            self.post_quant_conv = nn.Conv2d(settings.embed_dim, settings.z_channels, 1)
            self.decoder = Decoder(settings)
        else:
            self.encoder = FastEncoder(settings, parts * settings.embed_dim)
            self.quant_conv, self.post_quant_conv = nn.Identity(), nn.Identity()
            self.decoder = FastDecoder(settings, settings.embed_dim)
        if self.is_vq:
            self.quantize = VectorQuantizer(
                settings.codebook_size, settings.embed_dim, settings.beta, settings.legacy_beta
            )

    @property
    def is_identity(self) -> bool:
        """True where latents are the pixels themselves (LDM-1)."""
        s = self.settings
        return s.f == 1 and not (s.family == "paper" and len(s.channel_mult) == 1)

    @property
    def is_vq(self) -> bool:
        """True where latents are quantised before decoding."""
        return self.settings.reg == "vq" and not self.is_identity

    @property
    def f(self) -> int:
        """Downsampling factor."""
        return self.settings.f

    @property
    def latent_channels(self) -> int:
        """Channels of z."""
        return self.settings.in_channels if self.is_identity else self.settings.embed_dim

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution, which the adaptive weight of the GAN loss looks at."""
        if self.is_identity:
            raise UsageError("autoencoder.f = 1 has no weights, so nothing can be trained; choose f = 2 or more")
        return self.decoder.conv_out.weight

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(c, h, w) of the latent of a height x width image; UsageError where f does not divide it."""
        check_divisible(height, width, self.f, "an image")
        return self.latent_channels, height // self.f, width // self.f

    def moments(self, x: Tensor) -> Tensor:
        """KL: (B, 2c, h, w), mean and raw log-variance; VQ: (B, c, h, w) before quantisation; identity: x."""
        check_divisible(x.shape[-2], x.shape[-1], self.f, "an image")
        return x if self.is_identity else self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor, quantize: bool = True) -> Tensor:
        """Unscaled latents (B, c, h, w) to pixels, not clamped; VQ quantises first unless `quantize` is false."""
        if self.is_identity:
            return z
        if self.is_vq and quantize:
            z = self.quantize(z).z
        return self.decoder(self.post_quant_conv(z))

    def codes(self, indices: Tensor) -> Tensor:
        """VQ: latents of code indices, int64 (B, h, w) to (B, c, h, w)."""
        return self.quantize.codes(indices)

    def kl(self, moments: Tensor) -> Tensor:
        """KL of the posterior a sample, (B,); zeros for VQ and identity, which have none."""
        if self.is_vq or self.is_identity:
            return moments.new_zeros(len(moments))
        return kl_divergence(moments)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> AutoencoderOutput:
        """The whole training pass. noise: (B, c, h, w) from N(0, 1) samples the posterior, None takes its mode."""
        moments = self.moments(x)
        if self.is_vq:
            found = self.quantize(moments)
            reconstruction = self.decode(found.z, quantize=False)
            return AutoencoderOutput(reconstruction, moments, found.z, found.loss, found.indices)
        z = moments if self.is_identity else posterior_sample(moments, noise)
        return AutoencoderOutput(self.decode(z), moments, z, moments.new_zeros(()))


def posterior_second_moments(moments: Tensor, is_vq: bool) -> tuple[Tensor, Tensor]:
    """Per-channel sums of E[z] and E[z²] over the posterior. moments: (B, 2c, h, w), VQ and pixels (B, c, h, w)."""
    if is_vq:
        return moments.sum(dim=(0, 2, 3)), moments.square().sum(dim=(0, 2, 3))
    mean, logvar = split_moments(moments)
    return mean.sum(dim=(0, 2, 3)), (mean.square() + logvar.exp()).sum(dim=(0, 2, 3))
