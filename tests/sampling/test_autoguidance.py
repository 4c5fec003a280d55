"""Autoguidance (Karras et al. 2024): a training keeps its weights of an early moment, and samples are led away from
what they predict, by every command and from Python."""

import json
import shutil

import numpy as np
import processes
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import ldmcli
from ldmcli.core.errors import ModelError, UsageError
from ldmcli.core.settings import SampleSettings
from ldmcli.diffusion.guidance import autoguided, denoiser, guidance_path
from ldmcli.diffusion.sample import sample_conditioned
from ldmcli.diffusion.schedule import make_schedule
from ldmcli.studies import ab_models, neighbours
from ldmcli.training.distillation import open_teacher, student_settings

GUIDED = ("--set", "train.guide_at=0.5", "--set", "sample.autoguidance=3")
KEPT = ("--save-every", 1, "--keep", 9)
DRAW = {"steps": 3, "guidance": 2.0, "seed": 1}
OPTIONS = ("--prompt", "a red star", "--steps", 3, "--guidance", 2, "--seed", 1, "-n", 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory, ae):
    """Four steps of a model of captions; its guiding model is that of step 2."""
    folder = tmp_path_factory.mktemp("autoguidance") / "run"
    tiny.train_ldm(folder, ae, *tiny.ADAM, "--lr", 0.05, "--condition", "text", *GUIDED, *KEPT, steps=4)
    return folder


@pytest.fixture(scope="module")
def unguided(tmp_path_factory, run):
    """The same without its guiding model, as runs are that kept none."""
    folder = tmp_path_factory.mktemp("unguided") / "run"
    shutil.copytree(run, folder)
    (folder / "guiding.safetensors").unlink()
    return folder


def drawn(ending) -> list[np.ndarray]:
    assert ending.code == 0, ending.stderr
    return [np.asarray(Image.open(path)) for path in ending.json["images"]]


def sampled(model, **more) -> np.ndarray:
    return np.stack([np.asarray(one) for one in model.sample(prompt="a red star", n=2, **DRAW, **more)])


@pytest.mark.parametrize("t", [600.0, torch.tensor([600.0, 100.0, 980.0])])
def test_the_prediction_is_led_away_by_the_scale_inside_the_interval(t):
    schedule, z = make_schedule(ldmcli.core.settings.DiffusionSettings()), torch.randn(3, 2, 4, 4)

    def predicts(factor: float):
        return lambda z, t, alpha, sigma: (factor * z, (1 - factor) * z)

    led = autoguided(predicts(2.0), predicts(0.5), schedule, 3.0, (0.2, 0.8))
    x0, eps = led(z, t, 0.6, 0.8)
    share = t / (schedule.num_timesteps - 1)
    acts = torch.as_tensor((share >= 0.2) & (share <= 0.8)).expand(3).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x0, torch.where(acts, (0.5 + 3 * 1.5) * z, 2 * z))
    torch.testing.assert_close(eps, torch.where(acts, (0.5 - 3 * 1.5) * z, -z))
    assert acts.any()


def test_a_training_keeps_the_averages_of_that_moment(run):
    kept, then = load_file(run / "guiding.safetensors"), run / "checkpoints/step-00000002"
    assert tiny.same(kept, load_file(then / "model.safetensors") | load_file(then / "ema.safetensors"))
    assert not tiny.same(kept, tiny.weights(run))


@pytest.mark.parametrize("after", [1, 3])
def test_a_run_that_goes_on_keeps_the_weights_of_the_same_step(after, run, tmp_path):
    """From before that moment, without the file that a killed attempt may have left, and from after it."""
    again = tmp_path / "run"
    shutil.copytree(run, again)
    for step in range(after + 1, 5):
        shutil.rmtree(again / f"checkpoints/step-{step:08d}")
    if after == 1:
        (again / "guiding.safetensors").write_bytes(b"cut")
    state = tiny.state(again) | {"state": "interrupted", "step": after, "checkpoint": after}
    (again / "run.json").write_text(json.dumps(state))
    ae = state["parents"][0]["path"]
    tiny.train_ldm(again, ae, *tiny.ADAM, "--lr", 0.05, "--condition", "text", *GUIDED, *KEPT, steps=4)
    assert tiny.same(load_file(run / "guiding.safetensors"), load_file(again / "guiding.safetensors"))
    assert tiny.same(tiny.weights(run), tiny.weights(again))


