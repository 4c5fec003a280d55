"""Networks, optimisers, averaged weights and progress of a training: what a checkpoint holds."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from ldmcli.core.settings import TrainSettings
from ldmcli.networks.blocks import set_checkpointing
from ldmcli.training import sharding
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
            self.wrapped[name], self.optimizers[name] = self._prepared(module, objective.learning_rate(name))
            set_checkpointing(module, settings.checkpointing)
            self.trainable[name] = [p for p in module.parameters() if p.requires_grad]
        self.training = ""  # the phase whose network gets gradients
        self.has_dropout = any(
            isinstance(part, torch.nn.Dropout) and part.p > 0
            for module in self.networks.values()
            for part in module.modules()
        )
        self.main = self.networks[objective.main_network]
        self._in_ema = {name: p for name, p in self.main.named_parameters() if objective.in_ema(name)}
        self.averaged = [(name, sharding.part_of(p)) for name, p in self._in_ema.items()]
        self.restart_ema()

    def _prepared(self, module: torch.nn.Module, lr: float | None) -> tuple[Any, PhaseOptimizer]:
        """(a network as it is called in training, its optimiser)."""
        dist, settings = self.dist, self.settings
        if settings.shard:
            dist.check_equal({"": module})
            sharding.shard(module, dist.device, dist.world_size)
            return module, sharding.ShardedOptimizer(module, settings, lr)
        # each size of a micro-batch its own graph: one for all of them is slower, and comes only with the second size
        used = torch.compile(module, dynamic=False) if settings.compile else module
        wrapped = dist.accelerator.prepare_model(used) if dist.world_size > 1 else used
        return wrapped, PhaseOptimizer(module.named_parameters(), settings, lr)

    def adding_up(self, phase: str) -> AbstractContextManager[None]:
        """Context of backward passes whose gradients stay with this process until one outside of it."""
        if self.dist.world_size == 1:
            return nullcontext()
        if self.settings.shard:
            return sharding.unsynchronised(self.wrapped[phase])
        return self.dist.accelerator.no_sync(self.wrapped[phase])

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        """Of the gradients of a network, over all processes."""
        return sharding.total_norm(gradients, self.settings.shard)

    def averages(self) -> dict[str, Tensor]:
        """The averaged weights by name; {} without an average."""
        shadow = self.ema.shadow if self.ema else {}
        return {name: sharding.like(part, self._in_ema[name]) for name, part in shadow.items()}

    def placed(self, network: str, kind: str) -> Callable[[str, Tensor], Tensor]:
        """What makes of a whole tensor of a checkpoint what this process loads of it. kind: weights, optimizer or
        ema."""
        device, own = self.dist.device, self.networks[network].state_dict()
        optimizer = self.optimizers[network]
        if isinstance(optimizer, sharding.ShardedOptimizer) and kind == "optimizer":
            return optimizer.placed

        def place(name: str, tensor: Tensor) -> Tensor:
            cut = sharding.cut_like(tensor, own[name]) if name in own else tensor.to(device)
            return sharding.part_of(cut) if kind == "ema" else cut

        return place

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
        if phase == self.training:
            return
        self.training = phase
        for name, parameters in self.trainable.items():
            for parameter in parameters:
                parameter.requires_grad_(name == phase)

    def with_ema_weights(self, function: Callable[[], T]) -> T:
        """Calls `function` in evaluation mode with the averaged weights in place; modes and weights come back. Of
        networks that are cut it has all weights. Collective."""
        for module in self.networks.values():
            module.eval()
        if self.ema:
            self.ema.swap()
        try:
            with ExitStack() as stack:
                for module in self.networks.values():
                    stack.enter_context(sharding.gathered(module))
                return function()
        finally:
            if self.ema:
                self.ema.swap()
            for module in self.networks.values():
                module.train()
