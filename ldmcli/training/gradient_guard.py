"""What happens to a gradient before the optimiser takes it, on the device: NaN and Inf are found, spikes and large
norms scaled down, float16's scale undone and moved. The host reads the outcome later, in one copy."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldmcli.core.settings import TrainSettings
from ldmcli.training.progress import NORM_WINDOW, Progress

FP16_GROWTH_STEPS = 2000
_HEAD = 4  # numbers of a report before those of its phases


class HostCopy:
    """A small tensor on its way to the host. `read` waits for what led to it, and for nothing that was begun after."""

    def __init__(self, tensor: Tensor):
        self._values = tensor.to("cpu", non_blocking=tensor.device.type == "cuda")
        self._arrived = None
        if tensor.device.type == "cuda":
            self._arrived = torch.Event(device="cuda")
            self._arrived.record()

    def read(self) -> list[float]:
        """The numbers of the tensor."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


@dataclass(frozen=True)
class Pending:
    """A report that is on its way to the host."""

    phases: tuple[str, ...]
    copy: HostCopy


@dataclass(frozen=True)
class StepReport:
    """What a step's gradients were like. spike: (norm, usual norm) of the first gradient that was scaled down."""

    refused: tuple[str, ...]  # phases whose update was not applied
    spike: tuple[float, float] | None


def spike_scale(usual: Tensor, norm: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """What a gradient of norm `norm` is multiplied by: 1, or its usual norm / norm where it is a spike; and `usual`
    with this norm in it.

    usual: (2,), the number of norms seen and the mean of their logarithms; norm: scalar. A spike is more than `ratio`
    times the geometric mean of the last norms (0 = there are none); while few norms are known the bound is wider:
    ratio · (1 + 9 / updates). A spike counts as `ratio` times the usual norm in that mean, so that a landscape which
    really has become steeper is the usual one after a while. A norm of 0 or one that is not finite changes nothing.
    """
    one = torch.ones_like(norm)
    if not ratio:
        return one, usual
    seen, mean = usual.unbind()
    known = norm.isfinite() & (norm > 0)
    safe = torch.where(known, norm, one)
    typical = mean.exp()
    spike = known & (seen > 0) & (safe > typical * ratio * (1 + 9 / seen))
    taken = torch.where(spike, typical * ratio, safe)
    moved = mean + (taken.log() - mean) / (seen + 1).clamp(max=NORM_WINDOW)
    return torch.where(spike, typical / safe, one), torch.where(known, torch.stack([seen + 1, moved]), usual)


class GradientGuard:
    """The gradients of a training's phases, between backward pass and optimiser.

    Its state is that of `progress` (usual norms, number of spikes, loss scale), on the device while steps run;
    `settle` brings it back. With `late`, on CUDA, no method but `settle` waits for the device: an update that must not
    be applied is one by nothing. Scalars are float64 on the host and float32 on devices, which need not have float64.
    """

    def __init__(self, progress: Progress, settings: TrainSettings, device: torch.device, float16: bool):
        self.progress, self.settings, self.float16 = progress, settings, float16
        self.late = device.type == "cuda"  # elsewhere a read costs little, and the host does what there is to do
        self._place: dict[str, Any] = {
            "device": device,
            "dtype": torch.float64 if device.type == "cpu" else torch.float32,
        }
        course = progress.course
        self._usual = {phase: self._tensor(list(usual)) for phase, usual in course.usual.items()}
        self._spikes, self._good = self._tensor(course.spikes), self._tensor(progress.good_steps)
        self.loss_scale = self._tensor(progress.loss_scale)  # of the loss before the backward pass
        self.begin()

    def _tensor(self, values: float | list[float]) -> Tensor:
        return torch.tensor(values, **self._place)

    def begin(self) -> None:
        """A new step: nothing is refused yet."""
        self.refused = torch.zeros((), **self._place)  # 1 from the first gradient with NaN or Inf on
        self._norms: dict[str, Tensor] = {}

    @property
    def keep(self) -> Tensor:
        """1 while updates are to be applied, 0 once one was refused: a scalar, float32."""
        return 1 - self.refused.float()

    def check(self, phase: str, gradients: list[Tensor], total: Tensor) -> Tensor:
        """Scales the gradients of a phase in place, whose norm together is `total`, a scalar; what that is without
        float16's scale. `refused` says whether they are fit."""
        if self.float16:
            total = total / self.loss_scale
        norm = total.to(self.refused.dtype)
        refused = (~norm.isfinite()).to(norm.dtype)
        if phase not in self._usual:
            self._usual[phase] = torch.zeros(2, **self._place)
        factor, self._usual[phase] = spike_scale(self._usual[phase], norm, self.settings.spike)
        self._norms[phase] = torch.stack([norm, factor])
        self._spikes = self._spikes + (factor < 1)
        if self.settings.clip:
            factor = torch.where(norm > 0, torch.minimum(factor, self.settings.clip / norm), factor)
        if self.float16:
            factor = factor / self.loss_scale
            self._move_loss_scale(refused)
        self.refused = torch.maximum(self.refused, refused)
        if self.late:
            torch._foreach_mul_(gradients, factor)
        elif (known := float(factor)) != 1 and not self.refused:
            torch._foreach_mul_(gradients, known)
        return total

    def _move_loss_scale(self, refused: Tensor) -> None:
        """Of float16: halved after gradients that are not finite, doubled after FP16_GROWTH_STEPS that are."""
        self._good = (self._good + 1) * (1 - refused)
        grown = torch.where(self._good % FP16_GROWTH_STEPS == 0, self.loss_scale * 2, self.loss_scale)
        self.loss_scale = torch.where(refused > 0, (self.loss_scale / 2).clamp(min=1), grown)

    def report(self) -> Pending:
        """What the host is to know of this step, on its way there."""
        parts = [torch.stack([self.refused, self._spikes, self.loss_scale, self._good])]
        parts += [torch.cat([norms, self._usual[phase]]) for phase, norms in self._norms.items()]
        return Pending(tuple(self._norms), HostCopy(torch.cat(parts)))

    def settle(self, pending: Pending) -> StepReport:
        """Takes over into `progress` what a step's report says. Waits for that step, and for none after it."""
        values, course = pending.copy.read(), self.progress.course
        _, spikes, self.progress.loss_scale, good = values[:_HEAD]
        first = course.spikes == 0 and spikes > 0
        course.spikes, self.progress.good_steps = int(spikes), int(good)
        refused: list[str] = []
        spike = None
        for index, phase in enumerate(pending.phases):
            norm, factor, seen, mean = values[_HEAD + 4 * index : _HEAD + 4 * index + 4]
            if seen:
                course.usual[phase] = [int(seen), mean]
            if refused or not math.isfinite(norm):
                refused.append(phase)
            if first and factor < 1 and spike is None:
                spike = (norm, norm * factor)
        return StepReport(tuple(refused), spike)
