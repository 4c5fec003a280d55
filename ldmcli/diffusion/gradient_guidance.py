"""Guiding by gradients at sampling time (Sec. 4.4, App. C): functions that wrap a denoiser.

With log p(y | z_t) of what is wanted, the noise that a model sees becomes ε − s σ_t ∇ log p(y | z_t) (Eq. 16), gradient
with respect to z_t, for images through the network and the decoder (Eq. 17). The sign is that of Dhariwal & Nichol
2021; σ_t = √(1 − ᾱ_t), and the same rule holds for flow, whose score is −ε/σ_t as well.
A wrapper gives (x0, ε) like the denoiser it was given, so that guiders compose with each other, with classifier-free
guidance, and with every sampler.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmcli.core.settings import GUIDE_RULES
from ldmcli.diffusion.samplers import Denoise

MAX_CLASS_SHIFT = 2.0  # root mean square over a latent of what a class can change of x0, at scale 1
MAX_X0_SHIFT = 1.0  # root mean square over a sample's latent of the change of x0, latents having variance 1


def downsampled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """T of Sec. 4.4: antialiased bicubic, (B, c, H, W) to (B, c, *size); the identity where they are of that size."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False)


def half_squared_error(a: Tensor, b: Tensor) -> Tensor:
    """½ ‖a − b‖² of each picture, (B,)."""
    return 0.5 * (a - b).square().sum(dim=(1, 2, 3))


def image_guide(
    denoise: Denoise,
    decode: Callable[[Tensor], Tensor],
    low: Tensor,
    scale: float = 1.0,
    distance: Callable[[Tensor, Tensor], Tensor] = half_squared_error,
    *,
    rule: str = "ours",
) -> Denoise:
    """Leads samples to pictures that, made small, are `low` (B or 1, 3, h, w) in [-1, 1]; low may be of full size.

    log p = −distance(T(D(x0)), low). decode: latents as the model sees them to pixels, able to pass gradients.
    distance: (B,) of two batches of pictures, by default ½‖·‖², or a perceptual one.

    rule "paper" is Eq. 16 and 17: the change of ε is scale · σ ∇ distance, whose right scale depends on the picture's
    size, the autoencoder and the noise. With "ours" x0 moves along −∇ by the step after which the distance would, to
    first order, be gone (a step of Polyak's), times `scale`: 1 takes the whole step, whatever the units, and a sample
    that fits is left alone. No move is larger than `scale` times `MAX_X0_SHIFT`. Raises ValueError for another rule.
    """
    if rule not in GUIDE_RULES:
        raise ValueError(f"no rule {rule!r} of guiding; there are {', '.join(GUIDE_RULES)}")
    if scale == 0:
        return denoise

    def guided(z: Tensor, t: float, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        with _differentiable(z) as here:
            x0, eps = denoise(here, t, alpha, sigma)
            error = distance(downsampled(decode(x0), (low.shape[-2], low.shape[-1])), low.expand(len(z), -1, -1, -1))
            at_z, at_x0 = torch.autograd.grad(error.sum(), (here, x0), retain_graph=z.requires_grad)
        x0, eps = (x0, eps) if z.requires_grad else (x0.detach(), eps.detach())
        if rule == "paper":
            return _shift_eps(x0, eps, scale * sigma * at_z, alpha, sigma)
        gain = (at_x0 * at_z).sum(dim=(1, 2, 3))
        # a gradient that points the wrong way, or nowhere, moves nothing
        step = torch.where(gain > 0, error.detach() / gain.clamp(min=1e-12), 0.0)[:, None, None, None] * at_z
        rms = step.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        move = scale * step * (MAX_X0_SHIFT / rms.clamp(min=MAX_X0_SHIFT))
        return x0 - move, eps + alpha / sigma * move

    return guided


def classifier_guide(denoise: Denoise, log_prob: Callable[[Tensor, float], Tensor], scale: float = 1.0) -> Denoise:
    """ε − scale · σ ∇ log p(c | z_t), gradient with respect to z_t (Eq. 16): classifier guidance in latent space.

    log_prob(z_t, t): (B,) of noisy latents (B, c, h, w) at a timestep, of the class wanted of each. Scale 1 gives the
    score of p(z_t | c) where `denoise` has that of p(z_t) and log_prob is exact.

    At most noise α is near 0 and x0 = (z − σ ε)/α magnifies whatever a trained classifier errs by, so no change of x0
    is larger than scale times `MAX_CLASS_SHIFT`: latents of variance 1 lie no further apart.
    """
    if scale == 0:
        return denoise

    def guided(z: Tensor, t: float, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        x0, eps = denoise(z, t, alpha, sigma)
        with _differentiable(z) as here:
            gradient = torch.autograd.grad(log_prob(here, t).sum(), here)[0]
        change = -sigma * gradient
        rms = (sigma / alpha * change).square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        return _shift_eps(x0, eps, scale * change * (MAX_CLASS_SHIFT / rms.clamp(min=MAX_CLASS_SHIFT)), alpha, sigma)

    return guided


@contextmanager
def _differentiable(z: Tensor) -> Iterator[Tensor]:
    """z as a variable, with gradients on: a new one, or the one of a guider around this one."""
    with torch.enable_grad():
        yield z if z.requires_grad else z.detach().requires_grad_()


def _shift_eps(x0: Tensor, eps: Tensor, change: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
    """(x0, ε) after ε + change, such that α x0 + σ ε stays z."""
    return x0 - sigma / alpha * change, eps + change


def latent_decoder(autoencoder) -> Callable[[Tensor], Tensor]:
    """`LoadedAutoencoder.decode` that passes gradients."""
    return lambda z: autoencoder.network.decode(autoencoder.scale.restore(z)).float()
