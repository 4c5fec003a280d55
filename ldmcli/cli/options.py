"""Every option of every command, declared once: name, unit, default, help panel, and the setting that it sets.

An option that sets a configuration value carries its path (`.path`), so that a command needs no list of its own:
`Given.layers()` turns what the user gave into layers for `core.config`. Groups of options are dicts; a command takes
the groups it needs through `command`.
"""

import copy
import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ldmcli.core import config
from ldmcli.core.errors import UsageError
from ldmcli.diffusion.samplers import SAMPLERS

DATA, MODEL, TRAINING = "Data", "Model", "Training"
SAMPLING, OUTPUT, MACHINE = "Sampling", "Output", "Machine"

# names that hands know from diffusers, beside ours; `_` has become `-` by then
ALIASES = {
    "max-train-steps": "steps",
    "output-dir": "out",
    "report-to": "track",
    "learning-rate": "lr",
    "checkpointing-steps": "save-every",
    "checkpoints-total-limit": "keep",
    "train-data-dir": "data",
    "dataset-name": "data",
}


def plain_name(token: str) -> str:
    """An option's name as declared: `_` is taken as `-`, names of others as ours."""
    token = token.replace("_", "-")
    return ALIASES.get(token, token)


def option(
    *names: str,
    help: str,
    panel: str,
    metavar: str = "",
    path: str = "",
    default: str | None = None,
    choices: tuple[str, ...] = (),
    value: object = None,
    **more: Any,
):
    """A Typer option that also knows its setting (`.path`), allowed words (`.choices`) and Python default (`.value`).

    default: what help says about it; None says nothing.
    """
    if choices:
        more["autocompletion"] = lambda: list(choices)
        metavar = metavar or "|".join(choices)
    info = typer.Option(
        *names,
        help=help,
        rich_help_panel=panel,
        metavar=metavar or None,
        show_default=default if default is not None else False,
        **more,
    )
    info.path, info.choices, info.value = path, choices, value
    return info


def setting(path: str, *names: str, help: str, panel: str, metavar: str = "", default: str | None = None, **more: Any):
    """An option that sets `path`; help shows the setting's own default unless `default` words it."""
    return option(*names, help=help, panel=panel, metavar=metavar, path=path, default=default, **more)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


Text = str | None  # None: not given. Numbers that set a setting stay text here; core.config reads them
Flag = bool | None


def argument(help: str, metavar: str, *, default: str | None = None, required: bool = True):
    """A positional argument; `default` is what help says where it may be left out."""
    info = typer.Argument(help=help, metavar=metavar, show_default=default if default is not None else False)
    info.path, info.choices, info.value = "", (), inspect.Parameter.empty if required else None
    return info


