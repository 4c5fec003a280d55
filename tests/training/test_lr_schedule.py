"""Learning rates and the average's decay against recorded values and by their definition."""

import json

import pytest
from golden_cases import shared

from ldmcli.training import lr_schedule

CHURCHES = {"warm_up_steps": [10000], "f_min": [1.0], "f_max": [1.0], "f_start": [1e-6], "cycle_lengths": [1e13]}
INPAINTING = {"warm_up_steps": 1000, "lr_min": 1e-4, "lr_max": 0.1, "lr_start": 1e-3, "max_decay_steps": 50000}


@pytest.fixture(scope="module")
def golden():
    return json.loads(shared("golden", "lr_and_ema.json").read_text())


@pytest.mark.parametrize(
    "name, function, parameters",
    [
        ("LambdaLinear_churches", lr_schedule.lambda_linear, CHURCHES),
        ("LambdaLinear_decay", lr_schedule.lambda_linear, None),
        ("LambdaWarmUpCosine_inpainting", lr_schedule.lambda_warmup_cosine, INPAINTING),
        ("LambdaWarmUpCosine2_two_cycles", lr_schedule.lambda_warmup_cosine_cycles, None),
    ],
)
def test_schedulers_of_the_original_match_their_recorded_multipliers(name, function, parameters, golden):
    case = golden["lr"][name]
    values = case if parameters else case["values"]
    for n, expected in values.items():
        assert function(int(n), **(parameters or case["params"])) == pytest.approx(expected, rel=1e-9), n


def test_average_with_this_decay_takes_the_recorded_values(golden):
    case = golden["ema"]
    weight, shadow = list(case["initial_weight"]), list(case["initial_weight"])
    for n, expected in enumerate(case["shadow_after_each_step"], start=1):
        weight = [w + step for w, step in zip(weight, case["increment_per_step"])]
        decay = lr_schedule.ema_decay_at(n, case["decay"])
        shadow = [s - (1 - decay) * (s - w) for s, w in zip(shadow, weight)]
        assert shadow == pytest.approx(expected, rel=1e-5)


def test_average_decay_rises_from_two_elevenths_to_its_limit():
    assert lr_schedule.ema_decay_at(1, 0.9999) == 2 / 11
    assert lr_schedule.ema_decay_at(2, 0.9999) == 3 / 12
    assert lr_schedule.ema_decay_at(10**6, 0.9999) == 0.9999
    assert lr_schedule.ema_decay_at(1, 0.1) == 0.1


def test_linear_scheduler_jumps_where_warm_up_ends():
    shape = {"warm_up_steps": [10], "f_min": [0.0], "f_max": [1.0], "f_start": [0.0], "cycle_lengths": [100]}
    assert lr_schedule.lambda_linear(9, **shape) == pytest.approx(0.9)
    assert lr_schedule.lambda_linear(10, **shape) == pytest.approx(0.9)  # not 1: the fall counts from 0
    assert lr_schedule.lambda_linear(11, **shape) == pytest.approx(0.89)


@pytest.mark.parametrize("function", [lr_schedule.lambda_linear, lr_schedule.lambda_warmup_cosine_cycles])
def test_after_the_last_cycle_its_end_goes_on(function):
    shape = {
        "warm_up_steps": [1, 1],
        "f_min": [0.1, 0.2],
        "f_max": [1.0, 0.5],
        "f_start": [0.0, 0.0],
        "cycle_lengths": [10, 20],
    }
    assert function(10, **shape) == pytest.approx(0.1)
    assert function(30, **shape) == function(10**9, **shape) == pytest.approx(0.2)


def test_rate_warms_up_stays_and_cools_down():
    rates = [lr_schedule.lr_factor(step, step / 100, warmup=10, cooldown=0.25) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[9:76] == [1.0] * 67
    assert rates[75:] == pytest.approx([(100 - step) / 25 for step in range(75, 100)])


def test_every_update_moves_even_if_the_whole_run_warms_up_and_cools_down():
    assert all(lr_schedule.lr_factor(step, step / 7, warmup=7, cooldown=1.0) > 0 for step in range(7))


def test_without_warm_up_and_cooldown_the_rate_is_constant():
    assert {lr_schedule.lr_factor(step, step / 5) for step in range(5)} == {1.0}


@pytest.mark.parametrize(
    "progress, cooldown, expected",
    [(0, 0.2, 1), (0.8, 0.2, 1), (0.9, 0.2, 0.5), (1, 0.2, 0), (1.1, 0.2, 0), (0.25, 1, 0.75), (1, 0, 1)],
)
def test_cooldown_falls_linearly_over_the_last_share(progress, cooldown, expected):
    assert lr_schedule.cooldown_factor(progress, cooldown) == pytest.approx(expected)
