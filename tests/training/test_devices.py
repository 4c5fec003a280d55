"""What a GPU or an Apple GPU would refuse, found without one: every entry of the tables on a pretended device.

`pretend.device` refuses tensors of two devices in one operation and float64 off the CPU, and computes with the CPU's
numbers, so results are compared bit for bit. Fake CUDA tensors show what autocast does there.
"""

import contextlib
import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import measured
import numpy as np
import pretend
import pytest
import syncs
import tiny
import torch
from PIL import Image
from recorded import recorded_trunk
from tiny_models import (
    COMBINED,
    CPU,
    HOLES,
    PIXELS,
    SIDE,
    STAGES,
    TASKS,
    VALUES,
    F,
    batch_of,
    bf16_of_cuda,
    first_stage,
    moved,
    objective_of,
    tiny_model,
)
from torch.utils._python_dispatch import TorchDispatchMode

from ldmcli.conditions.fit import assumed_specs
from ldmcli.core import config as configuration
from ldmcli.core.presets import PRESETS
from ldmcli.core.settings import AutoencoderConfig, AutoencoderSettings, DataSettings, LossSettings, SampleSettings
from ldmcli.diffusion import gradient_guidance
from ldmcli.diffusion.loss import diffusion_loss
from ldmcli.diffusion.sample import KnownRegion, sample_conditioned
from ldmcli.diffusion.samplers import SAMPLERS
from ldmcli.diffusion.schedule import make_schedule, sampling_levels
from ldmcli.evaluation import extractors, segmenter
from ldmcli.evaluation.evaluate import evaluate
from ldmcli.evaluation.metrics import METRICS
from ldmcli.maths import rng
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.conditioners import load_tokenizer, train_vocabulary
from ldmcli.networks.discriminator import PatchDiscriminator
from ldmcli.networks.latent_diffusion import DiffusionModel
from ldmcli.networks.noisy_classifier import NoisyClassifier
from ldmcli.networks.perceptual import PerceptualNet, read_heads
from ldmcli.reports import cost_estimate as planning
from ldmcli.sampling import load, memory
from ldmcli.sampling.api import LoadedDiffusion
from ldmcli.sampling.classifier import ClassGuidance, LoadedClassifier
from ldmcli.sampling.draw import Draw, draw_images, draw_latents
from ldmcli.sampling.inpainting import inpaint_images
from ldmcli.sampling.machine import inference_dtype
from ldmcli.sampling.super_resolution import upscale_images
from ldmcli.training import cost
from ldmcli.training.autoencoder import AutoencoderObjective
from ldmcli.training.distributed import Distributed


@contextlib.contextmanager
def pretended():
    """The pretended device, where whatever asks for one finds it."""
    with pytest.MonkeyPatch.context() as patch, pretend.device("mps") as device:
        for module in (load, planning):
            patch.setattr(module, "default_device", lambda: device)
        begin = Distributed.__init__

        def on_it(self, settings):
            begin(self, settings)
            self.device = device

        patch.setattr(Distributed, "__init__", on_it)
        yield device


def test_the_pretended_device_refuses_what_gpus_refuse():
    with pretended() as device:
        here, there = torch.zeros(2), torch.zeros(2, device=device)
        assert there.device == (there + 1).device == device and (there + torch.tensor(1.0)).device == device
        with pytest.raises(RuntimeError, match="same device"):
            here + there
        for wrong in (there.double, lambda: here.double().to(device), there.numpy, lambda: np.asarray(there)):
            with pytest.raises(TypeError):
                wrong()
        weight = torch.ones(2, device=device, requires_grad=True)
        (weight * there).sum().backward()
        assert weight.grad.device == device and there.cpu().double().device == CPU


def test_a_micro_batch_moves_whole_but_for_float64():
    batch = {"pixels": torch.zeros(2, 3, dtype=torch.uint8), "noise": torch.zeros(2), "u": torch.zeros(2).double()}
    with pretended() as device:
        moved = Distributed.on_device(SimpleNamespace(device=device), batch)
        assert {name: tensor.device for name, tensor in moved.items()} == {"pixels": device, "noise": device, "u": CPU}