# --- Data
Data = Annotated[
    Text,
    setting(
        "data.source",
        "--data",
        panel=DATA,
        metavar="D",
        help="Hub id, folder of images, parquet or webdataset files, save_to_disk folder, or shapes (embedded).",
    ),
]
DataConfig = Annotated[
    Text,
    setting(
        "data.config_name",
        "--data-config",
        panel=DATA,
        metavar="NAME",
        default="none",
        help="Configuration of a hub data set.",
    ),
]
Split = Annotated[Text, setting("data.split", "--split", panel=DATA, metavar="NAME", help="Rows to take.")]
ValSplit = Annotated[
    Text,
    setting(
        "data.val_split",
        "--val-split",
        panel=DATA,
        metavar="NAME",
        default="found by name",
        help="Rows to validate on.",
    ),
]
ValFraction = Annotated[
    Text,
    setting(
        "data.val_fraction",
        "--val-fraction",
        panel=DATA,
        metavar="SHARE",
        help="Share of rows (0 to 1) held out where there is no validation split.",
    ),
]
Streaming = Annotated[
    Flag,
    setting(
        "data.streaming",
        "--streaming/--no-streaming",
        panel=DATA,
        help="Read rows as they come instead of downloading all first.",
    ),
]
Limit = Annotated[
    Text,
    setting(
        "data.limit",
        "--limit",
        panel=DATA,
        metavar="ROWS",
        default="0, all",
        help="Use the first rows of the training part only.",
    ),
]
ImageColumn = Annotated[
    Text,
    setting(
        "data.image_column", "--image-column", panel=DATA, metavar="NAME", default="found", help="Column of images."
    ),
]
CaptionColumn = Annotated[
    Text,
    setting(
        "data.caption_column",
        "--caption-column",
        panel=DATA,
        metavar="NAME",
        default="found",
        help="Column of captions.",
    ),
]
LabelColumn = Annotated[
    Text,
    setting(
        "data.label_column", "--label-column", panel=DATA, metavar="NAME", default="found", help="Column of classes."
    ),
]
ObjectsColumn = Annotated[
    Text,
    setting(
        "data.objects_column",
        "--objects-column",
        panel=DATA,
        metavar="NAME",
        default="found",
        help="Column of boxes (bbox as x,y,w,h and category).",
    ),
]
MapColumn = Annotated[
    Text,
    setting(
        "data.map_column", "--map-column", panel=DATA, metavar="NAME", default="found", help="Column of class maps."
    ),
]
Size = Annotated[
    Text,
    setting(
        "data.size",
        "--size",
        panel=DATA,
        metavar="N|HxW",
        default="64, or what the model was trained at",
        help="Height and width in pixels.",
    ),
]
Crop = Annotated[
    Text,
    setting("data.crop", "--crop", panel=DATA, choices=("center", "random"), help="Which square of an oblong image."),
]
Flip = Annotated[Flag, setting("data.flip", "--flip/--no-flip", panel=DATA, help="Mirror half of the images.")]
SkipBad = Annotated[
    Flag,
    setting(
        "data.skip_bad",
        "--skip-bad/--no-skip-bad",
        panel=DATA,
        help="Go on without images that can't be read, and say how many.",
    ),
]
Cache = Annotated[
    Flag,
    setting(
        "data.cache", "--cache/--no-cache", panel=DATA, help="Encode each image once and keep its latents on disk."
    ),
]

# --- Model
Preset = Annotated[
    Text,
    option(
        "--preset",
        panel=MODEL,
        metavar="NAME",
        default="none",
        help="Named settings, such as the paper's networks (`ldm presets` lists them).",
    ),
]
Recipe = Annotated[
    Text,
    option(
        "--recipe",
        panel=MODEL,
        metavar="FILE",
        default="none",
        help="Settings from a TOML file, or a recipe by name (`ldm recipes` lists them).",
    ),
]
Assignments = Annotated[
    list[str] | None,
    option(
        "--set",
        panel=MODEL,
        metavar="SECTION.NAME=VALUE",
        help="Any setting, as in train.clip=1.0; repeatable, wins over every other source.",
    ),
]
Factor = Annotated[
    Text,
    setting(
        "autoencoder.f",
        "--f",
        panel=MODEL,
        choices=("1", "2", "4", "8", "16", "32"),
        help="Downsampling factor: pixels a latent position covers, per side.",
    ),
]
Reg = Annotated[
    Text, setting("autoencoder.reg", "--reg", panel=MODEL, choices=("kl", "vq"), help="Regulariser of the latents.")
]
EmbedDim = Annotated[
    Text, setting("autoencoder.embed_dim", "--embed-dim", panel=MODEL, metavar="N", help="Channels of the latent.")
]
CodebookSize = Annotated[
    Text, setting("autoencoder.codebook_size", "--codebook-size", panel=MODEL, metavar="N", help="Codes (vq only).")
]
Attention = Annotated[
    Flag,
    setting(
        "autoencoder.mid_attention",
        "--attn/--no-attn",
        panel=MODEL,
        help="Attention in the middle of the paper's networks.",
    ),
]
Autoencoder = Annotated[
    Text,
    option(
        "--autoencoder",
        panel=MODEL,
        metavar="RUN|none",
        default="the newest run",
        help="Autoencoder whose latents are used; none = pixels.",
    ),
]
ReconstructWith = Annotated[
    Text,
    option(
        "--autoencoder",
        panel=MODEL,
        metavar="RUN",
        default="the newest run",
        help="Autoencoder to pass the images through.",
    ),
]
Condition = Annotated[
    Text,
    setting(
        "condition.kinds",
        "--condition",
        panel=MODEL,
        metavar="KIND[+KIND]",
        default="none",
        help="What the model is told: none, class, text, layout, map; joined with +.",
    ),
]
Task = Annotated[
    Text,
    setting(
        "task.name",
        "--task",
        panel=MODEL,
        choices=("generate", "sr", "inpaint"),
        help="What the model is for: new images, more pixels, or filled holes.",
    ),
]
Scale = Annotated[
    Text,
    setting(
        "task.scale",
        "--scale",
        panel=MODEL,
        choices=("2", "4", "8"),
        help="--task sr: how many times larger the output's sides are.",
    ),
]
Degradation = Annotated[
    Text,
    setting(
        "task.degradation",
        "--degradation",
        panel=MODEL,
        choices=("bicubic", "bsr", "bsr-light"),
        help="--task sr: how small images are made; bsr is blind to how.",
    ),
]
InitFrom = Annotated[
    Text,
    option(
        "--init-from", panel=MODEL, metavar="RUN", default="none", help="Begin with this run's weights (fine-tuning)."
    ),
]
Model = Annotated[
    Text,
    option("--model", panel=MODEL, metavar="RUN", default="the newest suitable run", help="Run folder of the model."),
]
Weights = Annotated[
    str,
    option(
        "--weights",
        value="ema",
        panel=MODEL,
        choices=("ema", "raw"),
        default="ema",
        help="Averaged weights, or those of the last step.",
    ),
]

