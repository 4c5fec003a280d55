"""Every setting of a run, as plain frozen dataclasses: one level of sections, typed, with defaults and units.

`core.config` fills them from defaults < preset < recipe < environment < options < `--set`. This module holds no
logic beyond checks that span several fields.
"""

from dataclasses import dataclass, field

from ldmcli.core.caption_templates import parse_template
from ldmcli.core.errors import UsageError
from ldmcli.core.setting_checks import at_least, choice, positive, share
from ldmcli.core.train_settings import TrainSettings

FACTORS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which rows, and how a row becomes a square of pixels."""

    source: str = "shapes"  # folder, hub id, files, save_to_disk folder, or "shapes" / "shapes:LEVEL"
    config_name: str = ""  # configuration of a hub data set
    split: str = "train"
    val_split: str = ""  # "" = validation/val/test where there is one, else a held-out fraction
    val_fraction: float = 0.05  # held out by a hash of the row's content where no validation split exists
    streaming: bool = False
    limit: int = 0  # training rows, spread evenly over all (of a stream the first); 0 = all
    image_column: str = ""  # "" = found by name and type
    caption_column: str = ""
    # templates of training captions over columns, as "a {colours} {name}, {keywords:3}"; one is drawn each time that a
    # row is seen (one that stands here twice twice as often), the first is for validation; () = captions as they are
    captions: tuple[str, ...] = ()
    label_column: str = ""
    objects_column: str = ""
    map_column: str = ""
    size: tuple[int, int] = (0, 0)  # height, width in pixels; (0, 0) = 64x64, or what the autoencoder was trained at
    crop: str = "center"  # center | random (of the resized image)
    crop_min: float = 1.0  # random crops: the cut's side as a share of the picture's short one is drawn from here
    crop_max: float = 1.0  # … to here; both alike: one size of cut
    resize: str = "bicubic"  # short side to size, antialiased
    flip: bool = False  # mirror half of the images; off by default: text, flags and "left of" have a side
    background: str = "white"  # what shows through transparent pixels
    min_objects: int = 0  # rows with fewer boxes are left out …
    max_objects: int = 0  # … and those with more; 0 = no bound
    min_box_area: float = 0.0  # boxes smaller than this share of the picture don't count
    min_side: int = 0  # rows whose picture has a shorter side than this are left out; 0 = no bound
    max_pixels: int = 89_478_485  # a larger image counts as bad
    skip_bad: bool = False
    cache: bool = True  # latents (train-ldm): encode once; random crops are cached with data.cache_views
    cache_views: int = 0  # random crops of each picture that are encoded and cached; 0 = random crops are not cached
    cache_dtype: str = "float32"  # float32 | float16
    cache_dir: str = ""  # "" = $LDM_CACHE, else .cache/ldm in the home folder
    workers: int = 2  # threads that decode ahead of the loop

    @property
    def caches_latents(self) -> bool:
        """Whether latents are encoded once and kept: `cache`, and each picture is cut in few ways."""
        return self.cache and not self.streaming and (self.crop == "center" or self.cache_views > 0)

    def __post_init__(self):
        for text in self.captions:
            parse_template(text)
        choice("data", "crop", self.crop, ("center", "random"))
        choice("data", "resize", self.resize, ("bicubic", "bilinear", "lanczos", "box"))
        choice("data", "cache_dtype", self.cache_dtype, ("float32", "float16"))
        if not 0 < self.val_fraction < 1:
            raise UsageError(f"data.val_fraction = {self.val_fraction}: must lie between 0 and 1")
        if not 0 < self.crop_min <= self.crop_max <= 1:
            raise UsageError(
                f"data.crop_min = {self.crop_min:g}, data.crop_max = {self.crop_max:g}: need "
                "0 < crop_min <= crop_max <= 1"
            )
        if self.crop_min < 1 and self.crop != "random":
            raise UsageError("data.crop_min: only random crops have a drawn size; add data.crop = random")
        if self.cache_views and self.crop != "random":
            raise UsageError("data.cache_views: only random crops are several; add data.crop = random")
        if self.cache_views and not (self.cache and not self.streaming):
            raise UsageError(
                "data.cache_views: nothing is cached with data.cache = false, or of a stream; leave it out"
            )
        at_least("data", 0, self, "limit", "workers", "cache_views", "min_objects", "max_objects", "min_side")
        share("data", self, "min_box_area")
        if self.max_objects and self.max_objects < self.min_objects:
            raise UsageError(f"data.max_objects = {self.max_objects}: less than data.min_objects = {self.min_objects}")
        if self.streaming and (self.min_objects or self.max_objects or self.min_box_area or self.min_side):
            raise UsageError(
                "data.min_objects, max_objects, min_box_area and min_side need all rows beforehand; leave "
                "data.streaming (--streaming) away"
            )
        at_least("data", 1, self, "max_pixels")


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings:
    """First stage. family "paper" is the network of Rombach et al. 2022; "fast" a small one that trains on a CPU."""

    family: str = "fast"  # fast | paper
    f: int = 4  # downsampling factor; 1 = identity (pixels)
    reg: str = "kl"  # kl | vq
    in_channels: int = 3  # of the image
    z_channels: int = 4  # of the encoder's output, before it is mapped to embed_dim
    embed_dim: int = 4  # channels of the latent
    codebook_size: int = 1024  # vq only
    channels: int = 64  # width of the first level
    channel_mult: tuple[float, ...] = (1, 2)  # paper: len = log2(f) + 1; fast: widths after the unshuffle stem
    num_res_blocks: int = 2  # a level
    attn_resolutions: tuple[int, ...] = ()  # paper: nominal resolutions that carry attention
    resolution: int = 256  # paper: nominal resolution that attn_resolutions counts from
    mid_attention: bool = True  # paper: attention in the middle block ("noattn" models: False)
    groups: int = 32  # paper: of GroupNorm; a width that 32 does not divide takes the largest divisor below
    dropout: float = 0.0  # in residual blocks
    beta: float = 0.25  # vq: weight of the commitment term
    legacy_beta: bool = False  # vq: weight on the codebook term instead, as the original code has it
    revive_codes: int = 0  # vq: every N steps codes unused since the last time are re-drawn from the batch; 0 = never

    def __post_init__(self):
        choice("autoencoder", "family", self.family, ("fast", "paper"))
        choice("autoencoder", "reg", self.reg, ("kl", "vq"))
        if self.f not in FACTORS:
            raise UsageError(f"autoencoder.f = {self.f}: choose one of {', '.join(map(str, FACTORS))}")
        if self.family == "paper" and self.f > 1 and 2 ** (len(self.channel_mult) - 1) != self.f:
            raise UsageError(
                f"autoencoder.channel_mult = {list(self.channel_mult)}: f = {self.f} needs "
                f"{self.f.bit_length()} entries, one a resolution"
            )
        names = "in_channels z_channels embed_dim channels codebook_size groups num_res_blocks"
        at_least("autoencoder", 1, self, *names.split())
        at_least("autoencoder", 0, self, "beta", "revive_codes")
        share("autoencoder", self, "dropout")
        if not self.channel_mult or min(self.channel_mult) * self.channels < 1:
            raise UsageError(
                f"autoencoder.channel_mult = {list(self.channel_mult)}: one factor a level is needed, of "
                "at least one channel"
            )


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """First-stage losses (Sec. 3.1, App. G): L_rec + regulariser + adaptive weight times the adversarial term."""

    style: str = "mean"  # mean: every term averaged over elements; paper: summed over C, H, W for KL as in the original
    l1: float = 1.0  # weight of the absolute error
    l2: float = 1.0  # weight of the squared error
    edge: float = 0.5  # L1 of finite differences: sharp borders at small sizes without a GAN
    perceptual_weight: float = 0.0  # of LPIPS; 0 = off
    perceptual: str = ""  # "" = lpips VGG (downloads once) when the weight is > 0; or a .safetensors backbone
    kl_weight: float = 1e-6  # kl: of the KL term
    codebook_weight: float = 1.0  # vq: of the codebook and commitment terms
    gan: str = "hinge"  # hinge | vanilla
    disc_weight: float = 0.0  # 0 = no discriminator
    disc_start: int = 50_001  # step
    disc_channels: int = 64  # width of the patch discriminator's first layer
    disc_layers: int = 3  # its strided layers after the first
    disc_lr: float = 0.0  # 0 = train.lr
    adaptive_weight: bool = True  # disc_weight times the ratio of gradient norms at the last layer (Esser et al. 2021)

    def __post_init__(self):
        choice("loss", "style", self.style, ("mean", "paper"))
        choice("loss", "gan", self.gan, ("hinge", "vanilla"))
        names = "l1 l2 edge perceptual_weight kl_weight codebook_weight disc_weight disc_start disc_lr"
        at_least("loss", 0, self, *names.split())
        at_least("loss", 1, self, "disc_channels", "disc_layers")


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings:
    """UNet (App. E), noise schedule and objective. Of a classifier: the half of the UNet that it has, and the process
    of the models that it guides."""

    # network
    channels: int = 48  # width of the first level
    channel_mult: tuple[float, ...] = (1, 2, 3.3334)  # width of each level, as a multiple of it
    num_res_blocks: int = 1  # a level
    attention_resolutions: tuple[int, ...] = (2, 4)  # downsampling factors, not pixels
    num_heads: int = 0  # fixed number of heads; 0 = use head_channels
    head_channels: int = 32  # width of an attention head
    level_heads: tuple[int, ...] = ()  # heads of each level, where neither of the two says it
    spatial_transformer: bool = True  # cross-attention blocks; False = plain attention blocks (no context)
    transformer_depth: int = 1  # blocks in each spatial transformer
    middle_attention: bool = True  # attention in the middle block
    scale_shift: bool = True  # time scales and shifts the normalised maps; False = is added to them
    resblock_updown: bool = False  # residual blocks halve and double; False = a convolution does
    dropout: float = 0.0  # in residual blocks
    groups: int = 32  # of GroupNorm; a width that 32 does not divide takes the largest divisor below
    patch: int = 1  # fold patch x patch latent positions into channels before the UNet
    vector_mlp: bool = True  # False: vectors, then as wide as the time embedding, are added to it as they are
    position: str = "learned"  # position code inside attention: none | learned (resized to the map) | sinusoidal
    # process
    prediction: str = "flow"  # eps | v | x0 | flow
    schedule: str = "linear"  # linear | cosine | sqrt_linear | sqrt; unused by flow
    beta_start: float = 0.0015  # variance of the first step's noise …
    beta_end: float = 0.0195  # … and of the last one's
    timesteps: int = 1000  # T
    t_sampling: str = "logit_normal"  # uniform | logit_normal
    t_mean: float = 0.2  # logit-normal: > 0 leans towards noise
    t_std: float = 1.0  # logit-normal: spread
    loss: str = "l2"  # l2 | l1
    loss_weight: str = "uniform"  # uniform | min_snr
    snr_gamma: float = 5.0  # min_snr: bound on the signal-to-noise ratio
    latent_scale: str = "per_channel"  # per_channel | global | none

    def __post_init__(self):
        choice("diffusion", "prediction", self.prediction, ("eps", "v", "x0", "flow"))
        choice("diffusion", "schedule", self.schedule, ("linear", "cosine", "sqrt_linear", "sqrt"))
        choice("diffusion", "t_sampling", self.t_sampling, ("uniform", "logit_normal"))
        choice("diffusion", "loss", self.loss, ("l2", "l1"))
        choice("diffusion", "loss_weight", self.loss_weight, ("uniform", "min_snr"))
        choice("diffusion", "latent_scale", self.latent_scale, ("per_channel", "global", "none"))
        choice("diffusion", "position", self.position, ("none", "learned", "sinusoidal"))
        at_least("diffusion", 1, self, "channels", "timesteps", "patch", "head_channels", "groups", "transformer_depth")
        at_least("diffusion", 0, self, "num_heads", "num_res_blocks", "level_heads", "t_std")
        positive("diffusion", {"snr_gamma": self.snr_gamma})
        share("diffusion", self, "dropout")
        if not self.channel_mult or min(self.channel_mult) * self.channels < 1:
            raise UsageError(
                f"diffusion.channel_mult = {list(self.channel_mult)}: one factor a level is needed, of at "
                "least one channel"
            )
        if self.level_heads and len(self.level_heads) != len(self.channel_mult):
            raise UsageError(
                f"diffusion.level_heads = {list(self.level_heads)}: one number for each of the "
                f"{len(self.channel_mult)} entries of diffusion.channel_mult is needed"
            )
        if self.loss_weight == "min_snr" and self.prediction == "flow":
            raise UsageError("diffusion.loss_weight = 'min_snr' is defined for eps, v and x0; flow takes 'uniform'")


@dataclass(frozen=True, kw_only=True)
class ConditionSettings:
    """What the model is conditioned on. Conditions are joined with "+": tokens join, planes stack, vectors add."""

    kinds: tuple[str, ...] = ()  # class, text, layout, map
    drop: float = 0.1  # share of training samples whose condition is replaced by its null (for guidance)
    context_dim: int = 128  # width of tokens for cross-attention
    text_encoder: str = "joint"  # joint = the transformer of the paper, trained along; else folder or hub id (frozen)
    text_layers: int = 1  # of the joint text transformer
    text_length: int = 0  # tokens; 0 = longest caption, rounded up to 8, at most 77
    text_heads: int = 8  # attention heads of each layer
    text_head_channels: int = 64  # width of a head
    embedding_std: float = 0.5  # spread of new token embeddings; paper: 0.02, which attention drowns at first
    layout_planes: int = 16  # layout: boxes are also rasterised at the latent's size, in so many planes; paper: 0
    crop_tokens: bool = False  # layout: boxes in the whole picture, and the crop's corners (paper); else in the crop
    smooth_places: bool = True  # layout: new codes of grid points are alike where points are near; else independent
    # folder with a tokeniser, vocab.txt of one, or hub id; "" = a WordPiece vocabulary is trained on the captions
    vocabulary: str = ""
    vocabulary_size: int = 8192  # at most
    text_pooled: bool = True  # pooled text added to the time embedding beside cross-attention
    class_vector: bool = True  # class embedding added to the time embedding, too

    def __post_init__(self):
        share("condition", self, "drop")
        at_least("condition", 0, self, "layout_planes", "text_length", "embedding_std")
        at_least("condition", 1, self, "context_dim", "text_layers", "text_heads", "text_head_channels")
        if 0 < self.text_length < 3:
            raise UsageError(f"condition.text_length = {self.text_length}: needs 3, two of which begin and end it")


TASKS = ("generate", "sr", "inpaint")
FILLS = ("patches", "smooth", "black")
MASKS = ("own", "lama-thin", "lama-medium", "lama-thick")
GUIDE_RULES = ("ours", "paper")  # of guiding by pictures (diffusion/gradient_guidance.py), and …
GUIDE_METRICS = ("l2", "lpips")  # … the distance to them


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What the model is for. sr and inpaint put planes made from the image itself beside z_t (Sec. 4.4, 4.5)."""

    name: str = "generate"  # generate | sr | inpaint
    scale: int = 4  # sr: output side / input side, 2 | 4 | 8
    degradation: str = "bicubic"  # sr: bicubic (antialiased, as SR3) | bsr | bsr-light (blind, App. D.6)
    enlarged: bool = True  # sr: the latent of the bicubic enlargement stands beside the small image; paper: False
    tone: float = 1.0  # sr: pixels of the small image beyond which results keep its brightness; 0 = as sampled (paper)
    # inpaint, what the first stage sees in holes: smooth | patches (texture from around, a quarter of a second of a
    # core for 256 px) | black (paper)
    fill: str = "smooth"
    detail: bool = True  # inpaint with patches: what the first stage loses of them is put back into results
    masks: str = "own"  # inpaint, random holes: own (4 to 75 %) | lama-thin | lama-medium | lama-thick (up to 50 %)

    def __post_init__(self):
        choice("task", "name", self.name, TASKS)
        choice("task", "degradation", self.degradation, ("bicubic", "bsr", "bsr-light"))
        choice("task", "fill", self.fill, FILLS)
        choice("task", "masks", self.masks, MASKS)
        if self.tone < 0:
            raise UsageError(f"task.tone = {self.tone:g}: must not be negative")
        if self.scale not in (2, 4, 8):
            raise UsageError(f"task.scale = {self.scale}: choose one of 2, 4, 8")


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How the run's own previews and `ldm sample` sample when the command line does not say."""

    sampler: str = "dpm++"  # ddim | ddpm | plms | euler | heun | dpm++
    steps: int = 20  # sampling steps
    guidance: float = 2.0  # scale of classifier-free guidance, 1 = off (docs/experiments.md)
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # share of the noise range (0 = clean) in which guidance acts
    # scale by which samples, but for those of train.eval_samples, are led away from the run's guiding model
    # (train.guide_at); 1 = off
    autoguidance: float = 1.0
    eta: float = 0.0  # ddim: fresh noise a step, 0 (none) … 1 (ancestral)
    temperature: float = 1.0  # factor of all noise; below 1 samples are calmer and less diverse
    spacing: str = ""  # "" = linspace for eps/v/x0, uniform for flow; "original" = the subset of the original DDIM code
    n: int = 16  # images of a preview grid
    prompts: tuple[str, ...] = ()  # of the preview grid; () = captions of validation rows

    def __post_init__(self):
        at_least("sample", 0, self, "autoguidance", "eta", "temperature", "n")


