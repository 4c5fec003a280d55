"""A classifier of noisy latents in use: which models it can lead, and the guide that it is (App. C)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldmcli.conditions.class_ import ALL, Class
from ldmcli.core.errors import ModelError, UsageError
from ldmcli.core.world import default_device
from ldmcli.diffusion.gradient_guidance import classifier_guide
from ldmcli.diffusion.samplers import Denoise
from ldmcli.diffusion.schedule import Schedule, make_schedule
from ldmcli.formats.bundle import ClassifierBundle, strict_load
from ldmcli.formats.run_folder import fingerprint_of, read_classifier
from ldmcli.networks.latent_scale import LatentScale
from ldmcli.networks.meta_device import on_meta_device
from ldmcli.networks.names import hint, place_of
from ldmcli.networks.noisy_classifier import NoisyClassifier
from ldmcli.sampling.model import TrainedDiffusion

SCALE_TOLERANCE = 0.02  # of a standard deviation: scales measured on other rows of the same data differ by less


class LoadedClassifier:
    """log p(c | z_t, t) of the latents of one first stage at one scale, noised by one schedule."""

    kind = "classifier"

    def __init__(self, bundle: ClassifierBundle, device: torch.device, where: str | Path = ""):
        config = bundle.config
        with on_meta_device():
            network = NoisyClassifier(config.diffusion, config.classifier.pool, len(bundle.names), bundle.latent_shape)
        strict_load(network, bundle.tensors, where)
        self.network = network.eval().requires_grad_(False).to(device)
        self.config, self.names, self.scale = config, bundle.names, bundle.scale
        self.autoencoder, self.place = bundle.autoencoder, Path(where)
        self.schedule = make_schedule(config.diffusion)
        self.fingerprint = bundle.fingerprint or fingerprint_of(bundle.tensors)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def log_probabilities(self, z_t: Tensor, t: float | Tensor) -> Tensor:
        """(B, classes) of latents (B, c, h, w) as the diffusion model sees them, at a timestep or (B,) of them. Passes
        gradients."""
        if isinstance(t, Tensor):
            times = t.to(z_t.device, torch.float32).expand(len(z_t))
        else:
            times = torch.full((len(z_t),), t, dtype=torch.float32, device=z_t.device)
        return F.log_softmax(self.network(z_t, times).float(), dim=1)

    def index(self, value: Any) -> int:
        """The class that a name or number means. Raises UsageError, naming classes."""
        if isinstance(value, str):
            found = place_of(value, self.names)
        else:
            found = int(value) if 0 <= int(value) < len(self.names) else None
        if found is None:
            names = self.names
            raise UsageError(f"--class {value}: no class of the classifier among {len(names)}; {hint(value, names)}")
        return found

    def check_fits(self, model: TrainedDiffusion) -> None:
        """Raises ModelError where the classifier was trained on other latents or other noise than the model."""
        reason = (
            "in the latents of another autoencoder"
            if self.autoencoder != model.autoencoder.fingerprint
            else "with another noise schedule"
            if not same_schedule(self.schedule, model.schedule)
            else "at another latent scale"
            if not same_scale(self.scale, model.autoencoder.scale)
            else ""
        )
        if reason:
            raise ModelError(
                f"--classifier {self.place}: was trained {reason} than the model; train one with "
                "`ldm train-classifier --model` and the model's run"
            )


def same_schedule(a: Schedule, b: Schedule) -> bool:
    """Whether two processes noise alike; what the networks predict does not matter."""
    return len(a.alphas) == len(b.alphas) and np.allclose([a.alphas, a.sigmas], [b.alphas, b.sigmas], atol=1e-6)


def same_scale(a: LatentScale, b: LatentScale) -> bool:
    """Whether two latent scales agree but for what other rows of the same data change."""
    first, second = (np.array([one.mean, one.std]) for one in (a, b))
    return first.shape == second.shape and bool((abs(first - second) <= SCALE_TOLERANCE * second[1]).all())


def load_classifier(path: str | Path, device: str | torch.device | None = None) -> LoadedClassifier:
    """The classifier of a run of `ldm train-classifier`, ready for use. Raises ModelError."""
    chosen = torch.device(device) if device else default_device()
    return LoadedClassifier(read_classifier(Path(path)), chosen, path)


@dataclass(frozen=True)
class ClassGuidance:
    """Samples led to classes. labels: class of each sample in order, or, before `of`, those that they share out."""

    classifier: LoadedClassifier
    labels: Sequence[int]
    scale: float

    def of(self, ids: Sequence[int]) -> "ClassGuidance":
        """The guidance of samples `ids`: sample k is led to label k mod their number."""
        return replace(self, labels=[self.labels[k % len(self.labels)] for k in ids])

    def guide(self, denoise: Denoise) -> Denoise:
        """A denoiser that is led to the labels, one a row of z."""
        wanted = torch.tensor(list(self.labels))[:, None].to(self.classifier.device)

        def log_prob(z: Tensor, t: float) -> Tensor:
            return self.classifier.log_probabilities(z, t).gather(1, wanted)[:, 0]

        return classifier_guide(denoise, log_prob, self.scale)


def without_classes(model: TrainedDiffusion, values: dict[str, list], led: ClassGuidance | None) -> dict[str, list]:
    """Raw values without classes that are for the classifier alone, since the model takes none."""
    alone = led is not None and Class.name not in model.conditions.kinds
    return {name: given for name, given in values.items() if not (alone and name == Class.name)}


def group_count(values: Mapping[str, Sequence], led: ClassGuidance | None) -> int:
    """How many samples have values of their own: sample k takes entry k mod their number of each."""
    return max([len(given) for given in values.values()] + ([len(led.labels)] if led else []), default=1)


def class_guidance(model: TrainedDiffusion, classifier: Any, values: Sequence[Any], scale: float) -> ClassGuidance:
    """Samples of a model led to classes (names or numbers; none, or "all": every one in turn) by a classifier or its
    run. Raises UsageError for a class that it does not know or a scale that is none, ModelError where it does not fit
    the model."""
    if not 0 <= scale < float("inf"):
        raise UsageError(f"--classifier-scale {scale:g}: a number from 0 on")
    if not isinstance(classifier, LoadedClassifier):
        classifier = load_classifier(classifier, model.device)
    classifier.check_fits(model)
    if names := model.class_names:  # the classifier may count the same classes in another order
        own: Any = model.conditions.entries[Class.name]
        numbers = [own.index(value) for value in values if value != ALL]
        values = [names[k] if k < len(names) else k for k in numbers] or names
    every = not values or list(values) == [ALL]
    labels = list(range(len(classifier.names))) if every else [classifier.index(value) for value in values]
    return ClassGuidance(classifier, labels, scale)
