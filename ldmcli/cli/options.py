"""Every option that several commands share, declared once, by the panels of the help pages; and groups of them.

A group is a dict from the name of a parameter to its option; `parsing.command` gives a command those it needs.
"""

from functools import partial
from pathlib import Path
from typing import Any

from ldmcli.cli.parsing import (
    DATA,
    MACHINE,
    MODEL,
    OUTPUT,
    SAMPLING,
    TRAINING,
    ParsedOptions,
    Text,
    flag,
    guidance_of,
    interval_of,
    option,
    setting,
    switch,
)
from ldmcli.core.settings import GUIDE_METRICS, GUIDE_RULES
from ldmcli.core.train_settings import MIXED_PRECISION
from ldmcli.diffusion.samplers import SAMPLERS

_data, _model, _training = (partial(setting, panel=panel) for panel in (DATA, MODEL, TRAINING))
_sampling, _output = (partial(option, panel=panel) for panel in (SAMPLING, OUTPUT))
_flag = partial(flag, panel=OUTPUT)

# --- Data
Data = _data(
    "data.source",
    "D",
    "Hub id, folder of images, parquet or webdataset files, save_to_disk folder, or shapes (embedded).",
    names="--data",
)
DataConfig = _data(
    "data.config_name", "NAME", "Configuration of a hub data set.", names="--data-config", default="none"
)
Split = _data("data.split", "NAME", "Rows to take.")
ValSplit = _data("data.val_split", "NAME", "Rows to validate on.", default="found by name")
ValFraction = _data("data.val_fraction", "SHARE", "Share of rows (0 to 1) held out where there is no validation split.")
Streaming = switch("data.streaming", "Read rows as they come instead of downloading all first.", panel=DATA)
Limit = _data(
    "data.limit", "ROWS", "Take so many training rows, evenly spread (of a stream the first).", default="0, all"
)
ImageColumn = _data("data.image_column", "NAME", "Column of images.", default="found")
CaptionColumn = _data("data.caption_column", "NAME", "Column of captions.", default="found")
LabelColumn = _data("data.label_column", "NAME", "Column of classes.", default="found")
ObjectsColumn = _data("data.objects_column", "NAME", "Column of boxes (bbox as x,y,w,h and category).", default="found")
MapColumn = _data("data.map_column", "NAME", "Column of class maps.", default="found")
Size = _data("data.size", "N|HxW", "Height and width in pixels.", default="64, or what the model was trained at")
MinSide = _data("data.min_side", "PX", "Leave out pictures with a shorter side than this.", default="0, none")
Crop = _data("data.crop", ("center", "random"), "Which square of an oblong image.")
Flip = switch("data.flip", "Mirror half of the images.", panel=DATA)
SkipBad = switch("data.skip_bad", "Go on without images that can't be read, and say how many.", panel=DATA)
Cache = switch("data.cache", "Encode each image once and keep its latents on disk.", panel=DATA)

