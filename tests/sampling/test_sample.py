"""`ldm sample`: what a picture depends on, what guidance is, and what stands in the folder afterwards."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ADAM, SHAPES, ldm, pictures, train_ldm

import ldmcli
from ldmcli.diffusion.samplers import SAMPLERS
from ldmcli.networks.latent_diffusion import DiffusionModel
from ldmcli.sampling.draw import Draw, draw_latents

V_COSINE = (
    "--set",
    "diffusion.prediction=v",
    "--set",
    "diffusion.schedule=cosine",
    "--set",
    "diffusion.timesteps=20",
    "--set",
    "diffusion.t_sampling=uniform",
)


@pytest.fixture(scope="module")
def text_model(tiny_runs) -> Path:
    """Text to image; latents 3x5x5, so that a sample has no multiple of 16 numbers."""
    return tiny_runs["text"]


@pytest.fixture(scope="module")
def class_model(ae, tmp_path_factory) -> Path:
    """Class to image, trained without condition dropout."""
    run = tmp_path_factory.mktemp("sampling") / "class"
    train_ldm(run, ae, *ADAM, "--condition", "class", "--set", "condition.drop=0", steps=12)
    return run


@pytest.fixture(scope="module")
def v_model(ae, tmp_path_factory) -> Path:
    """Unconditional; v-prediction with a cosine schedule of 20 timesteps."""
    run = tmp_path_factory.mktemp("sampling") / "v"
    train_ldm(run, ae, *ADAM, *V_COSINE, steps=12)
    return run


def sample(model: Path, out: Path, *more, code: int = 0):
    ending = ldm("sample", "--model", model, "--out", out, *more)
    assert ending.code == code, ending.stderr
    return ending


# --- reliability 18: objective and schedule are the model's -------------------------------------------------------


def test_objective_and_schedule_come_from_the_run(v_model):
    """Reliability 18: nothing of them stands on the command line of use."""
    model = ldmcli.load(v_model)
    assert (model.schedule.prediction, model.schedule.num_timesteps) == ("v", 20)
    steps = torch.arange(21, dtype=torch.float64) / 20
    bar = torch.cos((steps + 0.008) / 1.008 * torch.pi / 2) ** 2
    betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    expected = torch.cumprod(1 - betas, 0).numpy()
    assert np.asarray(model.schedule.alphas_cumprod, np.float64) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "flag", [("--prediction", "eps"), ("--schedule", "linear"), ("--set", "diffusion.prediction=eps")]
)
def test_a_contradicting_objective_or_schedule_is_code_2(v_model, tmp_path, flag):
    """Reliability 18: `sample` has no option that could contradict the checkpoint."""
    ending = sample(v_model, tmp_path / "out", *flag, code=2)
    assert ending.line.startswith("ldm: no such option") and flag[0] in ending.line


def test_more_images_than_a_folder_has_names_for_are_refused_at_once(v_model, tmp_path):
    ending = sample(v_model, tmp_path / "out", "-n", 99_999_999_999, code=2)
    assert "99,999,999,999 images: a folder holds 1,000,000 at most" in ending.line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_any_number_of_steps_up_to_all_timesteps_draws(v_model, tmp_path, sampler, steps):
    """Reliability 18: 7 does not divide T = 20, 20 is all of them; every sampler, with η = 1 where it reads it."""
    sample(v_model, tmp_path / "out", "-n", 2, "--steps", steps, "--sampler", sampler, "--eta", 1)
    assert len(pictures(tmp_path / "out")) == 2


def test_odd_step_counts_visit_the_first_and_the_last_timestep(v_model, tmp_path, monkeypatch):
    """Reliability 18: the timesteps that the network is asked at run from T - 1 down to 0."""
    asked = []
    predict = DiffusionModel.predict
    monkeypatch.setattr(
        DiffusionModel, "predict", lambda self, z, t, given: asked.append(float(t[0])) or predict(self, z, t, given)
    )
    sample(v_model, tmp_path / "out", "-n", 1, "--steps", 7, "--sampler", "ddim")
    assert len(asked) == 7 and (asked[0], asked[-1]) == (19, 0) and asked == sorted(asked, reverse=True)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_more_steps_than_timesteps_are_code_2(v_model, tmp_path, sampler):
    """Reliability 18: said before anything is drawn, with the number that is possible."""
    ending = sample(v_model, tmp_path / "out", "-n", 1, "--steps", 21, "--sampler", sampler, code=2)
    assert "21" in ending.line and "20" in ending.line
    assert not list((tmp_path / "out").glob("*.png"))


# --- reliability 19: guidance -------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Batch sizes of the network's calls."""
    sizes = []
    predict = DiffusionModel.predict
    monkeypatch.setattr(
        DiffusionModel, "predict", lambda self, z, t, given: sizes.append(len(z)) or predict(self, z, t, given)
    )
    return sizes


