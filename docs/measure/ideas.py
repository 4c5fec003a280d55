"""Variants of a training side by side: equal first stage, equal steps or minutes, several seeds, one row a variant.

A variant is a name and settings; the first is what the others are compared with. Each is trained by `ldm train-ldm`
(finished runs are kept, so that the command goes on where it ended), then measured: the validation loss; on the
embedded shapes the share of held-out prompts that come out right in all respects, by sampling steps and guidance; on
other data the Fréchet distance and MIND of n samples by each network of features.

    python docs/measure/ideas.py --data shapes --size 32 --autoencoder runs/ae --steps 400 --seeds 0,1,2 \\
        --sampling 4x1 12x1.5 plain "more noise: diffusion.t_mean=0.8"
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

import ldmcli
from ldmcli.core import runs
from ldmcli.data.shape_reading import score
from ldmcli.data.sources import open_rows

HELD_OUT = 128  # prompts
NEVER = 1_000_000
RESPECTS = ("all", "position", "shape", "colour", "background", "count")


def train(arguments: argparse.Namespace, settings: list[str], seed: int, out: Path) -> None:
    """One run; nothing where it is finished."""
    if runs.is_run(out) and runs.read_run(out).get("state") == "finished":
        return
    command = [sys.executable, "-m", "ldmcli", "train-ldm", "--data", arguments.data, "--autoencoder"]
    command += [arguments.autoencoder, "--condition", arguments.condition, "--seed", str(seed), "--out", str(out)]
    if arguments.size:
        command += ["--size", str(arguments.size)]
    quiet = {"eval_every": 0, "sample_every": 0, "save_every": 200, "log_every": 50}
    bound = {"max_minutes": arguments.minutes, "steps": NEVER} if arguments.minutes else {"steps": arguments.steps}
    mine = [f"train.{name}={value}" for name, value in {**quiet, **bound}.items()]
    for setting in [*mine, *arguments.set, *settings]:
        command += ["--set", setting]
    subprocess.run([*command, "--quiet"], check=True)


def obedience(run: Path, steps: int, guidance: float, draws: int) -> dict[str, float]:
    """Shares of HELD_OUT different held-out prompts that come out right, by respect; means of so many draws."""
    model = ldmcli.load(run)
    held = open_rows(model.config.data, split="validation")
    prompts = list(dict.fromkeys(held.caption(i) for i in range(len(held))))[:HELD_OUT]
    found = []
    for seed in range(draws):
        drawn = model.sample(prompt=prompts, seed=seed, steps=steps, guidance=guidance, batch_size=64)
        found.append(score(np.stack([np.asarray(image) for image in drawn]), prompts))
    return {name: float(np.mean([one[name] for one in found])) for name in RESPECTS}


def distances(arguments: argparse.Namespace, run: Path, steps: int, guidance: float) -> dict[str, float]:
    """Fréchet distance of n samples to the validation rows, by network."""
    command = [sys.executable, "-m", "ldmcli", "eval-fid", "--model", str(run), "--features", arguments.features]
    command += ["-n", str(arguments.n), "--steps", str(steps), "--guidance", str(guidance), "--metrics", "fid,mind"]
    answer = json.loads(subprocess.run([*command, "--json"], check=True, stdout=subprocess.PIPE, text=True).stdout)
    return {name: value for name, value in answer["metrics"].items() if re.match("(fd|mind)_", name)}


def measured(arguments: argparse.Namespace, run: Path) -> dict[str, float]:
    """All that stands in a row, of one run; kept beside it."""
    path = run / "ideas.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    record = runs.read_run(run)
    known["steps"], known["validation loss"] = record["step"], record["metrics"]["val_loss"]
    for spec in arguments.sampling:
        if f"{spec} done" in known:
            continue
        steps, guidance = spec.split("x")
        shapes = arguments.data.partition(":")[0] == "shapes"
        at = (run, int(steps), float(guidance))
        found = obedience(*at, arguments.draws) if shapes else distances(arguments, *at)
        known |= {f"{spec} {name}": value for name, value in found.items()}
        known[f"{spec} done"] = 1
        path.write_text(json.dumps(known, indent=1))
    return {name: value for name, value in known.items() if not name.endswith(" done")}


def cell(values: list[float]) -> str:
    """Mean, and in parentheses the lowest and highest of several seeds."""
    mean = f"{np.mean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4g} to {max(values):.4g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", help='"NAME: SETTING=VALUE SETTING=VALUE …"')
    parser.add_argument("--data", default="shapes")
    parser.add_argument("--size", type=int, default=0)
    parser.add_argument("--condition", default="text")
    parser.add_argument("--autoencoder", required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--set", action="append", default=[], help="a setting of all variants")
    parser.add_argument("--sampling", nargs="+", default=["4x1", "12x1.5"], help="STEPSxGUIDANCE")
    parser.add_argument("--draws", type=int, default=1, help="of shapes: times that the held-out prompts are sampled")
    parser.add_argument("--features", default="effnet-lite0,effnet-lite2")
    parser.add_argument("-n", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("runs/ideas"))
    arguments = parser.parse_args()
    rows = {}
    for variant in arguments.variants:
        name, _, settings = variant.partition(":")
        found = []
        for seed in map(int, arguments.seeds.split(",")):
            run = arguments.out / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-seed{seed}"
            train(arguments, settings.split(), seed, run)
            found.append(measured(arguments, run))
            print(run.name, json.dumps(found[-1]), file=sys.stderr, flush=True)
        rows[name] = {key: [one[key] for one in found] for key in found[0]}
    columns = list(next(iter(rows.values())))
    print("| variant | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(cell(row[column]) for column in columns) + " |")


if __name__ == "__main__":
    main()
