"""What `ldm demo` trains within its minutes: networks, batches and times, from what steps take on this machine.

Pure functions: who measures is `reports/demo_speed.py`, who trains `reports/demo.py`.
"""

import json
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ldmcli.core.durations import duration_with_unit

# what is tuned for minutes, beside the presets: of the first stage, of any diffusion model, of each size that is chosen
FIRST_STAGE: dict[str, Any] = {"train.lr": 0.02}
DIFFUSION: dict[str, Any] = {"sample.guidance": 1.5}  # stars and counts suffer at 2 and 3 after so few steps
_STEPS = {"sample.steps": 6}  # as good as 20 after so few minutes (docs/experiments.md, "Few calls")
_SMALL = {  # not tried with the larger ones
    # led away from itself as it was after 0.3 of its time, instead of by its captions: stars are right (…,
    # "Autoguidance"), in four steps; the last ones, in less noise, are not led, which keeps areas even
    "train.guide_at": 0.3,
    "sample.guidance": 1.0,
    "sample.autoguidance": 2.0,
    "sample.guidance_interval": (0.4, 1.0),
    "sample.steps": 4,
    "sample.temperature": 0.8,  # (…, "Less noise to begin with")
    "train.adam_lr": 3e-3,  # the preset's 0.001 is slow at first (…, "The first steps")
    "train.muon_momentum": 0.9,  # (…, "Shorter momentum")
    "train.muon_every": 1,  # three iterations at each step take as long as five at every other one, and …
    "train.muon_iterations": 3,  # … learn sooner (…, "Muon at every step")
}
_LARGER = {**_STEPS, "train.warmup": 100, "train.cooldown": 0.4}  # these presets are planned for days
TUNED: dict[str, dict[str, Any]] = {"small": _SMALL, "base": _LARGER, "large": _LARGER}


@dataclass(frozen=True, kw_only=True)
class Size:
    """A diffusion model and its batch. preset: of its settings; channels: width of the first level, and channel_mult:
    those of all levels as multiples of it (0 and () = the preset's); patch: positions a side that the UNet takes as
    one; enough: steps from which it is worth taking before the next of the list; half_steps: of half a batch, at the
    start."""

    preset: str
    batch: int
    patch: int = 1
    channels: int = 0
    channel_mult: tuple[float, ...] = ()
    enough: int = 0
    half_steps: int = 0

    @property
    def values(self) -> dict[str, Any]:
        """Settings by dotted name."""
        return {
            "train.batch_size": self.batch,
            "train.half_batch_steps": self.half_steps,
            "diffusion.patch": self.patch,
            **({"diffusion.channels": self.channels} if self.channels else {}),
            **({"diffusion.channel_mult": tuple(self.channel_mult)} if self.channel_mult else {}),
            **TUNED[self.preset],
        }

    @property
    def title(self) -> str:
        """As people read it."""
        width = f", {self.channels} wide" if self.channels else ""
        return self.preset + width + (f", {self.patch}x{self.patch} latents as one" * (self.patch > 1))


FEW_STEPS = 250  # of the diffusion model: fewer leave blobs of the right colour
PLENTY_STEPS = 6000  # a machine that has time for so many takes larger batches
MOST_BATCH = 256
HALF_SHARE = 0.2  # of a small model's steps take half a batch, at the start …
HALF_COST = 0.6  # … and so much of the time of a whole one (docs/experiments.md, "The first steps")
# a first level that is wider than the preset's pays in minutes (docs/experiments.md, "Wider first levels"); batches of
# 16 lost in the same minutes: 81 against 91 %, on a slow machine 516 steps of 16 with 47 against 350 of 32 with 72 %
SMALL = Size(preset="small", batch=32, channels=80, channel_mult=(1, 1.2, 2), enough=150)
SMALLER = (replace(SMALL, batch=16, enough=FEW_STEPS), Size(preset="small", batch=16, channels=32))
GPU_SIZES = (
    (50_000, Size(preset="large", batch=256, enough=3000)),
    (2000, Size(preset="base", batch=128, enough=2000)),
)

