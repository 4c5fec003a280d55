"""Noise schedules, parametrisations, timestep sampling and spacings."""

import json
import math

import numpy as np
import pytest
import torch
from golden_cases import shared
from scipy import stats

from ldmcli.core.errors import UsageError
from ldmcli.core.settings import DiffusionSettings
from ldmcli.diffusion import schedule
from ldmcli.diffusion.samplers import ddim_sigma
from ldmcli.diffusion.schedule import alpha_sigma, make_schedule, sampling_levels, sampling_timesteps

NAMED = ("uncond_0195", "cond_0205", "churches_sr_0155", "text_1p4B", "rdm")
PREDICTIONS = ("eps", "v", "x0", "flow")


def process(**settings):
    return make_schedule(DiffusionSettings(**{"prediction": "eps", **settings}))


VP, FLOW = process(), process(prediction="flow")


@pytest.fixture(scope="module")
def golden():
    return json.loads(shared("golden", "schedules.json").read_text())


def named(golden, name):
    case = golden["linear"][name]
    return case, process(beta_start=case["linear_start"], beta_end=case["linear_end"])


@pytest.mark.parametrize("name", NAMED)
def test_linear_schedule_matches_the_recorded_one(name, golden):
    case, s = named(golden, name)
    beta = schedule.betas("linear", 1000, case["linear_start"], case["linear_end"])
    np.testing.assert_allclose(beta[:5], case["betas_head"], rtol=1e-12)
    np.testing.assert_allclose(beta[-5:], case["betas_tail"], rtol=1e-12)
    np.testing.assert_allclose(s.alphas_cumprod[:5], case["alphas_cumprod_head"], rtol=1e-11)
    np.testing.assert_allclose(s.alphas_cumprod[-5:], case["alphas_cumprod_tail"], rtol=1e-11)
    for t, value in case["alphas_cumprod_at"].items():
        assert s.alphas_cumprod[int(t)] == pytest.approx(value, rel=1e-11)


@pytest.mark.parametrize("name", ["cosine", "sqrt_linear", "sqrt"])
def test_other_schedules_match_the_recorded_ones(name, golden):
    case = golden["other"][name]
    beta = schedule.betas(name, 1000, case["linear_start"], case["linear_end"])
    np.testing.assert_allclose(beta[:5], case["betas_head"], rtol=1e-10)
    np.testing.assert_allclose(beta[-5:], case["betas_tail"], rtol=1e-10)
    s = process(schedule=name, beta_start=case["linear_start"], beta_end=case["linear_end"])
    for t, value in case["alphas_cumprod_at"].items():
        assert s.alphas_cumprod[int(t)] == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("name", NAMED)
def test_original_subsets_levels_and_noise_match_the_recorded_ones(name, golden):
    case, s = named(golden, name)
    for steps, row in case["ddim"].items():
        if "error" in row:
            with pytest.raises(UsageError, match=f"{steps} steps.* timestep 1000 "):
                sampling_timesteps(s, int(steps), "original")
            continue
        levels = sampling_levels(s, int(steps), "original")
        rising = [list(reversed(values)) for values in (levels.t, levels.alphas[:-1], levels.alphas[1:])]
        assert len(levels.t) == row["n"]
        head, tail = len(row["timesteps_head"]), len(row["timesteps_tail"])
        assert rising[0][:head] == row["timesteps_head"] and rising[0][-tail:] == row["timesteps_tail"]
        for values, key in ((rising[1], "alphas"), (rising[2], "alphas_prev")):
            for part, expected in ((slice(0, 4), f"{key}_head"), (slice(-4, None), f"{key}_tail")):
                np.testing.assert_allclose(np.array(values[part]) ** 2, row[expected], rtol=1e-5)
        for eta, (first, last) in row["sigmas_head_tail_by_eta"].items():
            sigmas = [
                ddim_sigma(levels.alphas[i], levels.sigmas[i], levels.alphas[i + 1], levels.sigmas[i + 1], float(eta))
                for i in reversed(range(len(levels.t)))
            ]
            np.testing.assert_allclose(sigmas[:4], first, rtol=5e-5)
            np.testing.assert_allclose(sigmas[-4:], last, rtol=5e-5)


def test_original_subset_fails_for_exactly_the_step_counts_that_overrun_the_originals_table(golden):
    refused = []
    for steps in range(1, 1001):
        try:
            sampling_timesteps(VP, steps, "original")
        except UsageError:
            refused.append(steps)
    assert refused == golden["uniform_step_counts_that_index_1000"]


def test_original_subset_has_the_recorded_number_of_steps(golden):
    refused = set(golden["uniform_step_counts_that_index_1000"])
    counts = {s: n for s, n in golden["uniform_number_of_timesteps_for_S"].items() if int(s) not in refused}
    assert len(counts) > 5
    for steps, n in counts.items():
        assert len(sampling_timesteps(VP, int(steps), "original")) == n


