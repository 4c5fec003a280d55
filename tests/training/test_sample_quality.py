"""Quality while training: samples are measured at evaluations, whatever interrupts the run, and the best checkpoint
stays."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from processes import ranks
from safetensors.torch import save_file

import ldmcli
from ldmcli.core.errors import ModelError
from ldmcli.evaluation import extractors
from ldmcli.training import sample_quality
from ldmcli.training.sample_quality import SampleQuality

DATA = ("--data", "shapes", "--limit", 24, "--size", "16x16", "--val-fraction", 0.5)
MEASURED = ("--eval-every", 2, "--log-every", 1, "--set", "train.eval_samples=12", "--set", "train.eval_steps=2")
KEYS = {
    "val_loss",
    "fd_eight8",
    "fd_eight8_low",
    "fd_eight8_high",
    "kid_eight8_mean",
    "mind_eight8",
    "is_eight8_mean",
    "precision_eight8",
    "recall_eight8",
}


class Eight(torch.nn.Module):
    """Eight features of a picture."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 5, 3)

    def forward(self, x):
        pooled = torch.relu(self.conv(x / 127.5 - 1)).mean((2, 3))
        return pooled, pooled


def use_cheap_features() -> None:
    path = Path(os.environ["EIGHT"])
    network = extractors.Network(
        Eight, "pool (8)", 8, 16, "bicubic (antialiased)", "FD (eight)", "eight8", ("0" * 64,), "x"
    )
    extractor = extractors.Extractor("eight", network, path, "0" * 64)
    sample_quality.open_extractor = lambda name=None: extractor


@pytest.fixture(scope="module", autouse=True)
def cheap_features(tmp_path_factory):
    """Features that cost nothing, for this process and those that it starts."""
    folder, opened = tmp_path_factory.mktemp("eight"), sample_quality.open_extractor
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(Eight().state_dict(), folder / "eight.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EIGHT", str(folder / "eight.safetensors"))
        patch.setenv("LDM_CACHE", str(folder))
        patch.setattr(sample_quality, "open_extractor", opened)  # and back at the end
        use_cheap_features()
        yield


@pytest.fixture(scope="module")
def arguments(ae, tmp_path_factory):
    cache = ("--set", f"data.cache_dir={tmp_path_factory.mktemp('cache')}")

    def build(out, *more, steps=6):
        line = ("train-ldm", "--autoencoder", ae, *DATA, *tiny.UNET, *tiny.QUIET_LOOP, *tiny.ADAM, *cache, *MEASURED)
        return [str(word) for word in (*line, "--condition", "class", "--steps", steps, "--out", out, *more)]

    return build


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """Six steps, evaluated at 2, 4 and 6, every checkpoint kept."""
    out = tmp_path_factory.mktemp("whole") / "run"
    ending = tiny.ldm(*arguments(out, "--save-every", 1, "--keep", 9))
    assert ending.code == 0, ending.stderr
    return out


def evaluations(run) -> dict[int, dict]:
    """What was measured, by step."""
    lines = [line for line in tiny.log(run) if "val/val_loss" in line]
    assert len(lines) == len({line["step"] for line in lines})
    return {
        line["step"]: {name.removeprefix("val/"): value for name, value in line.items() if name.startswith("val/")}
        for line in lines
    }


def test_every_evaluation_has_the_keys_of_eval_fid_and_says_how_long_it_took(whole):
    found = evaluations(whole)
    assert list(found) == [2, 4, 6] and all(set(one) == KEYS for one in found.values())
    assert len({one["fd_eight8"] for one in found.values()}) == 3
    assert all(line["eval_seconds"] > 0 for line in tiny.log(whole) if "val/val_loss" in line)
    state = tiny.state(whole)
    assert state["metrics"] == found[6] and state["best"]["metric"] == "fd_eight8", "of so few pictures, by default"


def test_metrics_are_those_of_the_averaged_weights_at_that_step(whole, monkeypatch):
    from ldmcli.evaluation import evaluate as module

    monkeypatch.setattr(module, "open_extractor", sample_quality.open_extractor)
    result = ldmcli.evaluate(model=f"{whole}@4", n=12, steps=2, metrics=("fid", "kid", "mind", "is", "pr"))
    assert result["step"] == 4
    low, high = result["estimates"]["fd_eight8"]["interval"]
    known = result["metrics"] | {"fd_eight8_low": low, "fd_eight8_high": high}
    assert {key: known[key] for key in KEYS - {"val_loss"}} == {
        key: value for key, value in evaluations(whole)[4].items() if key != "val_loss"
    }


