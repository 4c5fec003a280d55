"""Optimisers with named, savable state: AdamW, and Muon for hidden matrices beside it; the average of the weights."""

import time
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor, nn

from ldmcli.core.errors import ModelError
from ldmcli.core.settings import TrainSettings
from ldmcli.training.lr_schedule import ema_decay_at

EMA_TENSORS = 64  # averaged at a time: their differences from the weights take memory

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


def stacked_maps(name: str, named: dict[str, nn.Parameter]) -> int:
    """How many linear maps a matrix holds one below the other: a residual block's embedding gives the scale and the
    shift of its norm, or the shift alone. Each map is orthogonalised by itself."""
    norm = named.get(name.replace("emb_layers.1", "out_layers.0")) if "emb_layers.1" in name else None
    return 1 if norm is None else named[name].shape[0] // norm.shape[0]


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Nearest (semi-)orthogonal matrices of a stack (k, rows, columns): Newton-Schulz, quintic (Jordan et al. 2024).

    X is divided by its Frobenius norm; an iteration multiplies small singular values by 3.4, until they come to stay
    near 1 (between about 0.7 and 1.2). Runs in the dtype of its input. Every iterate of X is a polynomial of G = X Xᵀ
    times X. So only that polynomial is iterated, on matrices of the shorter side, and X is multiplied twice in all: of
    a convolution's 160 x 1440 a quarter of the work.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    gram = x @ x.mT
    product: Tensor | None = None
    for left in reversed(range(iterations)):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial if product is None else polynomial @ product
        if left:
            gram = polynomial @ gram @ polynomial
    x = x if product is None else product @ x
    return x.mT if tall else x


