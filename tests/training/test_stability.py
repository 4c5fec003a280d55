"""A training holds for any seed: spikes move nothing, a loss that has risen is told, short runs measure little."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import ADAM, log, state, train_ae, train_ldm

from ldmcli.core.settings import TrainSettings
from ldmcli.training.autoencoder import AutoencoderObjective
from ldmcli.training.diffusion import DiffusionObjective
from ldmcli.training.gradient_guard import GradientGuard, spike_scale
from ldmcli.training.loop import Trainer
from ldmcli.training.progress import Progress, StabilityMonitor

MUON = ("--set", "train.optimizer=muon")
SPIKE = 12  # the step whose batch is spoiled


# --- the usual gradient norm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norms, expected",
    [
        ([2.0] * 30, 1.0),
        ([2.0] * 30 + [19.0], 1.0),
        ([2.0] * 60 + [2e4], 1e-4),
        ([2.0, 2e4], 1e-4),  # one norm is enough to see what is out of all proportion
        ([2.0, 40.0], 1.0),  # but not that the first one was small
        ([0.0, 2.0], 1.0),
        ([2e4], 1.0),  # nothing to compare with
    ],
)
def test_a_gradient_is_scaled_to_its_usual_norm_where_it_is_out_of_proportion(norms, expected):
    factors = factors_of(norms)
    assert factors[:-1] == [1.0] * (len(norms) - 1) and factors[-1] == pytest.approx(expected, rel=1e-9)


def factors_of(norms, ratio: float = 10.0) -> list[float]:
    """What gradients of these norms are multiplied by, one after the other."""
    usual, factors = torch.zeros(2, dtype=torch.float64), []
    for norm in norms:
        scale, usual = spike_scale(usual, torch.tensor(norm, dtype=torch.float64), ratio)
        factors.append(float(scale))
    return factors


def test_a_landscape_that_has_become_steeper_is_the_usual_one_after_a_while():
    factors = factors_of([1.0] * 60 + [1000.0] * 200)
    assert factors[60] == pytest.approx(1e-3) and factors[-1] == 1.0 and 20 < sum(f < 1 for f in factors) < 190


def guarded(guard: GradientGuard, phase: str, norm: float) -> float:
    """What the guard multiplies a gradient of this norm by, in a step of its own."""
    gradient = torch.tensor([norm], device=guard.loss_scale.device)
    guard.begin()
    guard.check(phase, [gradient], gradient.norm())
    guard.settle(guard.report())
    return float(gradient) / norm


def test_phases_are_compared_with_themselves_and_a_ratio_of_0_switches_it_off():
    guard = GradientGuard(Progress(), TrainSettings(), torch.device("cpu"), False)
    for _ in range(60):
        assert guarded(guard, "autoencoder", 1.0) == guarded(guard, "discriminator", 1e4) == 1.0
    assert guard.progress.course.spikes == 0
    assert guarded(guard, "autoencoder", 1e4) == pytest.approx(1e-4) and guard.progress.course.spikes == 1
    assert set(factors_of([1.0, 1e4], 0)) == {1.0}


def test_clipping_limits_what_the_guard_against_spikes_leaves():
    guard = GradientGuard(Progress(), TrainSettings(clip=2.0), torch.device("cpu"), False)
    assert [guarded(guard, "model", norm) for norm in (1.0, 4.0)] == [1.0, 0.5]
    assert guarded(guard, "model", 1e6) == pytest.approx(2e-6) and guard.progress.course.spikes == 1


def spoiled(monkeypatch, objective, how):
    """The loss of step SPIKE is 10⁴ times itself ("loss"), or what the network sees is ("input")."""
    whole = objective.loss

    def loss(self, phase, networks, batch, step, norms):
        if step == SPIKE and how == "input":
            name = "moments" if "moments" in batch else "pixels"
            batch = batch | {name: batch[name].float() * 1e4}
        value, stats = whole(self, phase, networks, batch, step, norms)
        return (value * 1e4 if step == SPIKE and how == "loss" else value), stats

    monkeypatch.setattr(objective, "loss", loss)


def largest_moves(monkeypatch):
    """The list that the largest change of any weight comes into, one number a step."""
    moves, whole = [], Trainer._train_step

    def step(self):
        parameters = [p for module in self.objective.networks.values() for p in module.parameters()]
        before = [p.detach().clone() for p in parameters]
        whole(self)
        moves.append(max(float((p - b).abs().max()) for p, b in zip(parameters, before)))

    monkeypatch.setattr(Trainer, "_train_step", step)
    return moves


@pytest.mark.parametrize("how", ["loss", "input"])
@pytest.mark.parametrize("optimizer", [ADAM, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("what", ["kl", "vq", "diffusion"])
def test_one_batch_times_ten_thousand_moves_no_weight_by_more_than_a_usual_step(
    what, optimizer, how, ae, tmp_path, monkeypatch
):
    spoiled(monkeypatch, DiffusionObjective if what == "diffusion" else AutoencoderObjective, how)
    moves = largest_moves(monkeypatch)
    flat = (*optimizer, "--lr", 2e-3, "--set", "train.cooldown=0", "--set", "train.clip=0", "--log-every", 1)
    if what == "diffusion":
        ending = train_ldm(tmp_path / "run", ae, *flat, steps=SPIKE + 8)
    else:
        ending = train_ae(tmp_path / "run", *flat, "--reg", what, steps=SPIKE + 8)
    usual = max(moves[2:SPIKE])
    assert max(moves[SPIKE:]) <= 1.15 * usual, (moves[SPIKE:], usual)  # AdamW's own steps vary by a tenth
    assert "is usual; scaled down" in ending.stderr
    counted = [line["spikes"] for line in log(tmp_path / "run") if "spikes" in line]
    assert counted[SPIKE - 1] == 0 < counted[SPIKE] and state(tmp_path / "run")["spikes"] == counted[-1]


@pytest.mark.parametrize("optimizer, momentum", [(ADAM, "exp_avg"), (MUON, "velocity")], ids=["adamw", "muon"])
def test_the_momentum_stays_what_it_was_with_the_guard_and_is_swamped_without(
    optimizer, momentum, ae, tmp_path, monkeypatch
):
    """The harm of a spike is not its own step but the many after it, which follow the momentum."""
    spoiled(monkeypatch, DiffusionObjective, "loss")

    def norms(spike):
        run = tmp_path / f"spike-{spike}"
        train_ldm(
            run,
            ae,
            *optimizer,
            "--set",
            f"train.spike={spike}",
            "--set",
            "train.clip=0",
            "--save-every",
            SPIKE,
            "--lr",
            2e-3,
            steps=SPIKE + 1,
        )
        sides = [
            load_file(run / "checkpoints" / f"step-{step:08d}" / "optimizer-model.safetensors")
            for step in (SPIKE, SPIKE + 1)
        ]
        return [sum(float(v.norm()) for k, v in side.items() if momentum in k) for side in sides]

    before, after = norms(10)
    assert after < 2 * before
    before, after = norms(0)
    assert after > 100 * before


def test_what_is_usual_is_kept_in_a_checkpoint_and_older_ones_do_without(ae, tmp_path):
    train_ldm(tmp_path / "run", ae, steps=4)
    stored = json.loads((tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert stored["course"]["usual"]["model"][0] == 4
    assert Progress.from_state(stored).course.usual == stored["course"]["usual"]
    del stored["course"]
    assert Progress.from_state(stored).course == StabilityMonitor() and Progress.from_state(stored).step == 4


# --- a loss that has risen -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "losses, risen",
    [
        ([1.0, 0.5, 0.4, 3.0, 3.9], False),
        ([1.0, 0.5, 0.4, 30.0, 0.4], False),  # one window only
        ([1.0, 0.5, 0.4, 4.1, 4.2], True),
        ([1.0, 0.4, 4.1, 4.2, 0.5], False),  # down again
        ([1.0, 0.4, float("nan"), float("inf")], True),
        ([-1.0, -2.0, 50.0, 60.0], False),  # tenfold means nothing beside a negative loss
    ],
)
def test_a_loss_has_risen_when_it_is_ten_times_its_lowest_and_stays(losses, risen):
    monitor = StabilityMonitor()
    for index, loss in enumerate(losses):
        monitor.observe_loss(loss, 10 * (index + 1))
    assert monitor.has_risen == risen == bool(monitor.warnings())
    if risen:
        assert f"since step {10 * (losses.index(next(x for x in losses if not x <= 4))) + 10}" in monitor.warnings()[0]


def test_a_loss_that_rose_and_stays_is_told_in_log_summary_and_report(ae, tmp_path):
    run = tmp_path / "run"
    train_ldm(run, ae, *ADAM, "--log-every", 2, "--set", "train.cooldown=0", steps=6)
    ending = train_ldm(run, ae, *ADAM, "--log-every", 2, "--set", "train.cooldown=0", "--lr", 2, "--json", steps=14)
    assert "ten times its lowest" in ending.stderr and ending.json["warnings"]
    assert "ten times its lowest" in state(run)["warnings"][0] and "--lr" in state(run)["warnings"][0]
    assert any("ten times" in line.get("event", "") for line in log(run))
    assert "ten times its lowest" in (run / "report.html").read_text()


# --- short runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, batch, most, images",
    [(4, 4, 256, 16), (1, 1, 256, 16), (64, 32, 256, 256), (32, 32, 256, 128), (10_000, 32, 256, 256), (4, 4, 9, 9)],
)
def test_a_validation_looks_at_an_eighth_of_what_is_trained_on_at_the_most(steps, batch, most, images):
    assert TrainSettings(steps=steps, batch_size=batch).measured_images(most) == images


def test_a_short_run_says_what_it_leaves_out_and_a_long_one_has_nothing_to_say(ae, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_TRAIN_EVAL_FRECHET", "true")
    asked = []
    monkeypatch.setattr("ldmcli.training.autoencoder.open_extractor", lambda name: asked.append(1))
    data = ("--data", "shapes", "--limit", 80, "--size", "20x20")
    ending = train_ae(tmp_path / "ae", data=data)
    assert "validation on 16 of 256 images, without the Fréchet distance" in ending.stderr and not asked
    assert "16 held-out images" in (tmp_path / "ae" / "report.html").read_text()
    long = train_ae(tmp_path / "long", "--set", "train.eval_images=64", "--batch-size", 64, data=data, steps=8)
    assert "short run" not in long.stderr and asked
    assert "validation on 16 of 512 images" in train_ldm(tmp_path / "ldm", ae, data=data).stderr
