"""`ldm inpaint` and `ldm upscale`: pictures from pictures."""

import hashlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmcli.cli import options as opt
from ldmcli.cli.generate import guiding_options, slug
from ldmcli.cli.parsing import DATA, MACHINE, MODEL, SAMPLING, ParsedOptions, Text, argument, command, option
from ldmcli.cli.processes import shared
from ldmcli.cli.train import require_folder
from ldmcli.core import console
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.world import default_device
from ldmcli.sampling.request import EditRequest, later_text

if TYPE_CHECKING:
    from ldmcli.sampling.machine import Machine

Picture = argument(Path, "IMAGE", "A picture, or a folder of them.")
Mask = argument(
    Path | None,
    "MASK",
    "White where to repaint: a picture of the same size, or a folder of them with the same names. "
    "Without it and --box: what is transparent in IMAGE.",
    default="--box",
    required=False,
)
Box = option(
    Text, "--box", "X,Y,W,H", "What to repaint, in pixels from the upper left corner.", panel=DATA, default="the mask"
)
Scale = option(
    int,
    "--scale",
    "2|4|8",
    "How many times as large; the model must be trained for it.",
    panel=MODEL,
    value=4,
    default="4",
)
Results = option(
    int, "-n --count", "N", "Different results of each picture.", panel=SAMPLING, value=1, min=1, default="1"
)
OnePrompt = option(
    Text, "--prompt", "TEXT", "What the picture shows, where the model takes a prompt.", panel=SAMPLING, default="none"
)
OneClass = option(
    Text,
    "--class",
    "NAME|INDEX",
    "Class of the picture, where the model takes one; where classes are called by numbers, #1 is the second one.",
    panel=SAMPLING,
    default="none",
)
OneLayout = option(
    Path | None,
    "--layout",
    "FILE.json",
    "Boxes in the whole picture, where the model takes them: a file, or a folder of them with the pictures' names.",
    panel=SAMPLING,
    default="none",
)
OneMap = option(
    Path | None,
    "--map",
    "FILE.png",
    "Class map of the whole picture, where the model takes one: a file, or a folder of them with the pictures' names.",
    panel=SAMPLING,
    default="none",
)
Blend = option(
    int,
    "--blend",
    "PX",
    "Pixels around a hole by which the brightness and colour in it are fitted; 0 = pasted as drawn.",
    panel=SAMPLING,
    value=8,
    min=0,
    default="8",
)
Resample = option(
    int,
    "--resample",
    "N",
    "Times that each step is done, with new noise, by a model not trained to inpaint: "
    "fewer are faster and fit their surroundings worse.",
    panel=SAMPLING,
    value=10,
    min=1,
    default="10",
)
Tone = option(
    float | None,
    "--tone",
    "PX",
    "Pixels of IMAGE beyond which brightness and colour are its own; 0 = as drawn.",
    panel=SAMPLING,
    min=0,
    default="the run's setting",
)
LedBack = option(
    float | None,
    "--guide-scale",
    "SCALE",
    "Lead results to what, made small again, is IMAGE: 0 not at all, 1 (of rule ours) as far as would fit it.",
    panel=SAMPLING,
    min=0,
    default="0",
)
Tile = option(
    int,
    "--tile",
    "PX",
    "Side of the tiles that the networks see of large pictures, in pixels.",
    panel=MACHINE,
    value=0,
    min=0,
    default="by --max-memory",
)
MaxMemory = option(
    float | None,
    "--max-memory",
    "GIB",
    "Bound on what a pass of the networks takes beside their weights, in GiB.",
    panel=MACHINE,
    default="4, or half of the GPU's memory",
)
_MODEL = {"model": opt.Model, "weights": opt.Weights}
_TOLD = {
    "prompt": OnePrompt,
    "class_name": OneClass,
    "layout": OneLayout,
    "map": OneMap,
    "given": opt.Given,
    "negative_prompt": opt.NegativePrompt,
    "count": Results,
}
_MACHINE = {"tile": Tile, "max_memory": MaxMemory}


