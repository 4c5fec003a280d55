"""Metrics of images against a reference, with the protocol that gives each number its meaning.

The result is one dict, `ldm eval-fid --json` prints it. Metric names carry their extractor (`fid_inception2048`,
`fd_effnet_lite0`, `kid_effnet_lite0_mean`); `lookup` finds them by their short names.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ldmcli import __version__
from ldmcli.core import console
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import DataSettings
from ldmcli.evaluation.baselines import guided_sources, task_of, task_sources
from ldmcli.evaluation.compare import compare, lookup, read_result, with_comparison
from ldmcli.evaluation.condition_fidelity import KINDS as OBEDIENCE_METRICS
from ldmcli.evaluation.condition_fidelity import measure as measure_obedience
from ldmcli.evaluation.features import (
    Collector,
    Extractor,
    FeatureSet,
    default_features,
    extract,
    in_blocks,
    open_extractor,
)
from ldmcli.evaluation.image_streams import (
    ImageStream,
    check_count,
    evenly_spaced,
    first_size,
    loaded,
    model_source,
    open_images,
    paired_sources,
    reconstructions,
    rows_source,
    sampling_facts,
    trained_size,
)
from ldmcli.evaluation.reference_statistics import (
    ALL,
    Statistics,
    gaussian,
    open_reference,
    read_statistics,
    reference_features,
)
from ldmcli.maths.metrics import frechet, frechet_from_features, inception_score, kid, precision_recall, psnr, ssim
from ldmcli.maths.pixels import pixels_to_tensor
from ldmcli.networks.perceptual import perceptual_net

__all__ = ["METRICS", "compare", "evaluate", "lookup", "pair_values", "reconstruction_metrics"]

SET_METRICS = ("fid", "kid", "is", "pr")  # of two sets of features
PAIR_METRICS = ("psnr", "ssim", "lpips")  # of pairs of images
METRICS = SET_METRICS + PAIR_METRICS + OBEDIENCE_METRICS  # the last: of pictures and what they were told
REFERENCE_LIMIT = 10_000  # rows of a data set that a reference takes
GENERATED_LIMIT = 1_000  # images that a model draws where nobody says how many
KID = {"subsets": 100, "subset_size": 1000, "seed": 2020, "kernel": "(x.y/D + 1)^3, unbiased"}
IS_SPLITS = 10
NEIGHBOURS = 3
BLOCK = 16
BATCH = 32
DEFAULT_METRICS = {
    "model": ("fid",),
    "images": ("fid",),
    "pairs": ("psnr", "ssim"),
    "autoencoder": ("fid", "psnr", "ssim"),
    "task": ("fid", "psnr", "ssim"),
}


@dataclass
class _Run:
    """One evaluation under way: what measures, what was measured, and what has to be said of it."""

    metrics: tuple[str, ...]
    extractor: Extractor | None
    perceptual: Any
    progress: Callable[[int, str], Any]
    values: dict[str, float | None] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def put(self, key: str, label: str, value: float | None) -> None:
        self.values[key], self.labels[key] = value, label


def evaluate(
    *,
    model=None,
    autoencoder=None,
    images=None,
    data=None,
    split: str = "validation",
    pairs=None,
    metrics: Sequence[str] | None = None,
    features: str | None = None,
    n: int | None = None,
    seed: int | None = 0,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    temperature: float | None = None,
    batch_size: int | None = None,
    size: tuple[int, int] | None = None,
    perceptual: str = "",
    weights: str = "ema",
    guide_factor: int | None = None,
    compare: str | Path | dict | None = None,
    progress: Callable[[int, str], Any] | None = None,
) -> dict[str, Any]:
    """Metrics of exactly one of: a model's samples, an autoencoder's reconstructions, images, or pairs of images.

    model, autoencoder: a run folder or what `load` gave. images: a folder or .npz. pairs: two folders (or .npz).
    data: reference; `DataSettings`, a data set's name, an .npz of samples or of statistics (mu, sigma); None = the
    data that the model was trained on. metrics: of `METRICS`; None = fid, of pairs psnr and ssim, of an autoencoder
    and of models of task sr and inpaint all three. layout and map: of models that are told those. weights: "ema" or
    "raw", of a model named by its run. guide_factor: lead sample k to row k made this many times smaller and compare
    the two (Tab. 4); for models without a task. n: images to measure; None = all, of a model at most 1,000. compare: an
    earlier result.
    Raises UsageError for requests without sense and InputError for missing weights, images or captions,
    before anything is generated.
    """
    started = time.monotonic()
    subjects = {"model": model, "autoencoder": autoencoder, "images": images, "pairs": pairs}
    subject, facts = _subject(subjects), {}
    _check_names(metrics or ())
    if subject == "model":
        if isinstance(model, (str, Path)):
            model = loaded(model, "diffusion", weights)
            facts["weights"] = weights if model.config.train.ema else "raw"
        model = loaded(model, "diffusion")
        subject = "model" if task_of(model) == "generate" and guide_factor is None else "task"
    elif guide_factor is not None:
        raise UsageError("--guide-factor: leads a model's samples; use it with --model")
    metrics = tuple(metrics or DEFAULT_METRICS[subject])
    _check_request(subject, metrics, data, n, model)
    earlier = read_result(compare)
    run = _begin(metrics, features, perceptual, progress)
    run.facts |= facts
    if pairs is not None:
        generated, reference = _of_pairs(run, pairs, n)
    elif autoencoder is not None:
        generated, reference = _of_autoencoder(run, autoencoder, data, split, n, size, batch_size or BATCH)
    else:
        chosen = {"steps": steps, "guidance": guidance, "sampler": sampler, "temperature": temperature}
        chosen = {key: value for key, value in chosen.items() if value is not None}
        draw = {"seed": seed or 0, "batch_size": batch_size or BATCH, "settings": chosen}
        of_task, of_sets = partial(_of_task, guide_factor=guide_factor), partial(_of_sets, images=images)
        measure = of_task if subject == "task" else of_sets
        generated, reference = measure(run, model, data=data, split=split, n=n, size=size, draw=draw)
    result = _document(run, generated, reference, time.monotonic() - started)
    return result if earlier is None else with_comparison(result, earlier)


def _subject(subjects: dict[str, Any]) -> str:
    given = [name for name, value in subjects.items() if value is not None]
    if len(given) != 1:
        raise UsageError(
            f"measure one of --model, --autoencoder, --images and --pairs (got {' and '.join(given) or 'none'})"
        )
    return given[0]


def _check_names(metrics: Sequence[str]) -> None:
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise UsageError(f"--metrics {unknown[0]}: choose among {', '.join(METRICS)}")


def _check_request(subject: str, metrics: Sequence[str], data: Any, n: int | None, model: Any) -> None:
    for name in metrics:
        if name in OBEDIENCE_METRICS and (model is None or name not in model.model.conditions.kinds):
            raise UsageError(
                f"--metrics {name}: measures whether a model obeys its {name}; "
                + (
                    f"use --model with one that was trained with --condition {name}"
                    if model is None
                    else f"this model was trained without {name}"
                )
            )
    paired = [name for name in metrics if name in PAIR_METRICS]
    if paired and subject in ("model", "images"):
        raise UsageError(
            f"--metrics {paired[0]}: compares image with image; use --autoencoder, --pairs, "
            "--guide-factor, or a model of task sr or inpaint"
        )
    if subject == "images" and data is None and set(metrics) != {"is"}:
        raise UsageError("--images: name the reference with --data")
    if (
        subject in ("model", "task")
        and _is_npz(data)
        and model.model.conditions.kinds
        and (subject == "task" or set(metrics) & set(OBEDIENCE_METRICS))
    ):
        raise UsageError(f"--data {data}: holds no conditions; name a data set")
    if n is not None and n < 2 and set(metrics) & set(SET_METRICS):
        raise InputError(f"-n {n}: a distribution needs at least 2 images")


def _begin(metrics: tuple[str, ...], features: str | None, perceptual: str, progress) -> _Run:
    """Opens everything that could be missing."""
    extractor = open_extractor(features) if set(metrics) & set(SET_METRICS) else None
    net = None
    if "lpips" in metrics:
        net = perceptual_net(perceptual)
    run = _Run(metrics, extractor, net, progress or (lambda total, label: nullcontext(_Quiet())))
    if extractor is not None and features is None and default_features() != "inception":
        run.warnings.append(
            f"{extractor.display}, not FID: Inception's weights are not here "
            "(--features inception gets them, or says where to put them)"
        )
    if extractor is not None and not extractor.known:
        run.warnings.append(
            f"weights of {extractor.name} are not known (SHA-256 {extractor.sha256[:12]}): "
            "numbers of others do not compare"
        )
    return run


class _Quiet:
    def advance(self, n: int = 1, **fields) -> None:
        pass


# --- who is measured against what ------------------------------------------------------------------------------


def _of_pairs(run: _Run, pairs: Sequence[Any], n: int | None) -> tuple[FeatureSet, FeatureSet]:
    first, second = paired_sources(Path(pairs[0]), Path(pairs[1]), n)
    return _paired(run, first, second)


def _of_autoencoder(run: _Run, autoencoder, data, split: str, n: int | None, size, batch_size: int):
    autoencoder = loaded(autoencoder, "autoencoder")
    size = size or trained_size(autoencoder)
    source = _original(run, _own_data(autoencoder, data), split, n, size, autoencoder)
    facts = {
        **source.facts,
        "autoencoder": autoencoder.fingerprint,
        "float_to_uint8": "clamp, round half to even",
        "latent": "mode of the posterior",
    }
    made = replace(
        source, name="reconstructions", facts=facts, key="", stream=reconstructions(autoencoder, source, batch_size)
    )
    return _paired(run, made, source)


def _original(run: _Run, data, split: str, n: int | None, size, model: Any) -> ImageStream:
    if _is_npz(data):
        return open_images(data, n)
    rows, settings = _rows(run, data, split, size, model)
    count = _limited(run, rows) if n is None else check_count(len(rows), n, f"{rows.source} ({rows.split})")
    return rows_source(rows, settings, evenly_spaced(len(rows), count))


def _of_task(
    run: _Run, model, data, split: str, n: int | None, size, draw: dict[str, Any], guide_factor: int | None = None
):
    """A model's answers to degraded or masked rows, or its samples guided to small ones, against the rows themselves,
    and plain methods' beside them."""
    size = size or trained_size(model)
    rows, settings = _rows(run, _own_data(model, data), split, size, model)
    count = min(len(rows), GENERATED_LIMIT) if n is None else check_count(len(rows), n, f"{rows.source} ({rows.split})")
    ids = evenly_spaced(len(rows), count)
    truth = rows_source(rows, settings, ids)
    sources = task_sources if guide_factor is None else partial(guided_sources, factor=guide_factor)
    made, baselines, stated = sources(model, rows, ids, truth, size=size, **draw)
    found = _paired(run, made, truth)
    run.facts |= {**stated, "sampling": sampling_facts(model, draw)}
    if stated["task"] == "inpaint" and "biharmonic" not in baselines:
        run.warnings.append("no biharmonic filling beside it: install scikit-image for that")
    for name, source in baselines.items():
        other = _Run(run.metrics, run.extractor, run.perceptual, run.progress)
        _paired(other, source, truth)
        for key, value in other.values.items():
            run.put(f"{key}_{name}", f"{other.labels[key]}, {name}", value)
    return found


