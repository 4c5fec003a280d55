"""Samplers against Gaussian data, whose denoiser is known, and against recorded trajectories.

A denoiser of a Gaussian is affine, so a sample is an affine function of the start and of every step's noise. `z` is
that function's coefficients, (constant, start, noise of step 0, 1, …): mean and variance come out exactly.
"""

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import shared

from ldmcli.core.settings import DiffusionSettings
from ldmcli.diffusion import samplers, schedule
from ldmcli.diffusion.samplers import SAMPLERS
from ldmcli.diffusion.schedule import NoiseLevels, make_schedule

MEAN, STD = 0.7, 0.6
VP = make_schedule(DiffusionSettings(prediction="v"))
FLOW = make_schedule(DiffusionSettings(prediction="flow"))
SCHEDULES = {"vp": VP, "flow": FLOW}
# The samplers and the ends of eta's range for those that read it.
VARIANTS = [(name, eta) for name in SAMPLERS for eta in ((0.0, 1.0) if name == "ddim" else (0.0,))]


class Coefficients:
    """Start, noise and denoiser of N(MEAN, STD²) in coefficients; counts its evaluations."""

    def __init__(self, steps):
        self.rows = np.eye(steps + 2)
        self.start = self.rows[1]
        self.calls: list[float] = []

    def noise(self, i):
        return self.rows[i + 2]

    def denoise(self, z, t, alpha, sigma):
        self.calls.append(t)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        x0 = gain * z + (1 - gain * alpha) * MEAN * self.rows[0]
        return x0, (z - alpha * x0) / sigma

    def sample(self, name, levels, **options):
        return SAMPLERS[name].function(self.denoise, self.start, levels, noise=self.noise, **options)


def moments(name, levels, **options):
    """Mean and standard deviation of what the sampler makes of standard normal noise."""
    z = Coefficients(len(levels.t)).sample(name, levels, **options)
    return z[0], math.sqrt((z[1:] ** 2).sum())


def smooth_levels(process, steps):
    """N steps from strong noise to weak, where a smooth function of the step gives the level."""
    u = np.linspace(0.95, 0.1, steps + 1)
    alphas, sigmas = (np.cos(u * np.pi / 2), np.sin(u * np.pi / 2)) if process == "vp" else (1 - u, u)
    return NoiseLevels(tuple(u[:-1].tolist()), tuple(alphas.tolist()), tuple(sigmas.tolist()))


def exact_flow(levels):
    """Coefficients (constant, start) of the end of the probability flow: z keeps its place in the Gaussian."""
    first, last = (math.hypot(levels.alphas[i] * STD, levels.sigmas[i]) for i in (0, -1))
    scale = last / first
    return np.array([MEAN * (levels.alphas[-1] - scale * levels.alphas[0]), scale])