# --- Training
Steps = Annotated[Text, setting("train.steps", "--steps", panel=TRAINING, metavar="N", help="Optimiser updates.")]
BatchSize = Annotated[
    Text,
    setting(
        "train.batch_size",
        "--batch-size",
        panel=TRAINING,
        metavar="N",
        help="Images a step, over all processes and accumulation.",
    ),
]
MicroBatch = Annotated[
    Text,
    setting(
        "train.micro_batch",
        "--micro-batch",
        panel=TRAINING,
        metavar="auto|N",
        default="auto",
        help="Images that one device takes at a time; auto: as many as fit.",
    ),
]
LearningRate = Annotated[Text, setting("train.lr", "--lr", panel=TRAINING, metavar="RATE", help="Learning rate.")]
TrainSeed = Annotated[
    Text, setting("train.seed", "--seed", panel=TRAINING, metavar="N", help="Decides every random draw.")
]
SaveEvery = Annotated[
    Text,
    setting("train.save_every", "--save-every", panel=TRAINING, metavar="STEPS", help="Steps between checkpoints."),
]
Keep = Annotated[
    Text, setting("train.keep", "--keep", panel=TRAINING, metavar="N", help="Newest checkpoints that stay.")
]
SampleEvery = Annotated[
    Text,
    setting(
        "train.sample_every", "--sample-every", panel=TRAINING, metavar="STEPS", help="Steps between preview grids."
    ),
]
EvalEvery = Annotated[
    Text,
    setting("train.eval_every", "--eval-every", panel=TRAINING, metavar="STEPS", help="Steps between evaluations."),
]
LogEvery = Annotated[
    Text,
    setting(
        "train.log_every", "--log-every", panel=TRAINING, metavar="STEPS", help="Steps between lines of metrics.jsonl."
    ),
]
MaxHours = Annotated[
    Text,
    setting(
        "train.max_hours",
        "--max-hours",
        panel=TRAINING,
        metavar="HOURS",
        default="0, no limit",
        help="Save and end before this time is up.",
    ),
]
PerProcessBatch = Annotated[
    int | None,
    option(
        "--train-batch-size", panel=TRAINING, hidden=True, min=1, help="Batch size of one process, as diffusers counts."
    ),
]
SnrGamma = Annotated[
    Text,
    setting(
        "diffusion.snr_gamma",
        "--snr-gamma",
        panel=TRAINING,
        hidden=True,
        help="Min-SNR weighting of the loss with this gamma.",
    ),
]

