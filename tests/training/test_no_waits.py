"""A training step that writes no line of the log leaves the host waiting for nothing: whole trainings on a pretended
CUDA device, with every blocking copy and every read of a value counted. What the host learns a step late ends as it
does where it is known at once.
"""

import contextlib
import json
from dataclasses import replace

import pretend
import pytest
import syncs
import tiny
import tiny_models
import torch

from ldmcli.reports import cost_estimate
from ldmcli.sampling import load
from ldmcli.training import gradient_guard
from ldmcli.training.diffusion import DiffusionObjective
from ldmcli.training.distributed import Distributed, autocast_dtype
from ldmcli.training.loop import Trainer

STEPS = 4
QUIET = ("--log-every", 1000, "--save-every", 1000, "--workers", 1)


class Event:
    """Of a stream that has done all."""

    def __init__(self, device=None):
        self.recorded = False

    def record(self, stream=None) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other) -> None:
        pass


@contextlib.contextmanager
def gpu():
    """The pretended device under CUDA's name, where a training asks for one."""
    with pytest.MonkeyPatch.context() as patch, pretend.device("cuda") as device:
        for module in (load, cost_estimate):
            patch.setattr(module, "default_device", lambda: device)
        begin = Distributed.__init__

        def on_it(self, settings):
            begin(self, replace(settings, mixed_precision="no"))
            self.device, self.dtype = device, autocast_dtype(settings.mixed_precision, device)

        patch.setattr(Distributed, "__init__", on_it)
        patch.setattr("ldmcli.training.logger.product_rate", lambda device, dtype: 1e12)
        patch.setattr(torch, "Event", Event)
        patch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        patch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
        for name, value in {
            "Stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": lambda device=None: Stream(),
            "max_memory_allocated": lambda device=None: 0,
            "mem_get_info": lambda device=None: (1 << 33, 1 << 33),
            "get_device_name": lambda device=None: "pretended",
            "empty_cache": lambda: None,
        }.items():
            patch.setattr(torch.cuda, name, value)
        yield device


@contextlib.contextmanager
def watched_steps():
    """The waits of each step but the first, which writes a line."""
    found: list[list[str]] = []
    whole = Trainer._train_step

    def step(self, *given):
        with syncs.counted() as waits:
            whole(self, *given)
        print(self.progress.step, waits[:5], self.guard.late)
        if self.progress.step > 1:
            found.append(list(waits))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", step)
        yield found


GAN = ("--set", "loss.disc_weight=0.5", "--set", "loss.disc_start=2", "--set", "loss.disc_channels=8",
       "--set", "loss.disc_layers=1")  # fmt: skip
FIRST_STAGES = {
    "kl, muon, clip, gan": ("--set", "train.clip=1", *GAN),
    "kl, adamw, two micro-batches": (*tiny.ADAM, "--micro-batch", 2),
    "vq, gan, codes revived": ("--reg", "vq", "--set", "autoencoder.revive_codes=2", *GAN),
}


@pytest.mark.parametrize("more", FIRST_STAGES.values(), ids=FIRST_STAGES)
def test_first_stages(more, tmp_path):
    with gpu(), watched_steps() as waits:
        tiny.train_ae(tmp_path / "run", *QUIET, *more, steps=STEPS)
    assert waits == [[]] * (STEPS - 1)


# --- diffusion models ----------------------------------------------------------------------------------------------

MODELS = {
    "unconditional": (),
    "every condition": ("--condition", "class+text+layout+map"),
    "super-resolution, encoded each step": ("--task", "sr", "--scale", 2, "--no-cache"),
    "inpainting, noise made there": ("--task", "inpaint", "--set", "train.noise=device"),
    "adamw, min_snr, no average": (*tiny.ADAM, "--set", "diffusion.prediction=v", "--set",
                                   "diffusion.loss_weight=min_snr", "--set", "train.ema=false"),
    "fp16, three micro-batches": ("--mixed-precision", "fp16", "--micro-batch", 2, "--batch-size", 5),
}  # fmt: skip


@pytest.mark.parametrize("more", MODELS.values(), ids=MODELS)
def test_diffusion_models(more, ae, tmp_path):
    with gpu(), watched_steps() as waits:
        tiny.train_ldm(tmp_path / "run", ae, *QUIET, *more, steps=STEPS)
    assert waits == [[]] * (STEPS - 1)


def test_a_frozen_encoder_of_text_waits_for_no_more_than_a_look_at_its_mask(ae, tmp_path):
    """`transformers` reads whether a mask hides anything, once a step, where no compiler follows it."""
    encoder = f"condition.text_encoder={tiny_models.frozen_encoder('bert', tmp_path / 'encoder')}"
    with gpu(), watched_steps() as waits:
        tiny.train_ldm(tmp_path / "run", ae, *QUIET, "--condition", "text", "--set", encoder, steps=STEPS)
    assert [len(found) for found in waits] == [1] * (STEPS - 1)
    assert all("(a value is read) at ldmcli/networks/conditioners.py" in line for found in waits for line in found)


