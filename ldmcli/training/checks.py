"""Checks of the settings before any data is read. Training and `--plan` call the same functions, so that a plan refuses
what a training would, in the same line."""

from dataclasses import replace

from ldmcli.conditions.fit import assumed_specs, check_settings, check_sources
from ldmcli.core.errors import UsageError
from ldmcli.core.settings import (
    AutoencoderConfig,
    AutoencoderSettings,
    ClassifierConfig,
    DataSettings,
    DiffusionConfig,
    DiffusionSettings,
    TrainSettings,
)
from ldmcli.data.decode import colour
from ldmcli.data.shape_rows import check_source
from ldmcli.diffusion.sample import check_sampling
from ldmcli.diffusion.schedule import make_schedule
from ldmcli.evaluation.extractors import Extractor
from ldmcli.networks.perceptual import check_perceptual
from ldmcli.training import cost
from ldmcli.training.best import find_metric
from ldmcli.training.sample_quality import LEAST, SSIM_SIDE, metric_keys, open_features
from ldmcli.training.trackers import check_trackers

DEFAULT_SIZE = (64, 64)


def image_size(data: DataSettings, trained_at: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """(height, width) in pixels: as set, else what the first stage was trained at, else 64 x 64."""
    height, width = next(size for size in (data.size, trained_at, DEFAULT_SIZE) if any(size))
    return height, width


def check_autoencoder(config: AutoencoderConfig, world: int) -> None:
    """Raises UsageError where a first-stage training on `world` processes cannot begin, InputError where its loss
    network isn't there."""
    settings, loss, size = config.autoencoder, config.loss, image_size(config.data)
    f = settings.f
    _check_whole(config.train)
    if f == 1:
        raise UsageError("--f 1 is the identity and has nothing to train; use `ldm train-ldm --autoencoder none`")
    if settings.in_channels != 3:
        raise UsageError(f"autoencoder.in_channels = {settings.in_channels}: training pictures have 3 (RGB)")
    if size[0] % f or size[1] % f:
        near = "x".join(str(max(f, round(side / f) * f)) for side in size)
        raise UsageError(f"--size {size[0]}x{size[1]}: f = {f} needs multiples of {f}; nearest: {near}")
    if not any((loss.l1, loss.l2, loss.edge, loss.perceptual_weight, loss.disc_weight)):
        raise UsageError("every weight in [loss] is 0: nothing would be learned")
    _check_loop(config.train, config.data, world)
    check_evaluations(config, size)
    if loss.disc_weight > 0:
        _check_discriminator(config, size, world)
    if loss.perceptual_weight > 0 or loss.perceptual:
        check_perceptual(loss.perceptual, size)
    cost.meta_autoencoder(settings)


def _check_discriminator(config: AutoencoderConfig, size: tuple[int, int], world: int) -> None:
    train, layers = config.train, config.loss.disc_layers
    for name, batch in _batches(train):
        if world > 1 and batch % (world * max(train.micro_batch, 1)):
            raise UsageError(
                f"{name} = {batch}: with a discriminator it must be a multiple of "
                f"processes x micro-batch ({world} x {max(train.micro_batch, 1)})"
            )
    if layers < 1 or min(size) < 3 * 2**layers:
        raise UsageError(
            f"loss.disc_layers = {layers}: images of {min(size)} px are smaller than its patch "
            f"({3 * 2**layers} px); use fewer layers, at least 1"
        )


def check_diffusion(config: DiffusionConfig, stage: AutoencoderSettings, size: tuple[int, int], world: int) -> None:
    """Raises UsageError where a diffusion model for images of `size` pixels cannot be trained on `world` processes in
    latents of `stage`."""
    _check_conditions(config, size)
    if config.distill.calls and not config.distill.teacher:
        raise UsageError("distill.calls: `ldm distill RUN` sets it; leave it out here")
    if config.train.shard and world == 1:
        raise UsageError("train.shard: one process has nobody to share a model with; add --gpus N, or leave it out")
    _check_loop(config.train, config.data, world)
    _check_stage(stage)
    check_sources(config)
    check_sampling(config.sample, make_schedule(config.diffusion), config.distill)
    check_evaluations(config, size)
    _check_latents(config.diffusion, stage.f, size)
    network = cost.meta_autoencoder(stage)
    model = cost.meta_diffusion_model(config, assumed_specs(config, network, {}), network.latent_shape(*size))
    vector, embedding = model.conditions.vector_dim, 4 * config.diffusion.channels
    if not config.diffusion.vector_mlp and vector not in (None, embedding):
        raise UsageError(
            f"diffusion.vector_mlp = false adds vectors to the time embedding as they are: both must be "
            f"as wide, condition.context_dim = {vector} and 4 x diffusion.channels = {embedding}"
        )


def check_classifier(config: ClassifierConfig, stage: AutoencoderSettings, size: tuple[int, int], world: int) -> None:
    """Raises UsageError where a classifier of noisy latents of `stage` cannot be trained on `world` processes."""
    _check_whole(config.train)
    _check_loop(config.train, config.data, world)
    _check_stage(stage)
    make_schedule(config.diffusion)
    check_evaluations(config, size)
    _check_latents(config.diffusion, stage.f, size)
    cost.meta_classifier(config, 2, cost.meta_autoencoder(stage).latent_shape(*size))


def _check_whole(train: TrainSettings) -> None:
    if train.shard:
        raise UsageError("train.shard: only diffusion models are cut; leave it out")


def _check_stage(stage: AutoencoderSettings) -> None:
    if stage.in_channels != 3:
        raise UsageError(f"an autoencoder of pictures of {stage.in_channels} channels: training pictures have 3 (RGB)")


def _check_latents(settings: DiffusionSettings, f: int, size: tuple[int, int]) -> None:
    unit = settings.patch * 2 ** (len(settings.channel_mult) - 1)
    if any(side % (f * unit) for side in size):
        near = "x".join(str(max(1, round(side / (f * unit))) * f * unit) for side in size)
        raise UsageError(
            f"--size {size[0]}x{size[1]}: latents are {f} times smaller and the UNet halves them to "
            f"1/{unit}, so both sides must be multiples of {f * unit}; nearest: {near}; or use fewer "
            "diffusion.channel_mult levels"
        )


def _check_conditions(config: DiffusionConfig, size: tuple[int, int]) -> None:
    check_settings(config)
    scale = config.task.scale
    if config.task.name == "sr" and (size[0] % scale or size[1] % scale):
        raise UsageError(f"--size {size[0]}x{size[1]} with --scale {scale}: both sides must be multiples of {scale}")


def _batches(train: TrainSettings) -> list[tuple[str, int]]:
    """(name, samples over all processes) of the batches that a run takes."""
    half = [("half of train.batch_size", train.batch_at(0)[1])] if train.half_batch_steps else []
    return [("train.batch_size", train.batch_size), *half]


def _check_loop(train: TrainSettings, data: DataSettings, world: int) -> None:
    for name, batch in _batches(train):
        if world > batch:
            raise UsageError(f"{name} = {batch}: fewer samples than processes ({world})")
    check_trackers(train.track)
    check_source(data.source)
    colour(data.background)


def check_evaluations(config: AutoencoderConfig | DiffusionConfig | ClassifierConfig, size: tuple[int, int]) -> None:
    """Raises UsageError where evaluations would not be what settings of [train] ask for: too few samples, more steps
    than there are, or no such metric; InputError where the network of their features isn't there."""
    train = config.train
    keeps = "" if train.keep_best == "none" else train.keep_best
    if 0 < train.eval_samples < LEAST:
        raise UsageError(
            f"train.eval_samples = {train.eval_samples}: at least {LEAST} are needed, for the Inception Score, and for "
            "a distance that says something 1,000 or more"
        )
    if not isinstance(config, DiffusionConfig) and train.eval_samples:
        raise UsageError("train.eval_samples: only train-ldm draws samples; other trainings are measured without")
    if train.eval_novelty:
        _check_novelty(config)
    if isinstance(config, DiffusionConfig) and train.eval_steps:
        chosen = replace(config.sample, steps=train.eval_steps)
        check_sampling(chosen, make_schedule(config.diffusion), config.distill)
    if keeps and not (train.eval_every or train.evaluations):
        raise UsageError(f"train.keep_best = {train.keep_best!r}: needs evaluations; set train.eval_every")
    extractor = None
    if train.eval_samples or train.eval_features or (keeps and isinstance(config, AutoencoderConfig)):
        extractor = open_features(train)
    if keeps:
        find_metric(dict.fromkeys(_measured(config, size, extractor), 0.0), keeps)


def _check_novelty(config: AutoencoderConfig | DiffusionConfig | ClassifierConfig) -> None:
    """Raises UsageError where no samples are drawn that could be copies, or training rows can't be looked up."""
    if not isinstance(config, DiffusionConfig) or not config.train.eval_samples:
        raise UsageError("train.eval_novelty: looks through samples for copies; set train.eval_samples of train-ldm")
    if config.task.name != "generate":
        raise UsageError(
            f"train.eval_novelty: pictures of task {config.task.name} start from given ones, which they are to resemble"
        )
    if config.data.streaming:
        raise UsageError("train.eval_novelty: looks up training pictures, which a stream does not let; set it to false")


def _measured(
    config: AutoencoderConfig | DiffusionConfig | ClassifierConfig, size: tuple[int, int], extractor: Extractor | None
) -> list[str]:
    """Keys of what evaluations of a training measure."""
    if isinstance(config, ClassifierConfig):
        return ["val_loss", "accuracy"]
    if isinstance(config, DiffusionConfig):
        samples = extractor is not None and config.train.eval_samples
        return ["val_loss", *(metric_keys(config, size, extractor) if samples and extractor else [])]
    named = {
        "ssim": min(size) >= SSIM_SIDE,
        "perceptual": config.loss.perceptual_weight > 0 or config.loss.perceptual,
        extractor.metric_key if extractor else "": extractor and config.train.eval_frechet,
    }
    return ["psnr", *(name for name, is_measured in named.items() if is_measured)]


def notes_of(config: DiffusionConfig | ClassifierConfig) -> list[str]:
    """Where a training deviates from the settings; for the plan and for its start."""
    if not config.data.cache or config.data.caches_latents:
        return []
    why = "random crops show other pixels in each epoch (data.cache_views caches several of each picture)"
    why = "a stream is not read twice" if config.data.streaming else why
    return [f"latents are not cached: {why}, so every batch is encoded anew (--no-cache leaves out this line)"]