# --- Sampling
Prompt = Annotated[
    list[str] | None, option("--prompt", panel=SAMPLING, metavar="TEXT", help="What to draw; repeatable.")
]
Prompts = Annotated[
    Path | None,
    option(
        "--prompts",
        panel=SAMPLING,
        metavar="FILE",
        default="none",
        help="Prompts from a text file (- = stdin), one a line; # begins a comment. A line may be JSON: prompt, "
        "class, n.",
    ),
]
Classes = Annotated[
    list[str] | None,
    option(
        "--class",
        panel=SAMPLING,
        metavar="NAME|INDEX|all",
        help="Class to draw; repeatable. Where classes are called by numbers, #1 is the second one.",
    ),
]
Layouts = Annotated[
    list[Path] | None,
    option("--layout", panel=SAMPLING, metavar="FILE.json", help="Boxes and what is in them, as JSON; repeatable."),
]
Maps = Annotated[
    list[Path] | None,
    option(
        "--map",
        panel=SAMPLING,
        metavar="FILE.png",
        help="Class map: a picture of class indices, or a folder of them; repeatable.",
    ),
]
NegativePrompt = Annotated[
    str,
    option(
        "--negative-prompt",
        value="",
        panel=SAMPLING,
        metavar="TEXT",
        default="none",
        help="What guidance leads away from.",
    ),
]
Count = Annotated[
    int | None,
    option(
        "-n",
        "--count",
        panel=SAMPLING,
        metavar="N",
        min=1,
        default="one a prompt, class, layout or map",
        help="Images to draw.",
    ),
]
SampleSteps = Annotated[
    int | None,
    option("--steps", panel=SAMPLING, metavar="N", min=1, default="the run's setting, else 20", help="Sampling steps."),
]
Guidance = Annotated[
    float | None,
    option(
        "--guidance",
        panel=SAMPLING,
        metavar="SCALE",
        min=0,
        default="the run's setting, else 2",
        help="Classifier-free guidance; 1 = off.",
    ),
]
KindGuidance = Annotated[
    Text,
    option(
        "--guidance",
        panel=SAMPLING,
        metavar="SCALE|KIND=SCALE,…",
        default="the run's setting, else 2",
        help="Classifier-free guidance; 1 = off. Several conditions may have scales of their own, as in "
        "text=3,map=1.5.",
    ),
]
GuidanceInterval = Annotated[
    Text,
    option(
        "--guidance-interval",
        panel=SAMPLING,
        metavar="FROM,TO",
        default="0,1",
        help="Share of the noise range (0 = clean) in which guidance acts.",
    ),
]
Sampler = Annotated[
    Text,
    option(
        "--sampler",
        panel=SAMPLING,
        default="the run's setting, else dpm++",
        choices=tuple(SAMPLERS),
        help="How to go from noise to image.",
    ),
]
Eta = Annotated[
    float | None,
    option(
        "--eta",
        panel=SAMPLING,
        metavar="SHARE",
        min=0,
        max=1,
        default="0",
        help="DDIM: fresh noise a step, from 0 (none) to 1 (ancestral).",
    ),
]
Temperature = Annotated[
    float | None,
    option(
        "--temperature",
        panel=SAMPLING,
        metavar="FACTOR",
        min=0,
        max=2,
        default="the run's setting, else 1",
        help="Factor of all noise: below 1 results are calmer and less diverse.",
    ),
]
Spacing = Annotated[
    Text,
    option(
        "--spacing",
        panel=SAMPLING,
        metavar="NAME",
        choices=(
            "linspace",
            "uniform",
            "original",
            "original_quad",
            "leading",
            "leading+1",
            "leading_open",
            "leading_open+1",
            "trailing",
            "linspace_open",
            "linspace_real",
        ),
        default="the model's",
        help="Which timesteps are visited: linspace, uniform, original, original_quad, or as schedulers of diffusers "
        "do: leading, leading+1, leading_open, leading_open+1, trailing, linspace_open, linspace_real.",
    ),
]
Seed = Annotated[
    int,
    option(
        "--seed",
        value=0,
        panel=SAMPLING,
        metavar="N",
        default="0",
        min=0,
        help="Image k depends on the seed and k alone.",
    ),
]
SampleSize = Annotated[
    Text,
    option(
        "--size",
        panel=SAMPLING,
        metavar="N|HxW",
        default="what the model was trained at",
        help="Height and width in pixels.",
    ),
]
SampleBatch = Annotated[
    int | None,
    option(
        "--batch-size",
        panel=SAMPLING,
        metavar="N",
        min=1,
        default="chosen",
        help="Images at a time; no picture depends on it.",
    ),
]
InitImage = Annotated[
    Path | None,
    option(
        "--init-image", panel=SAMPLING, metavar="FILE", default="none", help="Begin from this image instead of noise."
    ),
]
Strength = Annotated[
    float | None,
    option(
        "--strength",
        panel=SAMPLING,
        metavar="SHARE",
        min=0,
        max=1,
        default="0.8",
        help="How far the first image is turned into noise: 0 keeps it, 1 forgets it.",
    ),
]
Guide = Annotated[
    Path | None,
    option(
        "--guide",
        panel=SAMPLING,
        metavar="FILE",
        default="none",
        help="A small image; results are led to what looks like it when made as small.",
    ),
]
GuideScale = Annotated[
    float | None,
    option(
        "--guide-scale",
        panel=SAMPLING,
        metavar="SCALE",
        min=0,
        default="1",
        help="How far each step goes towards --guide: 0 not at all, 1 as far as would fit it.",
    ),
]

