"""Recipes: each resolves, builds the network that its source counts, says what to expect, and is found and listed."""

import re
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from recipe_networks import RECIPES, command, count, diffusion_model, first_stage, resolved, writer_of
from tiny import ldm
from wheels import build_wheel, copy_of_sources

from ldmcli import cli
from ldmcli.cli.manage import RECIPE_GROUPS, recipe_summary
from ldmcli.core import config, presets
from ldmcli.core.errors import UsageError
from ldmcli.core.settings import PROCESS
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.training.cost import meta_classifier

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Published:
    """Parameters of the network, and what the paper prints of it in millions with what it counts beside the UNet."""

    parameters: int
    printed: int | None = None
    beside: int = 0
    reached: bool = True


TEXT_1P4B, LAYOUT = 581_994_042, 58_858_496  # transformers of the released checkpoints, their unused heads included
VQ_F4 = 55_322_782

# counts of the first stages published with code: original checkpoints; Tab. 8 alone gives no count for the others
FIRST_STAGES = {
    "kl-f2": None,
    "kl-f4": 55_312_063,
    "kl-f8": 83_653_863,
    "kl-f16": 69_610_963,
    "kl-f16-c8": None,
    "kl-f32": 103_880_131,
    "kl-f32-c16": None,
    "vq-f2": None,
    "vq-f2-n64": None,
    "vq-f4": VQ_F4,
    "vq-f4-n256": None,
    "vq-f4-noattn": 53_219_486,
    "vq-f8": 67_717_295,
    "vq-f8-n256": 67_652_783,
    "vq-f16": 69_593_371,
    "vq-f32": None,
    "vq-f32-c32": None,
}
MODELS = {
    "celeba256": Published(274_056_163, 274),
    "ffhq256": Published(274_056_163, 274),
    "lsun_beds256": Published(274_056_163, 274),
    "lsun_churches256": Published(294_966_916, 294),
    "cin256": Published(394_984_196, 395),
    "cin256-v2": Published(400_920_579, 400),
    "ldm1-imagenet": Published(396_835_971, 396),
    "ldm2-imagenet": Published(390_888_578, 391),
    "ldm4-imagenet": Published(400_920_579, 391, reached=False),
    "ldm8-imagenet": Published(394_984_196, 395),
    "ldm16-imagenet": Published(395_002_632, 395),
    "ldm32-imagenet": Published(395_113_248, 395),
    "ldm1-celebahq": Published(270_458_115, 270),
    "ldm2-celebahq": Published(264_510_722, 265),
    "ldm4-celebahq": Published(274_056_163, 274),
    "ldm8-celebahq": Published(257_733_124, 258),
    "ldm16-celebahq": Published(257_751_560, 260, reached=False),
    "ldm32-celebahq": Published(257_862_176, 258),
    "txt2img-1p4B": Published(872_300_484, 1454, TEXT_1P4B),  # printed as 1.45B
    "text2img256": Published(403_623_939),
    "layout2img-openimages256": Published(246_277_379, 306, LAYOUT),
    "layout2img-coco": Published(312_241_540, 345, LAYOUT, reached=False),
    "layout2img-coco-ft": Published(246_277_379),
    "semantic_synthesis256": Published(215_229_315, 215),
    "semantic-kl-unscaled": Published(215_229_315),
    "semantic-kl-rescaled": Published(215_229_315),
    "semantic_synthesis512": Published(215_229_315),
    "sr4-imagenet": Published(113_622_563, 169, VQ_F4),
    "sr4-imagenet-15ep": Published(113_622_563),
    "sr4-imagenet-pixels": Published(113_622_563),
    "bsr_sr": Published(113_622_563),
    "inpaint-vq-attn": Published(215_230_467, 215),
    "inpaint-vq-noattn": Published(215_230_467, 215),
    "inpaint-kl-attn": Published(215_230_467, 215),
    "inpaint-pixels": Published(215_230_467, 215),
    "inpainting_big": Published(387_245_827, 387),
    "inpainting_big-512": Published(387_245_827, 387),
}
CLASSIFIERS = {"ldm8-imagenet-classifier": "cin256"}  # recipe of the classifier → of the model that it leads
OURS = sorted(set(RECIPES) - set(FIRST_STAGES) - set(MODELS) - set(CLASSIFIERS))
STUDIES = [[f"ldm{f}-{data}" for f in (1, 2, 4, 8, 16, 32)] for data in ("imagenet", "celebahq")]


