"""Few network calls: a student that jumps where a guided teacher walks.

The way from noise to data is cut into as many segments as the student has calls. From z at the beginning of a segment
the teacher walks to its end in several steps, with classifier-free guidance; the student learns to be there after one
call and a step of DDIM. So it is an ordinary diffusion model, sampled by DDIM at the beginnings of the segments.

This is progressive distillation (Salimans & Ho 2022, arXiv 2202.00512, algorithm 2), from the number of the teacher's
steps to that of the calls at once, with the guidance learned along as in guided distillation (Meng et al. 2023, arXiv
2210.03142), at one fixed scale. Segments are those of multistep consistency models (Heek et al. 2024, arXiv
2403.06807).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldmcli.core.settings import FEW_CALLS, DiffusionSettings
from ldmcli.diffusion.schedule import Schedule, q_sample, sampling_levels, to_x0_eps


@dataclass(frozen=True)
class SegmentLevels:
    """The levels that a teacher visits in the segment of each sample: N timesteps (B,), and N + 1 values of α and σ
    (B, 1, 1, 1), the last of which are at the segment's end. As `samplers.heun` and `samplers.euler` take them."""

    t: Sequence[Any]
    alphas: Sequence[Any]
    sigmas: Sequence[Any]


class Segments:
    """`calls` equal parts of the time, each walked through by a teacher in `steps` steps; the last ends clean."""

    def __init__(self, schedule: Schedule, calls: int, steps: int):
        levels = sampling_levels(schedule, calls * steps, str(FEW_CALLS["spacing"]))
        starts = range(0, calls * steps, steps)
        self.calls = calls
        self.t = torch.tensor([levels.t[i : i + steps] for i in starts], dtype=torch.float32)
        self.alphas = torch.tensor([levels.alphas[i : i + steps + 1] for i in starts], dtype=torch.float32)
        self.sigmas = torch.tensor([levels.sigmas[i : i + steps + 1] for i in starts], dtype=torch.float32)
        self._tables: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def starts(self, u: Tensor) -> Tensor:
        """The timesteps (B,) float32 at which the segments begin that shares u (B,) in [0, 1) of them all lie in; the
        first segment begins with noise."""
        return self.t[(u * self.calls).long().clamp(0, self.calls - 1), 0]

    def of(self, t: Tensor) -> SegmentLevels:
        """The levels of the segments that begin at timesteps t (B,), one of `starts` each. Waits for no device."""
        times, alphas, sigmas = self._on(t.device)
        which = (t[:, None] == times[:, 0]).float().argmax(1)

        def planes(table: Tensor) -> tuple[Tensor, ...]:
            return tuple(column.reshape(-1, 1, 1, 1) for column in table[which].unbind(1))

        return SegmentLevels(times[which].unbind(1), planes(alphas), planes(sigmas))

    def begin(self, z_0: Tensor, noise: Tensor, levels: SegmentLevels) -> Tensor:
        """z (B, c, h, w) at the beginnings of segments: a sample of q(z_t | z_0); of the first segment the noise alone,
        with which sampling begins."""
        first = levels.sigmas[0] >= self._on(z_0.device)[2][0, 0]
        return torch.where(first, noise, q_sample(z_0, noise, levels.alphas[0], levels.sigmas[0]))

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """t, α and σ, brought to a device once: the copy makes the host wait."""
        if str(device) not in self._tables:
            self._tables[str(device)] = (self.t.to(device), self.alphas.to(device), self.sigmas.to(device))
        return self._tables[str(device)]


def distillation_loss(
    model: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor],
    schedule: Schedule,
    settings: DiffusionSettings,
    z: Tensor,
    z_end: Tensor,
    levels: SegmentLevels,
    inputs: Mapping[str, Tensor],
) -> Tensor:
    """How far one call of the student ends from where the teacher does, (B,): the error of α' x0 + σ' ε against z_end,
    over the length of the segment in (α, σ). In these units it is the error of a velocity, in every segment and
    parametrisation alike.

    model(z, t, inputs): the student with τ_θ in it, (B, c, h, w). Squared or absolute (settings.loss), a mean over c, h
    and w.
    """
    (alpha, *_, alpha_end), (sigma, *_, sigma_end) = levels.alphas, levels.sigmas
    x0, eps = to_x0_eps(schedule.prediction, model(z, levels.t[0], inputs).float(), z, alpha, sigma)
    error = (alpha_end * x0 + sigma_end * eps - z_end) / ((alpha_end - alpha) ** 2 + (sigma_end - sigma) ** 2).sqrt()
    return (error.abs() if settings.loss == "l1" else error.square()).mean(dim=(1, 2, 3))
