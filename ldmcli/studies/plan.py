"""What a study trains: first stages, and diffusion models of equal size in their latents (Sec. 4.1).

The paper compares LDM-f for f = 1 to 32 at equal numbers of parameters and equal compute on one device. Here equal
compute is equal minutes or equal steps; equal parameters are found on the meta device, by the width of the UNet.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ldmcli.conditions.fit import assumed_specs
from ldmcli.core import config, runs
from ldmcli.core.config import Layer, Resolved, did_you_mean, suggestions
from ldmcli.core.errors import ModelError, UsageError
from ldmcli.core.presets import FIRST_STAGES
from ldmcli.core.settings import FACTORS, AutoencoderConfig, AutoencoderSettings, DiffusionConfig, DiffusionSettings
from ldmcli.formats.run_folder import read_config
from ldmcli.training.cost import autoencoder_costs, diffusion_cost, meta_autoencoder, meta_diffusion_model

SMALLEST_SIDE = 4  # of a map in the UNet; smaller latents halve once
ATTENTION_SIDE = 8  # maps of this side and below carry attention
WIDTH_STEP = 8  # widths are multiples of it
LAST_RATIOS = (2.0, 5.0)  # width of the last level over the first's
NEVER = 10_000_000  # steps, where minutes are the bound
DEFAULT_STEPS = 10_000
SAVE_EVERY = 200  # steps between checkpoints
FACTOR = "autoencoder.f"


@dataclass(frozen=True, kw_only=True)
class StudyRequest:
    """What is compared. layers: settings, as `core.config` takes them, of the models and, of data and of what only they
    have, of first stages; first_stage_layers: of first stages alone.

    factors: downsampling factors f, 1 = pixels. minutes or steps: of each diffusion model (both 0: 10,000 steps);
    first_stage_minutes, first_stage_steps: of each autoencoder, 0 = the same. parameters: of each UNet with its
    conditioners, 0 = as many as the default network has. grid: {setting: values}, every combination of which is
    trained. autoencoders: finished first stages, instead of trained ones. runs: finished models that are measured, too.
    n: images that each measurement takes. sampling_steps: of the curve of distance over speed. evaluations: how often
    quality is measured while a model trains, by eval_samples samples.
    """

    layers: tuple[Layer, ...] = ()
    first_stage_layers: tuple[Layer, ...] = ()
    factors: tuple[int, ...] = (4,)
    reg: str = "kl"
    minutes: float = 0.0
    steps: int = 0
    first_stage_minutes: float = 0.0
    first_stage_steps: int = 0
    parameters: int = 0
    seeds: tuple[int, ...] = (0,)
    grid: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    autoencoders: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    n: int = 256
    sampling_steps: tuple[int, ...] = (10, 20, 50, 100, 200)
    sampler: str = "ddim"
    features: str | None = None
    evaluations: int = 8
    eval_samples: int = 0

    def __post_init__(self):
        unknown = [f for f in self.factors if f not in FACTORS]
        if unknown:
            raise UsageError(f"--f {unknown[0]}: choose among {', '.join(map(str, FACTORS))}")
        for name in ("factors", "seeds", "sampling_steps"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UsageError(f"--{_OPTION_OF[name]} {','.join(map(str, values))}: a value stands there twice")
        if self.minutes and self.steps:
            raise UsageError("--minutes and --steps exclude each other: equal time or equal steps")
        if not (self.factors or self.runs):
            raise UsageError("nothing to compare: name factors with --f, or finished models with --runs")
        if any(s < 1 for s in self.sampling_steps):
            raise UsageError("--sampling-steps: at least 1 each")
        if not (self.seeds and self.sampling_steps):
            raise UsageError("--seeds and --sampling-steps: name at least one")
        known = {path for kind in config.KINDS for path in config.paths(kind)}
        for path in self.grid:
            if path not in known:
                raise UsageError(f"--grid {path}: no such setting{did_you_mean(suggestions(path, known))}")
        if FACTOR in self.grid:
            raise UsageError(f"--grid {FACTOR}: say it with --f")

    @property
    def named_autoencoders(self) -> dict[int, str]:
        """{f: path} of the finished first stages. Raises ModelError for what is none, UsageError for two of one f."""
        return _named_autoencoders(self.autoencoders)


_OPTION_OF = {"factors": "f", "seeds": "seeds", "sampling_steps": "sampling-steps"}


@dataclass(frozen=True)
class Training:
    """A run of the study. name: its folder below the study's; variant: what it is compared as, seeds apart."""

    name: str
    variant: str
    kind: str
    f: int
    seed: int
    resolved: Resolved
    autoencoder: str = ""  # diffusion: name of a first stage's folder, path of a run, or "none"
    trained_here: bool = False  # whether the first stage is one of the study's
    stage: AutoencoderSettings = AutoencoderSettings()  # of that first stage
    parameters: int = 0


