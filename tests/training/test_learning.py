"""What training learns and what it must never do, through `ldm train-ae` and `ldm train-ldm`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import squeezenet
from PIL import Image
from processes import ranks
from tiny import ADAM, QUIET_LOOP, SHAPES, checkpoint, ldm, log, pictures, same, state, train_ae, train_ldm, weights

from ldmcli.conditions import CONDITIONS
from ldmcli.core.settings import ConditionSettings
from ldmcli.training import optimizer
from ldmcli.training.diffusion import DiffusionObjective
from ldmcli.training.distributed import autocast_dtype

ASKED = [name for name, one in CONDITIONS.items() if one.user_given]

NO_RECONSTRUCTION = ("--set", "loss.l1=0", "--set", "loss.l2=0", "--set", "loss.edge=0", "--set", "loss.kl_weight=0")
DISCRIMINATOR = (
    "--set",
    "loss.disc_weight=1",
    "--set",
    "loss.disc_start=5",
    "--set",
    "loss.disc_channels=8",
    "--set",
    "loss.disc_layers=1",
)


def spoil(monkeypatch, objective, steps, network_input):
    """Puts a NaN into the batch of the given steps."""
    whole = objective.batch

    def batch(self, step):
        found = whole(self, step)
        if step in steps:
            found[network_input] = found[network_input].float()
            found[network_input][0] = float("nan")
        return found

    monkeypatch.setattr(objective, "batch", batch)


# --- reliability 11: NaN and Inf ----------------------------------------------------------------------------------


def test_a_nan_batch_leaves_weights_average_and_optimiser_as_they_were(ae, tmp_path, monkeypatch):
    """Reliability 11: the step is not applied, its samples are named, and the run goes on."""
    train_ldm(tmp_path / "whole", ae, *ADAM, steps=2)
    spoil(monkeypatch, DiffusionObjective, {2}, "noise")
    ending = train_ldm(tmp_path / "spoiled", ae, *ADAM, steps=3)
    assert same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "spoiled"))
    assert "step 2: NaN or Inf, the update was not applied" in ending.stderr
    named = json.loads((tmp_path / "spoiled" / "bad-batch.json").read_text())
    assert named["step"] == 2 and len(named["rows"]) == 4
    assert any(line.get("event") == "not applied: NaN or Inf" for line in log(tmp_path / "spoiled"))


def test_nan_in_every_step_ends_with_code_5_and_the_last_good_checkpoint_stands(ae, tmp_path, monkeypatch):
    """Reliability 11: K in a row end with code 5 and a diagnosis file; the state is diverged; what was saved loads."""
    spoil(monkeypatch, DiffusionObjective, range(2, 99), "noise")
    more = ("--save-every", 2, "--set", "train.max_bad_steps=3")
    ending = train_ldm(tmp_path / "run", ae, *more, steps=20, code=5)
    assert "3 steps in a row" in ending.line and "bad-batch.json" in ending.line
    assert state(tmp_path / "run")["state"] == "diverged" and state(tmp_path / "run")["exit_code"] == 5
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint(tmp_path / "run").values())


def test_a_learning_rate_of_a_million_writes_no_weight_that_is_not_finite(ae, tmp_path):
    """Reliability 11: whatever such a run does, code 0 or 5, nothing that is NaN or Inf is ever stored."""
    ending = ldm(
        "train-ldm",
        "--autoencoder",
        ae,
        *SHAPES,
        *QUIET_LOOP,
        *ADAM,
        "--lr",
        "1e6",
        "--steps",
        12,
        "--save-every",
        1,
        "--set",
        "train.max_bad_steps=3",
        "--set",
        "train.adam_lr=1e6",
        "--set",
        "diffusion.channels=16",
        "--set",
        "diffusion.channel_mult=1",
        "--set",
        f"data.cache_dir={tmp_path / 'cache'}",
        "--out",
        tmp_path / "run",
    )
    assert ending.code in (0, 5), ending.stderr
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint(tmp_path / "run").values())
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run").values())


def test_weights_that_are_not_finite_are_never_saved_over_good_ones(ae, tmp_path, monkeypatch):
    """Reliability 11: weights spoiled behind the loop's back end the run with code 5 before they reach a checkpoint."""

    def after_update(self, step):
        if step == 3:
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("inf"))
        return {}

    monkeypatch.setattr(DiffusionObjective, "after_update", after_update)
    ending = train_ldm(tmp_path / "run", ae, "--save-every", 2, "--keep", 1, steps=4, code=5)
    assert "not saved" in ending.line
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint(tmp_path / "run").values())


