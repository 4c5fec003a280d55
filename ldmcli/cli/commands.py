"""The table of commands: where each lies, what the help pages say of it, and an example that can be run."""

import re
import shlex

_TRAIN, _USE, _LOOK = "Train", "Use and measure", "Look"
# name → module in this package (the function is named after the command), summary, panel
COMMANDS: dict[str, tuple[str, str, str]] = {
    "train-ae": ("train", "Train an autoencoder: images to latents and back.", _TRAIN),
    "train-ldm": ("train", "Train a diffusion model in an autoencoder's latents.", _TRAIN),
    "train-classifier": ("train", "Train a classifier of noisy latents, for guidance.", _TRAIN),
    "distill": ("train", "Make a model of 1 to 4 network calls of a trained one.", _TRAIN),
    "demo": ("manage", "The whole chain, on embedded shapes or your own images.", _TRAIN),
    "study": ("study", "Compare first stages, or settings, at equal training.", _TRAIN),
    "sample": ("generate", "Draw images with a trained model.", _USE),
    "inpaint": ("edit", "Repaint a part of a picture; known pixels stay.", _USE),
    "upscale": ("edit", "Make pictures larger.", _USE),
    "reconstruct": ("generate", "Images through an autoencoder, side by side, with PSNR.", _USE),
    "eval-fid": ("measure", "Metrics of generated images: FID, KID, precision, PSNR, …", _USE),
    "ab": ("studies", "Let people choose between two methods, blind, on one page.", _USE),
    "neighbours": ("studies", "The nearest training pictures of each sample.", _USE),
    "convert": ("convert", "Models of CompVis and diffusers to runs, and back.", _USE),
    "data": ("manage", "What ldm sees in a data set: columns, sizes, bad files.", _LOOK),
    "report": ("manage", "Write the report of a run again.", _LOOK),
    "runs": ("manage", "List runs with kind, data, step and metric.", _LOOK),
    "recipes": ("manage", "List the recipes that come with ldm.", _LOOK),
    "presets": ("manage", "List presets, such as the paper's networks.", _LOOK),
    "bench": ("bench", "How fast models train, sample and decode on this machine.", _LOOK),
    "doctor": ("manage", "Check this machine: versions, devices, memory, disk.", _LOOK),
}

# One runnable line a command. Help shows it and a test runs it, in this order: later lines use what earlier ones wrote.
_EXAMPLES = """
train-ae --f 4 --reg kl --size 32 --steps 20 --out runs/shapes-ae
train-ldm --autoencoder runs/shapes-ae --condition text --steps 20 --out runs/shapes-text
sample --model runs/shapes-text --prompt "a red circle on a navy background" -n 4 --steps 20 --out outputs/circles
train-classifier --model runs/shapes-text --steps 20 --out runs/shapes-classifier
distill runs/shapes-text --calls 4 --steps 20 --out runs/shapes-text-4
inpaint outputs/circles/000000.png --box 8,8,12,10 --model runs/shapes-text -n 2 --steps 20 --out outputs/repainted
upscale outputs/circles/000000.png --scale 4 --model runs/shapes-x4 --steps 20 --out outputs/larger
reconstruct outputs/circles --autoencoder runs/shapes-ae --out outputs/pairs
eval-fid --model runs/shapes-text --features effnet-lite0 -n 64 --steps 5
ab outputs/circles outputs/circles -n 4 --out outputs/which.html
neighbours --model runs/shapes-text --limit 40 -n 2 -k 3 --steps 5 --features effnet-lite0
convert runs/shapes-text outputs/shapes-text-diffusers --to diffusers
data shapes --limit 200 --out outputs/shapes
report runs/shapes-text
runs
demo --minutes 10 --out runs/demo
study --f 4,8 --size 32 --steps 20 --sampling-steps 2,4 -n 16 --eval-samples 0 --out runs/shapes-study
recipes
presets
bench --batch-size 2 --steps 2 --seconds 0.2
doctor
"""
EXAMPLES = {words[0]: words for words in map(shlex.split, _EXAMPLES.strip().splitlines())}


def example_line(command: str) -> str:
    """The example of a command as people type it; double quotes, since a prompt often has an apostrophe."""
    words = (
        f'"{word}"' if re.search(r"\s", word) and '"' not in word else shlex.quote(word) for word in EXAMPLES[command]
    )
    return "ldm " + " ".join(words)
