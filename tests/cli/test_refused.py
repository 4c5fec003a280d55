"""Settings that can't go together are refused before any data is read: by training and by --plan, in the same line."""

import pytest
import tiny

from ldmcli.core import config

NOWHERE = ("--data", "/no/such/data")  # opening it is told by another line, and by code 3
AE = (*NOWHERE, *tiny.AE_NETWORK)
LDM = (*NOWHERE, "--autoencoder", "none", *tiny.UNET)
REFUSED = {
    # first stage
    "identity": ("train-ae", (*AE, "--f", 1), 2, "--f 1 is the identity"),
    "size and f": ("train-ae", (*AE, "--size", "30x64"), 2, "f = 4 needs multiples of 4; nearest: 32x64"),
    "no loss": (
        "train-ae",
        (*AE, *(word for name in ("l1", "l2", "edge") for word in ("--set", f"loss.{name}=0"))),
        2,
        "every weight in [loss] is 0",
    ),
    "critic and size": ("train-ae", (*AE, "--size", 16, "--set", "loss.disc_weight=1"), 2, "smaller than its patch"),
    "grey": ("train-ae", (*AE, "--set", "autoencoder.in_channels=1"), 2, "have 3 (RGB)"),
    "no levels": ("train-ae", (*AE, "--set", "autoencoder.channel_mult=[]"), 2, "one factor a level"),
    "negative weight": ("train-ae", (*AE, "--set", "loss.kl_weight=-1"), 2, "must not be negative"),
    "missing judge": ("train-ae", (*AE, "--set", "loss.perceptual=/no/vgg.pth"), 3, "no such weights file"),
    "judge and size": ("train-ae", (*AE, "--size", 8, "--set", "loss.perceptual_weight=1"), 3, "at least 16 px a side"),
    "no codes": ("train-ae", (*AE, "--reg", "vq", "--set", "autoencoder.codebook_size=0"), 2, "must be at least 1"),
    # both
    "precision": ("train-ae", (*AE, "--mixed-precision", "fp16"), 2, "needs a GPU"),
    "tracker": ("train-ldm", (*LDM, "--set", "train.track=nobody"), 2, "no such tracker"),
    "background": ("train-ldm", (*LDM, "--set", "data.background=no-colour"), 2, "not a colour"),
    "shapes": ("train-ldm", (*LDM, "--data", "shapes:9"), 2, "the levels are"),
    "crop": ("train-ldm", (*LDM, "--set", "data.crop_min=0.5"), 2, "only random crops"),
    "crops": (
        "train-ae",
        (*AE, "--crop", "random", "--set", "data.crop_min=0.9", "--set", "data.crop_max=0.5"),
        2,
        "crop_min <= crop_max",
    ),
    # diffusion
    "condition": ("train-ldm", (*LDM, "--condition", "lowres"), 2, "--task sr or inpaint brings it along"),
    "twice": ("train-ldm", (*LDM, "--condition", "text+text"), 2, "named twice"),
    "streamed layout": ("train-ldm", (*LDM, "--condition", "layout", "--streaming"), 2, "leave --streaming away"),
    "streamed map": ("train-ldm", (*LDM, "--condition", "text+map", "--streaming"), 2, "leave --streaming away"),
    "streamed boxes": ("train-ldm", (*LDM, "--streaming", "--set", "data.min_objects=2"), 2, "all rows beforehand"),
    "scale": ("train-ldm", (*LDM, "--size", 20, "--task", "sr", "--scale", 8), 2, "multiples of 8"),
    "halvings": (
        "train-ldm",
        (*LDM, "--size", 18, "--set", "diffusion.channel_mult=1,1,1"),
        2,
        "multiples of 4; nearest: 16x16",
    ),
    "patch": ("train-ldm", (*LDM, "--size", 20, "--set", "diffusion.patch=3"), 2, "multiples of 3"),
    "heads": ("train-ldm", (*LDM, "--set", "diffusion.num_heads=3"), 2, "does not divide a width"),
    "heads of levels": ("train-ldm", (*LDM, "--set", "diffusion.level_heads=1,1,1"), 2, "one number for each"),
    "vector": ("train-ldm", (*LDM, "--condition", "class", "--set", "diffusion.vector_mlp=false"), 2, "as wide"),
    "betas": (
        "train-ldm",
        (*LDM, "--set", "diffusion.prediction=eps", "--set", "diffusion.beta_start=0.5"),
        2,
        "beta_start",
    ),
    "weight": ("train-ldm", (*LDM, "--set", "diffusion.loss_weight=min_snr"), 2, "flow takes 'uniform'"),
    "sampler": ("train-ldm", (*LDM, "--set", "sample.sampler=none-such"), 2, "choose one of"),
    "steps": ("train-ldm", (*LDM, "--set", "sample.steps=5000"), 2, "the model has 1000 timesteps"),
    "spacing": ("train-ldm", (*LDM, "--set", "sample.spacing=odd"), 2, "sample.spacing"),
    "original steps": (
        "train-ldm",
        (*LDM, "--set", "diffusion.prediction=eps", "--set", "sample.spacing=original", "--set", "sample.steps=3"),
        2,
        "as in the original code",
    ),
    "words": ("train-ldm", (*LDM, "--condition", "text", "--set", "condition.text_length=2"), 2, "needs 3"),
    "no stage": ("train-ldm", (*NOWHERE, "--autoencoder", "/no/such/run"), 4, "no such run folder"),
    "no vocabulary": (
        "train-ldm",
        (*LDM, "--condition", "text", "--set", "condition.vocabulary=/no/words"),
        3,
        "no tokeniser could be loaded",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_training_and_plan_refuse_alike_and_open_no_data(name, tmp_path):
    command, words, code, said = REFUSED[name]
    trained = tiny.ldm(command, *words, "--steps", 1, "--out", tmp_path / "run")
    planned = tiny.ldm(command, *words, "--steps", 1, "--out", tmp_path / "run", "--plan")
    assert (trained.code, planned.code) == (code, code), (trained.stderr, planned.stderr)
    assert said in trained.line and trained.line.startswith("ldm: ") and trained.line == planned.line
    assert "Traceback" not in trained.stderr + planned.stderr


@pytest.mark.parametrize("command, words", [("train-ae", AE), ("train-ldm", LDM)])
def test_what_is_right_gets_as_far_as_the_data_and_can_be_planned(command, words, tmp_path):
    trained = tiny.ldm(command, *words, "--out", tmp_path / "run")
    assert trained.code == 3 and "/no/such/data" in trained.line
    assert tiny.ldm(command, *words, "--plan", "--json").code == 0


TOLD = ("none", "class", "text", "layout", "map", "text+class+layout+map")


@pytest.mark.parametrize(
    "kinds, task, fill",
    [
        *((kinds, task, "smooth") for kinds in TOLD for task in ("generate", "sr", "inpaint")),
        ("none", "inpaint", "patches"),
        ("none", "inpaint", "black"),
    ],
)
def test_every_condition_and_task_can_be_planned(kinds, task, fill, monkeypatch):
    """Holes are filled by looking at pixels, which a plan has none of."""
    from ldmcli.reports import cost_estimate as planning

    monkeypatch.setattr(planning, "probe_flops_per_s", lambda device, dtype: 1e9)
    ending = tiny.ldm(
        "train-ldm", *LDM, "--condition", kinds, "--task", task, "--set", f"task.fill={fill}", "--plan", "--json"
    )
    assert ending.code == 0, ending.stderr


def test_a_recipe_refuses_in_its_plan_what_its_training_refuses(tmp_path):
    words = ("train-ldm", "--recipe", "ldm8-imagenet", "--autoencoder", "none", *NOWHERE, "--size", 254)
    trained, planned = tiny.ldm(*words, "--out", tmp_path / "run"), tiny.ldm(*words, "--plan")
    assert trained.code == planned.code == 2 and trained.line == planned.line and "multiples of 4" in trained.line


@pytest.mark.parametrize(
    "path",
    [
        "train.steps",
        "train.batch_size",
        "diffusion.channels",
        "diffusion.groups",
        "diffusion.head_channels",
        "condition.context_dim",
        "data.max_pixels",
        "autoencoder.groups",
        "autoencoder.num_res_blocks",
        "loss.disc_layers",
    ],
)
def test_numbers_that_must_be_positive_are_refused_by_name(path):
    from ldmcli.core.errors import UsageError

    kind = next(kind for kind in config.KINDS if path in config.paths(kind))
    for value in (0, -1):
        with pytest.raises(UsageError, match=path.replace(".", r"\.")):
            config.resolve(kind, [("test", {path: value})])
