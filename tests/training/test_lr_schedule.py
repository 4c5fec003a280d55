"""Learning rates and the average's decay against recorded values and by their definition."""

import json

import pytest
import tiny
from golden_cases import shared

from ldmcli.core.errors import UsageError
from ldmcli.core.settings import TrainSettings
from ldmcli.training import lr_schedule

# the original's names → ours; a list has a value for each cycle
RECORDED = {
    "LambdaLinear_churches": (
        {"schedule": "linear", "cycle_warmup": (10_000,), "cycle_start": (1e-6,), "cycle_min": (1.0,)},
        (10**13,),
    ),
    "LambdaLinear_decay": (
        {"schedule": "linear", "cycle_warmup": (100,), "cycle_start": (0.01,), "cycle_min": (0.1,)},
        (1000,),
    ),
    "LambdaWarmUpCosine_inpainting": (
        {
            "schedule": "warmup_cosine",
            "cycle_warmup": (1000,),
            "cycle_start": (1e-3,),
            "cycle_max": (0.1,),
            "cycle_min": (1e-4,),
        },
        (50_000,),
    ),
    "LambdaWarmUpCosine2_two_cycles": (
        {"schedule": "warmup_cosine", "cycle_warmup": (10, 20), "cycle_max": (1.0, 0.5), "cycle_min": (0.1, 0.05)},
        (100, 200),
    ),
}


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


@pytest.mark.parametrize("name", RECORDED)
def test_original_schedulers_take_the_recorded_values(golden, name):
    values, cycles = RECORDED[name]
    train = TrainSettings(steps=60_000, cycle_steps=cycles, **values)
    recorded = golden["lr"][name].get("values", golden["lr"][name])
    found = {n: lr_schedule.lr_factor(train, int(n), int(n) / 60_000) for n in recorded}
    assert found == pytest.approx(recorded, rel=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "warmup_cosine"])
def test_without_cycle_steps_the_cycle_is_the_run_also_where_time_ends_it(schedule):
    train = TrainSettings(steps=100, schedule=schedule, cycle_min=(0.2,), cycle_warmup=(10,))
    assert lr_schedule.lr_factor(train, 0, 0.0) == 0
    assert lr_schedule.lr_factor(train, 100, 1.0) == pytest.approx(0.2)
    assert lr_schedule.lr_factor(train, 30, 0.8) == pytest.approx(lr_schedule.lr_factor(train, 80, 0.8))


def test_one_number_stands_for_every_cycle():
    train = TrainSettings(steps=60, schedule="linear", cycle_steps=(20, 40), cycle_min=(0.5,))
    assert [cycle.low for cycle in lr_schedule.cycles_of(train)] == [0.5, 0.5]
    assert lr_schedule.lr_factor(train, 40, 0.5) == pytest.approx(0.75)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"schedule": "cosine"}, "train.schedule = 'cosine': choose one of"),
        ({"schedule": "linear", "cycle_steps": (10, 20), "cycle_min": (0.1, 0.1, 0.1)}, "train.cycle_min"),
        ({"schedule": "linear", "cycle_max": ()}, "train.cycle_max"),
        ({"schedule": "linear", "cycle_steps": (10,), "cycle_warmup": (10,)}, "shorter than its cycle"),
        ({"schedule": "warmup_cosine", "cycle_steps": (0,)}, "train.cycle_steps"),
        ({"schedule": "warmup_cosine", "cycle_min": (-1.0,)}, "train.cycle_min"),
    ],
)
def test_contradicting_cycles_are_refused(wrong, said):
    with pytest.raises(UsageError) as found:
        TrainSettings(**wrong)
    assert said in str(found.value)


def test_training_follows_the_schedule(tmp_path, tiny_runs):
    options = (
        "train.schedule=warmup_cosine",
        "train.cycle_steps=2,3",
        "train.cycle_warmup=1",
        "train.cycle_min=0.1,0.5",
    )
    sets = [word for option in options for word in ("--set", option)]
    tiny.train_ldm(tmp_path / "run", tiny_runs["kl"], *tiny.ADAM, *sets, "--log-every", 1, steps=5)
    factors = [line["lr_factor"] for line in tiny.log(tmp_path / "run") if "lr_factor" in line]
    assert factors == pytest.approx([0, 1, 0.1, 1, 0.75])


def constant(warmup=0, cooldown=0.0):
    return TrainSettings(warmup=warmup, cooldown=cooldown)


def test_rate_warms_up_stays_and_cools_down():
    rates = [lr_schedule.lr_factor(constant(10, 0.25), step, step / 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[9:76] == [1.0] * 67
    assert rates[75:] == pytest.approx([(100 - step) / 25 for step in range(75, 100)])


def test_every_update_moves_even_if_the_whole_run_warms_up_and_cools_down():
    assert all(lr_schedule.lr_factor(constant(7, 1.0), step, step / 7) > 0 for step in range(7))


def test_without_warm_up_and_cooldown_the_rate_is_constant():
    assert {lr_schedule.lr_factor(constant(), step, step / 5) for step in range(5)} == {1.0}


@pytest.mark.parametrize(
    "progress, cooldown, expected",
    [(0, 0.2, 1), (0.8, 0.2, 1), (0.9, 0.2, 0.5), (1, 0.2, 0), (1.1, 0.2, 0), (0.25, 1, 0.75), (1, 0, 1)],
)
def test_cooldown_falls_linearly_over_the_last_share(progress, cooldown, expected):
    assert lr_schedule.cooldown_factor(progress, cooldown) == pytest.approx(expected)