def stated_size(name: str) -> int:
    return int(recipe_summary(RECIPES[name])["head"]["size"].split()[0].replace(",", ""))


# --- what they build -------------------------------------------------------------------------------------------


def test_every_published_setup_has_a_recipe():
    assert set(RECIPES) == set(FIRST_STAGES) | set(MODELS) | set(CLASSIFIERS) | set(OURS)
    assert {*presets.FIRST_STAGES, *presets.MODELS} <= set(RECIPES), "a preset of a published model has no recipe"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_resolves(name):
    assert resolved(name).config


@pytest.mark.parametrize("name", [name for name in RECIPES if name in FIRST_STAGES])
def test_first_stage_has_the_published_count(name):
    settings = resolved(name).config.autoencoder
    with torch.device("meta"):
        parameters = count(Autoencoder(settings))
    assert parameters == stated_size(name)
    assert FIRST_STAGES[name] in (None, parameters)


@pytest.mark.parametrize("name", MODELS)
def test_model_has_the_published_count(name):
    source = MODELS[name]
    parameters = count(diffusion_model(name).unet)
    assert parameters == source.parameters == stated_size(name)
    if source.printed is None:
        return
    gap = abs((parameters + source.beside) / 1e6 - source.printed)
    assert (gap < 1) == source.reached, "the paper prints whole millions, some rounded and some cut off"
    if not source.reached:  # the head says what the paper prints
        assert f"{source.printed}M" in recipe_summary(RECIPES[name])["head"]["size"]