def plan_trainings(request: StudyRequest) -> list[Training]:
    """Every training in its order: a variant's first stage before its models. Raises UsageError, ModelError."""
    named = request.named_autoencoders
    planned: dict[str, Training] = {}
    models: list[Training] = []
    for f in request.factors:
        for choice in _combinations(request.grid):
            stage = _first_stage(request, f, choice, named)
            if isinstance(stage, Training):
                planned.setdefault(stage.name, stage)
            models += [_model(request, f, choice, seed, stage) for seed in request.seeds]
    return [*planned.values(), *models]


def _named_autoencoders(paths: Sequence[str]) -> dict[int, str]:
    found: dict[int, str] = {}
    for path in paths:
        folder = Path(path)
        if not runs.is_run(folder) or runs.read_run(folder).get("kind") != "autoencoder":
            raise ModelError(f"--autoencoder {path}: no run of `ldm train-ae`")
        f = _stored_settings(folder).f
        if f in found:
            raise UsageError(f"--autoencoder {path}: f = {f} as {found[f]} has; name one a factor")
        found[f] = path
    return found


def _combinations(grid: Mapping[str, tuple[str, ...]]) -> Iterable[dict[str, str]]:
    """Every choice of a value for each setting; one empty choice without a grid."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values))


def _slug(f: int, choice: Mapping[str, str]) -> str:
    parts = [f"f{f}", *(f"{path.rpartition('.')[2]}={value}" for path, value in choice.items())]
    return "-".join(re.sub(r"[^A-Za-z0-9._=]+", "_", part) for part in parts)


def _variant(f: int, choice: Mapping[str, str]) -> str:
    return ", ".join([f"LDM-{f}", *(f"{path.rpartition('.')[2]} = {value}" for path, value in choice.items())])


def _belongs(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in values.items() if path in config.paths(kind)}


def _first_stage(
    request: StudyRequest, f: int, choice: Mapping[str, str], named: Mapping[int, str]
) -> "Training | str":
    """The first stage of a variant: "none" for pixels, a finished run's path, or a training."""
    if f == 1:
        return "none"
    if f in named:
        return named[f]
    only_here = {p: v for p, v in choice.items() if p not in config.paths("diffusion")}
    shape = FIRST_STAGES[f"{request.reg}-f{f}"].values
    own: dict[str, Any] = {
        FACTOR: f,
        "autoencoder.reg": request.reg,
        "autoencoder.z_channels": shape["autoencoder.z_channels"],
        "autoencoder.embed_dim": shape["autoencoder.embed_dim"],
        "train.seed": request.seeds[0],
        **_length(request.first_stage_minutes or request.minutes, request.first_stage_steps or request.steps),
    }
    if request.reg == "vq":
        own["autoencoder.codebook_size"] = 1024
    shared = [(origin, _without_training(_belongs("autoencoder", values))) for origin, values in request.layers]
    layers = [("study", own), *request.first_stage_layers, *shared, ("--grid", only_here)]
    name = f"first-stages/{_slug(f, only_here)}"
    resolved = config.resolve("autoencoder", layers)
    variant = ", ".join([f"f = {f}, {request.reg}", *(f"{p.rpartition('.')[2]} = {v}" for p, v in only_here.items())])
    assert isinstance(resolved.config, AutoencoderConfig)
    parameters = sum(p.numel() for p in meta_autoencoder(resolved.config.autoencoder).parameters())
    return Training(name, variant, "autoencoder", f, request.seeds[0], resolved, parameters=parameters)


