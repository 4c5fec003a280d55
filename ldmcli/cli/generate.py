"""`ldm sample` and `ldm reconstruct`: options to a request, then images in a folder."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldmcli.cli import options as opt
from ldmcli.cli.parsing import DATA, ParsedOptions, Text, argument, command, option
from ldmcli.cli.prompts import read_prompts
from ldmcli.cli.train import require_folder
from ldmcli.core import config, console
from ldmcli.core.errors import InputError, UsageError
from ldmcli.sampling.request import SampleRequest, later_text

_REQUEST = {
    "prompt": opt.Prompt,
    "prompts": opt.Prompts,
    "classes": opt.Classes,
    "layouts": opt.Layouts,
    "maps": opt.Maps,
    "given": opt.Given,
    "count": opt.Count,
    "negative_prompt": opt.NegativePrompt,
    **opt.DRAWING,
    "guidance": opt.KindGuidance,
    "guidance_interval": opt.GuidanceInterval,
    "eta": opt.Eta,
    "spacing": opt.Spacing,
    "size": opt.SampleSize,
    "init_image": opt.InitImage,
    "strength": opt.Strength,
    "guide": opt.Guide,
    **opt.GUIDING,
}
ImageSize = option(Text, "--size", "N|HxW", "Height and width in pixels.", panel=DATA, default="each image's own")
Images = argument(list[Path], "IMAGES...", "Image files, or folders of them.")


@command({"model": opt.Model, "weights": opt.Weights}, _REQUEST, opt.IMAGES_OUT, opt.TALK)
def sample(given: ParsedOptions) -> None:
    """Draw images with a trained model.

    Image k depends on --seed and k alone: not on the batch size, the device count, or what else is asked for.
    """
    request = sample_request(given)
    out = given.out or Path("outputs") / _stated_name(given, request)
    require_folder(out)
    from ldmcli.sampling.commands import sample_to_folder

    result = sample_to_folder(
        given.model, request, out, overwrite=given.overwrite, fmt=given.format, metadata=given.metadata
    )
    if given.json:
        console.emit_json(result)
    else:
        console.out(out)


@command(
    {
        "images": Images,
        "autoencoder": opt.ReconstructWith,
        "size": ImageSize,
        "out": opt.Out,
        "overwrite": opt.Overwrite,
    },
    opt.TALK,
)
def reconstruct(given: ParsedOptions) -> None:
    """Pass images through an autoencoder and show each beside its reconstruction, with PSNR."""
    missing = [path for path in given.images if not path.exists()]
    if missing:
        raise InputError(f"{missing[0]}: no such file or folder")
    out = given.out or Path("outputs") / f"{slug(given.images[0].stem)}-reconstructed"
    require_folder(out)
    from ldmcli.sampling.reconstruct import reconstruct_to_folder

    result = reconstruct_to_folder(
        given.images,
        given.autoencoder,
        out,
        size=config.size_of(given.size),
        overwrite=given.overwrite,
        own_folder=given.out is None,
    )
    if given.json:
        console.emit_json(result)
    else:
        rows = [(row["image"], f"{row['psnr']:.2f}") for row in result["images"]]
        console.out(console.table(rows, ["image", "PSNR / dB"]))
        console.out(out)


def sample_request(given: ParsedOptions) -> SampleRequest:
    """The request of the options; UsageError or InputError where they don't fit together."""
    prompts, classes = tuple(given.prompt or ()), tuple(given.classes or ())
    if given.prompts is not None:
        prompt_file = read_prompts(given.prompts)
        if prompt_file.classes and (prompts or classes):
            raise UsageError(f"--prompts {given.prompts} names classes itself; leave --prompt and --class away")
        prompts, classes = prompts + prompt_file.prompts, classes + prompt_file.classes
    if given.init_image is not None and not given.init_image.is_file():
        raise InputError(f"--init-image {given.init_image}: no such file")
    if given.guide is not None and not given.guide.is_file():
        raise InputError(f"--guide {given.guide}: no such file")
    for name, value, needs, file in (
        ("--strength", given.strength, "--init-image", given.init_image),
        ("--guide-scale", given.guide_scale, "--guide", given.guide),
    ):
        if value is not None and file is None:
            raise UsageError(f"{name} {value:g}: says how much {needs} counts; give {needs} FILE, too")
    more = {} if given.strength is None else {"strength": given.strength}
    return SampleRequest(
        prompts=prompts,
        negative_prompt=given.negative_prompt,
        classes=classes,
        layouts=tuple(given.layouts or ()),
        maps=_map_files(given.maps or ()),
        given=tuple(given.given or ()),
        n=given.count,
        steps=given.steps,
        guidance=guidance_of(given.guidance),
        guidance_interval=interval_of(given.guidance_interval),
        seed=given.seed,
        sampler=given.sampler,
        eta=given.eta,
        temperature=given.temperature,
        size=config.size_of(given.size),
        batch_size=given.batch_size,
        init_image=given.init_image,
        weights=given.weights,
        spacing=given.spacing,
        guide=given.guide,
        **guiding_options(given, "--guide FILE", given.guide is not None),
        **more,
    )