# --- whole commands ------------------------------------------------------------------------------------------------

DATA = ("--data", "shapes", "--limit", 8, "--size", "16x16")
SHOWN = ("--eval-every", 1, "--sample-every", 1, "--set", "train.eval_images=4")
GAN = (
    "--set",
    "loss.disc_weight=0.5",
    "--set",
    "loss.disc_start=1",
    "--set",
    "loss.disc_channels=8",
    "--set",
    "loss.disc_layers=1",
    *tiny.ADAM,
)
VQ = ("--reg", "vq", "--set", "autoencoder.codebook_size=16", "--set", "autoencoder.revive_codes=1")


def trained(where, *line) -> None:
    ending = tiny.ldm(*line[:1], *DATA, *line[1:], *SHOWN, *tiny.QUIET_LOOP[:4], "--out", where)
    assert ending.code == 0, ending.stderr


def assert_alike(a, b) -> None:
    """Two runs that differ by rounding: on a GPU the optimiser takes other kernels. Adam divides by the size of a
    gradient, so that where this is rounding alone a weight moves either way: of a few in a hundred that is let pass."""
    first, second = tiny.weights(a), tiny.weights(b)
    assert first.keys() == second.keys()
    apart = {name: ~torch.isclose(tensor, second[name], rtol=1e-3, atol=1e-5) for name, tensor in first.items()}
    count = sum(tensor.numel() for tensor in first.values())
    assert sum(int(found.sum()) for found in apart.values()) < 0.03 * count, [n for n, at in apart.items() if at.any()]
    assert tiny.state(a)["metrics"] == pytest.approx(tiny.state(b)["metrics"], rel=1e-3)


@pytest.mark.parametrize(
    "more", [GAN, VQ, ("--set", "loss.perceptual_weight=1", "--size", "24x24")], ids=["gan", "vq", "perceptual"]
)
def test_a_first_stage_is_trained_and_measured_on_a_gpu_with_the_numbers_of_a_cpu(more, tmp_path, monkeypatch):
    net = PerceptualNet("squeeze", recorded_trunk("squeeze", 0), read_heads("squeeze"))
    monkeypatch.setattr("ldmcli.training.autoencoder.perceptual_net", lambda name="": net)
    for name, place in (("cpu", contextlib.nullcontext), ("gpu", pretended)):
        with place():
            trained(tmp_path / name, "train-ae", *tiny.AE_NETWORK, "--steps", 2, *more)
    assert_alike(tmp_path / "gpu", tmp_path / "cpu")


def test_a_model_of_a_vq_stage_is_trained_and_used_on_a_gpu_with_the_numbers_of_a_cpu(tmp_path):
    trained(tmp_path / "ae", "train-ae", *tiny.AE_NETWORK, "--steps", 1, *VQ)
    line = (
        "train-ldm",
        "--autoencoder",
        tmp_path / "ae",
        *tiny.UNET,
        "--condition",
        "class+text",
        "--steps",
        2,
        "--set",
        "sample.n=2",
        "--set",
        "sample.steps=1",
    )
    for name, place in (("cpu", contextlib.nullcontext), ("gpu", pretended)):
        with place():
            trained(tmp_path / name, *line, "--set", f"data.cache_dir={tmp_path / name}-cache")
    assert_alike(tmp_path / "gpu", tmp_path / "cpu")
    picture = tiny.noisy_images(tmp_path / "pictures", 1, 24)[0]
    hole = np.zeros((24, 24), np.uint8)
    hole[8:14, 9:15] = 255
    Image.fromarray(hole).save(tmp_path / "hole.png")
    model = ("--model", tmp_path / "cpu", "--steps", 1)
    with pretended():
        for k, command in enumerate(
            [
                ("sample", *model, "--class", 1, "--prompt", "a red star", "-n", 1, "--size", 24),
                ("inpaint", picture, tmp_path / "hole.png", *model, "--resample", 2),
                ("reconstruct", picture, "--autoencoder", tmp_path / "ae"),
            ]
        ):
            ending = tiny.ldm(*command, "--out", tmp_path / f"out-{k}")
            assert ending.code == 0, ending.stderr
        ending = tiny.ldm("eval-fid", "--metrics", "psnr", "-n", 2, "--autoencoder", tmp_path / "ae")
        assert ending.code == 0, ending.stderr


