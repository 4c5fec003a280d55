"""Two processes train what one does: losses, gradients, weights; and a run may change its number of processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from golden_cases import clear_of_ties
from processes import ranks

ROOT = Path(__file__).resolve().parents[2]
LOOP = (
    "--data",
    "shapes",
    "--limit",
    10,
    "--size",
    "16x16",
    "--flip",
    "--log-every",
    1,
    "--sample-every",
    0,
    "--eval-every",
    0,
    "--mixed-precision",
    "no",
    "--set",
    "train.cooldown=0",
    "-q",
)
GAN = (
    "--set",
    "loss.disc_weight=0.5",
    "--set",
    "loss.disc_start=0",
    "--set",
    "loss.disc_channels=8",
    "--set",
    "loss.disc_layers=1",
)
TRAINERS = ("train-ae", "train-ldm")


@pytest.fixture(scope="module")
def arguments(ae, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def build(trainer: str, out: Path, *more, steps: int = 12, batch: int = 3) -> list[str]:
        own = (
            tiny.AE_NETWORK
            if trainer == "train-ae"
            else (
                *tiny.UNET,
                "--autoencoder",
                ae,
                "--condition",
                "class+text",
                "--set",
                "condition.drop=0.3",
                "--set",
                f"data.cache_dir={cache}",
            )
        )
        line = (
            trainer,
            *own,
            *LOOP,
            "--batch-size",
            batch,
            *tiny.ADAM,
            "--lr",
            1e-3,
            "--steps",
            steps,
            "--out",
            out,
            *more,
        )
        return [str(part) for part in line]

    return build


def losses(folder: Path) -> dict[int, dict[str, float]]:
    return {
        line["step"]: {k: v for k, v in line.items() if k.startswith("loss_")}
        for line in tiny.log(folder)
        if "lr_factor" in line
    }


def assert_same_losses(folder: Path, whole: Path) -> None:
    ours, theirs = losses(folder), losses(whole)
    assert list(ours) == list(theirs)
    for step, values in theirs.items():
        assert ours[step] == pytest.approx(values, rel=1e-5), step


def run_on_two(folder: Path, *args, before=None) -> None:
    both = ranks(folder, 2, *args, before=before)
    assert [command.wait() for command in both] == [0, 0], both[0].stderr + both[1].stderr


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_goes_on_with_2_processes_and_1_again_at_the_same_losses(trainer, tmp_path, arguments):
    """Reliability 8: one process to step 6, two to 9, one to 12, as one throughout; shares of 2 and 1 samples."""
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    assert tiny.ldm(*arguments(trainer, whole)).code == 0
    assert tiny.ldm(*arguments(trainer, changed, steps=6)).code == 0
    run_on_two(tmp_path, *arguments(trainer, changed, steps=9))
    assert tiny.ldm(*arguments(trainer, changed)).code == 0
    assert_same_losses(changed, whole)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_that_begins_with_half_batches_begins_as_one_of_such_batches(trainer, tmp_path, arguments):
    """Four steps of 3 samples, then of 6, on one process and on two."""
    half = ("--set", "train.half_batch_steps=4")
    assert tiny.ldm(*arguments(trainer, tmp_path / "three", steps=4)).code == 0
    assert tiny.ldm(*arguments(trainer, tmp_path / "both", *half, steps=8, batch=6)).code == 0
    run_on_two(tmp_path, *arguments(trainer, tmp_path / "two", *half, steps=8, batch=6))
    begun, whole = losses(tmp_path / "three"), losses(tmp_path / "both")
    assert begun == {step: values for step, values in whole.items() if step <= 4}
    assert_same_losses(tmp_path / "two", tmp_path / "both")
    assert [line["images"] for line in tiny.log(tmp_path / "two") if "lr_factor" in line] == [
        3, 6, 9, 12, 18, 24, 30, 36,
    ]  # fmt: skip


def test_two_processes_share_a_stream_at_the_losses_of_one(tmp_path, arguments):
    """Each reads what it takes of a batch; which rows a batch has depends on neither."""
    (tmp_path / "data").mkdir()
    for k, path in enumerate(tiny.noisy_images(tmp_path / "noisy", 30, 16)):
        path.rename(tmp_path / "data" / f"{k:02}.png")
    own = ("--data", tmp_path / "data", "--limit", 0, "--streaming", "--set", "data.val_fraction=0.2")
    assert tiny.ldm(*arguments("train-ae", tmp_path / "whole", *own)).code == 0
    run_on_two(tmp_path, *arguments("train-ae", tmp_path / "run", *own))
    assert_same_losses(tmp_path / "run", tmp_path / "whole")


def test_two_processes_take_the_rows_of_one_and_none_twice(tmp_path, arguments):
    """Reliability 8: the rows of each step, in order, are those of one process, whatever the share."""
    run_on_two(tmp_path, *arguments("train-ae", tmp_path / "run", steps=10), before=note_rows)
    seen = [[], []]
    for rank in range(2):
        for line in (tmp_path / "run" / f"rows-{rank}").read_text().splitlines():
            step, *rows = map(int, line.split())
            seen[rank].append((step, rows))
    together = sorted((step, 0, rows) for step, rows in seen[0]) + sorted((step, 1, rows) for step, rows in seen[1])
    order = [row for _, _, rows in sorted(together) for row in rows]
    assert [sorted(order[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert {len(rows) for _, rows in seen[0]} == {2} and {len(rows) for _, rows in seen[1]} == {1}


def note_rows() -> None:
    from ldmcli.training.autoencoder import AutoencoderObjective

    make = AutoencoderObjective.batch

    def noted(self, step):
        batch = make(self, step)
        with open(self.run / f"rows-{self.dist.rank}", "a") as file:
            file.write(f"{step} {' '.join(map(str, batch['row'].tolist()))}\n")
        return batch

    AutoencoderObjective.batch = noted


@pytest.mark.parametrize("more", [GAN, ("--reg", "vq", "--set", "autoencoder.codebook_size=16")], ids=["gan", "vq"])
def test_discriminator_and_codebook_see_the_global_batch(more, tmp_path, arguments):
    """Reliability 8 for adaptive weight, batch statistics and quantiser: the losses of one process."""
    one, two = (arguments("train-ae", tmp_path / name, *more, steps=5, batch=4) for name in ("one", "two"))
    with clear_of_ties():  # one process and two may round differently
        assert tiny.ldm(*one).code == 0
    run_on_two(tmp_path, *two)
    assert_same_losses(tmp_path / "two", tmp_path / "one")


def test_processes_with_unequal_numbers_of_micro_batches_agree(tmp_path, arguments):
    """Reliability 8: shares of 2 and 1 in micro-batches of 1, with a log line (and its norms) every step."""
    line = arguments("train-ae", tmp_path / "one", "--micro-batch", 1, steps=4)
    assert tiny.ldm(*line).code == 0
    run_on_two(tmp_path, *arguments("train-ae", tmp_path / "two", "--micro-batch", 1, steps=4))
    assert_same_losses(tmp_path / "two", tmp_path / "one")


# --- gradients -------------------------------------------------------------------------------------------------


def test_a_student_of_two_processes_learns_what_that_of_one_does(tmp_path, tiny_runs):
    """Each walks its teacher's steps for its own share of a batch of 3: positions take the calls in turn over both."""
    line = ["distill", tiny_runs["text"], "--calls", 2, "--guidance", 2, "--batch-size", 3, "--steps", 5]
    line += ["--log-every", 1, "--sample-every", 0, "--eval-every", 0, "--mixed-precision", "no", "-q", "--out"]
    assert tiny.ldm(*line, tmp_path / "whole").code == 0
    run_on_two(tmp_path, *[str(part) for part in (*line, tmp_path / "run")])
    assert len(losses(tmp_path / "whole")) == 5
    assert_same_losses(tmp_path / "run", tmp_path / "whole")


