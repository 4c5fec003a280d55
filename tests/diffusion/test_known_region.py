"""A region that a sample has to keep, and guidance with a scale for each kind."""

import zlib

import pytest
import torch
from golden_cases import relative
from recorded import recorded_unet

from ldmcli.core.errors import UsageError
from ldmcli.core.settings import ConditionSettings, DiffusionSettings, SampleSettings
from ldmcli.diffusion.guidance import GuidancePath, denoiser, guidance_path, guidance_steps
from ldmcli.diffusion.sample import KeyedNoise, KnownRegion, replace_known_region, sample_conditioned, sample_latents
from ldmcli.diffusion.samplers import SAMPLERS, ddim, repaint
from ldmcli.diffusion.schedule import make_schedule, sampling_levels, to_x0_eps
from ldmcli.networks.latent_diffusion import DiffusionModel

EXACT = 5e-6


def recorded(case: str):
    """Denoiser, levels and tensors of a recorded UNet with the original's subset of timesteps."""
    model, _, io, config = recorded_unet(case)
    schedule = make_schedule(
        DiffusionSettings(
            prediction="eps", schedule="linear", beta_start=config["linear_start"], beta_end=config["linear_end"]
        )
    )

    def denoise(z, t, alpha, sigma):
        return to_x0_eps("eps", model(z, torch.full((len(z),), t)), z, alpha, sigma)

    return denoise, sampling_levels(schedule, config["ddim_steps"], "original"), io


@torch.no_grad()
def test_masked_sampling_is_the_recorded_one():
    denoise, levels, io = recorded("unet_uncond")
    known = KnownRegion(io["ddim_mask.x0"], io["ddim_mask.mask"])
    hook = replace_known_region(known, levels, lambda i: io["ddim_mask.q_noise"][i])
    z = ddim(denoise, io["ddim_mask.x_T"], levels, before_step=hook)
    assert relative(z, io["ddim_mask.samples"]) < EXACT


@torch.no_grad()
def test_sampling_with_recorded_step_noise_is_the_recorded_one():
    denoise, levels, io = recorded("unet_uncond")
    z = ddim(denoise, io["ddim_eta1.x_T"], levels, eta=1.0, noise=lambda i: io["ddim_eta1.step_noise"][i])
    assert relative(z, io["ddim_eta1.samples"]) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_takes_what_comes_before_its_steps(name):
    """A hook that puts in the same z every time decides the result, up to what a multistep sampler remembers."""
    seen = []
    fixed = torch.full((1, 1, 2, 2), 0.3)
    levels = sampling_levels(make_schedule(DiffusionSettings()), 5)

    def drawn_from(hook):
        zero = torch.zeros(1, 1, 2, 2)
        return SAMPLERS[name].function(
            lambda z, t, alpha, sigma: (z, zero),
            torch.randn(1, 1, 2, 2),
            levels,
            noise=lambda i: zero,
            before_step=hook,
        )

    first = drawn_from(lambda i, z: seen.append(i) or fixed)
    assert seen == [0, 1, 2, 3, 4]
    assert torch.equal(first, drawn_from(lambda i, z: fixed))


# --- RePaint ------------------------------------------------------------------------------------------------------


def gaussian(mean: float, std: float):
    """The exact denoiser of data N(mean, std²)."""

    def denoise(z, t, alpha, sigma):
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        x0 = mean + gain * (z - alpha * mean)
        return x0, (z - alpha * x0) / sigma

    return denoise


def noise(*path):
    return torch.randn(20_000, generator=torch.Generator().manual_seed(zlib.crc32(str(path).encode())))