def guiding_options(given: ParsedOptions, needs: str, guided: bool) -> dict[str, Any]:
    """The options of guiding that were given, by their names in a request. Raises UsageError where nothing is guided,
    and for a network of LPIPS where it is not the distance."""
    names = ("guide_scale", "guide_rule", "guide_metric", "perceptual")
    found = {name: value for name in names if (value := getattr(given, name)) is not None}
    idle = next((name for name in names[1:] if name in found), None)
    if idle and not guided:
        raise UsageError(f"--{idle.replace('_', '-')} {found[idle]}: says how results are guided; give {needs}, too")
    if "perceptual" in found and found.get("guide_metric") != "lpips":
        raise UsageError(f"--perceptual {found['perceptual']}: a network of LPIPS; give --guide-metric lpips, too")
    return found


def _map_files(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Files given one by one, or as folders: the pictures in them, by name."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            from ldmcli.data.pictures import image_files

            found += image_files([path])
        else:
            found.append(path)
    return tuple(found)


def guidance_of(text: str | None) -> float | dict[str, float] | None:
    """One scale, or a scale a condition: "3" or "text=3,map=1.5". Raises UsageError."""
    if text is None:
        return None
    try:
        if "=" not in text:
            scales = {"": float(text)}
        else:
            pairs = [part.partition("=") for part in text.split(",")]
            scales = {name.strip(): float(scale) for name, _, scale in pairs}
    except ValueError:
        scales = {"": -1.0}
    if not all(0 <= scale < float("inf") for scale in scales.values()):
        raise UsageError(f"--guidance: {text!r} is no scale from 0 on, nor scales by condition as text=3,map=1.5")
    return scales.get("", scales)


def interval_of(text: str | None) -> tuple[float, float] | None:
    """Two rising shares, "0.2,0.8". Raises UsageError."""
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise UsageError(f"--guidance-interval: {text!r} is not two shares, as 0.2,0.8")
    return low, high


def slug(text: str) -> str:
    """Text as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()[:40].rstrip("-") or "images"


def _stated_name(given: ParsedOptions, request: SampleRequest) -> str:
    """A folder's name for a request: the same for the same command, so that an interrupted one goes on in it."""
    classes = " ".join(("class", *request.classes)) if request.classes else "sample"
    described = f"{given.model} {request} {given.format} {given.metadata}{later_text(request)}"
    digest = hashlib.sha256(described.encode("utf-8", "surrogateescape")).hexdigest()[:6]
    files = [path.stem for path in (*request.layouts, *request.maps)]
    return f"{slug((*request.prompts, *files, classes)[0])}-{digest}"
