"""The command line: help, wording, codes, what commands hand to the library. Nothing here trains or draws."""

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from documents import document
from tiny import ldm
from typer.models import OptionInfo

import ldmcli
from ldmcli import cli
from ldmcli.cli import options as opt
from ldmcli.cli.commands import EXAMPLES, example_line
from ldmcli.cli.helptext import PANELS
from ldmcli.cli.parsing import ALIASES, info_of
from ldmcli.core import config, console
from ldmcli.core.errors import (
    DivergedError,
    ExitCode,
    InputError,
    Interrupted,
    ModelError,
    ResourceError,
    ThresholdError,
)

COMMANDS = list(cli.COMMANDS)


def stand_in(monkeypatch, name: str, **members) -> None:
    """Put a module with these functions in the place of a module of the library."""
    module = types.ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """What `ldm train-…` hands to the training loop; the loop itself doesn't run."""
    calls = []

    def train(kind, resolved, out, options):
        calls.append(
            types.SimpleNamespace(kind=kind, resolved=resolved, config=resolved.config, out=out, options=options)
        )
        return {"kind": kind, "state": "finished"}

    stand_in(monkeypatch, "ldmcli.training.loop", train=train, RunOptions=types.SimpleNamespace)
    monkeypatch.chdir(tmp_path)
    return calls


def raising(monkeypatch, error: BaseException) -> None:
    """`ldm runs` fails with `error`."""

    def list_runs(root):
        raise error

    monkeypatch.setattr("ldmcli.core.runs.list_runs", list_runs)


# --- help ------------------------------------------------------------------------------------------------------


@pytest.fixture
def at_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_the_first_page_lists_every_command_with_its_summary(at_80_columns):
    page = ldm("--help")
    assert page.code == 0
    for name, (_, summary, panel) in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", page.stdout, re.MULTILINE)
        assert f"\n{panel}\n" in page.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_a_help_page_fits_80_columns_and_ends_with_its_example(at_80_columns, name):
    page = ldm(name, "--help")
    assert page.code == 0 and page.stderr == ""
    assert max(map(len, page.stdout.splitlines())) <= 80
    example = page.stdout.split("\nExample\n")[1]
    assert " ".join(example.replace("\\\n", " ").split()) == example_line(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_shown_option_is_in_a_known_panel_with_a_unit_and_a_default(name):
    for param in cli.load(name).params:
        if param.param_type_name == "argument" or param.hidden:
            continue
        assert param.rich_help_panel in PANELS
        assert param.help and param.help.endswith("."), param.opts
        if not param.is_flag:
            assert param.metavar, f"{param.opts}: no unit"
            assert isinstance(param.show_default, str) or param.multiple, f"{param.opts}: no default"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_is_a_command_line_that_parses(name):
    assert EXAMPLES[name][0] == name
    command = cli.load(name)
    command.make_context(name, EXAMPLES[name][1:], obj={})


def test_every_command_has_an_example_and_no_example_is_of_no_command():
    assert set(EXAMPLES) == set(cli.COMMANDS)


def test_the_example_page_quotes_a_prompt_so_that_it_can_be_pasted():
    assert '--prompt "a red circle on a navy background"' in example_line("sample")


def test_help_shows_the_defaults_of_its_own_command():
    for name, kind in (("train-ae", "autoencoder"), ("train-ldm", "diffusion")):
        shown = re.search(r"--lr RATE +Learning rate\. +\[default: (\S+)\]", ldm(name, "--help").stdout)
        assert float(shown[1]) == config.defaults(kind)["train.lr"]


@pytest.mark.parametrize("args", [["--help"], ["train-ldm", "--help"], ["sample", "--help"], ["--version"], ["zzz"]])
def test_help_and_mistakes_load_neither_torch_nor_numpy_nor_datasets(ldm_process, tmp_path, args):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\natexit.register(lambda: open('modules', 'w').write(' '.join(sys.modules)))\n"
    )
    ended = ldm_process(*args, env={"PYTHONPATH": f"{tmp_path}:{Path(ldmcli.__file__).parents[1]}"})
    assert ended.code == (2 if args == ["zzz"] else 0)
    loaded = set((tmp_path / "modules").read_text().split())
    assert "ldmcli.cli" in loaded
    assert not loaded & {"torch", "numpy", "datasets", "transformers", "accelerate", "PIL", "rich"}


def test_importing_the_package_loads_no_torch():
    code = "import sys, ldmcli; assert 'torch' not in sys.modules; print(ldmcli.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(ldmcli.__file__).parents[1]
    )
    assert done.stdout.strip() == ldmcli.__version__, done.stderr


