"""First-stage losses (Rombach et al. 2022, Sec. 3.1; App. G, Eq. 25), as functions of tensors.

Eq. 25 is min over encoder and decoder, max over the discriminator of L_rec - L_adv(D(E(x))) + log D(x) + L_reg:
`generator_loss` is the first side with L_rec by `reconstruction_terms` and L_reg the KL of the posterior or the loss of
the quantiser; `discriminator_loss` is the second.

Two styles, one balance. "paper" sums the loss of a KL model over the C·H·W values of an image, as the original
does; "mean" is exactly that divided by C·H·W, so every weight, `kl_weight` included, keeps its meaning: the KL of
a posterior, in nats summed over its latent, counts `kl_weight / (C·H·W)` beside the mean error of a pixel value. So
does `disc_weight` where it is adaptive; a fixed one (`adaptive_weight` = false) is divided in neither style.
VQ models are averaged in both styles.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmcli.core.settings import LossSettings
from ldmcli.networks.discriminator import world_size

Perceptual = Callable[[Tensor, Tensor], Tensor]
Stats = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """What the generator's side needs of the discriminator. `factor` is 0 before `disc_start`."""

    logits_fake: Tensor  # D(rec), with a graph back to rec
    factor: float = 1.0


def disc_factor(step: int, settings: LossSettings) -> float:
    """1 from `disc_start` on when there is a discriminator, else 0: the factor of both adversarial losses."""
    return 1.0 if settings.disc_weight > 0 and step >= settings.disc_start else 0.0


def reconstruction_terms(
    x: Tensor, rec: Tensor, settings: LossSettings, perceptual: Perceptual | None = None
) -> dict[str, Tensor]:
    """L_rec of Eq. 25 in parts: unweighted scalar means of the terms whose weight is not 0 (l1, l2, edge, perceptual).

    x, rec: (B, C, H, W) in [-1, 1]. perceptual: LPIPS of two such batches, needed where its weight is not 0.
    """
    terms: dict[str, Tensor] = {}
    x, rec = x.float(), rec.float()
    if settings.l1:
        terms["l1"] = (x - rec).abs().mean()
    if settings.l2:
        terms["l2"] = (x - rec).square().mean()
    if settings.edge:
        terms["edge"] = edge_distance(x, rec)
    if settings.perceptual_weight:
        assert perceptual is not None, "loss.perceptual_weight > 0 needs a perceptual network"
        terms["perceptual"] = perceptual(x, rec).mean()
    return terms


def edge_distance(x: Tensor, rec: Tensor) -> Tensor:
    """L1 distance of the differences between neighbouring pixels, mean of the two directions: a scalar.

    x, rec: (B, C, H, W), of one range.
    """
    error = x - rec  # differencing is linear
    sides = [error.diff(dim=axis).abs().mean() for axis in (-1, -2) if error.shape[axis] > 1]
    return sum(sides, error.new_zeros(())) / 2


def weighted_sum(terms: dict[str, Tensor], settings: LossSettings) -> Tensor | None:
    """Reconstruction error per pixel value, a scalar, of `reconstruction_terms`; None where every weight is 0."""
    weights = {"l1": settings.l1, "l2": settings.l2, "edge": settings.edge, "perceptual": settings.perceptual_weight}
    parts = [weights[name] * value for name, value in terms.items()]
    return sum(parts[1:], parts[0]) if parts else None


def generator_loss(
    reg: str,
    x: Tensor,
    rec: Tensor,
    regulariser: Tensor,
    settings: LossSettings,
    *,
    last_layer: Tensor,
    perceptual: Perceptual | None = None,
    adversary: Adversary | None = None,
    logvar: Tensor | None = None,
    norms: bool = False,
) -> tuple[Tensor, Stats]:
    """The encoder's and decoder's side of Eq. 25, a scalar, and its parts, detached, under the original's names.

    x, rec: (B, C, H, W) in [-1, 1]. reg "kl": regulariser (B,), nats summed over the latent; "vq": the scalar loss of
    the quantiser.
    last_layer: weight of the decoder's last convolution, for the adaptive weight and, with `norms`, for the
    gradient norm of each term (`grad_nll`, `grad_perceptual`, `grad_g`).
    logvar: scalar of the original's likelihood, which no optimiser ever saw; None stands for its value 0.
    """
    values = x[0].numel()
    scale = values if (reg, settings.style) == ("kl", "paper") else 1
    terms = reconstruction_terms(x, rec, settings, perceptual)
    nll, stats = _likelihood(terms, settings, scale, logvar)
    named: dict[str, Tensor | None] = {"nll": nll, "perceptual": terms.get("perceptual")}
    # the zero term keeps the decoder in the graph: DistributedDataParallel waits for each parameter's gradient
    total = rec.float().sum() * 0 if nll is None else nll
    if adversary is not None:
        g_loss, weight, parts = _adversarial_term(nll, adversary, settings, last_layer)
        named["g"] = g_loss
        total, stats = total + weight * g_loss, stats | parts
    term, parts = _regularisation(reg, regulariser, settings, scale / values)
    total, stats = total + term, stats | parts
    if norms:
        stats |= {
            f"grad_{name}": gradient_norm(value, last_layer)
            for name, value in named.items()
            if value is not None and value.requires_grad
        }
    return total, stats | {"total_loss": total.detach()}


