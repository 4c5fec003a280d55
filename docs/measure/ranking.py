"""Does MIND of few samples rank checkpoints as the Fréchet distance of many does?

Each model draws n samples once. The Fréchet distance of all n against all training pictures is the yardstick; MIND, the
Fréchet distance and KID of each block of --few samples against as many training pictures are ranked against it
(Spearman's correlation), a value for each block.

    python docs/measure/ranking.py runs/six@100 runs/six@200 runs/six@400 --data emoji64 -n 7000 --few 1000
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

import ldmcli
from ldmcli.core.allocator import keep_freed_memory
from ldmcli.core.settings import DataSettings
from ldmcli.data.sources import open_rows
from ldmcli.evaluation.extractors import open_extractor
from ldmcli.evaluation.features import extract
from ldmcli.maths.metrics import metrics_from_features

BLOCK = 100
METRICS = {"mind": "MIND", "fid": "FD", "kid_mean": "KID"}


def kept(path: Path, images, networks: dict) -> dict[str, np.ndarray]:
    """Features of images by network, from `path` where they were extracted before. images: gives blocks of uint8."""
    if path.is_file():
        with np.load(path) as file:
            return dict(file)
    found: dict[str, list[np.ndarray]] = {name: [] for name in networks}
    for block in images():
        for name, extractor in networks.items():
            found[name].append(extract(block, extractor).features)
    joined = {name: np.concatenate(parts) for name, parts in found.items()}
    np.savez(path, allow_pickle=False, **joined)
    return joined


def samples(run: str, n: int, steps: int, seed: int):
    """Blocks of n unconditional samples."""
    model = ldmcli.load(run)
    for first in range(0, n, BLOCK):
        count = min(BLOCK, n - first)
        yield [np.asarray(image) for image in model.sample(n=first + count, first=first, seed=seed, steps=steps)]


def training_pictures(data: str, size: int):
    """Blocks of all training pictures."""
    rows = open_rows(DataSettings(source=data, size=(size, size)), split="train")
    for first in range(0, len(rows), BLOCK):
        ids = range(first, min(first + BLOCK, len(rows)))
        yield [rows.pixels(i, (size, size), "center", (0.5, 0.5)) for i in ids]


def ranking(models: list[dict[str, np.ndarray]], real: dict[str, np.ndarray], few: int, name: str) -> dict:
    """The yardstick by model, and each metric by block of few samples with its correlation."""
    order = np.random.default_rng(0).permutation(len(real[name]))
    yardstick = [metrics_from_features(one[name], real[name], ["fid"])["fid"] for one in models]
    blocks = min(len(models[0][name]), len(real[name])) // few
    table: dict = {"network": name, "yardstick": yardstick, "metrics": {}}
    for metric, label in METRICS.items():
        values, correlations = [], []
        for k in range(blocks):
            part = slice(k * few, (k + 1) * few)
            reference = real[name][order[part]]
            kind = metric.partition("_")[0]
            row = [
                metrics_from_features(one[name][part], reference, [kind], kid_subset_size=min(few, 1000))[metric]
                for one in models
            ]
            values.append(row)
            correlations.append(float(spearmanr(row, yardstick).statistic))
        table["metrics"][label] = {"values": values, "spearman": correlations}
    return table


def show(table: dict, runs: list[str], few: int) -> None:
    print(f"\n{table['network']}: FD of all samples: {'  '.join(f'{value:.4g}' for value in table['yardstick'])}")
    for label, found in table["metrics"].items():
        mean = np.mean(found["values"], axis=0)
        print(f"  {label} of {few}, mean over {len(found['values'])}: {'  '.join(f'{value:.4g}' for value in mean)}")
        shown = "  ".join(f"{value:.3f}" for value in found["spearman"])
        print(f"  {label}: Spearman {shown}; lowest {min(found['spearman']):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN@STEP")
    parser.add_argument("--data", required=True)
    parser.add_argument("--features", default="effnet-lite0,effnet-lite2")
    parser.add_argument("-n", type=int, default=7000)
    parser.add_argument("--few", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10, help="network calls a sample")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--pixels", type=int, help="side of what the network sees, where not its own: less time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/ranking"), help="where features are kept")
    given = parser.parse_args()
    keep_freed_memory()
    given.out.mkdir(parents=True, exist_ok=True)
    networks = {name: open_extractor(name) for name in given.features.split(",")}
    if given.pixels:
        networks = {
            name: replace(one, network=replace(one.network, size=given.pixels)) for name, one in networks.items()
        }
    real = kept(given.out / "training.npz", lambda: training_pictures(given.data, given.size), networks)
    models = []
    for run in given.runs:
        path = given.out / f"{run.replace('/', '_')}-{given.n}-{given.steps}-{given.seed}.npz"
        models.append(kept(path, lambda run=run: samples(run, given.n, given.steps, given.seed), networks))
        print(f"{run}: {given.n} samples", flush=True)
    tables = [ranking(models, real, given.few, name) for name in networks]
    for table in tables:
        show(table, given.runs, given.few)
    (given.out / "ranking.json").write_text(json.dumps(tables, indent=1))
