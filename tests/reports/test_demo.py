"""`ldm demo`: the plan is a function of what was measured; a first stage that is too poor goes on or is told; the end
reads well."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typed_lines
from tiny import ldm

from ldmcli.core import runs
from ldmcli.core.errors import InputError, ModelError, UsageError
from ldmcli.core.locks import FolderLock
from ldmcli.core.settings import AutoencoderConfig, DataSettings
from ldmcli.reports import demo, demo_plan, demo_speed
from ldmcli.reports.demo_plan import POOR_PSNR, Plan, Size, Speed, Task, choose, plan, shortcomings, sizes
from ldmcli.reports.demo_table import summary_text
from ldmcli.training.distributed import Distributed

# --- the plan ------------------------------------------------------------------------------------------------------

TWO_CORES = Speed(first_stage=0.14, picture=0.0005)  # of an idle machine of two cores at 64 px
NETWORKS = {"small": 1.0, "base": 8.0, "large": 40.0, "paper": 1.0}  # work, times that of small


def planned(
    minutes: float = 10, side: int = 64, slower: float = 1.0, picture: float = 0.0005, step: float = 0.38, **given
) -> Plan:
    """The plan of a machine `slower` times as slow as two cores, where a step of small's own widths takes
    0.38 s."""
    pixels = (side / 64) ** 2
    speed = Speed(first_stage=0.14 * slower * pixels, picture=picture * slower)

    def seconds(size: Size) -> float:
        width = {0: 1.0, 32: 0.54, 80: 1.13}[size.channels]
        work = NETWORKS[size.preset] * width * pixels / size.patch**2
        return step * slower * work * (0.15 + 0.85 * size.batch / 32)

    return plan(Task(minutes=minutes, size=(side, side), **{"rows": 12_000, **given}), speed, seconds)


SMALL, NARROW = ("small", 80, 1), ("small", 32, 1)


@pytest.mark.parametrize(
    ("given", "size", "batch", "steps", "notes"),
    [
        ({}, SMALL, 32, (1000, 1400), []),  # two cores, 64 px: the network that README measures
        ({"minutes": 5}, SMALL, 32, (450, 650), []),
        ({"minutes": 0.2}, NARROW, 16, (1, 60), ["where 250 begin to show more"]),
        ({"slower": 10}, NARROW, 16, (200, 400), []),
        ({"slower": 4}, SMALL, 32, (225, 260), []),  # 16 would lose
        ({"slower": 10, "minutes": 100}, SMALL, 32, (1000, 1400), []),
        ({"slower": 100}, NARROW, 16, (5, 60), ["where 250 begin to show more than colours: --minutes 70 would do"]),
        ({"slower": 0.1}, SMALL, 64, (5500, 6500), []),
        ({"rows": 285, "picture": 0.08}, SMALL, 32, (1000, 1400), []),  # photographs: opened once, kept then
        ({"rows": 950, "picture": 0.08}, SMALL, 32, (700, 1200), []),
        ({"rows": 6650, "picture": 0.08}, SMALL, 32, (700, 1200), ["of 6,650 pictures 1,1"]),
        ({"rows": 285, "side": 128}, ("small", 80, 2), 32, (1000, 1400), []),
        ({"rows": 950, "side": 128, "picture": 0.08}, ("small", 80, 2), 32, (700, 1100), []),
        ({"rows": 6650, "side": 128}, ("small", 80, 2), 32, (800, 1300), []),
        ({"rows": 6650, "side": 128, "slower": 0.09}, ("small", 80, 1), 32, (2500, 3500), []),
        ({"rows": 6650, "side": 128, "slower": 10}, ("small", 32, 2), 16, (150, 450), []),
        (
            {"rows": 285, "slower": 0.1},
            SMALL,
            64,
            (2220, 2240),
            ["285 pictures are few for this machine: it stops after 500 epochs"],
        ),
        ({"rows": 0, "picture": 0.02}, SMALL, 32, (350, 450), []),  # a stream, decoded in every step
        ({"gpu": True, "slower": 0.02}, ("base", 0, 1), 128, (2000, 3000), []),
        ({"gpu": True, "slower": 0.02, "rows": 285}, SMALL, 256, (550, 560), ["are few"]),
        ({"gpu": True, "slower": 0.002, "rows": 200_000, "minutes": 60}, ("large", 0, 1), 256, (5000, 99_999), []),
        ({"preset": "paper"}, ("paper", 0, 1), 32, (1000, 1400), []),
        ({"preset": "paper", "slower": 10}, ("paper", 0, 1), 32, (60, 130), []),  # as it was asked for
    ],
)
def test_the_plan_fits_the_machine_the_time_and_the_pictures(given, size, batch, steps, notes):
    made = planned(**given)
    assert ((made.size.preset, made.size.channels, made.size.patch), made.size.batch) == (size, batch), made.text()
    assert steps[0] <= made.ldm_steps <= steps[1], made.text()
    assert len(made.notes) == len(notes) and all(word in note for word, note in zip(notes, made.notes)), made.notes
    assert all(len(line) <= 80 for line in made.text().splitlines())
    total = 60 * made.task.minutes
    if total >= 300:
        spent = made.ae_seconds + made.encode_seconds + made.ldm_seconds + made.tail_seconds
        assert spent + demo_plan.START_SECONDS <= total
        assert made.ae_steps >= 100 or made.ae_seconds >= 0.19 * total, "a first stage that cannot be good enough"


def test_a_small_model_on_a_cpu_begins_with_half_batches():
    """As many steps fit as their time says: a half batch costs more than half of a whole one."""
    made, before = planned(), planned(preset="small")
    half = made.size.half_steps
    assert 0.15 * made.ldm_steps < half < 0.2 * made.ldm_steps and made.size.values["train.half_batch_steps"] == half
    whole = made.ldm_steps - half
    assert whole + demo_plan.HALF_COST * half == pytest.approx(made.ldm_seconds / made.speed.diffusion, abs=2)
    assert f"({made.size.batch // 2} in the first {half}), then" in made.text()
    assert before.size.half_steps == 0 and "in the first" not in before.text()
    assert planned(gpu=True, slower=0.02, rows=285).size.half_steps == 0


@pytest.mark.parametrize("slower, rows", [(1.0, 12_000), (3.0, 12_000), (10.0, 12_000), (10.0, 900)])
def test_as_many_pictures_are_encoded_as_give_three_epochs(slower, rows):
    made = planned(slower=slower, rows=rows)
    seen = made.ldm_steps * made.size.batch - made.size.half_steps * made.size.batch // 2
    used = made.rows or rows
    assert used == rows or seen / used == pytest.approx(demo_plan.EPOCHS, rel=0.15), made.text()
    assert (f"{used:,} of {rows:,} pictures" in made.text()) == (used < rows)
    beginning = demo_plan.OPENING_SECONDS + demo_plan.CHOOSING * made.speed.diffusion
    assert not made.notes and made.encode_seconds < used * made.speed.first_stage / 32 + beginning


def test_only_what_is_asked_about_is_measured():
    """A pass takes seconds on a slow machine: sizes below the one that is taken cost no time."""
    asked: list[Size] = []

    def seconds(size: Size) -> float:
        asked.append(size)
        return 0.4

    choose(sizes(Task(minutes=10, size=(64, 64))), seconds, 480.0)
    assert asked == [demo_plan.SMALL]


def test_a_demo_that_goes_on_keeps_its_network_and_its_time():
    """Measured again, it might choose others, and would be refused."""
    task = Task(minutes=10, size=(64, 64), rows=12_000)
    kept = Size(preset="small", batch=64, channels=80, channel_mult=(1, 1.2, 2))
    made = plan(task, replace(TWO_CORES, diffusion=3.0), lambda size: 3.0, kept)
    assert made.size == kept
    first = demo_plan.second_stage_seconds(made, 100.0)
    assert demo_plan.second_stage_seconds(replace(made, second_stage=first), 300.0) == first
    again = Size(**json.loads(json.dumps(made.document()))["size"])
    assert again.values == kept.values


@pytest.mark.parametrize("side, f", [(64, 4), (128, 4), (256, 8), (100, 4), (208, 4)])
def test_every_size_of_the_plan_divides_the_pictures(side, f):
    task = Task(minutes=10, size=(side, side))
    assert demo_plan.factor(task) == f
    if side % 16 == 0:
        assert all(side % (4 * f * size.patch) == 0 for size in sizes(task))


# --- the first stage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "seconds"),
    [
        ([(24, 25.0), (72, 31.0)], 72),  # good enough: as planned
        ([(72, 18.0)], 72 * 2 ** (4 / 3) * 1.1),  # of one evaluation: 3 dB for twice the time
        ([(36, 17.0), (72, 19.0)], 72 * 2 ** (3 / 2) * 1.1),  # as its own curve says
        ([(36, 9.0), (72, 19.0)], 72 * 2 ** (3 / 4) * 1.1),  # … but no steeper than is ever seen,
        ([(36, 15.0), (72, 15.0)], 240),  # … and not flatter; within two fifths of the whole
        ([(36, 5.0), (72, 8.0)], 240),
    ],
)
def test_a_first_stage_below_the_minimum_gets_more_time_within_the_whole(curve, seconds):
    made = planned()
    assert made.ae_seconds == pytest.approx(72)
    assert demo_plan.first_stage_extension(made, curve) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("psnr", "steps", "words"),
    [
        (31.9, 1220, []),
        (8.0, 1220, ["8.0 dB only (22 is a minimum)", "no sample can be better", "--minutes 160 would do"]),
        (31.9, 30, ["took 30 steps only", "--minutes 80 would do"]),
        (21.0, 30, ["21.0 dB", "30 steps"]),
    ],
)
def test_what_was_not_good_enough_is_said_with_the_minutes_that_would_do(psnr, steps, words):
    found = shortcomings(planned(), [(72.0, psnr)], steps, 450.0)
    assert bool(found) == bool(words) and all(word in " ".join(found) for word in words), found


@pytest.mark.parametrize(
    ("minutes", "typed"), [(0.3, 1), (3.2, 4), (10, 10), (10.1, 15), (61, 70), (301, 400), (2000, 2000)]
)
def test_minutes_are_those_that_people_type(minutes, typed):
    assert demo_plan.nice_minutes(minutes) == typed


def test_steps_are_measured_of_the_networks_that_are_trained():
    """And what is measured leaves the random state and the number of threads as they were."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_speed.threads, "LEAST_SECONDS", 0.0)
        before, count = torch.random.get_rng_state(), torch.get_num_threads()
        tiny = typed_lines.small_resolved("diffusion", {"condition.kinds": ("text",)}).config
        stage = typed_lines.small_resolved("autoencoder", {}).config
        assert isinstance(stage, AutoencoderConfig)
        dist = Distributed(tiny.train)
        assert demo_speed.first_stage_seconds(stage, (16, 16), dist) > 0
        assert demo_speed.diffusion_seconds(tiny, stage.autoencoder, (16, 16), dist) > 0
        assert torch.equal(torch.random.get_rng_state(), before) and torch.get_num_threads() == count


