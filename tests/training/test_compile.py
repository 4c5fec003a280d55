"""`torch.compile` takes the whole loss of a diffusion model as one graph, once, whatever the condition and the task."""

from functools import partial

import pytest
import tiny as commands
import tiny_models as tiny
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ldmcli.core.settings import DiffusionSettings
from ldmcli.diffusion.loss import diffusion_loss
from ldmcli.diffusion.schedule import make_schedule
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.conditioners import load_tokenizer, train_vocabulary
from ldmcli.networks.discriminator import PatchDiscriminator
from ldmcli.networks.noisy_classifier import NoisyClassifier

STEPS = 10


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    train_vocabulary(["a red star", "two green circles"], 64, folder)
    return load_tokenizer(folder)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend: str):
    """The function compiled without breaks, and what counts its graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True, dynamic=False), counter


def step_of(model, batch):
    """A function of z_0, noise, t and inputs: the loss as the loop has it compiled, and these arguments."""
    objective = tiny.objective_of(model, tiny.CPU)
    schedule, settings = make_schedule(model.config.diffusion), model.config.diffusion
    schedule.tables(tiny.CPU, torch.float32)

    def loss(z_0, noise, t, inputs):
        network = lambda z, t, inputs: model.network(z, t, inputs, objective.encode)  # noqa: E731
        return diffusion_loss(network, schedule, settings, z_0, noise, t, inputs).mean()

    inputs = {name.removeprefix("condition."): value for name, value in batch.items() if name.startswith("condition.")}
    inputs = model.network.conditions.complete(inputs)
    return loss, (objective.latents.of_batch(batch), batch["noise"], batch["t"], inputs)


def assert_one_graph(model, backend: str = "eager") -> None:
    """As many steps as count, of changing numbers: one graph, the loss and the gradients of the same without it. What
    breaks a graph or makes another one is found before the backend, so that most cases take the cheapest."""
    loss, (z_0, noise, t, inputs) = step_of(model, tiny.batch_of(model))
    whole, counter = compiled(loss, backend)
    for step in range(STEPS):
        found = whole(z_0 + step, noise, t.roll(step), inputs)
    assert counter.frame_count == 1
    expected = loss(z_0 + step, noise, t.roll(step), inputs)
    torch.testing.assert_close(found, expected)
    parameters = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(found, parameters)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, parameters), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kinds", [kinds for kinds in tiny.COMBINED if kinds != "class+text"])
def test_every_condition(kinds, words):
    assert_one_graph(tiny.tiny_model("kl", words, [kind for kind in kinds.split("+") if kind]))


@pytest.mark.parametrize("task", list(tiny.TASKS)[1:])
def test_every_task(task):
    assert_one_graph(tiny.tiny_model("vq", task=task))


@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
def test_every_parametrisation(prediction):
    weight = "uniform" if prediction == "flow" else "min_snr"
    assert_one_graph(tiny.tiny_model("none", prediction=prediction, loss_weight=weight))


def test_a_backward_pass_is_compiled_as_well():
    assert_one_graph(tiny.tiny_model("vq", kinds=("class",), task="inpaint, smooth"), "aot_eager")


@pytest.mark.parametrize("stage", ["kl", "vq", "paper"])
def test_the_networks_of_a_first_stage(stage):
    """Both phases: the reconstruction with its regulariser, and the discriminator, each in one graph."""
    network, critic = Autoencoder(tiny.STAGES[stage]), PatchDiscriminator(3, 8, 1)
    x, noise = torch.rand(2, 3, 16, 16), torch.randn(2, 3, 4, 4)

    def rebuilt(x, noise):
        found = network(x, noise)
        return found.reconstruction, network.kl(found.moments), found.codebook_loss

    for function, arguments in ((rebuilt, (x, noise)), (critic, (x,))):
        whole, counter = compiled(function, "eager")
        for step in range(STEPS):
            whole(*(argument + 0.01 * step for argument in arguments))
        assert counter.frame_count == 1


def test_a_classifier():
    network = NoisyClassifier(DiffusionSettings(channels=16, channel_mult=(1, 2), groups=4), "attention", 4, (3, 8, 8))
    whole, counter = compiled(network, "eager")
    for step in range(STEPS):
        whole(torch.randn(2, 3, 8, 8), torch.tensor([float(step), 3.0]))
    assert counter.frame_count == 1


# --- in a training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ldm", "ae"])
def test_a_compiled_training_has_a_graph_a_size_and_goes_on_exactly(kind, ae, tmp_path, monkeypatch):
    """Five samples, two at a time: micro-batches of two and of one. The network of a diffusion model is part of the
    graph of its loss. What the backend makes of the graphs is tested above."""
    real, counters = torch.compile, []

    def counted(function, **options):
        counters.append(CompileCounterWithBackend("eager"))
        return real(function, backend=counters[-1], **options)

    monkeypatch.setattr(torch, "compile", counted)
    more = ("--compile", "--batch-size", 5, "--micro-batch", 2)

    def train(run, steps):
        torch._dynamo.reset()
        counters.clear()
        command = partial(commands.train_ldm, run, ae) if kind == "ldm" else partial(commands.train_ae, run)
        command(*more, steps=steps)
        return sorted(counter.frame_count for counter in counters if counter.frame_count)

    assert train(tmp_path / "whole", 4) == [2]
    train(tmp_path / "parts", 2)
    assert train(tmp_path / "parts", 4) == [2]
    whole, parts = (commands.checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