# --- Output
Out = Annotated[
    Path | None,
    option("--out", "-o", panel=OUTPUT, metavar="DIR", default="named after the input", help="Folder for the results."),
]
RunOut = Annotated[
    Path | None,
    option(
        "--out",
        "-o",
        panel=OUTPUT,
        metavar="DIR",
        default="runs/NAME, stated",
        help="Run folder; the same command again goes on where it was.",
    ),
]
Fresh = Annotated[
    bool, option("--fresh", value=False, panel=OUTPUT, help="Begin anew although the run folder holds a run.")
]
Allow = Annotated[
    list[str] | None,
    option(
        "--allow",
        panel=OUTPUT,
        metavar="SECTION.NAME",
        help="Go on with a run although this setting has changed; repeatable.",
    ),
]
Plan = Annotated[
    bool,
    option(
        "--plan", value=False, panel=OUTPUT, help="Print settings, parameters, FLOPs a step, memory and time, and end."
    ),
]
Track = Annotated[
    Text,
    setting(
        "train.track", "--track", panel=OUTPUT, metavar="NAME[,NAME]", help="Trackers: tensorboard, wandb, trackio."
    ),
]
Overwrite = Annotated[
    bool,
    option("--overwrite", value=False, panel=OUTPUT, help="Replace what ldm wrote there before; other files stay."),
]
Format = Annotated[
    str,
    option("--format", value="png", panel=OUTPUT, choices=("png", "jpg", "webp"), default="png", help="Image format."),
]
Metadata = Annotated[
    bool,
    option(
        "--metadata/--no-metadata",
        value=True,
        panel=OUTPUT,
        default="on",
        help="Write prompt, seed, settings and model hash into each image.",
    ),
]
Json = Annotated[
    bool,
    option("--json", value=False, panel=OUTPUT, help="One JSON document on stdout; text for people goes to stderr."),
]
Verbose = Annotated[bool, option("--verbose", "-v", value=False, panel=OUTPUT, help="Say more.")]
Quiet = Annotated[bool, option("--quiet", "-q", value=False, panel=OUTPUT, help="Say less: warnings and errors only.")]