# --- the whole -----------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch, tiny_runs):
    """The demo with runs of three steps in the places of minutes, and a first stage that stays poor; what it asked."""
    asked, curves = [], [[(36, 9.0), (72, 12.0)], [(36, 9.0), (72, 12.0), (240, 19.5)]]

    def train(kind, values, out, fresh, preset="", autoencoder=""):
        asked.append((kind, values["train.max_minutes"] * 60, fresh))
        if not out.exists():
            shutil.copytree(tiny_runs["kl" if kind == "autoencoder" else "text"], out)

    monkeypatch.setattr(demo, "_train", train)
    monkeypatch.setattr(demo, "_curve", lambda run: curves[min(len(asked) - 1, 1)])
    monkeypatch.setattr(demo, "_measure", lambda *given: {"ae_psnr": 19.5, "n": 16})
    monkeypatch.setattr(demo, "first_stage_seconds", lambda *given: 0.14)
    monkeypatch.setattr(demo, "diffusion_seconds", lambda *given: 0.38)
    monkeypatch.setattr(demo, "picture_seconds", lambda *given: 0.0)
    return asked


def test_a_poor_first_stage_goes_on_and_is_told_in_log_summary_and_report(short, tmp_path, capsys):
    """Again in the same folder, the demo keeps its plan, and the second stage its time."""
    out, data = tmp_path / "demo", DataSettings(limit=20)
    summary = demo.demo(data, minutes=10, out=out)
    assert [kind for kind, *_ in short] == ["autoencoder", "autoencoder", "diffusion"]
    assert short[0][1] == pytest.approx(72) and short[1][1:] == (pytest.approx(240), False)
    said = capsys.readouterr().err
    assert f"reconstructs at 12.0 dB, and {POOR_PSNR:g} is a minimum: it goes on for 2:48 min" in said
    poor, few = summary["warnings"]
    assert "19.5 dB only" in poor and "--minutes 35 would do" in poor and "steps only" in few
    assert poor in said and "19.5 dB only" in (out / "report.html").read_text()
    assert summary == json.loads((out / "summary.json").read_text())
    again = demo.demo(data, minutes=10, out=out, fresh=False)
    assert short[3:] == [(*short[2][:2], False)] and again["plan"] == summary["plan"]


