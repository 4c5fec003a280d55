"""Optimisers with named, savable state: AdamW, and Muon for hidden matrices beside it; the average of the weights."""

import time
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor, nn

from ldmcli.core.errors import ModelError
from ldmcli.core.settings import TrainSettings
from ldmcli.training.lr_schedule import ema_decay_at

# first and last layers, tables and position codes: their rows are not what orthogonalisation is for
_NOT_HIDDEN = (
    "embedding",
    "token_emb",
    "pos_emb",
    "position",
    "input_blocks.0.0",
    "out.2",
    "conv_in",
    "conv_out",
    "stem",
    "head",
    "quant_conv",
    "label_emb",
    "time_embed.0",
)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes a parameter: at least 2-d, and neither first layer, last layer, table nor position code."""
    return (
        parameter.ndim >= 2
        and min(parameter.shape[0], parameter[0].numel()) > 1
        and not any(part in name for part in _NOT_HIDDEN)
    )


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Nearest (semi-)orthogonal matrices of a stack (k, rows, columns): Newton-Schulz, quintic (Jordan et al. 2024).

    Singular values end near 1 (between about 0.7 and 1.2). Runs in the dtype of its input.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Nesterov momentum, orthogonalised, times sqrt(max(1, rows / columns)) (Jordan et al. 2024). Convolutions are
    flattened to matrices of (out channels, the rest).

    Matrices of one shape are orthogonalised together. With `every` > 1 the direction is computed every so many steps
    and applied again in between.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], lr: float, every: int = 1, momentum: float = 0.95):
        self.named, self.lr, self.every, self.momentum = named, lr, every, momentum
        self.velocity = {name: torch.zeros_like(p) for name, p in named}
        self.direction = {name: torch.zeros_like(p) for name, p in named} if every > 1 else {}
        self.count = 0
        self.dtype = torch.float32  # of the orthogonalisation
        shapes: dict[tuple, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in named:
            shapes.setdefault((parameter.shape[0], parameter[0].numel()), []).append((name, parameter))
        self.groups = list(shapes.items())

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update at rate lr * factor from the parameters' gradients, which all must have."""
        grads = {name: p.grad for name, p in self.named if p.grad is not None}
        velocities = [self.velocity[name] for name in grads]
        torch._foreach_lerp_(velocities, list(grads.values()), 1 - self.momentum)
        refresh = self.count % self.every == 0
        self.count += 1
        for (rows, columns), members in self.groups:
            scale = max(1.0, rows / columns) ** 0.5
            if refresh:
                nesterov = [torch.lerp(grads[name], self.velocity[name], self.momentum) for name, _ in members]
                matrices = torch.stack([matrix.reshape(rows, columns) for matrix in nesterov])
                directions = orthogonalise(matrices.to(self.dtype)).to(matrices.dtype)
                if self.every > 1:
                    for (name, p), direction in zip(members, directions):
                        self.direction[name].copy_(direction.reshape(p.shape))
            for i, (name, p) in enumerate(members):
                update = directions[i].reshape(p.shape) if refresh else self.direction[name]
                p.add_(update, alpha=-self.lr * factor * scale)