def test_the_module_imports_neither_torch_nor_numpy():
    tree = ast.parse(Path(samplers.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"collections.abc", "dataclasses", "math", "typing"}


@pytest.mark.parametrize("name", ["ddim", "plms"])
def test_trajectory_is_the_recorded_one_of_the_original(name):
    case = json.loads(shared("golden", "sampler_trajectories.json").read_text())
    recorded = case["trajectories"][name]
    process = make_schedule(
        DiffusionSettings(prediction="eps", beta_start=case["linear_start"], beta_end=case["linear_end"])
    )
    levels = schedule.sampling_levels(process, case["steps"], "original")
    assert list(levels.t) == recorded["timesteps_in_order"]

    def denoise(z, t, alpha, sigma):
        eps = 0.3 * z + 0.2 * t / 1000
        return (z - sigma * eps) / alpha, eps

    z, steps = np.array(case["x_T"]), []
    end = SAMPLERS[name].function(denoise, z, levels, callback=lambda i, z, x0: steps.append((i, z, x0)))
    assert [i for i, _, _ in steps] == list(range(10))
    np.testing.assert_array_equal(end, steps[-1][1])
    np.testing.assert_allclose([z for _, z, _ in steps], recorded["x"][1:], rtol=5e-6)
    np.testing.assert_allclose([x0 for _, _, x0 in steps], recorded["pred_x0"][1:], rtol=5e-6)


@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("name, eta", VARIANTS)
def test_sampler_recovers_mean_and_deviation_of_a_gaussian(name, eta, process):
    mean, std = moments(name, schedule.sampling_levels(SCHEDULES[process], 250), eta=eta)
    assert mean == pytest.approx(MEAN, abs=0.02)
    assert std == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("name, eta", VARIANTS)
def test_on_the_originals_levels_a_gaussian_ends_with_the_noise_of_timestep_0(name, eta):
    levels = schedule.sampling_levels(VP, 250, "original")
    mean, std = moments(name, levels, eta=eta)
    assert mean == pytest.approx(MEAN * VP.alphas[0], abs=0.02)
    assert std == pytest.approx(math.hypot(VP.alphas[0] * STD, VP.sigmas[0]), abs=0.02)


FEW = [
    (name, eta, steps, process, spacing)
    for name, eta in VARIANTS
    for steps in (1, 2, 4, 5, 10, 20)
    for process, spacing in [(p, s) for p in SCHEDULES for s in ("linspace", "uniform")] + [("vp", "original")]
    # The original's single step takes noise for timestep 1, nearly clean; its PLMS averages two distant timesteps and
    # divides that by a tiny α.
    if not (steps == 1 and spacing == "original" or steps < 4 and name == "plms" and process == "vp")
]


@pytest.mark.parametrize("name, eta, steps, process, spacing", FEW)
def test_few_steps_stay_near_the_data(name, eta, steps, process, spacing):
    mean, std = moments(name, schedule.sampling_levels(SCHEDULES[process], steps, spacing), eta=eta)
    assert abs(mean - MEAN) < 0.05 + 0.5 / steps
    assert std < STD + 0.1


@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_error_falls_with_the_steps_at_the_stated_order(name, process):
    order = SAMPLERS[name].order
    if name == "ddpm":  # it has no path to follow: its variance converges
        error = [
            abs(moments(name, levels)[1] - math.hypot(levels.alphas[-1] * STD, levels.sigmas[-1]))
            for levels in (smooth_levels(process, 100), smooth_levels(process, 200))
        ]
    else:
        error = []
        # On straight paths the errors of plms at 40 and 80 steps have opposite signs.
        for steps in (10, 20) if (name, process) == ("plms", "flow") else (40, 80):
            levels = smooth_levels(process, steps)
            z = Coefficients(steps).sample(name, levels)
            error.append(np.abs(z[:2] - exact_flow(levels)).max())
    assert error[1] > 1e-9  # something is left to measure
    assert 2 ** (order - 0.25) < error[0] / error[1]
    if name != "plms":  # its multistep formulas are better than the order of its start
        assert error[0] / error[1] < 2 ** (order + 0.5)


@pytest.mark.parametrize("process, spacing", [("vp", "linspace"), ("flow", "linspace"), ("flow", "uniform")])
@pytest.mark.parametrize("steps", [6, 10, 20, 50])
@pytest.mark.parametrize("name", ["heun", "plms", "dpm++"])
def test_second_order_follows_the_flow_better_than_ddim(name, steps, process, spacing):
    levels = schedule.sampling_levels(SCHEDULES[process], steps, spacing)
    exact = exact_flow(levels)
    error = {n: np.abs(Coefficients(steps).sample(n, levels)[:2] - exact).max() for n in (name, "ddim")}
    assert error[name] < 0.7 * error["ddim"]


@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize("name, eta", VARIANTS)
def test_sampler_evaluates_as_often_as_it_states_and_at_the_levels(name, eta, steps, process):
    levels = schedule.sampling_levels(SCHEDULES[process], steps)
    case, reported = Coefficients(steps), []
    end = case.sample(name, levels, eta=eta, callback=lambda i, z, x0: reported.append((i, z)))
    assert len(case.calls) == SAMPLERS[name].evaluations(steps)
    assert set(case.calls) == set(levels.t)
    assert [i for i, _ in reported] == list(range(steps))
    assert reported[-1][1] is end


def test_ddim_evaluates_once_a_step_for_every_step_count_from_1_to_1000():
    class Counter:
        n = 0

        def denoise(self, z, t, alpha, sigma):
            self.n += 1
            return z, z

    for steps in range(1, 1001):
        counter = Counter()
        samplers.ddim(counter.denoise, 1.0, schedule.sampling_levels(VP, steps))
        assert counter.n == steps


@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("name, eta", [(n, e) for n, e in VARIANTS if n != "ddpm"])
@pytest.mark.parametrize("end", ["clean", "noisy"])
def test_a_last_step_to_clean_returns_the_prediction(name, eta, end, process):
    levels = schedule.sampling_levels(SCHEDULES[process], 20, "linspace" if end == "clean" else "original")
    last = []
    z = Coefficients(20).sample(name, levels, eta=eta, callback=lambda i, z, x0: last.append(x0))
    same = np.allclose(z, last[-1], rtol=1e-12, atol=1e-14)
    assert same == (end == "clean")


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_deterministic_sampler_draws_no_noise_and_a_stochastic_one_refuses_to_go_without(name):
    levels = schedule.sampling_levels(VP, 5)
    case = Coefficients(5)
    if not SAMPLERS[name].stochastic:
        end = SAMPLERS[name].function(case.denoise, case.start, levels, eta=1.0)
        assert (end[2:] == 0).all()
    else:
        with pytest.raises(ValueError, match="noise"):
            SAMPLERS[name].function(case.denoise, case.start, levels, eta=1.0)


def test_ddim_without_eta_repeats_itself_and_with_eta_follows_its_noise():
    levels = schedule.sampling_levels(VP, 10)
    assert (Coefficients(10).sample("ddim", levels)[2:] == 0).all()
    noisy = Coefficients(10).sample("ddim", levels, eta=0.5)
    assert (noisy[2:-1] != 0).all() and noisy[-1] == 0  # the last step ends clean


@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("steps, spacing", [(1000, "linspace"), (50, "linspace"), (50, "original")])
def test_ddim_with_eta_1_is_ancestral_sampling(steps, spacing, process):
    levels = schedule.sampling_levels(SCHEDULES[process], steps, spacing)
    ddim = Coefficients(steps).sample("ddim", levels, eta=1.0)
    ddpm = Coefficients(steps).sample("ddpm", levels)
    np.testing.assert_allclose(ddim, ddpm, rtol=1e-9, atol=1e-12)


def test_ancestral_step_has_the_originals_coefficients_at_every_timestep():
    levels, table = schedule.sampling_levels(VP, 1000), schedule.ddpm_coefficients(VP)
    x0, start, noise = np.eye(3)
    seen: dict[int, np.ndarray] = {}
    for i in (0, 1, 499, 998, 999):
        one = NoiseLevels(levels.t[i : i + 1], levels.alphas[i : i + 2], levels.sigmas[i : i + 2])
        seen[i] = samplers.ddpm(lambda z, t, a, s: (x0, None), start, one, noise=lambda i: noise)
        t = int(levels.t[i])
        variance = table["posterior_variance"][t] if t else 0.0
        expected = [table["posterior_mean_coef1"][t], table["posterior_mean_coef2"][t], math.sqrt(variance)]
        np.testing.assert_allclose(seen[i], expected, rtol=1e-8, atol=1e-12)
    assert seen[999].tolist() == [1, 0, 0]


@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("spacing", ["linspace", "original"])
def test_first_order_dpm_solver_and_euler_are_ddim(spacing, process):
    levels = schedule.sampling_levels(SCHEDULES[process], 20, spacing)
    ddim = Coefficients(20).sample("ddim", levels)
    np.testing.assert_allclose(Coefficients(20).sample("dpm++", levels, order=1), ddim, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(Coefficients(20).sample("euler", levels), ddim, rtol=1e-12, atol=1e-14)


def test_dpm_solver_ends_first_order_below_15_steps_only():
    def two_last_steps(steps):
        levels, ends = smooth_levels("vp", steps), []
        case = Coefficients(steps)
        case.sample("dpm++", levels, callback=lambda i, z, x0: ends.append((z, x0)))
        (before, _), (after, x0) = ends[-2:]
        alpha, sigma, alpha_next, sigma_next = *samplers._level(levels, -2), *samplers._level(levels, -1)
        first_order = alpha_next * x0 + sigma_next / sigma * (before - alpha * x0)
        return np.abs(after - first_order).max()

    assert two_last_steps(14) < 1e-14
    assert two_last_steps(15) > 1e-6


def test_repeated_timesteps_of_the_quadratic_subset_break_no_sampler():
    levels = schedule.sampling_levels(VP, 50, "original_quad")
    assert levels.t[-1] == levels.t[-2]
    for name, eta in VARIANTS:
        z = Coefficients(50).sample(name, levels, eta=eta)
        assert np.isfinite(z).all()
        assert math.sqrt((z[1:] ** 2).sum()) == pytest.approx(STD, abs=0.2)


@pytest.mark.parametrize("name, eta", VARIANTS)
def test_eps_v_and_x0_networks_give_the_same_sample(name, eta):
    """A network of each parametrisation, made from one denoiser, through the conversions and back."""
    ends = []
    for prediction in ("eps", "v", "x0"):
        process = make_schedule(DiffusionSettings(prediction=prediction))
        ends.append(_through_a_network(name, eta, process, prediction))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name, eta", VARIANTS)
def test_a_flow_network_gives_the_sample_of_an_eps_network_on_the_same_levels(name, eta):
    torch.testing.assert_close(
        _through_a_network(name, eta, FLOW, "flow"), _through_a_network(name, eta, FLOW, "eps"), rtol=1e-9, atol=1e-9
    )


def _through_a_network(name, eta, process, prediction):
    def network(z, alpha, sigma):
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        x0 = MEAN + gain * (z - alpha * MEAN)
        return schedule.prediction_target(prediction, x0, (z - alpha * x0) / sigma, alpha, sigma)

    def denoise(z, t, alpha, sigma):
        return schedule.to_x0_eps(prediction, network(z, alpha, sigma), z, alpha, sigma)

    z = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(2, 3, 4)
    return SAMPLERS[name].function(
        denoise, z, schedule.sampling_levels(process, 12), noise=lambda i: torch.cos(z * (i + 1)), eta=eta
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_float32_tensors_keep_type_and_shape_from_a_schedule_that_ends_in_pure_noise(name):
    process = make_schedule(DiffusionSettings(prediction="x0", schedule="cosine"))  # α of the last timestep: 5e-5
    z = torch.linspace(-1, 1, 24).reshape(2, 3, 2, 2)

    def denoise(z, t, alpha, sigma):
        return torch.tanh(z), (z - alpha * torch.tanh(z)) / sigma

    end = SAMPLERS[name].function(
        denoise, z, schedule.sampling_levels(process, 10), noise=lambda i: torch.zeros_like(z)
    )
    assert end.dtype == torch.float32 and end.shape == z.shape
    assert torch.isfinite(end).all()


def test_image_to_image_at_full_strength_is_the_whole_way_and_at_less_its_end():
    whole = schedule.sampling_levels(VP, 20)
    assert schedule.sampling_levels(VP, 20, strength=1.0) == whole
    part = schedule.sampling_levels(VP, 20, strength=0.3)
    assert (part.t, part.alphas, part.sigmas) == (whole.t[-6:], whole.alphas[-7:], whole.sigmas[-7:])
    assert len(schedule.sampling_levels(VP, 20, strength=0.001).t) == 1


def test_an_entry_states_what_the_sampler_does():
    assert list(SAMPLERS) == ["ddim", "ddpm", "plms", "euler", "heun", "dpm++"]
    for entry in SAMPLERS.values():
        assert entry.description and "\n" not in entry.description and len(entry.description) < 72
