"""A training process among the others: device, precision, rank, and the collective calls that the loop needs."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ldmcli.core import files
from ldmcli.core.errors import ResourceError, UsageError
from ldmcli.core.settings import TrainSettings
from ldmcli.core.world import CONTROL_TIMEOUT, World
from ldmcli.maths import rng
from ldmcli.training.optimizer import bf16_is_fast
from ldmcli.training.sharding import is_shard


class Distributed(World):
    """One process of a training. Accelerate gives device, wrapping, backward and gathering; precision is ours.

    Gradients, and what else a backward pass needs of others, go through Accelerate's group, whose timeout is
    train.gradient_timeout. Objects and decisions go through a group of their own (`World`).
    """

    def __init__(self, settings: TrainSettings):
        refuse_foreign()
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        started = int(os.environ.get("WORLD_SIZE", "1"))
        # without an accelerator a bare Accelerator() ignores the launcher's variables and believes itself alone
        cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
        # buffers are equal on all processes already; broadcasting them between two forwards breaks the backward
        handlers = [
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(seconds=settings.gradient_timeout)),
        ]
        self.accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=handlers)
        if self.accelerator.num_processes != started:
            raise UsageError(
                f"{started} processes were started but this one sees {self.accelerator.num_processes}; start with "
                "`ldm … --gpus N`, or `accelerate launch --multi_gpu --num_processes N -m ldmcli …`"
            )
        refuse_foreign(str(self.accelerator.distributed_type).rpartition(".")[2])
        self.device = self.accelerator.device
        self._copies: torch.cuda.Stream | None = None  # the stream on which batches come
        control = torch.distributed.new_group(backend="gloo", timeout=CONTROL_TIMEOUT) if started > 1 else None
        super().__init__(self.accelerator.process_index, self.accelerator.num_processes, control)
        self.check_gpus()
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

    def pinned(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch in memory that a GPU reads while the host goes on; elsewhere as it is."""
        return {k: v.pin_memory() for k, v in batch.items()} if self.device.type == "cuda" else batch

    def on_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch, pinned on CUDA, on this process's device. float64 stays on the host: Apple GPUs have none, and what
        is made from it (timesteps) is made there.

        CUDA copies it beside the work that was begun before, and what is begun after waits for it there.
        """
        moved = {k: v for k, v in batch.items() if v.dtype != torch.float64}
        if self.device.type != "cuda":
            return batch | {k: v.to(self.device) for k, v in moved.items()}
        if self._copies is None:
            self._copies = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._copies):
            moved = {k: v.to(self.device, non_blocking=True) for k, v in moved.items()}
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        for tensor in moved.values():
            tensor.record_stream(current)
        return batch | moved

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

    def tensors_of_rank_0(
        self, read: Callable[[], dict[str, torch.Tensor]], place: Callable[[str, torch.Tensor], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What `read` gives on rank 0, on all processes: each tensor as `place(name, tensor)` makes it of one on the
        CPU, so that no other process holds them all on its host. Raises rank 0's LdmError on all. Collective."""
        found: dict[str, torch.Tensor] = {}

        def described() -> list[tuple[str, torch.Size, torch.dtype]]:
            found.update(read())
            return [(name, tensor.shape, tensor.dtype) for name, tensor in found.items()]

        out = {}
        for name, shape, dtype in self.on_rank_0(described):
            tensor = found.pop(name).contiguous() if self.is_rank_0 else torch.empty(shape, dtype=dtype)
            if self.world_size > 1 and tensor.numel():  # as bytes: not every backend knows every type
                torch.distributed.broadcast(tensor.reshape(-1).view(torch.uint8), 0, group=self.control)
            out[name] = place(name, tensor)
        return out

    @contextmanager
    def folder_of_rank_0(self, folder: Path, name: str) -> Iterator[Path]:
        """A folder in which the small files below `name` are those that rank 0 sees: the folder itself there, a copy
        on the other processes, whose file system may show late, or never, what rank 0 has written. Collective."""

        def content() -> dict[str, bytes]:
            return {str(path.relative_to(folder)): path.read_bytes() for path in files.files_below(folder / name)}

        found = self.on_rank_0(content)
        if self.is_rank_0:
            yield folder
            return
        with tempfile.TemporaryDirectory(prefix="ldm-") as copy:
            for place, data in found.items():
                path = Path(copy, place)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            yield Path(copy)

    def check_equal(self, modules: dict[str, torch.nn.Module]) -> None:
        """Raises ResourceError where weights differ between processes; those that each has a part of are left out.
        Collective."""
        named = {f"{n}.{k}": t for n, m in modules.items() for k, t in m.state_dict().items() if not is_shard(t)}
        sums = self.gather(checksum([named[name] for name in sorted(named)]))
        if len(set(sums)) > 1:
            odd = next(rank for rank, value in enumerate(sums) if value != sums[0])
            raise ResourceError(f"the weights of process {odd} differ from those of process 0; stop and resume the run")


