"""Models of few network calls beside their teacher, on the embedded shapes: network calls an image, the share of
held-out prompts that come out right in all respects, and the Fréchet distance of samples to held-out pictures by two
networks.

Ways to sample the teacher are STEPSxGUIDANCE. All draw the same prompts from the same seeds; of `--draws` seeds the
table has means, and where there are several the lowest and highest share. Distances take all draws together.

    python docs/measure/few_calls.py --teacher runs/shapes-text --sampling 20x1.5 4x1.5 4x1 runs/few-4 runs/few-1
"""

import argparse
import json
from pathlib import Path

import numpy as np

import ldmcli
from ldmcli.data.shape_reading import score
from ldmcli.data.sources import open_rows
from ldmcli.evaluation.extractors import open_extractor
from ldmcli.maths.metrics import frechet_from_features

HELD_OUT = 128  # different prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="*", type=Path, help="runs of ldm distill")
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--sampling", nargs="*", default=["20x1.5", "4x1.5", "4x1"], metavar="STEPSxGUIDANCE")
    parser.add_argument("--draws", type=int, default=4, help="seeds, each of all prompts")
    parser.add_argument("--features", default="effnet-lite0,effnet-lite2")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    arguments = parser.parse_args()

    teacher = ldmcli.load(arguments.teacher)
    size = teacher.trained_size
    held = open_rows(teacher.config.data, split="validation")
    prompts = list(dict.fromkeys(held.caption(i) for i in range(len(held))))[:HELD_OUT]
    extractors = {name: open_extractor(name) for name in arguments.features.split(",")}
    real = np.stack([held.pixels(i, size, "center", (0.5, 0.5)) for i in range(len(held))])
    wanted = {name: np.asarray(one.features(real), np.float64) for name, one in extractors.items()}

    def row(name: str, model, calls: int, **how) -> dict:
        drawn = [model.sample(prompt=prompts, seed=seed, batch_size=64, **how) for seed in range(arguments.draws)]
        shares = [score([np.asarray(image) for image in images], prompts)["all"] for images in drawn]
        pixels = np.stack([np.asarray(image) for images in drawn for image in images])
        found = {"name": name, "calls": calls, "right": float(np.mean(shares)), "shares": shares}
        for network, one in extractors.items():
            found[network] = frechet_from_features(np.asarray(one.features(pixels), np.float64), wanted[network])
        spread = f" ({min(shares):.1%} to {max(shares):.1%})" if len(shares) > 1 else ""
        cells = [name, str(calls), f"{found['right']:.1%}{spread}", *(f"{found[one]:.1f}" for one in extractors)]
        print(f"| {' | '.join(cells)} |", flush=True)
        return found

    print(f"| model | calls | all right | {' | '.join(f'FD ({name})' for name in extractors)} |")
    print("|---" * (3 + len(extractors)) + "|")
    rows = []
    for way in arguments.sampling:
        steps, _, scale = way.partition("x")
        calls = int(steps) * (1 if float(scale) == 1 else 2)
        name = f"{arguments.teacher.name}, {steps} steps, guidance {scale}"
        rows.append(row(name, teacher, calls, steps=int(steps), guidance=float(scale)))
    for path in arguments.students:
        student = ldmcli.load(path)
        rows.append(row(path.name, student, student.config.distill.calls))
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
