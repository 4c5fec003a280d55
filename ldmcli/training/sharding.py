"""Weights, gradients, optimiser and averages cut into one part a process (`train.shard`; FSDP2, Zhao et al. 2023).

A block's weights are gathered for as long as it computes. What this process keeps of a parameter is a plain tensor,
its *part*: optimiser and average work on parts, and know of no other process. Checkpoints hold whole tensors.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ldmcli.core.settings import TrainSettings
from ldmcli.networks.unet import TimestepSequential
from ldmcli.training.optimizer import PhaseOptimizer


def is_shard(tensor: Tensor) -> bool:
    """Whether processes hold one part each of a tensor."""
    return isinstance(tensor, DTensor)


def shard(network: nn.Module, device: torch.device, processes: int) -> None:
    """Cuts the parameters of a network, whose values must be equal on all processes, in place: block by block, then
    what is left. Collective."""
    mesh = init_device_mesh(device.type, (processes,))
    for block in blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def blocks(network: nn.Module) -> list[nn.Module]:
    """Parts of a network that compute one after the other: the blocks of a UNet, and the layers of other networks."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in network.modules():
        parts = [module] if isinstance(module, TimestepSequential) else list(module.children())
        if not isinstance(module, nn.ModuleList):  # of such a list each item is a part
            continue
        for part in parts:
            computes = type(part).forward is not nn.Module.forward
            if computes and part not in inside and any(True for _ in part.parameters()):
                found.append(part)
                inside |= set(part.modules())
    return found


def part_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory; the tensor itself where that is all of it."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, other: Tensor) -> Tensor:
    """A part as what it is: of a tensor that is cut as `other` is, where that is cut."""
    if not isinstance(other, DTensor):
        return part
    mesh, places = other.device_mesh, other.placements
    return DTensor.from_local(part, mesh, places, run_check=False, shape=other.shape, stride=other.stride())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Collective where it is cut."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, equal on all processes, cut as `other` is; on its device."""
    tensor = tensor.to(other.device)
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def load(network: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """`load_state_dict` of whole tensors, equal on all processes, into a network that may be cut."""
    own = network.state_dict()
    network.load_state_dict({k: cut_like(v, own[k]) if k in own else v for k, v in tensors.items()}, strict=strict)


def total_norm(gradients: list[Tensor], cut: bool) -> Tensor:
    """The norm of all gradients together, of this process's parts where they are cut, on their device. Collective."""
    norm = torch.nn.utils.get_total_norm(gradients)
    if not cut:
        return norm
    squares = norm.float().square()
    torch.distributed.all_reduce(squares)
    return squares.sqrt()


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """A context in which a network that may be cut computes alone on any process, with all its weights. Collective."""
    parts = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not network, recurse=False)


@contextmanager
def unsynchronised(network: FSDPModule) -> Iterator[None]:
    """A context in which backward passes add up gradients of this process alone."""
    network.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)


class ShardedOptimizer(PhaseOptimizer):
    """The optimiser of a network that is cut: it knows this process's parts of the parameters, as if they were all."""

    def __init__(self, network: nn.Module, settings: TrainSettings, lr: float | None):
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        super().__init__([(n, nn.Parameter(part_of(p))) for n, p in self.parameters.items()], settings, lr)

    def gradients(self) -> list[Tensor]:
        """Parts of the gradients of all parameters that have one."""
        for name, part in self.named:
            gradient = self.parameters[name].grad
            part.grad = None if gradient is None else part_of(gradient)
        return super().gradients()

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None
        super().zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        """All state as flat named tensors, those of parameters cut as these are."""
        return {key: like(value, self._parameter(key, value)) for key, value in super().state_dict().items()}

    def placed(self, key: str, tensor: Tensor) -> Tensor:
        """A whole tensor of a state, as `load_state_dict` takes it: its part."""
        return part_of(cut_like(tensor, self._parameter(key, tensor)))

    def _parameter(self, key: str, value: Tensor) -> Tensor:
        """The parameter that a tensor of the state belongs to; the tensor itself, where it is a number of steps."""
        return self.parameters[key.removeprefix("adam.").rpartition(".")[0]] if value.ndim else value
