"""What a training step takes on this machine, measured before anything is trained: for the plan of `ldm demo`."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ldmcli.conditions.fit import assumed_specs
from ldmcli.core import threads
from ldmcli.core.settings import AutoencoderConfig, AutoencoderSettings, DiffusionConfig, TrainSettings
from ldmcli.data.decode import BadImage
from ldmcli.maths import rng
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.latent_diffusion import DiffusionModel
from ldmcli.training.cost import without_frozen_encoder
from ldmcli.training.distributed import Distributed
from ldmcli.training.optimizer import PhaseOptimizer

PROBE_ROWS = 8  # where a step of so few takes a second, that of a whole batch is extrapolated
PICTURES = 8


def picture_seconds(rows: Any, size: tuple[int, int]) -> float:
    """To open and cut a training picture, over the first few; those that cannot be read are the training's to name."""
    count = min(PICTURES, len(rows))
    begun = time.perf_counter()
    for i in range(count):
        with suppress(BadImage):
            rows.pixels(i, size)
    return (time.perf_counter() - begun) / count


def first_stage_seconds(config: AutoencoderConfig, size: tuple[int, int], dist: Distributed) -> float:
    """A training step of a first stage on made-up pictures, without a discriminator."""
    with torch.random.fork_rng(devices=[]):
        network = Autoencoder(config.autoencoder).to(dist.device)
    made_up = _made_up(config.train.batch_size, (3, *size), dist)
    noise = _made_up(config.train.batch_size, network.latent_shape(*size), dist)

    def loss(count: int) -> Tensor:
        found = network(made_up[:count], noise[:count])
        return (found.reconstruction - made_up[:count]).abs().mean() + 1e-6 * network.kl(found.moments).mean()

    return _step_seconds(network, loss, config.train, dist)


def diffusion_seconds(
    config: DiffusionConfig, stage: AutoencoderSettings, size: tuple[int, int], dist: Distributed
) -> float:
    """A training step of a diffusion model on made-up latents of `stage` and one row's conditions; a frozen text
    encoder is left out."""
    with torch.device("meta"):
        latent = Autoencoder(stage).latent_shape(*size)
        specs = assumed_specs(config, Autoencoder(stage), {})
    condition, batch = without_frozen_encoder(config.condition), config.train.batch_size
    with torch.random.fork_rng(devices=[]):
        model = DiffusionModel(config.diffusion, condition, specs, None, latent, config.kinds).to(dist.device)
    made_up, t = _made_up(batch, latent, dist), torch.linspace(0, 999, batch, device=dist.device)
    one = {name: tensor.to(dist.device) for name, tensor in model.conditions.example(size).items()}
    inputs = {name: tensor.repeat(batch, *[1] * (tensor.ndim - 1)) for name, tensor in one.items()}

    def loss(count: int) -> Tensor:
        z = made_up[:count]
        out = model(z, t[:count], {name: rows[:count] for name, rows in inputs.items()}, lambda x: z[: len(x)])
        return (out - z).square().mean()

    return _step_seconds(model, loss, config.train, dist)


def _made_up(count: int, shape: tuple[int, ...], dist: Distributed) -> Tensor:
    return rng.normal(0, range(count), shape, "speed").to(dist.device)


def _step_seconds(module: nn.Module, loss: Callable[[int], Tensor], train: TrainSettings, dist: Distributed) -> float:
    """With as many threads as a training would take, Muon's or AdamW's update included."""
    module.train()
    optimizer = PhaseOptimizer(module.named_parameters(), train)

    def step(count: int) -> None:
        with dist.autocast():
            value = loss(count)
        value.float().backward()
        optimizer.step(0.0)
        optimizer.zero_grad()
        if dist.device.type == "cuda":
            torch.cuda.synchronize(dist.device)
        elif dist.device.type == "mps":
            torch.mps.synchronize()

    step(1)
    probe = min(PROBE_ROWS, train.batch_size)
    few = _with_best_threads(lambda: step(probe))
    if few >= threads.LONG_PASS or probe == train.batch_size:
        return few * train.batch_size / probe
    return _with_best_threads(lambda: step(train.batch_size))


def _with_best_threads(work: Callable[[], None]) -> float:
    most = torch.get_num_threads()
    if most < 2 or threads.are_given() or torch.cuda.is_available():
        return threads.best_seconds(work)

    def seconds(count: int) -> float:
        torch.set_num_threads(count)
        return threads.best_seconds(work)

    try:
        return min(threads.fewest_fast(seconds, most)[1].values())
    finally:
        torch.set_num_threads(most)
