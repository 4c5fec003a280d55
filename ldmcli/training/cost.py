"""What a training step costs, counted on torch's meta device, where tensors have shapes and no content: parameters,
FLOPs, and the bytes that the backward pass keeps. `--plan` shows it, and `--micro-batch auto` divides memory by it.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldmcli.core.settings import (
    AutoencoderConfig,
    AutoencoderSettings,
    ClassifierConfig,
    ConditionSettings,
    DiffusionConfig,
)
from ldmcli.data.readers import memory_bytes
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.blocks import set_checkpointing
from ldmcli.networks.discriminator import PatchDiscriminator
from ldmcli.networks.latent_diffusion import DiffusionModel
from ldmcli.networks.meta_device import on_meta_device
from ldmcli.networks.noisy_classifier import NoisyClassifier
from ldmcli.networks.perceptual import perceptual_shapes
from ldmcli.sampling.memory import LiveTensorMeter
from ldmcli.training.optimizer import is_hidden_matrix

RUNTIME_BYTES = 600 << 20  # interpreter, torch and the libraries of data (docs/experiments.md)
MEMORY_SHARE = 0.85  # of what is free: the rest is for workspaces and for what lies between two allocations
# activations a pixel that no network here comes near: where images fit at this much nothing is measured
MAX_BYTES_PER_PIXEL = 400_000


@dataclass
class NetworkCost:
    """A network and what one sample costs in it."""

    module: nn.Module
    forward_flops: float
    training_flops: float  # forward and backward
    activation_bytes: float  # saved for the backward pass, in float32; see `kept_bytes`


# ---------------------------------------------------------------- networks


def meta_autoencoder(settings: AutoencoderSettings) -> Autoencoder:
    """The autoencoder on the meta device. Raises UsageError where settings contradict each other."""
    with on_meta_device():
        return Autoencoder(settings)


def autoencoder_costs(config: AutoencoderConfig, size: tuple[int, int]) -> dict[str, NetworkCost]:
    """Of the networks of a first-stage training, and of the loss network ("perceptual"), which is not trained."""
    network = meta_autoencoder(config.autoencoder)
    with on_meta_device():
        pixels = torch.zeros(1, config.autoencoder.in_channels, *size)
        noise = torch.zeros(1, *network.latent_shape(*size))
    set_checkpointing(network, config.train.checkpointing)
    costs = {"autoencoder": measure_cost(network, lambda: network(pixels, noise).reconstruction)}
    if config.loss.disc_weight > 0:
        with on_meta_device():
            critic = PatchDiscriminator(3, config.loss.disc_channels, config.loss.disc_layers).eval()
        costs["discriminator"] = measure_cost(critic, lambda: critic(pixels))
    if config.loss.perceptual_weight > 0:
        loss_network = perceptual_shapes(config.loss.perceptual)
        reconstruction = pixels.clone().requires_grad_()
        costs["perceptual"] = measure_cost(loss_network, lambda: loss_network(pixels, reconstruction))
    return costs


def meta_diffusion_model(
    config: DiffusionConfig, specs: dict[str, dict[str, Any]], latent: tuple[int, int, int]
) -> DiffusionModel:
    """The model on the meta device. A frozen text encoder would have to be opened; the paper's stands in for it."""
    condition = without_frozen_encoder(config.condition)
    with on_meta_device():
        model = DiffusionModel(config.diffusion, condition, specs, None, latent, config.kinds)
    for conditioner in model.conditions.conditioners.values():
        conditioner.count_only()
    return model


def diffusion_cost(
    config: DiffusionConfig, specs: dict[str, dict[str, Any]], latent: tuple[int, int, int], size: tuple[int, int]
) -> NetworkCost:
    """Of the diffusion model, with one row of conditions. latent: (c, h, w); size: (height, width) in pixels."""
    model = meta_diffusion_model(config, specs, latent)
    set_checkpointing(model, config.train.checkpointing)
    with on_meta_device():
        inputs = model.conditions.example(size)
        z, t = torch.zeros(1, *latent), torch.zeros(1)
    return measure_cost(model, lambda: model(z, t, inputs, lambda x: torch.zeros(len(x), *latent, device="meta")))


def meta_classifier(config: ClassifierConfig, classes: int, latent: tuple[int, int, int]) -> NoisyClassifier:
    """The classifier on the meta device."""
    with on_meta_device():
        return NoisyClassifier(config.diffusion, config.classifier.pool, classes, latent)


def classifier_cost(config: ClassifierConfig, classes: int, latent: tuple[int, int, int]) -> NetworkCost:
    """Of a classifier of noisy latents (c, h, w)."""
    model = meta_classifier(config, classes, latent)
    set_checkpointing(model, config.train.checkpointing)
    with on_meta_device():
        z, t = torch.zeros(1, *latent), torch.zeros(1)
    return measure_cost(model, lambda: model(z, t))