# how a distilled model samples, in as many steps as it has calls: it knows no other levels
FEW_CALLS = {"sampler": "ddim", "spacing": "uniform", "eta": 0.0}


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """What `ldm distill` makes of a model: one of few network calls an image. Of all others `calls` is 0."""

    calls: int = 0  # network calls an image; 0 = an ordinary model, of as many steps as sampling says
    guidance: float = 1.0  # scale of the teacher's classifier-free guidance, which is baked in: it takes no second call
    autoguidance: float = 1.0  # … of the teacher's guidance by its guiding model, baked in likewise
    teacher_steps: int = 8  # second-order steps of the teacher from noise to image, rounded up to a multiple of calls
    teacher: str = ""  # content hash of the teacher's weights

    def __post_init__(self):
        at_least("distill", 0, self, "calls", "guidance", "autoguidance")
        at_least("distill", 1, self, "teacher_steps")


def _autoencoder_training() -> TrainSettings:
    # docs/experiments.md has the figures of other rates
    return TrainSettings(optimizer="muon", lr=0.01, clip=2.0, cooldown=0.4)


def _diffusion_training() -> TrainSettings:
    return TrainSettings(optimizer="muon", lr=0.01, cooldown=0.4, muon_every=2)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """All that `ldm train-ae` reads."""

    data: DataSettings = field(default_factory=DataSettings)
    autoencoder: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    train: TrainSettings = field(default_factory=_autoencoder_training)