def test_classifiers(ae, tmp_path):
    line = ("--autoencoder", ae, *tiny.SHAPES, *tiny.UNET[:6], *tiny.QUIET_LOOP, "--set", "train.cooldown=0")
    with gpu(), watched_steps() as waits:
        ending = tiny.ldm("train-classifier", *line, *QUIET, "--steps", STEPS, "--out", tmp_path / "run")
    assert ending.code == 0, ending.stderr
    assert waits == [[]] * (STEPS - 1)


# --- what is known a step late -------------------------------------------------------------------------------------


def spoiled(monkeypatch, steps) -> None:
    """NaN in the noise of some steps."""
    whole = DiffusionObjective.batch

    def batch(self, step):
        found = whole(self, step)
        if step in steps:
            found["noise"][0] = float("nan")
        return found

    monkeypatch.setattr(DiffusionObjective, "batch", batch)


MUON = [word for one in ("muon_every=2", "muon_iterations=3", "weight_decay=0.1") for word in ("--set", f"train.{one}")]
OPTIMIZERS = {"adamw": tiny.ADAM, "muon every 2": MUON}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_nan_batch_changes_nothing_though_the_host_learns_of_it_later(optimizer, ae, tmp_path, monkeypatch):
    more = (*optimizer, *QUIET, "--set", "train.cooldown=0")
    with gpu():
        tiny.train_ldm(tmp_path / "whole", ae, *more, steps=3)
        spoiled(monkeypatch, {3})
        ending = tiny.train_ldm(tmp_path / "spoiled", ae, *more, steps=4)
    whole, held = tiny.checkpoint(tmp_path / "whole"), tiny.checkpoint(tmp_path / "spoiled")
    changed = [name for name, tensor in whole.items() if not torch.equal(tensor, held[name])]
    assert whole.keys() == held.keys() and changed in ([], ["optimizer-model.muon.count"])
    assert "step 3: NaN or Inf, the update was not applied (1 in a row" in ending.stderr
    named = json.loads((tmp_path / "spoiled" / "bad-batch.json").read_text())
    assert named["step"] == 3 and len(named["rows"]) == 4 and "nan" in named["values"]["loss_model"]
    stored = json.loads(next((tmp_path / "spoiled" / "checkpoints").glob("*/state.json")).read_text())
    assert stored["ema_count"] == 3 and stored["bad_in_a_row"] == 1


def test_nan_in_every_step_ends_a_training_after_as_many_as_the_setting_says(ae, tmp_path, monkeypatch):
    spoiled(monkeypatch, range(2, 99))
    with gpu():
        ending = tiny.train_ldm(tmp_path / "run", ae, *QUIET, "--set", "train.max_bad_steps=3", steps=20, code=5)
    assert "3 steps in a row up to step 4" in ending.line


def test_a_spike_is_scaled_down_and_told(ae, tmp_path, monkeypatch):
    whole = DiffusionObjective.loss

    def loss(self, phase, networks, batch, step, norms):
        value, stats = whole(self, phase, networks, batch, step, norms)
        return (value * 1e4 if step == 12 else value), stats

    monkeypatch.setattr(DiffusionObjective, "loss", loss)
    for name, place in (("cpu", contextlib.nullcontext), ("gpu", gpu)):
        with place():
            ending = tiny.train_ldm(tmp_path / name, ae, *tiny.ADAM, *QUIET, steps=14)
        assert ending.stderr.count("is usual; scaled down") == 1 and "step 12: a gradient norm of" in ending.stderr
        assert tiny.state(tmp_path / name)["spikes"] == 1
    ours, theirs = tiny.weights(tmp_path / "gpu"), tiny.weights(tmp_path / "cpu")
    # of all together: AdamW makes whole steps of gradients that are rounding alone, as some biases have them
    apart = sum(float((ours[name] - tensor).square().sum()) for name, tensor in theirs.items()) ** 0.5
    assert apart <= 0.01 * sum(float(tensor.square().sum()) for tensor in theirs.values()) ** 0.5


def test_the_scale_of_float16_is_halved_where_it_is_too_large_and_doubled_after_a_while(ae, tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_guard, "FP16_GROWTH_STEPS", 2)
    spoiled(monkeypatch, {1})
    slow = ("--lr", 1e-4, "--set", "train.adam_lr=1e-4")  # gradients stay those of the first step, which fit the scale
    with gpu():
        ending = tiny.train_ldm(tmp_path / "run", ae, *QUIET, *slow, "--mixed-precision", "fp16", steps=6)
        plain = tiny.train_ldm(tmp_path / "plain", ae, *QUIET, *slow, steps=1)
    assert "NaN" not in ending.stderr + plain.stderr  # above 1 the scale is looked for
    stored = json.loads(next((tmp_path / "run" / "checkpoints").glob("*/state.json")).read_text())
    assert stored["loss_scale"] == 2.0**15 / 2 * 4 and stored["good_steps"] == 4 and stored["ema_count"] == 5
    norms = [tiny.log(tmp_path / name)[0]["grad_norm_model"] for name in ("run", "plain")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)  # without the scale