@lru_cache
def bf16_is_fast(device: torch.device) -> bool:
    """CUDA from Ampere on; on a CPU whatever a matrix product says (bfloat16 needs more than an instruction to pay)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return product_seconds(torch.bfloat16) < 0.75 * product_seconds(torch.float32)


def product_seconds(dtype: torch.dtype) -> float:
    """How long a matrix product of this type takes on the CPU: the best of six."""
    matrix = torch.ones(768, 768, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        begun = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - begun)
    return best


class PhaseOptimizer:
    """The optimiser of one phase. Rates are set by the caller at every step: nothing here depends on the past."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], settings: TrainSettings, lr: float | None = None):
        self.named = [(name, p) for name, p in named if p.requires_grad]
        lr = lr or settings.lr
        muon = settings.optimizer == "muon"
        hidden = [(n, p) for n, p in self.named if is_hidden_matrix(n, p)] if muon else []
        taken = {name for name, _ in hidden}
        rest = [p for n, p in self.named if n not in taken]
        self.adam_names = [n for n, _ in self.named if n not in taken]
        self.base = settings.adam_lr if muon else lr
        fused = all(p.device.type in ("cpu", "cuda") for p in rest)
        self.adam = (
            torch.optim.AdamW(rest, lr=self.base, betas=settings.betas, weight_decay=settings.weight_decay, fused=fused)
            if rest
            else None
        )
        self.muon = Muon(hidden, lr, settings.muon_every) if hidden else None

    def gradients(self) -> list[Tensor]:
        """Gradients of all parameters that have one."""
        return [p.grad for _, p in self.named if p.grad is not None]

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for _, parameter in self.named:
            parameter.grad = None

    def step(self, factor: float) -> None:
        """One update with every rate multiplied by `factor` (warm-up, cooldown)."""
        for _, parameter in self.named:
            if parameter.grad is None:  # a condition that the batch did not use: no gradient is a gradient of 0
                parameter.grad = torch.zeros_like(parameter)
        if self.adam:
            for group in self.adam.param_groups:
                group["lr"] = self.base * factor
            self.adam.step()
        if self.muon:
            self.muon.step(factor)

    def state_dict(self) -> dict[str, Tensor]:
        """All state as flat named tensors."""
        out = {}
        if self.adam:
            for index, values in self.adam.state_dict()["state"].items():
                out.update({f"adam.{self.adam_names[index]}.{key}": torch.as_tensor(v) for key, v in values.items()})
        if self.muon:
            out["muon.count"] = torch.tensor(self.muon.count)
            out.update({f"muon.velocity.{name}": v for name, v in self.muon.velocity.items()})
            out.update({f"muon.direction.{name}": v for name, v in self.muon.direction.items()})
        return out

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`. Raises ModelError when names do not fit."""
        try:
            if self.adam:
                self._load_adam(self.adam, state)
            if self.muon:
                self.muon.count = int(state["muon.count"])
                for group, tensors in (("velocity", self.muon.velocity), ("direction", self.muon.direction)):
                    for name, tensor in tensors.items():
                        tensor.copy_(state[f"muon.{group}.{name}"])
        except (KeyError, RuntimeError) as error:
            raise ModelError(f"the checkpoint's optimiser state does not fit this model ({error})") from error

    def _load_adam(self, adam: torch.optim.AdamW, state: dict[str, Tensor]) -> None:
        fresh = adam.state_dict()
        entries: dict[int, dict[str, Tensor]] = {}
        for index, name in enumerate(self.adam_names):
            found = {
                key: state[f"adam.{name}.{key}"]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"adam.{name}.{key}" in state
            }
            if found:
                entries[index] = found
        adam.load_state_dict({"state": entries, "param_groups": fresh["param_groups"]})


class Ema:
    """Average of weights in float32: s <- s - (1 - d)(s - p), d = min(decay, (1 + n) / (10 + n)) (original code)."""

    def __init__(self, named: Iterable[tuple[str, Tensor]], decay: float):
        self.named = list(named)
        self.decay, self.count = decay, 0
        self.shadow = {name: p.detach().float().clone() for name, p in self.named}

    @torch.no_grad()
    def update(self) -> None:
        """Call once after every applied update."""
        self.count += 1
        rate = 1 - ema_decay_at(self.count, self.decay)
        torch._foreach_lerp_([self.shadow[n] for n, _ in self.named], [p.detach().float() for _, p in self.named], rate)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges averaged and trained weights in place; call again to undo."""
        for name, parameter in self.named:
            kept = parameter.detach().clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name] = kept.float()

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], count: int) -> None:
        """Continues an average."""
        for name, shadow in self.shadow.items():
            shadow.copy_(tensors[name])
        self.count = count