def test_time_of_evaluations_is_no_time_of_training(arguments, tmp_path, monkeypatch):
    """An evaluation that waits adds nothing to the seconds trained, nor to those of a step in the log."""
    import time

    measure = SampleQuality.measure

    def slow(self, *given):
        time.sleep(1.5)
        return measure(self, *given)

    monkeypatch.setattr(SampleQuality, "measure", slow)
    assert tiny.ldm(*arguments(tmp_path / "run", "--log-every", 3, steps=3)).code == 0
    lines = {line["step"]: line for line in tiny.log(tmp_path / "run") if "trained_seconds" in line}
    taken = lines[3]["trained_seconds"] - lines[1]["trained_seconds"]
    assert 2 * lines[3]["seconds_per_step"] - taken < 1.4


@pytest.mark.parametrize("step", [2, 3])
def test_going_on_gives_the_same_numbers(arguments, whole, tmp_path, step):
    """Also where a signal came at the very step of an evaluation, before it."""
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    lines = [line for line in tiny.log(whole) if line["step"] <= step and "val/val_loss" not in line]
    lines += [line for line in tiny.log(whole) if line["step"] < step and "val/val_loss" in line]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (copy / "run.json").write_text(json.dumps(tiny.state(whole) | {"state": "running", "step": step}))
    ending = tiny.ldm(*arguments(copy, "--save-every", 1, "--keep", 9))
    assert ending.code == 0, ending.stderr
    assert evaluations(copy) == evaluations(whole)


def test_a_signal_while_samples_are_drawn_ends_the_run_there_and_going_on_measures_again(
    arguments, whole, tmp_path, monkeypatch
):
    run, measure = tmp_path / "run", SampleQuality.measure

    def interrupted(self, *given):
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, *given)

    monkeypatch.setattr(SampleQuality, "measure", interrupted)
    ending = tiny.ldm(*arguments(run))
    assert ending.code == 143 and "saved at step 2" in ending.line and not evaluations(run)
    monkeypatch.setattr(SampleQuality, "measure", measure)
    assert tiny.ldm(*arguments(run)).code == 0
    assert evaluations(run) == evaluations(whole)


def test_two_processes_measure_what_one_does(arguments, whole, tmp_path, monkeypatch):
    """Three blocks of samples, of which one process has two."""
    monkeypatch.setattr(sample_quality, "BATCH", 5)
    run = tmp_path / "run"
    assert tiny.ldm(*arguments(tmp_path / "one", steps=2)).code == 0
    both = ranks(tmp_path, 2, *arguments(run, steps=2), before=partial(in_blocks_of_five, os.environ["EIGHT"]))
    assert [command.wait() for command in both] == [0, 0], both[0].stderr + both[1].stderr
    one, two = (evaluations(folder)[2] for folder in (tmp_path / "one", run))
    assert two == pytest.approx(one, rel=1e-3)


def in_blocks_of_five(weights: str) -> None:
    """In a process whose server may have been started before there were weights."""
    os.environ["EIGHT"] = weights
    use_cheap_features()
    sample_quality.BATCH = 5


def test_spoilt_samples_are_said_and_training_goes_on(arguments, tmp_path, monkeypatch):
    def spoilt(*given):
        raise ModelError("samples hold NaN")

    monkeypatch.setattr(SampleQuality, "_block", spoilt)
    ending = tiny.ldm(*arguments(tmp_path / "run", "--set", "train.keep_best=fid", steps=4))
    assert ending.code == 0 and "samples are not measured: samples hold NaN" in ending.stderr
    assert "fid was not measured" in ending.stderr
    assert all(set(one) == {"val_loss"} for one in evaluations(tmp_path / "run").values())


# --- the best checkpoint ---------------------------------------------------------------------------------------


def made_up(values):
    """`SampleQuality.measure` that gives these Fréchet distances in turn."""
    remaining = iter(values)
    return lambda self, *given: {"fd_eight8": next(remaining)}