def test_a_discriminator_update_that_is_refused_does_not_hold_back_the_average(tmp_path, monkeypatch):
    """Reliability 11, 15: the average follows each update of the autoencoder, whatever the discriminator does."""
    from ldmcli.training import autoencoder

    more = (*DISCRIMINATOR, "--set", "loss.disc_start=1")
    spoiled = lambda real, made, kind: (real.mean() + made.mean()) * float("nan")  # noqa: E731
    monkeypatch.setattr(autoencoder, "discriminator_loss", spoiled)
    train_ae(tmp_path / "spoiled", *more, steps=3)
    count = json.loads(next((tmp_path / "spoiled" / "checkpoints").glob("*/state.json")).read_text())["ema_count"]
    assert count == 3


def spoil_one_process() -> None:
    """A NaN in the noise of step 1, on the second process alone."""
    whole = DiffusionObjective.batch

    def batch(self, step):
        found = whole(self, step)
        if step == 1 and self.dist.rank == 1:
            found["noise"][0] = float("nan")
        return found

    DiffusionObjective.batch = batch


def test_a_bad_batch_on_one_process_stops_the_step_on_both(ae, tmp_path):
    """Reliability 11: all processes take the same decision, so training goes on with equal weights."""
    args = [
        "train-ldm",
        "--autoencoder",
        ae,
        *SHAPES,
        *QUIET_LOOP,
        "--steps",
        3,
        "--out",
        tmp_path / "run",
        "--set",
        "diffusion.channels=16",
        "--set",
        "diffusion.channel_mult=1",
        "--set",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]
    both = ranks(tmp_path, 2, *args, before=spoil_one_process)
    assert [command.wait() for command in both] == [0, 0], both[0].stderr + both[1].stderr
    said = [command.stderr for command in both]
    assert "step 1: NaN or Inf, the update was not applied (1 in a row" in said[0]
    assert state(tmp_path / "run")["state"] == "finished" and state(tmp_path / "run")["step"] == 3
    assert len(json.loads((tmp_path / "run" / "bad-batch.json").read_text())["rows"]) == 4


# --- reliability 12: one loss term at a time ----------------------------------------------------------------------


def moved(before: dict, after: dict, part: str) -> bool:
    names = [name for name in before if name.startswith(part)]
    assert names
    return any(not torch.equal(before[name], after[name]) for name in names)