# --- Machine
Gpus = Annotated[
    int | None,
    option(
        "--gpus",
        panel=MACHINE,
        metavar="N",
        min=1,
        default="1",
        help="Processes, one a GPU; without a GPU, N processes on the CPU.",
    ),
]
MixedPrecision = Annotated[
    Text,
    setting(
        "train.mixed_precision",
        "--mixed-precision",
        panel=MACHINE,
        choices=("auto", "no", "bf16", "fp16"),
        help="Number format of the heavy arithmetic.",
    ),
]
Compile = Annotated[
    Flag,
    setting(
        "train.compile",
        "--compile/--no-compile",
        panel=MACHINE,
        help="torch.compile the networks: slow start, faster steps.",
    ),
]
Workers = Annotated[
    Text, setting("data.workers", "--workers", panel=MACHINE, metavar="N", help="Threads that decode images ahead.")
]
Offline = Annotated[bool, option("--offline", value=False, panel=MACHINE, help="Ask nothing of a network.")]

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
TRAIN_MACHINE = {"gpus": Gpus, "mixed_precision": MixedPrecision, "compile": Compile, "workers": Workers}
DRAWING = {
    "steps": SampleSteps,
    "guidance": Guidance,
    "sampler": Sampler,
    "temperature": Temperature,
    "seed": Seed,
    "batch_size": SampleBatch,
}


def info_of(alias: Any) -> Any:
    """The Typer option or argument object that an `Annotated` alias carries."""
    return alias.__metadata__[0]


def long_name(info: Any) -> str:
    """The name that messages use: the first long one, without a `--no-…` twin."""
    names = [name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str)]
    return next((name for name in names if name.startswith("--")), names[0]).partition("/")[0]


@dataclass(frozen=True)
class ParsedOptions:
    """What the user gave: values by parameter name (as attributes, too), and the command line itself."""

    values: dict[str, Any]
    options: dict[str, Any]  # parameter name → Annotated alias
    command: str
    argv: list[str]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    def layers(self, section: str = "") -> list[config.Layer]:
        """The options that set settings (of one section, where named), each a layer with its own name as origin."""
        found = []
        for name, alias in self.options.items():
            path = getattr(info_of(alias), "path", "")
            value = self.values[name]
            if path and path.startswith(section) and value not in (None, [], ()):
                found.append((long_name(info_of(alias)), {path: value}))
        return found

    def check_choices(self) -> None:
        """UsageError, with a suggestion, where an option takes one of a few words and was given another."""
        for name, alias in self.options.items():
            choices = getattr(info_of(alias), "choices", ())
            value = self.values[name]
            if choices and value is not None and value not in choices:
                hint = config.did_you_mean(difflib.get_close_matches(value, choices, n=1))
                raise UsageError(f"{long_name(info_of(alias))}: {value!r} is not one of {', '.join(choices)}{hint}")


def _with_default(alias: Any, defaults: dict[str, object]) -> Any:
    """The alias with the default of its setting in its help, where it words none itself."""
    info = info_of(alias)
    if not info.path or isinstance(info.show_default, str):
        return alias
    info = copy.copy(info)
    info.show_default = _shown(defaults[info.path])
    return Annotated[alias.__origin__, info]


def command(*groups: dict[str, Any], kind: str = "diffusion") -> Callable:
    """Give a command `f(given)` the options and arguments of `groups`; `kind` says whose defaults help shows."""
    options: dict[str, Any] = {}
    for group in groups:
        options |= group
    options = {name: _with_default(alias, config.defaults(kind)) for name, alias in options.items()}

    def decorate(function: Callable) -> Callable:
        def command(ctx: typer.Context, **values: Any) -> Any:
            given = ParsedOptions(values, options, ctx.info_name or "", list((ctx.obj or {}).get("argv", ())))
            given.check_choices()
            return function(given)

        keyword = inspect.Parameter.KEYWORD_ONLY
        command.__signature__ = inspect.Signature(
            [
                inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
                *(
                    inspect.Parameter(name, keyword, annotation=alias, default=info_of(alias).value)
                    for name, alias in options.items()
                ),
            ]
        )
        command.__annotations__ = {"ctx": typer.Context, **options}
        command.__name__, command.__doc__, command.__module__ = function.__name__, function.__doc__, function.__module__
        command.options = options
        return command

    return decorate
