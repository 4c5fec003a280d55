"""`ldm bench`: tiny networks, and a document whose arithmetic is checked; nothing here asks how fast anything is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jsonschema import Draft202012Validator
from tiny import ldm
from torch.utils.flop_counter import FlopCounterMode
from typed_lines import SMALL, environment

from ldmcli.cli import bench as command
from ldmcli.core import config, launch
from ldmcli.core.errors import ThresholdError
from ldmcli.core.settings import TrainSettings
from ldmcli.sampling.draw import Draw, draw_images
from ldmcli.studies import bench as studies
from ldmcli.studies import bench_suite
from ldmcli.studies.bench import BenchRequest, Meter, bench
from ldmcli.studies.bench_subjects import Asked, example_inputs, open_subject, opened_training
from ldmcli.studies.bench_timing import timed
from ldmcli.training.distributed import Distributed

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = Draft202012Validator(json.loads((ROOT / "docs" / "bench.schema.json").read_text(encoding="utf-8")))
QUICK = ("--seconds", 0.02, "--steps", 2, "--batch-size", 2, "--size", 16, "--mixed-precision", "no")


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    for name, value in environment(SMALL).items():
        monkeypatch.setenv(name, value)


def small(kind: str, **values) -> config.Config:
    layers = [(name, {name: value}) for name, value in {**SMALL, "data.size": (16, 16), **values}.items()]
    known = config.paths(kind)
    return config.resolve(kind, [layer for layer in layers if layer[0] in known]).config


def asked(kind: str = "diffusion", **values) -> Asked:
    first = small("autoencoder")
    return Asked(name="small", kind=kind, config=small(kind, **values), first_stage=first)


def subject_of(one: Asked, folder: Path):
    dist = Distributed(TrainSettings(mixed_precision="no"))
    return open_subject(one, dist, folder, None), dist


def document(*options: object) -> dict:
    ending = ldm("bench", *QUICK, "--json", *options)
    assert ending.code == 0, ending.stderr
    wrong = [f"{list(one.absolute_path)}: {one.message[:200]}" for one in SCHEMA.iter_errors(ending.json)]
    assert not wrong, wrong
    return ending.json


def test_the_document_is_that_of_the_schema_and_its_numbers_agree():
    found = document("--rows", 7200)
    assert [row["work"] for row in found["rows"]] == ["train", "encode", "decode", "train", "sample"]
    for row in found["rows"]:
        rate = row["flops_per_image"] * row["images_per_s"]
        assert row["tflops_per_s"] == pytest.approx(rate / 1e12)
        assert row["mfu"] == pytest.approx(rate / found["product_flops_per_s"]["float32"])
        assert row["images_per_s"] == pytest.approx(2 / row["seconds"])
        assert row["peak_memory_bytes"] > 1 << 20
        assert ("hours_per_epoch" in row) == (row["work"] == "train")
    train = found["rows"][3]
    assert train["hours_per_epoch"] == pytest.approx(2 / train["images_per_s"])
    assert 0 <= train["wait"] <= 1 and train["steps_per_s"] == pytest.approx(1 / train["seconds"])


def test_the_table_is_readable_at_80_columns(tmp_path):
    old = tmp_path / "old.json"
    old.write_text(json.dumps(document("--preset", "small-ae")))
    ending = ldm("bench", *QUICK, "--preset", "small-ae", "--rows", 1_281_167, "--against", old)
    assert ending.code == 0, ending.stderr
    assert "ratio" in ending.stdout and "h/epoch" in ending.stdout
    assert max(map(len, ending.stdout.splitlines())) <= 80


def test_ratios_to_an_older_document_and_code_8_below_the_one_asked_for(tmp_path):
    old, which = tmp_path / "old.json", ("--preset", "small-ae", "--work", "decode,encode")
    found = document(*which)
    for factor, code in ((1e-3, 0), (1e3, 8)):
        changed = [row | {"images_per_s": factor * row["images_per_s"]} for row in found["rows"]]
        old.write_text(json.dumps(found | {"rows": changed[:1]}))
        ending = ldm("bench", *QUICK, *which, "--json", "--against", old, "--fail-below", 0.5)
        assert ending.code == code, ending.stderr
        first, second = ending.json["rows"]
        assert second["ratio"] is None
        assert first["ratio"] == pytest.approx(first["images_per_s"] / changed[0]["images_per_s"])
    assert "small-ae encode, batch 2" in ending.line and "--fail-below 0.5" in ending.line


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--fail-below", 1], 2, "--fail-below: needs --against"),
        (["--tiny"], 2, "--tiny: belongs to --suite"),
        (["--work", "dream"], 2, "choose among train, sample, encode, decode"),
        (["--preset", "small-ae", "--work", "sample"], 2, "is an autoencoder"),
        (["--preset", "smal"], 2, "did you mean small"),
        (["--recipe", "cin256-classifier-none"], 2, "no such file or recipe"),
        (["--model", "nowhere"], 4, "nowhere"),
        (["--batch-size", "0"], 2, "at least 1"),
        (["--batch-size", "1,,2"], 2, "--batch-size 1,,2: whole numbers with commas between"),
        (["--batch-size", "4,1", "--gpus", 2], 2, "--batch-size 1: must be at least 2, one for each of 2 processes"),
        (["--rows", "-1"], 2, "--rows -1: must be at least 0"),
        (["--work", "decode", "--against", "nothing.json"], 3, "no document of `ldm bench --json`"),
    ],
)
def test_a_mistake_is_one_line(words, code, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch, "_run", lambda *given: pytest.fail("processes were started"))
    ending = ldm("bench", *QUICK, *words)
    assert (ending.code, said in ending.line) == (code, True), ending.stderr


@pytest.mark.parametrize(
    "words",
    [["--preset", "small"], ["--recipe", "x"], ["--model", "x"], ["--set", "train.lr=1"], ["--compile"]]
    + [["--mixed-precision", "no"]],
)
def test_the_suite_refuses_what_it_would_not_heed(words):
    ending = ldm("bench", "--suite", "gpu", "--tiny", *words)
    assert ending.code == 2 and f"leave {words[0]} out" in ending.line, ending.stderr


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema": "ldm-bench-1"}',
        '{"schema": "ldm-bench-1", "machine": {}, "versions": {}, "rows": [1]}',
    ],
)
def test_what_is_no_earlier_document_is_refused_before_anything_is_measured(text, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "bench", lambda request: pytest.fail("measured"))
    old = tmp_path / "old.json"
    old.write_text(text)
    ending = ldm("bench", *QUICK, "--against", old)
    assert ending.code == 3 and "no document of `ldm bench --json`" in ending.line


def test_the_slowest_row_is_named_where_several_are_as_slow():
    row = {"model": "a", "work": "train", "batch": 2, "ratio": 0.5}
    with pytest.raises(ThresholdError, match="a train, batch 2: 0.5 times .* and 1 more"):
        studies.check_ratios([row, row | {"work": "sample"}], 0.9)


def test_runs_are_measured_with_their_own_settings_and_conditions(tiny_runs):
    found = document("--model", tiny_runs["text"], "--model", tiny_runs["inpaint"], "--size", "20x20")
    assert [(row["model"], row["work"]) for row in found["rows"]] == [
        ("text", "train"),
        ("text", "sample"),
        ("inpaint", "train"),
        ("inpaint", "sample"),
    ]
    assert {tuple(row["latent"]) for row in found["rows"]} == {(3, 5, 5)}
    assert found["rows"][1]["sampling_steps"] == found["rows"][1]["network_calls"] == 2
    ending = ldm("bench", *QUICK, "--model", tiny_runs["text"], "--set", "diffusion.channels=8")
    assert ending.code == 2 and "diffusion.channels: a trained model keeps it" in ending.line


def test_every_preset_and_recipe_can_be_asked_for():
    given = command.bench.options  # the options, as a command line without any gives them
    values = dict.fromkeys(given)
    parsed = command.ParsedOptions(values, given, "bench", [])
    for name, preset in config.presets().items():
        one = command._preset(name, parsed)
        wanted = preset.extra.get("first_stage")
        assert one.kind == preset.kind
        assert (one.first_stage is not None) == (preset.kind == "diffusion")
        if wanted:
            usual = config.defaults("autoencoder")["autoencoder.reg"]
            assert one.first_stage.autoencoder.reg == config.presets()[wanted].values.get("autoencoder.reg", usual)
    kinds = set()
    for path in sorted(config.RECIPES.glob("*.toml")):
        try:
            kinds.add(command._recipe(path.stem, parsed).kind)
        except command.UsageError as error:
            assert "a classifier" in str(error)
    assert kinds == {"autoencoder", "diffusion"}
    for name, f in (("ldm32-celebahq", 32), ("ldm8-celebahq", 8), ("ldm1-celebahq", None)):
        stage = command._recipe(name, parsed).first_stage
        assert (stage and stage.autoencoder.f) == f


# --- what is measured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["autoencoder", "diffusion"])
def test_a_measured_step_is_the_loops_own(kind, tmp_path):
    """It updates weights by the optimiser that settings name, and their average; nothing is saved or logged."""
    values = {"loss.disc_weight": 0.5, "loss.disc_layers": 1, "loss.perceptual_weight": 1.0, "data.size": (32, 32)}
    values |= {"loss.perceptual": "squeeze", "condition.kinds": ("text",)}
    subject, dist = subject_of(asked(kind, **values), tmp_path)
    network = subject.stage.network if kind == "autoencoder" else subject.diffusion.network
    before = {name: p.clone() for name, p in network.named_parameters()}
    with opened_training(subject, dist, 4, tmp_path / "run") as trainer:
        phases = trainer.objective.phases(1)
        trainer.step()
        trainer.step()
        assert trainer.progress.step == 3 and trainer.state.ema.count == 2
        assert len(phases) == (2 if kind == "autoencoder" else 1)
        for phase in phases:
            assert trainer.state.optimizers[phase].state_dict()
    assert any(not torch.equal(before[name], p) for name, p in network.named_parameters())
    assert not any(p.requires_grad for p in network.parameters()) and not network.training
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"condition.kinds": ()},
        {"condition.kinds": ("class",), "sample.guidance": 3.0},
        {"condition.kinds": ("text", "map"), "sample.guidance": 3.0, "sample.sampler": "heun"},
        {"task.name": "inpaint"},
    ],
    ids=["nothing", "guided", "two samples a step", "inpainting"],
)
def test_flops_of_a_draw_are_those_that_it_does(values, tmp_path):
    values = {"diffusion.attention_resolutions": (), "diffusion.middle_attention": False, **values}
    subject, dist = subject_of(asked(**values), tmp_path)
    meter = Meter(subject, dist, 1, BenchRequest(asked=(subject.asked,), steps=3, seconds=0.01), {"float32": 1e9})
    row = meter.sample()
    with FlopCounterMode(display=False) as counter:
        inputs = example_inputs(subject, 1)
        draw_images(subject.diffusion, Draw(ids=[0], inputs=inputs, settings={"steps": 3}))
    done = counter.get_total_flops()
    # the second embedding, of the null, is left out
    assert row["flops_per_image"] == pytest.approx(done, rel=0.05)
    assert row["network_calls"] == (5 if values.get("sample.sampler") == "heun" else 3)


def test_weights_are_drawn_from_a_seed_of_their_own(tmp_path):
    """Neither the global generator is moved, nor do two measurements differ in weights."""
    before = torch.random.get_rng_state()
    first, second = (subject_of(asked(), tmp_path)[0] for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    for a, b in zip(first.diffusion.network.parameters(), second.diffusion.network.parameters()):
        assert torch.equal(a, b)


def test_the_first_calls_do_not_count_and_the_median_of_the_rounds_is_given(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ldmcli.studies.bench_timing.time.perf_counter", lambda: now[0])
    takes = iter([5.0, 5.0, 1.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0])

    def work():
        now[0] += next(takes)

    found = timed(work, 7.0, Distributed(TrainSettings(mixed_precision="no")))
    # one warm-up of 5 s and one that is timed for the plan; then rounds, one of which was disturbed
    assert found.seconds == 1.0 or found.seconds == 3.0
    assert found.spread >= 0


def test_a_model_that_does_not_fit_leaves_the_others(monkeypatch, capsys):
    def fails(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Meter, "sample", fails)
    one = asked()
    other = replace(one, name="other", kind="autoencoder", config=small("autoencoder"))
    found = bench(BenchRequest(asked=(one, other), batch_sizes=(2,), seconds=0.01, works=()))
    assert {row["model"] for row in found["rows"]} == {"other"}
    assert "memory ran out" in capsys.readouterr().err


def test_the_suite_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ending = ldm("bench", "--suite", "gpu")
    assert ending.code == 6 and "no GPU is here; --tiny tries" in ending.line


def test_the_suite_begins_no_compiler_late(monkeypatch, capsys):
    """What is measured, by a clock that goes a hundred seconds a measurement."""
    seen, now = [], [0.0]

    def measured(request):
        seen.extend((one.name, one.variant) for one in request.asked)
        now[0] += 100
        return {"rows": [], "product_flops_per_s": {}}

    monkeypatch.setattr(bench_suite, "bench", measured)
    monkeypatch.setattr(bench_suite.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    bench_suite.gpu_suite(BenchRequest(asked=()))
    assert ("cin256-v2", "TF32") in seen and len(seen) == 7
    assert not any(variant == "compiled" for _, variant in seen)
    assert "lsun_beds256, compiled, is left out" in capsys.readouterr().err


def test_the_suite_of_a_gpu_runs_with_tiny_networks(monkeypatch):
    kept = [entry for entry in bench_suite.SUITE if entry[0] in ("cin256-v2", "kl-f8")]
    monkeypatch.setattr(bench_suite, "SUITE", tuple(kept))
    found = ldm("bench", "--suite", "gpu", "--tiny", "--json").json
    SCHEMA.validate(found)
    assert {row["model"] for row in found["rows"]} == {"cin256-v2", "kl-f8"}
    assert {row["work"] for row in found["rows"]} == {"train", "sample", "encode", "decode"}
