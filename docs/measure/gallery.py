"""A gallery that nobody picked: every prompt (column) with every seed from 0 on (row), as the model draws them.

    python docs/measure/gallery.py ldm-emoji --seeds 4 --out docs/box-gallery.png

The model is a run, or what `ldm convert` reads, or `ldm-emoji`; steps, sampler and guidance are its own unless they are
given. Prompts come from --prompt (repeatable), or a file of one a line (--prompts), or are those below. Printed: the
prompts in the order of the columns, and seconds.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from ldmcli import load
from ldmcli.core.allocator import keep_freed_memory
from ldmcli.sampling.contact_sheets import save_grid

PROMPTS = (
    "a red apple",
    "a heart",
    "a house",
    "a cat",
    "a grinning face",
    "the flag of Norway",
    "a bullet train",
    "a green tree",
)


def rows_of(model, prompts: list[str], seeds: range, settings: dict) -> list[list[np.ndarray]]:
    """A row of pictures a seed, a column a prompt; uint8 (H, W, 3)."""
    return [[np.asarray(one) for one in model.sample(prompt=prompts, seed=seed, **settings)] for seed in seeds]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--prompt", action="append")
    parser.add_argument("--prompts", type=Path, help="a file of prompts, one a line")
    parser.add_argument("--seeds", type=int, default=4, help="rows: seeds 0, 1, …")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--out", type=Path, default=Path("gallery.png"))
    given = parser.parse_args()
    keep_freed_memory()
    lines = given.prompts.read_text(encoding="utf-8").splitlines() if given.prompts else ()
    prompts = [*(given.prompt or ()), *(line for line in lines if line.strip())] or list(PROMPTS)
    settings = {name: value for name in ("steps", "guidance") if (value := getattr(given, name)) is not None}
    begun = time.perf_counter()
    save_grid(given.out, rows_of(load(given.model), prompts, range(given.seeds), settings))
    print("; ".join(f'"{prompt}"' for prompt in prompts))
    print(f"{len(prompts) * given.seeds} pictures in {time.perf_counter() - begun:.0f} s: {given.out}")


if __name__ == "__main__":
    main()
