"""The section [train], which both training commands read."""

from dataclasses import dataclass

from ldmcli.core.errors import UsageError
from ldmcli.core.setting_checks import at_least, choice, positive, share

MIXED_PRECISION = ("auto", "no", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The loop. Steps are optimiser updates; the batch is the global one, over processes and accumulation."""

    steps: int = 10_000
    batch_size: int = 32
    half_batch_steps: int = 0  # steps at the start that take half of batch_size: their noise costs little then
    micro_batch: int = 0  # samples that a process takes at a time; 0 = auto: its whole share, or as many as fit
    lr: float = 1e-3
    optimizer: str = "adamw"  # adamw | muon (hidden matrices by Muon, the rest by AdamW at `adam_lr`)
    adam_lr: float = 1e-3  # muon only: rate of the part that AdamW trains
    betas: tuple[float, float] = (0.9, 0.99)  # of AdamW
    weight_decay: float = 0.0  # decoupled: times the rate of AdamW or Muon, whichever trains a weight
    muon_every: int = 1  # orthogonalise the update every N steps; in between, the momentum accumulates
    # Newton-Schulz iterations that orthogonalise; 3 take 0.6 of the time, and small singular values stay smaller
    muon_iterations: int = 5
    muon_momentum: float = 0.95  # share of the past gradients in Muon's direction; lower is quicker in short runs
    # constant: warm-up, then the rate stays until it cools down; linear | warmup_cosine: the schedulers of the
    # original, whose multiplier of the rate warms up and falls in each cycle
    schedule: str = "constant"
    warmup: int = 0  # constant: steps, linear
    cooldown: float = 0.0  # constant: share of the steps at the end over which the rate falls linearly to 0
    cycle_steps: tuple[int, ...] = ()  # linear, warmup_cosine: steps of each cycle; () = one, as long as the run
    # steps of a cycle's warm-up; for this and the three multipliers below: one number for all cycles, or one for each
    cycle_warmup: tuple[int, ...] = (0,)
    cycle_start: tuple[float, ...] = (0.0,)  # multiplier at the beginning of a cycle's warm-up
    cycle_max: tuple[float, ...] = (1.0,)  # … where it is highest
    cycle_min: tuple[float, ...] = (0.0,)  # … at a cycle's end, and after the last one
    clip: float = 0.0  # global gradient norm; 0 = off
    spike: float = 10.0  # a gradient norm this many times the usual one is scaled down to the usual; 0 = off
    ema: bool = True  # keep an average of the weights, for use
    ema_decay: float = 0.9999  # the rate in effect is min(ema_decay, (1 + n) / (10 + n))
    ema_scope: str = "all"  # all | unet (the original averages the UNet only)
    # train-ldm: share of the run's steps or minutes after which the weights for use, as they are then, are kept as the
    # guiding model of sample.autoguidance; 0 = none
    guide_at: float = 0.0
    seed: int = 0
    mixed_precision: str = "auto"  # auto | no | bf16 | fp16
    compile: bool = False
    # several processes, train-ldm: each keeps its part of the weights, gradients, averages and optimiser (FSDP2)
    shard: bool = False
    # blocks of the networks are computed again in the backward pass instead of kept: larger micro-batches fit, and a
    # step takes about a third longer; what is learned is the same
    checkpointing: bool = False
    # where train-ldm and train-classifier make noise from (seed, position): host, as ever | device, by a counter-based
    # generator, with other numbers that are the same on every device; it takes the host no time
    noise: str = "host"
    # NVIDIA GPUs: float32 products and convolutions in TF32, and the fastest convolution of each shape found by trying
    tf32: bool = True
    # operations whose sums come in one order, so that a run on a GPU repeats bit for bit; slower, and an error where
    # there is no such operation
    deterministic: bool = False
    # several processes: seconds that a backward pass waits for the others; whatever else they do may take hours
    gradient_timeout: float = 600.0
    max_bad_steps: int = 10  # NaN or Inf updates in a row before training ends with code 5
    save_every: int = 1000
    keep: int = 2  # newest checkpoints that stay
    # metric by which the checkpoint of the best evaluation stays, too: val_loss, fid, kid_mean, psnr …; none = none
    # does; "" = none, but fid of fewer than 5,000 pictures with eval_samples
    keep_best: str = ""
    sample_every: int = 1000
    eval_every: int = 1000
    evaluations: int = 0  # more of them, so many at equal shares of the run's steps or minutes
    log_every: int = 50
    eval_images: int = 256  # of the validation rows, at most; a short run measures fewer (`measured_images`)
    eval_frechet: bool = True  # train-ae: a Frechet distance beside PSNR and SSIM, where 64 images or more are measured
    # train-ldm: samples of fixed seeds that each evaluation measures against the held-out rows; 0 = none
    eval_samples: int = 0
    eval_steps: int = 0  # sampling steps of these; 0 = sample.steps
    # with eval_samples: the share of these that copies training pictures, of which 10,000 at most are looked through;
    # keep_best then keeps the best evaluation that shows no copies
    eval_novelty: bool = False
    eval_features: str = ""  # network of features, as --features of eval-fid; "" = the best at hand
    max_hours: float = 0.0  # save and end before; 0 = no limit
    max_minutes: float = 0.0  # steps end early so that training takes this long, cooldown included; 0 = no limit
    track: tuple[str, ...] = ()

    def __post_init__(self):
        choice("train", "optimizer", self.optimizer, ("adamw", "muon"))
        choice("train", "mixed_precision", self.mixed_precision, MIXED_PRECISION)
        choice("train", "noise", self.noise, ("host", "device"))
        choice("train", "schedule", self.schedule, ("constant", "linear", "warmup_cosine"))
        choice("train", "ema_scope", self.ema_scope, ("all", "unet"))
        positive(
            "train",
            {
                "steps": self.steps,
                "batch_size": self.batch_size,
                "lr": self.lr,
                "keep": self.keep,
                "log_every": self.log_every,
                "save_every": self.save_every,
                "gradient_timeout": self.gradient_timeout,
            },
        )
        names = "micro_batch half_batch_steps clip weight_decay warmup sample_every eval_every evaluations eval_images"
        at_least("train", 0, self, *names.split(), "eval_samples", "eval_steps", "max_hours", "max_minutes")
        at_least("train", 1, self, "muon_every", "muon_iterations")
        at_least("train", 0, self, "seed")
        positive("train", {"adam_lr": self.adam_lr})
        share("train", self, "ema_decay", "muon_momentum")
        if self.half_batch_steps and self.batch_size < 2:
            raise UsageError("train.half_batch_steps: a batch_size of 1 has no half; leave it at 0")
        if not 0 <= self.guide_at < 1:
            raise UsageError(f"train.guide_at = {self.guide_at:g}: a share from 0 on, below 1")
        if not 0 <= self.cooldown <= 1:
            raise UsageError(f"train.cooldown = {self.cooldown}: a share between 0 and 1")
        if self.shard and self.optimizer != "adamw":
            raise UsageError(
                "train.shard: Muon needs whole matrices; cut diffusion models with --set train.optimizer=adamw"
            )
        if self.shard and self.compile:
            raise UsageError("train.shard: networks that are cut are not compiled; leave --compile out")
        self._check_cycles()
        if self.spike and self.spike < 2:
            raise UsageError(f"train.spike = {self.spike:g}: must be at least 2 (norms vary that much), or 0 = off")

    def _check_cycles(self) -> None:
        """Raises UsageError for cycles of the learning rate that contradict each other."""
        at_least("train", 1, self, "cycle_steps")
        at_least("train", 0, self, "cycle_warmup", "cycle_start", "cycle_max", "cycle_min")
        cycles = self.cycle_steps or (self.steps,)
        for name in ("cycle_warmup", "cycle_start", "cycle_max", "cycle_min"):
            values = getattr(self, name)
            if len(values) not in (1, len(cycles)):
                raise UsageError(
                    f"train.{name} = {list(values)}: one number is needed, or one for each cycle of "
                    f"train.cycle_steps ({len(cycles)})"
                )
        warmups = self.cycle_warmup * (len(cycles) // len(self.cycle_warmup))
        if self.schedule != "constant" and any(warmup >= steps for warmup, steps in zip(warmups, cycles)):
            raise UsageError(
                f"train.cycle_warmup = {list(self.cycle_warmup)}: a warm-up must be shorter than its cycle "
                f"({', '.join(map(str, cycles))} steps)"
            )

    def batch_at(self, step: int) -> tuple[int, int]:
        """(position of its first sample in the training, samples) of a step, over all processes."""
        half = self.batch_size // 2
        if step < self.half_batch_steps:
            return step * half, half
        return step * self.batch_size - self.half_batch_steps * (self.batch_size - half), self.batch_size

    def measured_images(self, most: int) -> int:
        """How many images a validation looks at: `most`, but an eighth of what the run trains on, and at least 16.

        So that measuring takes a small part of a run of a few steps. The same at every validation of a run.
        """
        return min(most, max(16, self.batch_at(self.steps)[0] // 8))