class Muon:
    """Nesterov momentum, orthogonalised, times sqrt(max(1, rows / columns)) (Jordan et al. 2024). Convolutions are
    flattened to matrices of (out channels, the rest). Weight decay is decoupled, as AdamW's: 1 - rate · decay a step.

    Matrices of one shape are orthogonalised together. With `every` > 1 the direction is computed every so many steps
    and applied again in between.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], maps: dict[str, int], lr: float, settings: TrainSettings):
        """maps: `stacked_maps` of each name."""
        self.lr, self.every = lr, settings.muon_every
        self.momentum, self.iterations = settings.muon_momentum, settings.muon_iterations
        self.weight_decay = settings.weight_decay
        self.count = 0
        self.dtype = torch.float32  # of the orthogonalisation
        shapes: dict[tuple[int, int, int], list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in named:
            shapes.setdefault((maps[name], parameter.shape[0], parameter[0].numel()), []).append((name, parameter))
        self.groups = [_MatrixGroup(members, *shape, self.every > 1) for shape, members in shapes.items()]
        self.velocity = {name: view for group in self.groups for name, view in group.named(group.velocity)}
        self.direction = {
            name: view for group in self.groups for name, view in group.named(group.direction) if self.every > 1
        }

    @torch.no_grad()
    def step(self, factor: float, keep: Tensor | None = None) -> None:
        """One update at rate lr * factor from the parameters' gradients, which all must have. keep: a scalar, 0 where
        nothing is to change, whatever the gradients hold, else 1."""
        refresh = self.count % self.every == 0
        self.count += 1
        for group in self.groups:
            nesterov = group.accumulate(self.momentum, keep)
            update = self._orthogonalised(group, nesterov) if refresh else group.direction
            if refresh and self.every > 1:
                group.direction.copy_(update if keep is None else torch.where(keep > 0, update, group.direction))
            update = update if keep is None else update * keep
            scale = max(1.0, group.rows / group.maps / group.columns) ** 0.5
            if self.weight_decay:
                shrink = self.lr * factor * self.weight_decay
                torch._foreach_mul_(group.parameters, 1 - (shrink if keep is None else shrink * keep))
            torch._foreach_add_(group.parameters, group.shaped(update), alpha=-self.lr * factor * scale)

    def _orthogonalised(self, group: "_MatrixGroup", stack: Tensor) -> Tensor:
        """Each map of each matrix."""
        maps = stack.to(self.dtype).view(-1, group.rows // group.maps, group.columns)
        return orthogonalise(maps, self.iterations).reshape(stack.shape).to(stack.dtype)


class _MatrixGroup:
    """Parameters of one shape as matrices, with their momentum in one stack (k, rows, columns). maps: linear maps that
    each holds, one below the other."""

    def __init__(
        self, members: list[tuple[str, nn.Parameter]], maps: int, rows: int, columns: int, keeps_direction: bool
    ):
        self.names = [name for name, _ in members]
        self.parameters: list[Tensor] = [p for _, p in members]
        self.maps, self.rows, self.columns = maps, rows, columns
        self.velocity = self.parameters[0].new_zeros((len(members), rows, columns))
        self.direction = torch.zeros_like(self.velocity) if keeps_direction else self.velocity[:0]

    def shaped(self, stack: Tensor) -> list[Tensor]:
        """The matrices of a stack in the shapes of their parameters."""
        return [matrix.reshape(p.shape) for matrix, p in zip(stack.unbind(), self.parameters)]

    def named(self, stack: Tensor) -> list[tuple[str, Tensor]]:
        """Views of a stack by name."""
        return list(zip(self.names, self.shaped(stack)))

    def accumulate(self, momentum: float, keep: Tensor | None) -> Tensor:
        """The gradients into the momentum; the Nesterov momentum, a new stack."""
        gradients = torch.stack(
            [p.grad.reshape(self.rows, self.columns) for p in self.parameters if p.grad is not None]
        )
        if keep is not None:  # a gradient equal to the momentum leaves that as it is
            gradients = torch.where(keep > 0, gradients, self.velocity)
        # matrix by matrix: a sum's last digit depends on where a tensor begins
        torch._foreach_lerp_(list(self.velocity.unbind()), list(gradients.unbind()), 1 - momentum)
        torch._foreach_lerp_(list(gradients.unbind()), list(self.velocity.unbind()), momentum)
        return gradients


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
        by_name = dict(self.named)
        maps = {name: stacked_maps(name, by_name) for name in taken}
        self.muon = Muon(hidden, maps, lr, settings) if hidden else None

    def gradients(self) -> list[Tensor]:
        """Gradients of all parameters that have one."""
        return [p.grad for _, p in self.named if p.grad is not None]

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for _, parameter in self.named:
            parameter.grad = None

    def step(self, factor: float, keep: Tensor | None = None) -> None:
        """One update with every rate multiplied by `factor` (warm-up, cooldown). keep: a scalar on the device, float32,
        0 where nothing is to change although the gradients may hold NaN, else 1."""
        for _, parameter in self.named:
            if parameter.grad is None:  # a condition that the batch did not use: no gradient is a gradient of 0
                parameter.grad = torch.zeros_like(parameter)
        if self.adam:
            for group in self.adam.param_groups:
                group["lr"] = self.base * factor
            # what the fused kernel asks for
            self.adam.found_inf = None if keep is None else 1 - keep  # type: ignore[attr-defined]
            self.adam.step()
        if self.muon:
            self.muon.step(factor, keep)

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
    def update(self, keep: Tensor | None = None) -> None:
        """Call once after every applied update. keep: a scalar on the device, 0 where there was none, else 1; whoever
        learns that later corrects `count`."""
        self.count += 1
        rate = 1 - ema_decay_at(self.count, self.decay)
        shadows, weights = [self.shadow[n] for n, _ in self.named], [p.detach().float() for _, p in self.named]
        if keep is None:
            torch._foreach_lerp_(shadows, weights, rate)
            return
        for start in range(0, len(shadows), EMA_TENSORS):
            part = slice(start, start + EMA_TENSORS)
            differences = torch._foreach_sub(weights[part], shadows[part])
            torch._foreach_mul_(differences, rate * keep)
            torch._foreach_add_(shadows[part], differences)

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
