"""What `ldm distill` trains with: the teacher, the segments that its student learns to jump over, and the settings that
a student takes over."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldmcli.core import config as configuration
from ldmcli.core import console, files, runs
from ldmcli.core.errors import ModelError, UsageError
from ldmcli.core.settings import FEW_CALLS, DiffusionConfig, DiffusionSettings
from ldmcli.diffusion import samplers
from ldmcli.diffusion.distillation import SegmentLevels, Segments, distillation_loss
from ldmcli.diffusion.guidance import autoguided, denoiser, guidance_path
from ldmcli.diffusion.schedule import Schedule, make_schedule
from ldmcli.formats.run_folder import WEIGHTS, fingerprint_of, guiding_weights, read_config, read_weights
from ldmcli.sampling.api import LoadedDiffusion
from ldmcli.sampling.load import load
from ldmcli.training.distributed import Distributed

# settings of a teacher that its student must share, and those of its training that a student takes over
_SHARED = ("diffusion.", "condition.", "task.")
_OWN = ("diffusion.dropout", "diffusion.loss", "condition.drop")
_TAKEN_OVER = ("data.", *_SHARED, "sample.n", "sample.prompts", "sample.temperature")
_TRAIN = (
    "optimizer betas weight_decay muon_every muon_iterations muon_momentum batch_size clip ema ema_decay ema_scope "
    "noise shard".split()
)
# rates of a student, as a share of its teacher's: it begins near its end, and at whole ones its loss rises at first
# (docs/experiments.md)
RATE = 0.2


def student_settings(teacher: Path, calls: int, guidance: float | None) -> dict[str, object]:
    """Settings of the student of a run (also RUN@STEP), {"section.name": value}: network, conditions, task, data and
    optimiser are the teacher's, and it samples by the steps that it learns.

    guidance: the scale that is baked in, None = the teacher's own. Raises ModelError for what is no diffusion run,
    UsageError for numbers that do not go with it.
    """
    run, checkpoint = runs.locate(teacher)
    kind = runs.read_run(run).get("kind")
    if kind != "diffusion":
        raise ModelError(f"{teacher}: a run of kind {kind}; name a diffusion run, as of `ldm train-ldm`")
    config: DiffusionConfig = read_config("diffusion", run)
    known, few = configuration.flat(config), config.distill
    if guidance not in (None, 1) and not config.condition.kinds:
        console.warn("--guidance has no effect: this model takes no prompt, class, layout or map")
    if few.calls and guidance not in (None, few.guidance):
        raise UsageError(
            f"--guidance {guidance:g}: guidance {few.guidance:g} is baked into {teacher}, which was distilled itself; "
            "leave it out, or distill its teacher"
        )
    if few.calls and (calls >= few.calls or few.calls % calls):
        raise UsageError(f"--calls {calls}: {teacher} has {few.calls} calls; take a smaller number that divides them")
    scale = few.guidance if few.calls else config.sample.guidance if guidance is None else guidance
    stored = files.tensors_metadata(run / WEIGHTS) if checkpoint is None and (run / WEIGHTS).is_file() else {}
    led = config.sample.autoguidance if guiding_weights(run) else 1.0
    return {
        **{name: value for name, value in known.items() if name.startswith(_TAKEN_OVER)},
        **{f"train.{name}": known[f"train.{name}"] for name in _TRAIN},
        **{name: RATE * float(str(known[name])) for name in ("train.lr", "train.adam_lr")},
        **{f"sample.{name}": value for name, value in FEW_CALLS.items()},
        "sample.steps": calls,
        "sample.guidance": 1.0,
        "distill.calls": calls,
        "distill.guidance": scale if config.condition.kinds else 1.0,
        "distill.autoguidance": few.autoguidance if few.calls else led,
        "distill.teacher": stored.get("content_sha256") or fingerprint_of(read_weights(teacher, "model")[0]),
        **({"distill.teacher_steps": few.calls} if few.calls else {}),
    }


def teacher_passes(config: DiffusionConfig, teacher: DiffusionConfig) -> int:
    """How often a teacher's network sees each sample of a step."""
    steps, few = _steps(config), config.distill
    if teacher.distill.calls:
        return steps
    return (2 * steps - 1) * (1 + (few.guidance != 1) + (few.autoguidance != 1))


