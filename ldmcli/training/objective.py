"""What the training loop needs of objectives: the one interface of `AutoencoderObjective`, `DiffusionObjective` and
`ClassifierObjective`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn


class Objective(Protocol):
    """Networks, data and losses of one training. The loop owns steps, rates, micro-batches and checkpoints.

    A step runs the phases of `phases(step)` in order; each phase updates the network of its name. "Collective" methods
    communicate between processes: all call them, in the same order.
    """

    kind: str  # of the run, as run.json has it: "autoencoder", "diffusion" or "classifier"
    main_network: str  # its (averaged) weights are the run's result
    monitored: str  # statistic whose lasting rise means divergence
    networks: dict[str, nn.Module]  # by phase
    rows: Any  # training rows: `len`, `name(i)`, `fingerprint`
    validation: Any  # validation rows
    bad: list[Any]  # what is left out of both, as errors
    size: tuple[int, int]  # (height, width) of the images in pixels

    def describe(self) -> str:
        """The first line of a training."""

    def validation_note(self) -> str:
        """What a validation of this run leaves out because the run is short; "" = nothing."""

    def parents(self) -> list[dict[str, str]]:
        """Runs that this one builds on, as run.json lists them: path and hash of the weights."""

    def activation_bytes(self) -> float:
        """Bytes that one image takes in a step, without weights, in the number format that the run computes in."""

    def learning_rate(self, phase: str) -> float | None:
        """A rate of its own for a phase, None for train.lr."""

    def in_ema(self, name: str) -> bool:
        """Whether the average of the weights covers parameter `name` of the main network."""

    def init_weights(self) -> dict[str, Tensor]:
        """Weights that the main network begins with instead of its own; {} = none. Raises ModelError."""

    def initial_statistics(self) -> dict[str, Any] | None:
        """stats.json as far as it is known before the first step; None where it must be measured afterwards."""

    def phases(self, step: int) -> tuple[str, ...]:
        """Networks that step `step` updates, in order."""

    def batch(self, step: int) -> dict[str, Tensor]:
        """This process's slice of a step, on the CPU; "row" (B,) is in it. Each number depends on (seed, position)."""

    def loss(
        self, phase: str, networks: dict[str, Any], batch: dict[str, Tensor], step: int, norms: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(mean loss of a micro-batch, statistics). `networks` are wrapped for data-parallel training; with `norms`,
        statistics that cost time or communication are measured, too."""

    def after_update(self, step: int) -> dict[str, Tensor]:
        """What follows a step whose updates were all applied; statistics. Collective. On CUDA, where the host does not
        know yet, after every step."""

    def extra_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside weights and optimisers."""

    def load_extra_state(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `extra_state`."""

    def evaluate(self, stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Metrics on validation rows. Collective; called with the averaged weights in place. None where `stopped()`
        became true on a process, and what takes long was given up."""

    def preview(self, path: Path) -> None:
        """Writes a sheet of images. Called on rank 0, with the averaged weights in place. Raises ModelError."""

    def run_statistics(self) -> dict[str, Any]:
        """stats.json: latent statistics and whatever else inference needs beside weights. On rank 0."""

    def save_inference_files(self, weights: dict[str, Tensor], metadata: dict[str, str], stats: dict[str, Any]) -> None:
        """Writes stats.json and the weights, and what they need. On rank 0."""
