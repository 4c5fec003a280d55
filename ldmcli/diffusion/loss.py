"""What a diffusion model is trained on: Eq. 1 to 3 of the paper."""

from collections.abc import Callable, Mapping

from torch import Tensor

from ldmcli.core.settings import DiffusionSettings
from ldmcli.diffusion.schedule import Schedule, alpha_sigma, loss_weight, prediction_target, q_sample


def diffusion_loss(
    model: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor],
    schedule: Schedule,
    settings: DiffusionSettings,
    z_0: Tensor,
    noise: Tensor,
    t: Tensor,
    inputs: Mapping[str, Tensor],
) -> Tensor:
    """The error ‖ε − ε_θ(z_t, t, τ_θ(y))‖² of each sample, (B,): Eq. 3; without conditions Eq. 2; in pixels, where z is
    x, Eq. 1. The mean over samples is the training loss.

    model(z_t, t, inputs): ε_θ with τ_θ in it, (B, c, h, w). z_0: (B, c, h, w) clean latents; noise: ε, like z_0; t:
    (B,) float32 timesteps (`sample_timesteps`); inputs: what `Conditions.prepare` gave for y, with B rows.

    With all of them on one device nothing here waits for it, and the whole compiles as one function.

    Squared or absolute (settings.loss), a mean over c, h and w, weighted by settings.loss_weight. Where the network
    gives v, x0 or a velocity (settings.prediction), the error is that of what it gives.
    """
    alpha, sigma = alpha_sigma(schedule, t)
    z_t = q_sample(z_0, noise, alpha, sigma)
    error = model(z_t, t, inputs).float() - prediction_target(settings.prediction, z_0, noise, alpha, sigma)
    each = (error.abs() if settings.loss == "l1" else error.square()).mean(dim=(1, 2, 3))
    return each * loss_weight(settings.loss_weight, settings.prediction, alpha, sigma, settings.snr_gamma)