AE_BATCH = 32
AE_SHARE, AE_MOST = 0.12, 0.4  # of the time: as planned, and where pictures want more
AE_STEPS = 150  # fewer leave the first stage below POOR_PSNR on photographs and emoji
EVALUATIONS = 3  # of the first stage: a curve that says how much more time would do
POOR_PSNR = 22.0  # dB; below it shapes and colours of small images are not discernible any more
MARGIN = 0.03  # of the time is left over
START_SECONDS = 12.0  # libraries, measuring
TAIL_SECONDS = 14.0  # last evaluation and preview, features, report
EPOCHS = 3.0  # that the diffusion model is planned to take, each of other noise: to encode more rows takes it steps
SAMPLE_COST = 20  # steps of 32 images take as long as 128 samples, their features and those of real images
OPENING_SECONDS = 4.0  # before the diffusion model's first step: data and tokenizer opened, …
CHOOSING = 3  # … threads chosen by passes that take as long as so many steps
ENCODE_COST = 0.2  # of a training step of the first stage, its pictures once through the encoder
OVERHEAD_SHARE = 0.3  # of the time at most: encoding, samples and measuring
SAMPLES = (128, 64, 32, 16)
LEAST_SHARE = 0.3  # of the time for the diffusion model, also where a minute is too short for all
NO_BOUND = 1_000_000  # of steps
MOST_EPOCHS = 500  # a bound against learning a few hundred pictures by heart on a fast machine; not tuned
DB_PER_DOUBLING = (1.0, 3.0, 4.0)  # PSNR gained with twice the steps: least, usual, most that is believed


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is given. size: (height, width) px; rows: training pictures, 0 = a stream of unknown length; preset: the
    user's choice of a diffusion model, which fixes its network and its `batch`; asked: settings by dotted name that the
    demo keeps when it goes on."""

    minutes: float
    size: tuple[int, int]
    rows: int = 0
    gpu: bool = False
    preset: str = ""
    batch: int = 32
    asked: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds measured on this machine. first_stage: a training step of 32 pictures that lie there decoded; picture:
    to open and cut one; diffusion: a training step of the size that was chosen."""

    first_stage: float
    picture: float
    diffusion: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The course of a demo. Times in seconds, encode_seconds until the diffusion model's first step; rows: training
    pictures that are used, 0 = all; max_steps: of the diffusion model, 0 = as many as fit; second_stage: what it was
    given when it began, 0 before; notes: what people should know."""

    task: Task
    speed: Speed
    size: Size
    f: int
    ae_seconds: float
    ae_steps: int
    encode_seconds: float
    tail_seconds: float
    ldm_seconds: float
    ldm_steps: int
    samples: int
    rows: int = 0
    max_steps: int = 0
    second_stage: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def first_stage_values(self) -> dict[str, Any]:
        """Settings of the first stage by dotted name."""
        images = 256 if self.ae_steps >= 300 else 64  # measuring is to take little of a slow machine's time
        return first_stage(self.task) | {"train.eval_images": images, "train.evaluations": EVALUATIONS}

    def document(self) -> dict[str, Any]:
        """As JSON holds it."""
        document: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return document

    def text(self) -> str:
        """Lines of at most 80 columns."""
        half = self.size.half_steps
        fewer = f"({self.size.batch // 2} in the first {half:,}), " if half else ""
        lines = [
            f"plan: first stage f = {self.f}, {duration_with_unit(self.ae_seconds)}, about "
            f"{_counted(self.ae_steps)} of {AE_BATCH} images",
            f"      diffusion model {self.size.title}:",
            f"      {duration_with_unit(self.ldm_seconds)}, about {_counted(self.ldm_steps)} of {self.size.batch} "
            f"images at {self.speed.diffusion:.2g} s",
            f"      {fewer}then {self.samples} samples, measured",
        ]
        if self.rows:
            lines.insert(1, f"      {self.rows:,} of {self.task.rows:,} pictures as latents")
        notes = [textwrap.fill(f"note: {text}", 80, subsequent_indent="      ") for text in self.notes]
        return "\n".join(lines + notes)


def factor(task: Task) -> int:
    """Downsampling of the first stage: 4, and 8 for large pictures that it divides well."""
    return 8 if min(task.size) >= 192 and not any(side % 32 for side in task.size) else 4


def first_stage(task: Task) -> dict[str, Any]:
    """Network and batch of the first stage, by dotted name."""
    wide = {"autoencoder.f": 8, "autoencoder.embed_dim": 8} if factor(task) > 4 else {}
    return FIRST_STAGE | {"train.batch_size": AE_BATCH} | wide


def sizes(task: Task) -> list[Size]:
    """Diffusion models to try, best first; the last is taken whatever it takes."""
    if task.preset:
        return [Size(preset=task.preset, batch=task.batch)]
    small, f = [SMALL, *SMALLER], factor(task)
    if min(task.size) // f >= 32 and not any(side % (8 * f) for side in task.size):
        # as many positions as of 64 px, which is a quarter of the work
        small = [replace(SMALL, enough=PLENTY_STEPS // 2), *(replace(one, patch=2) for one in small)]
    larger = [size for rows, size in GPU_SIZES if task.gpu and (not task.rows or task.rows >= rows)]
    return [*larger, *small]


def choose(tried: Sequence[Size], seconds: Callable[[Size], float], room: float) -> tuple[Size, float]:
    """(size, seconds a step): the first of them that has time for enough steps in `room` seconds, else the last; with
    larger batches where there is time for plenty. seconds(size): what a step takes."""
    for size in tried:
        took = seconds(size)
        if room / took >= size.enough:
            break
    while room / took >= PLENTY_STEPS and size.enough and size.batch < MOST_BATCH:
        size, took = replace(size, batch=2 * size.batch), 2 * took
    return size, took


def plan(task: Task, speed: Speed, seconds: Callable[[Size], float], kept: Size | None = None) -> Plan:
    """The course for a task. seconds(size): what a training step of a diffusion model takes; kept: the size of a demo
    that goes on, which stays."""
    total = task.minutes * 60
    room = total * (1 - MARGIN)
    needed = AE_STEPS * speed.first_stage + min(AE_STEPS * AE_BATCH, task.rows or math.inf) * speed.picture
    ae_seconds = min(max(AE_SHARE * total, needed), AE_MOST / 2 * total)
    f = factor(task)
    rough = max(room - ae_seconds - START_SECONDS - TAIL_SECONDS, 0.2 * total)
    size, took = (kept, seconds(kept)) if kept else choose(sizes(task), seconds, rough)
    notes: list[str] = []

    samples = _samples(total, took * AE_BATCH / size.batch)
    tail = min(TAIL_SECONDS + SAMPLE_COST * took * AE_BATCH / size.batch * samples / SAMPLES[0], 0.5 * total)
    each = ENCODE_COST * speed.first_stage / AE_BATCH + speed.picture
    took += 0.0 if task.rows or kept else size.batch * each  # a stream is encoded anew in every step
    left = room - START_SECONDS - ae_seconds - tail
    rows = _rows_used(task, each, size.batch / took / EPOCHS, left, notes)
    encode = rows * each + OPENING_SECONDS + min(CHOOSING * took, MARGIN * total)
    left = max(left - encode, LEAST_SHARE * total)
    steps = int(left / took)
    most = _most_steps(rows, size.batch)
    if most and steps > most:
        notes.append(f"{rows:,} pictures are few for this machine: it stops after {MOST_EPOCHS} epochs")
        left, steps = most * took, most
    enough = min(FEW_STEPS, most or FEW_STEPS)
    if size.preset == "small" and not (kept or task.preset or task.gpu):
        size = replace(size, half_steps=int(HALF_SHARE * steps))
    steps = min(steps + int((1 - HALF_COST) * size.half_steps), most or NO_BOUND)
    is_short = steps < 0.9 * enough and not task.preset
    made = Plan(
        task=task,
        speed=replace(speed, diffusion=took),
        size=size,
        f=f,
        ae_seconds=ae_seconds,
        ae_steps=_first_stage_steps(ae_seconds, task.rows or math.inf, speed),
        encode_seconds=encode,
        tail_seconds=tail,
        ldm_seconds=left,
        ldm_steps=max(steps, 1),
        samples=samples,
        rows=rows if rows < task.rows else 0,
        max_steps=most,
        notes=notes,
    )
    if is_short:
        minutes = nice_minutes(minutes_for_steps(made, enough, took))
        notes.append(f"{_counted(steps)}, where {enough} begin to show more than colours: --minutes {minutes} would do")
    return made


def _rows_used(task: Task, each: float, wanted: float, seconds: float, notes: list[str]) -> int:
    """How many training pictures are used: as many as give EPOCHS, and no more than take a part of the time to read.
    each: seconds to encode one; wanted: pictures in a second of training; seconds: for both."""
    enough = min(task.rows, max(int(wanted * seconds / (1 + wanted * each)), 2 * AE_BATCH))
    room = OVERHEAD_SHARE / 2 * task.minutes * 60
    rows = min(enough, max(int(room / each), 2 * AE_BATCH))
    if rows < enough:
        reading = task.rows * each
        minutes = math.ceil(reading / (OVERHEAD_SHARE / 2) / 60)
        notes.append(
            f"of {task.rows:,} pictures {rows:,} are used: reading all takes {duration_with_unit(reading)}; "
            f"--minutes {nice_minutes(minutes)} would take all"
        )
    return rows


def _counted(steps: int) -> str:
    return f"{steps:,} step{'s' * (steps != 1)}"


def _first_stage_steps(seconds: float, rows: float, speed: Speed) -> int:
    """In so many seconds, where each picture is opened once and kept."""
    while_opening = speed.first_stage + AE_BATCH * speed.picture
    if seconds < rows / AE_BATCH * while_opening:
        return max(int(seconds / while_opening), 1)
    return int((seconds - rows * speed.picture) / speed.first_stage)


def _samples(total: float, step_seconds: float) -> int:
    """As many samples as take a part of the time at most; step_seconds: of a training step of 32 images."""
    for count in SAMPLES:
        if SAMPLE_COST * step_seconds * count / SAMPLES[0] <= OVERHEAD_SHARE / 2 * total:
            return count
    return SAMPLES[-1]


def _most_steps(rows: int, batch: int) -> int:
    return math.ceil(MOST_EPOCHS * rows / batch) if rows else 0


# ---------------------------------------------------------------- while it runs


def first_stage_extension(plan: Plan, curve: Sequence[tuple[float, float]]) -> float:
    """Seconds that the first stage is to have in all: as planned where it is good enough, else as many as its curve
    says, within a part of the demo's time. curve: (seconds, PSNR in dB) of its evaluations, the last at its end."""
    seconds, psnr = curve[-1]
    if psnr >= POOR_PSNR:
        return plan.ae_seconds
    most = AE_MOST * plan.task.minutes * 60
    return max(min(1.1 * seconds_for_psnr(curve, POOR_PSNR), most), plan.ae_seconds)


