"""--micro-batch auto: all at once where memory holds it, else what fits, less after it ran out; the same results."""

import pytest
import tiny
import torch

from ldmcli.training import cost
from ldmcli.training.autoencoder import AutoencoderObjective
from ldmcli.training.diffusion import DiffusionObjective

STEADY = ("--batch-size", 6, *tiny.ADAM, "--log-every", 1)


@pytest.fixture
def cramped(monkeypatch):
    """`cramped(objective, n)`: memory that holds what is kept for n images beside the optimiser's part."""

    def shrink(kept: float, n: int) -> None:
        monkeypatch.setattr(cost, "optimizer_bytes", lambda named, train: -4 * sum(p.numel() for _, p in named))
        monkeypatch.setattr(cost, "available_bytes", lambda device: int((n + 0.5) * kept / cost.MEMORY_SHARE))

    return shrink


def ae_kept() -> float:
    from ldmcli.core import config

    values = dict(pair.split("=") for pair in tiny.AE_NETWORK if "=" in pair)
    found = config.resolve("autoencoder", [("test", values)]).config
    return sum(network.activation_bytes for network in cost.autoencoder_costs(found, (20, 20)).values())


@pytest.fixture
def sizes(monkeypatch):
    """Numbers of images of all passes of a training."""
    seen = []
    for objective in (AutoencoderObjective, DiffusionObjective):
        original = objective.loss

        def loss(self, phase, networks, batch, *more, original=original):
            if networks[self.main_network].training:  # not where FLOPs are counted
                seen.append(len(batch["row"]))
            return original(self, phase, networks, batch, *more)

        monkeypatch.setattr(objective, "loss", loss)
    return seen


def test_all_at_once_where_memory_holds_it(tmp_path, sizes):
    ending = tiny.train_ae(tmp_path / "run", *STEADY, steps=1)
    assert sizes == [6] and "at a time" not in ending.stderr


@pytest.mark.parametrize("fitting, expected", [(5, [3, 3]), (4, [3, 3]), (2, [2, 2, 2]), (0, [1] * 6)])
def test_as_many_as_fit_go_through_at_a_time_and_it_is_said(fitting, expected, tmp_path, sizes, cramped):
    cramped(ae_kept(), fitting)
    ending = tiny.train_ae(tmp_path / "run", *STEADY, steps=1)
    assert sizes == expected
    assert ending.stderr.count(f"{expected[0]} of 6 images go through at a time") == 1


def test_a_split_batch_gives_what_the_same_split_by_name_gives(tmp_path, cramped):
    tiny.train_ae(tmp_path / "named", *STEADY, "--micro-batch", 2)
    cramped(ae_kept(), 2)
    tiny.train_ae(tmp_path / "auto", *STEADY, "--micro-batch", "auto")
    assert tiny.same(tiny.weights(tmp_path / "auto"), tiny.weights(tmp_path / "named"))


def test_a_run_goes_on_with_the_split_that_it_began_with(tmp_path, sizes, cramped):
    """Also where there is more room now: sums in another order would not be bit for bit the same."""
    cramped(ae_kept(), 2)
    tiny.train_ae(tmp_path / "run", *STEADY, steps=1)
    cramped(ae_kept(), 100)
    ending = tiny.train_ae(tmp_path / "run", *STEADY, steps=2)
    assert sizes == [2] * 6
    assert "2 of 6 images go through at a time: as before the run was resumed" in ending.stderr
    tiny.train_ae(tmp_path / "run", *STEADY, "--micro-batch", 6, steps=3)
    assert sizes[6:] == [6]


def narrow(monkeypatch, objective, most: int) -> None:
    original = objective.loss

    def loss(self, phase, networks, batch, *more):
        if len(batch["row"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, phase, networks, batch, *more)

    monkeypatch.setattr(objective, "loss", loss)


def test_the_step_in_which_memory_runs_out_begins_again_with_half_as_many(tmp_path, monkeypatch):
    """Nothing of the failed attempt stays: weights are those of a run that was split from the start."""
    tiny.train_ae(tmp_path / "named", *STEADY, "--micro-batch", 2)
    narrow(monkeypatch, AutoencoderObjective, 2)
    ending = tiny.train_ae(tmp_path / "run", *STEADY)
    assert ending.stderr.count("memory ran out") == 2  # 6 -> 3 -> 2, and not in later steps
    assert tiny.same(tiny.weights(tmp_path / "run"), tiny.weights(tmp_path / "named"))


def test_latents_are_halved_as_well(tmp_path, monkeypatch):
    narrow(monkeypatch, DiffusionObjective, 3)
    ending = tiny.train_ldm(tmp_path / "run", "none", *STEADY, steps=1)
    assert ending.stderr.count("the step begins again with 3") == 1


def test_memory_for_not_even_one_image_is_code_6(tmp_path, monkeypatch):
    narrow(monkeypatch, AutoencoderObjective, 0)
    ending = tiny.train_ae(tmp_path / "run", *STEADY, code=6)
    assert "memory ran out" in ending.line


def test_what_surely_fits_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(AutoencoderObjective, "activation_bytes", lambda self: pytest.fail("measured"))
    tiny.train_ae(tmp_path / "run", *STEADY, steps=1)


def test_the_memory_of_a_step_is_near_what_is_predicted(tmp_path):
    """What saved-tensor hooks count on real tensors, against the count on the meta device."""
    from ldmcli.core import config
    from ldmcli.networks.autoencoder import Autoencoder

    found = config.resolve("autoencoder", [("test", {"autoencoder.channels": 16})]).config
    network, kept = Autoencoder(found.autoencoder), {}
    weights = {p.untyped_storage()._cdata for p in network.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.zeros(3, 3, 32, 32), torch.zeros(3, *network.latent_shape(32, 32)))
    counted = sum(storage.nbytes() for storage in kept.values()) / 3
    predicted = cost.autoencoder_costs(found, (32, 32))["autoencoder"].activation_bytes
    assert predicted == pytest.approx(counted, rel=0.1)
