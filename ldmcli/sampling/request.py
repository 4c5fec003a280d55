"""The requests of `ldm sample`, `ldm inpaint` and `ldm upscale`, as plain data."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ldmcli.core.settings import DistillSettings, SampleSettings
from ldmcli.diffusion.samplers import takes_eta

# of a field that came later: where it says nothing, text and document of a request are as they were without it
LATER = {"later": True}
# settings of [sample] that a request can set for itself, and those of them that files beside pictures always name
SAMPLING = ("sampler", "steps", "guidance", "guidance_interval", "autoguidance", "eta", "temperature", "spacing")
DISTILLED_BY = "progressive distillation of guided steps (arXiv 2202.00512, 2210.03142)"
NAMED = ("sampler", "steps", "guidance", "eta", "temperature")


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One call's images. None stands for "what the run's own [sample] settings say"."""

    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    classes: tuple[str, ...] = ()  # names or indices; ("all",) = every class
    layouts: tuple[Path, ...] = ()  # JSON files, of one layout each or a list of them
    maps: tuple[Path, ...] = ()  # pictures of class indices
    given: tuple[str, ...] = field(default=(), repr=False, metadata=LATER)  # NAME=VALUE of other conditions
    n: int | None = None  # images; None = one a prompt, class, layout or map, or the run's sample.n where it takes none
    steps: int | None = None
    guidance: float | dict[str, float] | None = None  # one scale, or one a condition
    guidance_interval: tuple[float, float] | None = None  # share of the noise range, 0 = clean
    seed: int = 0
    sampler: str | None = None
    eta: float | None = None
    temperature: float | None = None
    size: tuple[int, int] | None = None  # height, width in pixels
    batch_size: int | None = None
    init_image: Path | None = None
    strength: float = 0.8  # share of the way back to noise that the initial image goes
    guide: Path | None = None  # a small image that results, made as small, are led to
    guide_scale: float = 1.0
    guide_rule: str = field(default="ours", repr=False, metadata=LATER)  # ours | paper
    guide_metric: str = field(default="l2", repr=False, metadata=LATER)  # l2 | lpips
    perceptual: str = field(default="", repr=False, metadata=LATER)  # network of LPIPS; "" = vgg
    weights: str = "ema"  # ema | raw
    spacing: str | None = None
    classifier: Path | None = field(default=None, repr=False, metadata=LATER)  # a run that leads to classes, and …
    classifier_scale: float = field(default=1.0, repr=False, metadata=LATER)  # … how far
    autoguidance: float | None = field(default=None, repr=False, metadata=LATER)  # scale against the guiding model


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """The request of `ldm inpaint` or `ldm upscale`: images from images. None stands for the run's own settings."""

    images: tuple[Path, ...]
    masks: tuple[Path, ...] = ()  # inpaint: one a picture, white = hole; or …
    box: tuple[int, int, int, int] | None = None  # … x, y, width, height of the hole in pixels
    scale: int = 0  # upscale: result side / picture side
    prompts: tuple[str, ...] = ()  # at most one, for all pictures
    negative_prompt: str = ""
    classes: tuple[str, ...] = ()
    layouts: tuple[Path, ...] = ()  # at most one: a JSON file for all pictures, or a folder of them
    maps: tuple[Path, ...] = ()  # likewise, class maps
    given: tuple[str, ...] = field(default=(), repr=False, metadata=LATER)  # NAME=VALUE of other conditions
    n: int = 1  # results a picture
    blend: int = 8  # pixels around a hole by which brightness and colour in it are fitted; 0 = pasted as sampled
    resample: int = 10  # times that each step is done where the model was not trained to inpaint
    tone: float | None = None  # upscale: small pixels beyond which brightness is the picture's; 0 = as sampled
    guide_scale: float = field(default=0.0, repr=False, metadata=LATER)  # upscale: how far to the picture
    guide_rule: str = field(default="ours", repr=False, metadata=LATER)  # ours | paper
    guide_metric: str = field(default="l2", repr=False, metadata=LATER)  # l2 | lpips
    perceptual: str = field(default="", repr=False, metadata=LATER)  # network of LPIPS; "" = vgg
    tile: int = 0  # pixels a side of what the networks see at once; 0 = as much as max_memory allows
    max_memory: float = 4.0  # GiB of activations
    steps: int | None = None
    guidance: float | dict[str, float] | None = None
    guidance_interval: tuple[float, float] | None = None
    seed: int = 0
    sampler: str | None = None
    eta: float | None = None
    temperature: float | None = None
    spacing: str | None = None
    batch_size: int | None = None
    weights: str = "ema"  # ema | raw
    autoguidance: float | None = field(default=None, repr=False, metadata=LATER)


def named_files(request: SampleRequest | EditRequest) -> list[Path]:
    """The files that a request names, in order of its fields; folders are left out."""
    values = [getattr(request, one.name) for one in fields(request)]
    paths = [path for value in values for path in (value if isinstance(value, tuple) else (value,))]
    return [path for path in paths if isinstance(path, Path) and path.is_file()]


def said_later(request: SampleRequest | EditRequest) -> dict[str, Any]:
    """Fields that came later, where they say something."""
    later = [one for one in fields(request) if one.metadata.get("later")]
    return {one.name: value for one in later if (value := getattr(request, one.name)) != one.default}


def later_text(request: SampleRequest | EditRequest) -> str:
    """`said_later` as text, which the text of a request lacks: folders are named after both."""
    later = said_later(request)
    given = " ".join(later.pop("given", ()))
    return given + "".join(f" {name}={value}" for name, value in later.items())


def document_of(request: SampleRequest | EditRequest) -> dict[str, Any]:
    """The request as JSON, without what does not change pictures."""
    later = said_later(request)
    unsaid = {one.name for one in fields(request) if one.metadata.get("later") and one.name not in later}
    document = {name: value for name, value in asdict(request).items() if name not in {"batch_size", *unsaid}}
    return json.loads(json.dumps(document, default=str))


def sampling_of(request: SampleRequest | EditRequest) -> dict[str, Any]:
    """What a request says about sampling; None where it says nothing."""
    return {name: getattr(request, name) for name in SAMPLING}


def stated_distillation(settings: DistillSettings) -> dict[str, Any]:
    """What files beside pictures say of a distilled model; nothing of an ordinary one."""
    if not settings.calls:
        return {}
    stated = {"calls": settings.calls, "guidance": settings.guidance, "teacher_sha256": settings.teacher}
    stated |= {"autoguidance": settings.autoguidance} if settings.autoguidance != 1 else {}
    return {"distilled": {**stated, "method": DISTILLED_BY}}


def sampling_used(own: SampleSettings, request: SampleRequest | EditRequest) -> dict[str, Any]:
    """Sampling as it is done: what the request says, else the model's own."""
    given = {name: value for name, value in sampling_of(request).items() if value is not None}
    led = {"autoguidance": own.autoguidance} if own.autoguidance != 1 else {}
    used = {**{name: getattr(own, name) for name in NAMED}, **led, **given}
    return used if takes_eta(used["sampler"]) else used | {"eta": 0.0}