@pytest.mark.parametrize(
    ("minutes", "psnr", "asked", "more"),
    [
        (20, 31.0, [("diffusion", False)], 600),  # a good first stage stays: all the time is the diffusion model's
        (20, 12.0, [*2 * [("autoencoder", False)], ("diffusion", True)], None),
        (5, 31.0, [("diffusion", False)], 0),  # nothing is taken back
    ],
)
def test_more_minutes_go_where_they_are_needed(minutes, psnr, asked, more, short, tmp_path, capsys):
    """As the end of a demo advises: `--minutes N` in the same folder."""
    out, data = tmp_path / "demo", DataSettings(limit=20)
    demo.demo(data, minutes=10, out=out)
    before, begun = list(short), short[-1][1]
    runs.RunFolder(out / "autoencoder").update(state="finished", metrics={"psnr": psnr})
    capsys.readouterr()
    demo.demo(data, minutes=minutes, out=out, fresh=False)
    now = short[len(before) :]
    assert [(kind, fresh) for kind, _, fresh in now] == asked
    assert more is None or now[-1][1] == pytest.approx(begun + more)
    assert ("begins anew" in capsys.readouterr().err) == now[-1][2]


def test_a_plan_that_is_none_is_refused_in_one_line(short, tmp_path):
    demo.demo(DataSettings(limit=200), minutes=10, out=tmp_path / "demo")
    (tmp_path / "demo" / "plan.json").write_text('{"speed": {}}')
    with pytest.raises(ModelError, match="--fresh"):
        demo.demo(DataSettings(limit=200), minutes=10, out=tmp_path / "demo", fresh=False)