@pytest.mark.parametrize("name, led", CLASSIFIERS.items())
def test_a_classifier_has_the_stated_size_and_the_process_of_the_model_that_it_leads(name, led):
    settings, channels, f = resolved(name).config, *first_stage(name)
    height, width = settings.data.size
    network = meta_classifier(settings, 1000, (channels, height // f, width // f))
    assert count(network) == stated_size(name)
    theirs = config.flat(resolved(led).config)
    assert {path: theirs[path] for path in PROCESS} == {path: config.flat(settings)[path] for path in PROCESS}


@pytest.mark.parametrize("name", OURS)
def test_recipe_of_ours_builds(name):
    found = resolved(name)
    with torch.device("meta"):
        network = Autoencoder(found.config.autoencoder) if found.kind == "autoencoder" else None
    assert count(network or diffusion_model(name)) > 0


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study[0].split("-")[1])
def test_models_of_a_study_differ_in_nothing_but_shape_batch_and_rate(study):
    free = {
        "diffusion.channels",
        "diffusion.channel_mult",
        "diffusion.attention_resolutions",
        "train.batch_size",
        "train.lr",
    }
    fixed = [
        {path: value for path, value in config.flat(resolved(name).config).items() if path not in free}
        for name in study
    ]
    assert all(settings == fixed[0] for settings in fixed)
    assert [first_stage(name)[1] for name in study] == [1, 2, 4, 8, 16, 32]
    assert [first_stage(name)[0] for name in study] == [3, 2, 3, 4, 8, 32], "channels of Tab. 13 and 14"
    sizes = [MODELS[name].parameters for name in study]
    assert max(sizes) < 1.07 * min(sizes), "Sec. 4.1 fixes the number of parameters"


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study[0].split("-")[1])
def test_attention_of_a_study_is_at_the_pixels_of_the_tables(study):
    at = {1: [32, 16, 8], 2: [32, 16, 8], 4: [32, 16, 8], 8: [32, 16, 8], 16: [16, 8, 4], 32: [8, 4, 2]}
    for name in study:
        f = first_stage(name)[1]
        assert [256 // f // factor for factor in resolved(name).config.diffusion.attention_resolutions] == at[f]


@pytest.mark.parametrize(
    "name, path, value",
    [
        ("cin256-v2", "sample.guidance", 1.5),
        ("bsr_sr", "task.degradation", "bsr-light"),
        ("sr4-imagenet", "task.degradation", "bicubic"),
        ("inpainting_big-512", "data.size", (512, 512)),
        ("semantic-kl-unscaled", "diffusion.latent_scale", "none"),
        ("semantic-kl-rescaled", "diffusion.latent_scale", "global"),
        ("layout2img-coco", "diffusion.dropout", 0.1),
        ("cin256-v2", "train.ema", True),
        ("txt2img-1p4B", "train.ema", True),
        ("txt2img-1p4B", "condition.vocabulary", "bert-base-uncased"),
        ("layout2img-coco", "condition.crop_tokens", True),
        ("layout2img-coco-ft", "data.min_objects", 2),
        ("bsr_sr", "data.crop_min", 0.5),
        ("vq-f8", "data.crop_max", 0.6667),
    ],
)
def test_what_sets_a_variant_apart(name, path, value):
    assert config.flat(resolved(name).config)[path] == value


# --- what they say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_head_says_command_hardware_time_and_expectation(name):
    facts = recipe_summary(RECIPES[name])
    assert facts["summary"]
    assert all(facts["head"].get(field) for field in ("command", "hardware", "time", "expected"))
    if name in OURS:
        assert re.search(r"(?<!to be )measured", facts["head"]["expected"])
    else:
        assert facts["head"]["expected"].endswith("never run by us")
        assert re.search(r"Tab\. \d|Fig\. \d|model zoo|no figure published", facts["head"]["expected"])
    assert all(len(line) <= 100 for line in RECIPES[name].read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("name", RECIPES)
def test_command_is_one_that_ldm_takes(name):
    program, sub, *rest = command(name)
    assert f"{program} {sub}" == recipe_summary(RECIPES[name])["command"]
    context = cli.load(sub).make_context(f"ldm {sub}", rest)
    assert context.params["recipe"] == name
    for option in ("autoencoder", "init_from"):
        run = context.params.get(option)
        assert run in (None, "none") or writer_of(run)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[train]\nsteps = 3\n", ""),
        ("[train]\nsteps = 3\n[loss]\nl1 = 1\n", "autoencoder"),
        ("[sample]\nsteps = 3\n", "diffusion"),
        ('preset = "vq-f4"\n[train]\nsteps = 3\n', "autoencoder"),
    ],
)
def test_a_recipe_knows_its_kind_where_its_settings_say_it(tmp_path, text, expected):
    (tmp_path / "mine.toml").write_text(text)
    assert config.read_recipe(tmp_path / "mine.toml").kind == expected


def test_where_both_commands_read_all_settings_the_head_decides(tmp_path):
    (tmp_path / "mine.toml").write_text("# Mine\n#\n# Command: ldm train-ae \\\n#   --recipe mine\n\n[train]\nlr = 1\n")
    facts = recipe_summary(tmp_path / "mine.toml")
    assert facts["command"] == "ldm train-ae" and facts["head"] == {"command": "ldm train-ae --recipe mine"}


# --- how they are found ----------------------------------------------------------------------------------------


def test_the_list_has_every_recipe_once_under_its_group_in_80_columns():
    ending = ldm("recipes")
    out = ending.stdout
    assert ending.code == 0 and all(len(line) <= 80 for line in out.splitlines())
    listed = re.findall(r"^  (\S+)  +\S", out, re.MULTILINE)
    assert sorted(listed) == sorted(RECIPES)
    headings = re.findall(r"^([A-Z].*) \(ldm train-\w+\)$", out, re.MULTILINE)
    assert headings == [title for title in RECIPE_GROUPS.values() if title in headings]
    rows = {title: out.split(f"{title} (")[1].split("\n\n")[0] for title in headings}
    for title, name in [
        ("First stages", "vq-f4"),
        ("Classes", "ldm32-imagenet"),
        ("Text to image", "txt2img-1p4B"),
        ("Layout to image", "layout2img-coco"),
        ("Semantic maps", "semantic_synthesis256"),
        ("Super-resolution", "bsr_sr"),
        ("Inpainting", "inpainting_big"),
        ("Unconditional", "ffhq256"),
    ]:
        assert f"  {name} " in rows[title]
    assert out.index("ldm2-imagenet") < out.index("ldm16-imagenet")