def draw(model, prompt="a red circle", **settings):
    negative_prompt, settings = settings.pop("negative_prompt", ""), {"steps": 4, "sampler": "ddim", **settings}
    request = Draw(ids=(), values={"text": [prompt]}, settings=settings, negative_prompt=negative_prompt)
    return draw_latents(model, request.of(range(3)))


def test_temperature_scales_the_noise_that_is_drawn(text_model):
    model = ldmcli.load(text_model)
    from ldmcli.maths import rng

    z_T, context = rng.normal(0, range(3), model.network.latent_shape, "z_T"), model.embed(["a red circle"] * 3)
    calm = draw(model, guidance=1.0, temperature=0.5)
    assert torch.equal(calm, model.sample_latents(0.5 * z_T, steps=4, sampler="ddim", context=context, guidance=1.0))
    assert torch.equal(draw(model, temperature=1.0), draw(model))
    still, other = (draw(model, temperature=0.0, eta=1.0) for _ in range(2))
    assert torch.equal(still, other) and torch.equal(still[0], still[2])  # no noise: all samples are one
    assert not torch.equal(draw(model, eta=1.0, temperature=0.5), draw(model, eta=1.0))


def test_guidance_1_is_the_conditional_model_bit_for_bit_in_one_call_a_step(text_model, asked):
    """Reliability 19: no second half is computed, and nothing is added and taken away again."""
    model = ldmcli.load(text_model)
    guided = draw(model, guidance=1.0)
    assert asked == [3] * 4
    context = model.embed(["a red circle"] * 3)
    from ldmcli.maths import rng

    z_T = rng.normal(0, range(3), model.network.latent_shape, "z_T")
    plain = model.sample_latents(z_T, steps=4, sampler="ddim", context=context, guidance=1.0)
    assert torch.equal(guided, plain)


def test_guidance_0_is_the_unconditional_model(text_model, asked):
    """Reliability 19: the prompt makes no difference, and the network is called once a step."""
    model = ldmcli.load(text_model)
    assert torch.equal(draw(model, guidance=0.0), draw(model, "a blue square", guidance=0.0))
    assert asked == [3] * 8
    assert torch.equal(draw(model, guidance=0.0), draw(model, "", guidance=1.0))


def test_guidance_pushes_every_latent_channel_away_from_the_null(text_model, asked):
    """Reliability 19: ε_u + s (ε_c − ε_u) on all channels, both halves in one call of twice the batch."""
    model = ldmcli.load(text_model)
    from ldmcli.diffusion.guidance import GuidancePath, denoiser

    given, null = model.embed(["a red circle"] * 2), model.embed([""] * 2)
    z, t = torch.randn(2, *model.network.latent_shape, generator=torch.Generator().manual_seed(0)), 500.0

    def output(conditionings, *scales):
        path = GuidancePath(conditionings, scales)
        return denoiser(model.network.predict, model.schedule, path)(z, t, 0.5, 0.5)

    del asked[:]
    with torch.no_grad():
        guided = output((null, given), 7.5)
        assert asked == [4]
        with_text, without = output((null, given), 1.0), output((null,))
    for one, c, u in zip(guided, with_text, without):
        assert torch.allclose(one, u + 7.5 * (c - u), atol=1e-4)
        assert ((one - c).abs().amax(dim=(0, 2, 3)) > 0).all()


def test_a_negative_prompt_takes_the_place_of_the_empty_one(text_model):
    """Reliability 19: an empty negative prompt changes nothing, another one does."""
    model = ldmcli.load(text_model)
    usual = draw(model, guidance=7.5)
    assert torch.equal(usual, draw(model, guidance=7.5, negative_prompt=""))
    away = draw(model, guidance=7.5, negative_prompt="a blue square")
    assert not torch.equal(usual, away) and torch.isfinite(away).all()
    only_negative = draw(model, guidance=0.0, negative_prompt="a blue square")
    assert torch.equal(only_negative, draw(model, "a blue square", guidance=1.0))


def test_a_negative_prompt_at_guidance_1_is_warned_about_and_changes_nothing(text_model, tmp_path):
    """Reliability 19: one warning that it has no effect."""
    asked = ("--prompt", "a red circle", "--steps", 3, "--guidance", 1)
    plain = sample(text_model, tmp_path / "plain", *asked)
    warned = sample(text_model, tmp_path / "negative", *asked, "--negative-prompt", "a blue square")
    assert "ldm: warning: --negative-prompt has no effect at --guidance 1" in warned.stderr
    assert "warning" not in plain.stderr
    assert np.array_equal(pictures(tmp_path / "plain")[0], pictures(tmp_path / "negative")[0])


