"""What a model was trained against, and whether that judges it, too: a number that training has lowered says little."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmcli.core.files import tensors_hash
from ldmcli.core.settings import AutoencoderConfig, LossSettings
from ldmcli.evaluation.extractors import Extractor
from ldmcli.networks.perceptual import BACKBONES, PerceptualNet, perceptual_net, published_name

SHA256 = 64  # hexadecimal digits


@dataclass(frozen=True)
class Teacher:
    """A network in what a training lowered.

    network: its name, of torchvision's backbones that of torchvision ("vgg16"), else as `Extractor.name`.
    weights_sha256: of the file, or the beginning of it; "" where nobody knows. trunk_sha256: `tensors_hash` of its
    convolutions, which files of one network share; "" likewise. where: the setting that named it.
    """

    network: str
    weights_sha256: str
    trunk_sha256: str
    where: str

    @property
    def named(self) -> str:
        """Network and weights: vgg16@397923af."""
        return f"{self.network}@{self.weights_sha256[:12]}" if self.weights_sha256 else self.network

    def is_of(self, network: str, weights_sha256: str, trunk_sha256: str = "") -> bool:
        """Whether it is this network with these weights; of weights that cannot be compared the name decides."""
        if self.weights_sha256 and weights_sha256.startswith(self.weights_sha256):
            return True
        if self.trunk_sha256 and trunk_sha256:
            return self.trunk_sha256 == trunk_sha256
        whole = len(self.weights_sha256) == SHA256 and not self.trunk_sha256
        return self.network == network and not whole


def trained_against(run: Any) -> list[Teacher]:
    """The networks in the losses of a loaded autoencoder or diffusion model, those of its autoencoder included.

    They stand under "trained_against" in the metadata of the weights, as `Teacher` has them; of older runs, the
    settings say what they were.
    """
    first_stage, written = (getattr(run, name, None) for name in ("autoencoder", "trained_against"))
    teachers = [Teacher(**entry) for entry in written or ()]
    if written is None and isinstance(run.config, AutoencoderConfig):
        teachers = _of_settings(run.config.loss)
    of_parent = [] if first_stage is None else trained_against(first_stage)
    return teachers + [Teacher(**{**vars(one), "where": f"{one.where} of the autoencoder"}) for one in of_parent]


def _of_settings(loss: LossSettings) -> list[Teacher]:
    if not loss.perceptual_weight:
        return []
    kind, where = loss.perceptual or "vgg", "loss.perceptual"
    if kind in BACKBONES:
        beginning = Path(published_name(kind)).stem.rpartition("-")[2]
        return [Teacher(BACKBONES[kind].builder, beginning, "", where)]
    if not Path(kind).is_file():
        return [Teacher(Path(kind).name, "", "", where)]
    return [Teacher(**perceptual_net(kind).identity, where=where)]


@dataclass(frozen=True)
class Judge:
    """A teacher that measures, too. key: what the keys of its numbers have of it, "vgg16" or "lpips_squeeze"."""

    teacher: Teacher
    key: str
    title: str  # for people

    def document(self) -> dict[str, Any]:
        """As a result states it."""
        return {"network": self.teacher.named, "where": self.teacher.where, "judges": self.key}

    def warning(self) -> str:
        """In a line."""
        return f"{self.title} judges what was trained against it ({self.teacher.where}): its numbers flatter"


def judges_among(
    teachers: Sequence[Teacher], extractors: Sequence[Extractor], perceptual: PerceptualNet | None
) -> list[Judge]:
    """Those of the networks that measure which are among the teachers."""
    found = []
    for extractor in extractors if teachers else ():
        trunk = getattr(extractor.net, "features", None)
        trunk_hash = (
            "" if trunk is None else tensors_hash({name: value.cpu() for name, value in trunk.state_dict().items()})
        )
        found += [
            Judge(teacher, extractor.suffix, extractor.title)
            for teacher in teachers
            if teacher.is_of(extractor.network.suffix, extractor.sha256, trunk_hash)
            or teacher.is_of(extractor.name, extractor.sha256, trunk_hash)
        ]
    if perceptual is not None and teachers:
        own = perceptual.identity
        title, key = f"LPIPS ({perceptual.kind})", f"lpips_{perceptual.kind}"
        found += [Judge(teacher, key, title) for teacher in teachers if teacher.is_of(**own)]
    return found