# --- every condition, task and first stage -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    train_vocabulary(["a red star", "two green circles"], 64, folder)
    return load_tokenizer(folder)


def loss_of(model: LoadedDiffusion, device: torch.device) -> torch.Tensor:
    """Loss of a micro-batch as it comes from the loop: (the batch, on the CPU, is moved by the loop or by `loss`)."""
    objective, batch = objective_of(model, device), batch_of(model)
    there = Distributed.on_device(objective.dist, batch)
    loss, _ = objective.loss("model", {"model": model.network}, there, 0, False)
    with torch.no_grad():
        unmoved, _ = objective.loss("model", {"model": model.network}, batch, 0, False)
    assert float(unmoved) == float(loss.detach())
    return loss


def use_of(model: LoadedDiffusion, kinds) -> np.ndarray:
    """What a model's command draws: pictures of two things told."""
    told = {kind: VALUES[kind] for kind in kinds}
    match model.config.task.name:
        case "sr":
            return upscale_images(model, PIXELS[:, ::2, ::2], values=told, steps=1)
        case "inpaint":
            return inpaint_images(model, PIXELS, HOLES, values=told, steps=1)
    return draw_images(model, Draw(ids=[0, 1], values=told, settings={"steps": 1}))


@pytest.mark.parametrize("stage", ("kl", "vq", "none"))
@pytest.mark.parametrize("task", TASKS)
def test_first_step_and_use_with_every_condition(stage, task, words):
    """A loss, a gradient for each weight that is trained (data-parallel training waits for all), and pictures."""
    for combined in COMBINED if task == "generate" else COMBINED[::6] if task in ("sr", "inpaint, black") else ("",):
        kinds = [kind for kind in combined.split("+") if kind]
        model = tiny_model(stage, words, kinds, task)
        expected, drawn = float(loss_of(model, CPU).detach()), use_of(model, kinds)
        with pretended() as device:
            moved(model, device)
            loss = loss_of(model, device)
            loss.backward()
            assert float(loss.detach()) == expected, combined
            without = [n for n, p in model.network.named_parameters() if p.requires_grad and p.grad is None]
            assert not without, (combined, without)
            assert (use_of(model, kinds) == drawn).all(), combined


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow"])
def test_losses_of_every_parametrisation(prediction):
    weights = ("uniform",) if prediction == "flow" else ("uniform", "min_snr")
    for weight, drawn in itertools.product(weights, ("uniform", "logit_normal")):
        model = tiny_model("kl", prediction=prediction, loss_weight=weight, t_sampling=drawn)
        expected = float(loss_of(model, CPU).detach())
        with pretended() as device:
            moved(model, device)
            assert float(loss_of(model, device).detach()) == expected


def test_tokens_from_elsewhere():
    model = tiny_model("kl", kinds=("tokens",))
    with pretended() as device:
        moved(model, device)
        loss_of(model, device).backward()
        model.sample_latents(context=torch.stack(VALUES["tokens"]), n=2, steps=1)


# --- drawing -------------------------------------------------------------------------------------------------------


def steered(name: str, model: LoadedDiffusion, device: torch.device) -> dict:
    low = torch.zeros(1, 3, 4, 4, device=device)
    keep = torch.zeros(1, 1, 4, 4, device=device)
    keep[..., :2] = 1
    known = KnownRegion(torch.ones(2, 3, 4, 4, device=device), keep)
    decode = gradient_guidance.latent_decoder(model.autoencoder)
    return {
        "plain": {},
        "known": {"known": known},
        "known twice": {"known": replace(known, resample=2)},
        "tiles": {"tile": 2},
        "picture": {"guide": lambda d: gradient_guidance.image_guide(d, decode, low)},
        "picture, paper": {"guide": lambda d: gradient_guidance.image_guide(d, decode, low, 0.1, rule="paper")},
        "classifier": {
            "guide": lambda d: gradient_guidance.classifier_guide(d, lambda z, t: -z.square().sum((1, 2, 3)))
        },
    }[name]