def test_guidance_of_a_model_trained_without_dropout_is_warned_about(class_model, text_model, tmp_path):
    """Reliability 19: it has never seen the null; guidance 1 is fine and silent."""
    asked = ("--class", "square", "--steps", 2)
    assert "trained without condition dropout" in sample(class_model, tmp_path / "3", *asked, "--guidance", 3).stderr
    assert "warning" not in sample(class_model, tmp_path / "1", *asked, "--guidance", 1).stderr
    ending = sample(text_model, tmp_path / "t", "--prompt", "a", "--steps", 2, "--guidance", 3)
    assert "warning" not in ending.stderr


# --- reliability 21: a picture depends on seed and number ---------------------------------------------------------


def assert_same_pictures(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Equal but for what other batch sizes round differently: now and then a value falls to the other side of ½."""
    differences = np.abs(np.stack(found).astype(int) - np.stack(expected))
    assert differences.max() <= 1 and (differences > 0).mean() < 0.01


@pytest.mark.parametrize(
    "drawn",
    [("--sampler", "dpm++"), ("--sampler", "ddim", "--eta", 1), ("--sampler", "ddpm")],
    ids=["dpm++", "ddim, eta 1", "ddpm"],
)
def test_sample_k_is_the_same_for_batch_1_3_and_16(text_model, tmp_path, drawn):
    """Reliability 21: latents 3x5x5, deterministic and ancestral, guided; the first 16 of 20 are those of 16."""
    asked = ("--prompt", "a red circle", "--prompt", "a blue star", "--seed", 5, "--steps", 4, *drawn)
    sample(text_model, tmp_path / "16", *asked, "-n", 8, "--batch-size", 16)
    whole = pictures(tmp_path / "16")
    assert len(whole) == 16 and not np.array_equal(whole[0], whole[2])
    for batch in (1, 3):
        sample(text_model, tmp_path / str(batch), *asked, "-n", 8, "--batch-size", batch)
        assert_same_pictures(pictures(tmp_path / str(batch)), whole)
    sample(text_model, tmp_path / "20", *asked, "-n", 10)
    assert_same_pictures(pictures(tmp_path / "20")[:16], whole)


def test_each_picture_says_its_seed_and_number(text_model, tmp_path):
    """Reliability 21: prompt, seed, number and settings of an image are in its metadata."""
    ending = sample(
        text_model,
        tmp_path / "out",
        "--prompt",
        "a red circle",
        "--prompt",
        "été [red]",
        "-n",
        1,
        "--seed",
        5,
        "--steps",
        3,
        "--json",
    )
    stored = [json.loads(Image.open(path).text["ldm"]) for path in sorted((tmp_path / "out").glob("0*.png"))]
    assert [(each["prompt"], each["seed"], each["sample"]) for each in stored] == [
        ("a red circle", 5, 0),
        ("été [red]", 5, 1),
    ]
    model = ldmcli.load(text_model)
    for each in stored:
        assert each["model_sha256"] == model.fingerprint == ending.json["model_sha256"]
        assert (each["steps"], each["weights"]) == (3, "ema")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_eta_is_used_and_recorded_where_the_sampler_takes_it_and_else_named_as_idle(v_model, tmp_path, sampler):
    asked = ("--sampler", sampler, "--steps", 4, "--seed", 3, "-n", 1)
    with_eta = sample(v_model, tmp_path / "eta", *asked, "--eta", 0.5, "--json")
    sample(v_model, tmp_path / "none", *asked)
    takes = sampler == "ddim"
    stored = json.loads(Image.open(tmp_path / "eta" / "000000.png").text["ldm"])
    assert (stored["eta"], with_eta.json["eta"]) == ((0.5, 0.5) if takes else (0.0, 0.0))
    assert (f"--eta 0.5 has no effect with --sampler {sampler}" in with_eta.stderr) == (not takes)
    same = np.array_equal(pictures(tmp_path / "eta"), pictures(tmp_path / "none"))
    assert same == (not takes)


def test_python_and_the_command_draw_the_same_pictures(text_model, tmp_path):
    """The contract's `model.sample` is `ldm sample`."""
    asked = ("--prompt", "a red circle", "-n", 3, "--seed", 2, "--steps", 3, "--guidance", 2)
    sample(text_model, tmp_path / "out", *asked)
    found = ldmcli.load(text_model).sample("a red circle", n=3, seed=2, steps=3, guidance=2.0)
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(pictures(tmp_path / "out"), found))


