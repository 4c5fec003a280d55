"""`ldm convert`: models of others in, runs out."""

from pathlib import Path
from typing import Annotated

from ldmcli.cli import options as opt
from ldmcli.core import console
from ldmcli.core.errors import UsageError

Source = Annotated[str, opt.argument("Checkpoint (.ckpt, .safetensors), diffusers folder, hub id, or run.", "SRC")]
Target = Annotated[Path, opt.argument("Folder to write; with --to compvis a .ckpt or .safetensors file.", "DST")]
To = Annotated[
    opt.Text,
    opt.option(
        "--to",
        panel=opt.OUTPUT,
        choices=("run", "compvis", "diffusers"),
        default="run; a run has to say",
        help="Format to write.",
    ),
]
Config = Annotated[
    Path | None,
    opt.option(
        "--config",
        panel=opt.MODEL,
        metavar="FILE.yaml",
        default="the one beside it, else by shapes",
        help="Configuration of a CompVis checkpoint.",
    ),
]
Heads = Annotated[
    str,
    opt.option(
        "--heads",
        value="",
        panel=opt.MODEL,
        metavar="legacy|config|N",
        default="as published, else as the YAML says",
        help="Attention heads of a CompVis UNet where its weights fit several numbers: legacy is one.",
    ),
]
Tokenizer = Annotated[
    Path | None,
    opt.option(
        "--tokenizer",
        panel=opt.MODEL,
        metavar="DIR",
        default="beside it, else the hub's",
        help="Tokenizer folder for a text model that comes without.",
    ),
]
Part = Annotated[
    opt.Text,
    opt.option(
        "--part",
        panel=opt.MODEL,
        choices=("first-stage",),
        default="everything",
        help="Take the autoencoder of a checkpoint alone.",
    ),
]
Weights = Annotated[
    str,
    opt.option(
        "--weights",
        value="ema",
        panel=opt.MODEL,
        choices=("ema", "raw"),
        default="ema",
        help="Averaged weights where there are any, or those of the last step.",
    ),
]

PushTo = Annotated[
    opt.Text,
    opt.option(
        "--push-to",
        panel=opt.OUTPUT,
        metavar="HUB_ID",
        default="none",
        help="Upload the folder written to the hub, with its model card.",
    ),
]


@opt.command(
    {
        "source": Source,
        "target": Target,
        "to": To,
        "config": Config,
        "heads": Heads,
        "weights": Weights,
        "tokenizer": Tokenizer,
        "part": Part,
        "overwrite": opt.Overwrite,
        "push_to": PushTo,
    },
    opt.TALK,
)
def convert(given: opt.ParsedOptions) -> None:
    """Convert a model: checkpoints of CompVis/latent-diffusion and diffusers folders to runs, and runs to both.

    Nothing in a checkpoint is executed. What could be read in several ways is said and kept in the run.
    """
    for name, path in (("--config", given.config), ("--tokenizer", given.tokenizer)):
        if path is not None and not path.exists():
            raise UsageError(f"{name} {path}: no such file or folder")
    if given.push_to and given.to == "compvis":
        raise UsageError("--push-to: takes a folder; use --to diffusers or --to run")
    from ldmcli.formats.bundle import Reading
    from ldmcli.formats.convert import convert as convert_model

    reading = Reading(
        weights=given.weights, config=given.config, heads=given.heads, part=given.part or "", tokenizer=given.tokenizer
    )
    result = convert_model(Path(given.source), given.target, given.to or "", reading, overwrite=given.overwrite)
    if result["to"] == "run":
        from ldmcli.reports.card import write_card

        write_card(given.target)
    if given.push_to:
        from ldmcli.formats.hub import push

        result["pushed_to"] = push(given.target, given.push_to)
    if given.json:
        console.emit_json(result)
        return
    told = " + ".join(result["conditions"]) or "nothing"
    what = f"a diffusion model told {told}" if result["kind"] == "diffusion" else "an autoencoder"
    counts = ", ".join(f"{name} {count:,}" for name, count in result["parameters"].items())
    console.say(f"read {given.source}: {what}, parameters: {counts}")
    for note in result["notes"]:
        console.say(f"  {note}")
    if given.push_to:
        console.say(f"pushed to {result['pushed_to']}")
    console.out(given.target)