def parts_moved(tmp_path, *more, parts=("autoencoder.encoder", "autoencoder.decoder"), steps=(4, 8), log_every=1):
    """Which parts change between two checkpoints of one run, and its log."""
    train_ae(tmp_path / "run", *more, "--save-every", steps[0], "--keep", 9, "--log-every", log_every, steps=steps[1])
    from safetensors.torch import load_file

    stored = [
        {
            f"{file.stem}.{k}": v
            for file in (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").glob("*.s*")
            for k, v in load_file(file).items()
        }
        for step in steps
    ]
    return [moved(*stored, part) for part in parts], log(tmp_path / "run")


@pytest.mark.parametrize("term", ["l1", "l2", "edge"])
def test_a_pixel_term_alone_changes_encoder_and_decoder(tmp_path, term):
    """Reliability 12: one reconstruction term, all others 0."""
    changed, lines = parts_moved(tmp_path, *NO_RECONSTRUCTION, "--set", f"loss.{term}=1", steps=(1, 2))
    assert changed == [True, True]
    assert lines[0]["grad_nll"] > 0


def test_a_perceptual_term_alone_changes_encoder_and_decoder(tmp_path):
    """Reliability 12: the perceptual distance has a gradient, and its norm is in the log."""
    backbone = squeezenet(tmp_path / "backbone.safetensors")
    changed, lines = parts_moved(
        tmp_path,
        *NO_RECONSTRUCTION,
        "--set",
        "loss.perceptual_weight=1",
        "--set",
        f"loss.perceptual={backbone}",
        "--size",
        32,
        steps=(1, 2),
    )
    assert changed == [True, True]
    assert lines[0]["grad_perceptual"] > 0


def test_an_adversarial_term_alone_changes_the_autoencoder_once_the_discriminator_starts(tmp_path):
    """Reliability 12: before its start neither moves; after it both do, at a finite weight, norm in the log."""
    more = (*NO_RECONSTRUCTION, *DISCRIMINATOR)
    parts = ("autoencoder.encoder", "autoencoder.decoder", "discriminator.")
    before, _ = parts_moved(tmp_path / "before", *more, parts=parts, steps=(2, 4))
    after, lines = parts_moved(tmp_path / "after", *more, parts=parts, steps=(4, 8))
    assert before == [False, False, False]
    assert after == [True, True, True]
    assert np.isfinite(lines[-3]["d_weight"]) and lines[-3]["grad_g"] > 0


def test_the_discriminator_stands_still_before_its_start_and_moves_after_it(tmp_path):
    """Reliability 12: with reconstruction terms beside it the adaptive weight is finite and logged."""
    standing, _ = parts_moved(tmp_path / "before", *DISCRIMINATOR, parts=("discriminator.",), steps=(1, 4))
    moving, lines = parts_moved(tmp_path / "after", *DISCRIMINATOR, parts=("discriminator.",), steps=(4, 8))
    assert standing == [False] and moving == [True]
    late = [line for line in lines if line["step"] > 6 and "d_weight" in line]
    assert late and all(0 < line["d_weight"] <= 1e4 for line in late)
    assert all(line["grad_nll"] > 0 and line["grad_g"] > 0 for line in late)


def test_the_kl_term_alone_changes_the_encoder(tmp_path):
    """Reliability 12: the regulariser of a KL model reaches the encoder (the decoder has no part in it)."""
    more = ("--set", "loss.l1=0", "--set", "loss.l2=0", "--set", "loss.edge=1e-30", "--set", "loss.kl_weight=100")
    changed, lines = parts_moved(tmp_path, *more, parts=("autoencoder.encoder",), steps=(1, 2))
    assert changed == [True]
    assert lines[0]["kl_loss"] > 0


def test_vq_training_logs_the_use_of_its_codebook_and_moves_the_codes(tmp_path):
    """Reliability 12: used share and perplexity stand in the log; the codebook term reaches the codes."""
    more = ("--reg", "vq", "--codebook-size", 32)
    changed, lines = parts_moved(tmp_path, *more, parts=("autoencoder.quantize", "autoencoder.encoder"), steps=(1, 2))
    assert changed == [True, True]
    assert 0 < lines[0]["code_usage"] <= 1 and 1 <= lines[0]["perplexity"] <= 32
    assert lines[0]["codes_used"] == pytest.approx(lines[0]["code_usage"] * 32)


def test_codes_that_nobody_uses_are_revived(tmp_path):
    """VQ: with a codebook far larger than a batch most codes are dead; revival draws them anew and says how many."""
    more = ("--reg", "vq", "--codebook-size", 256, "--log-every", 1, "--no-ema")[:-1]
    train_ae(tmp_path / "left", *more, steps=2)
    train_ae(tmp_path / "revived", *more, "--set", "autoencoder.revive_codes=2", steps=2)
    counts = [line.get("revived", 0) for line in log(tmp_path / "revived")]
    assert max(counts) > 0 and not any(line.get("revived") for line in log(tmp_path / "left"))
    books = [checkpoint(tmp_path / name)["autoencoder.quantize.embedding.weight"] for name in ("left", "revived")]
    assert int((books[0] != books[1]).any(dim=1).sum()) == max(counts)


# --- reliability 14: the batch is the batch -----------------------------------------------------------------------


def distance(a: dict, b: dict) -> float:
    """Relative distance of two sets of weights."""
    a, b = (torch.cat([tensors[k].double().flatten() for k in sorted(tensors)]) for tensors in (a, b))
    return float((a - b).norm() / b.norm())


def twelve(out: Path, ae: Path, *more) -> dict:
    """Five updates of 12 samples on 20 rows (60 = 3 epochs); trained weights without the average."""
    train_ldm(
        out,
        ae,
        *ADAM,
        "--batch-size",
        12,
        "--lr",
        "1e-3",
        "--set",
        "train.warmup=3",
        "--log-every",
        1,
        "--condition",
        "class",
        *more,
        steps=5,
    )
    return {name: tensor for name, tensor in checkpoint(out).items() if name.startswith("model.")}


def test_accumulation_and_processes_do_not_change_what_is_learned(ae, tmp_path):
    """Reliability 14: 12 x 1, 4 x 3 accumulated and 2 processes x 3 x 2 end at the same weights and rates; a log line
    is an optimiser update. 20 rows in batches of 12: epochs end inside an update."""
    whole = twelve(tmp_path / "whole", ae)
    parts = twelve(tmp_path / "parts", ae, "--micro-batch", 4)
    odd = twelve(tmp_path / "odd", ae, "--micro-batch", 5)
    from tiny import UNET

    cache = ("--set", f"data.cache_dir={tmp_path / 'cache'}")
    two = ranks(
        tmp_path,
        2,
        "train-ldm",
        "--autoencoder",
        ae,
        *SHAPES,
        *UNET,
        *QUIET_LOOP,
        *cache,
        *ADAM,
        "--batch-size",
        12,
        "--lr",
        "1e-3",
        "--set",
        "train.warmup=3",
        "--log-every",
        1,
        "--condition",
        "class",
        "--micro-batch",
        3,
        "--steps",
        5,
        "--out",
        tmp_path / "two",
    )
    assert [command.wait() for command in two] == [0, 0], two[0].stderr + two[1].stderr
    spread = {name: tensor for name, tensor in checkpoint(tmp_path / "two").items() if name.startswith("model.")}
    # sums in another order leave 2e-7 after five updates; a part with a wrong weight would leave 1e-3
    assert distance(parts, whole) < 1e-5 and distance(odd, whole) < 1e-5 and distance(spread, whole) < 1e-5
    rates = [
        [line["lr_factor"] for line in log(tmp_path / name) if "lr_factor" in line]
        for name in ("whole", "parts", "odd", "two")
    ]
    assert len(rates[0]) == 5 and all(each == pytest.approx(rates[0]) for each in rates)
    counts = {
        json.loads(next((tmp_path / name / "checkpoints").glob("*/state.json")).read_text())["ema_count"]
        for name in ("whole", "parts", "odd", "two")
    }
    assert counts == {5}


# --- reliability 15: the average ----------------------------------------------------------------------------------


@pytest.mark.parametrize("half, pays", [(1.0, True), (1.9, False)])
def test_bfloat16_is_taken_where_a_product_takes_less_time(monkeypatch, half, pays):
    """Reliability 15: `auto` on a CPU goes by what a product takes, and by the instruction that it needs."""
    seconds = {torch.bfloat16: half, torch.float32: 2.0}
    monkeypatch.setattr(optimizer, "product_seconds", seconds.get)
    optimizer.bf16_is_fast.cache_clear()
    found = autocast_dtype("auto", torch.device("cpu"))
    optimizer.bf16_is_fast.cache_clear()
    assert found is (torch.bfloat16 if pays and torch.ops.mkldnn._is_mkldnn_bf16_supported() else None)


@pytest.mark.parametrize("native, expected", [(True, torch.bfloat16), (False, torch.float16)])
def test_on_nvidia_auto_is_the_short_format_that_its_units_have(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    optimizer.bf16_is_fast.cache_clear()
    found = autocast_dtype("auto", torch.device("cuda"))
    optimizer.bf16_is_fast.cache_clear()
    assert found is expected


@pytest.fixture(scope="module")
def averaged(ae, tmp_path_factory) -> Path:
    """200 updates of 2 images in bfloat16 autocast."""
    run = tmp_path_factory.mktemp("averaged") / "run"
    more = ("--mixed-precision", "bf16", "--batch-size", 2, "--set", "train.ema_decay=0.999")
    train_ldm(run, ae, *ADAM, *more, steps=200)
    return run


def test_average_and_trained_weights_are_float32_on_disk_and_have_moved(averaged, ae, tmp_path):
    """Reliability 15: bf16 is the format of the arithmetic, never of what is kept."""
    stored = checkpoint(averaged)
    train_ldm(tmp_path / "start", ae, *ADAM, "--mixed-precision", "bf16", "--batch-size", 2, steps=1)
    start = checkpoint(tmp_path / "start")
    for kind in ("ema.", "model."):
        own = {name: tensor for name, tensor in stored.items() if name.startswith(kind)}
        assert own and all(tensor.dtype == torch.float32 for tensor in own.values() if tensor.is_floating_point())
        still = [name for name in own if own[name].is_floating_point() and torch.equal(own[name], start[name])]
        assert not still
    state = json.loads(next((averaged / "checkpoints").glob("*/state.json")).read_text())
    assert state["ema_count"] == state["step"] == 200 and state["precision"] == "bfloat16"


def test_sample_takes_the_average_unless_told_and_names_which(averaged, tmp_path):
    """Reliability 15: raw and averaged weights give different pictures, and the document and each picture say which."""
    asked = ("sample", "--model", averaged, "-n", 2, "--steps", 3, "--json")
    usual = ldm(*asked, "--out", tmp_path / "usual")
    raw = ldm(*asked, "--weights", "raw", "--out", tmp_path / "raw")
    assert (usual.code, raw.code) == (0, 0)
    assert (usual.json["weights"], raw.json["weights"]) == ("ema", "raw")
    assert usual.json["model_sha256"] != raw.json["model_sha256"]
    assert not np.array_equal(pictures(tmp_path / "usual")[0], pictures(tmp_path / "raw")[0])
    stored = json.loads(Image.open(tmp_path / "raw" / "000000.png").text["ldm"])
    assert stored["weights"] == "raw"


def test_without_the_averaged_weights_sample_ends_with_code_4(averaged, tmp_path):
    """Reliability 15: a missing average is refused, never replaced in silence; so is raw without a checkpoint."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(averaged, copy)
    (copy / "model.safetensors").unlink()
    ending = ldm("sample", "--model", copy, "-n", 1, "--out", tmp_path / "out")
    assert ending.code == 4 and "model.safetensors: missing" in ending.line
    shutil.rmtree(copy / "checkpoints")
    ending = ldm("sample", "--model", copy, "-n", 1, "--weights", "raw", "--out", tmp_path / "out")
    assert ending.code == 4 and "no complete checkpoint" in ending.line
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.png"))


def test_a_checkpoint_without_its_average_is_not_gone_on_from(averaged, tmp_path):
    """Reliability 15: a deleted ema.safetensors makes a checkpoint incomplete: it is named, never filled up."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(averaged, copy)
    next((copy / "checkpoints").glob("*/ema.safetensors")).unlink()
    ending = ldm("sample", "--model", copy, "-n", 1, "--weights", "raw", "--out", tmp_path / "out")
    assert ending.code == 4 and "ema.safetensors is missing" in ending.stderr


# --- reliability 17: the scale of the latents ---------------------------------------------------------------------


def sorted_images(folder: Path) -> Path:
    """40 pictures sorted by brightness: the first ones are all black."""
    folder.mkdir()
    for k in range(40):
        noise = np.random.default_rng(k).integers(0, 256, (20, 20, 3))
        pixels = np.zeros_like(noise) if k < 12 else np.clip(noise * k / 40, 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k:02d}.png")
    return folder


@pytest.mark.parametrize("kind", ["per_channel", "global"])
def test_latents_as_trained_on_have_unit_spread_whatever_the_first_stage_gives(ae, tmp_path, kind):
    """Reliability 17: a first stage with std 10 and data that begins all black; the scale counts every image, is
    stored, and use takes it from the run."""
    import shutil

    import ldmcli

    loud = tmp_path / "loud"
    shutil.copytree(ae, loud)
    tensors = weights(loud)
    from ldmcli.core import files
    from ldmcli.core.config import config_hash
    from ldmcli.formats.run_folder import read_config

    for name in tensors:
        if name.startswith("quant_conv"):
            tensors[name][:3] *= 10  # the means; the log-variances stay
    files.save_tensors(
        loud / "model.safetensors", tensors, {"config_sha256": config_hash(read_config("autoencoder", loud))}
    )
    folder = sorted_images(tmp_path / "data")
    data = ("--data", folder, "--size", 20)
    train_ldm(tmp_path / "run", loud, "--set", f"diffusion.latent_scale={kind}", data=data, steps=2)
    model = ldmcli.load(tmp_path / "run")
    pictures = [Image.open(path) for path in sorted(folder.iterdir())]
    z = model.autoencoder.encode(pictures, sample=torch.Generator().manual_seed(0))
    assert 0.8 < float(z.std()) < 1.2
    stored = json.loads((tmp_path / "run" / "stats.json").read_text())["latent_scale"]
    assert stored["kind"] == kind and stored["images"] >= 30


def test_a_run_refuses_another_first_stage_than_it_was_trained_with(ae, tmp_path):
    """Reliability 17: the autoencoder is known by its fingerprint, in use and when training goes on."""
    import shutil

    other = tmp_path / "other"
    train_ae(other, "--seed", 1)
    run = tmp_path / "run"
    train_ldm(run, ae)
    ending = train_ldm(run, other, steps=6, code=4)
    assert "autoencoder" in ending.line
    shutil.copy(other / "model.safetensors", run / "autoencoder" / "model.safetensors")
    ending = ldm("sample", "--model", run, "-n", 1, "--out", tmp_path / "out")
    assert ending.code == 4 and "not the autoencoder that this model was trained with" in ending.line


# --- reliability 20: looking changes nothing ----------------------------------------------------------------------

DROPOUT = ("--set", "diffusion.dropout=0.5", "--condition", "class", "--set", "sample.n=4", "--set", "sample.steps=3")


@pytest.fixture(scope="module")
def looked_at(ae, tmp_path_factory) -> Path:
    """A model with dropout, previewed and evaluated at every step."""
    run = tmp_path_factory.mktemp("looked") / "run"
    train_ldm(run, ae, *DROPOUT, "--sample-every", 1, "--eval-every", 1, steps=4)
    return run


def test_previews_and_evaluations_leave_the_weights_as_they_were(looked_at, ae, tmp_path):
    """Reliability 20: with dropout 0.5, previews at every step or none: equal weights, bit for bit."""
    train_ldm(tmp_path / "unseen", ae, *DROPOUT, steps=4)
    assert same(checkpoint(looked_at), checkpoint(tmp_path / "unseen"))


def test_training_with_dropout_goes_on_exactly_where_it_was(looked_at, ae, tmp_path):
    """Reliability 20: the numbers of dropout, too, follow from the seed and the step."""
    train_ldm(tmp_path / "run", ae, *DROPOUT, steps=2)
    torch.manual_seed(99)
    train_ldm(tmp_path / "run", ae, *DROPOUT, steps=4)
    assert same(checkpoint(looked_at), checkpoint(tmp_path / "run"))


def test_a_preview_is_what_sample_gives(looked_at, tmp_path):
    """Reliability 20: the run's own grid and `ldm sample` with its seed and classes are the same picture."""
    request = json.loads((looked_at / "stats.json").read_text())["preview"]["classes"]
    args = [part for value in request for part in ("--class", value)]
    ending = ldm("sample", "--model", looked_at, *args, "--out", tmp_path / "out")
    assert ending.code == 0, ending.stderr
    drawn = pictures(tmp_path / "out")
    grid = np.asarray(Image.open(max((looked_at / "samples").iterdir())).convert("RGB"))
    missing = [k for k, picture in enumerate(drawn) if not holds(grid, picture)]
    assert len(drawn) == 4 and not missing


def holds(grid: np.ndarray, picture: np.ndarray) -> bool:
    h, w = picture.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(grid, (h, w, 3))[:, :, 0]
    return bool((windows == picture).all(axis=(-1, -2, -3)).any())


# --- everything that has weights learns ---------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", ["none", *ASKED, "+".join(ASKED)])
def test_every_parameter_of_the_trained_model_gets_a_finite_gradient(ae, tmp_path, monkeypatch, kinds):
    """Each condition of the registry, alone and all together: nothing is left out of training."""
    from ldmcli.training.optimizer import PhaseOptimizer

    seen: dict[str, float] = {}
    step = PhaseOptimizer.step

    def watched(self, factor, *more):
        for name, parameter in self.named:
            assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all()), name
            found = 0.0 if parameter.grad is None else float(parameter.grad.abs().sum())
            seen[name] = seen.get(name, 0.0) + found
        step(self, factor, *more)

    monkeypatch.setattr(PhaseOptimizer, "step", watched)
    train_ldm(tmp_path / "run", ae, *ADAM, "--condition", kinds, "--batch-size", 8, steps=6)
    assert seen and [name for name, total in seen.items() if total == 0] == []


@pytest.mark.parametrize("reg", ["kl", "vq"])
def test_every_parameter_of_an_autoencoder_gets_a_finite_gradient(tmp_path, monkeypatch, reg):
    """Also with a discriminator beside it."""
    from ldmcli.training.optimizer import PhaseOptimizer

    seen: dict[str, float] = {}
    step = PhaseOptimizer.step

    def watched(self, factor, *more):
        for name, parameter in self.named:
            assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all()), name
            seen[name] = seen.get(name, 0.0) + (0.0 if parameter.grad is None else float(parameter.grad.abs().sum()))
        step(self, factor, *more)

    monkeypatch.setattr(PhaseOptimizer, "step", watched)
    train_ae(tmp_path / "run", "--reg", reg, *DISCRIMINATOR, "--set", "loss.disc_start=1", *ADAM, steps=6)
    assert seen and [name for name, total in seen.items() if total == 0] == []


