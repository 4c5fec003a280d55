"""`ldm inpaint` and `ldm upscale`: pictures from pictures."""

import hashlib
from pathlib import Path
from typing import Annotated, Any

from ldmcli.cli import options as opt
from ldmcli.cli.generate import guidance_of, interval_of, slug
from ldmcli.cli.train import require_folder
from ldmcli.core import console
from ldmcli.core.errors import InputError, UsageError
from ldmcli.sampling.request import EditRequest

Picture = Annotated[Path, opt.argument("A picture, or a folder of them.", "IMAGE")]
Mask = Annotated[
    Path | None,
    opt.argument(
        "White where to repaint: a picture of the same size, or a folder of them "
        "with the same names. Without it and --box: what is transparent in IMAGE.",
        "MASK",
        default="--box",
        required=False,
    ),
]
Box = Annotated[
    opt.Text,
    opt.option(
        "--box",
        panel=opt.DATA,
        metavar="X,Y,W,H",
        default="the mask",
        help="What to repaint, in pixels from the upper left corner.",
    ),
]
Scale = Annotated[
    int,
    opt.option(
        "--scale",
        value=4,
        panel=opt.MODEL,
        metavar="2|4|8",
        default="4",
        help="How many times as large; the model must be trained for it.",
    ),
]
Results = Annotated[
    int,
    opt.option(
        "-n",
        "--count",
        value=1,
        panel=opt.SAMPLING,
        metavar="N",
        min=1,
        default="1",
        help="Different results of each picture.",
    ),
]
OnePrompt = Annotated[
    opt.Text,
    opt.option(
        "--prompt",
        panel=opt.SAMPLING,
        metavar="TEXT",
        default="none",
        help="What the picture shows, where the model takes a prompt.",
    ),
]
OneClass = Annotated[
    opt.Text,
    opt.option(
        "--class",
        panel=opt.SAMPLING,
        metavar="NAME|INDEX",
        default="none",
        help="Class of the picture, where the model takes one; where classes are called by numbers, #1 is the second "
        "one.",
    ),
]
OneLayout = Annotated[
    Path | None,
    opt.option(
        "--layout",
        panel=opt.SAMPLING,
        metavar="FILE.json",
        default="none",
        help="Boxes in the whole picture, where the model takes them: a file, or a folder of them with the "
        "pictures' names.",
    ),
]
OneMap = Annotated[
    Path | None,
    opt.option(
        "--map",
        panel=opt.SAMPLING,
        metavar="FILE.png",
        default="none",
        help="Class map of the whole picture, where the model takes one: a file, or a folder of them with the "
        "pictures' names.",
    ),
]
Blend = Annotated[
    int,
    opt.option(
        "--blend",
        value=8,
        panel=opt.SAMPLING,
        metavar="PX",
        min=0,
        default="8",
        help="Pixels around a hole by which the brightness and colour in it are fitted; 0 = pasted as drawn.",
    ),
]
Resample = Annotated[
    int,
    opt.option(
        "--resample",
        value=10,
        panel=opt.SAMPLING,
        metavar="N",
        min=1,
        default="10",
        help="Times that each step is done, with new noise, by a model not trained to inpaint: fewer are faster and "
        "fit their surroundings worse.",
    ),
]
Tone = Annotated[
    float | None,
    opt.option(
        "--tone",
        panel=opt.SAMPLING,
        metavar="PX",
        min=0,
        default="the run's setting",
        help="Pixels of IMAGE beyond which brightness and colour are its own; 0 = as drawn.",
    ),
]
Tile = Annotated[
    int,
    opt.option(
        "--tile",
        value=0,
        panel=opt.MACHINE,
        metavar="PX",
        min=0,
        default="by --max-memory",
        help="Side of the tiles that the networks see of large pictures, in pixels.",
    ),
]
MaxMemory = Annotated[
    float,
    opt.option(
        "--max-memory",
        value=4.0,
        panel=opt.MACHINE,
        metavar="GIB",
        default="4",
        help="Bound on what a pass of the networks takes beside their weights, in GiB.",
    ),
]
_MODEL = {"model": opt.Model, "weights": opt.Weights}
_DRAWING = {
    **opt.DRAWING,
    "guidance": opt.KindGuidance,
    "guidance_interval": opt.GuidanceInterval,
    "eta": opt.Eta,
    "spacing": opt.Spacing,
}
_TOLD = {
    "prompt": OnePrompt,
    "class_name": OneClass,
    "layout": OneLayout,
    "map": OneMap,
    "negative_prompt": opt.NegativePrompt,
    "count": Results,
}
_MACHINE = {"tile": Tile, "max_memory": MaxMemory}