STEERINGS = ("plain", "known", "tiles", "picture", "known twice", "picture, paper", "classifier")


def drawn_latents(model, sampler: str, steering: str, device) -> torch.Tensor:
    settings = SampleSettings(sampler=sampler, steps=2, guidance=2.0, eta=0.5 if sampler == "ddim" else 0.0)
    inputs = model.network.conditions.prepare({"class": [0, 1]})
    return sample_conditioned(
        model.network, model.schedule, settings, ids=[0, 1], seed=0, inputs=inputs, **steered(steering, model, device)
    ).cpu()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_on_a_gpu_what_it_draws_on_a_cpu(sampler):
    for prediction in ("eps", "v", "x0", "flow"):
        model = tiny_model("kl", kinds=("class",), prediction=prediction)
        steerings = ("plain",) if prediction != "eps" else STEERINGS if sampler == "ddim" else STEERINGS[:4]
        with torch.no_grad():
            expected = {steering: drawn_latents(model, sampler, steering, CPU) for steering in steerings}
            with pretended() as device:
                moved(model, device)
                for steering in steerings:
                    found = drawn_latents(model, sampler, steering, device)
                    assert torch.equal(found, expected[steering]), (prediction, steering)


def led_by_classes(model: LoadedDiffusion, device: torch.device) -> dict:
    """What leads samples to the first class, by a tiny classifier."""
    classifier = object.__new__(LoadedClassifier)
    torch.manual_seed(2)
    classifier.network = NoisyClassifier(model.config.diffusion, "mean", 2, model.network.latent_shape).eval()
    classifier.network.requires_grad_(False).to(device)
    return {"guide": ClassGuidance(classifier, [0, 1], 1.0).guide}