EXAMPLES = {
    "class": [0, "square", 2],
    "text": ["a red circle", "a square", ""],
    "layout": [{"bbox": [[0, 0, 0.5, 0.5]], "category": ["star"]}, {"bbox": [[0.1, 0, 0.9, 1]], "category": [2]}],
    "map": [np.full((20, 20), k, np.uint8) for k in (1, 7)],
}


@pytest.fixture(scope="module")
def told(ae, tmp_path_factory):
    """A model that is told everything of the registry, loaded."""
    import ldmcli

    run = tmp_path_factory.mktemp("told") / "run"
    train_ldm(run, ae, "--condition", "+".join(ASKED))
    return ldmcli.load(run)


def test_every_condition_has_an_example_here():
    """A new word in ASKED needs a value to be tested with."""
    assert EXAMPLES.keys() == set(ASKED)


@pytest.mark.parametrize("kind", ASKED)
def test_a_condition_prepares_rows_alone_as_together_and_has_a_null_of_its_own(told, kind):
    """The contract of what --condition names: n rows in, n rows out, the same whoever stands beside them; the null
    has the same form and another meaning."""
    entry, values = told.network.conditions.entries[kind], EXAMPLES[kind][:2]
    together, alone = entry.prepare(values), entry.prepare(values[1:])
    null = entry.null(2, together)
    assert together.keys() == null.keys() and CONDITIONS[kind].column and CONDITIONS[kind].option
    for name, tensor in together.items():
        assert len(tensor) == 2 and torch.equal(tensor[1:], alone[name])
        assert null[name].shape == tensor.shape and null[name].dtype == tensor.dtype
    where = ((4, 4),) if entry.takes_size else ()  # the latent's size
    with torch.no_grad():
        given, without = entry(together, *where), entry(null, *where)
    for part in ("context", "concat", "vector"):
        a, b = getattr(given, part), getattr(without, part)
        assert (a is None) == (b is None)
        assert a is None or not torch.equal(a, b)