def test_fresh_runs_begin_without_the_file_of_the_one_before(run, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    tiny.train_ldm(again, tiny.state(run)["parents"][0]["path"], *tiny.ADAM, "--condition", "text", "--fresh", steps=1)
    assert not (again / "guiding.safetensors").exists()


def test_two_processes_keep_what_one_does(run, ae, tmp_path):
    command = ["train-ldm", *tiny.SHAPES, *tiny.UNET, *tiny.QUIET_LOOP, *tiny.ADAM, "--autoencoder", ae, "--lr", 0.05]
    command += ["--condition", "text", *GUIDED, "--steps", 4, "--out", tmp_path / "run", "--no-cache"]
    for one in processes.ranks(tmp_path, 2, *command):
        assert one.wait() == 0, one.stderr
    kept = load_file(tmp_path / "run/guiding.safetensors")
    for name, tensor in load_file(run / "guiding.safetensors").items():
        torch.testing.assert_close(kept[name], tensor, rtol=1e-3, atol=1e-4)


def test_samples_are_those_of_the_formula(run):
    """Both guidances by hand: classifier-free guidance of the model, then away from the guiding model's prediction."""
    model, other = ldmcli.load(run), ldmcli.load(f"{run}@2")
    inputs = model.conditions.prepare({"text": ["a red star"] * 2})
    settings = SampleSettings(steps=3, guidance=2.0, autoguidance=3.0)
    ids, shape = range(2), model.network.latent_shape[1:]

    def by_hand(denoise):
        given = guidance_path(other.network, 1.0, inputs, None, 2, shape)
        worse = denoiser(other.network.predict, model.schedule, given)

        def led(z: Tensor, t: float, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
            (x0, eps), (x0_worse, eps_worse) = denoise(z, t, alpha, sigma), worse(z, t, alpha, sigma)
            return x0_worse + 3 * (x0 - x0_worse), eps_worse + 3 * (eps - eps_worse)

        return led

    how = {"ids": ids, "seed": 1, "inputs": inputs}
    with torch.no_grad():
        found = sample_conditioned(model.network, model.schedule, settings, guiding=model.guiding, **how)
        expected = sample_conditioned(model.network, model.schedule, settings, guide=by_hand, **how)
        plain = sample_conditioned(model.network, model.schedule, settings, **how)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_commands_and_python_draw_the_same_and_say_the_scale(run, unguided, tmp_path):
    own = tiny.ldm("sample", "--model", run, *OPTIONS, "--json", "--out", tmp_path / "own")
    off = tiny.ldm("sample", "--model", run, *OPTIONS, "--autoguidance", 1, "--json", "--out", tmp_path / "off")
    none = tiny.ldm("sample", "--model", unguided, *OPTIONS, "--json", "--out", tmp_path / "none")
    assert (drawn(off)[0] == drawn(none)[0]).all() and (drawn(own)[0] != drawn(off)[0]).any()
    model = ldmcli.load(run)
    assert (sampled(model) == np.stack(drawn(own))).all()
    assert (sampled(model, autoguidance=1.0) == np.stack(drawn(off))).all()

    def stated(ending):
        return [json.loads(Image.open(path).text["ldm"]).get("autoguidance") for path in ending.json["images"]]

    assert stated(own) == [3, 3] and stated(off) == [1, 1] and stated(none) == [None, None]


def test_an_evaluation_measures_and_states_it(run, unguided):
    options = ("-n", 16, "--steps", 2, "--metrics", "fid", "--json")
    led, off, none = (
        tiny.ldm("eval-fid", "--model", *words, *options) for words in ((run,), (run, "--autoguidance", 1), (unguided,))
    )
    assert led.json["sampling"]["autoguidance"] == 3 and "autoguidance" not in off.json["sampling"]
    assert led.json["metrics"] != off.json["metrics"] == none.json["metrics"]


@pytest.mark.parametrize(
    "command",
    [
        ("sample", "--prompt", "a star", "--autoguidance", 2),
        ("eval-fid", "--autoguidance", 2, "-n", 16, "--metrics", "fid"),
    ],
)
def test_a_model_without_one_says_how_to_keep_one(command, unguided, tmp_path):
    ending = tiny.ldm(command[0], "--model", unguided, *command[1:])
    assert ending.code == 2 and "train.guide_at" in ending.line and "Traceback" not in ending.stderr


def test_a_damaged_file_is_named(run, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    tensors = load_file(broken / "guiding.safetensors")
    tensors.popitem()
    save_file(tensors, broken / "guiding.safetensors")
    with pytest.raises(ModelError, match="guiding"):
        sampled(ldmcli.load(broken))
    assert sampled(ldmcli.load(broken), autoguidance=1.0).any()


def test_latents_of_given_tokens_have_none(run):
    model = ldmcli.load(run)
    with pytest.raises(UsageError, match="autoguidance"):
        model.sample_latents(n=1, context=model.embed("a star"), autoguidance=2.0)


def test_a_student_learns_what_the_led_teacher_draws(run, unguided, ae, tmp_path):
    assert student_settings(unguided, 2, None)["distill.autoguidance"] == 1
    assert student_settings(run, 2, None)["distill.autoguidance"] == 3
    ending = tiny.ldm("distill", run, "--calls", 2, "--steps", 1, "--out", tmp_path / "few", "--quiet")
    assert ending.code == 0, ending.stderr
    few = ldmcli.load(tmp_path / "few")
    assert few.config.distill.autoguidance == 3 and few.config.sample.autoguidance == 1
    document = tiny.ldm("sample", "--model", tmp_path / "few", "--prompt", "a", "--json", "--out", tmp_path / "out")
    assert json.loads(Image.open(document.json["images"][0]).text["ldm"])["distilled"]["autoguidance"] == 3
    refused = tiny.ldm("sample", "--model", tmp_path / "few", "--prompt", "a", "--autoguidance", 2)
    assert refused.code == 2 and "--autoguidance" in refused.line

    world = type("One", (), {"device": torch.device("cpu"), "world_size": 1})
    teacher = open_teacher(few.config, run, world)
    z, inputs = torch.randn(2, *few.network.latent_shape), few.conditions.prepare({"text": ["a red star"] * 2})
    levels = teacher.segments.of(teacher.timesteps([0, 1]))
    found = teacher._end(z, levels, inputs)
    teacher._autoguidance = 1.0
    assert not torch.allclose(found, teacher._end(z, levels, inputs), atol=1e-3)
    teacher.teacher.guiding.load_state_dict(teacher.teacher.network.state_dict())
    teacher._autoguidance, teacher._guidance = 3.0, 1.0
    alike = teacher._end(z, levels, inputs)
    teacher._autoguidance = 1.0
    torch.testing.assert_close(alike, teacher._end(z, levels, inputs))  # nobody is led away from himself


@pytest.mark.parametrize("to", ["diffusers", "compvis"])
def test_other_formats_leave_it_out_and_say_so(to, run, tmp_path):
    target = tmp_path / ("model.ckpt" if to == "compvis" else "model")
    ending = tiny.ldm("convert", run, target, "--to", to)
    if ending.code == 4:
        assert to == "compvis" and "latent-diffusion can build" in ending.line
        return
    assert ending.code == 0 and "guiding model is left out" in ending.stdout + ending.stderr
    assert sampled(ldmcli.load(target)).any()


SAMPLING = {
    "steps": ("--steps", 3, 3),
    "guidance": ("--guidance", 3, 3.0),
    "guidance_interval": ("--guidance-interval", "0.2,0.8", (0.2, 0.8)),
    "autoguidance": ("--autoguidance", 2, 2.0),
    "sampler": ("--sampler", "ddim", "ddim"),
    "eta": ("--eta", 0.5, 0.5),
    "temperature": ("--temperature", 0.7, 0.7),
    "spacing": ("--spacing", "uniform", "uniform"),
}


@pytest.mark.parametrize("command", ["neighbours", "ab"])
def test_every_option_of_sampling_reaches_the_studies_that_draw(command, run, tmp_path, monkeypatch):
    seen = {}

    class Seen(Exception):
        pass

    def stop(*_, settings, **more):
        seen.update(settings)
        raise Seen

    module, name = {"neighbours": (neighbours, "neighbours_to_folder"), "ab": (ab_models, "items_of_models")}[command]
    monkeypatch.setattr(module, name, stop)
    options = [word for option, value, _ in SAMPLING.values() for word in (option, value)]
    subjects = ("--model", run) if command == "neighbours" else (run, run)
    tiny.ldm(command, *subjects, *options, "--out", tmp_path / "page.html")
    assert seen == {name: value for name, (_, _, value) in SAMPLING.items()}


@pytest.mark.parametrize(
    "options",
    [("--mixed-precision", "bf16"), ("--compile",), ("--size", "40x20"), ("--sampler", "heun", "--batch-size", 1)],
    ids=lambda options: " ".join(map(str, options)),
)
def test_it_goes_with_what_else_changes_a_pass(options, run, tmp_path):
    led, off = (
        drawn(tiny.ldm("sample", "--model", run, *OPTIONS, *options, *more, "--json", "--out", tmp_path / f"{k}"))
        for k, more in enumerate([(), ("--autoguidance", 1)])
    )
    assert all((a != b).any() for a, b in zip(led, off))