def second_stage_seconds(plan: Plan, spent: float) -> float:
    """Seconds for the diffusion model, where `spent` have gone by: what is left but for encoding and measuring; what it
    was given before where it goes on."""
    if plan.second_stage:
        return plan.second_stage
    total = plan.task.minutes * 60
    return max(total * (1 - MARGIN) - spent - plan.encode_seconds - plan.tail_seconds, LEAST_SHARE * total)


def seconds_for_psnr(curve: Sequence[tuple[float, float]], wanted: float) -> float:
    """Seconds after which a first stage reaches `wanted` dB, if PSNR goes on rising with the logarithm of time as it
    did over `curve`: (seconds, dB) points."""
    (begun, low), (seconds, psnr) = curve[0], curve[-1]
    least, slope, most = DB_PER_DOUBLING
    if seconds > begun > 0:
        slope = min(max((psnr - low) / math.log2(seconds / begun), least), most)
    return seconds * 2 ** (max(wanted - psnr, 0.0) / slope)


def minutes_for_psnr(minutes: float, curve: Sequence[tuple[float, float]]) -> float:
    """Minutes of a demo whose first stage reaches POOR_PSNR, and leaves half of the time to the rest."""
    return max(seconds_for_psnr(curve, POOR_PSNR) / 60 / (AE_MOST / 2), minutes)