def _of_sets(run: _Run, model, data, split: str, n: int | None, size, draw: dict[str, Any], images=None):
    """Samples of a model, or given images, against a reference that need not have as many."""
    if images is not None:
        source = open_images(images, n)
        size = size or first_size(source)
    else:
        size, data = size or trained_size(model), _own_data(model, data)
    rows, settings = (None, None) if data is None or _is_npz(data) else _rows(run, data, split, size, model)
    if images is None:
        n = n or (GENERATED_LIMIT if rows is None else min(len(rows), GENERATED_LIMIT))
        source = model_source(model, rows, n, size=size, **draw)
        run.facts["sampling"] = sampling_facts(model, draw)
    obeyed = [name for name in run.metrics if name in OBEDIENCE_METRICS]
    reference = _reference(run, rows, settings, data) if run.extractor or not obeyed else None
    kept: list[np.ndarray] = []
    with run.progress(source.count, "generated") as bar:
        stream = _keeping(source.stream(), kept) if obeyed else source.stream()
        generated = extract(stream, run.extractor, bar.advance)
    for name in obeyed:
        _put_obedience(run, name, kept, rows, data, size, model.config)
    run.facts["generated"] = source.facts
    _warn_of_lossy(run, source, reference.lossy if isinstance(reference, ImageStream) else False)
    if isinstance(reference, ImageStream):
        run.facts["reference"] = reference.facts
        with run.progress(reference.count, "reference") as bar:
            reference = reference_features(run.extractor, reference, bar.advance, REFERENCE_LIMIT)
    _set_metrics(run, generated, reference)
    return generated, reference


