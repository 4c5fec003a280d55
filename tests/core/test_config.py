"""Configuration: every source in its order, each value with its origin, mistakes in one line, TOML that comes back."""

import dataclasses
from types import SimpleNamespace

import pytest

from ldmcli.core import config
from ldmcli.core.errors import UsageError
from ldmcli.core.settings import AutoencoderConfig, DataSettings, DiffusionConfig, DiffusionSettings, TrainSettings


def complaint(kind: str, *layers) -> str:
    with pytest.raises(UsageError) as caught:
        config.resolve(kind, layers)
    return str(caught.value)


@pytest.fixture
def preset(monkeypatch):
    values = {"train.steps": 1, "train.seed": 1, "train.keep": 1, "train.warmup": 1, "train.log_every": 1}
    known = {"tiny": SimpleNamespace(kind="autoencoder", values=values, summary="")}
    monkeypatch.setattr(config, "presets", lambda: known)


def test_each_source_wins_over_the_one_before(preset, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[train]\nseed = 2\nkeep = 2\nwarmup = 2\nlog_every = 2\n")
    environ = {"LDM_TRAIN_KEEP": "3", "LDM_TRAIN_WARMUP": "3", "LDM_TRAIN_LOG_EVERY": "3"}
    named = [("--warmup", {"train.warmup": "4"}), ("--log-every", {"train.log_every": "4"})]
    layers = config.gather(
        "autoencoder", preset="tiny", recipe=recipe, environ=environ, named=named, assignments=["train.log_every=5"]
    )
    resolved = config.resolve("autoencoder", layers)
    train = resolved.config.train
    assert (train.steps, train.seed, train.keep, train.warmup, train.log_every) == (1, 2, 3, 4, 5)
    assert [resolved.origins[f"train.{name}"] for name in ("lr", "steps", "seed", "keep", "warmup", "log_every")] == [
        "default",
        "preset tiny",
        f"recipe {recipe}",
        "environment LDM_TRAIN_KEEP",
        "--warmup",
        "--set",
    ]


def test_the_plan_lists_every_setting_with_its_value_and_origin():
    rows = config.describe(config.resolve("diffusion", [("--set", {"train.track": "wandb,trackio"})]))
    assert ("train.track", '["wandb", "trackio"]', "--set") in rows
    assert ("train.compile", "false", "default") in rows
    assert [path for path, _, _ in rows] == list(config.paths("diffusion"))


@pytest.mark.parametrize(
    "path, text, value",
    [
        ("train.steps", "10_000", 10_000),
        ("train.steps", "1e3", 1000),
        ("train.lr", "3e-4", 3e-4),
        ("train.lr", "1", 1.0),
        ("train.compile", "yes", True),
        ("train.compile", "false", False),
        ("train.micro_batch", "auto", 0),
        ("train.betas", "0.5,0.75", (0.5, 0.75)),
        ("diffusion.channel_mult", "[1, 2, 4]", (1.0, 2.0, 4.0)),
        ("diffusion.channel_mult", "1,2,4", (1.0, 2.0, 4.0)),
        ("diffusion.attention_resolutions", "4", (4,)),
        ("diffusion.attention_resolutions", "[]", ()),
        ("data.size", "48", (48, 48)),
        ("data.size", "48x64", (48, 64)),
        ("data.size", "[48, 64]", (48, 64)),
        ("condition.kinds", "class+text", ("class", "text")),
        ("condition.kinds", "none", ()),
        ("data.source", "7", "7"),
        ("data.source", '"quoted"', "quoted"),
        ("data.source", "photos/[a]=b", "photos/[a]=b"),
    ],
)
def test_text_becomes_the_setting_s_type(path, text, value):
    resolved = config.resolve("diffusion", [("--set", {path: text})])
    found = config.flat(resolved.config)[path]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "path, value, expected",
    [
        ("train.steps", "many", "'many' is not a whole number"),
        ("train.steps", 1.5, "1.5 is not a whole number"),
        ("train.steps", True, "true is not a whole number"),
        ("train.lr", "nan", "'nan' is not a number"),
        ("train.lr", float("inf"), "is not a number"),
        ("train.lr", [1.0], "[1.0] is not a number"),
        ("train.compile", "perhaps", "'perhaps' is not true or false"),
        ("train.compile", 1, "1 is not true or false"),
        ("data.source", 7, "7 is not text"),
        ("data.source", "cut\udcff", "is not text"),
        ("train.betas", [0.9], "[0.9] is not 2 values, each a number"),
        ("diffusion.attention_resolutions", ["a"], "is not a list, each a whole number"),
        ("data.size", "wide", "'wide' is not pixels, as 64 or 48x64"),
        ("diffusion.channel_mult", "[1, 2", "is not a list"),
    ],
)
def test_a_wrong_type_names_its_origin_and_its_setting(path, value, expected):
    line = complaint("diffusion", ("recipe r.toml", {path: value}))
    assert line.startswith(f"recipe r.toml: {path}: ") and expected in line