def test_the_list_as_json_carries_heads():
    rows = {row["name"]: row for row in ldm("recipes", "--json").json["recipes"]}
    assert rows["cin256-v2"]["group"] == "Classes" and "FID 3.60" in rows["cin256-v2"]["head"]["expected"]
    assert "\\" not in rows["cin256-v2"]["head"]["command"]


def test_a_recipe_is_shown_as_its_file_so_that_it_can_be_a_start(tmp_path):
    ending = ldm("recipes", "ldm8-imagenet")
    assert ending.code == 0
    (tmp_path / "my.toml").write_text(ending.stdout)
    assert config.read_recipe(tmp_path / "my.toml") == config.read_recipe(RECIPES["ldm8-imagenet"])


def test_an_unknown_recipe_suggests_one():
    ending = ldm("recipes", "ldm9-imagenet")
    assert ending.code == 2 and "did you mean ldm" in ending.stderr and ending.stderr.count("\n") == 1


def test_recipes_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {name: config.recipe_path(name) for name in RECIPES} == RECIPES


def test_names_differ_beyond_case():
    assert len({name.lower() for name in RECIPES}) == len(RECIPES)


# --- preset = "…" ----------------------------------------------------------------------------------------------


def test_a_recipe_stands_above_the_preset_that_it_names(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('preset = "kl-f8"\n[train]\nsteps = 7\n')
    found = config.resolve("autoencoder", config.gather("autoencoder", recipe=path))
    assert found.config.train.steps == 7 and found.origins["train.steps"] == f"recipe {path}"
    assert found.config.autoencoder.f == 8 and found.origins["autoencoder.f"] == "preset kl-f8"


@pytest.mark.parametrize(
    "kind, preset, text, expected",
    [
        ("autoencoder", "", 'preset = "kl-f9"\n', "preset kl-f9: no such preset; did you mean"),
        ("diffusion", "", 'preset = "kl-f8"\n', "a preset of `ldm train-ae`, not of `ldm train-ldm`"),
        ("autoencoder", "", "preset = 3\n", "preset: 3 is not a preset's name"),
        ("autoencoder", "kl-f4", 'preset = "kl-f8"\n', "give one of the two"),
    ],
)
def test_a_wrong_preset_in_a_recipe_is_told_with_the_file(tmp_path, kind, preset, text, expected):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        config.gather(kind, preset=preset, recipe=path)
    assert expected in str(caught.value) and str(path) in str(caught.value)


# --- the wheel -------------------------------------------------------------------------------------------------


def test_the_package_list_names_every_folder_with_code():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {".".join(path.relative_to(ROOT).parent.parts) for path in (ROOT / "ldmcli").rglob("*.py")}
    assert set(setup["packages"]) == folders | {"ldmcli.recipes"}
    assert setup["package-dir"]["ldmcli.recipes"] == "recipes"


def test_a_wheel_carries_recipes_and_schema_and_finds_the_recipes(tmp_path):
    pytest.importorskip("setuptools", "70.1")
    wheel = build_wheel(copy_of_sources(tmp_path))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {f"ldmcli/recipes/{name}.toml" for name in RECIPES} <= set(names)
    assert not [name for name in names if name.startswith("recipes/")], "a top-level package named recipes"
    assert [name for name in names if name.endswith("/share/ldm/evaluation.schema.json")]
    run = [sys.executable, "-c", "from ldmcli.core import config; print(config.recipe_path('vq-f4'))"]
    ended = subprocess.run(
        run, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")}, check=True, capture_output=True, text=True
    )
    assert Path(ended.stdout.strip()) == tmp_path / "site" / "ldmcli" / "recipes" / "vq-f4.toml"
