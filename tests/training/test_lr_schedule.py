"""Learning rates and the average's decay against recorded values and by their definition."""

import json

import pytest
from golden_cases import shared

from ldmcli.training import lr_schedule


@pytest.fixture(scope="module")
def golden():
    return json.loads(shared("golden", "lr_and_ema.json").read_text())


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