def test_a_wrong_type_in_a_named_option_is_told_by_the_option_alone():
    assert complaint("diffusion", ("--steps", {"train.steps": "x"})) == "--steps: 'x' is not a whole number"


@pytest.mark.parametrize(
    "path, meant",
    [
        ("train.stesp", "train.steps"),
        ("trian.steps", "train.steps"),
        ("data.batch_size", "train.batch_size"),
        ("lr", "train.lr"),
    ],
)
def test_an_unknown_setting_suggests_the_one_that_was_meant(path, meant):
    line = complaint("autoencoder", ("--set", {path: "1"}))
    assert line == f"--set {path}: no such setting; did you mean {meant}?"


def test_an_unknown_setting_like_no_other_gets_no_suggestion():
    assert complaint("autoencoder", ("--set", {"zzz": "1"})) == "--set zzz: no such setting"


def test_a_setting_of_the_other_command_is_told_apart_from_an_unknown_one():
    assert "a setting of `ldm train-ae`, not of `ldm train-ldm`" in complaint("diffusion", ("r", {"loss.l1": 1}))


def test_checks_between_fields_wait_for_all_layers():
    # each half alone is wrong: four entries need f = 8
    layers = [
        ("preset p", {"autoencoder.family": "paper", "autoencoder.channel_mult": [1, 2, 4, 4]}),
        ("--f", {"autoencoder.f": "8"}),
    ]
    assert config.resolve("autoencoder", layers).config.autoencoder.f == 8
    line = complaint("autoencoder", layers[0])
    assert "needs 3 entries" in line and line.endswith("(from preset p)")


def test_a_value_that_a_check_refuses_names_where_it_came_from():
    assert complaint("diffusion", ("LDM_X", {"data.crop": "left"})).endswith("center, random (from LDM_X)")


# --- environment -------------------------------------------------------------------------------------------------


def test_environment_variables_that_are_no_settings_are_ignored():
    names = ("LDM_CACHE", "LDM_WEIGHTS", "LDM_EXIT_DIR", "LDM_DEBUG_PAUSE", "LDM_", "LDM_DATA", "PATH", "ldm_train_lr")
    assert config.environment_layers("diffusion", dict.fromkeys(names, "x")) == []


def test_a_variable_that_only_the_other_command_reads_is_left_alone():
    assert config.environment_layers("diffusion", {"LDM_LOSS_L1": "1"}) == []
    assert config.environment_layers("autoencoder", {"LDM_LOSS_L1": "1"}) == [
        ("environment LDM_LOSS_L1", {"loss.l1": "1"})
    ]


def test_a_misspelt_variable_of_a_section_fails_with_a_suggestion():
    layers = config.environment_layers("diffusion", {"LDM_TRAIN_STESP": "1"})
    assert complaint("diffusion", *layers) == (
        "environment LDM_TRAIN_STESP: train.stesp: no such setting; did you mean train.steps?"
    )


@pytest.mark.parametrize("kind", list(config.KINDS))
def test_every_setting_has_a_variable(kind):
    for path in config.paths(kind):
        variable = "LDM_" + path.replace(".", "_").upper()
        assert config.environment_layers(kind, {variable: "1"}) == [(f"environment {variable}", {path: "1"})]