# --- the folder of samples ----------------------------------------------------------------------------------------


def test_json_is_the_whole_of_stdout_and_names_what_exists(text_model, tmp_path):
    """One document, people's text on stderr."""
    ending = sample(text_model, tmp_path / "out", "--prompt", "a star", "-n", 2, "--steps", 2, "--json")
    assert all(Path(path).is_file() for path in (*ending.json["images"], ending.json["grid"]))
    assert ending.json["drawn"] == 2 and ending.json["out"] == str(tmp_path / "out")
    assert ending.json["steps"] == 2 and "2 images in" in ending.stderr


@pytest.mark.parametrize("fmt", ["png", "jpg", "webp"])
def test_metadata_stand_in_every_format_and_are_left_out_on_request(text_model, tmp_path, fmt):
    """--no-metadata leaves no trace of the prompt in the file."""
    asked = ("--prompt", "a secret star", "--steps", 2, "--format", fmt)
    sample(text_model, tmp_path / "with", *asked)
    sample(text_model, tmp_path / "without", *asked, "--no-metadata")
    assert b"secret" in (tmp_path / "with" / f"000000.{fmt}").read_bytes()
    assert b"secret" not in (tmp_path / "without" / f"000000.{fmt}").read_bytes()
    assert Image.open(tmp_path / "without" / f"000000.{fmt}").size == (20, 20)


def test_samples_of_another_request_are_not_overwritten_unless_told(text_model, tmp_path):
    """Code 2 and nothing touched; --overwrite replaces them all."""
    out = tmp_path / "out"
    sample(text_model, out, "--prompt", "a star", "-n", 3, "--steps", 2)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    ending = sample(text_model, out, "--prompt", "a ring", "-n", 3, "--steps", 2, code=2)
    assert "--overwrite" in ending.line
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    sample(text_model, out, "--prompt", "a ring", "-n", 2, "--steps", 2, "--overwrite")
    stored = [json.loads(Image.open(path).text["ldm"])["prompt"] for path in sorted(out.glob("0*.png"))]
    assert stored == ["a ring", "a ring"]