def _without_training(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of all trainings are those of the models; first stages share data and what only they have."""
    return {path: value for path, value in values.items() if not path.startswith("train.")}


def _length(minutes: float, steps: int) -> dict[str, Any]:
    """Settings that end a training: after minutes, or after steps."""
    bound = {"train.max_minutes": minutes} if minutes else {}
    return {
        "train.steps": NEVER if minutes else steps or DEFAULT_STEPS,
        "train.save_every": SAVE_EVERY,
        "train.eval_every": 0,
        **bound,
    }


def _model(request: StudyRequest, f: int, choice: Mapping[str, str], seed: int, stage: "Training | str") -> Training:
    own: dict[str, Any] = {
        "train.seed": seed,
        "sample.sampler": request.sampler,
        "train.evaluations": request.evaluations,
        "train.eval_samples": request.eval_samples,
        "train.eval_features": request.features or "",
        **_length(request.minutes, request.steps),
    }
    here = [(origin, _belongs("diffusion", values)) for origin, values in request.layers]
    layers = [("study", own), *here, ("--grid", _belongs("diffusion", choice))]
    settings = config.resolve("diffusion", layers)
    assert isinstance(settings.config, DiffusionConfig)
    stage_settings = _stage_settings(stage)
    set_by_hand = {path for _, values in layers for path in values if path.startswith("diffusion.")}
    if not set_by_hand & {"diffusion.channels", "diffusion.channel_mult", "diffusion.attention_resolutions"}:
        side = min(_image_size(settings.config)) // f
        widths = equal_parameters(settings.config, stage_settings, side, request.parameters)
        settings = config.resolve("diffusion", [("study", {**own, **widths}), *here, layers[-1]])
    count = _parameters(settings.config, stage_settings)  # type: ignore[arg-type]
    name = f"{_slug(f, choice)}-seed{seed}"
    autoencoder = stage.name if isinstance(stage, Training) else stage
    trained_here = isinstance(stage, Training)
    return Training(
        name, _variant(f, choice), "diffusion", f, seed, settings, autoencoder, trained_here, stage_settings, count
    )


def _stage_settings(stage: "Training | str") -> AutoencoderSettings:
    if isinstance(stage, Training):
        assert isinstance(stage.resolved.config, AutoencoderConfig)
        return stage.resolved.config.autoencoder
    if stage == "none":
        return AutoencoderSettings(f=1)
    return _stored_settings(Path(stage))


def _stored_settings(run: Path) -> AutoencoderSettings:
    found = read_config("autoencoder", run)
    assert isinstance(found, AutoencoderConfig)
    return found.autoencoder


# --- equal parameters --------------------------------------------------------------------------------------------


def _image_size(settings: DiffusionConfig) -> tuple[int, int]:
    height, width = settings.data.size
    return (height or 64, width or 64)


def _parameters(settings: DiffusionConfig, stage: AutoencoderSettings) -> int:
    usual = DiffusionConfig()
    return _count(replace(settings, train=usual.train, sample=usual.sample), stage)


@lru_cache(maxsize=4096)
def _count(settings: DiffusionConfig, stage: AutoencoderSettings) -> int:
    """Parameters of the model; seeds and rates, which change none, are asked for again and again."""
    network = meta_autoencoder(stage)
    latent = network.latent_shape(*_image_size(settings))
    specs = assumed_specs(settings, network, {})
    model = meta_diffusion_model(settings, specs, latent)
    return sum(p.numel() for p in model.parameters())


def levels(side: int) -> tuple[list[float], tuple[int, ...]]:
    """Shape of a UNet for latents of this side: ratios of widths, the last one left to be chosen, and the factors at
    which maps carry attention. Maps are halved down to `SMALLEST_SIDE`, at least once."""
    count = 2
    while side >> count >= SMALLEST_SIDE and count < 6:
        count += 1
    ratios = [1.0] * (count - 2) + [2.0, 10 / 3] if count > 2 else [1.0, 2.0]
    factors = tuple(2**k for k in range(count) if side >> k <= ATTENTION_SIDE)
    return ratios, factors or (2 ** (count - 1),)


def equal_parameters(
    settings: DiffusionConfig, stage: AutoencoderSettings, side: int, target: int = 0
) -> dict[str, Any]:
    """Widths at which a model for latents of `side` has `target` parameters (0 = those of the default network), as
    settings. The width of the first level is found with the usual ratios, then the last level's. Raises UsageError for
    numbers that no width comes near."""
    target = target or _parameters(replace(settings, diffusion=_default_shape(settings.diffusion)), DEFAULT_STAGE)
    ratios, factors = levels(side)

    def shaped(first: int, last: int) -> DiffusionSettings:
        widths = [WIDTH_STEP * round(first * ratio / WIDTH_STEP) for ratio in ratios[:-1]] + [last]
        mult = tuple(round(width / first, 6) for width in widths)
        return replace(settings.diffusion, channels=first, channel_mult=mult, attention_resolutions=factors)

    def off(widths: tuple[int, int]) -> float:
        """How many times too large a model is; below 1 it is too small."""
        return _parameters(replace(settings, diffusion=shaped(*widths)), stage) / target

    def times(first: int, ratio: float) -> int:
        return WIDTH_STEP * round(first * ratio / WIDTH_STEP)

    first = WIDTH_STEP
    while off((first + WIDTH_STEP, times(first + WIDTH_STEP, ratios[-1]))) <= 1:
        first += WIDTH_STEP
    candidates = []
    for start in (first, first + WIDTH_STEP):
        low, high = (times(start, ratio) for ratio in LAST_RATIOS)
        while high - low > WIDTH_STEP:
            middle = times(1, (low + high) / 2)
            low, high = (middle, high) if off((start, middle)) <= 1 else (low, middle)
        candidates += [(start, low), (start, high)]
    nearest = min(candidates, key=lambda widths: abs(off(widths) - 1))
    if not 0.5 <= off(nearest) <= 2:
        raise UsageError(
            f"--parameters {target}: a model in latents of {side} positions a side has "
            f"{off(nearest) * target / 1e6:.2g} M or more; ask for as many"
        )
    chosen = shaped(*nearest)
    return {
        "diffusion.channels": chosen.channels,
        "diffusion.channel_mult": chosen.channel_mult,
        "diffusion.attention_resolutions": chosen.attention_resolutions,
    }


DEFAULT_STAGE = AutoencoderSettings()  # f = 4


def _default_shape(settings: DiffusionSettings) -> DiffusionSettings:
    usual = DiffusionSettings()
    return replace(
        settings,
        channels=usual.channels,
        channel_mult=usual.channel_mult,
        attention_resolutions=usual.attention_resolutions,
    )


# --- what it takes -------------------------------------------------------------------------------------------------


def describe_plan(request: StudyRequest) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What would be trained, a row a run, and the minutes or steps of all; nothing is trained."""
    trainings = plan_trainings(request)
    table = [_planned(training) for training in trainings]
    minutes = sum(row["minutes"] for row in table)
    bound = f"{minutes:g} minutes of training" if minutes else f"{sum(row['steps'] for row in table):,} steps"
    seconds = f"{len(trainings)} trainings, {bound}; starting and measuring come on top"
    return table, {"minutes": minutes, "note": seconds}


def _planned(training: Training) -> dict[str, Any]:
    settings = training.resolved.config
    minutes, steps = settings.train.max_minutes, settings.train.steps
    if isinstance(settings, AutoencoderConfig):
        size = settings.data.size if any(settings.data.size) else (64, 64)
        flops = autoencoder_costs(settings, size)["autoencoder"].forward_flops
        shape = meta_autoencoder(settings.autoencoder).latent_shape(*size)
    else:
        assert isinstance(settings, DiffusionConfig)
        network = meta_autoencoder(training.stage)
        shape = network.latent_shape(*_image_size(settings))
        specs = assumed_specs(settings, network, {})
        flops = diffusion_cost(settings, specs, shape, _image_size(settings)).forward_flops
    return {
        "name": training.name,
        "kind": training.kind,
        "latent": "x".join(map(str, shape)),
        "parameters": training.parameters,
        "gflop": f"{flops / 1e9:.3g}",
        "minutes": minutes,
        "steps": 0 if minutes else steps,
        "length": f"{minutes:g} minutes" if minutes else f"{steps:,} steps",
    }
