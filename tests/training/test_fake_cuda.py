"""What a GPU would do with the networks, on fake CUDA tensors with CUDA's autocast: dtypes, kernels, waits.

Every published network at its full size, every condition, task and parametrisation, samplers, decoders and networks of
features. Norms, activations and products are to be in bfloat16, sums in float32, nothing in float64; attention is to
take a fused kernel or products in bfloat16; and a loss of what lies on the GPU is to wait for nothing.
"""

import collections
import contextlib
import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import syncs
import tiny_models as tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldmcli import diffusion
from ldmcli.conditions.fit import assumed_specs
from ldmcli.core import config as configuration
from ldmcli.core.presets import PRESETS
from ldmcli.core.settings import DiffusionSettings, DistillSettings, LossSettings, SampleSettings
from ldmcli.diffusion.loss import diffusion_loss
from ldmcli.diffusion.sample import sample_conditioned
from ldmcli.diffusion.samplers import SAMPLERS
from ldmcli.diffusion.schedule import make_schedule, sampling_levels
from ldmcli.evaluation import extractors
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.conditioners import load_tokenizer, train_vocabulary
from ldmcli.networks.discriminator import PatchDiscriminator
from ldmcli.networks.latent_diffusion import DiffusionModel
from ldmcli.networks.losses import Adversary, discriminator_loss, generator_loss
from ldmcli.networks.noisy_classifier import NoisyClassifier
from ldmcli.networks.perceptual import perceptual_shapes
from ldmcli.training import cost
from ldmcli.training.distillation import Distillation

BF16, FP32 = torch.bfloat16, torch.float32
GROUPS = {
    "norm": ("native_group_norm", "native_layer_norm", "native_batch_norm", "cudnn_batch_norm", "batch_norm"),
    "activation": ("silu", "gelu", "relu", "leaky_relu", "leaky_relu_", "_softmax"),
    "product": ("convolution", "mm", "addmm", "bmm", "baddbmm", "linear"),
}
GROUP_OF = {"aten::mean": "mean"} | {f"aten::{name}": group for group, names in GROUPS.items() for name in names}


def _as_laid_out_by_cuda(name: str, x: Tensor, out):
    """The result of a convolution or a GroupNorm in the memory format of x, as on a GPU; fake ones are contiguous."""
    if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return out
    if name == "aten::convolution":
        return out.contiguous(memory_format=torch.channels_last)
    if name == "aten::native_group_norm":
        return out[0].contiguous(memory_format=torch.channels_last), *out[1:]
    return out


class Operations(TorchDispatchMode):
    """The dtypes that norms, activations and products read, counted; float64 off the CPU is refused."""

    def __init__(self):
        super().__init__()
        self.dtypes = collections.defaultdict(collections.Counter)
        self.layouts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name == "aten::_pin_memory":  # fake tensors have none
            return args[0]
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "cpu" and leaf.dtype == torch.float64:
                raise TypeError(f"{name} makes float64 on {leaf.device}")
        if (group := GROUP_OF.get(name)) and args[0].device.type == "cuda":
            self.dtypes[group][args[0].dtype] += 1
            if name == "aten::native_group_norm" and args[0].ndim == 4:
                self.layouts[args[0].is_contiguous(memory_format=torch.channels_last)] += 1
            out = _as_laid_out_by_cuda(name, args[0], out)
        return out


class Attention(TorchFunctionMode):
    """Calls of attention, fused kernels' or not, whose result is as CUDA lays it out: (B, L, heads, d) in memory."""

    def __init__(self):
        super().__init__()
        self.fused, self.refused = 0, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention or args[0].device.type != "cuda":
            return function(*args, **(kwargs or {}))
        q, k, v = args
        if any(part.stride(-1) != 1 for part in args) or q.shape[-1] > 256 or {q.dtype, k.dtype, v.dtype} != {BF16}:
            self.refused.append([(tuple(part.shape), part.stride(), part.dtype) for part in args])
        self.fused += 1
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)


