"""Quality while a diffusion model trains (train.eval_samples): its samples against held-out rows, as `ldm eval-fid`
measures them.

Samples and the rows that they are conditioned on are those of `ldm eval-fid -n N` with the run's seed. Processes share
them in blocks whose size does not depend on their number, so the metrics do not, either.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from ldmcli.core import console
from ldmcli.core.errors import InputError
from ldmcli.core.settings import DiffusionConfig, TrainSettings
from ldmcli.data.rows import evenly_spaced
from ldmcli.evaluation.baselines import answer_for_rows
from ldmcli.evaluation.compare import read_key
from ldmcli.evaluation.estimates import frechet_interval
from ldmcli.evaluation.extractors import Extractor, check_features, open_extractor
from ldmcli.evaluation.features import FeatureSet, concatenated, extract
from ldmcli.evaluation.image_streams import condition_source, rows_source, sample_for_rows
from ldmcli.evaluation.judges import judges_among, trained_against
from ldmcli.evaluation.measure import REFERENCE_LIMIT, Instruments, set_metrics
from ldmcli.evaluation.metrics import IS_SPLITS, METRICS, FeatureSets, finite_mean, image_values
from ldmcli.evaluation.novelty import CopyMeter, need_held_out
from ldmcli.evaluation.passes import in_order_of_content
from ldmcli.evaluation.reference_statistics import reference_features
from ldmcli.evaluation.request import BATCH, no_progress
from ldmcli.evaluation.result import EvaluationResult, Scores
from ldmcli.sampling import memory
from ldmcli.sampling.api import LoadedDiffusion
from ldmcli.training import cost
from ldmcli.training.distributed import Distributed

OF_SETS = ("fid", "kid", "mind", "is", "pr")  # of `METRICS`
OF_PAIRS = ("psnr", "ssim")  # beside them, for super-resolution and inpainting
ENDS = ("low", "high")  # of the 95 % interval of the Fréchet distance, which has its key before them
COPIES = ("copied", "copied_low", "copied_high", "copied_held_out")  # with train.eval_novelty
NOVELTY_ROWS = 10_000  # training rows that are looked through for copies
LEAST = IS_SPLITS  # samples; the other metrics need fewer
SSIM_SIDE = 11  # px, its window


@dataclass
class Block:
    """Part of an evaluation: features of a few samples, and of tasks a value for each pair of images by metric."""

    features: FeatureSet
    pairs: dict[str, list[float]]
    images: list[np.ndarray] = field(default_factory=list)  # where they are looked through for copies


def open_features(train: TrainSettings) -> Extractor:
    """The network of train.eval_features. Raises UsageError for an unknown name, InputError where its weights are
    missing or damaged."""
    check_features(train.eval_features or None, "train.eval_features")
    return open_extractor(train.eval_features or None)


def metric_keys(config: DiffusionConfig, size: tuple[int, int], extractor: Extractor) -> list[str]:
    """What an evaluation of samples puts into the log, under the keys of `ldm eval-fid --json`."""
    result = EvaluationResult()
    for name in OF_SETS:
        values: dict[str, float | None] = dict.fromkeys(METRICS[name].values(name), 0.0)
        if name == "fid":
            values = {extractor.metric_key.partition("_")[0]: 0.0}
        result.add_scores(Scores(values), METRICS[name].labels(name), (extractor.suffix, extractor.title))
    copies = COPIES if config.train.eval_novelty else ()
    ends = [f"{extractor.metric_key}_{end}" for end in ENDS]
    return [*result.values, *ends, *copies, *(_paired_metrics(size) if config.task.name != "generate" else ())]


def _paired_metrics(size: tuple[int, int]) -> list[str]:
    return [name for name in OF_PAIRS if name != "ssim" or min(size) >= SSIM_SIDE]


class SampleQuality:
    """Measures train.eval_samples samples against the held-out `rows`, at the size in pixels that is trained on.

    training: rows that samples may be copies of. Raises InputError where the rows are too few.
    """

    def __init__(
        self, config: DiffusionConfig, rows: Any, size: tuple[int, int], extractor: Extractor, training: Any = None
    ):
        train, self.paired = config.train, config.task.name != "generate"
        self.config, self.rows, self.size, self.extractor, self.seed = config, rows, size, extractor, train.seed
        self.count = min(train.eval_samples, len(rows)) if self.paired else train.eval_samples
        if len(rows) < 2:
            raise InputError(
                f"train.eval_samples = {train.eval_samples}: at least 2 held-out rows are needed, there "
                f"is {len(rows) or 'none'}; raise data.val_fraction"
            )
        self.training = training if train.eval_novelty else None
        if self.training is not None:
            need_held_out(len(rows))
        self.copies: CopyMeter | None = None  # on rank 0, from the first evaluation on
        self.settings = {"steps": train.eval_steps} if train.eval_steps else {}
        self.ids = evenly_spaced(len(rows), self.count)  # of the row that each sample is conditioned on
        self.dataset: Any = None
        self.reference: FeatureSet | None = None  # on rank 0, from the first evaluation on
        self.batch = 0

    def note(self) -> str:
        """What is measured, for the first lines of a training."""
        rows = min(len(self.rows), REFERENCE_LIMIT)
        text = f"evaluations measure {self.count:,} samples against {rows:,} held-out rows, by {self.extractor.title}"
        looked = 0 if self.training is None else min(len(self.training), NOVELTY_ROWS)
        return text + (f"; they are looked through for copies of {looked:,} training pictures" if looked else "")

    def measure(
        self, model: LoadedDiffusion, dist: Distributed, stopped: Callable[[], bool]
    ) -> dict[str, float] | None:
        """{key: value}; None where `stopped()` became true on a process before all samples were drawn. Collective.

        Raises ModelError for NaN or Inf in samples.
        """
        if not self.batch:  # the networks, and so what they take of memory, stay the same
            small = cost.certainly_fits(BATCH, self.size, memory.MAX_MEMORY * 2**30)
            self.batch = BATCH if small else memory.largest_batch(model, self.size, memory.MAX_MEMORY, BATCH)
            self.dataset = condition_source(model, self.rows, self.size, self.seed)
            for judge in judges_among(trained_against(model), [self.extractor], None):
                console.warn(judge.warning())
        blocks = [range(k, min(k + self.batch, self.count)) for k in range(0, self.count, self.batch)]
        found: list[Block] = []
        for first in range(0, len(blocks), dist.world_size):
            if dist.all_reduce_max([float(stopped())])[0]:
                return None
            mine = blocks[first + dist.rank : first + dist.rank + 1]
            found += dist.on_all_ranks(partial(self._blocks, model, mine))
        parts = dist.gather(found)
        # rank r had the blocks r, r + world size, …
        in_order = [parts[k % dist.world_size][k // dist.world_size] for k in range(len(blocks))]
        return dist.on_rank_0(lambda: self._metrics(in_order))

    def _blocks(self, model: LoadedDiffusion, blocks: Sequence[Sequence[int]]) -> list[Block]:
        return [self._block(model, numbers) for numbers in blocks]

    def _block(self, model: LoadedDiffusion, numbers: Sequence[int]) -> Block:
        ids = [self.ids[k] for k in numbers]
        if not self.paired:
            images = sample_for_rows(model, self.dataset, ids, numbers[0], self.seed, self.size, self.settings)
            return Block(extract(images, self.extractor), {}, [] if self.training is None else list(images))
        images = answer_for_rows(model, self.dataset, ids, numbers, self.seed, self.settings)
        real = [self.rows.pixels(i, self.size, "center", (0.5, 0.5)) for i in ids]
        return Block(extract(images, self.extractor), image_values(_paired_metrics(self.size), list(images), real))

    def _metrics(self, blocks: list[Block]) -> dict[str, float]:
        if self.reference is None:
            self.reference = self._reference()
        features, result = concatenated([block.features for block in blocks]), EvaluationResult()
        names = tuple(name for name in OF_SETS if name != "is" or features.logits.shape[1])
        instruments = Instruments(names, (self.extractor,), None, no_progress, estimates=False)
        set_metrics(instruments, result, (features,), (self.reference,))
        for name in blocks[0].pairs:
            result.add(name, name, finite_mean([value for block in blocks for value in block.pairs[name]], math.inf))
        found = {key: value for key, value in result.values.items() if value is not None and not read_key(key)[1]}
        found |= self._ends(features, found)
        return found | self._copied([image for block in blocks for image in block.images])

    def _ends(self, features: FeatureSet, found: dict[str, float]) -> dict[str, float]:
        """{key: end} of the interval of the Fréchet distance in `found`; {} where it has none."""
        key = self.extractor.metric_key
        if key not in found or self.reference is None:
            return {}
        sets = FeatureSets(in_order_of_content(features), in_order_of_content(self.reference), self.extractor)
        ends = frechet_interval(METRICS["fid"], sets, found[key])
        return {} if ends is None else {f"{key}_{end}": value for end, value in zip(ENDS, ends)}

    def _copied(self, images: list[np.ndarray]) -> dict[str, float]:
        """{key: share} of copies of training pictures among samples, {} where nobody looks or controls fail."""
        if self.training is None:
            return {}
        if self.copies is None:
            rows = evenly_spaced(len(self.training), min(len(self.training), NOVELTY_ROWS))
            training = self.training if len(rows) == len(self.training) else self.training.select(rows)
            self.copies = CopyMeter(training, self.rows, self.size)
        failure = self.copies.controls.failure
        if failure:
            console.warn_once("eval_novelty", f"samples are not looked through for copies: {failure}")
            return {}
        found, held_out = self.copies.read(images)[0], self.copies.controls.held_out.share
        return dict(zip(COPIES, (found.share, *found.interval, held_out)))

    def _reference(self) -> FeatureSet:
        """Features of all held-out rows, or, of a task, of those that are answered."""
        data = replace(self.config.data, size=self.size)
        ids = self.ids if self.paired else evenly_spaced(len(self.rows), min(len(self.rows), REFERENCE_LIMIT))
        source = rows_source(self.rows, data, ids)
        return reference_features((self.extractor,), source, lambda n: None, REFERENCE_LIMIT)[0]