@pytest.mark.parametrize("kind", ASKED)
def test_a_condition_that_is_dropped_is_its_null_and_the_others_stay(told, kind):
    """Dropping acts on one kind and on the rows that are marked."""
    conditions = told.network.conditions
    inputs = conditions.prepare({name: values[:2] for name, values in EXAMPLES.items()})
    null = conditions.null(2, inputs)
    dropped = {name: torch.tensor([name == kind, False]) for name in ASKED}
    found = conditions.drop(inputs, dropped)
    for name, tensor in found.items():
        expected = null[name] if name.startswith(f"{kind}.") else inputs[name]
        assert torch.equal(tensor[0], expected[0]) and torch.equal(tensor[1], inputs[name][1])


def test_a_condition_is_dropped_in_a_tenth_of_ten_thousand_draws(ae, tmp_path, monkeypatch):
    """Reliability 19: the measured drop rate of the batches that training sees is 10 ± 1 %, each kind for itself."""
    kept = {}
    whole = DiffusionObjective.batch

    def batch(self, step):
        kept["objective"] = self
        return whole(self, step)

    monkeypatch.setattr(DiffusionObjective, "batch", batch)
    train_ldm(tmp_path / "run", ae, "--condition", "class+text", steps=1)
    objective = kept["objective"]
    from dataclasses import replace

    objective.config = replace(objective.config, train=replace(objective.config.train, batch_size=2500))
    found = [whole(objective, step) for step in range(4)]
    null_class = len(objective.specs["class"]["class_names"])
    empty = objective.model.conditions.entries["text"].null(1)["ids"]
    without_class = torch.cat([b["condition.class.label"] == null_class for b in found])
    without_text = torch.cat([(b["condition.text.ids"] == empty).all(dim=1) for b in found])
    assert abs(float(without_class.float().mean()) - 0.1) < 0.01
    assert abs(float(without_text.float().mean()) - 0.1) < 0.01
    assert abs(float((without_class & without_text).float().mean()) - 0.01) < 0.005


def test_condition_settings_of_all_kinds_are_those_of_the_registry():
    """The comment of settings.kinds lists what there is."""
    import inspect

    line = next(line for line in inspect.getsource(ConditionSettings).splitlines() if "kinds:" in line)
    assert all(kind in line for kind in ASKED)
