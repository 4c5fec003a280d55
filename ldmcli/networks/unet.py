"""The denoising UNet (Sec. 3.2-3.3, App. E) with the original's state-dict keys, and a few extensions.

Extensions, all off in the published models: position codes inside attention, folding of latent patches, a vector
beside the time embedding, widths that 32 groups do not divide. Their keys lie outside of the original's set.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmcli.core.errors import UsageError
from ldmcli.core.settings import DiffusionSettings
from ldmcli.networks.blocks import (
    TransformerBlock,
    as_maps,
    attention,
    check_divisible,
    group_norm,
    heads_to_map,
    map_to_tokens,
    run_block,
    split_qkv,
    timestep_embedding,
    zero_init,
)

NORM_EPS = 1e-5
TRANSFORMER_NORM_EPS = 1e-6
POSITION_STD = 0.3  # of the code inside attention; large enough that relations are learned soon (docs/experiments.md)
INPUT_POSITION_STD = 0.02  # of the map added after the first convolution


@dataclass(frozen=True)
class BlockInputs:
    """What layers see beside the map: time embedding (B, 4·channels), tokens (B, M, d) or None, position codes."""

    embedding: Tensor
    context: Tensor | None
    position: Callable[[str, Tensor], Tensor | None]


class TakesTimestep(nn.Module):
    """A layer whose forward takes (x, BlockInputs)."""


class TimestepSequential(nn.ModuleList):
    """Layers in a row, (B, c, h, w) to (B, c', h', w'); those that are `TakesTimestep` also get the step's inputs."""

    recomputable = True
    recomputes = False

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        for layer in self:
            x = layer(x, inputs) if isinstance(layer, TakesTimestep) else layer(x)
        return x


class Downsample(nn.Module):
    """3x3 convolution of stride 2 with symmetric padding (the autoencoder's is asymmetric)."""

    def __init__(self, width: int):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) to (B, width, h/2, w/2), rounded up."""
        return self.op(x)


class Upsample(nn.Module):
    """Nearest neighbour twice as large, then a 3x3 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) to (B, width, 2h, 2w)."""
        return self.conv(upsample_2(x))


def upsample_2(x: Tensor) -> Tensor:
    """Each position becomes 2x2 equal ones."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def downsample_2(x: Tensor) -> Tensor:
    """Mean of each 2x2 block."""
    return F.avg_pool2d(x, 2)


