"""What a study measures of each run: reconstructions, distance over sampling speed, rate and distortion.

Each measurement is a JSON file under a key of the weights and of how it was made, so that a study which was stopped
measures only what is missing.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldmcli.core import console, files
from ldmcli.core.errors import InputError, LdmError
from ldmcli.core.settings import DataSettings
from ldmcli.data.rows import evenly_spaced
from ldmcli.evaluation.evaluate import evaluate
from ldmcli.evaluation.extractors import Extractor, open_extractor
from ldmcli.evaluation.features import FeatureSet, extract
from ldmcli.evaluation.image_streams import check_count, model_source, rows_source, trained_size
from ldmcli.evaluation.measure import REFERENCE_LIMIT
from ldmcli.evaluation.metrics import METRICS, FeatureSets
from ldmcli.evaluation.rate_distortion import rate_distortion
from ldmcli.evaluation.reference_statistics import open_reference, reference_features
from ldmcli.evaluation.result import EvaluationResult
from ldmcli.maths.pixels import tensor_to_pixels
from ldmcli.sampling.contact_sheets import save_grid
from ldmcli.sampling.load import load

BATCH = 32
SHEET_IMAGES = 8  # reconstructions and samples that the page shows of each run
RATE_IMAGES = 32
RECONSTRUCTION_METRICS = ("fid", "is", "psnr", "ssim")
SAMPLE_METRICS = ("fid", "kid", "pr", "is")


@dataclass(frozen=True)
class Bench:
    """What every run of a study is measured by. folder: where measurements are kept."""

    folder: Path
    extractor: Extractor
    features: str | None
    n: int
    sampler: str


def open_bench(folder: Path, features: str | None, n: int, sampler: str) -> Bench:
    """Raises InputError for a feature network whose weights are not here."""
    return Bench(folder, open_extractor(features), features, n, sampler)


def _kept(path: Path, identity: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The measurement in `path`, where it was made of the same; else made and kept."""
    key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    if path.is_file():
        try:
            stored = files.read_json(path)
        except LdmError:
            stored = {}
        if stored.get("key") == key:
            return stored["found"]
    found = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {"key": key, "of": identity, "found": found})
    return found


# --- first stages ------------------------------------------------------------------------------------------------


def measure_first_stage(bench: Bench, name: str, run: Path) -> dict[str, Any]:
    """R-FID, R-IS, PSNR, SSIM and LPIPS of reconstructions (Tab. 8), and codes in use; a sheet beside it."""
    autoencoder: Any = load(run)
    folder = bench.folder / name
    identity = {"weights": autoencoder.fingerprint, "features": bench.extractor.identity, "n": bench.n, "version": 1}

    def compute() -> dict[str, Any]:
        rows, settings = _reference_rows(autoencoder.config.data, trained_size(autoencoder))
        count = min(bench.n, len(rows))
        shared = {"autoencoder": autoencoder, "data": settings, "n": count, "features": bench.features}
        try:
            found = evaluate(**shared, metrics=(*RECONSTRUCTION_METRICS, "lpips"))
        except InputError as error:
            console.say_once(f"LPIPS is left out: {error}")
            found = evaluate(**shared, metrics=RECONSTRUCTION_METRICS)
        _reconstruction_sheet(autoencoder, rows, settings, folder / "reconstructions.png")
        values = {key: value for key, value in found["metrics"].items() if value is not None}
        return {
            "metrics": values,
            "labels": found["labels"],
            "n": count,
            **_code_use(autoencoder, rows, settings, count),
        }

    return _kept(folder / "reconstructions.json", identity, compute)


def _reconstruction_sheet(autoencoder: Any, rows: Any, settings: DataSettings, path: Path) -> None:
    ids = evenly_spaced(len(rows), min(SHEET_IMAGES, len(rows)))
    real = [rows.pixels(i, settings.size, "center", (0.5, 0.5)) for i in ids]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_grid(path.with_name("originals.png"), [real])
    save_grid(path, [list(_through(autoencoder, np.stack(real)))])


def _through(autoencoder: Any, pixels: np.ndarray) -> np.ndarray:
    return tensor_to_pixels(autoencoder.decode(autoencoder.encode(pixels)))


