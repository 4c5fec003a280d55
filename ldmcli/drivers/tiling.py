"""Networks on pictures larger than memory or training allow: overlapping tiles, blended without a seam (Sec. 4.3.2).

The UNet sees tiles of z_t and of the planes beside it at each evaluation (`sampling.tiled_predict`); noise and sampler
know the whole latent. The autoencoder encodes and decodes tiles.

Without normalisation that gives the untiled picture. The paper's networks normalise over groups of channels of the
whole map, and attend to all of it: a tile alone has other averages, which shifts colours, and larger overlaps change
nothing about it. So the averages are taken once, from the whole picture with rows and columns left out, for all tiles.
Measured on two photographs of 224x288 px with a small f = 4 network of that kind after 2 minutes of training, tiles of
160 px: with averages of their own the tiles miss the untiled decoding by 7.9 to 9.4 of 255 grey levels, with those of
the thinned whole by 0.9 to 2.2 without attention and 2.7 to 5.8 with it. Averages pooled over the tiles' own passes
came out worse (15 to 19) and are exact only after a pass for every norm of the network.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldmcli.core.errors import ResourceError
from ldmcli.drivers.loaded import LoadedAutoencoder, LoadedDiffusion, to_pixels
from ldmcli.maths.tiles import Plan, blend, smooth_plan

MEMORY_MARGIN = 1.25  # what a pass really takes, over what its tensors do: workspaces, fragmentation


@torch.no_grad()
def encode(autoencoder: LoadedAutoencoder, images, tile: int = 0) -> Tensor:
    """`LoadedAutoencoder.encode` (the mode) in tiles of `tile` latent positions a side; 0 = the whole at once."""
    x, f = to_pixels(images).to(autoencoder.device), autoencoder.network.f
    if not tile or autoencoder.network.is_identity or max(x.shape[-2:]) <= tile * f:
        return autoencoder.encode(x)
    plan = smooth_plan((x.shape[-2], x.shape[-1]), tile * f, tile * f // 3 // f * f, unit=f, down=f)
    moments = _in_tiles(autoencoder.network, autoencoder.network.moments, plan, x)
    return autoencoder.scale.normalise(autoencoder._draw(moments, sample=False))


@torch.no_grad()
def decode(autoencoder: LoadedAutoencoder, z: Tensor, tile: int = 0) -> Tensor:
    """`LoadedAutoencoder.decode` in tiles of `tile` latent positions a side; 0 = the whole at once."""
    if not tile or autoencoder.network.is_identity or max(z.shape[-2:]) <= tile:
        return autoencoder.decode(z)
    plan = smooth_plan((z.shape[-2], z.shape[-1]), tile, tile // 3, up=autoencoder.network.f)
    z = autoencoder.scale.restore(z.to(autoencoder.device))
    return _in_tiles(autoencoder.network, autoencoder.network.decode, plan, z)


def _in_tiles(network: nn.Module, function: Callable[[Tensor], Tensor], plan: Plan, x: Tensor) -> Tensor:
    """function on the tiles of x, with group statistics of the whole where the network has any."""
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    found = _statistics(norms, function, _thinned(x, plan)) if norms else {}
    with _fixed(found):
        return blend(lambda k: function(plan.cut(x, plan.corners[k])), plan)


def _thinned(x: Tensor, plan: Plan) -> Tensor:
    """The whole of x with rows and columns left out, as large as a tile in all; sides stay multiples of the unit."""
    share = math.sqrt(plan.tile[0] * plan.tile[1] / (plan.size[0] * plan.size[1]))
    size = [min(side, max(1, round(side * share / plan.down)) * plan.down) for side in plan.size]
    return F.interpolate(x, size=size, mode="nearest")


def _statistics(norms: list[nn.GroupNorm], function: Callable, x: Tensor) -> dict[nn.GroupNorm, Tensor]:
    """Mean and variance of each group of each norm's input as `function` sees x: norm -> (2, B, groups)."""
    found: dict[nn.GroupNorm, Tensor] = {}

    def look(norm: nn.GroupNorm, inputs: tuple[Tensor, ...]) -> None:
        groups = inputs[0].unflatten(1, (norm.num_groups, -1)).flatten(2)
        found[norm] = torch.stack([groups.mean(2), groups.var(2, correction=0)])

    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    try:
        function(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _normalised(norm: nn.GroupNorm, statistics: Tensor, x: Tensor) -> Tensor:
    mean, variance = (part[:, :, None, None, None].to(x) for part in statistics)
    groups = x.unflatten(1, (norm.num_groups, -1))
    y = ((groups - mean) * (variance + norm.eps).rsqrt()).flatten(1, 2)
    return y * norm.weight[:, None, None] + norm.bias[:, None, None]


@contextmanager
def _fixed(statistics: dict[nn.GroupNorm, Tensor]) -> Iterator[None]:
    """Norms with given statistics instead of those of what they see; nothing changes where there are none."""
    for norm, found in statistics.items():
        norm.forward = partial(_normalised, norm, found)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in statistics:
            del norm.forward


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that exist at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage) -> None:
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, name: int, size: int) -> None:
        self.known.discard(name)
        self.now -= size