def _keeping(stream: Iterable[np.ndarray], kept: list[np.ndarray]) -> Iterator[np.ndarray]:
    for image in stream:
        kept.append(image)
        yield image


def _put_obedience(run: _Run, kind: str, images: list[np.ndarray], rows, data, size, config) -> None:
    """Whether pictures drawn for rows obey them, as a judge trained on the training rows (or an exact reader) sees."""
    training = _rows(run, data, "train", size, config)[0]
    values, facts = measure_obedience(
        kind, images, rows, training, evenly_spaced(len(rows), len(images)), config, size, run.progress
    )
    for key, (label, value) in values.items():
        run.put(key, label, value)
    run.facts[f"{kind}_obedience"] = facts


def _reference(run: _Run, rows, settings, data):
    """A Source, the statistics of an .npz, or None."""
    if data is None:
        return None
    if rows is None:
        statistics = read_statistics(Path(data), run.extractor)
        lacking = sorted(set(run.metrics) & {"kid", "pr"}) if statistics is not None else []
        if lacking:
            raise InputError(f"--metrics {lacking[0]}: needs the images of the reference; {data} has mu and sigma only")
        return statistics if statistics is not None else open_images(data)
    return rows_source(rows, settings, evenly_spaced(len(rows), _limited(run, rows)))