# --- --set, recipes, presets -------------------------------------------------------------------------------------


def test_set_keeps_further_equals_signs_in_the_value():
    assert config.set_layers(["data.source=a=b"]) == [("--set", {"data.source": "a=b"})]


def test_set_without_a_value_says_how_to_write_it():
    with pytest.raises(UsageError, match="section.name=value"):
        config.set_layers(["train.steps"])


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"[train]\nsteps = 1\nlr = \n", "line 3: not TOML"),
        (b"[train]\nsteps = 1\n[train]\n", "line 3: not TOML"),
        (b"[train\n", "line 1: not TOML"),
        (b"steps = 1\n", "settings stand in sections"),
        (b"[train]\n# \xff\n", "not UTF-8 text (byte 10)"),
    ],
)
def test_a_bad_recipe_is_told_with_file_and_place(tmp_path, content, expected):
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        config.read_recipe(path)
    assert str(caught.value).startswith(f"{path}: ") and expected in str(caught.value)


def test_a_recipe_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xef\xbb\xbf[train]\nsteps = 3\n")
    assert config.read_recipe(path).values == {"train.steps": 3}


def test_a_recipe_that_comes_with_ldm_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "shapes-ae.toml").write_text("[train]\nsteps = 3\n")
    monkeypatch.setattr(config, "RECIPES", tmp_path)
    assert config.recipe_layers("autoencoder", "shapes-ae")[0][1] == {"train.steps": 3}
    with pytest.raises(UsageError, match="did you mean shapes-ae"):
        config.recipe_layers("autoencoder", "shape-ae")


def test_an_unknown_preset_suggests_one(preset):
    with pytest.raises(UsageError, match="did you mean tiny"):
        config.preset_layer("autoencoder", "tinny")


def test_a_preset_of_the_other_command_says_whose_it_is(preset):
    with pytest.raises(UsageError, match="of `ldm train-ae`, not of `ldm train-ldm`"):
        config.preset_layer("diffusion", "tiny")


def test_every_preset_resolves():
    known = config.presets()
    assert known
    for name, each in known.items():
        resolved = config.resolve(each.kind, [config.preset_layer(each.kind, name)])
        assert all(resolved.origins[path] == f"preset {name}" for path in each.values)


# --- out and back ------------------------------------------------------------------------------------------------

ODD = 'a "quoted" \\ path\twith\nlines, é, 画, \x7f and # = [x]'


@pytest.mark.parametrize(
    "each",
    [
        AutoencoderConfig(),
        DiffusionConfig(),
        DiffusionConfig(
            data=DataSettings(source=ODD, size=(48, 64), flip=True),
            diffusion=DiffusionSettings(channel_mult=(1, 2.5), attention_resolutions=()),
            train=TrainSettings(lr=1 / 3 * 1e-17, betas=(0.1, 1e16), track=("wandb", 'a"b')),
        ),
    ],
)
def test_toml_comes_back_equal(each):
    kind = config.kind_of(each)
    text = config.to_toml(each, "made by a test\nsecond line")
    assert config.from_toml(kind, text) == each
    assert text.startswith("# made by a test\n# second line\n")
    assert config.to_toml(config.from_toml(kind, text)) == config.to_toml(each)


def test_the_hash_tells_configurations_apart_and_not_how_they_were_made():
    whole = config.resolve("diffusion", [("--set", {"diffusion.channel_mult": "1,2,3.3334"})]).config
    assert config.config_hash(whole) == config.config_hash(DiffusionConfig())
    other = dataclasses.replace(whole, train=TrainSettings(seed=1))
    assert config.config_hash(other) != config.config_hash(whole)


@pytest.mark.parametrize(("path", "value"), [("task.tone", -1), ("condition.layout_planes", -3)])
def test_negative_sizes_are_refused_by_name(path, value):
    with pytest.raises(UsageError, match=f"{path} = {value}"):
        config.resolve("diffusion", [("--set", {path: value})])