def minutes_for_steps(plan: Plan, wanted: int, step_seconds: float) -> float:
    """Minutes of a demo whose diffusion model takes `wanted` steps of so many seconds."""
    rest = START_SECONDS + plan.encode_seconds + plan.tail_seconds
    return (wanted * step_seconds + rest) / (1 - MARGIN - AE_SHARE) / 60


def nice_minutes(minutes: float) -> int:
    """Rounded up to what people type: 3.2 → 4, 23 → 25, 61 → 70, 330 → 400."""
    for bound, unit in ((10, 1), (60, 5), (300, 10)):
        if minutes <= bound:
            return math.ceil(minutes / unit) * unit
    return math.ceil(minutes / 100) * 100


def shortcomings(plan: Plan, curve: Sequence[tuple[float, float]], steps: int, seconds: float) -> list[str]:
    """What was not good enough for what follows, and what would help. curve: as above, of the whole first stage; steps,
    seconds: that the diffusion model took."""
    found, minutes, psnr = [], plan.task.minutes, curve[-1][1]
    if psnr < POOR_PSNR:
        wanted = nice_minutes(minutes_for_psnr(minutes, curve))
        found.append(
            f"the autoencoder reconstructs held-out images at {psnr:.1f} dB only ({POOR_PSNR:g} is a minimum), "
            f"and no sample can be better than its reconstructions; at this speed --minutes {wanted} would do, "
            "or a smaller --size, or a machine that does nothing else"
        )
    enough = min(FEW_STEPS, plan.max_steps or FEW_STEPS)
    if steps < 0.9 * enough and not plan.task.preset:
        wanted = nice_minutes(max(minutes_for_steps(plan, enough, seconds / max(steps, 1)), minutes))
        found.append(
            f"the diffusion model took {_counted(steps)} only, where {enough} begin to show more than colours; at this "
            f"speed --minutes {wanted} would do"
        )
    return found
