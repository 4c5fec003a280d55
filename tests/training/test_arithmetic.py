"""What a training asks of libraries and threads while it runs: TF32, one order of sums, workers that are all busy."""

import threading

import pytest
import tiny
import torch

from ldmcli.training.autoencoder import AutoencoderObjective
from ldmcli.training.loop import Trainer


def asked() -> tuple:
    cudnn = torch.backends.cudnn
    products = (cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    return (*products, cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled())


@pytest.mark.parametrize(
    "more, expected",
    [
        ((), ("tf32", "tf32", True, False, False)),
        (("train.tf32=false",), ("ieee", "ieee", False, False, False)),
        (("train.deterministic=true",), ("tf32", "tf32", False, True, True)),
    ],
)
def test_the_arithmetic_of_a_training_is_what_its_settings_say_and_ends_with_it(more, expected, tmp_path, monkeypatch):
    seen, whole, before = [], Trainer._train_step, asked()

    def step(self):
        seen.append(asked())
        whole(self)

    monkeypatch.setattr(Trainer, "_train_step", step)
    tiny.train_ae(tmp_path / "run", *(word for setting in more for word in ("--set", setting)), steps=1)
    assert seen == [expected] and asked() == before


def test_eight_workers_make_eight_batches_at_a_time(tmp_path, monkeypatch):
    together, whole = threading.Barrier(8), AutoencoderObjective.batch

    def batch(self, step):
        if threading.current_thread().name.startswith("ldm-batch"):
            together.wait(timeout=30)
        return whole(self, step)

    monkeypatch.setattr(AutoencoderObjective, "batch", batch)
    tiny.train_ae(tmp_path / "run", "--workers", 8, steps=8)


def test_noise_of_the_device_does_not_depend_on_the_batch_and_resumes_exactly(ae, tmp_path):
    more = (*tiny.ADAM, "--set", "train.noise=device", "--set", "train.cooldown=0", "--log-every", 1)
    tiny.train_ldm(tmp_path / "whole", ae, *more, steps=4)
    tiny.train_ldm(tmp_path / "parts", ae, *more, steps=2)
    tiny.train_ldm(tmp_path / "parts", ae, *more, steps=4)
    assert tiny.same(tiny.weights(tmp_path / "whole"), tiny.weights(tmp_path / "parts"))
    tiny.train_ldm(tmp_path / "split", ae, *more, "--micro-batch", 1, steps=1)
    tiny.train_ldm(tmp_path / "host", ae, *tiny.ADAM, steps=1)
    first = [tiny.log(tmp_path / name)[0]["loss_model"] for name in ("whole", "split", "host")]
    assert first[0] == pytest.approx(first[1], rel=1e-5) and first[0] != pytest.approx(first[2], rel=1e-3)