def _limited(run: _Run, rows) -> int:
    """How many rows of a data set are read where nobody says how many; all where `all` were asked for."""
    if rows.split == ALL or len(rows) <= REFERENCE_LIMIT:
        return len(rows)
    run.warnings.append(
        f"reference: {REFERENCE_LIMIT:,} of {len(rows):,} rows, evenly spread; --split all takes every row of the set"
    )
    return REFERENCE_LIMIT


def _own_data(run, data):
    """The reference that was named, else the data that the run was trained on."""
    if data is None and run.config is None:
        raise UsageError("name the reference with --data: this model does not say what it was trained on")
    return run.config.data if data is None else data


def _rows(run: _Run, data, split: str, size: tuple[int, int], model: Any = None):
    """Rows of the data, and the settings by which they become pixels.

    Of a small folder the held-out part may be a single image, of which no distribution can be made.
    """
    settings = data if isinstance(data, DataSettings) else DataSettings(source=str(data))
    settings = replace(settings, size=tuple(size))
    rows, whole = open_reference(settings, split)
    if whole and len(rows) < 2 and set(run.metrics) & set(SET_METRICS):
        rows = open_reference(settings, "train")[0]
        run.warnings.append(
            f"{rows.source}: too few images are held out to measure against; its {len(rows)} training "
            "images are the reference, which a model may have learned by heart"
        )
    elif whole > len(rows):
        run.facts["held_out"] = {"rows": len(rows), "of": whole}
        if model is None:
            run.warnings.append(
                f"reference: {len(rows):,} of {whole:,} rows ({100 * len(rows) / whole:.2g} %), those "
                "that a training would hold out; --split all takes the whole set"
            )
    for note in rows.notes:
        console.say_once(f"{rows.source}: {note}")
    return rows, settings


def _is_npz(data: Any) -> bool:
    return isinstance(data, (str, Path)) and str(data).endswith(".npz")


# --- metrics ---------------------------------------------------------------------------------------------------


def _paired(run: _Run, generated: ImageStream, reference: ImageStream) -> tuple[FeatureSet, FeatureSet]:
    """Image by image, and where a set metric is asked for, set by set."""
    pairs = list(PAIR_METRICS) if set(run.metrics) & set(PAIR_METRICS) else []
    sums: dict[str, list[float]] = {name: [] for name in pairs if name in run.metrics}
    sides = Collector(run.extractor), Collector(run.extractor)
    with run.progress(reference.count, "pairs") as bar:
        for block in in_blocks(zip(generated.stream(), reference.stream()), BLOCK):
            made, real = [a for a, _ in block], [b for _, b in block]
            for name, values in pair_values(made, real, tuple(sums), run.perceptual).items():
                sums[name] += values
            sides[0].add(made)
            sides[1].add(real)
            bar.advance(len(block))
    run.facts |= {"generated": generated.facts, "reference": reference.facts}
    _warn_of_lossy(run, generated, reference.lossy)
    for name, values in sums.items():
        _put_pair_metric(run, name, values)
    found = sides[0].result(), sides[1].result()
    _set_metrics(run, *found, copies=False)
    return found


def pair_values(
    made: Sequence[np.ndarray], real: Sequence[np.ndarray], metrics: Sequence[str], perceptual=None
) -> dict[str, list[float]]:
    """PSNR (dB), SSIM and LPIPS of each pair of uint8 (H, W, 3) images."""
    functions = {"psnr": psnr, "ssim": ssim}
    out = {name: [functions[name](a, b) for a, b in zip(made, real)] for name in metrics if name in functions}
    if "lpips" in metrics:
        out["lpips"] = [value for block in in_blocks(zip(made, real), BLOCK) for value in _lpips(perceptual, block)]
    return out