# --- Model
Preset = option(
    Text,
    "--preset",
    "NAME",
    "Named settings, such as the paper's networks (`ldm presets` lists them).",
    panel=MODEL,
    default="none",
)
Recipe = option(
    Text,
    "--recipe",
    "FILE",
    "Settings from a TOML file, or a recipe by name (`ldm recipes` lists them).",
    panel=MODEL,
    default="none",
)
Assignments = option(
    list[str] | None,
    "--set",
    "SECTION.NAME=VALUE",
    "Any setting, as in train.clip=1.0; repeatable, wins over every other source.",
    panel=MODEL,
)
Factor = _model(
    "autoencoder.f", ("1", "2", "4", "8", "16", "32"), "Downsampling factor: pixels a latent position covers, per side."
)
Reg = _model("autoencoder.reg", ("kl", "vq"), "Regulariser of the latents.")
EmbedDim = _model("autoencoder.embed_dim", "N", "Channels of the latent.")
CodebookSize = _model("autoencoder.codebook_size", "N", "Codes (vq only).")
Attention = switch(
    "autoencoder.mid_attention",
    "Attention in the middle of the paper's networks.",
    panel=MODEL,
    names="--attn/--no-attn",
)
Autoencoder = option(
    Text,
    "--autoencoder",
    "RUN|none",
    "Autoencoder whose latents are used (RUN@STEP: of a checkpoint), or a diffusion run with one; none = pixels.",
    panel=MODEL,
    default="the newest run",
)
ReconstructWith = option(
    list[str] | None,
    "--autoencoder",
    "RUN",
    "Autoencoder to pass the images through; repeatable, for one sheet of several.",
    panel=MODEL,
    default="the newest run",
)
Condition = _model(
    "condition.kinds",
    "KIND[+KIND]",
    "What the model is told: none, class, text, layout, map; joined with +.",
    names="--condition",
    default="none",
)
Task = _model(
    "task.name",
    ("generate", "sr", "inpaint"),
    "What the model is for: new images, more pixels, or filled holes.",
    names="--task",
)
Scale = _model("task.scale", ("2", "4", "8"), "--task sr: how many times larger the output's sides are.")
Degradation = _model(
    "task.degradation", ("bicubic", "bsr", "bsr-light"), "--task sr: how small images are made; bsr is blind to how."
)
InitFrom = option(
    Text,
    "--init-from",
    "RUN",
    "Begin with the weights of this run, or of RUN@STEP (fine-tuning).",
    panel=MODEL,
    default="none",
)
Model = option(
    Text,
    "--model",
    "RUN",
    "Run folder of the model; RUN@STEP or RUN@best: one of its checkpoints; ldm-emoji: the one that comes with ldm.",
    panel=MODEL,
    default="the newest suitable run",
)
Weights = option(
    str,
    "--weights",
    ("ema", "raw"),
    "Averaged weights, or those of the last step.",
    panel=MODEL,
    value="ema",
    default="ema",
)

# --- Training
Steps = _training("train.steps", "N", "Optimiser updates.")
BatchSize = _training("train.batch_size", "N", "Images a step, over all processes and accumulation.")
MicroBatch = _training(
    "train.micro_batch", "auto|N", "Images that one device takes at a time; auto: as many as fit.", default="auto"
)
LearningRate = _training("train.lr", "RATE", "Learning rate.")
TrainSeed = _training("train.seed", "N", "Decides every random draw.")
SaveEvery = _training("train.save_every", "STEPS", "Steps between checkpoints.")
Keep = _training("train.keep", "N", "Newest checkpoints that stay.")
SampleEvery = _training("train.sample_every", "STEPS", "Steps between preview grids.")
EvalEvery = _training("train.eval_every", "STEPS", "Steps between evaluations.")
LogEvery = _training("train.log_every", "STEPS", "Steps between lines of metrics.jsonl.")
MaxHours = _training("train.max_hours", "HOURS", "Save and end before this time is up.", default="0, no limit")
PerProcessBatch = option(
    int | None,
    "--train-batch-size",
    "",
    "Batch size of one process, as diffusers counts.",
    panel=TRAINING,
    hidden=True,
    min=1,
)
SnrGamma = _training("diffusion.snr_gamma", "", "Min-SNR weighting of the loss with this gamma.", hidden=True)