def note_gradients() -> None:
    """Writes the gradients of the first update of each network beside the run."""
    from ldmcli.training.optimizer import PhaseOptimizer

    step = PhaseOptimizer.step

    def noted(self, factor, *more):
        folder = Path(os.environ["GRADIENTS"])
        rank, first = os.environ.get("RANK", "0"), self.named[0][0]
        path = folder / f"{first}-{len(self.named)}-{rank}.pt"
        if not path.exists():
            torch.save({name: p.grad.clone() for name, p in self.named if p.grad is not None}, path)
        step(self, factor, *more)

    PhaseOptimizer.step = noted


@pytest.mark.parametrize("trainer", TRAINERS)
def test_gradients_of_two_processes_are_those_of_one(trainer, tmp_path, arguments, monkeypatch):
    """Reliability 13: of autoencoder, discriminator and UNet, on both processes, at the first update."""
    from ldmcli.training.optimizer import PhaseOptimizer

    more, batch = (GAN, 4) if trainer == "train-ae" else ((), 3)
    found = {}
    for name in ("one", "two"):
        folder = tmp_path / f"gradients-{name}"
        folder.mkdir()
        monkeypatch.setenv("GRADIENTS", str(folder))
        line = arguments(trainer, tmp_path / name, *more, steps=1, batch=batch)
        if name == "one":
            monkeypatch.setattr(PhaseOptimizer, "step", PhaseOptimizer.step)  # undone at the end
            note_gradients()
            assert tiny.ldm(*line).code == 0
        else:
            run_on_two(tmp_path, *line, before=NoteIn(str(folder)))
        found[name] = {path.stem: torch.load(path) for path in folder.glob("*.pt")}
    assert len(found["one"]) == (2 if trainer == "train-ae" else 1)
    assert len(found["two"]) == 2 * len(found["one"])
    for network, gradients in found["one"].items():
        scale = max(float(g.abs().max()) for g in gradients.values())
        for rank in "01":
            other = found["two"][network[:-1] + rank]
            for name, gradient in gradients.items():
                torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