class ResBlock(TakesTimestep):
    """Two 3x3 convolutions with the time embedding between them, residual; optionally resampling both ways.

    scale_shift: GroupNorm's output · (1 + scale) + shift, both from the embedding, instead of adding it.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        settings: DiffusionSettings,
        *,
        resample: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.scale_shift, self.resample = settings.scale_shift, resample
        embedding_width = 4 * settings.channels
        self.in_layers = nn.Sequential(
            group_norm(in_width, NORM_EPS, settings.groups), nn.SiLU(), nn.Conv2d(in_width, out_width, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(embedding_width, out_width * (2 if self.scale_shift else 1))
        )
        self.out_layers = nn.Sequential(
            group_norm(out_width, NORM_EPS, settings.groups),
            nn.SiLU(),
            nn.Dropout(settings.dropout),
            zero_init(nn.Conv2d(out_width, out_width, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if in_width == out_width else nn.Conv2d(in_width, out_width, 1)

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """(B, in_width, h, w) to (B, out_width, h', w'), where h' and w' are h and w but for resampling."""
        norm, activation, conv = self.in_layers
        h = activation(norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(h)
        shift = self.emb_layers(inputs.embedding)[:, :, None, None]
        norm, rest = self.out_layers[0], self.out_layers[1:]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = torch.addcmul(shift, norm(h), 1 + scale)
        else:
            h = norm(h + shift)
        return self.skip_connection(x) + rest(h)


def head_count(width: int, settings: DiffusionSettings, level: int = 0) -> int:
    """Attention heads of a level: as `level_heads` says, or the fixed number, or width / head_channels rounded down to
    a divisor of width."""
    given = settings.level_heads[level] if settings.level_heads else settings.num_heads
    if given > 0:
        if width % given:
            name = "level_heads" if settings.level_heads else "num_heads"
            raise UsageError(f"diffusion.{name} = {given} does not divide a width of {width}")
        return given
    heads = max(1, width // settings.head_channels)
    while width % heads:
        heads -= 1
    return heads


class AttentionBlock(TakesTimestep):
    """Self-attention over all positions, residual; channels of qkv are ordered (head, {q, k, v}, d)."""

    def __init__(self, width: int, heads: int, settings: DiffusionSettings, position_key: str):
        super().__init__()
        self.heads, self.position_key = heads, position_key
        self.norm = group_norm(width, NORM_EPS, settings.groups)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = zero_init(nn.Conv1d(width, width, 1))

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """(B, width, h, w) to the same."""
        h = self.norm(x)
        code = inputs.position(self.position_key, x)
        h = h if code is None else h + code
        q, k, v = split_qkv(map_to_tokens(self.qkv, h), self.heads)
        return x + heads_to_map(self.proj_out, attention(q, k, v), x.shape)


class SpatialTransformer(TakesTimestep):
    """Transformer blocks over the positions of a map with cross-attention to the context, residual (App. E.2.1)."""

    def __init__(self, width: int, heads: int, settings: DiffusionSettings, context_dim: int | None, position_key: str):
        super().__init__()
        self.position_key = position_key
        self.norm = group_norm(width, TRANSFORMER_NORM_EPS, settings.groups)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, heads, width // heads, context_dim, settings.dropout)
            for _ in range(settings.transformer_depth)
        )
        self.proj_out = zero_init(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """(B, width, h, w) to the same; positions attend to each other, then to the tokens."""
        h = self.norm(x)
        code = inputs.position(self.position_key, x)
        h = h if code is None else h + code
        tokens = map_to_tokens(self.proj_in, h)
        for block in self.transformer_blocks:
            tokens = block(tokens, inputs.context)
        return x + heads_to_map(self.proj_out, tokens[:, None], x.shape)


class LearnedPosition(nn.Module):
    """A learned map (C, h, w), resized bilinearly where the input has another size."""

    def __init__(self, width: int, size: tuple[int, int], std: float):
        super().__init__()
        self.map = nn.Parameter(nn.init.normal_(torch.empty(width, *size), std=std))

    def forward(self, size: tuple[int, int]) -> Tensor:
        """The code at `size` = (h, w): (1, width, h, w)."""
        if tuple(self.map.shape[1:]) == size:
            return self.map[None]
        return F.interpolate(self.map[None], size=size, mode="bilinear", align_corners=False)


class SinusoidalPosition(nn.Module):
    """Sines and cosines of both coordinates, relative to the map's sides, mixed linearly into C channels.

    The shortest wave spans four cells of the trained size: shorter ones would alias there and mislead elsewhere.
    """

    def __init__(self, width: int, size: tuple[int, int], std: float):
        super().__init__()
        self.waves = max(1, max(size).bit_length() - 1)
        features = 4 * self.waves
        self.weight = nn.Parameter(std * (2 / features) ** 0.5 * torch.randn(width, features))

    def forward(self, size: tuple[int, int]) -> Tensor:
        """The code at `size` = (h, w): (1, width, h, w)."""
        codes = sinusoidal_map(size, self.waves, self.weight.device).to(self.weight)
        return F.conv2d(codes, self.weight[:, :, None, None])


def sinusoidal_map(size: tuple[int, int], waves: int, device: torch.device | None = None) -> Tensor:
    """sin and cos of π·2^k·y and π·2^k·x, k < waves, y and x in (0, 1) at cell centres: (1, 4·waves, h, w)."""
    planes = []
    for axis, side in enumerate(size):
        place = (torch.arange(side, dtype=torch.float32, device=device) + 0.5) / side
        place = place.view(-1, 1) if axis == 0 else place.view(1, -1)
        for k in range(waves):
            angle = (torch.pi * 2**k * place).expand(size)
            planes += [angle.sin(), angle.cos()]
    return torch.stack(planes)[None]


def level_widths(settings: DiffusionSettings) -> list[int]:
    """Channels of each level: exact for whole multipliers, else rounded to a multiple of 8."""
    return [
        settings.channels * int(mult) if mult == int(mult) else max(8, round(settings.channels * mult / 8) * 8)
        for mult in settings.channel_mult
    ]


class UNetEncoder(nn.Module):
    """The half of the UNet that goes down, and its middle: what UNet and noisy classifier share.

    x: (B, in_channels, h, w); sample_size is the (h, w) that position maps are made for; other sizes resize them.
    """

    def __init__(
        self,
        settings: DiffusionSettings,
        in_channels: int,
        *,
        context_dim: int | None = None,
        sample_size: tuple[int, int] = (16, 16),
    ):
        super().__init__()
        self.settings, self.context_dim, self.sample_size = settings, context_dim, sample_size
        self.positions = nn.ModuleDict()
        self.widths = level_widths(settings)
        self.time_embed = _two_layers(settings.channels, 4 * settings.channels)
        self.input_blocks = nn.ModuleList()
        self.skip_widths = self._build_down(in_channels * settings.patch**2)
        self._build_middle(self.skip_widths[-1], 2 ** (len(self.widths) - 1))

    @property
    def size_factor(self) -> int:
        """Both sides of the latent must be multiples of this."""
        return self.settings.patch * 2 ** (len(self.settings.channel_mult) - 1)

    def encode(self, x: Tensor, inputs: BlockInputs) -> tuple[Tensor, list[Tensor]]:
        """(the middle's map, maps of the skip connections). Raises UsageError where `size_factor` does not divide h and
        w."""
        check_divisible(x.shape[-2], x.shape[-1], self.size_factor, "a latent")
        h = as_maps(F.pixel_unshuffle(x, self.settings.patch) if self.settings.patch > 1 else x)
        skips: list[Tensor] = []
        for i, block in enumerate(self.input_blocks):
            h = run_block(block, h, inputs)
            if i == 0:
                code = inputs.position("input", h)
                h = h if code is None else h + code
            skips.append(h)
        return run_block(self.middle_block, h, inputs), skips

    def embed_timestep(self, t: Tensor) -> Tensor:
        """(B, 4·channels) of timesteps (B,)."""
        # the angles need fp32: bf16 rounds t = 998 and 999 to the same number
        code = timestep_embedding(t, self.settings.channels).to(next(self.time_embed.parameters()).dtype)
        return self.time_embed(code)

    def position_codes(self) -> Callable[[str, Tensor], Tensor | None]:
        """A function (key, map) to the code of that key at the map's size and dtype; each is made once a pass."""
        made: dict[str, Tensor] = {}

        def position(key: str, like: Tensor) -> Tensor | None:
            if key not in self.positions:
                return None
            code = made.get(key)
            if code is None:
                code = self.positions[key](tuple(like.shape[-2:])).to(like.dtype)
                if not self.middle_block.recomputes:  # what blocks compute again has to make the same tensors
                    made[key] = code
            return code

        return position

    def _build_down(self, in_channels: int) -> list[int]:
        """Fills input_blocks; returns the width that each hands to its skip connection."""
        widths = self.widths
        width, skips = widths[0], [widths[0]]
        self.input_blocks.append(TimestepSequential([nn.Conv2d(in_channels, width, 3, padding=1)]))
        for level, out_width in enumerate(widths):
            for _ in range(self.settings.num_res_blocks):
                layers = [ResBlock(width, out_width, self.settings), *self._attention(out_width, 2**level)]
                self.input_blocks.append(TimestepSequential(layers))
                width = out_width
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(TimestepSequential([self._resampling(width, up=False)]))
                skips.append(width)
        return skips

    def _build_middle(self, width: int, factor: int) -> None:
        between = self._attention(width, factor, always=True) if self.settings.middle_attention else []
        blocks = [ResBlock(width, width, self.settings) for _ in range(2)]
        self.middle_block = TimestepSequential([blocks[0], *between, blocks[1]])

    def _resampling(self, width: int, up: bool) -> nn.Module:
        if self.settings.resblock_updown:
            return ResBlock(width, width, self.settings, resample=upsample_2 if up else downsample_2)
        return Upsample(width) if up else Downsample(width)

    def _attention(self, width: int, factor: int, always: bool = False) -> list[nn.Module]:
        """The attention layer of a level, or none; levels with one get a position code, shared both ways."""
        if not always and factor not in self.settings.attention_resolutions:
            return []
        key = f"d{factor}_c{width}"
        if self.settings.position != "none" and key not in self.positions:
            self._add_position(key, width, factor, POSITION_STD)
        heads = head_count(width, self.settings, factor.bit_length() - 1)
        if self.settings.spatial_transformer:
            return [SpatialTransformer(width, heads, self.settings, self.context_dim, key)]
        return [AttentionBlock(width, heads, self.settings, key)]

    def _add_position(self, key: str, width: int, factor: int, std: float) -> None:
        height, breadth = (max(1, -(-side // (factor * self.settings.patch))) for side in self.sample_size)
        make = SinusoidalPosition if self.settings.position == "sinusoidal" else LearnedPosition
        self.positions[key] = make(width, (height, breadth), std)

    def add_input_position(self) -> None:
        """A code is added to the first map, where settings say so."""
        if self.settings.position != "none":
            self._add_position("input", self.widths[0], 1, INPUT_POSITION_STD)


class UNet(UNetEncoder):
    """Predicts the objective's target (ε, v, x₀ or velocity) from a noisy latent.

    x: (B, in_channels, h, w), planes of concat conditions included; t: (B,) float or integer; context: (B, M,
    context_dim) or None; vector: (B, vector_dim) or None; returns (B, out_channels, h, w). h and w must be multiples
    of `size_factor`. sample_size is the (h, w) that position maps are made for; other sizes resize them.
    """

    def __init__(
        self,
        settings: DiffusionSettings,
        in_channels: int,
        out_channels: int,
        *,
        context_dim: int | None = None,
        vector_dim: int | None = None,
        sample_size: tuple[int, int] = (16, 16),
    ):
        super().__init__(settings, in_channels, context_dim=context_dim, sample_size=sample_size)
        widths = self.widths
        self.output_blocks = nn.ModuleList()
        self._build_up(self.skip_widths, widths)
        self.out = nn.Sequential(
            group_norm(widths[0], NORM_EPS, settings.groups),
            nn.SiLU(),
            zero_init(nn.Conv2d(widths[0], out_channels * settings.patch**2, 3, padding=1)),
        )
        self.add_input_position()
        self.vector_embed = None
        if vector_dim is not None and settings.vector_mlp:
            self.vector_embed = _two_layers(vector_dim, 4 * settings.channels)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, vector: Tensor | None = None) -> Tensor:
        """The raw prediction, (B, out_channels, h, w); shapes as above. Raises UsageError where `size_factor` does not
        divide h and w."""
        embedding = self.embed_timestep(t)
        if vector is not None:
            embedding = embedding + (vector if self.vector_embed is None else self.vector_embed(vector))
        inputs = BlockInputs(embedding, context, self.position_codes())
        h, skips = self.encode(x, inputs)
        for block in self.output_blocks:
            h = run_block(block, torch.cat([h, skips.pop()], dim=1), inputs)
        h = self.out(h)
        return F.pixel_shuffle(h, self.settings.patch) if self.settings.patch > 1 else h

    def _build_up(self, skips: list[int], widths: list[int]) -> None:
        width, skips = skips[-1], list(skips)
        for level, out_width in reversed(list(enumerate(widths))):
            for i in range(self.settings.num_res_blocks + 1):
                layers: list[nn.Module] = [ResBlock(width + skips.pop(), out_width, self.settings)]
                width = out_width
                layers += self._attention(width, 2**level)
                if level > 0 and i == self.settings.num_res_blocks:
                    layers.append(self._resampling(width, up=True))
                self.output_blocks.append(TimestepSequential(layers))


def _two_layers(in_width: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_width, width), nn.SiLU(), nn.Linear(width, width))