def test_quadratic_subset_matches_the_recorded_one(golden):
    for steps, expected in golden["quad_timesteps"].items():
        assert sampling_timesteps(VP, int(steps), "original_quad") == expected[::-1]


def test_buffers_match_the_recorded_ones(golden):
    case = golden["ddpm_buffers"]
    table = schedule.ddpm_coefficients(process(beta_start=case["linear_start"], beta_end=case["linear_end"]))
    names = {"lvlb_weights": "lvlb_weights_eps", "lvlb_weights_x0_parameterization": "lvlb_weights_x0"}
    for name, entries in case["values"].items():
        for t, value in entries.items():
            assert table[names.get(name, name)][int(t)] == pytest.approx(value, rel=1e-5), (name, t)


def test_buffers_carry_the_twelve_names_of_a_checkpoint_and_finite_values():
    table = schedule.ddpm_coefficients(VP)
    assert len(set(table) - {"lvlb_weights_eps", "lvlb_weights_x0"}) == 12
    assert all(values.shape == (1000,) and np.isfinite(values).all() for values in table.values())
    np.testing.assert_allclose(table["betas"], schedule.betas("linear", 1000, 0.0015, 0.0195), rtol=1e-10)
    np.testing.assert_allclose(schedule.ddpm_coefficients(VP, v_posterior=1.0)["posterior_variance"], table["betas"])
    with pytest.raises(ValueError, match="flow"):
        schedule.ddpm_coefficients(FLOW)


@pytest.mark.parametrize("name", list(schedule.BETAS))
@pytest.mark.parametrize("total", [1, 10, 1000])
def test_vp_schedule_keeps_the_variance_and_only_gets_noisier(name, total):
    s = process(schedule=name, timesteps=total)
    assert s.num_timesteps == total and s.alphas.dtype == np.float64
    np.testing.assert_allclose(s.alphas**2 + s.sigmas**2, 1, rtol=1e-14)
    assert (np.diff(s.alphas) < 0).all() and (s.alphas > 0).all() and (s.sigmas > 0).all()


def test_flow_levels_are_the_middles_of_equal_slices_of_time():
    s = process(prediction="flow", timesteps=4)
    assert s.sigmas.tolist() == [0.125, 0.375, 0.625, 0.875]
    np.testing.assert_allclose(s.alphas + s.sigmas, 1, rtol=1e-15)
    snr = (s.alphas / s.sigmas) ** 2
    np.testing.assert_allclose(s.alphas_cumprod / (1 - s.alphas_cumprod), snr, rtol=1e-12)