@contextlib.contextmanager
def watched():
    """Operations, attention and waits of what runs inside."""
    with Operations() as operations, syncs.counted() as waits, Attention() as attention:
        yield operations, attention, waits


def assert_fast(operations: Operations, attention: Attention, waits: list[str], groups=GROUPS) -> None:
    assert waits == []
    assert attention.refused == []
    assert {group: set(operations.dtypes[group]) for group in groups} == {group: {BF16} for group in groups}
    assert set(operations.layouts) <= {True}, operations.layouts


class _NoInit(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def on(device):
    """Networks are made on a device, their weights as they come."""
    with device, _NoInit():
        yield


def config_of(name: str):
    return configuration.resolve(PRESETS[name].kind, [(name, dict(PRESETS[name].values))]).config


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    train_vocabulary(["a red star", "two green circles"], 64, folder)
    return load_tokenizer(folder)


# --- published networks at full size -------------------------------------------------------------------------------

LIKE_LSUN_BEDS = {"celeba256", "ffhq256"}  # the same network
UNETS = [name for name, preset in PRESETS.items() if preset.kind == "diffusion" and name not in LIKE_LSUN_BEDS]
FUSED_HEADS = {"lsun_beds256", "lsun_churches256", "txt2img-1p4B", "bsr_sr", "inpainting_big"}


@pytest.mark.parametrize("name", UNETS)
def test_a_published_diffusion_model(name):
    config, preset = config_of(name), PRESETS[name]
    stage = cost.meta_autoencoder(config_of(preset.extra.get("first_stage") or "kl-f8").autoencoder)
    latent = preset.extra.get("latent") or (stage.latent_channels, 32, 32)
    schedule, facts = make_schedule(config.diffusion), assumed_specs(config, stage, {})
    with tiny.bf16_of_cuda() as device:
        with on(device):
            model = DiffusionModel(config.diffusion, config.condition, facts, None, latent, config.kinds)
            inputs = model.conditions.example((latent[1] * stage.f, latent[2] * stage.f))
            z, t = torch.empty(1, *latent), torch.empty(1)
        schedule.tables(z.device, FP32)
        encode = lambda x: torch.empty(len(x), *latent, device=device)  # noqa: E731
        with watched() as seen:
            inputs = model.conditions.complete(inputs)
            each = diffusion_loss(partial(model, encode=encode), schedule, config.diffusion, z, z, t, inputs)
        assert_fast(*seen)
        assert each.dtype == FP32 and each.device.type == "cuda"
        assert seen[1].fused or name not in FUSED_HEADS


STAGES = [
    name
    for name, preset in PRESETS.items()
    if preset.kind == "autoencoder" and "assumed" not in preset.extra and not name.endswith("-n256")
]


@pytest.mark.parametrize("name", STAGES)
def test_a_published_first_stage_with_its_loss(name):
    """Both sides of Eq. 25 at 64 px; the adaptive weight would need a backward pass."""
    settings = config_of(name).autoencoder
    loss = LossSettings(perceptual_weight=1.0, disc_weight=0.5, adaptive_weight=False, style="paper")
    with tiny.bf16_of_cuda() as device:
        with on(device):
            network, critic = Autoencoder(settings), PatchDiscriminator(3, 64, 3)
            x = torch.empty(2, 3, 64, 64)
            noise = torch.empty(2, *network.latent_shape(64, 64))
        lpips = perceptual_shapes("vgg")
        for module in lpips.modules():
            for own in (module._parameters, module._buffers):
                own.update({key: torch.empty(value.shape, device=device) for key, value in own.items()})
        with watched() as seen:
            found = network(x, noise)
            regulariser = found.codebook_loss if network.is_vq else network.kl(found.moments)
            adversary = Adversary(logits_fake=critic(found.reconstruction))
            total, _ = generator_loss(
                settings.reg,
                x,
                found.reconstruction,
                regulariser,
                loss,
                last_layer=network.last_layer,
                perceptual=lpips,
                adversary=adversary,
            )
            other = discriminator_loss(critic(x), critic(found.reconstruction.detach()), "vanilla")
        assert found.reconstruction.dtype == BF16 and {regulariser.dtype, total.dtype, other.dtype} == {FP32}
        operations, attention, waits = seen
        if network.is_vq:  # distances to the codebook are in float32: neighbours are close
            assert operations.dtypes["product"].pop(FP32) == 1
        assert_fast(operations, attention, waits)


# --- every condition, task and parametrisation ---------------------------------------------------------------------


def loss_on_the_gpu(model, batch, device, cached: bool, distillation: Distillation | None = None) -> Tensor:
    objective = tiny.objective_of(model, device)
    objective.distillation = distillation
    if cached and "posterior" in batch:
        del batch["pixels"]
        batch["moments"] = torch.cat([batch["posterior"]] * 2, 1)
    there = {name: value.to(device) for name, value in batch.items()}
    with Attention():
        objective.loss("model", {"model": model.network}, there, 0, False)  # tables are brought to the device once
    with watched() as seen:
        loss, _ = objective.loss("model", {"model": model.network}, there, 0, False)
    assert_fast(*seen)
    assert set(seen[0].dtypes["mean"]) == {FP32}
    return loss


@pytest.mark.parametrize("task", tiny.TASKS)
def test_a_loss_waits_for_nothing_with_any_condition(task, words):
    for combined in tiny.COMBINED if task == "generate" else tiny.COMBINED[-1:]:
        model = tiny.tiny_model("vq", words, [kind for kind in combined.split("+") if kind], task)
        batch = tiny.batch_of(model)
        with tiny.bf16_of_cuda() as device:
            tiny.moved(model, device)
            loss = loss_on_the_gpu(model, batch, device, cached=False)
            assert loss.device.type == "cuda" and loss.dtype == FP32, combined


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow"])
def test_a_loss_waits_for_nothing_with_any_parametrisation(prediction):
    weights = ("uniform",) if prediction == "flow" else ("uniform", "min_snr")
    for weight, drawn in itertools.product(weights, ("uniform", "logit_normal")):
        model = tiny.tiny_model("kl", prediction=prediction, loss_weight=weight, t_sampling=drawn)
        batch = tiny.batch_of(model)
        with tiny.bf16_of_cuda() as device:
            tiny.moved(model, device)
            assert loss_on_the_gpu(model, batch, device, cached=True).dtype == FP32


@pytest.mark.parametrize("task", tiny.TASKS)
@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_a_students_loss_waits_for_nothing(task, prediction, words):
    """`ldm distill`: its teacher walks on the same device, guided."""
    for combined in tiny.COMBINED if task == "generate" else tiny.COMBINED[-1:]:
        kinds = [kind for kind in combined.split("+") if kind]
        teacher, student = (tiny.tiny_model("kl", words, kinds, task, prediction=prediction) for _ in range(2))
        few = DistillSettings(calls=2, guidance=2.0, teacher_steps=4, teacher="x")
        student.config = replace(student.config, distill=few)
        distillation = Distillation(student.config, teacher, Path("teacher"))
        batch = tiny.batch_of(student) | {"t": distillation.timesteps([0, 1])}
        with tiny.bf16_of_cuda() as device:
            tiny.moved(teacher, device), tiny.moved(student, device)
            loss = loss_on_the_gpu(student, batch, device, cached=True, distillation=distillation)
            assert loss.device.type == "cuda" and loss.dtype == FP32, combined


@pytest.mark.parametrize("kind", ["clip", "bert", "t5"])
def test_a_loss_with_a_frozen_encoder_of_text(kind, tmp_path):
    """Its products and activations are in bfloat16, too; its norms are those of `transformers`, which autocast leaves
    in float32. Whether it waits is seen in test_no_waits.py: it looks at no mask that is fake."""
    folder = tiny.frozen_encoder(kind, tmp_path)
    model = tiny.tiny_model("vq", load_tokenizer(folder), ["text"], text_encoder=folder)
    batch = tiny.batch_of(model)
    kept = model.network.state_dict()
    assert not any("_frozen" in name for name in kept)
    with tiny.bf16_of_cuda() as device:
        tiny.moved(model, device)
        objective = tiny.objective_of(model, device)
        there = {name: value.to(device) for name, value in batch.items()}
        with Attention():
            objective.loss("model", {"model": model.network}, there, 0, False)
        with watched() as (operations, attention, waits):
            loss, _ = objective.loss("model", {"model": model.network}, there, 0, False)
    assert loss.dtype == FP32 and loss.device.type == "cuda"
    assert waits == [] and attention.refused == []
    assert set(operations.dtypes["product"]) == set(operations.dtypes["activation"]) == {BF16}


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
@pytest.mark.parametrize("more", [{}, {"spatial_transformer": True}, {"scale_shift": True, "resblock_updown": True}])
def test_every_form_of_the_unet(position, more):
    settings = DiffusionSettings(
        channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(1, 2),
        groups=8,
        position=position,
        patch=2,
        **more,
    )
    with tiny.bf16_of_cuda() as device:
        with on(device):
            model = DiffusionModel(settings, tiny.ConditionSettings(), {}, None, (3, 16, 16), ())
            z, t = torch.empty(2, 3, 16, 16), torch.empty(2)
        with watched() as seen:
            out = model(z, t)
        assert_fast(*seen)
        assert out.dtype == BF16 and seen[1].fused


@pytest.mark.parametrize("pool", ["attention", "mean"])
def test_a_classifier(pool):
    settings = DiffusionSettings(channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,))
    with tiny.bf16_of_cuda() as device:
        with on(device):
            network = NoisyClassifier(settings, pool, 10, (3, 16, 16))
            z, t = torch.empty(2, 3, 16, 16), torch.empty(2)
        with watched() as seen:
            logits = network(z, t)
        assert_fast(*seen)
        assert logits.shape == (2, 10)