# --- Sampling
Prompt = _sampling(list[str] | None, "--prompt", "TEXT", "What to draw; repeatable.")
Prompts = _sampling(
    Path | None,
    "--prompts",
    "FILE",
    "Prompts from a text file (- = stdin), one a line; # begins a comment. A line may be JSON: prompt, class, n.",
    default="none",
)
Classes = _sampling(
    list[str] | None,
    "--class",
    "NAME|INDEX|all",
    "Class to draw; repeatable. Where classes are called by numbers, #1 is the second one.",
)
Layouts = _sampling(list[Path] | None, "--layout", "FILE.json", "Boxes and what is in them, as JSON; repeatable.")
Maps = _sampling(
    list[Path] | None, "--map", "FILE.png", "Class map: a picture of class indices, or a folder of them; repeatable."
)
Given = _sampling(
    list[str] | None,
    "--given",
    "NAME=VALUE",
    "What to draw, for a condition without an option of its own; repeatable.",
    hidden=True,
)
NegativePrompt = _sampling(str, "--negative-prompt", "TEXT", "What guidance leads away from.", value="", default="none")
Count = _sampling(int | None, "-n --count", "N", "Images to draw.", min=1, default="one a prompt, class, layout or map")
SampleSteps = _sampling(int | None, "--steps", "N", "Sampling steps.", min=1, default="the run's setting, else 20")
Guidance = _sampling(
    Text,
    "--guidance",
    "SCALE|KIND=SCALE,…",
    "Classifier-free guidance; 1 = off. Several conditions may have scales of their own, as in text=3,map=1.5.",
    default="the run's setting, else 2",
)
GuidanceInterval = _sampling(
    Text,
    "--guidance-interval",
    "FROM,TO",
    "Share of the noise range (0 = clean) in which guidance acts.",
    default="0,1",
)
Sampler = _sampling(
    Text, "--sampler", SAMPLERS, "How to go from noise to image.", default="the run's setting, else dpm++"
)
Autoguidance = _sampling(
    float | None,
    "--autoguidance",
    "SCALE",
    "How far from the guiding model that a run with train.guide_at keeps; 1 = not at all.",
    min=0,
    default="the run's setting, else 1",
)
Eta = _sampling(
    float | None,
    "--eta",
    "SHARE",
    "DDIM: fresh noise a step, from 0 (none) to 1 (ancestral).",
    min=0,
    max=1,
    default="0",
)
Temperature = _sampling(
    float | None,
    "--temperature",
    "FACTOR",
    "Factor of all noise: below 1 results are calmer and less diverse.",
    min=0,
    max=2,
    default="the run's setting, else 1",
)
_OWN_SPACINGS = ("linspace", "uniform", "original", "original_quad")
_DIFFUSERS_SPACINGS = tuple(
    "leading leading+1 leading_open leading_open+1 trailing linspace_open linspace_real".split()
)
Spacing = _sampling(
    Text,
    "--spacing",
    (*_OWN_SPACINGS, *_DIFFUSERS_SPACINGS),
    f"Which timesteps are visited: {', '.join(_OWN_SPACINGS)}, or as schedulers of diffusers do: "
    f"{', '.join(_DIFFUSERS_SPACINGS)}.",
    metavar="NAME",
    default="the model's",
)
Seed = _sampling(int, "--seed", "N", "Image k depends on the seed and k alone.", value=0, default="0", min=0)
SampleSize = _sampling(Text, "--size", "N|HxW", "Height and width in pixels.", default="what the model was trained at")
SampleBatch = _sampling(
    int | None, "--batch-size", "N", "Images at a time; no picture depends on it.", min=1, default="chosen"
)
InitImage = _sampling(Path | None, "--init-image", "FILE", "Begin from this image instead of noise.", default="none")
Strength = _sampling(
    float | None,
    "--strength",
    "SHARE",
    "How far the first image is turned into noise: near 0 keeps it, 1 forgets it.",
    min=0,
    max=1,
    default="0.8",
)
Guide = _sampling(
    Path | None,
    "--guide",
    "FILE",
    "A small image; results are led to what looks like it when made as small.",
    default="none",
)
GuideScale = _sampling(
    float | None,
    "--guide-scale",
    "SCALE",
    "How far each step goes to the small image: 0 not at all, 1 (of rule ours) as far as would fit it.",
    min=0,
    default="1",
)
GuideRule = _sampling(
    Text,
    "--guide-rule",
    GUIDE_RULES,
    "ours: a step of a size that the distance decides; paper: the plain gradient of Eq. 16, whose scale depends on "
    "the model and the size.",
    default="ours",
)
GuideMetric = _sampling(
    Text, "--guide-metric", GUIDE_METRICS, "Distance to the small image: squared error, or LPIPS.", default="l2"
)
Perceptual = _sampling(
    Text,
    "--perceptual",
    "NAME|FILE",
    "Network of LPIPS: vgg, alex, squeeze, or a file with the weights of one of them.",
    default="vgg",
)

Classifier = _sampling(
    Path | None,
    "--classifier",
    "RUN",
    "Run of train-classifier that leads each sample to its class, also those of a model that takes no class.",
    default="none",
)
ClassifierScale = _sampling(
    float | None,
    "--classifier-scale",
    "SCALE",
    "Factor of the classifier's gradient: 0 not at all, 1 as probabilities say; the paper takes 10.",
    min=0,
    default="1",
)