WAITLESS = {
    "no guidance": (1.0, {}),
    "one scale": (2.0, {}),
    "a scale each": ({"class": 2.0, "map": 3.0}, {}),
    "an interval": (2.0, {"guidance_interval": (0.2, 0.8)}),
    "a temperature": (2.0, {"temperature": 0.5}),
    "a guiding model": (1.0, {"autoguidance": 2.0}),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_step_of_a_sampler_waits_for_a_gpu(sampler, monkeypatch):
    """As many copies and reads in five steps as in two: those at the beginning and the end."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    model = tiny_model("kl", kinds=("class", "map"))
    told = model.network.conditions.prepare({kind: VALUES[kind] for kind in ("class", "map")})
    cases = [(scale, more, "plain") for scale, more in WAITLESS.values()]
    cases += [(2.0, {}, steering) for steering in (*STEERINGS[1:4], "led")] if sampler in ("ddim", "ddpm") else []
    with torch.no_grad(), pretend.device("cuda") as device:
        moved(model, device)
        for scale, more, steering in cases:
            how = led_by_classes(model, device) if steering == "led" else steered(steering, model, device)
            found = []
            for steps in (1, 2, 5):  # the first time some things are brought to the device to stay
                eta = 0.5 if sampler == "ddim" else 0.0
                settings = SampleSettings(sampler=sampler, steps=steps, guidance=scale, eta=eta, **more)
                with syncs.counted() as waits:
                    arguments = (model.network, model.schedule, settings)
                    sample_conditioned(*arguments, ids=[0, 1], seed=0, inputs=told, guiding=model.network, **how)
                found.append(waits)
            assert len(found[1]) == len(found[2]), (scale, more, steering, found[2])


@pytest.mark.parametrize("stage", [name for name, settings in STAGES.items() if settings])
def test_first_stages_encode_and_decode_whole_and_in_tiles(stage):
    ae, results = first_stage(stage), []
    for place in (contextlib.nullcontext, pretended):
        with place() as device:
            ae.network.to(device or CPU)
            z = memory.encode(ae, PIXELS, 2, max_memory=1e-9)
            parts = [
                ae.encode(PIXELS),
                ae.encode(PIXELS, sample=torch.Generator().manual_seed(0)),
                z,
                ae.decode(z),
                memory.decode(ae, z, 2, max_memory=1e-9),
            ]
            results.append([part.cpu() for part in parts])
    assert all(torch.equal(a, b) for a, b in zip(*results))


# --- presets -------------------------------------------------------------------------------------------------------

SMALL = {
    "autoencoder.channels": 8,
    "autoencoder.groups": 4,
    "autoencoder.num_res_blocks": 1,
    "autoencoder.codebook_size": 16,
    "diffusion.channels": 32,
    "diffusion.groups": 8,
    "diffusion.num_res_blocks": 1,
    "condition.context_dim": 16,
    "condition.text_layers": 1,
}


def resolved(name: str, **changes):
    kind = PRESETS[name].kind
    small = {key: value for key, value in changes.items() if key in configuration.paths(kind)}
    return configuration.resolve(kind, [(name, dict(PRESETS[name].values)), ("test", small)])


def stage_of(name: str) -> str:
    return PRESETS[name].extra.get("first_stage", "")


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.kind == "autoencoder"])
def test_first_step_of_every_first_stage(name):
    """Both phases of a small network of each preset; bounds on memory are found for it, too."""
    settings = resolved(name, **SMALL).config.autoencoder
    side = 4 * settings.f
    assert memory.peak_bytes(Autoencoder(settings), (1, settings.in_channels, side, side)) > 0
    with pretended() as device:
        losses_of_ae(settings, device, side)


def losses_of_ae(settings: AutoencoderSettings, device: torch.device, side: int) -> None:
    torch.manual_seed(0)
    objective = object.__new__(AutoencoderObjective)
    objective.config = AutoencoderConfig(
        autoencoder=settings,
        loss=LossSettings(disc_weight=0.5, disc_start=0, disc_channels=8, disc_layers=1, style="paper"),
    )
    objective.dist, objective.perceptual = SimpleNamespace(device=device), None
    objective.autoencoder = Autoencoder(settings).to(device)
    objective.networks = {"autoencoder": objective.autoencoder, "discriminator": PatchDiscriminator(3, 8, 1).to(device)}
    objective.used_codes = torch.zeros(settings.codebook_size, dtype=torch.bool, device=device)
    shape = objective.autoencoder.latent_shape(side, side)
    pixels = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    batch = {"row": torch.arange(2), "pixels": torch.from_numpy(pixels)}
    for phase in objective.phases(0):
        if not objective.autoencoder.is_vq:
            batch[f"noise.{phase}"] = rng.normal(0, [0, 1], shape, "posterior", phase)
        for network in objective.networks.values():
            network.requires_grad_(network is objective.networks[phase])
        loss, stats = objective.loss(phase, objective.networks, batch, 0, norms=phase == "autoencoder")
        loss.backward()
        without = [n for n, p in objective.networks[phase].named_parameters() if p.grad is None]
        assert not without and all(torch.isfinite(value.float()).all() for value in stats.values())


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.kind == "diffusion"])
def test_a_pass_of_every_diffusion_model(name):
    config, stage = resolved(name, **SMALL).config, AutoencoderSettings(f=F, embed_dim=3, z_channels=3)
    if stage_of(name):
        stage = resolved(stage_of(name)).config.autoencoder
    stage = cost.meta_autoencoder(stage)
    side = 2 * stage.f * 2 ** (len(config.diffusion.channel_mult) - 1) * config.diffusion.patch
    latent, facts = stage.latent_shape(side, side), assumed_specs(config, stage, {})
    with pretended() as device:
        model = DiffusionModel(config.diffusion, config.condition, facts, None, latent, config.kinds).to(device)
        encode = lambda x: torch.zeros(len(x), *latent, device=device)  # noqa: E731
        inputs = {key: value.to(device) for key, value in model.conditions.example((side, side)).items()}
        out = model(torch.zeros(1, *latent, device=device), torch.zeros(1, device=device), inputs, encode)
        out.sum().backward()
        assert out.shape == (1, *latent) and out.device == device


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_planned(name, monkeypatch):
    monkeypatch.setattr(planning, "probe_flops_per_s", lambda device, dtype: 1e9)
    found = planning.plan(PRESETS[name].kind, resolved(name, **SMALL), first_stage=stage_of(name))
    assert found["flops"]["per_step"] > 0 and found["memory"]["activations"] > 0


# --- networks that measure -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", extractors.NETWORKS)
def test_features_are_those_of_a_cpu(name):
    torch.manual_seed(0)
    network = extractors.NETWORKS[name]
    net, found = network.build().eval().requires_grad_(False), []
    for place in (contextlib.nullcontext, pretended):
        with place() as device:
            extractor = object.__new__(extractors.Extractor)
            extractor.name, extractor.network, extractor.block = name, network, 3
            extractor.device, extractor.net = device or CPU, net.to(device or CPU)
            found.append(extractor.features([PIXELS[0], PIXELS[0, :12], PIXELS[1]]))
    assert (found[0] == found[1]).all()


def test_pictures_of_one_shape_are_brought_to_a_gpu_and_resized_together():
    network = extractors.NETWORKS["squeezenet"]
    net = network.build().eval().requires_grad_(False)
    extractor = object.__new__(extractors.Extractor)
    extractor.name, extractor.network, extractor.block = "squeezenet", network, 6
    copies = []
    for count in (2, 6):
        with pretended() as device, syncs.counted() as waits:
            extractor.device, extractor.net = device, net.to(device)
            before = len(waits)
            extractor.features([PIXELS[k % 2] for k in range(count)])
            copies.append(len(waits) - before)
    assert copies[0] == copies[1]


def test_a_judge_learns_and_reads_on_a_gpu_what_it_does_on_a_cpu(monkeypatch):
    maps = [np.full((SIDE, SIDE), k, np.uint8) for k in range(2)]
    found = []
    for place in (contextlib.nullcontext, pretended):
        with place() as device:
            monkeypatch.setattr(segmenter, "measuring_device", lambda chosen=device or CPU: chosen)
            judge = segmenter.train_segmenter(PIXELS.__getitem__, maps.__getitem__, 2, 2, steps=2)
            found.append(judge.maps(list(PIXELS)))
    assert all((a == b).all() for a, b in zip(*found))


def test_an_evaluation_with_intervals_and_copies_has_on_a_gpu_the_numbers_of_a_cpu(tmp_path, monkeypatch):
    """Distances, their estimates, and the share that copies training pictures; half of the pictures are copies."""
    known = measured.pictures(70, seed=1)
    measured.folder(tmp_path / "known", known)
    measured.folder(tmp_path / "made", np.concatenate([known[:6], measured.pictures(6, seed=2)]))
    data = DataSettings(source=str(tmp_path / "known"), size=(16, 16), val_fraction=0.4)
    extractor, found = measured.tiny_extractor(tmp_path / "tiny.safetensors"), []
    monkeypatch.setattr("ldmcli.evaluation.evaluate.open_extractor", lambda name=None: extractor)
    for name, place in (("cpu", contextlib.nullcontext), ("gpu", pretended)):
        monkeypatch.setenv("LDM_CACHE", str(tmp_path / name))
        with place() as device:
            extractor.device = device or CPU
            extractor.net.to(extractor.device)
            metrics = ("fid", "kid", "pr", "dc", "mind", "novelty")
            found.append(evaluate(images=tmp_path / "made", data=data, metrics=metrics))
    assert found[0]["estimates"] and found[0]["metrics"]["copied"] > 0
    for part in ("metrics", "estimates"):
        assert found[0][part] == found[1][part]


def test_lpips_and_its_identity_on_a_gpu_are_those_of_a_cpu():
    net, found = PerceptualNet("squeeze", recorded_trunk("squeeze", 0), read_heads("squeeze")), []
    pictures = list(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    for place in (contextlib.nullcontext, pretended):
        with place() as device:
            net.to(device or CPU)
            found.append((METRICS["lpips"].compute(pictures, pictures[::-1], net), net.identity["trunk_sha256"]))
    assert found[0] == found[1]


# --- autocast ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [name for name, settings in STAGES.items() if settings])
def test_autocast_on_cuda_leaves_regularisers_in_float32(stage):
    with bf16_of_cuda() as device:
        with device:
            network = Autoencoder(STAGES[stage])
        seen, product = [], torch.Tensor.__matmul__

        def watched(a, b):
            out = product(a, b)
            seen.append(out.dtype)
            return out

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "__matmul__", watched)
            found = network(torch.empty(2, 3, SIDE, SIDE, device=device), torch.empty(2, 3, 4, 4, device=device))
        assert found.moments.dtype == torch.bfloat16 and found.reconstruction.device.type == "cuda"
        assert found.codebook_loss.dtype == torch.float32 or not network.is_vq
        assert set(seen) == ({torch.float32} if network.is_vq else set())
        assert network.kl(found.moments).dtype == torch.float32 or network.is_vq


@pytest.mark.parametrize("kinds", COMBINED)
def test_a_step_with_autocast_on_cuda(kinds, words):
    model = tiny_model("vq", words, [kind for kind in kinds.split("+") if kind])
    conditions = model.network.conditions
    inputs = conditions.prepare({kind: VALUES[kind] for kind in conditions.kinds}) if conditions.kinds else {}
    with bf16_of_cuda() as device:
        moved(model, device)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        z = torch.empty(2, *model.network.latent_shape, device=device)
        schedule, t = make_schedule(model.config.diffusion), torch.empty(2, device=device)
        network = partial(model.network, encode=model.autoencoder.encode)
        each = diffusion_loss(network, schedule, model.config.diffusion, z, torch.empty_like(z), t, inputs)
        assert each.device.type == "cuda" and each.dtype == torch.float32


class Convolutions(TorchDispatchMode):
    """Formats of what convolutions are given."""

    def __init__(self):
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name == "aten::convolution":
            self.seen |= {args[0].dtype, args[1].dtype}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("task", ["generate", "sr"])
@pytest.mark.parametrize("setting, dtype", [("auto", torch.bfloat16), ("no", torch.float32)])
def test_networks_in_use_run_in_bfloat16_on_cuda_unless_told_otherwise(setting, dtype, task, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    seen = []

    @contextlib.contextmanager
    def autocast(device, chosen):
        seen.append((device.type, chosen))
        torch.set_autocast_enabled("cuda", chosen is not None)
        yield
        torch.set_autocast_enabled("cuda", False)

    monkeypatch.setattr("ldmcli.sampling.first_stage.autocast", autocast)
    model = tiny_model("paper", task=task)
    model.autoencoder.dtype = inference_dtype(setting, torch.device("cuda"))
    values = {} if task == "generate" else {"lowres": VALUES["lowres"]}
    levels = sampling_levels(model.schedule, 2, "linspace")
    monkeypatch.setattr("ldmcli.diffusion.sample.sampling_levels", lambda *which, **how: levels)  # fake ones have no t
    states: list[torch.Tensor] = []
    with bf16_of_cuda() as device:
        torch.set_autocast_enabled("cuda", False)
        moved(model, device)
        draw = Draw(ids=[0, 1], values=values, callback=lambda i, z, x0: states.extend((z, x0)))
        with syncs.counted(), Convolutions() as convolutions, torch.no_grad():
            z = draw_latents(model, draw)
            with model.autoencoder.autocast():
                x = memory.decode(model.autoencoder, z)
    assert convolutions.seen == {dtype} and set(seen) == {("cuda", None if setting == "no" else dtype)}
    assert {one.dtype for one in (*states, z, x)} == {torch.float32} and x.device.type == "cuda"


# --- room on a GPU -------------------------------------------------------------------------------------------------


def test_a_gpu_s_memory_decides_how_much_goes_through_the_networks_at_once(monkeypatch):
    card = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    cuda = torch.device("cuda")
    assert memory.activation_budget(CPU) == memory.MAX_MEMORY == 4.0 and memory.activation_budget(cuda) == 40.0
    card.total_memory = 2 * 2**30
    assert memory.activation_budget(cuda) == 4.0, "as on a CPU, at least"
    model = tiny_model("kl")
    assert memory.batch_that_fits(model, None, 16, 128) == 16
    one = memory.peak_activation_bytes(model, 4, 4, 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 50 * one, 0))
    monkeypatch.setattr(LoadedDiffusion, "device", cuda)
    assert memory.batch_that_fits(model, None, 16, 128) == 50 and memory.batch_that_fits(model, (16, 16), 16, 30) == 30
