"""Networks on pictures larger than memory or training allow: overlapping tiles, blended without a seam (Sec. 4.3.2).

The UNet sees tiles of z_t and of the planes beside it at each evaluation (`diffusion.tiling`); noise and sampler
know the whole latent. Autoencoders of family "fast", convolutions alone, encode and decode tiles likewise. Those of
family "paper" average over the whole map and attend to all of it, which tiles would lose (1 to 9 of 255 grey levels
were): theirs run operation by operation (`networks.chunked_autoencoder`) and give the untiled picture but for rounding.
"""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldmcli.core.errors import ResourceError
from ldmcli.data.arrays import to_pixels
from ldmcli.maths.tiles import blend, overlapping_tiles
from ldmcli.networks.chunked_autoencoder import Pieces
from ldmcli.sampling.first_stage import LoadedAutoencoder
from ldmcli.sampling.machine import full_precision
from ldmcli.sampling.model import TrainedDiffusion

MAX_MEMORY = 4.0  # GiB of activations; a fixed number, so that pictures don't depend on the machine, but for its GPU
GPU_SHARE = 0.5  # of a GPU's memory that activations may take
MEMORY_MARGIN = 1.25  # what a pass really takes, over what its tensors do: workspaces, fragmentation


def activation_budget(device: torch.device) -> float:
    """GiB that activations may take where nobody says how many: `MAX_MEMORY`, or half of a CUDA device's memory, whole
    GiB, so that devices of one kind agree."""
    if device.type != "cuda":
        return MAX_MEMORY
    return max(MAX_MEMORY, float(int(torch.cuda.get_device_properties(device).total_memory / 2**30 * GPU_SHARE)))


def batch_that_fits(model: TrainedDiffusion, size: tuple[int, int] | None, on_cpu: int, on_gpu: int) -> int:
    """Pictures of `size` px (None: as trained) that are drawn at a time: at most `on_cpu`, or, on a CUDA device, as
    many as half of what is free of its memory takes, up to `on_gpu`."""
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0] / 2**30
        return largest_batch(model, size or model.trained_size, free * GPU_SHARE, on_gpu)
    return on_cpu if size is None else largest_batch(model, size, MAX_MEMORY, on_cpu)


@torch.no_grad()
def encode(autoencoder: LoadedAutoencoder, images, tile: int = 0, max_memory: float = MAX_MEMORY) -> Tensor:
    """`LoadedAutoencoder.encode` (the mode) in tiles of `tile` latent positions a side; 0 = the whole at once.

    max_memory: GiB of activations, above which maps go to files where the network keeps whole ones.
    """
    x, network = to_pixels(images).to(autoencoder.device), autoencoder.network
    f = network.f
    if not tile or network.is_identity or max(x.shape[-2:]) <= tile * f:
        return autoencoder.encode(x)
    if network.settings.family == "paper":
        with full_precision(x.device):  # maps between two operations are float32
            moments = _pieces(tile * f, max_memory).moments(network, x)
    else:
        plan = overlapping_tiles((x.shape[-2], x.shape[-1]), tile * f, tile * f // 3 // f * f, unit=f, down=f)
        moments = blend(lambda k: network.moments(plan.cut(x, plan.corners[k])).float(), plan)
    return autoencoder.scale.normalise(autoencoder._draw(moments, sample=False))


@torch.no_grad()
def decode(autoencoder: LoadedAutoencoder, z: Tensor, tile: int = 0, max_memory: float = MAX_MEMORY) -> Tensor:
    """`LoadedAutoencoder.decode` in tiles of `tile` latent positions a side; 0 = the whole at once. max_memory as
    `encode`."""
    network = autoencoder.network
    if not tile or network.is_identity or max(z.shape[-2:]) <= tile:
        return autoencoder.decode(z)
    z = autoencoder.scale.restore(z.to(autoencoder.device))
    if network.settings.family == "paper":
        with full_precision(z.device):
            return _pieces(tile * network.f, max_memory).decode(network, z)
    plan = overlapping_tiles((z.shape[-2], z.shape[-1]), tile, tile // 3, up=network.f)
    return blend(lambda k: network.decode(plan.cut(z, plan.corners[k])).float(), plan)


def _pieces(side: int, gib: float) -> Pieces:
    return Pieces(side, int(gib * 2**30))


class LiveTensorMeter(TorchDispatchMode):
    """Counts the bytes of tensors that exist at the same time, but for `known` ones."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._left_out = [tensor.untyped_storage() for tensor in known]  # held, so that no other has such an address
        self.known = {storage._cdata for storage in self._left_out}

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
    with torch.no_grad(), LiveTensorMeter() as live:
        inputs = [torch.empty(shape, device="meta") for shape in shapes]
        torch.func.functional_call(network, weights, tuple(inputs), more)
    return int(live.peak * MEMORY_MARGIN)


def largest_tile(model: TrainedDiffusion, size: tuple[int, int], gib: float, *, halves: int = 2) -> int:
    """Latent positions a side of the largest tile that UNet and autoencoder take within `gib` GiB; 0 where the whole
    picture of `size` = (height, width) px fits, one at a time.

    halves: evaluations of the UNet that go in one call (guidance). Raises ResourceError where even the smallest tile
    is too much.
    """
    unit, f = model.network.unet.size_factor, model.autoencoder.network.f
    latent = [-(-side // (f * unit)) * unit for side in size]

    def fits(height: int, width: int) -> bool:
        return peak_activation_bytes(model, height, width, halves) <= gib * 2**30

    if fits(*latent):
        return 0
    low, high = 0, max(latent) // unit
    while high - low > 1:  # low fits, high does not
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * unit, middle * unit) else (low, middle)
    if low == 0:
        need = peak_activation_bytes(model, unit, unit, halves) / 2**30
        raise ResourceError(f"--max-memory {gib:g}: the smallest tile of this model needs {need:.2g} GiB")
    return low * unit


def largest_batch(model: TrainedDiffusion, size: tuple[int, int], gib: float, most: int) -> int:
    """How many pictures of `size` px go through the networks at once within `gib` GiB: 1 to `most`."""
    unit, f = model.network.unet.size_factor, model.autoencoder.network.f
    height, width = (-(-side // (f * unit)) * unit for side in size)
    one = peak_activation_bytes(model, height, width, 2)
    return int(min(most, max(1, gib * 2**30 // one)))


def peak_activation_bytes(model: TrainedDiffusion, height: int, width: int, halves: int) -> int:
    """Activations of the larger of two passes at a latent of height x width: UNet (`halves` at once), autoencoder."""
    conditions, unet, network = model.conditions, model.network.unet, model.autoencoder.network
    channels = model.network.latent_shape[0] + conditions.concat_channels
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