def _lpips(net, pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    import torch

    shapes = {image.shape for pair in pairs for image in pair}
    if any(a.dtype != np.uint8 or a.shape != b.shape for a, b in pairs):
        raise InputError(f"LPIPS: images of {sorted(shapes)}: need uint8 pairs of one size")
    if len(shapes) > 1:
        return [value for pair in pairs for value in _lpips(net, [pair])]
    device = next(net.buffers()).device
    x, y = (pixels_to_tensor(torch.from_numpy(np.stack(side)), device) for side in zip(*pairs))
    with torch.inference_mode():
        return net(x, y).flatten().tolist()


def _put_pair_metric(run: _Run, name: str, values: list[float]) -> None:
    """Mean and population deviation over images; infinite PSNRs (equal images) are counted, not averaged."""
    finite = [value for value in values if math.isfinite(value)]
    kind = f"_{run.perceptual.kind}" if name == "lpips" else ""
    label = {"psnr": "PSNR (dB)", "ssim": "SSIM (Wang)", "lpips": f"LPIPS ({kind[1:]})"}[name]
    run.put(f"{name}{kind}", label, float(np.mean(finite)) if finite else math.inf)
    run.put(f"{name}{kind}_std", f"{label}, deviation over images", float(np.std(finite)) if finite else 0.0)
    if len(finite) < len(values):
        run.put(f"{name}_equal_images", "pairs of equal images", len(values) - len(finite))
    if name == "lpips":
        run.facts["lpips"] = {"net": run.perceptual.kind, "version": "0.1", "weights": Path(run.perceptual.origin).name}


def _set_metrics(
    run: _Run, generated: FeatureSet, reference: FeatureSet | Statistics | None, copies: bool = True
) -> None:
    """Everything that compares two sets of features, and the warnings about the sets."""
    if run.extractor is None:
        return
    _check_counts(run, generated, reference)
    if isinstance(reference, FeatureSet):
        _warn_of_sets(run, generated, reference, copies)
    for name in SET_METRICS:
        if name in run.metrics:
            _SET_FUNCTIONS[name](run, generated, reference)


def _check_counts(run: _Run, generated: FeatureSet, reference: FeatureSet | Statistics | None) -> None:
    counts = {"generated": len(generated)}
    if isinstance(reference, FeatureSet):
        counts["reference"] = len(reference)
    for side, count in counts.items():
        if count < 2:
            raise InputError(
                f"{count} {side} image{'' if count == 1 else 's'}: a distribution needs at least 2; "
                "raise -n, or hold more rows out with --val-fraction"
            )
        if count < run.extractor.dim:
            run.warnings.append(
                f"{count:,} {side} images for {run.extractor.dim:,} dimensions: the distance is biased "
                "upwards; compare only with numbers of the same n"
            )


def _warn_of_sets(run: _Run, generated: FeatureSet, reference: FeatureSet, copies: bool) -> None:
    if generated.sizes != reference.sizes or len(generated.sizes) > 1:
        shown = [", ".join(f"{w}x{h}" for h, w in sorted(each.sizes)[:4]) for each in (generated, reference)]
        run.warnings.append(f"sizes differ: generated {shown[0]}, reference {shown[1]}")
    for side, each in (("generated", generated), ("reference", reference)):
        twice = len(each) - len(set(each.hashes))
        if twice:
            run.warnings.append(f"{twice:,} exact duplicates among the {side} images")
    shared = sum(name in set(reference.hashes) for name in generated.hashes) if copies else 0
    if shared:
        run.warnings.append(f"{shared:,} generated images are exact copies of reference images")


def _warn_of_lossy(run: _Run, generated: ImageStream, reference_lossy: bool) -> None:
    if generated.lossy != reference_lossy:
        side = "generated" if generated.lossy else "reference"
        run.warnings.append(f"only the {side} images are JPEG files: their artefacts count as a difference")


def _put_fid(run: _Run, generated: FeatureSet, reference: FeatureSet | Statistics) -> None:
    if isinstance(reference, Statistics):
        own = gaussian(generated.features)
        value = frechet(own.mean, own.covariance, reference.mu, reference.sigma)
    else:
        value = frechet_from_features(generated.features, reference.features)
    run.put(run.extractor.metric_key, run.extractor.display, value)
    run.facts["covariance_divisor"] = "n - 1"


def _put_kid(run: _Run, generated: FeatureSet, reference: Any) -> None:
    size = min(KID["subset_size"], len(generated), len(reference))
    mean, std = kid(generated.features, reference.features, subsets=KID["subsets"], subset_size=size, seed=KID["seed"])
    suffix, named = run.extractor.suffix, _named(run.extractor)
    run.put(f"kid_{suffix}_mean", f"KID ({named})", mean)
    run.put(f"kid_{suffix}_std", f"KID ({named}), deviation over subsets", std)
    run.facts["kid"] = {**KID, "subset_size": size}


def _put_is(run: _Run, generated: FeatureSet, reference: Any) -> None:
    suffix, named = run.extractor.suffix, _named(run.extractor)
    mean = std = None
    if len(generated) >= IS_SPLITS:
        mean, std = inception_score(generated.logits, splits=IS_SPLITS)
    else:
        run.warnings.append(f"no IS: {len(generated)} images for {IS_SPLITS} splits")
    run.put(f"is_{suffix}_mean", f"IS ({named})", mean)
    run.put(f"is_{suffix}_std", f"IS ({named}), deviation over splits", std)
    run.facts["is"] = {"splits": IS_SPLITS, "shuffle": True, "seed": 2020}


def _put_pr(run: _Run, generated: FeatureSet, reference: Any) -> None:
    precision, recall = precision_recall(generated.features, reference.features, NEIGHBOURS)
    if precision is None:
        run.warnings.append(f"no precision and recall: a set has no more than {NEIGHBOURS} images")
    suffix, named = run.extractor.suffix, _named(run.extractor)
    run.put(f"precision_{suffix}", f"precision ({named})", precision)
    run.put(f"recall_{suffix}", f"recall ({named})", recall)
    run.facts["pr"] = {"k": NEIGHBOURS, "precision": "share of generated images inside balls of reference images"}


def _named(extractor: Extractor) -> str:
    """The extractor as people read it."""
    return "Inception" if extractor.display == "FID" else extractor.display.split("(")[1].rstrip(")")


_SET_FUNCTIONS: dict[str, Callable[[_Run, FeatureSet, Any], None]] = {
    "fid": _put_fid,
    "kid": _put_kid,
    "is": _put_is,
    "pr": _put_pr,
}


# --- the result ------------------------------------------------------------------------------------------------


def _document(run: _Run, generated: FeatureSet, reference: Any, seconds: float) -> dict[str, Any]:
    count = reference.n if isinstance(reference, Statistics) else len(reference) if reference is not None else 0
    if isinstance(reference, Statistics):
        run.facts["reference"] = {"source": reference.source, "statistics": "mu, sigma"}
    dim = run.extractor.dim if run.extractor else 0
    enough = len(generated) > dim and (count is None or count > dim or reference is None)
    return {
        "metrics": run.values,
        "labels": run.labels,
        "frechet": run.extractor.metric_key if run.extractor and "fid" in run.metrics else None,
        "n_generated": len(generated),
        "n_reference": count,
        "reliable": enough,
        "extractor": run.extractor.facts if run.extractor else None,
        **run.facts,
        "versions": _versions(),
        "seconds": round(seconds, 2),
        "warnings": run.warnings,
    }


def _versions() -> dict[str, str]:
    import torch

    return {"ldm": __version__, "torch": torch.__version__, "numpy": np.__version__}


def reconstruction_metrics(
    real: np.ndarray, made: np.ndarray, perceptual=None, extractor: Extractor | None = None
) -> dict[str, float]:
    """psnr (dB), ssim, and where their networks are given perceptual and a Fréchet distance under its own key.

    real, made: uint8 (N, H, W, 3). The measure of an autoencoder while it trains; SSIM needs 11 px a side.
    """
    names = ["psnr", *(["ssim"] if min(real.shape[1:3]) >= 11 else []), *(["lpips"] if perceptual is not None else [])]
    values = pair_values(made, real, names, perceptual)
    finite = [value for value in values["psnr"] if math.isfinite(value)]
    out = {"psnr": float(np.mean(finite)) if finite else 100.0}
    out |= {{"lpips": "perceptual"}.get(name, name): float(np.mean(values[name])) for name in names[1:]}
    if extractor is not None:
        features = [extractor.features(side) for side in (made, real)]
        out[extractor.metric_key] = frechet_from_features(*features)
    return out
