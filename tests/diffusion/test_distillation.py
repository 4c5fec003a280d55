"""Segments of a distilled model's calls, its teacher's walk through them, and its loss, against what sampling does."""

from types import SimpleNamespace

import pytest
import torch

from ldmcli.core.errors import UsageError
from ldmcli.core.settings import FEW_CALLS, DiffusionSettings, DistillSettings, SampleSettings
from ldmcli.diffusion.distillation import Segments, distillation_loss
from ldmcli.diffusion.guidance import GuidancePath, denoiser
from ldmcli.diffusion.sample import check_sampling
from ldmcli.diffusion.samplers import SAMPLERS, ddim, heun
from ldmcli.diffusion.schedule import make_schedule, prediction_target, sampling_levels, to_x0_eps
from ldmcli.networks.conditioning import Conditioning

PREDICTIONS = ("eps", "v", "x0", "flow")
CALLS = (1, 2, 3, 4)
SHAPE = (2, 3, 3)


def process(prediction: str):
    settings = DiffusionSettings(prediction=prediction, timesteps=60)
    return settings, make_schedule(settings)


def draw(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("calls", CALLS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_segments_begin_where_the_sampler_calls_and_end_where_the_next_begins(prediction, calls):
    _, schedule = process(prediction)
    segments = Segments(schedule, calls, 5)
    levels = sampling_levels(schedule, calls, FEW_CALLS["spacing"])
    assert segments.t[:, 0].tolist() == torch.tensor(levels.t).tolist()
    for table, wanted in ((segments.alphas, levels.alphas), (segments.sigmas, levels.sigmas)):
        assert table[:, 0].tolist() == torch.tensor(wanted[:-1]).tolist()
        assert table[:, -1].tolist() == torch.tensor(wanted[1:]).tolist()
    assert (segments.alphas[-1, -1], segments.sigmas[-1, -1]) == (1, 0)
    shares = (torch.arange(4 * calls, dtype=torch.float64) + 0.5) / (4 * calls)
    assert torch.equal(segments.starts(shares), segments.t[:, 0].repeat_interleave(4))
    assert torch.equal(segments.of(segments.t[:, 0]).t[-1], segments.t[:, -1])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_walk_begins_with_noise_alone_and_else_with_data_under_noise(prediction):
    _, schedule = process(prediction)
    segments = Segments(schedule, 3, 2)
    z_0, noise = draw(3), draw(3, 1)
    levels = segments.of(segments.t[:, 0])
    z = segments.begin(z_0, noise, levels)
    assert torch.equal(z[0], noise[0])
    assert torch.equal(z[1:], (levels.alphas[0] * z_0 + levels.sigmas[0] * noise)[1:])


@pytest.mark.parametrize("sampler", ["heun", "euler"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_samples_of_several_segments_walk_together_as_each_alone(prediction, sampler):
    """With guidance in a part of the noise range; numbers of a segment are those of plain levels."""
    _, schedule = process(prediction)
    segments, rows = Segments(schedule, 3, 4), [2, 0, 1, 0]
    conditionings = [Conditioning(vector=torch.full((4, 1), float(k))) for k in range(2)]

    def predict(z, t, conditioning):
        return torch.sin(z + t.reshape(-1, 1, 1, 1) / 30) * (1 + conditioning.vector.reshape(-1, 1, 1, 1))

    def denoise_of(n):
        path = GuidancePath(tuple(Conditioning(vector=one.vector[:n]) for one in conditionings), (2.5,))
        return denoiser(predict, schedule, path, (0.2, 0.7))

    z, sample = draw(4), SAMPLERS[sampler].function
    together = sample(denoise_of(4), z, segments.of(segments.t[rows, 0]))
    for k, row in enumerate(rows):
        alone = SimpleNamespace(
            t=segments.t[row].tolist(), alphas=segments.alphas[row].tolist(), sigmas=segments.sigmas[row].tolist()
        )
        torch.testing.assert_close(together[k], sample(denoise_of(1), z[k : k + 1], alone)[0], atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("calls", CALLS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_zero_where_sampling_ends_where_the_teacher_does(prediction, calls):
    """A student that gives, at each beginning, what leads DDIM to the teacher's end; the loss of another one is the
    mean square of how far it ends away, in lengths of the segment."""
    settings, schedule = process(prediction)
    segments = Segments(schedule, calls, 6)
    t = segments.t[:, 0]
    levels, z = segments.of(t), draw(calls)

    def teacher(z, t, alpha, sigma):
        return to_x0_eps(prediction, torch.tanh(z), z, alpha, sigma)

    z_end = heun(teacher, z, levels)
    (alpha, *_, alpha_end), (sigma, *_, sigma_end) = levels.alphas, levels.sigmas
    x0 = (z_end - sigma_end / sigma * z) / (alpha_end - alpha * sigma_end / sigma)
    output = prediction_target(prediction, x0, (z - alpha * x0) / sigma, alpha, sigma)
    loss = distillation_loss(lambda *_: output, schedule, settings, z, z_end, levels, {})
    assert loss.shape == (calls,) and float(loss.max()) < 1e-6
    for k in range(calls):
        alone = SimpleNamespace(
            t=[float(t[k])],
            alphas=[float(alpha[k]), float(alpha_end[k])],
            sigmas=[float(sigma[k]), float(sigma_end[k])],
        )
        found = ddim(lambda z, t, a, s, k=k: to_x0_eps(prediction, output[k : k + 1], z, a, s), z[k : k + 1], alone)
        torch.testing.assert_close(found[0], z_end[k], atol=1e-3, rtol=1e-3)
    length = ((alpha_end - alpha) ** 2 + (sigma_end - sigma) ** 2).flatten()
    away = distillation_loss(lambda *_: output, schedule, settings, z, z_end + 0.1, levels, {})
    torch.testing.assert_close(away, 0.01 / length, rtol=1e-3, atol=1e-5)


def test_a_distilled_model_takes_nothing_but_what_it_learned():
    _, schedule = process("flow")
    few = DistillSettings(calls=4, guidance=1.5, teacher="x")
    own = {**FEW_CALLS, "steps": 4, "guidance": 1.0}
    check_sampling(SampleSettings(**own), schedule, few)
    for name, value in {"steps": 5, "sampler": "heun", "spacing": "linspace", "eta": 0.5, "guidance": 2.0}.items():
        with pytest.raises(UsageError, match=f"--{name}.*distilled to 4 calls.*leave it out"):
            check_sampling(SampleSettings(**{**own, name: value}), schedule, few)
        check_sampling(SampleSettings(**{**own, name: value}), schedule, DistillSettings())
