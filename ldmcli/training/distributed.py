"""A training process among the others: device, precision, rank, and the collective calls that the loop needs."""

import os
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch

from ldmcli.core.errors import ResourceError, UsageError
from ldmcli.core.files import tensors_hash
from ldmcli.core.settings import TrainSettings
from ldmcli.core.world import CONTROL_TIMEOUT, World
from ldmcli.maths import rng
from ldmcli.training.optimizer import bf16_is_fast


class Distributed(World):
    """One process of a training. Accelerate gives device, wrapping, backward and gathering; precision is ours.

    Gradients, and what else a backward pass needs of others, go through Accelerate's group, whose timeout is
    train.gradient_timeout. Objects and decisions go through a group of their own (`World`).
    """

    def __init__(self, settings: TrainSettings):
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        started = int(os.environ.get("WORLD_SIZE", "1"))
        # without an accelerator a bare Accelerator() ignores the launcher's variables and believes itself alone
        cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
        # buffers are equal on all processes already; broadcasting them between two forwards breaks the backward
        handlers = [
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=settings.gradient_timeout)),
        ]
        self.accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=handlers)
        if self.accelerator.num_processes != started:
            raise UsageError(
                f"{started} processes were started but this one sees {self.accelerator.num_processes}; start with "
                "`ldm … --gpus N`, or `accelerate launch --multi_gpu --num_processes N -m ldmcli …`"
            )
        self.device = self.accelerator.device
        control = torch.distributed.new_group(backend="gloo", timeout=CONTROL_TIMEOUT) if started > 1 else None
        super().__init__(self.accelerator.process_index, self.accelerator.num_processes, control)
        self.dtype = self.on_rank_0(lambda: autocast_dtype(settings.mixed_precision, self.device))

    @property
    def precision(self) -> str:
        """float32, bfloat16 or float16."""
        return "float32" if self.dtype is None else str(self.dtype).removeprefix("torch.")

    def set_precision(self, name: str) -> None:
        """Takes over the precision that a run was started with."""
        self.dtype = None if name == "float32" else getattr(torch, name)

    @property
    def gpu_name(self) -> str:
        """The name of this process's GPU; "" where it has none."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return "Apple GPU (MPS)" if self.device.type == "mps" else ""

    def on_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A micro-batch on this process's device. float64 stays on the host: Apple GPUs have none, and what is
        made from it (timesteps) is made there."""
        return {k: v if v.dtype == torch.float64 else v.to(self.device) for k, v in batch.items()}

    def autocast(self):
        """Context in which matrix products run in the low precision, if one is in use."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    @contextmanager
    def dropout(self, seed: int, *path: int | str):
        """Context in which dropout draws follow from seed, path and rank.

        Dropout is the one layer that reads torch's global generator; left alone, no run with it could be repeated.
        """
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(rng.key(seed, "dropout", *path, self.rank))
            yield

    def mean(self, values: dict[str, float], weight: float) -> dict[str, float]:
        """Mean over processes of equally named numbers, each with the `weight` of its process. Collective."""
        if self.world_size == 1:
            return values
        names = sorted(values)
        tensor = torch.tensor([weight] + [values[n] * weight for n in names], dtype=torch.float64)
        torch.distributed.all_reduce(tensor, group=self.control)
        total = tensor.tolist()
        return {name: value / total[0] for name, value in zip(names, total[1:])}

    def check_equal(self, modules: dict[str, torch.nn.Module]) -> None:
        """Raises ResourceError where weights differ between processes. Collective."""
        own = tensors_hash({f"{n}.{k}": t.cpu() for n, m in modules.items() for k, t in m.state_dict().items()})
        hashes = self.gather(own)
        if len(set(hashes)) > 1:
            odd = next(rank for rank, value in enumerate(hashes) if value != hashes[0])
            raise ResourceError(f"the weights of process {odd} differ from those of process 0; stop and resume the run")


def autocast_dtype(setting: str, device: torch.device) -> torch.dtype | None:
    """auto: bfloat16 where it is fast (CUDA from Ampere on, CPUs with bf16 dot products), else full precision."""
    if setting == "auto":
        return torch.bfloat16 if bf16_is_fast(device) else None
    if setting == "fp16" and device.type == "cpu":
        raise UsageError("train.mixed_precision = 'fp16': needs a GPU; use bf16 or no")
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[setting]