# --- in use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler(sampler):
    """Latents, and pixels of them, in autocast: all on the GPU, no float64 there."""
    model = tiny.tiny_model("paper", kinds=("class",))
    inputs = model.network.conditions.prepare({"class": [0, 1]})
    settings = SampleSettings(sampler=sampler, steps=2, guidance=2.0)
    schedule = make_schedule(model.config.diffusion)
    levels = sampling_levels(schedule, settings.steps, settings.spacing)
    with tiny.bf16_of_cuda() as device, torch.no_grad():
        tiny.moved(model, device)
        with watched() as (operations, attention, _), pytest.MonkeyPatch.context() as patch:
            patch.setattr(diffusion.sample, "sampling_levels", lambda *_, **__: levels)  # fake tensors have no values
            z = sample_conditioned(model.network, schedule, settings, ids=[0, 1], seed=0, inputs=inputs)
            pixels = model.autoencoder.network.decode(model.autoencoder.scale.restore(z))
    assert z.device.type == pixels.device.type == "cuda" and z.dtype == FP32
    assert attention.fused and not attention.refused
    assert set(operations.dtypes["norm"]) == set(operations.dtypes["activation"]) == {BF16}


@pytest.mark.parametrize("name", [name for name, network in extractors.NETWORKS.items() if network.build])
def test_a_network_of_features(name):
    """In float32, whatever autocast would do: numbers are compared with those of others."""
    network = extractors.NETWORKS[name]
    with tiny.bf16_of_cuda() as device:
        torch.set_autocast_enabled("cuda", False)
        with on(device):
            net, x = network.build().eval(), torch.empty(2, 3, network.size, network.size)
        with watched() as (operations, _, waits), torch.no_grad():
            features, _ = net(x)
    assert features.shape == (2, network.dim) and features.device.type == "cuda"
    assert set(operations.dtypes["product"]) == {FP32} and waits == []


def test_float64_is_refused_off_the_cpu():
    with tiny.bf16_of_cuda() as device, Operations():
        torch.zeros(2).double()
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(2, device=device).double()