def test_the_package_has_the_promised_functions_and_no_others():
    assert callable(ldmcli.frechet) and callable(ldmcli.load) and callable(ldmcli.image_metrics)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        ldmcli.lod  # noqa: B018


def test_ldm_alone_shows_help_and_ends_with_code_2():
    ended = ldm()
    assert (ended.code, ended.stderr) == (2, "") and "Usage: ldm COMMAND" in ended.stdout


def test_completion_offers_the_commands(ldm_process):
    ended = ldm_process(env={"_LDM_COMPLETE": "complete_bash", "COMP_WORDS": "ldm train-", "COMP_CWORD": "1"})
    assert ended.stdout.split() == ["train-ae", "train-ldm", "train-classifier"]


def test_completion_offers_options_and_their_words(ldm_process):
    env = {"_LDM_COMPLETE": "complete_bash", "COMP_WORDS": "ldm sample --sampler d", "COMP_CWORD": "3"}
    assert ldm_process(env=env).stdout.split() == ["ddim", "ddpm", "dpm++"]
    env = {"_LDM_COMPLETE": "complete_bash", "COMP_WORDS": "ldm train-ae --micro", "COMP_CWORD": "2"}
    assert ldm_process(env=env).stdout.split() == ["--micro-batch"]


# --- options and their settings --------------------------------------------------------------------------------


def declared() -> list:
    return [
        alias
        for alias in vars(opt).values()
        if hasattr(alias, "__metadata__") and isinstance(alias.__metadata__[0], OptionInfo)
    ]


def test_every_option_that_sets_something_names_a_setting_that_exists():
    known = set(config.paths("autoencoder")) | set(config.paths("diffusion"))
    carried = {info_of(alias).path for alias in declared()} - {""}
    assert len(carried) > 30 and carried <= known


@pytest.mark.parametrize("name, kind", [("train-ae", "autoencoder"), ("train-ldm", "diffusion")])
def test_every_option_of_a_training_command_reaches_its_setting(name, kind):
    from ldmcli.cli import train

    function = getattr(train, name.replace("-", "_"))
    paths = [info_of(alias).path for alias in function.options.values() if info_of(alias).path]
    assert set(paths) <= set(config.paths(kind)) and len(paths) == len(set(paths))


@pytest.mark.parametrize("name", COMMANDS)
def test_no_name_is_declared_twice_in_a_command(name):
    names = [each for param in cli.load(name).params for each in (*param.opts, *param.secondary_opts)]
    assert len(names) == len(set(names))


def test_words_an_option_takes_are_those_the_library_knows():
    from ldmcli.diffusion.samplers import SAMPLERS
    from ldmcli.diffusion.schedule import SPACINGS

    assert tuple(info_of(opt.Sampler).choices) == tuple(SAMPLERS)
    assert info_of(opt.Spacing).choices == tuple(SPACINGS)


def test_an_option_sets_its_setting_and_is_its_origin(trained):
    assert ldm("train-ae", "--steps", 7, "--f", 8, "--no-attn", "--size", "32x48").code == 0
    resolved = trained[0].resolved
    assert resolved.config.train.steps == 7 and resolved.config.autoencoder.f == 8
    assert resolved.config.autoencoder.mid_attention is False and resolved.config.data.size == (32, 48)
    assert resolved.origins["train.steps"] == "--steps" and resolved.origins["train.lr"] == "default"


def test_options_win_over_the_environment_and_set_wins_over_options(trained, monkeypatch):
    monkeypatch.setenv("LDM_TRAIN_STEPS", "1")
    monkeypatch.setenv("LDM_TRAIN_SEED", "1")
    monkeypatch.setenv("LDM_TRAIN_KEEP", "1")
    assert ldm("train-ae", "--steps", 2, "--seed", 2, "--set", "train.steps=3").code == 0
    train = trained[0].config.train
    assert (train.steps, train.seed, train.keep) == (3, 2, 1)


@pytest.mark.parametrize(
    "alias, value, path, expected",
    [
        ("--max_train_steps", "7", "train.steps", 7),
        ("--learning_rate", "1e-4", "train.lr", 1e-4),
        ("--checkpointing_steps", "5", "train.save_every", 5),
        ("--checkpoints_total_limit", "3", "train.keep", 3),
        ("--report_to", "tensorboard", "train.track", ("tensorboard",)),
        ("--train_data_dir", "photos", "data.source", "photos"),
        ("--dataset_name", "user/set", "data.source", "user/set"),
        ("--train_batch_size", "6", "train.batch_size", 6),
        ("--mixed_precision", "bf16", "train.mixed_precision", "bf16"),
        ("--micro_batch", "auto", "train.micro_batch", 0),
        ("--max-train-steps", "7", "train.steps", 7),
    ],
)
def test_names_from_diffusers_and_underscores_work(trained, alias, value, path, expected):
    assert ldm("train-ldm", "--autoencoder", "none", alias, value).code == 0
    assert config.flat(trained[0].config)[path] == expected


