"""`ldm sample` and `ldm reconstruct`: options to a request, then images in a folder."""

import hashlib
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmcli.cli import options as opt
from ldmcli.cli.parsing import DATA, OUTPUT, ParsedOptions, Text, argument, command, option
from ldmcli.cli.processes import shared
from ldmcli.cli.prompts import read_prompts
from ldmcli.cli.train import require_folder
from ldmcli.core import config, console
from ldmcli.core.errors import InputError, UsageError
from ldmcli.sampling.request import SampleRequest, later_text

if TYPE_CHECKING:
    from ldmcli.sampling.machine import Machine

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
    "size": opt.SampleSize,
    "init_image": opt.InitImage,
    "strength": opt.Strength,
    "guide": opt.Guide,
    **opt.GUIDING,
    **opt.CLASSIFIER,
}
Progress = option(
    Text,
    "--progress",
    ("row", "gif"),
    "Also show how the first samples came about, step by step: a sheet or an animation.",
    panel=OUTPUT,
    default="none",
)
ImageSize = option(Text, "--size", "N|HxW", "Height and width in pixels.", panel=DATA, default="each image's own")
Images = argument(list[Path], "IMAGES...", "Image files, or folders of them.")


@command(
    {"model": opt.Model, "weights": opt.Weights},
    _REQUEST,
    {"progress": Progress},
    opt.IMAGES_OUT,
    opt.TALK,
    opt.USE_MACHINE,
)
def sample(given: ParsedOptions) -> None:
    """Draw images with a trained model.

    Image k depends on --seed and k alone: not on the batch size, the device count, or what else is asked for. Where no
    run is around ldm-emoji draws, a small model of emoji that comes with ldm.
    """
    shared(given, partial(_sample, given))


def _sample(given: ParsedOptions, machine: "Machine") -> None:
    request = machine.world.on_rank_0(lambda: sample_request(given))  # prompts may come from stdin, which is read once
    out = given.out or Path("outputs") / _stated_name(given, request)
    machine.world.on_rank_0(lambda: require_folder(out))
    from ldmcli.sampling.commands import sample_to_folder

    result = sample_to_folder(
        given.model,
        request,
        out,
        overwrite=given.overwrite,
        fmt=given.format,
        metadata=given.metadata,
        progress=given.progress,
        machine=machine,
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
    opt.USE_MACHINE,
)
def reconstruct(given: ParsedOptions) -> None:
    """Pass images through an autoencoder and show each beside its reconstruction, with PSNR.

    Several autoencoders give a sheet with all their reconstructions, too.
    """
    shared(given, partial(_reconstruct, given))


def _reconstruct(given: ParsedOptions, machine: "Machine") -> None:
    out = machine.world.on_rank_0(lambda: _reconstructed_to(given))
    from ldmcli.sampling.reconstruct import reconstruct_to_folder

    result = reconstruct_to_folder(
        given.images,
        given.autoencoder or None,
        out,
        size=config.size_of(given.size),
        overwrite=given.overwrite,
        own_folder=given.out is None,
        machine=machine,
    )
    if given.json:
        console.emit_json(result)
    else:
        names = result.get("autoencoders", [""])
        psnrs = [[one["psnr"] for one in row.get("results", [row])] for row in result["images"]]
        rows = [(row["image"], *(f"{psnr:.2f}" for psnr in each)) for row, each in zip(result["images"], psnrs)]
        console.out(console.table(rows, ["image", *(f"PSNR / dB {name}".strip() for name in names)]))
        console.out(out)


def _reconstructed_to(given: ParsedOptions) -> Path:
    """The folder for the results. Raises InputError where an image is missing."""
    missing = [path for path in given.images if not path.exists()]
    if missing:
        raise InputError(f"{missing[0]}: no such file or folder")
    out = given.out or Path("outputs") / f"{slug(given.images[0].stem)}-reconstructed"
    require_folder(out)
    return out


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
        ("--classifier-scale", given.classifier_scale, "--classifier", given.classifier),
    ):
        if value is not None and file is None:
            what = "RUN" if needs == "--classifier" else "FILE"
            raise UsageError(f"{name} {value:g}: says how much {needs} counts; give {needs} {what}, too")
    more = {name: value for name in ("strength", "classifier_scale") if (value := getattr(given, name)) is not None}
    return SampleRequest(
        prompts=prompts,
        negative_prompt=given.negative_prompt,
        classes=classes,
        layouts=tuple(given.layouts or ()),
        maps=_map_files(given.maps or ()),
        given=tuple(given.given or ()),
        n=given.count,
        seed=given.seed,
        size=config.size_of(given.size),
        batch_size=given.batch_size,
        init_image=given.init_image,
        weights=given.weights,
        guide=given.guide,
        **opt.sampling_of(given),
        classifier=given.classifier,
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