@pytest.mark.parametrize("process", [{}, {"prediction": "flow"}], ids=["vp", "flow"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++"])
def test_resampling_leaves_the_distribution_alone(name, process):
    """Noise put back has just the variance that the step took away."""
    levels = sampling_levels(make_schedule(DiffusionSettings(**process)), 60)
    z = repaint(
        SAMPLERS[name].function,
        gaussian(0.5, 0.4),
        noise("T"),
        levels,
        3,
        eta=1.0,
        noise=lambda i, k: noise("step", i, k),
        renoise=lambda i, k: noise("again", i, k),
    )
    assert z.mean().item() == pytest.approx(0.5, abs=0.03) and z.std().item() == pytest.approx(0.4, abs=0.04)


def test_one_round_of_resampling_is_ordinary_sampling():
    levels = sampling_levels(make_schedule(DiffusionSettings()), 12)
    denoise = gaussian(0.5, 0.4)
    once = repaint(ddim, denoise, noise("T"), levels, 1, eta=0.7, noise=lambda i, k: noise(i), renoise=None)
    assert torch.allclose(once, ddim(denoise, noise("T"), levels, eta=0.7, noise=noise), atol=1e-6)


def test_resampling_evaluates_each_step_as_often_as_it_says():
    seen, levels = [], sampling_levels(make_schedule(DiffusionSettings()), 4)
    repaint(
        ddim,
        lambda z, t, a, s: seen.append(t) or (z, z),
        torch.zeros(1),
        levels,
        3,
        noise=lambda i, k: torch.zeros(1),
        renoise=lambda i, k: torch.zeros(1),
        before_step=lambda i, k, z: seen.append((i, k)) or z,
    )
    assert [entry for entry in seen if isinstance(entry, tuple)] == [(i, k) for i in range(4) for k in range(3)]
    assert [entry for entry in seen if not isinstance(entry, tuple)] == [t for t in levels.t for _ in range(3)]


# --- a whole model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    """Told a class and a map."""
    torch.manual_seed(0)
    settings = DiffusionSettings(channels=16, channel_mult=(1,), groups=4, attention_resolutions=(1,), head_channels=8)
    facts = {
        "class": {"class_names": ["a", "b", "c"]},
        "map": {"classes": 3, "names": ["x", "y", "z"], "out_channels": 3, "stages": 1},
    }
    model = DiffusionModel(settings, ConditionSettings(kinds=("class", "map"), context_dim=16), facts, None, (4, 6, 6))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def inputs(model) -> dict:
    maps = [torch.randint(0, 3, (12, 12), generator=torch.Generator().manual_seed(k)).numpy() for k in range(2)]
    return model.conditions.prepare({"class": [0, 2], "map": maps})


SCHEDULE = make_schedule(DiffusionSettings(prediction="eps"))


def drawn(model, inputs, guidance=2.0, **more):
    settings = SampleSettings(steps=4, sampler=more.pop("sampler", "ddim"), guidance=guidance)
    return sample_conditioned(model, SCHEDULE, settings, ids=more.pop("ids", [0, 1]), seed=0, inputs=inputs, **more)


@torch.no_grad()
@pytest.mark.parametrize("resample", [1, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_known_region_comes_back_and_the_rest_is_drawn(model, inputs, sampler, resample):
    z0 = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(5))
    keep = torch.zeros(1, 1, 6, 6)
    keep[..., :3] = 1
    z = drawn(model, inputs, sampler=sampler, known=KnownRegion(z0, keep, resample))
    assert torch.equal(z[..., :3], z0[..., :3])
    assert torch.isfinite(z).all() and (z[..., 3:] - z0[..., 3:]).abs().min() > 0
    other = drawn(model, inputs, sampler=sampler, known=KnownRegion(z0 + 1, keep, resample))
    assert (other[..., 3:] - z[..., 3:]).abs().max() > 1e-4  # what is known shapes what is drawn


@torch.no_grad()
@pytest.mark.parametrize("resample", [1, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_step_with_a_known_region_is_called_back_once_and_begins_with_what_was_put_before_it(
    model, inputs, sampler, resample
):
    z0, keep, steps, begun = torch.zeros(2, 4, 6, 6), torch.zeros(1, 1, 6, 6), [], []
    keep[..., :3] = 1
    settings = SampleSettings(steps=4, sampler=sampler)
    path = guidance_path(model, 1.0, inputs, None, 2, (6, 6), None)
    noise = KeyedNoise(0, [0, 1], (4, 6, 6), torch.device("cpu"))

    def before(i, z):
        begun.append(i)
        return z + 1

    def run(**more):
        known = KnownRegion(z0, keep, resample)
        return sample_latents(model.predict, SCHEDULE, settings, path, noise, ids=[0, 1], known=known, **more)

    z = run(callback=lambda i, z, x0: steps.append((i, z.shape, x0.shape)), before_step=before)
    assert steps == [(i, z.shape, z.shape) for i in range(4)]
    assert begun == [i for i in range(4) for _ in range(resample)]
    assert (z - run())[..., 3:].abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("resample", [1, 2])
def test_a_sample_with_a_known_region_depends_on_its_number_alone(model, inputs, resample):
    z0, keep = torch.zeros(2, 4, 6, 6), torch.zeros(1, 1, 6, 6)
    keep[..., 2:, :] = 1
    both = drawn(model, inputs, known=KnownRegion(z0, keep, resample), ids=[3, 7])
    alone = drawn(
        model, {name: tensor[1:] for name, tensor in inputs.items()}, ids=[7], known=KnownRegion(z0[1:], keep, resample)
    )
    assert relative(both[1:], alone) < 1e-4


# --- guidance by kind ---------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """Batch sizes of the network's calls."""
    sizes, predict = [], DiffusionModel.predict
    monkeypatch.setattr(
        DiffusionModel, "predict", lambda self, z, t, given: sizes.append(len(z)) or predict(self, z, t, given)
    )
    return sizes


@torch.no_grad()
@pytest.mark.parametrize(
    ("scale", "halves"),
    [
        (1.0, 1),
        (0.0, 1),
        (2.0, 2),
        ({"class": 3.0, "map": 1.5}, 3),
        ({"class": 2.0, "map": 2.0}, 2),
        ({"class": 3.0}, 2),
        ({"map": 1.0, "class": 3.0}, 2),
        ({"class": 1.0}, 1),
        ({"map": 2.0, "class": 0.0}, 2),
    ],
)
def test_no_more_is_computed_than_the_scales_ask_for(model, inputs, asked, scale, halves):
    drawn(model, inputs, scale)
    assert asked == [2 * halves] * 4


@torch.no_grad()
def test_kinds_are_switched_on_one_after_the_other_each_with_its_scale(model, inputs):
    """Planes first: out = out(none) + s_map (out(map) − out(none)) + s_class (out(map, class) − out(map))."""
    z, t = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1)), torch.full((2,), 500.0)
    null = model.conditions.null(2, inputs)
    only_map = inputs | {"class.label": null["class.label"]}
    outs = [model.predict(z, t, model.embed(told)) for told in (null, only_map, inputs)]
    expected = outs[0] + 1.5 * (outs[1] - outs[0]) + 3.0 * (outs[2] - outs[1])
    path = GuidancePath((model.embed(null), model.embed(only_map), model.embed(inputs)), (1.5, 3.0))
    _, eps = denoiser(model.predict, SCHEDULE, path)(z, 500.0, 0.6, 0.8)
    assert torch.allclose(eps, expected, atol=1e-5)
    assert guidance_steps(("class", "map"), {"class": 3.0, "map": 1.5}) == [(("map",), 1.5), (("class",), 3.0)]


@torch.no_grad()
def test_equal_scales_are_one_scale_and_a_kind_at_1_is_only_given(model, inputs):
    assert torch.allclose(drawn(model, inputs, 2.5), drawn(model, inputs, {"class": 2.5, "map": 2.5}), atol=1e-4)
    one = drawn(model, inputs, {"class": 2.5})
    assert torch.allclose(one, drawn(model, inputs, {"class": 2.5, "map": 1}), atol=1e-4)
    assert (one - drawn(model, inputs, 2.5)).abs().max() > 1e-3


@torch.no_grad()
def test_scale_0_of_a_kind_forgets_it(model, inputs):
    other = inputs | {"class.label": torch.tensor([1, 1])}
    forgotten = [drawn(model, told, {"class": 0.0}) for told in (inputs, other)]
    assert torch.equal(*forgotten) and not torch.equal(drawn(model, inputs), drawn(model, other))


@pytest.mark.parametrize("scale", [{"text": 2.0}, {"lowres": 2.0}, {"clas": 1.0}])
def test_a_kind_that_cannot_be_guided_is_named_with_those_that_can(scale):
    with pytest.raises(UsageError, match=f"--guidance {next(iter(scale))}=.*takes map, class"):
        guidance_steps(("class", "map", "lowres"), scale)


@torch.no_grad()
def test_a_negative_takes_the_place_of_one_null(model, inputs):
    """The scale of two leads away from the negative class; the map's null stays."""
    negative = {"class.label": torch.tensor([1, 1])}
    assert not torch.equal(drawn(model, inputs, 2.0, negative=negative), drawn(model, inputs, 2.0))


@torch.no_grad()
def test_tiles_of_the_network_see_their_part_of_the_planes(model):
    """A network in tiles on a large latent is near the whole one, planes included, and the same where one tile is."""
    maps = torch.zeros(1, 48, 48, dtype=torch.long)
    maps[:, :, 24:] = 2
    inputs = model.conditions.prepare({"class": [1], "map": list(maps.numpy())})
    whole, tiled, one = (drawn(model, inputs, shape=(4, 24, 24), ids=[0], tile=tile) for tile in (0, 16, 24))
    assert torch.equal(whole, one) and torch.isfinite(tiled).all()
    apart = (tiled - whole).square().mean().sqrt() / whole.std()
    assert 0 < apart < 0.35
