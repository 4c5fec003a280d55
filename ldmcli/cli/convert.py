"""`ldm convert`: models of others in, runs out."""

from pathlib import Path

from ldmcli.cli import options as opt
from ldmcli.cli.parsing import MODEL, OUTPUT, ParsedOptions, Text, argument, command, option
from ldmcli.core import console
from ldmcli.core.errors import UsageError

Source = argument(str, "SRC", "Checkpoint (.ckpt, .safetensors), diffusers folder, hub id, or run.")
Target = argument(Path, "DST", "Folder to write; with --to compvis a .ckpt or .safetensors file.")
To = option(
    Text, "--to", ("run", "compvis", "diffusers"), "Format to write.", panel=OUTPUT, default="run; a run has to say"
)
Config = option(
    Path | None,
    "--config",
    "FILE.yaml",
    "Configuration of a CompVis checkpoint.",
    panel=MODEL,
    default="the one beside it, else by shapes",
)
Heads = option(
    str,
    "--heads",
    "legacy|config|N",
    "Attention heads of a CompVis UNet where its weights fit several numbers: legacy is one.",
    panel=MODEL,
    value="",
    default="as published, else as the YAML says",
)
Tokenizer = option(
    Path | None,
    "--tokenizer",
    "DIR",
    "Tokenizer folder for a text model that comes without.",
    panel=MODEL,
    default="beside it, else the hub's",
)
Part = option(
    Text, "--part", ("first-stage",), "Take the autoencoder of a checkpoint alone.", panel=MODEL, default="everything"
)
Weights = option(
    str,
    "--weights",
    ("ema", "raw"),
    "Averaged weights where there are any, or those of the last step.",
    panel=MODEL,
    value="ema",
    default="ema",
)

PushTo = option(
    Text,
    "--push-to",
    "HUB_ID",
    "Upload the folder written to the hub, with its model card.",
    panel=OUTPUT,
    default="none",
)


@command(
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
def convert(given: ParsedOptions) -> None:
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
    kinds = " + ".join(result["conditions"])
    model = f"a diffusion model conditioned on {kinds}" if kinds else "an unconditional diffusion model"
    what = model if result["kind"] == "diffusion" else "an autoencoder"
    counts = ", ".join(f"{name} {count:,}" for name, count in result["parameters"].items())
    console.say(f"read {given.source}: {what}, parameters: {counts}")
    for note in result["notes"]:
        console.say(f"  {note}")
    if given.push_to:
        console.say(f"pushed to {result['pushed_to']}")
    console.out(given.target)