@pytest.mark.parametrize(
    ("data", "more", "named"),
    [
        ({"source": "shapes:2"}, {}, "data.source: shapes -> shapes:2"),
        ({"size": (32, 32)}, {}, "data.size"),
        ({"crop": "random"}, {}, "data.crop: None -> random"),
        ({}, {"seed": 1}, "train.seed: 0 -> 1"),
        ({}, {"preset": "paper"}, "preset:  -> paper"),
    ],
)
@pytest.mark.parametrize("begun", ["autoencoder", "both"])
def test_a_demo_goes_on_as_it_was_begun_and_one_that_is_refused_changes_nothing(
    data, more, named, begun, short, tmp_path
):
    """The first stage is not taken for other pictures, and the plan keeps its times."""
    out, limit = tmp_path / "demo", {"limit": 20}
    demo.demo(DataSettings(**limit), minutes=10, out=out)
    if begun == "autoencoder":
        shutil.rmtree(out / "diffusion")
    before, files = len(short), {path: path.read_bytes() for path in sorted(out.rglob("*.json"))}
    with pytest.raises(ModelError, match="was started with other settings") as refused:
        demo.demo(DataSettings(**limit, **data), minutes=30, out=out, fresh=False, **more)
    assert named in str(refused.value) and "--allow" not in str(refused.value)
    assert {path: path.read_bytes() for path in sorted(out.rglob("*.json"))} == files
    demo.demo(DataSettings(**limit), minutes=10, out=out, fresh=False)
    assert not any(kind == "autoencoder" or fresh for kind, _, fresh in short[before:] if begun == "both")


@pytest.mark.parametrize("begun", [True, False])
def test_a_training_that_refuses_leaves_the_plan_as_it_was(begun, short, tmp_path, monkeypatch):
    out, data = tmp_path / "demo", DataSettings(limit=20)
    if begun:
        demo.demo(data, minutes=10, out=out)
    before = (out / "plan.json").read_text() if begun else ""

    def refuse(*given):
        raise InputError("a picture cannot be read")

    monkeypatch.setattr(demo, "_train", refuse)
    with pytest.raises(InputError):
        demo.demo(data, minutes=30, out=out, fresh=False)
    assert (out / "plan.json").read_text() == before if begun else not out.exists()


def test_one_demo_writes_in_a_folder_at_a_time(short, tmp_path):
    out, lock = tmp_path / "demo", FolderLock(tmp_path / "demo")
    demo.demo(DataSettings(limit=20), minutes=10, out=out)
    plan_of_it, before = (out / "plan.json").read_text(), len(short)
    lock.acquire()
    with pytest.raises(UsageError, match="is writing here"):
        demo.demo(DataSettings(limit=20), minutes=30, out=out, fresh=False)
    lock.release()
    assert (out / "plan.json").read_text() == plan_of_it and len(short) == before