@pytest.mark.parametrize("settings", [{"beta_start": 0.0}, {"beta_end": 1.0}, {"beta_start": 0.02, "beta_end": 0.01}])
def test_impossible_betas_are_refused(settings):
    with pytest.raises(UsageError, match="beta_start"):
        process(**settings)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UsageError, match="'quadratic'"):
        schedule.betas("quadratic", 10, 0.1, 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("s", [VP, FLOW], ids=["vp", "flow"])
def test_levels_at_whole_timesteps_are_those_of_the_table(s, dtype):
    t = torch.tensor([[0, 1], [500, 999]], dtype=dtype)
    alpha, sigma = alpha_sigma(s, t)
    assert alpha.dtype == sigma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(alpha, s.alphas[t.long()], rtol=rtol)
    np.testing.assert_allclose(sigma, s.sigmas[t.long()], rtol=rtol)


def test_flow_levels_between_timesteps_follow_the_line():
    alpha, sigma = alpha_sigma(FLOW, torch.tensor([0.25, 998.75], dtype=torch.float64))
    np.testing.assert_allclose(sigma, [0.75e-3, 0.99925], rtol=1e-12)
    np.testing.assert_allclose(alpha, [0.99925, 0.75e-3], rtol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [0, 17, 500, 999])
def test_the_target_leads_back_to_data_and_noise(prediction, t):
    s = process(prediction=prediction)
    x0, eps = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha, sigma = alpha_sigma(s, torch.full((3,), t, dtype=torch.float64))
    z_t = alpha[0] * x0 + sigma[0] * eps
    output = schedule.prediction_target(prediction, x0, eps, alpha, sigma)
    x0_back, eps_back = schedule.to_x0_eps(prediction, output, z_t, alpha, sigma)
    torch.testing.assert_close(x0_back, x0, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(eps_back, eps, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_any_output_is_split_into_parts_that_add_up_to_z(prediction):
    s = process(prediction=prediction)
    z_t, output = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    alpha, sigma = alpha_sigma(s, torch.tensor([0.0, 300.0, 700.0, 999.0], dtype=torch.float64))
    x0, eps = schedule.to_x0_eps(prediction, output, z_t, alpha, sigma)
    torch.testing.assert_close(alpha[:, None] * x0 + sigma[:, None] * eps, z_t, rtol=1e-9, atol=1e-10)


# v is defined for α² + σ² = 1, flow for α + σ = 1: these two never meet.
@pytest.mark.parametrize("source, to", [(a, b) for a in PREDICTIONS for b in PREDICTIONS if {a, b} != {"v", "flow"}])
def test_outputs_convert_into_each_other(source, to):
    s = FLOW if "flow" in (source, to) else VP
    x0, eps = torch.randn(2, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    alpha, sigma = alpha_sigma(s, torch.tensor([100.0, 800.0], dtype=torch.float64))
    z_t = alpha[:, None] * x0 + sigma[:, None] * eps
    given, wanted = (schedule.prediction_target(name, x0, eps, alpha, sigma) for name in (source, to))
    converted = schedule.prediction_target(to, *schedule.to_x0_eps(source, given, z_t, alpha, sigma), alpha, sigma)
    torch.testing.assert_close(converted, wanted, rtol=1e-9, atol=1e-10)


def test_targets_are_those_of_the_papers():
    x0, eps = torch.tensor([[2.0]]), torch.tensor([[5.0]])
    alpha, sigma = torch.tensor([0.6]), torch.tensor([0.8])
    values = [schedule.prediction_target(name, x0, eps, alpha, sigma).item() for name in PREDICTIONS]
    assert values == pytest.approx([5.0, 0.6 * 5 - 0.8 * 2, 2.0, 3.0])


def test_an_unknown_parametrisation_is_refused():
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="'score'"):
        schedule.prediction_target("score", one, one, 1.0, 1.0)
    with pytest.raises(ValueError, match="'score'"):
        schedule.to_x0_eps("score", one, one, 1.0, 1.0)


def test_min_snr_weights_the_error_of_x0_alike_in_every_parametrisation():
    alpha, sigma = (x.double() for x in alpha_sigma(VP, torch.tensor([0.0, 200.0, 600.0, 999.0])))
    snr = alpha**2 / sigma**2
    on_x0 = schedule.loss_weight("min_snr", "x0", alpha, sigma, 5.0)
    torch.testing.assert_close(on_x0, torch.minimum(snr, torch.tensor(5.0, dtype=snr.dtype)))
    assert on_x0[0] == 5 and on_x0[-1] < 1e-3
    # An error d of x0 is α/σ d of ε, and d/σ of v.
    torch.testing.assert_close(schedule.loss_weight("min_snr", "eps", alpha, sigma, 5.0) * snr, on_x0)
    on_v = schedule.loss_weight("min_snr", "v", alpha, sigma, 5.0)
    torch.testing.assert_close(on_v / sigma**2, on_x0, rtol=1e-5, atol=0)


def test_uniform_weights_are_one_and_min_snr_of_flow_is_refused():
    alpha, sigma = alpha_sigma(FLOW, torch.tensor([3.0, 4.0]))
    assert schedule.loss_weight("uniform", "flow", alpha, sigma).tolist() == [1, 1]
    with pytest.raises(UsageError, match="min_snr"):
        schedule.loss_weight("min_snr", "flow", alpha, sigma)


GRID = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000


def test_uniform_timesteps_of_vp_are_whole_and_equally_frequent():
    settings = DiffusionSettings(prediction="eps", t_sampling="uniform", timesteps=50)
    t = schedule.sample_timesteps(settings, GRID, make_schedule(settings))
    assert torch.bincount(t.long()).tolist() == [400] * 50
    assert torch.equal(t, t.round())


def test_uniform_timesteps_of_flow_are_spread_over_time():
    settings = DiffusionSettings(prediction="flow", t_sampling="uniform")
    s = make_schedule(settings)
    _, sigma = alpha_sigma(s, schedule.sample_timesteps(settings, GRID, s).double())
    np.testing.assert_allclose(sigma, GRID.clamp(0.5e-3, 1 - 0.5e-3), atol=1e-7)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.5, 1.0), (-1.2, 0.6)])
def test_logit_normal_times_have_the_stated_distribution(mean, std):
    settings = DiffusionSettings(prediction="flow", t_sampling="logit_normal", t_mean=mean, t_std=std)
    s = make_schedule(settings)
    _, sigma = alpha_sigma(s, schedule.sample_timesteps(settings, GRID, s).double())
    logit = torch.logit(sigma).numpy()
    assert stats.kstest(logit, "norm", args=(mean, std)).statistic < 1e-3


