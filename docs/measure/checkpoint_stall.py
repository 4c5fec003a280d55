"""How long a save stops the training, and how long its write takes: random weights, AdamW's state, an average, a CPU.

    OMP_NUM_THREADS=1 python docs/measure/checkpoint_stall.py --parameters 400e6 --saves 3

Nothing is trained. As in a training, the memory of the copy is taken before the first save. --no-ema leaves the
average out, and with it a quarter of the memory. The trained tensors share one GiB, more than any cache holds, so that
the copy is what takes memory: 4 (without the average 3) times the weights.
"""

import argparse
import tempfile
import time
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import torch

from ldmcli.core import files, runs
from ldmcli.core.settings import AutoencoderConfig, TrainSettings
from ldmcli.training.checkpoints import Checkpointer
from ldmcli.training.progress import Progress


class Rows(list):
    """No rows."""

    fingerprint = ""


def state(parameters: int, ema: bool) -> tuple[SimpleNamespace, int]:
    """Tensors of a training as they lie in memory, and their bytes."""
    size = 4 << 20  # of one tensor, about that of a convolution of 640 channels
    pool = cycle([torch.rand(size) for _ in range(64)])
    weights = {f"block.{k}": next(pool) for k in range(parameters // size)}
    moments = {f"adam.{name}.{key}": next(pool) for name in weights for key in ("exp_avg", "exp_avg_sq")}
    shadow = {name: next(pool) for name in weights}
    return SimpleNamespace(
        networks={"model": SimpleNamespace(state_dict=lambda: weights)},
        optimizers={"model": SimpleNamespace(state_dict=lambda: moments)},
        ema=SimpleNamespace(shadow=shadow) if ema else None,
        progress=Progress(),
        with_ema_weights=lambda function: function(),
    ), 4 * size * len(weights) * (4 if ema else 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parameters", type=float, default=400e6)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--no-ema", action="store_true")
    parser.add_argument(
        "--out", default=None, help="folder on the disk that is measured; the system's for temporary files"
    )
    args = parser.parse_args()
    trained, size = state(int(args.parameters), not args.no_ema)
    print(f"checkpoint of {files.human_bytes(size)}, {torch.get_num_threads()} thread(s)")
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        run = runs.RunFolder(Path(folder))
        objective = SimpleNamespace(
            main_network="model",
            rows=Rows(),
            extra_state=dict,
            run_statistics=dict,
            save_inference_files=lambda weights, metadata, stats: files.save_tensors(
                run.path / "model.safetensors", weights, metadata
            ),
        )
        world = SimpleNamespace(is_rank_0=True, on_rank_0=lambda function: function(), device=torch.device("cpu"))
        config = AutoencoderConfig(train=TrainSettings(keep=1, save_every=1))
        with Checkpointer(run, config, world, objective, trained) as checkpointer:
            checkpointer.make_room()
            checkpointer.raise_failure()
            for save in range(1, args.saves + 1):
                trained.progress.step = save
                begun = time.perf_counter()
                checkpointer.save(wait=False)
                stopped = time.perf_counter() - begun
                checkpointer.raise_failure()
                took = time.perf_counter() - begun - stopped
                print(f"save {save}: stopped {stopped:.2f} s, written in {took:.1f} s, share {stopped / took:.3f}")


if __name__ == "__main__":
    main()
