"""Patch discriminator of the first stage; its batch statistics do not depend on the number of processes."""

import torch
from torch import Tensor, nn

from ldmcli.core.errors import UsageError
from ldmcli.networks.blocks import as_maps


def world_size() -> int:
    """Processes that train together; 1 when nothing was started."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


class _SumOverProcesses(torch.autograd.Function):
    """all_reduce whose gradient is the all_reduce of the gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _SumOverProcesses.apply(grad.contiguous())


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose training statistics are those of the global batch, on gloo as on NCCL.

    `nn.SyncBatchNorm` refuses CPU tensors. The sums are reduced with autograd, so N processes have the
    gradients and running statistics of one process with the same images, whatever share each of them holds.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        assert self.running_mean is not None
        x = input.to(self.running_mean.dtype)
        mean, var, count = _global_moments(x)
        self._update_running(mean.detach(), var.detach(), count.detach())
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return (x * scale[:, None, None] + shift[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        assert self.num_batches_tracked is not None and self.momentum is not None
        assert self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * count / (count - 1), self.momentum)


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel over all processes, and the number of values behind them."""
    count = x.new_full((1,), x.numel() / x.shape[1])
    sums = _SumOverProcesses.apply(torch.cat([x.sum((0, 2, 3)), count]))
    count = sums[-1]
    mean = sums[:-1] / count
    # a second pass, over centred values: E[x²] - E[x]² cancels in float32
    squares = _SumOverProcesses.apply((x - mean[:, None, None]).square().sum((0, 2, 3)))
    return mean, squares / count, count


class PatchDiscriminator(nn.Module):
    """Logits of overlapping patches (Isola et al. 2017). x: (B, in_channels, H, W) in [-1, 1] → (B, 1, h, w).

    With 3 layers 256² pixels give 30 × 30 logits. Parameter names are those of the original (`main.{i}.*`).
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, layers: int = 3):
        super().__init__()
        self.layers = layers
        widths = [channels * min(2**n, 8) for n in range(layers + 1)]
        stages: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        for n in range(1, layers + 1):
            stride = 2 if n < layers else 1
            stages.append(nn.Conv2d(widths[n - 1], widths[n], 4, stride, 1, bias=False))
            stages += [SyncedBatchNorm2d(widths[n]), nn.LeakyReLU(0.2, inplace=True)]
        self.main = nn.Sequential(*stages, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.apply(_initialise)

    @property
    def smallest_size(self) -> int:
        """Fewest pixels a side that leave one logit."""
        return 3 * 2**self.layers

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < self.smallest_size:
            raise UsageError(
                f"loss.disc_layers = {self.layers}: needs at least {self.smallest_size} px a side, "
                f"got {x.shape[-2]}x{x.shape[-1]}; take fewer layers or larger images"
            )
        return self.main(as_maps(x))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