def checksum(tensors: list[torch.Tensor]) -> int:
    """A number of 64 bits that any changed bit changes, and two that change with a chance of about 2^-64: sums of the
    tensors' bits as integers, each weighed by its place. Made on the tensors' device, in one pass over them."""
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device if tensors else "cpu")
    for tensor in tensors:
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        total = total * 1_000_003 + tensor.detach().contiguous().reshape(-1).view(whole).sum(dtype=torch.int64)
    return int(total)


# launchers whose processes keep parts of a model by their own rules, as Accelerate's variables name them
_FOREIGN = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "FSDP"}
_FOREIGN |= {"ACCELERATE_USE_MEGATRON_LM": "Megatron-LM", "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config"}
_OWN_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU")


def refuse_foreign(kind: str = "NO") -> None:
    """Raises UsageError where Accelerate was set up to split models itself. kind: its `distributed_type`."""
    asked = [
        name for variable, name in _FOREIGN.items() if os.environ.get(variable, "").lower() in ("1", "true", "yes")
    ]
    if asked or kind not in _OWN_KINDS:
        raise UsageError(
            f"Accelerate is set up for {asked[0] if asked else kind}, which `ldm` does not train with; start with "
            "`ldm … --gpus N`, torchrun or `accelerate launch --multi_gpu`, and where one GPU does not hold the "
            "model's weights and optimiser add --set train.shard=true"
        )


@contextmanager
def arithmetic(settings: TrainSettings) -> Iterator[None]:
    """Context of a training's arithmetic: TF32 and tuned convolutions (train.tf32), one order of sums
    (train.deterministic). What was set before comes back."""
    cudnn, convolutions = torch.backends.cudnn, getattr(torch.backends.cudnn, "conv", None)
    # from PyTorch 2.9 on there are names that refuse the older ones
    name, on, off = ("allow_tf32", True, False) if convolutions is None else ("fp32_precision", "tf32", "ieee")
    exact = settings.deterministic
    wanted: list[tuple[Any, str, Any]] = [
        (convolutions or cudnn, name, on if settings.tf32 else off),
        (torch.backends.cuda.matmul, name, on if settings.tf32 else off),
        (cudnn, "benchmark", settings.tf32 and not exact),
        (cudnn, "deterministic", exact),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in wanted]
    algorithms = torch.are_deterministic_algorithms_enabled()
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    try:
        for owner, name, value in wanted:
            setattr(owner, name, value)
        torch.use_deterministic_algorithms(exact or algorithms)
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms)
        for owner, name, value in before:
            setattr(owner, name, value)


def autocast_dtype(setting: str, device: torch.device) -> torch.dtype | None:
    """auto: bfloat16 where it is fast (CUDA from Ampere on, CPUs with bf16 dot products), float16 on older GPUs of
    NVIDIA, else full precision."""
    if setting == "auto":
        return torch.bfloat16 if bf16_is_fast(device) else torch.float16 if device.type == "cuda" else None
    if setting == "fp16" and device.type == "cpu":
        raise UsageError("train.mixed_precision = 'fp16': needs a GPU; use bf16 or no")
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[setting]