def test_output_dir_is_out(trained):
    assert ldm("train-ae", "--output_dir=here").code == 0
    assert trained[0].out == Path("here")


def test_snr_gamma_turns_the_weighting_on(trained):
    assert ldm("train-ldm", "--autoencoder", "none", "--snr_gamma", 4, "--set", "diffusion.prediction=v").code == 0
    diffusion = trained[0].config.diffusion
    assert (diffusion.loss_weight, diffusion.snr_gamma) == ("min_snr", 4.0)


def test_train_batch_size_counts_one_process(trained, monkeypatch):
    monkeypatch.setattr("ldmcli.core.launch.relaunch_if_needed", lambda gpus, argv: None)
    assert ldm("train-ae", "--train_batch_size", 6, "--gpus", 3).code == 0
    assert trained[0].config.train.batch_size == 18


def test_aliases_are_not_on_the_help_page():
    page = ldm("train-ldm", "--help").stdout
    assert not [
        name
        for name in (*ALIASES, "train-batch-size", "snr-gamma")
        if f"--{name} " in page and name not in ("data", "out")
    ]


# --- training --------------------------------------------------------------------------------------------------


def test_a_run_is_named_after_its_data_and_kind_and_the_name_is_said(trained):
    ended = ldm("train-ldm", "--data", "photos/My Cats/", "--condition", "class+text", "--autoencoder", "none")
    assert trained[0].out == Path("runs/my-cats-class-text")
    assert ended.stderr.splitlines()[0].startswith("train-ldm → runs/my-cats-class-text: diffusion on pixels")


def test_the_first_line_says_which_network_is_taken(trained):
    assert "the fast network, f = 4, kl" in ldm("train-ae").stderr.splitlines()[0]
    assert "preset kl-f8, f = 8, kl" in ldm("train-ae", "--preset", "kl-f8").stderr.splitlines()[0]


def test_the_loop_gets_what_the_command_line_said(trained):
    models = ("--autoencoder", "runs/a", "--init-from", "runs/b")
    assert ldm("train-ldm", *models, "--fresh", "--allow", "train.seed").code == 0
    options = trained[0].options
    assert (options.autoencoder, options.init_from, options.fresh, options.allow) == (
        "runs/a",
        "runs/b",
        True,
        ("train.seed",),
    )
    assert options.command_line[:2] == ["ldm", "train-ldm"] and trained[0].kind == "diffusion"


def test_without_an_autoencoder_the_user_learns_how_to_get_one(trained):
    ended = ldm("train-ldm")
    assert ended.code == 4 and "`ldm train-ae`" in ended.stderr and "--autoencoder none" in ended.stderr


def test_the_newest_autoencoder_is_taken(trained, monkeypatch):
    monkeypatch.setattr("ldmcli.core.runs.newest_run", lambda kind, root=None: Path(f"runs/newest-{kind}"))
    ended = ldm("train-ldm")
    assert trained[0].options.autoencoder == "runs/newest-autoencoder"
    assert "in latents of runs/newest-autoencoder" in ended.stderr


def test_json_is_one_document_and_nothing_else_on_stdout(trained):
    ended = ldm("train-ae", "--json")
    assert json.loads(ended.stdout) == {"out": "runs/shapes-ae", "kind": "autoencoder", "state": "finished"}
    assert "train-ae → runs/shapes-ae" in ended.stderr


def test_the_configuration_is_checked_before_processes_start(trained, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: pytest.fail("launched"))
    assert ldm("train-ae", "--gpus", 2, "--set", "train.stesp=1").code == 2


def test_the_code_of_launched_processes_is_the_command_s(trained, monkeypatch):
    monkeypatch.setattr("ldmcli.core.launch.relaunch_if_needed", lambda gpus, argv: 5)
    assert ldm("train-ae", "--gpus", 2).code == 5
    assert trained == []


def test_launched_processes_get_the_same_command_line(trained, monkeypatch):
    seen = []
    monkeypatch.setattr("ldmcli.core.launch.relaunch_if_needed", lambda gpus, argv: seen.append((gpus, argv)) or 0)
    ldm("train-ae", "--gpus", 2, "-o", "x")
    assert seen == [(2, ["train-ae", "--gpus", "2", "-o", "x"])]