def _likelihood(
    terms: dict[str, Tensor], settings: LossSettings, scale: int, logvar: Tensor | None
) -> tuple[Tensor | None, Stats]:
    """Negative log-likelihood over `scale` values, None where no term has a weight."""
    stats = {f"{name}_loss": value.detach() for name, value in terms.items()}
    error = weighted_sum(terms, settings)
    if error is None:
        return None, stats
    nll = error if logvar is None else error / logvar.exp() + logvar
    return nll * scale, stats | {"rec_loss": error.detach(), "nll_loss": (nll * scale).detach()}


def _regularisation(reg: str, value: Tensor, settings: LossSettings, kl_scale: float) -> tuple[Tensor, Stats]:
    mean = value.float().mean()
    if reg == "kl":
        return settings.kl_weight * kl_scale * mean, {"kl_loss": mean.detach()}
    return settings.codebook_weight * mean, {"quant_loss": mean.detach()}


def _adversarial_term(
    nll: Tensor | None, adversary: Adversary, settings: LossSettings, last_layer: Tensor
) -> tuple[Tensor, Tensor, Stats]:
    """The term, the weight in effect, and statistics (where `d_weight` is the weight without the factor)."""
    g_loss = -adversary.logits_fake.float().mean()
    weight = adversarial_weight(nll, g_loss, settings, last_layer)
    stats = {"g_loss": g_loss.detach(), "d_weight": weight, "disc_factor": torch.full_like(weight, adversary.factor)}
    return g_loss, weight * adversary.factor, stats


def adversarial_weight(nll: Tensor | None, g_loss: Tensor, settings: LossSettings, last_layer: Tensor) -> Tensor:
    """The adaptive weight λ = clamp(‖∇nll‖ / (‖∇g‖ + 1e-4), 0, 1e4) · disc_weight, a scalar (Esser et al. 2021, Eq. 7).

    nll, g_loss: scalars. Gradients are with respect to `last_layer`, the weight of the decoder's last convolution.

    Without a reconstruction term there is nothing to balance against and λ = disc_weight; without a graph
    (validation) λ = 0, as in the original.
    """
    if not settings.adaptive_weight or nll is None:
        return torch.full_like(g_loss, settings.disc_weight)
    if not (nll.requires_grad and g_loss.requires_grad):
        return g_loss.new_zeros(())
    ratio = gradient_norm(nll, last_layer) / (gradient_norm(g_loss, last_layer) + 1e-4)
    return ratio.clamp(0, 1e4) * settings.disc_weight


def gradient_norm(loss: Tensor, weight: Tensor) -> Tensor:
    """L2 norm of the gradient averaged over all processes, so equal on each. Keeps the graph, leaves `.grad`."""
    (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
    gradient = gradient.detach().float()
    if world_size() > 1:
        torch.distributed.all_reduce(gradient)
    return gradient.norm() / world_size()


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor, kind: str = "hinge", factor: float = 1.0) -> Tensor:
    """The discriminator's side of Eq. 25, a scalar; factor 0 gives a zero gradient.

    logits_real, logits_fake: of any one shape, D's on images and on detached reconstructions. kind: hinge | vanilla.
    """
    penalty = GAN_LOSSES[kind]
    return factor * 0.5 * (penalty(-logits_real.float()).mean() + penalty(logits_fake.float()).mean())


def _hinge(logits: Tensor) -> Tensor:
    return F.relu(1 + logits)


GAN_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"hinge": _hinge, "vanilla": F.softplus}


def codebook_stats(indices: Tensor, size: int) -> Stats:
    """Perplexity exp(-Σ p log p), number of codes in use and their share, scalars, over all processes (a collective).

    indices: int64 of any shape, in 0 … size - 1.
    """
    counts = torch.bincount(indices.flatten(), minlength=size).float()
    if world_size() > 1:
        torch.distributed.all_reduce(counts)
    p = counts / counts.sum()
    used = (counts > 0).sum()
    # not torch.special.entr, which older versions of torch lack on Apple GPUs
    return {"perplexity": (-torch.xlogy(p, p)).sum().exp(), "codes_used": used, "code_usage": used / size}