def _steps(config: DiffusionConfig) -> int:
    """Of the teacher, in each segment."""
    return -(-config.distill.teacher_steps // config.distill.calls)


class Distillation:
    """A teacher in use, and what its student learns of it in a step. compiled: the student's part as one graph."""

    def __init__(self, config: DiffusionConfig, teacher: LoadedDiffusion, path: Path, compiled: bool = False):
        self.teacher, self.path, few = teacher, path, config.distill
        is_student = bool(teacher.config.distill.calls)
        self.schedule: Schedule = make_schedule(config.diffusion)
        self.segments = Segments(self.schedule, few.calls, _steps(config))
        self._sample = samplers.euler if is_student else samplers.heun
        self._guidance, self._autoguidance = (1.0, 1.0) if is_student else (few.guidance, few.autoguidance)
        self._student_loss = torch.compile(distillation_loss, dynamic=False) if compiled else distillation_loss
        self._calls = few.calls
        self._nulls: dict[tuple[torch.Size, ...], dict[str, Tensor]] = {}

    def describe(self) -> str:
        """What it does, in one line."""
        steps, scale = self.segments.t.shape[1], self._guidance
        named = {"guidance": scale, "autoguidance": self._autoguidance}
        baked = [f"{name} {value:g}" for name, value in named.items() if value != 1]
        guided = f", {' and '.join(baked)} baked in" if baked else ""
        return f"{self._calls} calls an image, each as far as {steps} steps of {self.path.name}{guided}"

    def parent(self) -> dict[str, str]:
        """The teacher, as run.json has it."""
        return {"path": str(self.path), "sha256": self.teacher.fingerprint}

    def timesteps(self, positions: list[int]) -> Tensor:
        """Where the segments of samples at these positions of the training begin, (B,): each in its turn, so that any
        batch holds all of them."""
        return self.segments.starts((torch.tensor(positions, dtype=torch.float64) % self._calls + 0.5) / self._calls)

    def loss(
        self,
        model: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor],
        schedule: Schedule,
        settings: DiffusionSettings,
        z_0: Tensor,
        noise: Tensor,
        t: Tensor,
        inputs: Mapping[str, Tensor],
    ) -> Tensor:
        """The student's error, (B,); arguments as of `diffusion_loss`, t from `segments.starts`."""
        levels = self.segments.of(t)
        z = self.segments.begin(z_0, noise, levels)
        return self._student_loss(model, schedule, settings, z, self._end(z, levels, inputs), levels, inputs)

    @torch.no_grad()
    def _end(self, z: Tensor, levels: SegmentLevels, inputs: Mapping[str, Tensor]) -> Tensor:
        """Where the teacher arrives from z (B, c, h, w) at the end of each sample's segment."""
        network, interval = self.teacher.network, self.teacher.config.sample.guidance_interval
        encode = self.teacher.autoencoder.encode_unchecked
        size = (z.shape[-2], z.shape[-1])
        null = self._null(inputs, len(z)) if self._guidance != 1 else None
        path = guidance_path(network, self._guidance, inputs, null, len(z), size, encode)
        denoise = denoiser(network.predict, self.schedule, path, interval)
        if self._autoguidance != 1:
            guiding = self.teacher.guiding
            given = guidance_path(guiding, 1.0, inputs, None, len(z), size, encode)
            worse = denoiser(guiding.predict, self.schedule, given)
            denoise = autoguided(denoise, worse, self.schedule, self._autoguidance, interval)
        return self._sample(denoise, z, levels)

    def _null(self, inputs: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        """What stands for no condition in place of `inputs`, on their device; made once for each shape, as the copy
        makes the host wait."""
        shapes = tuple(x.shape for x in inputs.values())
        if shapes not in self._nulls:
            conditions = self.teacher.network.conditions
            made = conditions.null(n, inputs) if conditions.droppable else {}
            able = [name for name in inputs if name.partition(".")[0] in conditions.droppable]
            self._nulls[shapes] = {name: made[name].to(inputs[name].device) for name in able}
        return self._nulls[shapes]


def open_teacher(config: DiffusionConfig, path: Path | None, dist: Distributed) -> Distillation:
    """What a distilled run trains with. path: the run that distill.teacher is the hash of. Raises ModelError where it
    is another, UsageError where the student's network is not its own."""
    if path is None:
        raise UsageError("distill.calls: `ldm distill RUN` sets it; leave it out here")
    teacher = load(path, dist.device)
    if not isinstance(teacher, LoadedDiffusion):
        raise ModelError(f"{path}: an autoencoder; name a diffusion run, as of `ldm train-ldm`")
    found, wanted = teacher.fingerprint, config.distill.teacher
    if found != wanted:
        raise ModelError(
            f"{path}: not the teacher that this run was started with (hash {found[:12]}, wanted {wanted[:12]}); name "
            "that one, or begin anew with --fresh"
        )
    theirs, ours = configuration.flat(teacher.config), configuration.flat(config)
    changed = [name for name in theirs if name.startswith(_SHARED) and theirs[name] != ours[name]]
    if changed := [name for name in changed if name not in _OWN]:
        raise UsageError(f"{changed[0]} = {ours[changed[0]]}: a student has its teacher's network; leave it out")
    return Distillation(config, teacher, path, config.train.compile and dist.world_size == 1)