@pytest.mark.parametrize("minutes", [float("inf"), float("nan"), -1.0, 0.1])
def test_minutes_are_a_number_that_is_large_enough(minutes, tmp_path):
    with pytest.raises(UsageError, match="--minutes"):
        demo.demo(DataSettings(), minutes=minutes, out=tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_several_processes_are_refused_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="runs in one process, not in 2"):
        demo.demo(DataSettings(), out=tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("name", ["shapes-mine", "own"])
@pytest.mark.parametrize("count", [1, 8])
def test_few_pictures_in_a_folder_of_any_name_are_measured_as_far_as_they_go(
    name, count, tiny_runs, tmp_path, monkeypatch
):
    """A single held-out picture has no covariance; only the embedded shapes have a checker."""
    from PIL import Image

    folder, out = tmp_path / name, tmp_path / "demo"
    folder.mkdir()
    for k in range(count):
        Image.new("RGB", (24, 24), (40 * k, 90, 20)).save(folder / f"{k}.png")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_runs["kl"], out / "autoencoder")
    shutil.copytree(tiny_runs["plain"], out / "diffusion")
    made = replace(planned(), task=Task(minutes=1, size=(20, 20)), samples=16)
    found = demo._measure(DataSettings(source=name, val_fraction=0.5), made, (), out, 0)
    assert ("fd" in found) == (found["n"] > 1) == (count > 1) and "all" not in found


SUMMARY = {
    "data": "shapes",
    "minutes": 10,
    "n": 128,
    "all": 0.9609375,
    "colour": 1.0,
    "shape": 0.9609375,
    "iou": 0.8123,
    "fd": 91.83,
    "fd_reconstructions": 42.1,
    "fd_protocol": "FD (EfficientNet-lite0): 128 samples against …",
    "reconstructions": {"all": 1.0, "colour": 1.0, "shape": 1.0, "iou": 0.87},
    "real": {"all": 1.0, "colour": 1.0, "shape": 1.0, "iou": 1.0},
    "ae_psnr": 33.84,
    "steps": {"autoencoder": 516, "diffusion model": 1150},
    "trained_seconds": {"autoencoder": 72.0, "diffusion model": 452.0},
    "seconds": 574.2,
}
SHOWN = """\
                          128 samples  reconstructions  real images
everything right               96.1 %          100.0 %      100.0 %
colour right                  100.0 %          100.0 %      100.0 %
shape right                    96.1 %          100.0 %      100.0 %
overlap with the outline         0.81             0.87         1.00
FD (EfficientNet-lite0)          91.8             42.1            0

autoencoder     33.8 dB on held-out images, 516 steps in 1:12 min
diffusion model 1,150 steps in 7:32 min
time            9:34 min of 10 minutes
pictures        runs/demo/samples.png
report          runs/demo/report.html
more of them    ldm sample --model runs/demo/diffusion"""


def test_the_end_of_a_demo_reads_well():
    assert summary_text(SUMMARY, Path("runs/demo")) == SHOWN


def test_the_end_of_a_demo_that_measured_nothing_has_no_table():
    """Of one held-out picture of one's own."""
    own = {name: SUMMARY[name] for name in ("data", "minutes", "ae_psnr", "seconds")}
    assert summary_text({**own, "n": 1}, Path("runs/demo")).startswith("autoencoder     33.8 dB")


@pytest.mark.parametrize(
    ("warnings", "said"), [(["poor"], "as the warning above says"), (["poor", "few"], "the 2 warn")]
)
def test_the_end_of_a_demo_is_short_for_other_data_and_points_to_its_warnings(warnings, said):
    """Own pictures have no checker."""
    own = {name: SUMMARY[name] for name in ("data", "minutes", "n", "fd", "fd_protocol", "ae_psnr", "seconds")}
    text = summary_text({**own, "warnings": warnings}, Path("runs/demo"))
    assert all(len(line) <= 80 for line in text.splitlines()) and " right " not in text
    assert text.splitlines()[-1].startswith("not good enough") and said in text


def test_the_command_shows_it(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "demo", lambda *given, **more: SUMMARY)
    ending = ldm("demo", "--out", tmp_path / "out")
    assert ending.code == 0 and "everything right" in ending.stdout and "9:34 min" in ending.stdout