def test_plan_shows_values_with_origins_and_trains_nothing(trained):
    text = ldm("train-ae", "--plan", "--steps", 9, "--set", "autoencoder.channels=8")
    assert re.search(r"^train\.steps +9 +--steps$", text.stdout, re.MULTILINE) and "parameters" in text.stdout
    document = json.loads(ldm("train-ae", "--plan", "--steps", 9, "--json").stdout)
    rows = document["settings"]
    assert ["train.steps", "9", "--steps"] in rows and ["train.seed", "0", "default"] in rows
    assert trained == []


def test_a_plan_of_the_second_stage_needs_no_first_stage(trained):
    ended = ldm("train-ldm", "--plan", "--json", "--set", "diffusion.channels=32", "--condition", "class")
    assert ended.code == 0 and json.loads(ended.stdout)["settings"] and trained == []


def test_out_below_a_file_is_refused_before_training(trained, tmp_path):
    (tmp_path / "file").touch()
    ended = ldm("train-ae", "--out", "file/run")
    assert ended.code == 2 and "file is a file" in ended.stderr and trained == []


def test_offline_is_told_to_the_libraries(trained, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    ldm("train-ae", "--offline")
    assert [os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")] == ["1"] * 3


# --- sampling and measuring ------------------------------------------------------------------------------------


@pytest.fixture
def sampled(monkeypatch, tmp_path):
    calls = []

    def sample_to_folder(model, request, out, **more):
        calls.append((model, request, out, more))
        return {"out": str(out)}

    stand_in(monkeypatch, "ldmcli.sampling.commands", sample_to_folder=sample_to_folder)
    monkeypatch.chdir(tmp_path)
    return calls


def test_sample_hands_its_options_on_as_one_request(sampled):
    ended = ldm(
        "sample",
        "--prompt",
        "a [red] circle",
        "--prompt",
        "b",
        "-n",
        2,
        "--steps",
        5,
        "--guidance",
        2,
        "--size",
        "32x48",
        "--seed",
        3,
        "--guidance_interval",
        "0.1,0.9",
        "--sampler",
        "ddim",
        "-o",
        "x",
        "--format",
        "webp",
        "--no-metadata",
        "--model",
        "runs/a",
        "--weights",
        "raw",
        "--mixed-precision",
        "bf16",
        "--compile",
    )
    assert ended.code == 0 and ended.stdout == "x\n"
    model, request, out, more = sampled[0]
    assert (model, out) == ("runs/a", Path("x"))
    machine = more.pop("machine")
    assert (machine.world.world_size, machine.mixed_precision, machine.compile) == (1, "bf16", True)
    assert more == {"overwrite": False, "fmt": "webp", "metadata": False, "progress": None}
    assert request.prompts == ("a [red] circle", "b") and (request.n, request.steps, request.seed) == (2, 5, 3)
    assert request.size == (32, 48) and request.guidance_interval == (0.1, 0.9)
    assert (request.sampler, request.weights, request.eta) == ("ddim", "raw", None)


def test_prompts_come_from_a_file_one_a_line(sampled, tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa red circle\r\n\r\n画\n".encode())
    ldm("sample", "--prompts", "p.txt")
    assert sampled[0][1].prompts == ("a red circle", "画")


@pytest.mark.parametrize("content, expected", [(b"a\n\xe9\n", "byte 2"), (b"\n \n", "no prompt in it")])
def test_a_bad_prompts_file_is_missing_input(sampled, tmp_path, content, expected):
    (tmp_path / "p.txt").write_bytes(content)
    ended = ldm("sample", "--prompts", "p.txt")
    assert ended.code == 3 and expected in ended.stderr and sampled == []


def test_the_same_command_has_the_same_folder_and_another_has_another(sampled):
    for seed in (0, 0, 1):
        ldm("sample", "--prompt", "a/../b", "--seed", seed)
    first, again, other = (call[2] for call in sampled)
    assert first == again != other and first.parent == Path("outputs") and first.name.startswith("a-b-")


@pytest.mark.parametrize(
    "args, code, expected",
    [
        (["--prompts", "none.txt"], 3, "none.txt: No such file"),
        (["--init-image", "none.png"], 3, "--init-image none.png: no such file"),
        (["--guidance-interval", "0.9,0.1"], 2, "not two shares"),
        (["--size", "wide"], 2, "--size: 'wide' is not pixels"),
        (["--size", "0"], 2, "--size: '0' is not pixels"),
        (["--sampler", "dimm"], 2, "--sampler: 'dimm' is not one of ddim, ddpm, plms,"),
        (["--sampler", "dimm"], 2, "; did you mean ddim?"),
        (["-n", "0"], 2, "-n 0: must be at least 1"),
        (["-n", "x"], 2, "-n: 'x' is not a whole number"),
        (["--guidance", "x"], 2, "--guidance: 'x' is no scale from 0 on"),
        (["--eta", "2"], 2, "--eta 2: must be at most 1"),
        (["--seed"], 2, "--seed needs a value"),
        (["--sede", "1"], 2, "no such option --sede; did you mean --seed?"),
        (["x"], 2, "unexpected argument 'x'; see `ldm sample --help`"),
    ],
)
def test_a_mistake_in_sample_is_one_line(sampled, args, code, expected):
    ended = ldm("sample", *args)
    assert ended.code == code and ended.stdout == "" and sampled == []
    assert ended.stderr.startswith("ldm: ") and expected in ended.stderr and ended.stderr.count("\n") == 1


RESULT = document(
    {"fd_effnet_lite0": 20.0, "kid_effnet_lite0_mean": 0.5, "psnr": 30.0, "recall": None},
    labels={"fd_effnet_lite0": "FD (EfficientNet-lite0)"},
    warnings=["few images"],
)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("ldmcli.evaluation.evaluate.evaluate", lambda **given: calls.append(given) or dict(RESULT))
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize(
    "limits, code, said",
    [
        (["--fail-above", "20"], 0, ""),
        (["--fail-above", "fid=20"], 0, ""),
        (["--fail-above", "19.9"], 8, "fd_effnet_lite0 = 20 is above 19.9"),
        (["--fail-above", "kid=0.4"], 8, "kid_effnet_lite0_mean = 0.5 is above 0.4"),
        (["--fail-below", "psnr=30"], 0, ""),
        (
            ["--fail-below", "PSNR=31", "--fail-above", "19"],
            8,
            "fd_effnet_lite0 = 20 is above 19; psnr = 30 is below 31",
        ),
        (["--fail-below", "recall=0"], 8, "recall = none is below 0"),
        (["--fail-above", "ssim=1"], 2, "ssim: not measured"),
        (["--fail-above", "fid=low"], 2, "write METRIC=VALUE"),
        (["--fail-above", "=3"], 2, "write METRIC=VALUE"),
        (["--fail-above", "nan"], 2, "write METRIC=VALUE"),
    ],
)
def test_a_missed_limit_ends_with_code_8(measured, limits, code, said):
    ended = ldm("eval-fid", "--model", "runs/a", "--data", "shapes", *limits)
    assert ended.code == code and said in ended.stderr
    if code in (0, 8):
        assert re.search(r"^FD \(EfficientNet-lite0\) +20$", ended.stdout, re.MULTILINE)
        assert "n = 1,000 measured, 2,000 reference" in ended.stdout
        assert "ldm: warning: few images\n" in ended.stderr


def test_a_limit_on_an_unknown_metric_is_refused_before_anything_is_measured(measured):
    ended = ldm("eval-fid", "--model", "runs/a", "--fail-above", "fdi=3")
    assert ended.code == 2 and "--fail-above fdi: no such metric; did you mean fid?" in ended.stderr
    ended = ldm("eval-fid", "--model", "runs/a", "--fail-above", "sharpness=3")
    assert ended.code == 2 and "--fail-above sharpness: no such metric; there are fid, " in ended.stderr
    assert measured == []


def test_the_document_of_eval_fid_is_printed_although_a_limit_is_missed(measured):
    ended = ldm("eval-fid", "--model", "runs/a", "--data", "shapes", "--json", "--fail-above", "1")
    assert ended.code == 8 and json.loads(ended.stdout) == RESULT


def test_compare_ends_with_code_8_where_a_metric_got_worse(measured, monkeypatch):
    monkeypatch.setitem(RESULT, "worse", ["psnr"])
    monkeypatch.setitem(RESULT, "compared", {"psnr": {"old": 31.0, "new": 30.0, "change": -1.0}})
    ended = ldm("eval-fid", "--model", "runs/a", "--data", "shapes", "--compare", "old.json")
    assert ended.code == 8 and "psnr = 30 is worse than 31 in --compare" in ended.stderr
    assert measured[0]["compare"] == Path("old.json")
    monkeypatch.setitem(RESULT, "worse", [])
    assert ldm("eval-fid", "--model", "runs/a", "--data", "shapes", "--compare", "old.json").code == 0


def test_only_one_thing_is_measured(measured):
    ended = ldm("eval-fid", "--model", "a", "--images", "b")
    assert ended.code == 2 and "--model and --images exclude each other" in ended.stderr and measured == []


@pytest.mark.parametrize("text, metrics", [("FID, kid", ("fid", "kid")), ("psnr+ssim", ("psnr", "ssim"))])
def test_metrics_are_a_list_of_names(measured, text, metrics):
    ldm("eval-fid", "--pairs", "a", "b", "--metrics", text)
    assert measured[0]["metrics"] == metrics and measured[0]["pairs"] == (Path("a"), Path("b"))


def test_what_nobody_asked_for_is_left_to_the_library(measured):
    ldm("eval-fid", "--model", "runs/a")
    assert set(measured[0]) == {"model", "seed", "progress"}


def test_a_run_is_measured_against_its_own_data_unless_options_say_otherwise(measured, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text('[data]\nsource = "photos"\nflip = true\n[train]\nsteps = 3\n')
    ldm("eval-fid", "--model", "run", "--limit", 5)
    ldm("eval-fid", "--model", "run", "--data", "others", "--split", "test")
    ldm("eval-fid", "--images", "folder", "--limit", 5)
    own, other = (call["data"] for call in measured[:2])
    assert "data" not in measured[2]  # no shapes in the place of what was left open
    assert (own.source, own.flip, own.limit) == ("photos", True, 5) and "split" not in measured[0]
    assert (other.source, other.flip, other.split) == ("others", False, "test") and measured[1]["split"] == "test"


def test_a_reference_of_statistics_is_handed_on_as_it_is(measured):
    ldm("eval-fid", "--images", "a", "--data", "stats.npz")
    assert measured[0]["data"] == "stats.npz"


def test_eval_fid_names_only_parameters_that_the_library_has(measured):
    from ldmcli.evaluation.request import EvaluationRequest

    ldm(
        "eval-fid",
        "--model",
        "a",
        "--data",
        "shapes",
        "-n",
        9,
        "--features",
        "x",
        "--steps",
        3,
        "--guidance",
        2,
        "--sampler",
        "ddim",
        "--batch-size",
        4,
        "--size",
        32,
        "--split",
        "train",
        "--seed",
        1,
        "--compare",
        "old.json",
        "--metrics",
        "fid",
    )
    assert set(measured[0]) <= {field.name for field in dataclasses.fields(EvaluationRequest)}


# --- the others ------------------------------------------------------------------------------------------------


def test_reconstruct_needs_images_that_exist():
    assert (ended := ldm("reconstruct", "nowhere.png")).code == 3 and "nowhere.png: no such file" in ended.stderr
    assert (ended := ldm("reconstruct")).code == 2 and "IMAGES... is missing" in ended.stderr


def test_reconstruct_prints_a_table_of_psnr(monkeypatch, tmp_path):
    rows = [{"image": "a.png", "psnr": 31.234}]
    stand_in(monkeypatch, "ldmcli.sampling.reconstruct", reconstruct_to_folder=lambda *args, **more: {"images": rows})
    (tmp_path / "a.png").touch()
    assert re.search(r"^a\.png +31\.23$", ldm("reconstruct", tmp_path / "a.png").stdout, re.MULTILINE)


def test_data_takes_its_set_as_an_argument(monkeypatch, tmp_path):
    calls = []
    stand_in(
        monkeypatch,
        "ldmcli.reports.dataset_report",
        inspect=lambda settings, out: calls.append((settings, out)) or {"rows": 3},
        inspect_text=lambda facts, width: f"{facts['rows']} rows",
    )
    monkeypatch.chdir(tmp_path)
    ended = ldm("data", "photos", "--limit", 4)
    assert (calls[0][0].source, calls[0][0].limit, calls[0][1]) == ("photos", 4, Path("outputs/photos-data"))
    assert ended.stdout == "3 rows\n"
    assert json.loads(ldm("data", "--json").stdout) == {"rows": 3}
    assert calls[1][0].source == "shapes"


def test_demo_hands_data_and_minutes_on(monkeypatch, tmp_path):
    calls = []
    stand_in(monkeypatch, "ldmcli.reports.demo", demo=lambda data, **more: calls.append((data, more)) or {"minutes": 2})
    monkeypatch.chdir(tmp_path)
    assert json.loads(ldm("demo", "--data", "photos", "--minutes", 2, "--json").stdout) == {"minutes": 2}
    assert calls[0][0].source == "photos"
    assert calls[0][1] == {"minutes": 2.0, "out": Path("runs/demo"), "preset": "", "fresh": False, "seed": 0}


def test_a_report_of_no_run_is_refused(tmp_path):
    assert (ended := ldm("report", tmp_path)).code == 4 and "no run folder" in ended.stderr


def test_runs_are_listed_with_their_metrics(monkeypatch):
    rows = [
        {
            "path": "runs/[red]a\x1b[2J",
            "kind": "autoencoder",
            "state": "finished",
            "step": 20,
            "data": None,
            "metrics": {"psnr": 25.123, "note": "x"},
            "updated": "",
        }
    ]
    monkeypatch.setattr("ldmcli.core.runs.list_runs", lambda root: rows)
    ended = ldm("runs")
    assert re.search(r"^runs/\[red\]a\[2J +autoencoder +finished +20 +psnr 25\.12$", ended.stdout, re.MULTILINE)
    assert json.loads(ldm("runs", "--json").stdout)["runs"][0]["step"] == 20


def test_recipes_are_listed_with_command_and_first_line(monkeypatch, tmp_path):
    (tmp_path / "x.toml").write_text("# Fast on a laptop\n[diffusion]\nchannels = 8\n")
    monkeypatch.setattr(config, "RECIPES", tmp_path)
    assert json.loads(ldm("recipes", "--json").stdout)["recipes"] == [
        {"name": "x", "command": "ldm train-ldm", "group": "Unconditional", "summary": "Fast on a laptop", "head": {}}
    ]


def test_presets_are_listed_with_their_command():
    first, second = ldm("presets").stdout.split("\n\n")
    assert first.startswith("ldm train-ae\n") and re.search(r"^  kl-f8 +f = 8", first, re.MULTILINE)
    assert second.startswith("ldm train-ldm\n") and re.search(r"^  cin256 +\S", second, re.MULTILINE)


def test_doctor_says_what_the_machine_has():
    facts = json.loads(ldm("doctor", "--json").stdout)
    assert facts["ldm"] == ldmcli.__version__ and facts["devices"] and facts["cores"] >= 1


# --- endings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, line",
    [
        (["train-a"], "ldm: train-a: no such command; did you mean train-ae?\n"),
        (["zzz"], "ldm: zzz: no such command; `ldm --help` lists them\n"),
        (["--zzz"], "ldm: no such option --zzz; see `ldm --help`\n"),
        (["train-ae", "--steps", "abc"], "ldm: --steps: 'abc' is not a whole number\n"),
        (["train-ae", "--reg", "qv"], "ldm: --reg: 'qv' is not one of kl, vq\n"),
        (
            ["train-ae", "--set", "train.stesp=1"],
            "ldm: --set train.stesp: no such setting; did you mean train.steps?\n",
        ),
        (["train-ae", "--gpus", "0"], "ldm: --gpus 0: must be at least 1\n"),
        (["runs", "-q", "-v"], "ldm: --quiet and --verbose exclude each other\n"),
        # of a shell's variable that is not set: it would stand for the current folder, or for the newest run
        (["train-ae", "--data", ""], "ldm: --data: needs a value; it was given an empty text\n"),
        (["train-ldm", "--autoencoder="], "ldm: --autoencoder: needs a value; it was given an empty text\n"),
        (["eval-fid", "--model", ""], "ldm: --model: needs a value; it was given an empty text\n"),
        (["demo", "-o", ""], "ldm: -o: needs a value; it was given an empty text\n"),
        (["train-ae", "--output_dir", ""], "ldm: --output_dir: needs a value; it was given an empty text\n"),
        (["train-ae", "--seed", "-1"], "ldm: train.seed = -1: must not be negative (from --seed)\n"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(trained, args, line):
    ended = ldm(*args)
    assert (ended.code, ended.stdout, ended.stderr) == (2, "", line)


def test_a_folder_of_runs_that_is_not_there_is_named(tmp_path):
    ended = ldm("runs", tmp_path / "none")
    assert (ended.code, ended.stdout, ended.stderr) == (3, "", f"ldm: {tmp_path / 'none'}: no such folder\n")


@pytest.mark.parametrize(
    "error, code",
    [
        (InputError("x"), 3),
        (ModelError("x"), 4),
        (DivergedError("x"), 5),
        (ResourceError("x"), 6),
        (ThresholdError("x"), 8),
        (Interrupted("x", 2), 130),
        (Interrupted("x", 15), 143),
    ],
)
def test_each_failure_has_the_code_of_the_contract(monkeypatch, error, code):
    raising(monkeypatch, error)
    ended = ldm("runs")
    assert (ended.code, ended.stderr) == (code, "ldm: x\n")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "runs/x/model.safetensors"),
        OSError(errno.EFBIG, "File too large", "runs/x/model.safetensors"),
    ],
)
def test_a_full_disk_is_code_6_and_names_the_file(monkeypatch, error):
    raising(monkeypatch, error)
    ended = ldm("runs")
    assert ended.code == 6 and ended.stderr.startswith("ldm: runs/x/model.safetensors: the disk is full")


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_running_out_of_memory_is_code_6_and_says_what_to_change(monkeypatch, error):
    raising(monkeypatch, error)
    ended = ldm("runs")
    assert ended.code == 6 and "out of memory" in ended.stderr and "--micro-batch" in ended.stderr


def test_ctrl_c_is_code_130(monkeypatch):
    raising(monkeypatch, KeyboardInterrupt())
    assert (ended := ldm("runs")).code == 130 and ended.stderr == "ldm: interrupted\n"


def test_a_place_that_cannot_be_written_is_code_2(monkeypatch, tmp_path):
    raising(monkeypatch, PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "runs")))
    ended = ldm("runs")
    assert ended.code == 2 and "choose another --out" in ended.stderr


def test_a_file_that_cannot_be_read_is_code_3(monkeypatch, tmp_path):
    path = tmp_path / "a.png"
    path.touch()
    monkeypatch.setattr(os, "access", lambda *args: False)
    raising(monkeypatch, PermissionError(errno.EACCES, "Permission denied", str(path)))
    assert (ended := ldm("runs")).code == 3 and "no permission to read it" in ended.stderr


def test_a_fault_of_ours_is_one_line_that_names_the_traceback_without_secrets(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    raising(monkeypatch, ValueError("bad https://me:pass@host/x hf_secretsecret\nsecond line"))
    ended = ldm("runs")
    assert ended.code == 1 and ended.stderr.count("\n") == 1 and "Traceback" not in ended.stderr
    assert "ValueError: bad https://***@host/x <HF_TOKEN>" in ended.stderr
    text = Path(ended.stderr.strip().rpartition("traceback in ")[2]).read_text()
    assert "Traceback (most recent call last)" in text and "list_runs" in text
    assert "hf_secretsecret" not in text and "me:pass" not in text


def test_a_reader_that_went_away_is_met_with_silence(tmp_path):
    command = f'"{sys.executable}" -m ldmcli train-ldm --help | true; echo "${{PIPESTATUS[0]}}"'
    root = Path(ldmcli.__file__).parents[1]
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_the_codes_are_those_of_the_contract():
    assert [(each.name, each.value) for each in ExitCode] == [
        ("OK", 0),
        ("FAULT", 1),
        ("USAGE", 2),
        ("INPUT", 3),
        ("MODEL", 4),
        ("DIVERGED", 5),
        ("RESOURCE", 6),
        ("THRESHOLD", 8),
        ("SIGINT", 130),
        ("SIGTERM", 143),
    ]


# --- console ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_console():
    yield
    console.set_verbosity()


def test_nothing_from_data_can_steer_the_terminal(capsys):
    console.out("a\x1b]0;title\x07b\x9b2Jc\x00\r\u202ed\u2066 [red]x[/] tab\tline\n")
    assert capsys.readouterr().out == "a]0;titleb2Jcd [red]x[/] tab\tline\n\n"


def test_text_that_no_encoding_holds_is_printed_all_the_same(capsys):
    console.out("name\udcff")
    assert capsys.readouterr().out == "name?\n"


def test_a_warning_is_one_line_and_said_once(capsys):
    for _ in range(2):
        console.warn_once("k", "first\n  second")
    assert capsys.readouterr().err == "ldm: warning: first second\n"


def test_quiet_silences_conversation_but_neither_warnings_nor_failures(capsys):
    console.set_verbosity(quiet=True)
    console.say("a")
    console.warn("b")
    console.fail("c")
    assert capsys.readouterr().err == "ldm: warning: b\nldm: c\n"


def test_details_are_said_only_when_asked_for(capsys):
    console.detail("a")
    console.set_verbosity(verbose=True)
    console.detail("b")
    assert capsys.readouterr().err == "b\n"


def test_other_processes_keep_quiet_unless_they_fail(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for speak in (console.out, console.say, console.warn):
        speak("a")
    console.emit_json({})
    with console.progress(2, "p") as bar:
        bar.advance()
    console.fail("b")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "ldm: process 1: b\n")


def test_json_holds_no_nan(capsys):
    console.emit_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": (Path("x"), "é")})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1.5],
        "c": ["x", "é"],
    }


def test_a_table_aligns_words_left_and_numbers_right():
    assert console.table([["a\nb", 5], ["c", 10]], ["name", "n"]).splitlines() == [
        "name   n",
        "----  --",
        "a b    5",
        "c     10",
    ]


def test_progress_in_a_log_is_a_line_each_tenth_without_control_characters(capsys):
    with console.progress(100, "encoding") as bar:
        for _ in range(100):
            bar.advance(loss=0.123456)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "encoding: 1/100  loss 0.1235" and lines[-1] == "encoding: 100/100  loss 0.1235"
    assert len(lines) == 11 and "\r" not in "".join(lines) and "\x1b" not in "".join(lines)


def test_progress_on_a_terminal_is_a_bar_that_shows_captions_as_they_are(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with console.progress(2, "[/] drawing") as bar:
        bar.advance(2, last="[red]x")
    text = capsys.readouterr().err
    assert "[/] drawing" in text and "2/2" in text and "[red]x" in text