def _code_use(autoencoder: Any, rows: Any, settings: DataSettings, n: int) -> dict[str, Any]:
    """Of a VQ first stage: the share of codes that n images use, and their perplexity; {} of others."""
    if not autoencoder.network.is_vq:
        return {}
    counts = np.zeros(autoencoder.network.settings.codebook_size)
    ids = evenly_spaced(len(rows), n)
    for start in range(0, n, BATCH):
        block = [rows.pixels(i, settings.size, "center", (0.5, 0.5)) for i in ids[start : start + BATCH]]
        indices = autoencoder.quantize(autoencoder.moments(np.stack(block)))[1]
        counts += np.bincount(indices.flatten().cpu().numpy(), minlength=len(counts))
    shares = counts[counts > 0] / counts.sum()
    return {"codes_used": float((counts > 0).mean()), "perplexity": float(np.exp(-(shares * np.log(shares)).sum()))}


# --- diffusion models --------------------------------------------------------------------------------------------


def measure_sampling(bench: Bench, name: str, model: Any, steps: int, seed: int = 0) -> dict[str, Any]:
    """n samples in so many steps: images a second (network and decoder, on this machine), and how far they are from
    held-out images. The first images stay as a sheet."""
    folder = bench.folder / name
    protocol = {"n": bench.n, "steps": steps, "sampler": bench.sampler, "seed": seed, "version": 1}
    identity = {"weights": model.fingerprint, "features": bench.extractor.identity, **protocol}

    def compute() -> dict[str, Any]:
        rows, settings = _reference_rows(model.config.data, model.trained_size)
        chosen = {"sampler": bench.sampler, "steps": steps}
        draw = {"seed": seed, "batch_size": BATCH, "size": model.trained_size, "settings": chosen}
        source = model_source(model, rows, bench.n, **draw)
        with console.progress(bench.n, f"{name}, {steps} steps") as bar:
            started, images = time.perf_counter(), []
            for image in source.stream():
                images.append(image)
                bar.advance(1)
            seconds = time.perf_counter() - started
        folder.mkdir(parents=True, exist_ok=True)
        save_grid(folder / f"samples-{steps}.png", [images[:SHEET_IMAGES]])
        found = _set_metrics(bench, images, rows, settings)
        return {"images_per_s": bench.n / seconds, "metrics": found.values, "labels": found.labels, **protocol}

    return _kept(folder / f"steps-{steps}.json", identity, compute)


def measure_rate_distortion(bench: Bench, name: str, model: Any) -> list[dict[str, float]]:
    """The curve of Fig. 2: bits a dimension against the error of pixels, from noise to clean latents."""
    identity = {"weights": model.fingerprint, "n": RATE_IMAGES, "version": 2}

    def compute() -> dict[str, Any]:
        rows, _ = _reference_rows(model.config.data, model.trained_size)
        return {"levels": [asdict(level) for level in rate_distortion(model, rows, n=min(RATE_IMAGES, len(rows)))]}

    return _kept(bench.folder / name / "rate-distortion.json", identity, compute)["levels"]


def _reference_rows(data: DataSettings, size: tuple[int, int]) -> tuple[Any, DataSettings]:
    """Held-out rows; of a set that has fewer than two, as `ldm eval-fid` does, the training's."""
    settings = replace(data, size=size)
    rows = open_reference(settings, "validation")[0]
    if len(rows) >= 2:
        return rows, settings
    console.warn_once(
        "study-reference", f"{rows.source}: too few images are held out; its training images are measured"
    )
    return open_reference(settings, "train")[0], settings


def _set_metrics(bench: Bench, images: list[np.ndarray], rows: Any, settings: DataSettings) -> EvaluationResult:
    """Distances of a set of images to all held-out rows."""
    extractor, result = bench.extractor, EvaluationResult()
    count = min(len(rows), REFERENCE_LIMIT)
    source = rows_source(rows, settings, evenly_spaced(len(rows), check_count(len(rows), count, rows.source)))
    reference: FeatureSet = reference_features((extractor,), source, lambda done: None, REFERENCE_LIMIT)[0]
    sets = FeatureSets(extract(images, extractor), reference, extractor)
    for name in SAMPLE_METRICS:
        metric = METRICS[name]
        result.add_scores(metric.compute(sets), metric.labels(name), (extractor.suffix, extractor.title))
    return result
