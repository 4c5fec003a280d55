"""`ldm distill`: students of every condition, task, first stage and parametrisation learn from their teacher alone, are
trained exactly, and are used, named and refused as what they are."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_models
import torch
from PIL import Image
from tiny import ldm

import ldmcli
from ldmcli.core.errors import UsageError
from ldmcli.core.settings import DistillSettings
from ldmcli.formats.run_folder import read_config
from ldmcli.networks.conditioners import load_tokenizer, train_vocabulary
from ldmcli.training.distillation import Distillation


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    train_vocabulary(["a red star", "two green circles"], 64, folder)
    return load_tokenizer(folder)


CASES = [
    *((kinds, "generate", "kl", "flow") for kinds in tiny_models.COMBINED),
    *(("", task, "kl", "flow") for task in list(tiny_models.TASKS)[1:]),
    *(("class", "generate", "kl", prediction) for prediction in ("eps", "v", "x0")),
    *(("text", "inpaint, black", stage, "v") for stage in ("vq", "none")),
    ("class+text", "sr", "paper", "eps"),
]


def pair(words, kinds: str, task: str, stage: str, prediction: str, calls: int = 2):
    """(student's objective, its batch); the teacher's network is another object with the same weights."""
    names = [kind for kind in kinds.split("+") if kind]
    teacher, student = (tiny_models.tiny_model(stage, words, names, task, prediction=prediction) for _ in range(2))
    few = DistillSettings(calls=calls, guidance=2.0, teacher_steps=4, teacher="x")
    student.config = replace(student.config, distill=few)
    objective = tiny_models.objective_of(student, tiny_models.CPU)
    objective.distillation = Distillation(student.config, teacher, Path("teacher"))
    return objective, tiny_models.batch_of(student) | {"t": objective.distillation.timesteps([0, 1])}


@pytest.mark.parametrize("kinds, task, stage, prediction", CASES)
def test_a_student_of_every_kind_learns_from_its_teacher_alone(words, kinds, task, stage, prediction):
    objective, batch = pair(words, kinds, task, stage, prediction)
    network, teacher = objective.model, objective.distillation.teacher.network
    loss, _ = objective.loss("model", {"model": network}, dict(batch), 0, False)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.unet.parameters())
    each = []
    for k in range(2):  # what a sample learns depends on no other
        alone = {name: value[k : k + 1] for name, value in batch.items()}
        each.append(objective.loss("model", {"model": network}, alone, 0, False)[0])
    torch.testing.assert_close(torch.stack(each).mean(), loss, rtol=1e-4, atol=1e-6)


def test_positions_take_the_calls_in_turn_and_scales_change_what_is_learned(words):
    objective, batch = pair(words, "text", "generate", "kl", "flow", calls=3)
    distillation, network = objective.distillation, objective.model
    assert torch.equal(distillation.timesteps(range(7)), distillation.segments.t[[0, 1, 2, 0, 1, 2, 0], 0])
    batch["t"] = distillation.timesteps([0, 1])
    losses = []
    for scale in (1.0, 2.0, 5.0):
        distillation._guidance = scale
        losses.append(float(objective.loss("model", {"model": network}, dict(batch), 0, False)[0].detach()))
    assert len(set(losses)) == 3


def test_a_student_comes_closer_to_its_teacher(words):
    objective, batch = pair(words, "class", "generate", "kl", "flow")
    network = objective.model
    optimizer, losses = torch.optim.Adam(network.parameters(), 3e-3), []
    for _ in range(24):
        optimizer.zero_grad()
        loss = objective.loss("model", {"model": network}, dict(batch), 0, False)[0]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


# --- through the command line -----------------------------------------------------------------------------------------


def distill(out, teacher, *more, calls: int = 2, steps: int = 4, code: int = 0):
    ending = ldm("distill", teacher, "--calls", calls, "--steps", steps, "--out", out, *more)
    assert ending.code == code, ending.stderr
    return ending


SAVE = ("--save-every", 1, "--keep", 9)


@pytest.fixture(scope="module")
def student(tiny_runs, tmp_path_factory):
    """Of `text`: two calls, guidance 3, with a checkpoint after each of four steps."""
    out = tmp_path_factory.mktemp("distilled") / "two"
    more = ("--sample-every", 4, "--eval-every", 4, "--set", "sample.n=2")
    distill(out, tiny_runs["text"], "--guidance", 3, *SAVE, *more)
    return out


def test_a_run_has_its_teachers_network_and_says_what_it_is(student, tiny_runs):
    teacher = tiny_runs["text"]
    ours, theirs = (read_config("diffusion", run) for run in (student, teacher))
    digest = ldmcli.load(teacher).fingerprint
    assert (ours.diffusion, ours.condition, ours.task) == (theirs.diffusion, theirs.condition, theirs.task)
    assert ours.distill == DistillSettings(calls=2, guidance=3.0, teacher=digest)
    state, stats = tiny.state(student), json.loads((student / "stats.json").read_text())
    assert state["state"] == "finished" and state["parents"][1]["sha256"] == digest
    assert {"val_loss"} <= state["metrics"].keys()
    their_stats = json.loads((teacher / "stats.json").read_text())
    assert all(stats[name] == their_stats[name] for name in ("conditions", "latent_scale", "autoencoder"))
    assert (student / "samples" / "step-00000004.png").is_file()
    for page in ("report.html", "README.md"):
        text = (student / page).read_text()
        assert "of 2 network calls an image, distilled" in text and "guidance 3 of the teacher baked in" in text, page
    assert "- distilled" in (student / "README.md").read_text()
    rows = ldm("runs", student.parent, "--json").json["runs"]
    assert (rows[-1]["kind"], rows[-1]["step"]) == ("diffusion", 4)


def test_a_run_gone_on_with_ends_as_one_that_was_not_stopped(student, tiny_runs, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(student, again)
    for step in (3, 4):
        shutil.rmtree(again / f"checkpoints/step-{step:08d}")
    state = tiny.state(again) | {"state": "running", "step": 2, "checkpoint": 2}
    (again / "run.json").write_text(json.dumps(state))
    more = ("--sample-every", 4, "--eval-every", 4, "--set", "sample.n=2")
    distill(again, tiny_runs["text"], "--guidance", 3, *SAVE, *more)
    assert tiny.same(tiny.checkpoint(again), tiny.checkpoint(student))
    assert tiny.log(again)[-1]["val/val_loss"] == tiny.log(student)[-1]["val/val_loss"]
    other = ldm("distill", tiny_runs["class"], "--calls", 2, "--steps", 4, "--out", again)
    assert other.code == 4 and "distill.teacher" in other.line


def test_pictures_say_how_they_were_made_and_take_no_other_way(student, tmp_path):
    draw = ("sample", "--model", student, "--prompt", "a red star")
    ending = ldm(*draw, "--out", tmp_path / "out", "--json")
    assert ending.code == 0 and ending.json["steps"] == 2 and ending.json["guidance"] == 1
    stated = json.loads(Image.open(tmp_path / "out" / "000000.png").text["ldm"])["distilled"]
    teacher = read_config("diffusion", student).distill.teacher
    assert stated.pop("method").startswith("progressive distillation")
    assert stated == {"calls": 2, "guidance": 3.0, "teacher_sha256": teacher}
    for option, value in (("--guidance", 2), ("--steps", 5), ("--sampler", "heun"), ("--eta", 1)):
        ending = ldm(*draw, option, value, "--out", tmp_path / "other")
        assert ending.code == 2 and option in ending.line and "distilled to 2 calls" in ending.line
    assert not (tmp_path / "other").exists()
    calls = []
    model = ldmcli.load(student)
    model.network.unet.register_forward_hook(lambda *_: calls.append(1))
    model.sample(prompt="a red star")
    assert len(calls) == 2
    said = ldm(*draw, "--negative-prompt", "blue", "--out", tmp_path / "negative").stderr
    assert "no effect on a distilled model" in said


def test_fewer_calls_of_few(student, tmp_path):
    """A distilled model is a teacher, too: of a part of its calls, whose guidance stays."""
    distill(tmp_path / "one", student, calls=1, steps=1)
    found = read_config("diffusion", tmp_path / "one").distill
    assert (found.calls, found.guidance, found.teacher_steps) == (1, 3.0, 2)
    for more, says in ((("--calls", 2), "smaller number"), (("--calls", 1, "--guidance", 2), "baked into")):
        ending = ldm("distill", student, *more, "--out", tmp_path / "other")
        assert ending.code == 2 and says in ending.line


@pytest.mark.parametrize("task", ["sr", "inpaint", "plain"])
def test_the_models_of_other_commands(task, tiny_runs, tmp_path):
    run = tmp_path / "run"
    distill(run, tiny_runs[task], calls=1, steps=1)
    Image.new("RGB", (20, 20), "navy").save(tmp_path / "photo.png")
    photo, out = tmp_path / "photo.png", ("--out", tmp_path / "out", "--json")
    box = ("inpaint", photo, "--box", "4,4,8,8", "--model", run)
    command = {"sr": ("upscale", photo, "--scale", 2, "--model", run), "inpaint": box, "plain": box}[task]
    ending = ldm(*command, *out)
    assert ending.code == 0, ending.stderr
    assert ending.json["distilled"]["calls"] == 1 and ending.json["steps"] == 1
    refused = ldm(*command, "--steps", 3, "--out", tmp_path / "other")
    assert refused.code == 2 and "distilled to 1 calls" in refused.line


def test_conversions_keep_what_it_is_or_are_refused(student, tmp_path):
    refused = ldm("convert", student, tmp_path / "model.ckpt", "--to", "compvis")
    assert refused.code == 4 and "distilled to 2 network calls" in refused.line
    assert ldm("convert", student, tmp_path / "run", "--to", "run").code == 0
    ending = ldm("convert", student, tmp_path / "folder", "--to", "diffusers")
    assert ending.code == 0 and "distilled to 2 network calls" in ending.stderr
    for copy in ("run", "folder"):
        model = ldmcli.load(tmp_path / copy)
        assert model.config.distill == ldmcli.load(student).config.distill and model.config.sample.steps == 2
        with pytest.raises(UsageError, match="distilled to 2 calls"):
            model.sample(prompt="a red star", guidance=2.0)


def test_an_evaluation_states_it(student):
    ending = ldm("eval-fid", "--model", student, "--features", "effnet-lite0", "--metrics", "fid", "-n", 4, "--json")
    if ending.code == 0:  # the network of features may not be here
        assert ending.json["sampling"]["distilled"]["calls"] == 2


def test_what_cannot_be_distilled_is_one_line(student, tiny_runs, ae, tmp_path):
    text, out = tiny_runs["text"], ("--out", tmp_path / "out")
    for line, code, says in (
        (("distill", ae), 4, "a run of kind autoencoder"),
        (("distill", tmp_path), 4, "no run"),
        (("distill", text, "--guidance", "text=2"), 2, "one scale"),
        (("distill", text, "--set", "diffusion.channels=32"), 2, "a student has its teacher's network"),
        (("distill", text, "--set", "distill.calls=2"), 2, "--steps 4"),
        (("distill", text, "--calls", 4000), 2, "timesteps"),
        (("train-ldm", "--autoencoder", ae, "--set", "distill.calls=2"), 2, "`ldm distill RUN` sets it"),
    ):
        ending = ldm(*line, *out)
        assert ending.code == code and says in ending.line, (line, ending.stderr)
        assert not (tmp_path / "out" / "model.safetensors").exists()
    plan = ldm("distill", text, "--calls", 4, "--plan", "--json").json
    assert plan["command"] == "ldm distill" and any("passes of the teacher" in note for note in plan["notes"])