def kept(run) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "values, best, steps",
    [
        ((3.0, 1.0, 2.0), 4, [4, 6]),  # beside the newest
        ((3.0, 2.0, 1.0), 6, [6]),  # the newest
        ((1.0, 1.0, float("nan")), 2, [2, 6]),  # of equal ones the earlier; NaN is none
    ],
)
def test_the_best_checkpoint_stays_beside_the_newest(arguments, tmp_path, monkeypatch, values, best, steps):
    run = tmp_path / "run"
    monkeypatch.setattr(SampleQuality, "measure", made_up(values))
    ending = tiny.ldm(*arguments(run, "--set", "train.keep_best=fid", "--keep", 1, "--save-every", 5))
    assert ending.code == 0, ending.stderr
    value = values[best // 2 - 1]
    assert kept(run) == steps and tiny.state(run)["best"] == {"step": best, "metric": "fd_eight8", "value": value}
    assert ldmcli.load(f"{run}@best").fingerprint == ldmcli.load(f"{run}@{best}").fingerprint
    listed = tiny.ldm("runs", tmp_path)
    assert f"best fd_eight8 {value:g} @{best}" in listed.stdout
    page = (run / "report.html").read_text()
    assert "use it as run@best" in page and f"step {best}" in page


def test_a_run_that_is_killed_knows_its_best_again(arguments, tmp_path, monkeypatch):
    """Stopped at step 5, after the best of 2 and a worse one of 4; what was 6 is worse, too."""
    run, line = tmp_path / "run", ("--set", "train.keep_best=fid", "--keep", 1)
    monkeypatch.setattr(SampleQuality, "measure", made_up((1.0, 2.0, 3.0)))
    assert tiny.ldm(*arguments(run, *line, steps=5)).code == 0
    state = tiny.state(run)
    state.pop("best")  # as if killed between the checkpoint and run.json
    (run / "run.json").write_text(json.dumps(state))
    monkeypatch.setattr(SampleQuality, "measure", made_up((4.0,)))
    assert tiny.ldm(*arguments(run, *line)).code == 0
    assert tiny.state(run)["best"]["step"] == 2 and kept(run) == [2, 6]


def test_higher_is_better_where_it_is_and_autoencoders_keep_theirs(tmp_path, monkeypatch):
    from ldmcli.training.autoencoder import AutoencoderObjective

    values = iter((20.0, 30.0, 25.0))
    monkeypatch.setattr(AutoencoderObjective, "evaluate", lambda self, stopped: {"psnr": next(values)})
    run = tmp_path / "ae"
    tiny.train_ae(run, "--eval-every", 1, "--set", "train.keep_best=psnr", "--keep", 1)
    assert tiny.state(run)["best"] == {"step": 2, "metric": "psnr", "value": 30.0} and kept(run) == [2, 3]
    assert ldmcli.load(f"{run}@best").fingerprint == ldmcli.load(f"{run}@2").fingerprint


# --- refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [(), ("--plan",)])
@pytest.mark.parametrize(
    "command, options, said",
    [
        ("train-ldm", ("train.eval_samples=4",), "train.eval_samples = 4: at least 10 are needed"),
        ("train-ldm", ("train.eval_samples=-1",), "train.eval_samples = -1: must not be negative"),
        ("train-ldm", ("train.eval_steps=9999",), "9999"),
        (
            "train-ldm",
            ("train.eval_features=resnet", "train.eval_samples=10"),
            "train.eval_features resnet: choose one of",
        ),
        (
            "train-ldm",
            ("train.keep_best=fid",),
            "train.keep_best = 'fid': evaluations of this training measure val_loss",
        ),
        (
            "train-ldm",
            ("train.keep_best=psnr", "train.eval_samples=10"),
            "measure val_loss, fd_eight8, kid_eight8_mean",
        ),
        ("train-ldm", ("train.keep_best=val_loss", "train.eval_every=0"), "needs evaluations; set train.eval_every"),
        ("train-ae", ("train.eval_samples=10",), "only train-ldm draws samples"),
        ("train-ae", ("train.keep_best=val_loss",), "measure psnr, ssim"),
    ],
)
def test_what_makes_no_sense_is_refused_before_data_are_read(ae, tmp_path, plan, command, options, said):
    network = ("--autoencoder", ae, *tiny.UNET) if command == "train-ldm" else tiny.AE_NETWORK
    sets = [word for option in options for word in ("--set", option)]
    ending = tiny.ldm(command, *DATA, *network, "--steps", 2, *sets, "--out", tmp_path / "run", *plan)
    assert ending.code == 2 and said in ending.line, ending.stderr
    assert not (tmp_path / "run" / "config.toml").exists()


def test_too_few_held_out_rows_are_refused_before_the_first_step(arguments, tmp_path):
    (tmp_path / "pictures").mkdir()
    for k in range(4):
        Image.new("RGB", (16, 16), (60 * k, 0, 0)).save(tmp_path / "pictures" / f"{k}.png")
    few = ("--data", tmp_path / "pictures", "--val-fraction", 0.01, "--condition", "none")
    ending = tiny.ldm(*arguments(tmp_path / "run", *few))
    assert ending.code == 3 and "at least 2 held-out rows are needed" in ending.line


def test_a_plan_says_what_evaluations_draw(arguments, tmp_path):
    ending = tiny.ldm(*arguments(tmp_path / "run", "--plan", "--json"))
    assert any("each evaluation draws 12 samples in 2 steps" in note for note in ending.json["notes"])