class NoteIn:
    """`note_gradients` in another process, told where to write."""

    def __init__(self, folder: str):
        self.folder = folder

    def __call__(self) -> None:
        os.environ["GRADIENTS"] = self.folder
        note_gradients()


# --- reliability 13: replicas ----------------------------------------------------------------------------------


def check_every_step() -> None:
    from ldmcli.training import loop

    loop.REPLICA_CHECK_EVERY = 1


def drift_apart() -> None:
    from ldmcli.training.loop import Trainer

    check_every_step()
    after = Trainer._after_step

    def drifting(self):
        if self.dist.rank == 1 and self.progress.step == 2:
            with torch.no_grad():
                next(self.objective.networks[self.objective.main_network].parameters()).add_(1e-6)
        after(self)

    Trainer._after_step = drifting


@pytest.mark.parametrize("trainer", TRAINERS)
def test_weights_are_equal_on_all_processes_after_each_step(trainer, tmp_path, arguments):
    """Reliability 13: the built-in comparison, made after every step, finds nothing."""
    more, batch = (GAN, 4) if trainer == "train-ae" else ((), 3)
    run_on_two(tmp_path, *arguments(trainer, tmp_path / "run", *more, steps=5, batch=batch), before=check_every_step)


def test_replicas_that_drift_apart_end_the_command_with_code_6(tmp_path, arguments):
    """Reliability 13: the first difference is found, by both, and named."""
    both = ranks(tmp_path, 2, *arguments("train-ae", tmp_path / "run", steps=5), before=drift_apart)
    assert [command.wait() for command in both] == [6, 6]
    assert "the weights of process 1 differ from those of process 0" in both[0].stderr
    assert tiny.state(tmp_path / "run")["state"] == "failed" and len(losses(tmp_path / "run")) == 2


# --- reliability 4: signals, and the launcher ------------------------------------------------------------------


def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path, arguments):
    """Reliability 4: only rank 1 is told; both save the same step and end with 143."""
    out = tmp_path / "run"
    line = [part for part in arguments("train-ae", out, steps=100_000) if part != "-q"]
    both = ranks(tmp_path, 2, *line)
    both[0].until(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") >= 2)
    os.kill(both[1].pid, signal.SIGTERM)
    assert [command.wait() for command in both] == [143, 143], both[0].stderr
    state = tiny.state(out)
    assert state["state"] == "interrupted" and state["checkpoint"] == state["step"] == len(tiny.log(out))
    assert f"saved at step {state['step']}" in both[0].stderr


def test_gpus_2_trains_what_one_process_does(tmp_path, arguments):
    """Reliability 8, through `python -m ldmcli … --gpus 2` and Accelerate's launcher, with gloo."""
    assert tiny.ldm(*arguments("train-ae", tmp_path / "one", steps=4)).code == 0
    line = arguments("train-ae", tmp_path / "two", "--gpus", 2, steps=4)
    done = subprocess.run(
        [sys.executable, "-m", "ldmcli", *line],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert_same_losses(tmp_path / "two", tmp_path / "one")
    assert tiny.state(tmp_path / "two")["state"] == "finished"