def without_frozen_encoder(condition: ConditionSettings) -> ConditionSettings:
    """The settings with the paper's text encoder instead of a frozen one."""
    return condition if condition.text_encoder == "joint" else replace(condition, text_encoder="joint")


# ---------------------------------------------------------------- counting


def flop_counter() -> Any:
    """A context that counts FLOPs (`get_total_flops()`), those of a CPU's fused attention included, which torch leaves
    out."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count  # brings triton: 80 MB of every command

    def fused(q, k, v, *_, out_shape=None, **__) -> int:
        return sdpa_flop_count(q, k, v)

    def fused_backward(gradient, q, k, v, *_, out_shape=None, **__) -> int:
        return 2 * sdpa_flop_count(q, k, v)  # scores that it computes again are no work of the model's

    kernels = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            kernels._scaled_dot_product_flash_attention_for_cpu: fused,
            kernels._scaled_dot_product_flash_attention_for_cpu_backward: fused_backward,
        },
    )


def saved_activation_bytes(module: nn.Module, run: Callable[[], Tensor]) -> float:
    """Bytes that a pass saves for its backward pass, beside the weights; where blocks are computed again (`train.
    checkpointing`) the bytes that exist at once, at most, until its gradients are made."""
    if any(getattr(block, "recomputes", False) for block in module.modules()):
        return peak_step_bytes(module, run)
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, Any] = {}  # the storages themselves: a freed one's address would be another one's soon

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return float(sum(storage.nbytes() for storage in kept.values()))


def peak_step_bytes(module: nn.Module, run: Callable[[], Tensor]) -> float:
    """Of a forward and a backward pass, beside weights, buffers and gradients, to which others are added."""
    weights = list(module.parameters())
    gradients = [torch.zeros_like(weight) for weight in weights]
    for weight, gradient in zip(weights, gradients):
        weight.grad = gradient
    with LiveTensorMeter([*weights, *module.buffers(), *gradients]) as live:
        out = run()
        out.backward(torch.ones_like(out))
    for weight in weights:
        weight.grad = None
    return float(live.peak)


def measure_cost(module: nn.Module, run: Callable[[], Tensor]) -> NetworkCost:
    """Counts one pass over one sample on the meta device."""
    with flop_counter() as counter:
        result = run()
        forward = counter.get_total_flops()
        result.sum().backward()
    return NetworkCost(module, float(forward), float(counter.get_total_flops()), saved_activation_bytes(module, run))


def step_flops(costs: dict[str, NetworkCost]) -> float:
    """FLOPs of a training step a sample. With a discriminator: both passes of the autoencoder, one without gradients;
    of the discriminator, forward and input gradient for the one, real and fake with all gradients for the other."""
    main = next(iter(costs.values()))
    critic = costs.get("discriminator")
    if critic is None:
        return main.training_flops
    return main.training_flops + main.forward_flops + 2 * critic.forward_flops + 2 * critic.training_flops


# ---------------------------------------------------------------- memory


def kept_bytes(costs: Iterable[NetworkCost], dtype: torch.dtype | None, device: torch.device) -> float:
    """Bytes that one sample takes in a step where autocast computes in `dtype` (None: float32), which is what a GPU
    then keeps between layers. A CPU keeps the scores of attention besides; there it is the count of float32."""
    share = 1.0 if dtype is None or device.type == "cpu" else dtype.itemsize / 4
    return share * sum(network.activation_bytes for network in costs)


def cast_bytes(named: Iterable[tuple[str, nn.Parameter]], dtype: torch.dtype | None) -> int:
    """Bytes of the copies of weights that autocast makes in `dtype` for a step."""
    return 0 if dtype is None else dtype.itemsize * sum(p.numel() for _, p in named)


def optimizer_bytes(named: Iterable[tuple[str, nn.Parameter]], train) -> int:
    """Optimiser state of named parameters: AdamW keeps two floats a weight; Muon one, or two with muon_every > 1."""
    muon = 4 * (2 if train.muon_every > 1 else 1)
    on_muon = train.optimizer == "muon"
    return sum(p.numel() * (muon if on_muon and is_hidden_matrix(n, p) else 8) for n, p in named)


def available_bytes(device: torch.device) -> int:
    """Memory that a training may take: free memory of the GPU, else of the machine within its container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return min(psutil.virtual_memory().available, memory_bytes())


def largest_micro_batch(share: int, per_image: float, room: float) -> int:
    """Samples of a process's `share` of the batch that go through the networks at once: all where `room` bytes hold
    their activations of `per_image` bytes, else as many as fit, evenly over the passes; at least 1."""
    fitting = max(1, int(room // per_image)) if per_image else share
    return share if fitting >= share else -(-share // -(-share // fitting))


def certainly_fits(share: int, size: tuple[int, int], room: float) -> bool:
    """Whether so few and small images fit whatever the network is, so that nothing has to be measured."""
    return share * math.prod(size) * MAX_BYTES_PER_PIXEL <= room
