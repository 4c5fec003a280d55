"""The request of an evaluation, and the checks of it that come before anything is generated."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ldmcli.conditions.class_ import Class
from ldmcli.core.errors import InputError, UsageError
from ldmcli.core.settings import TASK_CONDITIONS, DataSettings
from ldmcli.core.world import World
from ldmcli.evaluation.baselines import task_of
from ldmcli.evaluation.image_streams import loaded
from ldmcli.evaluation.metrics import (
    CODES,
    CONDITION,
    FEATURES,
    IMAGES,
    LOGITS,
    METRICS,
    NOVELTY,
    OF_PAIRS,
    OF_SETS,
    STATISTICS,
    needing,
)
from ldmcli.evaluation.protocols import check_protocol
from ldmcli.evaluation.reference_statistics import ALL, refuse_foreign_statistics
from ldmcli.sampling.classifier import LoadedClassifier, load_classifier
from ldmcli.sampling.guiding import ImageGuiding, split_guiding
from ldmcli.sampling.request import SAMPLING

BATCH = 32
SUBJECTS = ("model", "autoencoder", "images", "pairs")


class _Quiet:
    def advance(self, n: int = 1, **fields: Any) -> None:
        pass


def no_progress(total: int, label: str) -> Any:
    """Shows nothing."""
    return nullcontext(_Quiet())


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """The arguments of `evaluate`. Raises UsageError for more or less than one subject, and for a metric that there is
    none of."""

    # what is measured: one of these
    model: Any = None  # a run folder, or what `load` gave: its samples
    autoencoder: Any = None  # likewise: its reconstructions
    images: Any = None  # a folder or .npz
    pairs: Any = None  # two folders, or two .npz
    # against what
    data: Any = (
        None  # DataSettings, a data set's name, an .npz of images or statistics; None = the data of the training
    )
    split: str = "validation"
    reference_count: int | str | None = None  # rows of a reference; "all"; None = all, at most 10,000
    also_split: str | None = None  # of models with a task: another split whose rows are a second reference
    save_statistics: str | Path | None = None  # .npz that `data` reads again
    # by what
    metrics: Sequence[str] | None = None  # of METRICS; None = what is usual for the subject
    features: Any = None  # what `open_extractor` takes; "a,b" or a sequence: several
    perceptual: str = ""
    compare: str | Path | dict | None = None  # an earlier result
    protocol: str | None = None  # a name of PROTOCOLS, whose arguments are in force where none are given
    differs: tuple[str, ...] = ()  # arguments that are given and not the protocol's; `applied` says them
    row_settings: Mapping[str, Any] = field(default_factory=dict)  # settings of the data that the protocol has
    # how
    n: int | str | None = None  # images that are measured; None = all, of a model at most 1,000; "all", of a model, too
    seed: int | None = 0
    steps: int | None = None
    guidance: float | Mapping[str, float] | None = None  # one scale, or one a condition
    guidance_interval: tuple[float, float] | None = None
    autoguidance: float | None = None  # scale against the guiding model
    sampler: str | None = None
    eta: float | None = None
    temperature: float | None = None
    spacing: str | None = None
    negative_prompt: str = ""
    batch_size: int | None = None
    size: tuple[int, int] | None = None
    masks: str | Path | None = None  # of a model of task inpaint: a kind of task.masks, or a folder
    blend: int | None = None  # as `inpaint_images` takes them; None: as `ldm inpaint` does
    whole: bool = False
    tone: float | None = None  # of a model of task sr: as `upscale_images` takes it
    balanced: bool = False  # as many samples of each class, instead of the rows' classes
    weights: str = "ema"  # "ema" or "raw", of a model named by its run
    mixed_precision: str | None = None  # as `load` takes them, of a model or autoencoder named by its run
    compile: bool = False
    # lead sample k to row k made this many times smaller (Tab. 4; models without a task or of task sr), and compare
    guide_factor: int | None = None
    guide_scale: float | None = None  # how, as `LoadedDiffusion.sample` takes it; LPIPS by `perceptual`
    guide_rule: str | None = None
    guide_metric: str | None = None
    classifier: Any = None  # what `load_classifier` gave, or a run: leads samples to the classes of the rows
    classifier_scale: float = 1.0
    progress: Callable[[int, str], Any] | None = None
    novelty_folder: Path | None = None  # where novelty.json and novelty.png with the nearest pairs are kept
    world: World | None = None  # the processes that share the work and all call this; None = this one is alone
    name: str = ""  # of the run that is measured, where it was given by name; `opened` says it

    def __post_init__(self) -> None:
        given = [name for name in SUBJECTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(
                f"measure one of --model, --autoencoder, --images and --pairs (got {' and '.join(given) or 'none'})"
            )
        unknown = [name for name in self.metrics or () if name not in METRICS]
        if unknown:
            raise UsageError(f"--metrics {unknown[0]}: choose among {', '.join(METRICS)}")
        count = self.reference_count
        if count is not None and count != ALL and not (isinstance(count, int) and count >= 2):
            raise UsageError(f"--reference-count {count}: a number of rows from 2 on, or {ALL}")
        if isinstance(self.n, str) and (self.n != ALL or self.model is None):
            raise UsageError(f"-n {self.n}: a number of images; {ALL} is for models")

    @property
    def subject(self) -> str:
        """What is measured: one of `SUBJECTS`, or "task" for a model (`opened`) whose samples have true images."""
        if self.model is not None and (task_of(self.model) != "generate" or self.guide_factor is not None):
            return "task"
        return next(name for name in SUBJECTS if getattr(self, name) is not None)

    @property
    def count(self) -> int | None:
        """n, None where all images are measured."""
        return None if isinstance(self.n, str) else self.n

    @property
    def networks(self) -> tuple[Any, ...]:
        """What `open_extractor` is given, once for each network. Raises UsageError where none is named."""
        given = self.features
        if isinstance(given, str) and "," in given and not Path(given).exists():
            given = [name.strip() for name in given.split(",") if name.strip()]
        if isinstance(given, (list, tuple)) and not given:
            raise UsageError(f"--features {self.features}: names no network")
        return tuple(given) if isinstance(given, (list, tuple)) else (given,)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The metrics that are named, else those that are usual for the subject."""
        if self.metrics:
            return tuple(self.metrics)
        subject = self.subject
        return tuple(name for name, metric in METRICS.items() if subject in metric.default_of)

    @property
    def draw(self) -> dict[str, Any]:
        """How samples are made: seed, batch_size, and the settings that are given, with the negative prompt."""
        names = (*SAMPLING, "negative_prompt")
        settings = {name: getattr(self, name) for name in names if getattr(self, name) not in (None, "")}
        return {"seed": self.seed or 0, "batch_size": self.batch_size or BATCH, "settings": settings}

    @property
    def filling(self) -> dict[str, Any]:
        """What is said of masks, and of how answers are pasted, by the names of `task_sources`."""
        pasting = {"blend": self.blend, "whole": self.whole or None, "tone": self.tone}
        pasting = {name: value for name, value in pasting.items() if value is not None}
        return {**({} if self.masks is None else {"masks": self.masks}), **({"pasting": pasting} if pasting else {})}

    @property
    def guiding(self) -> ImageGuiding:
        """How samples are led to rows made small, where guide_factor says that they are."""
        names = ("guide_scale", "guide_rule", "guide_metric", "perceptual")
        return split_guiding({name: getattr(self, name) for name in names})[0]

    @property
    def conditions(self) -> tuple[str, ...]:
        """Conditions of the model, () without one."""
        return () if self.model is None else tuple(self.model.conditions.kinds)