def test_logit_normal_of_vp_puts_the_same_mass_on_whole_timesteps():
    settings = DiffusionSettings(prediction="v", t_sampling="logit_normal", t_mean=0.5, timesteps=8)
    t = schedule.sample_timesteps(settings, GRID, make_schedule(settings))
    edges = stats.norm.cdf([(math.log(k / (8 - k)) - 0.5) for k in range(1, 8)])
    expected = np.diff([0, *edges, 1]) * len(GRID)
    np.testing.assert_allclose(torch.bincount(t.long()), expected, atol=1.01)


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_the_ends_of_the_unit_interval_give_the_ends_of_the_timesteps(kind, prediction):
    settings = DiffusionSettings(prediction=prediction, t_sampling=kind)
    u = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    t = schedule.sample_timesteps(settings, u, make_schedule(settings))
    assert t.dtype == torch.float32
    assert t[0] == 0 and 990 < t[1] <= 999


@pytest.mark.parametrize("spacing", ["linspace", "uniform"])
@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_every_step_count_up_to_all_timesteps_gives_as_many_falling_ones(spacing, prediction):
    s = process(prediction=prediction)
    for steps in range(1, 1001):
        t = sampling_timesteps(s, steps, spacing)
        assert len(t) == steps and t[0] == 999 and t[-1] >= 0
        assert all(a > b for a, b in zip(t, t[1:]))


def test_linspace_ends_at_timestep_0_and_takes_all_when_asked_for_all():
    for s in (VP, FLOW):
        assert all(sampling_timesteps(s, steps, "linspace")[-1] == 0 for steps in range(2, 60))
        assert sampling_timesteps(s, 1000, "linspace") == list(range(999, -1, -1))
    assert sampling_timesteps(VP, 1, "linspace") == [999]
    assert sampling_timesteps(VP, 4, "linspace") == [999, 666, 333, 0]


def test_uniform_steps_of_flow_take_equal_time_down_to_clean():
    levels = sampling_levels(FLOW, 8, "uniform")
    np.testing.assert_allclose(np.diff(levels.sigmas), -0.9995 / 8, rtol=1e-12)
    assert (levels.alphas[-1], levels.sigmas[-1]) == (1.0, 0.0)


def test_uniform_steps_of_vp_count_down_from_the_last_timestep():
    assert sampling_timesteps(VP, 4, "uniform") == [999, 749, 499, 249]
    assert sampling_timesteps(VP, 3, "uniform") == [999, 666, 332]


@pytest.mark.parametrize("s, spacing", [(VP, "linspace"), (FLOW, "uniform")], ids=["vp", "flow"])
def test_without_a_name_vp_takes_linspace_and_flow_uniform(s, spacing):
    assert sampling_levels(s, 7) == sampling_levels(s, 7, spacing) != sampling_levels(s, 7, "original")


@pytest.mark.parametrize("steps", [0, -1, 1001])
@pytest.mark.parametrize("spacing", list(schedule.SPACINGS))
def test_more_steps_than_timesteps_or_none_are_refused(steps, spacing):
    with pytest.raises(UsageError, match=f"steps = {steps}: .*1000"):
        sampling_timesteps(VP, steps, spacing)


def test_an_unknown_spacing_is_refused():
    with pytest.raises(UsageError, match="'karras'.*linspace"):
        sampling_timesteps(VP, 5, "karras")


@pytest.mark.parametrize("s", [VP, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("spacing", list(schedule.SPACINGS))
def test_levels_are_plain_numbers_of_the_evaluated_timesteps_and_an_end(s, spacing):
    levels = sampling_levels(s, 10, spacing)
    assert len(levels.alphas) == len(levels.sigmas) == len(levels.t) + 1
    assert all(type(value) is float for values in (levels.t, levels.alphas, levels.sigmas) for value in values)
    alpha, _ = alpha_sigma(s, torch.tensor(levels.t, dtype=torch.float64))
    assert list(levels.alphas[:-1]) == alpha.tolist()
    end = (s.alphas[0], s.sigmas[0]) if spacing.startswith("original") else (1.0, 0.0)
    assert (levels.alphas[-1], levels.sigmas[-1]) == end


@pytest.mark.parametrize("strength, kept", [(1.0, 20), (0.5, 10), (0.33, 7), (0.025, 1), (1e-6, 1)])
def test_strength_keeps_the_last_share_of_the_steps(strength, kept):
    whole, part = sampling_levels(VP, 20), sampling_levels(VP, 20, strength=strength)
    assert part.t == whole.t[20 - kept :]
    assert part.alphas == whole.alphas[20 - kept :] and part.sigmas == whole.sigmas[20 - kept :]


@pytest.mark.parametrize("strength", [0, -0.5, 1.5])
def test_impossible_strengths_are_refused(strength):
    with pytest.raises(UsageError, match="strength"):
        sampling_levels(VP, 20, strength=strength)
