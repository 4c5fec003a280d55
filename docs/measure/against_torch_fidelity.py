"""The Fréchet distance of two folders by `ldm eval-fid` and by torch-fidelity, with one Inception of random weights.

    python docs/measure/against_torch_fidelity.py --images 1000 --turns 1 --memory 1000 10000

Pictures are of the embedded shapes, at 64 px. In turns: torch-fidelity, `ldm` with an empty cache, `ldm` with the
reference in its cache; each is a process of its own. Printed: distance, seconds, peak memory, then the ratios, and the
distance of torch-fidelity's statistics with the root of their covariances in float64: with fewer images than features
the covariances are singular, and there its own root is not exact.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

THEIRS = """
import json, sys
import numpy as np
from torch_fidelity import calculate_metrics, metric_fid
first, second, weights, statistics = sys.argv[1:]
distance = metric_fid.fid_statistics_to_metric
def kept(a, b, verbose):
    np.savez(statistics, mu1=a["mu"], sigma1=a["sigma"], mu2=b["mu"], sigma2=b["sigma"])
    return distance(a, b, verbose)
metric_fid.fid_statistics_to_metric = kept
found = calculate_metrics(input1=first, input2=second, fid=True, cuda=False, cache=False, verbose=False,
                          feature_extractor_weights_path=weights)
print(json.dumps(found["frechet_inception_distance"]))
"""


def write_pictures(folder: Path, count: int, first: int) -> Path:
    """`count` rows of the embedded shapes from row `first` on, as PNG files of 64 px."""
    from PIL import Image

    from ldmcli.core.settings import DataSettings
    from ldmcli.data.sources import open_rows

    rows = open_rows(DataSettings(source="shapes", size=(64, 64)), split="train")
    folder.mkdir()
    for k in range(count):
        picture = rows.pixels((first + k) % len(rows), (64, 64), "center", (0.5, 0.5))
        Image.fromarray(picture).save(folder / f"{k:06d}.png")
    return folder


def write_weights(path: Path) -> Path:
    """An Inception of random weights (seed 0) under the names that torch-fidelity gives them."""
    import torch

    from ldmcli.networks.feature_nets import InceptionV3

    torch.manual_seed(0)
    net = InceptionV3()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.05, 0.2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    torch.save(net.state_dict(), path)
    return path


def turn(name: str, words: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Runs a command, prints what it took, and gives its distance, seconds and peak memory in MB."""
    started = time.perf_counter()
    process = subprocess.Popen(words, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    text = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{name}: ended with {os.waitstatus_to_exitcode(status)}")
    found = json.loads(text)
    distance = found["metrics"][found["frechet"]] if isinstance(found, dict) else found
    memory = usage.ru_maxrss / 1e3
    print(f"{name:16} FID {distance:.6f}  {seconds:8.1f} s  {memory:7.0f} MB", flush=True)
    return {"distance": distance, "seconds": seconds, "memory": memory}


def exact_distance(statistics: Path) -> float:
    """The Fréchet distance of two Gaussians in a file."""
    import numpy as np

    from ldmcli import frechet

    with np.load(statistics) as found:
        return frechet(*(found[name] for name in ("mu1", "sigma1", "mu2", "sigma2")))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=1000, help="pictures in each folder")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--memory", type=int, nargs="*", default=[], help="numbers of images to compare peak memory at")
    parser.add_argument("--memory-features", default="effnet-lite0", help="network of that comparison")
    given = parser.parse_args()
    threads = {"OMP_NUM_THREADS": str(given.cores)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        weights = write_weights(folder / "inception.pth")
        made = write_pictures(folder / "made", given.images, 0)
        real = write_pictures(folder / "real", given.images, given.images)

        def ours(name: str, images: Path, features: str, cache: Path) -> dict[str, float]:
            words = [sys.executable, "-m", "ldmcli", "eval-fid", "--images", str(images), "--data", str(real)]
            words += ["--split", "all", "--metrics", "fid", "--features", features, "--json"]
            return turn(name, words, threads | {"LDM_CACHE": str(cache)})

        found: dict[str, list[dict[str, float]]] = {"theirs": [], "cold": [], "cached": []}
        for k in range(given.turns):
            words = [sys.executable, "-c", THEIRS, str(made), str(real), str(weights), str(folder / "theirs.npz")]
            found["theirs"].append(turn("torch-fidelity", words, threads))
            for name in ("cold", "cached"):
                found[name].append(ours(f"ldm, {name}", made, str(weights), folder / f"cache {k}"))
        if given.turns:
            theirs, own = found["theirs"][0]["distance"], found["cold"][0]["distance"]
            times = {name: median(one["seconds"] for one in turns) for name, turns in found.items()}
            print(f"relative difference {abs(own - theirs) / theirs:.1e} (goal 1e-4)")
            exact = exact_distance(folder / "theirs.npz")
            print(f"their statistics, exact root: FID {exact:.6f}, relative difference {abs(own - exact) / exact:.1e}")
            print(f"times as fast, cold {times['theirs'] / times['cold']:.2f} (goal 1.5)")
            print(f"times as fast, reference cached {times['theirs'] / times['cached']:.2f} (goal 3)")
        for count in given.memory:
            images = write_pictures(folder / f"{count} images", count, 2 * given.images)
            ours(f"ldm, {count:,}", images, given.memory_features, folder / "cache of memory")


if __name__ == "__main__":
    main()