@command(
    {"image": Picture, "mask": Mask, "box": Box},
    _MODEL,
    _TOLD,
    {"blend": Blend, "resample": Resample},
    opt.DRAWING,
    opt.IMAGES_OUT,
    opt.TALK,
    {**opt.USE_MACHINE, **_MACHINE},
)
def inpaint(given: ParsedOptions) -> None:
    """Repaint a part of a picture: what is white in MASK, or inside --box.

    Known pixels come back as they were. Takes a model trained with --task inpaint, or any that generates: that one
    gets the known part back at every step. It looks at the surroundings of the hole only, so photographs of any size
    will do.
    """
    if given.mask is not None and given.box is not None:
        raise UsageError("MASK or --box: give one of them, to say what to repaint")
    own = {"masks": _one(given.mask), "box": _box(given.box), "blend": given.blend, "resample": given.resample}
    shared(given, partial(_edit, given, own, "inpainted"))


@command(
    {"image": Picture, "scale": Scale},
    _MODEL,
    _TOLD,
    {"tone": Tone},
    {**opt.GUIDING, "guide_scale": LedBack},
    opt.DRAWING,
    opt.IMAGES_OUT,
    opt.TALK,
    {**opt.USE_MACHINE, **_MACHINE},
)
def upscale(given: ParsedOptions) -> None:
    """Make pictures larger, with a model trained with --task sr.

    The result has exactly --scale times as many pixels a side. Large pictures go through the networks in overlapping
    tiles.
    """
    if given.scale not in (2, 4, 8):
        raise UsageError(f"--scale {given.scale}: choose one of 2, 4, 8")
    guiding = guiding_options(given, "--guide-scale SCALE", given.guide_scale is not None)
    own = {"scale": given.scale, "tone": given.tone, **guiding}
    shared(given, partial(_edit, given, own, f"x{given.scale}"))


def _edit(given: ParsedOptions, own: dict[str, Any], what: str, machine: "Machine") -> None:
    """The work of either command. own: what its request says alone; what: the end of the folder's name."""
    request, out = machine.world.on_rank_0(lambda: _placed(given, _request(given, **own), what))
    from ldmcli.sampling.edit_commands import inpaint_to_folder, upscale_to_folder

    make = upscale_to_folder if request.scale else inpaint_to_folder
    how = {"overwrite": given.overwrite, "fmt": given.format, "metadata": given.metadata}
    result = make(given.model, request, out, machine=machine, **how)
    if given.json:
        console.emit_json(result)
    else:
        console.out(out)


def _request(given: ParsedOptions, **more) -> EditRequest:
    files: dict[str, Any] = {"layouts": _one(given.layout), "maps": _one(given.map)}
    for path in (given.image, *more.get("masks", ()), *files["layouts"], *files["maps"]):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
    if given.max_memory is not None and not 0 < given.max_memory < float("inf"):
        raise UsageError(f"--max-memory {given.max_memory:g}: a number of GiB above 0")
    from ldmcli.sampling.memory import activation_budget

    return EditRequest(
        images=(given.image,),
        prompts=_one(given.prompt),
        classes=_one(given.class_name),
        given=tuple(given.given or ()),
        **files,
        negative_prompt=given.negative_prompt,
        n=given.count,
        tile=given.tile,
        max_memory=given.max_memory or activation_budget(default_device()),
        seed=given.seed,
        batch_size=given.batch_size,
        weights=given.weights,
        **opt.sampling_of(given),
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


def _placed(given: ParsedOptions, request: EditRequest, what: str) -> tuple[EditRequest, Path]:
    """The request with the folder named, or one for it: the same for the same command, so that it goes on in it."""
    described = f"{given.model} {request} {given.format} {given.metadata}{later_text(request)}"
    digest = hashlib.sha256(described.encode("utf-8", "surrogateescape")).hexdigest()[:6]
    out = given.out or Path("outputs") / f"{slug(given.image.stem)}-{what}-{digest}"
    require_folder(out)
    return request, out