def test_somebody_elses_pictures_are_not_overwritten(text_model, tmp_path):
    """A folder that holds 000000.png from elsewhere is left alone."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "000000.png").write_bytes(b"mine")
    ending = sample(text_model, out, "--prompt", "a star", "--steps", 2, code=2)
    assert "holds images already" in ending.line and (out / "000000.png").read_bytes() == b"mine"


def test_the_same_command_draws_only_what_is_missing(text_model, tmp_path):
    """A gap is filled with the very picture that was there."""
    out, asked = tmp_path / "out", ("--prompt", "a star", "-n", 5, "--steps", 2, "--json")
    sample(text_model, out, *asked)
    whole = pictures(out)
    for k in (1, 4):
        (out / f"00000{k}.png").unlink()
    assert sample(text_model, out, *asked).json["drawn"] == 2
    assert_same_pictures(pictures(out), whole)


def test_an_interrupt_leaves_whole_pictures_and_the_same_command_draws_the_rest(text_model, tmp_path, monkeypatch):
    """SIGINT after the second batch: code 130, no half file, and at the end the pictures of an undisturbed call."""
    import os
    import signal

    from ldmcli.sampling import commands

    asked = ("--prompt", "a star", "-n", 6, "--batch-size", 2, "--steps", 2)
    sample(text_model, tmp_path / "whole", *asked)
    out, drawn, draw_batch = tmp_path / "out", [], commands.draw_images

    def interrupted(*args):
        drawn.append(1)
        if len(drawn) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return draw_batch(*args)

    monkeypatch.setattr(commands, "draw_images", interrupted)
    ending = sample(text_model, out, *asked, code=130)
    assert "2 of 6 images missing" in ending.line and len(drawn) == 2
    assert sorted(path.name for path in out.iterdir()) == [*(f"00000{k}.png" for k in range(4)), "request.json"]
    sample(text_model, out, *asked)
    assert len(drawn) == 3
    assert all(np.array_equal(a, b) for a, b in zip(pictures(tmp_path / "whole"), pictures(out)))
    assert (out / "grid.png").is_file()


def test_a_class_is_taken_by_name_and_by_number_and_all_means_each(class_model, tmp_path):
    """--class all draws every class once, in order."""
    asked = ("--steps", 2, "--guidance", 1)
    sample(class_model, tmp_path / "name", "--class", "square", *asked)
    sample(class_model, tmp_path / "number", "--class", 1, *asked)
    assert np.array_equal(pictures(tmp_path / "name")[0], pictures(tmp_path / "number")[0])
    ending = sample(class_model, tmp_path / "all", "--class", "all", *asked, "--json")
    assert len(ending.json["images"]) == len(ldmcli.load(class_model).class_names) > 3


def test_an_image_to_begin_from_is_kept_the_more_the_smaller_the_strength(v_model, tmp_path):
    """--init-image, --strength: at little strength the answer is near the image's reconstruction."""
    first = tmp_path / "first.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(first)
    ae = ldmcli.load(v_model).autoencoder
    rebuilt = ((ae.decode(ae.encode(Image.open(first)))[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    distances = []
    for strength in (0.1, 1):
        sample(v_model, tmp_path / str(strength), "-n", 1, "--steps", 20, "--init-image", first, "--strength", strength)
        distances.append(np.abs(pictures(tmp_path / str(strength))[0] - rebuilt).mean())
    assert distances[0] < distances[1]
    assert sample(v_model, tmp_path / "0", "-n", 1, "--init-image", first, "--strength", 0, code=2)


def test_a_run_is_used_where_it_was_moved_to_and_read_only(text_model, tmp_path):
    """Nothing in a run refers to a place: the copy draws the same pictures."""
    import shutil

    copy = tmp_path / "elsewhere"
    shutil.copytree(text_model, copy)
    for path in (copy, copy / "autoencoder"):
        path.chmod(0o500)
    asked = ("--prompt", "a star", "--steps", 2)
    sample(text_model, tmp_path / "a", *asked)
    sample(copy, tmp_path / "b", *asked)
    for path in (copy, copy / "autoencoder"):
        path.chmod(0o700)
    assert np.array_equal(pictures(tmp_path / "a")[0], pictures(tmp_path / "b")[0])


@pytest.mark.parametrize(("size", "whole"), [("16x32", None), ("17x32", "20x32"), ("5x5", "8x8"), ("4x21", "4x24")])
def test_any_size_from_one_latent_on_is_drawn_and_the_middle_of_whole_units_kept(v_model, tmp_path, size, whole):
    """Whole units are multiples of f times what the UNet halves."""
    unit = ldmcli.load(v_model).autoencoder.network.f * ldmcli.load(v_model).network.unet.size_factor
    assert unit == 4
    ending = sample(v_model, tmp_path / "out", "-n", 1, "--steps", 2, "--size", size)
    height, width = map(int, size.split("x"))
    drawn = pictures(tmp_path / "out")[0]
    assert drawn.shape == (height, width, 3)
    assert (f"drawn at {whole}" in ending.stderr) == (whole is not None)
    model = ldmcli.load(v_model)
    assert (np.asarray(model.sample(size=(height, width), steps=2)[0]) == drawn).all()
    if whole:
        larger = np.asarray(model.sample(size=tuple(map(int, whole.split("x"))), steps=2)[0])
        top, left = (larger.shape[0] - height) // 2, (larger.shape[1] - width) // 2
        assert (larger[top : top + height, left : left + width] == drawn).all()


def test_an_image_to_begin_from_and_one_to_be_like_go_with_any_size(v_model, tmp_path):
    Image.fromarray(np.full((18, 22, 3), 200, np.uint8)).save(tmp_path / "start.png")
    Image.fromarray(np.full((9, 11, 3), 200, np.uint8)).save(tmp_path / "low.png")
    sample(
        v_model,
        tmp_path / "out",
        "-n",
        1,
        "--steps",
        2,
        "--size",
        "18x22",
        "--init-image",
        tmp_path / "start.png",
        "--guide",
        tmp_path / "low.png",
    )
    assert pictures(tmp_path / "out")[0].shape == (18, 22, 3)


def test_a_size_below_one_latent_is_refused(v_model, tmp_path):
    assert "smaller than one latent" in sample(v_model, tmp_path / "out", "--size", "1x32", code=2).line


def test_fine_tuning_begins_with_the_weights_of_another_run(text_model, tmp_path):
    """--init-from RUN without --autoencoder: that run's own autoencoder, its weights at step 0."""
    ending = ldm(
        "train-ldm",
        "--init-from",
        text_model,
        *SHAPES,
        "--condition",
        "text",
        "--steps",
        1,
        "--out",
        tmp_path / "run",
        "--set",
        f"data.cache_dir={tmp_path / 'cache'}",
        "--batch-size",
        4,
        "--recipe",
        text_model / "config.toml",
        "--lr",
        "1e-9",
        "--set",
        "train.adam_lr=1e-9",
    )
    assert ending.code == 0, ending.stderr
    from tiny import weights

    before, after = weights(text_model), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-6