def peak_bytes(network: nn.Module, *shapes: tuple[int, ...], **more) -> int:
    """Bytes of activations that a pass over inputs of these shapes needs at its fullest moment, weights left out.

    The pass runs on the meta device: shapes only, nothing is computed.
    """
    weights = {name: tensor.to("meta") for name, tensor in network.state_dict().items()}
    with torch.no_grad(), _Live() as live:
        inputs = [torch.empty(shape, device="meta") for shape in shapes]
        torch.func.functional_call(network, weights, tuple(inputs), more)
    return int(live.peak * MEMORY_MARGIN)


def tile_within(model: LoadedDiffusion, size: tuple[int, int], gib: float, *, halves: int = 2) -> int:
    """Latent positions a side of the largest tile that UNet and autoencoder take within `gib` GiB; 0 where the whole
    picture of `size` = (height, width) px fits, one at a time.

    halves: evaluations of the UNet that go in one call (guidance). Raises ResourceError where even the smallest tile
    is too much.
    """
    unit, f = model.model.unet.size_factor, model.autoencoder.network.f
    latent = [-(-side // (f * unit)) * unit for side in size]

    def fits(height: int, width: int) -> bool:
        return passes_bytes(model, height, width, halves) <= gib * 2**30

    if fits(*latent):
        return 0
    low, high = 0, max(latent) // unit
    while high - low > 1:  # low fits, high does not
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * unit, middle * unit) else (low, middle)
    if low == 0:
        need = passes_bytes(model, unit, unit, halves) / 2**30
        raise ResourceError(f"--max-memory {gib:g}: the smallest tile of this model needs {need:.2g} GiB")
    return low * unit


def batch_within(model: LoadedDiffusion, size: tuple[int, int], gib: float, most: int) -> int:
    """How many pictures of `size` px go through the networks at once within `gib` GiB: 1 to `most`."""
    unit, f = model.model.unet.size_factor, model.autoencoder.network.f
    height, width = (-(-side // (f * unit)) * unit for side in size)
    one = passes_bytes(model, height, width, 2)
    return int(min(most, max(1, gib * 2**30 // one)))


def passes_bytes(model: LoadedDiffusion, height: int, width: int, halves: int) -> int:
    """Activations of the larger of two passes at a latent of height x width: UNet (`halves` at once), autoencoder."""
    conditions, unet, network = model.model.conditions, model.model.unet, model.autoencoder.network
    channels = model.model.latent_shape[0] + conditions.concat_channels
    more = {}
    if conditions.context_dim:
        more["context"] = torch.empty(halves, 77, conditions.context_dim, device="meta")
    if conditions.vector_dim:
        more["vector"] = torch.empty(halves, conditions.vector_dim, device="meta")
    of_unet = peak_bytes(unet, (halves, channels, height, width), (halves,), **more)
    if network.is_identity:
        return of_unet
    pixels = (1, network.settings.in_channels, height * network.f, width * network.f)
    return max(of_unet, peak_bytes(network, pixels))