MAX_TEXT_LENGTH = 77  # tokens of a caption that are read, unless condition.text_length says otherwise
TASK_CONDITIONS = {"sr": "lowres", "inpaint": "masked"}  # the condition that a task brings along


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """All that `ldm train-ldm` and `ldm distill` read."""

    data: DataSettings = field(default_factory=DataSettings)
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    condition: ConditionSettings = field(default_factory=ConditionSettings)
    task: TaskSettings = field(default_factory=TaskSettings)
    train: TrainSettings = field(default_factory=_diffusion_training)
    sample: SampleSettings = field(default_factory=SampleSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)

    @property
    def kinds(self) -> tuple[str, ...]:
        """All that the model is conditioned on: condition.kinds, and the condition that its task brings along."""
        own = TASK_CONDITIONS.get(self.task.name)
        return self.condition.kinds if own is None else (*self.condition.kinds, own)


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings:
    """Head of a classifier of noisy latents (App. C)."""

    pool: str = "attention"  # attention | mean: how the positions of the last map become one vector

    def __post_init__(self):
        choice("classifier", "pool", self.pool, ("attention", "mean"))


def _classifier_process() -> DiffusionSettings:
    return DiffusionSettings(t_sampling="uniform")  # guidance asks it at all timesteps alike


def _classifier_training() -> TrainSettings:
    return TrainSettings(weight_decay=0.01, cooldown=0.4)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """All that `ldm train-classifier` reads."""

    data: DataSettings = field(default_factory=DataSettings)
    diffusion: DiffusionSettings = field(default_factory=_classifier_process)
    classifier: ClassifierSettings = field(default_factory=ClassifierSettings)
    train: TrainSettings = field(default_factory=_classifier_training)

    def __post_init__(self):
        if (self.diffusion.loss, self.diffusion.loss_weight) != ("l2", "uniform"):
            raise UsageError("diffusion.loss and diffusion.loss_weight: a classifier is trained by cross-entropy alone")


# settings of the process, which a classifier shares with the models that it guides
PROCESS = tuple(
    f"diffusion.{name}" for name in ("prediction", "schedule", "beta_start", "beta_end", "timesteps", "latent_scale")
)