# --- Output
Out = _output(Path | None, "--out -o", "DIR", "Folder for the results.", default="named after the input")
RunOut = _output(
    Path | None,
    "--out -o",
    "DIR",
    "Run folder; the same command again goes on where it was.",
    default="runs/NAME, stated",
)
Fresh = _flag("--fresh", "Begin anew although the run folder holds a run.")
Allow = _output(
    list[str] | None, "--allow", "SECTION.NAME", "Go on with a run although this setting has changed; repeatable."
)
Plan = _flag("--plan", "Print settings, parameters, FLOPs a step, memory and time, and end.")
Track = setting("train.track", "NAME[,NAME]", "Trackers: tensorboard, wandb, trackio.", panel=OUTPUT)
Overwrite = _flag("--overwrite", "Replace what ldm wrote there before; other files stay.")
Format = _output(str, "--format", ("png", "jpg", "webp"), "Image format.", value="png", default="png")
Metadata = _flag(
    "--metadata/--no-metadata", "Write prompt, seed, settings and model hash into each image.", value=True, default="on"
)
Json = _flag("--json", "One JSON document on stdout; text for people goes to stderr.")
Verbose = _flag("--verbose -v", "Say more.")
Quiet = _flag("--quiet -q", "Say less: warnings and errors only.")

# --- Machine
Gpus = option(
    int | None,
    "--gpus",
    "N",
    "Processes, one a GPU; without a GPU, N processes on the CPU.",
    panel=MACHINE,
    min=1,
    default="1",
)
MixedPrecision = setting(
    "train.mixed_precision", MIXED_PRECISION, "Number format of the heavy arithmetic.", panel=MACHINE
)
Compile = switch("train.compile", "torch.compile the networks: slow start, faster steps.", panel=MACHINE)
Workers = setting("data.workers", "N", "Threads that decode images ahead.", panel=MACHINE)
Offline = flag("--offline", "Ask nothing of a network.", panel=MACHINE)

ROWS = {
    "data": Data,
    "data_config": DataConfig,
    "split": Split,
    "val_split": ValSplit,
    "val_fraction": ValFraction,
    "streaming": Streaming,
    "limit": Limit,
    "image_column": ImageColumn,
    "caption_column": CaptionColumn,
    "label_column": LabelColumn,
    "objects_column": ObjectsColumn,
    "map_column": MapColumn,
    "size": Size,
    "min_side": MinSide,
    "skip_bad": SkipBad,
}
CONFIGURATION = {"preset": Preset, "recipe": Recipe, "assignments": Assignments}
LOOP = {
    "steps": Steps,
    "batch_size": BatchSize,
    "micro_batch": MicroBatch,
    "lr": LearningRate,
    "seed": TrainSeed,
    "save_every": SaveEvery,
    "keep": Keep,
    "sample_every": SampleEvery,
    "eval_every": EvalEvery,
    "log_every": LogEvery,
    "max_hours": MaxHours,
    "train_batch_size": PerProcessBatch,
}
RUN_OUTPUT = {"out": RunOut, "fresh": Fresh, "allow": Allow, "plan": Plan, "track": Track}
IMAGES_OUT = {"out": Out, "overwrite": Overwrite, "format": Format, "metadata": Metadata}
TALK = {"json": Json, "verbose": Verbose, "quiet": Quiet, "offline": Offline}
USE_MACHINE = {"gpus": Gpus, "mixed_precision": MixedPrecision, "compile": Compile}
TRAIN_MACHINE = {**USE_MACHINE, "workers": Workers}
GUIDING = {"guide_scale": GuideScale, "guide_rule": GuideRule, "guide_metric": GuideMetric, "perceptual": Perceptual}
CLASSIFIER = {"classifier": Classifier, "classifier_scale": ClassifierScale}
DRAWING = {
    "steps": SampleSteps,
    "guidance": Guidance,
    "guidance_interval": GuidanceInterval,
    "autoguidance": Autoguidance,
    "sampler": Sampler,
    "eta": Eta,
    "temperature": Temperature,
    "spacing": Spacing,
    "seed": Seed,
    "batch_size": SampleBatch,
}


def sampling_of(given: ParsedOptions) -> dict[str, Any]:
    """What the options of `DRAWING` say of sampling, by the names of `SampleSettings`; None where they say nothing."""
    names = ("steps", "autoguidance", "sampler", "eta", "temperature", "spacing")
    plain = {name: getattr(given, name) for name in names}
    return {**plain, "guidance": guidance_of(given.guidance), "guidance_interval": interval_of(given.guidance_interval)}
