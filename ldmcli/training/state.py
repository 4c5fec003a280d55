"""Networks, optimisers, averaged weights and progress of a training: what a checkpoint holds."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ldmcli.core.settings import TrainSettings
from ldmcli.training.distributed import Distributed
from ldmcli.training.objective import Objective
from ldmcli.training.optimizer import Ema, PhaseOptimizer
from ldmcli.training.progress import Progress

T = TypeVar("T")
INITIAL_FP16_SCALE = 2.0**15


class TrainState:
    """All that training changes. Dictionaries are by phase, that is by the name of the network it updates."""

    def __init__(self, objective: Objective, dist: Distributed, settings: TrainSettings):
        self.dist, self.settings, self.networks = dist, settings, objective.networks
        self.progress = Progress(loss_scale=INITIAL_FP16_SCALE if dist.dtype == torch.float16 else 1.0)
        self.wrapped: dict[str, Any] = {}  # compiled and data-parallel, where the settings say so
        self.optimizers: dict[str, PhaseOptimizer] = {}
        self.trainable: dict[str, list[torch.nn.Parameter]] = {}  # without what a network keeps frozen
        dist.all_reduce_max([0.0])  # wrapping compares weights: nobody begins before the others are here
        for name, module in self.networks.items():
            module.to(dist.device).train()
            self.trainable[name] = [p for p in module.parameters() if p.requires_grad]
            used = torch.compile(module) if settings.compile else module
            self.wrapped[name] = dist.accelerator.prepare_model(used) if dist.world_size > 1 else used
            self.optimizers[name] = PhaseOptimizer(module.named_parameters(), settings, objective.learning_rate(name))
        self.main = self.networks[objective.main_network]
        self.averaged = [(name, p) for name, p in self.main.named_parameters() if objective.in_ema(name)]
        self.restart_ema()

    def restart_ema(self) -> None:
        """Begins the average of the weights anew, at the weights as they are."""
        self.ema = Ema(self.averaged, self.settings.ema_decay) if self.settings.ema else None

    def fix_precision(self) -> None:
        """Keeps "auto", which is measured on a CPU, at what a run was started with, so that resuming is exact."""
        if self.settings.mixed_precision == "auto" and self.progress.precision:
            self.dist.set_precision(self.progress.precision)
        self.progress.precision = self.dist.precision
        for optimizer in self.optimizers.values():
            if optimizer.muon:
                optimizer.muon.dtype = torch.float32 if self.dist.dtype is None else torch.bfloat16

    def train_only(self, phase: str) -> None:
        """Only the network of `phase` gets gradients."""
        for name, parameters in self.trainable.items():
            for parameter in parameters:
                parameter.requires_grad_(name == phase)

    def with_ema_weights(self, function: Callable[[], T]) -> T:
        """Calls `function` in evaluation mode with the averaged weights in place; modes and weights come back."""
        for module in self.networks.values():
            module.eval()
        if self.ema:
            self.ema.swap()
        try:
            return function()
        finally:
            if self.ema:
                self.ema.swap()
            for module in self.networks.values():
                module.train()