@opt.command(
    {"image": Picture, "mask": Mask, "box": Box},
    _MODEL,
    _TOLD,
    {"blend": Blend, "resample": Resample},
    _DRAWING,
    opt.IMAGES_OUT,
    opt.TALK,
    _MACHINE,
)
def inpaint(given: opt.ParsedOptions) -> None:
    """Repaint a part of a picture: what is white in MASK, or inside --box.

    Known pixels come back as they were. Takes a model trained with --task inpaint, or any that generates: that one
    gets the known part back at every step. It looks at the surroundings of the hole only, so photographs of any size
    will do.
    """
    if given.mask is not None and given.box is not None:
        raise UsageError("MASK or --box: give one of them, to say what to repaint")
    request = _request(given, masks=_one(given.mask), box=_box(given.box), blend=given.blend, resample=given.resample)
    out = _out(given, request, "inpainted")
    from ldmcli.sampling.edit_commands import inpaint_to_folder

    _done(given, out, inpaint_to_folder(given.model, request, out, **_how(given)))


@opt.command(
    {"image": Picture, "scale": Scale}, _MODEL, _TOLD, {"tone": Tone}, _DRAWING, opt.IMAGES_OUT, opt.TALK, _MACHINE
)
def upscale(given: opt.ParsedOptions) -> None:
    """Make pictures larger, with a model trained with --task sr.

    The result has exactly --scale times as many pixels a side. Large pictures go through the networks in overlapping
    tiles.
    """
    if given.scale not in (2, 4, 8):
        raise UsageError(f"--scale {given.scale}: choose one of 2, 4, 8")
    request = _request(given, scale=given.scale, tone=given.tone)
    out = _out(given, request, f"x{given.scale}")
    from ldmcli.sampling.edit_commands import upscale_to_folder

    _done(given, out, upscale_to_folder(given.model, request, out, **_how(given)))


def _request(given: opt.ParsedOptions, **more) -> EditRequest:
    files = {"layouts": _one(given.layout), "maps": _one(given.map)}
    for path in (given.image, *more.get("masks", ()), *files["layouts"], *files["maps"]):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
    if not 0 < given.max_memory < float("inf"):
        raise UsageError(f"--max-memory {given.max_memory:g}: a number of GiB above 0")
    return EditRequest(
        images=(given.image,),
        prompts=_one(given.prompt),
        classes=_one(given.class_name),
        **files,
        negative_prompt=given.negative_prompt,
        n=given.count,
        tile=given.tile,
        max_memory=given.max_memory,
        steps=given.steps,
        guidance=guidance_of(given.guidance),
        guidance_interval=interval_of(given.guidance_interval),
        seed=given.seed,
        sampler=given.sampler,
        eta=given.eta,
        temperature=given.temperature,
        spacing=given.spacing,
        batch_size=given.batch_size,
        weights=given.weights,
        **more,
    )


def _box(text: str | None) -> tuple[int, int, int, int] | None:
    if text is None:
        return None
    try:
        x, y, width, height = (int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--box: {text!r} is not x,y,width,height in whole pixels, as 32,48,100,80") from None
    return x, y, width, height


def _one(value: Any) -> tuple[Any, ...]:
    return () if value is None else (value,)


def _how(given: opt.ParsedOptions) -> dict:
    return {"overwrite": given.overwrite, "fmt": given.format, "metadata": given.metadata}


def _out(given: opt.ParsedOptions, request: EditRequest, what: str) -> Path:
    """The folder named, or one for this request: the same for the same command, so that it goes on in it."""
    asked = f"{given.model} {request} {given.format} {given.metadata}"
    digest = hashlib.sha256(asked.encode("utf-8", "surrogateescape")).hexdigest()[:6]
    out = given.out or Path("outputs") / f"{slug(given.image.stem)}-{what}-{digest}"
    require_folder(out)
    return out


def _done(given: opt.ParsedOptions, out: Path, result: dict) -> None:
    if given.json:
        console.emit_json(result)
    else:
        console.out(out)