def opened(request: EvaluationRequest) -> EvaluationRequest:
    """The request with its model or autoencoder loaded. Raises UsageError for runs of another kind, and for options of
    samples where there are none."""
    if request.guide_factor is None:
        for name in ("guide_scale", "guide_rule", "guide_metric"):
            if getattr(request, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')}: says how samples are guided; give --guide-factor N, too")
    if request.classifier is None and request.classifier_scale != 1:
        raise UsageError("--classifier-scale: says how much --classifier counts; give --classifier RUN, too")
    run = request.model if request.model is not None else request.autoencoder
    request = replace(request, name=str(run) if isinstance(run, (str, Path)) else "")
    how: dict[str, Any] = {"mixed_precision": request.mixed_precision or "auto", "compile": request.compile}
    if request.model is not None:
        return _with_classifier(replace(request, model=loaded(request.model, "diffusion", request.weights, **how)))
    if request.protocol:
        check_protocol(request.protocol, request.subject, (), {})
    names = (*SAMPLING, "negative_prompt", "guide_factor", "balanced", "classifier")
    given = [name for name in names if getattr(request, name)]
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')}: says how a model samples; use it with --model")
    if request.autoencoder is not None:
        return replace(request, autoencoder=loaded(request.autoencoder, "autoencoder", **how))
    for name in ("mixed_precision", "compile"):
        if getattr(request, name):
            raise UsageError(f"--{name.replace('_', '-')}: is of what makes images; use --model or --autoencoder")
    return request


def _with_classifier(request: EvaluationRequest) -> EvaluationRequest:
    """The request with its classifier loaded. Raises UsageError where it can lead nothing, ModelError where it does not
    fit the model."""
    classifier, model = request.classifier, request.model
    if classifier is None:
        return request
    if task_of(model) != "generate" or request.guide_factor is not None:
        raise UsageError("--classifier: leads samples that begin from noise; it goes with no task nor --guide-factor")
    classifier = classifier if isinstance(classifier, LoadedClassifier) else load_classifier(classifier, model.device)
    classifier.check_fits(model)
    return replace(request, classifier=classifier)


def check(request: EvaluationRequest) -> None:
    """Raises UsageError for metrics that the subject (`opened`) does not have, InputError for fewer than two images of
    a distribution."""
    subject, metrics, data = request.subject, request.chosen, request.data
    for name in needing(metrics, CONDITION):
        condition = METRICS[name].condition
        if condition not in request.conditions:
            raise UsageError(
                f"--metrics {name}: measures whether a model obeys its {condition}; "
                + (
                    f"use --model with one that was trained with --condition {condition}"
                    if request.model is None
                    else f"this model was trained without {condition}"
                )
            )
    if request.protocol:
        task = {} if request.model is None else vars(request.model.config.task)
        check_protocol(request.protocol, subject, given_conditions(request), task)
    if request.balanced and request.conditions != (Class.name,):
        raise UsageError("--balanced: is for models that are conditioned on a class alone")
    filled = request.filling.keys() | request.filling.get("pasting", {}).keys()
    if filled - {"pasting", "tone"} and (request.model is None or task_of(request.model) != "inpaint"):
        raise UsageError(
            "--masks, --blend and --whole: say how holes are filled; use them with a model of task inpaint"
        )
    if request.tone is not None and (request.model is None or task_of(request.model) != "sr"):
        raise UsageError("tone: says how enlarged pictures are corrected; use it with a model of task sr")
    if request.also_split is not None and (subject != "task" or not needing(metrics, STATISTICS, FEATURES)):
        raise UsageError("--also-split: a second reference of models with a task, and of a metric of sets, as fid")
    coded = needing(metrics, CODES)
    if coded and subject != "autoencoder":
        raise UsageError(f"--metrics {coded[0]}: says how an autoencoder's codes are used; use --autoencoder")
    if needing(metrics, NOVELTY):
        _check_novelty(request)
    paired = needing(metrics, *OF_PAIRS)
    if paired and subject in ("model", "images"):
        raise UsageError(
            f"--metrics {paired[0]}: compares image with image; use --autoencoder, --pairs, "
            "--guide-factor, or a model of task sr or inpaint"
        )
    if subject == "images" and data is None and len(needing(metrics, LOGITS, IMAGES)) < len(metrics):
        raise UsageError("--images: name the reference with --data")
    if is_npz(data) and request.conditions and (subject == "task" or needing(metrics, CONDITION)):
        raise UsageError(f"--data {data}: holds no conditions; name a data set")
    if isinstance(request.n, int) and request.n < 2 and needing(metrics, *OF_SETS):
        raise InputError(f"-n {request.n}: a distribution needs at least 2 images")
    if request.reference_count is not None and subject not in ("model", "images") and not request.also_split:
        raise UsageError("--reference-count: images are compared one by one here, so there are as many; use -n")
    if request.save_statistics is not None:
        _check_saving(request)


def _check_novelty(request: EvaluationRequest) -> None:
    """Raises UsageError where there are no samples that could be copies, or no training pictures to compare with."""
    if request.subject not in ("model", "images"):
        what = (
            "this model's pictures start from given ones, which they are to resemble"
            if request.subject == "task"
            else "needs samples: use --model or --images"
        )
        raise UsageError(f"--metrics novelty: {what}")
    if request.data is None and request.subject == "images":
        raise UsageError("--metrics novelty: name the data with --data, whose training rows may have been copied")
    if is_npz(request.data):
        raise UsageError(f"--metrics novelty: {request.data} has no training and held-out rows; name a data set")


def given_conditions(request: EvaluationRequest) -> tuple[str, ...]:
    """Conditions of the model without that of its task."""
    return tuple(name for name in request.conditions if name not in TASK_CONDITIONS.values())


def with_row_settings(request: EvaluationRequest) -> EvaluationRequest:
    """The request (`opened`) with the settings of its protocol in those of its data."""
    if not request.row_settings or is_npz(request.data):
        return request
    run = request.model if request.model is not None else request.autoencoder
    data = own_data(run, request.data)
    settings = data if isinstance(data, DataSettings) else DataSettings(source=str(data))
    return replace(request, data=replace(settings, **request.row_settings))


def own_data(run: Any, data: Any) -> Any:
    """The reference that was named, else the data that the run was trained on."""
    if data is None and run.config is None:
        raise UsageError("name the reference with --data: this model does not say what it was trained on")
    return run.config.data if data is None else data


def _check_saving(request: EvaluationRequest) -> None:
    """Raises UsageError where there are no statistics of a reference to save, or no place for them."""
    path, data = Path(str(request.save_statistics)), request.data
    if len(request.networks) > 1:
        raise UsageError("--save-statistics: a file holds the statistics of one network; name one with --features")
    if path.suffix != ".npz":
        raise UsageError(f"--save-statistics {path}: name a file that ends in .npz, so that --data reads it")
    if not needing(request.chosen, *OF_SETS) or (request.subject == "images" and data is None):
        raise UsageError("--save-statistics: needs a reference, and a metric that compares sets, as fid")
    inputs = [*(request.pairs or ()), data, request.images]
    if any(path.resolve() == Path(one).resolve() for one in inputs if isinstance(one, (str, Path))):
        raise UsageError(f"--save-statistics {path}: is an input of this evaluation; name another file")
    refuse_foreign_statistics(path)


def is_npz(data: Any) -> bool:
    """Whether data is the name of an .npz."""
    return isinstance(data, (str, Path)) and str(data).endswith(".npz")
