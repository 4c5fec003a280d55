"""Streams of images through the metrics of the table: image by image, and set by set."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ldmcli.core.errors import InputError
from ldmcli.core.files import sha256_file, tensors_hash
from ldmcli.core.world import World
from ldmcli.evaluation.condition_fidelity import ConditionedSamples
from ldmcli.evaluation.estimates import add_of_images, add_of_sets
from ldmcli.evaluation.extractors import Extractor
from ldmcli.evaluation.features import FeatureSet, digest_of
from ldmcli.evaluation.image_streams import CodeCounts, ImageStream
from ldmcli.evaluation.kept_parts import PartStore
from ldmcli.evaluation.metrics import (
    CONDITION,
    FEATURES,
    IMAGES,
    LOGITS,
    METRICS,
    NOVELTY,
    OF_EACH,
    OF_PAIRS,
    OF_SETS,
    PERCEPTUAL,
    FeatureSets,
    finite_mean,
    image_values,
    needing,
)
from ldmcli.evaluation.novelty import Novelty, NoveltySets
from ldmcli.evaluation.passes import Found, Pass, Tally, in_order_of_content, nothing, run_pass
from ldmcli.evaluation.reference_statistics import KEPT, Statistics, reference_features, streamed_statistics
from ldmcli.evaluation.result import EvaluationResult, Scores, key_of

REFERENCE_LIMIT = KEPT  # rows of a data set that a reference takes where nobody says how many


@dataclass(frozen=True)
class Instruments:
    """What measures: the requested metrics, and the networks that they need; sets are compared by each of the
    extractors. known: features of originals by the key of their stream, which several evaluations share. world: the
    processes that share the work."""

    metrics: tuple[str, ...]
    extractors: tuple[Extractor, ...]
    perceptual: Any
    progress: Callable[[int, str], Any]
    known: dict[str, tuple[FeatureSet, ...]] = field(default_factory=dict)
    estimates: bool = True  # whether it is measured, too, what the numbers are worth
    world: World = field(default_factory=World)
    tally: Tally = field(default_factory=Tally)
    stores: list[PartStore] = field(default_factory=list)  # of the passes so far; removed when the result is complete

    def run(self, run: Pass) -> Found:
        """Everything that a pass finds. Collective."""
        self.stores.append(run.store(self.world))
        with self.progress(run.count, run.label) as bar:
            return run_pass(run, self.stores[-1], self.world, self.tally, bar.advance)

    def needing(self, *needs: str) -> list[str]:
        """Those of the metrics that need one of these, in the order of the table."""
        return needing([name for name in METRICS if name in self.metrics], *needs)

    def network_named(self, extractor: Extractor) -> str:
        """The network in brackets, for warnings; "" where there is only one."""
        return f" ({extractor.title})" if len(self.extractors) > 1 else ""


def measure_stream(
    instruments: Instruments, result: EvaluationResult, source: ImageStream
) -> tuple[tuple[FeatureSet, ...], Sequence[np.ndarray]]:
    """The features of a stream by each network, and its images where metrics of conditions or copies read them; adds
    what needs images alone. Images and features are on rank 0 alone. Collective."""
    names = instruments.needing(IMAGES)
    wanted = bool(needing(instruments.metrics, CONDITION, NOVELTY))
    keep = wanted and source.action == "sampling"  # files are read again
    run = Pass(
        label="generated",
        streams=(source,),
        extractors=(instruments.extractors,),
        logits=bool(instruments.needing(LOGITS)),
        values=partial(image_values, names),
        arrays=_as_they_are if keep else nothing,
        identity=(*names, *(["images"] if keep else [])),
    )
    found = instruments.run(run)
    for name in names if instruments.world.is_rank_0 else ():
        _add_mean(instruments, result, name, found.values[name])
    images: Sequence[np.ndarray] = list(found.arrays.get("images", ()))
    if wanted and not keep and instruments.world.is_rank_0:
        images = list(source.stream())
    return found.sides[0], images


def _as_they_are(images: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {"images": np.stack(images)}


def measure_reference(
    instruments: Instruments,
    result: EvaluationResult,
    reference: ImageStream | Statistics | None,
    streamed: bool = False,
    save: bool = False,
) -> tuple[FeatureSet | Statistics, ...]:
    """What each network finds in a stream, or what is known of a reference already: all features where they are. ()
    without a reference, and on processes other than rank 0. Collective.

    streamed: of a long stream mean and covariance, and the features of some images where they are needed or saved.
    """
    extractors = instruments.extractors
    if reference is None or not extractors:
        return ()
    rows_needed = bool(needing(instruments.metrics, FEATURES))
    shared = instruments.world, instruments.tally
    if isinstance(reference, Statistics):
        result.protocol["reference"] = {"source": reference.source, "statistics": "mu, sigma"}
        if reference.protocol:
            result.protocol["reference"]["of"] = reference.protocol
        if reference.rows is not None and len(reference.rows) == reference.n:
            return (reference.rows,)
        if not rows_needed or reference.rows is not None or reference.images is None:
            return _stated(result, (reference,), rows_needed)
        with instruments.progress(reference.images.count, "reference") as bar:
            found = reference_features(extractors, reference.images, bar.advance, REFERENCE_LIMIT, *shared)
        return _stated(result, tuple(replace(reference, rows=rows) for rows in found), rows_needed)
    result.protocol["reference"] = reference.protocol
    with instruments.progress(reference.count, "reference") as bar:
        if not streamed or reference.count <= REFERENCE_LIMIT:
            return reference_features(extractors, reference, bar.advance, REFERENCE_LIMIT, *shared)
        statistics = streamed_statistics(extractors, reference, bar.advance, rows_needed or save, *shared)
    return _stated(result, statistics, rows_needed)


def _stated(result: EvaluationResult, found: tuple[Statistics, ...], rows_needed: bool) -> tuple[Statistics, ...]:
    """The statistics; of how many images the features are that some metrics need is said."""
    if found and rows_needed and found[0].rows is not None:
        result.protocol["reference_features"] = {"rows": len(found[0].rows)}
    return found


def paired(
    instruments: Instruments,
    result: EvaluationResult,
    generated: ImageStream,
    reference: ImageStream,
    groups: Mapping[str, Sequence[int]] = MappingProxyType({}),
    counts: CodeCounts | None = None,
) -> tuple[tuple[FeatureSet, ...], tuple[FeatureSet, ...]]:
    """Measures two streams of the same length image by image, and for metrics of sets, set by set; gives both sides'
    sets, on rank 0. Collective.

    groups: {name: positions} of pairs that are measured by themselves, too. counts: of the codes in the latents that
    images are made of; has those of all images afterwards.
    """
    names = instruments.needing(*OF_EACH)
    known = instruments.known.get(reference.key)
    net = instruments.perceptual
    run = Pass(
        label="pairs",
        streams=(generated, reference),
        extractors=(instruments.extractors, instruments.extractors if known is None else ()),
        logits=bool(instruments.needing(LOGITS)),
        values=lambda made, real: image_values(names, made, real, net),
        sums=(lambda made, real: counts.taken()) if counts is not None else nothing,
        identity=(
            *names,
            *(
                [net.kind, tensors_hash({name: value.cpu() for name, value in net.state_dict().items()})]
                if net is not None
                else []
            ),
            str(counts is None),
        ),
    )
    found = instruments.run(run)
    result.protocol |= {"generated": generated.protocol, "reference": reference.protocol}
    warn_of_lossy(result, generated, reference.lossy)
    features = found.sides[0], found.sides[1] if known is None else known
    if reference.key:
        instruments.known[reference.key] = features[1]
    result.protocol["originals"] = digest_of(features[1][0].hashes)
    if counts is not None:
        counts.found = found.sums.get("codes")
    for name in names if instruments.world.is_rank_0 else ():
        _add_mean(instruments, result, name, found.values[name])
    set_metrics(instruments, result, *features, copies=False)
    if not instruments.world.is_rank_0:
        return features
    for name, ids in groups.items():
        of_group = {metric: [numbers[i] for i in ids] for metric, numbers in found.values.items()}
        sets = [[one.of(ids) for one in side] for side in features]
        part = _of_group(instruments, of_group, *sets)
        result.groups[name] = {"n": len(ids), "metrics": part.values}
    return features


def _of_group(
    instruments: Instruments,
    values: Mapping[str, list[float]],
    generated: Sequence[FeatureSet],
    reference: Sequence[FeatureSet],
) -> EvaluationResult:
    """The numbers of some of the pairs; of sets only where two images or more are among them."""
    result, instruments = EvaluationResult(), replace(instruments, estimates=False)
    for name, found in values.items():
        _add_mean(instruments, result, name, found)
    if len(generated[0]) > 1:
        for sets in _by_network(instruments, generated, reference):
            _add_sets(instruments, result, sets)
    return result


def share_groups(shares: Sequence[float]) -> dict[str, list[int]]:
    """Positions of masks by the share of the picture that they cover, {"0-10 %": […], …}: tenths up to a half (Tab. 7),
    and all above; those that there are."""
    bounds = [(low, low + 10) for low in range(0, 50, 10)] + [(50, 100)]
    found = {f"{a}-{b} %": [i for i, share in enumerate(shares) if a < 100 * share <= b] for a, b in bounds}
    return {name: ids for name, ids in found.items() if ids}


def _add_mean(instruments: Instruments, result: EvaluationResult, name: str, values: list[float]) -> None:
    """Mean and population deviation over images; infinite PSNRs (equal images) are counted, not averaged."""
    finite = [value for value in values if math.isfinite(value)]
    scores = Scores({name: finite_mean(values, math.inf), f"{name}_std": float(np.std(finite)) if finite else 0.0})
    labels, network = METRICS[name].labels(name), ("", "")
    if METRICS[name].needs == PERCEPTUAL:
        net = instruments.perceptual
        network = (net.kind, net.kind)
        scores.protocol[name] = {"net": net.kind, "version": "0.1", "weights": Path(net.origin).name}
    result.add_scores(scores, labels, network)
    if METRICS[name].needs in OF_PAIRS and len(values) <= KEPT:
        rounded = [round(value, 6) if math.isfinite(value) else None for value in values]
        result.of_each[key_of(name, network[0])] = rounded
    if instruments.estimates:
        of = None if METRICS[name].needs != PERCEPTUAL else perceptual_name(instruments.perceptual)
        add_of_images(result, key_of(name, network[0]), values, METRICS[name], of)
    if len(finite) < len(values):
        count = f"{name}_equal_images"
        result.add(count, labels[count], len(values) - len(finite))


def perceptual_name(net: Any) -> str | None:
    """Name and start of the hash of the weights of a perceptual network; None of one without a file."""
    path = Path(net.origin)
    return f"{net.kind}@{sha256_file(path)[:12]}" if path.is_file() else None


def condition_metrics(instruments: Instruments, result: EvaluationResult, samples: ConditionedSamples) -> None:
    """Adds what says whether samples show their conditions. Rank 0 does it. Collective."""

    def add() -> None:
        for name in needing(instruments.metrics, CONDITION):
            result.add_scores(METRICS[name].compute(samples), METRICS[name].labels(name))

    instruments.world.on_rank_0(add)


def novelty_metrics(instruments: Instruments, result: EvaluationResult, sets: NoveltySets) -> Novelty | None:
    """Adds what share of the samples are copies of training pictures; gives the nearest pairs, too."""
    found = None
    for name in needing(instruments.metrics, NOVELTY):
        found = METRICS[name].compute(sets)
        result.add_scores(found.by_pixels, METRICS[name].labels(name))
        for scores, extractor in zip(found.by_network, sets.extractors):
            result.add_scores(scores, METRICS[name].labels(name), (extractor.suffix, extractor.title))
    return found


def set_metrics(
    instruments: Instruments,
    result: EvaluationResult,
    generated: Sequence[FeatureSet],
    reference: Sequence[FeatureSet | Statistics],
    copies: bool = True,
) -> None:
    """Adds everything that compares two sets of features, by each network, and warnings about the sets.

    generated, reference: a set for each of the extractors, in their order; reference is empty where there is none.
    copies: whether equal images on both sides are worth a warning. Rows are drawn from images in the order of their
    content. Rank 0 does it. Collective.
    """
    instruments.world.on_rank_0(lambda: _set_metrics(instruments, result, generated, reference, copies))


def _set_metrics(
    instruments: Instruments,
    result: EvaluationResult,
    generated: Sequence[FeatureSet],
    reference: Sequence[FeatureSet | Statistics],
    copies: bool,
) -> None:
    started = time.perf_counter()
    all_sets = _by_network(instruments, generated, reference)
    for sets in all_sets:
        _check_counts(result, sets, instruments.network_named(sets.extractor))
    if all_sets and isinstance(all_sets[0].reference, FeatureSet):
        result.protocol["reference_content"] = digest_of(sorted(all_sets[0].reference.hashes))
        _warn_of_sets(result, all_sets[0].generated, all_sets[0].reference, copies)
    for sets in all_sets:
        _add_sets(instruments, result, sets)
    instruments.tally.add("metrics", 0, time.perf_counter() - started)


def _by_network(
    instruments: Instruments, generated: Sequence[FeatureSet], reference: Sequence[FeatureSet | Statistics]
) -> list[FeatureSets]:
    known: Sequence[FeatureSet | Statistics | None] = reference or [None] * len(instruments.extractors)
    return [
        FeatureSets(made, real, extractor) for made, real, extractor in zip(generated, known, instruments.extractors)
    ]


def _add_sets(instruments: Instruments, result: EvaluationResult, sets: FeatureSets) -> None:
    """Adds the metrics of sets by one network."""
    extractor = sets.extractor
    sets = replace(sets, generated=in_order_of_content(sets.generated), reference=_in_order(sets.reference))
    for name in instruments.needing(*OF_SETS):
        scores = METRICS[name].compute(sets)
        named = instruments.network_named(extractor)
        scores = replace(scores, warnings=[f"{text}{named}" for text in scores.warnings])
        result.add_scores(scores, METRICS[name].labels(name), (extractor.suffix, extractor.title))
        if instruments.estimates:
            add_of_sets(result, name, METRICS[name], sets, scores)


def _in_order(reference: FeatureSet | Statistics | None) -> FeatureSet | Statistics | None:
    if isinstance(reference, FeatureSet):
        return in_order_of_content(reference)
    if reference is None or reference.rows is None:
        return reference
    return replace(reference, rows=in_order_of_content(reference.rows))


def _check_counts(result: EvaluationResult, sets: FeatureSets, named: str) -> None:
    generated, reference, dimensions = sets.generated, sets.reference, sets.extractor.dim
    if len(set(generated.hashes)) > 1 and (generated.features == generated.features[0]).all():
        result.warnings.append(
            f"{sets.extractor.title} sees no difference between the generated images: its numbers say nothing"
        )
    counts = {"generated": len(generated)}
    known = reference.n if isinstance(reference, Statistics) else len(reference) if reference is not None else None
    if known is not None:
        counts["reference"] = known
    for side, count in counts.items():
        if count < 2:
            raise InputError(
                f"{count} {side} image{'' if count == 1 else 's'}: a distribution needs at least 2; "
                "raise -n, or hold more rows out with --val-fraction"
            )
        if count < dimensions:
            result.warnings.append(
                f"{count:,} {side} images for {dimensions:,} dimensions{named}: the distance is biased "
                "upwards; compare only with numbers of the same n"
            )


def _warn_of_sets(result: EvaluationResult, generated: FeatureSet, reference: FeatureSet, copies: bool) -> None:
    if generated.sizes != reference.sizes or len(generated.sizes) > 1:
        shown = [", ".join(f"{w}x{h}" for h, w in sorted(each.sizes)[:4]) for each in (generated, reference)]
        result.warnings.append(f"sizes differ: generated {shown[0]}, reference {shown[1]}")
    for side, each in (("generated", generated), ("reference", reference)):
        twice = len(each) - len(set(each.hashes))
        if twice:
            result.warnings.append(f"{twice:,} exact duplicates among the {side} images")
    shared = sum(name in set(reference.hashes) for name in generated.hashes) if copies else 0
    if shared:
        result.warnings.append(f"{shared:,} generated images are exact copies of reference images")


def warn_of_lossy(result: EvaluationResult, generated: ImageStream, reference_lossy: bool) -> None:
    """Warns where JPEG files stand on one side only."""
    if generated.lossy != reference_lossy:
        side = "generated" if generated.lossy else "reference"
        result.warnings.append(f"only the {side} images are JPEG files: their artefacts count as a difference")
