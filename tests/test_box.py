"""The model that comes with the package: how it is made, found, refused, and that a wheel brings it along."""

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from wheels import build_wheel, copy_of_sources

import ldmcli
from ldmcli.core import box, console, runs
from ldmcli.formats import run_folder
from ldmcli.formats.packed_weights import PACKED

SCRIPTS = Path(__file__).resolve().parents[1] / "docs" / "measure"
APPLE = ("--prompt", "a red apple", "--steps", 2)


@pytest.fixture(scope="module")
def make_box():
    """The script, as a module."""
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("make_box")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def made(make_box, tiny_runs, tmp_path_factory) -> Path:
    """A box of a tiny run."""
    out = tmp_path_factory.mktemp("box") / box.NAME
    evaluation = out.parent / "lite0.json"
    evaluation.write_text(json.dumps({"metrics": {"fd_effnet_lite0": 12.5}, "n": 4}))
    make_box.make(tiny_runs["text"], out, "int8", "Drawn by ldm itself.", [evaluation], {"steps": 3})
    return out


@pytest.fixture
def boxed(made, tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, and an installation that has the box."""
    monkeypatch.setattr(box, "FOLDER", made)
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def unboxed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(box, "FOLDER", tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)


def contents(folder: Path) -> dict[str, str]:
    """The hash of each file below a folder."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def first_line(ending: tiny.Ending) -> str:
    return ending.stderr.splitlines()[0]


# --- how it is made ---------------------------------------------------------------------------------------------------


def test_a_box_is_the_averaged_weights_of_a_run_in_little_room(made, tiny_runs):
    run = run_folder.read(tiny_runs["text"])
    packed = run_folder.read(made)
    assert packed.tensors.keys() == run.tensors.keys()
    apart = [float((packed.tensors[name] - tensor).abs().max()) for name, tensor in run.tensors.items()]
    widest = [float(tensor.abs().max()) for tensor in run.tensors.values()]
    assert 0 < max(apart) and all(a <= b / 127 for a, b in zip(apart, widest))
    sizes = [(path / "model.safetensors").stat().st_size for path in (made, tiny_runs["text"])]
    assert sizes[0] < 0.5 * sizes[1]
    assert packed.config.sample.steps == 3 and packed.config.data.cache_dir == ""
    assert not (made / "checkpoints").exists()


def test_a_box_says_what_it_is_and_nothing_of_the_machine(made, tiny_runs):
    state, before = tiny.state(made), tiny.state(tiny_runs["text"])
    same = ("step", "seed", "trained_seconds", "machine", "weights")
    assert {name: state[name] for name in same} == {name: before[name] for name in same}
    assert state["sha256"] == run_folder.read(made).fingerprint
    stats = [json.loads((folder / "stats.json").read_text()) for folder in (made, tiny_runs["text"])]
    assert all(stats[0][name] == stats[1][name] for name in ("size", "latent_scale", "preview"))
    assert tiny.state(made / "autoencoder")["step"] == tiny.state(tiny_runs["kl"])["step"]
    card = (made / "README.md").read_text()
    for words in ("Drawn by ldm itself.", "12.5", "20×20 pixels", 'ldmcli.load("ldm-emoji")'):
        assert words in card, words
    for path in made.rglob("*"):
        if path.suffix in (".json", ".toml", ".md"):
            assert str(tiny_runs["text"].parent) not in path.read_text(), path


def test_a_command_loses_the_folders_of_its_machine(make_box):
    given = "ldm train-ldm --data /a/b/emoji-box --autoencoder runs/ae --set x.y=/c/d --out /e/f.g/run"
    wanted = "ldm train-ldm --data emoji-box --autoencoder runs/ae --set x.y=d --out run"
    assert make_box.without_places(given) == wanted


def test_only_styles_whose_licence_allows_it_go_into_a_box(make_box, tiny_runs, tmp_path, monkeypatch):
    write_styled(tmp_path / "drawings", ("noto", "fluent"))
    tiny.train_ldm(tmp_path / "run", tiny_runs["kl"], data=("--data", tmp_path / "drawings"), steps=1)
    notice = make_box.notice_of(make_box.trained_on(tmp_path / "run", tmp_path / "drawings"))
    assert "Google LLC" in notice and "Permission is hereby granted" in notice and "Twitter" not in notice
    write_styled(tmp_path / "others", ("noto", "fluent"), first=1)
    with pytest.raises(SystemExit, match="not the rows"):
        make_box.trained_on(tmp_path / "run", tmp_path / "others")
    monkeypatch.delitem(make_box.SOURCES, "fluent")
    with pytest.raises(SystemExit, match="holds fluent"):
        make_box.trained_on(tmp_path / "run", tmp_path / "drawings")


def test_the_data_of_the_box_are_the_rows_of_allowed_styles(make_box, tmp_path):
    box_data = importlib.import_module("box_data")
    write_styled(tmp_path / "drawings", ("noto", "openmoji", "twemoji"))
    [path] = box_data.parquet_files(tmp_path / "drawings")
    table = box_data.pq.read_table(path)
    kept, taken, left = box_data.filtered(table, path)
    assert kept.column("caption").to_pylist() == [f"drawing {k}" for k in range(12) if k % 3 != 1]
    assert taken == {"noto": 4, "twemoji": 4} and left == {"openmoji": 4}
    assert kept.schema.metadata == table.schema.metadata
    with pytest.raises(SystemExit, match="no column 'style'"):
        box_data.filtered(table.drop_columns(["style"]), path)


def write_styled(folder: Path, styles: tuple[str, ...], first: int = 0) -> None:
    """A data set of twelve drawings with styles in turn."""
    import datasets

    folder.mkdir()
    pictures = [Image.open(path) for path in tiny.noisy_images(folder.parent / f"{folder.name}-pictures", 12 + first)]
    columns = {
        "image": pictures[first:],
        "caption": [f"drawing {k}" for k in range(12)],
        "style": [k % len(styles) for k in range(12)],
    }
    features = {
        "image": datasets.Image(),
        "caption": datasets.Value("string"),
        "style": datasets.ClassLabel(names=list(styles)),
    }
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    rows.to_parquet(str(folder / "train-00000-of-00001.parquet"))


# --- how it is found --------------------------------------------------------------------------------------------------


def test_without_a_run_the_model_of_the_package_draws_and_says_so(boxed):
    before = contents(boxed)
    ending = tiny.ldm("sample", *APPLE, "--out", "out", "--json")
    assert ending.code == 0 and Path("out/000000.png").is_file()
    assert "model: ldm-emoji (" in first_line(ending) and "ldm train-ldm --data FOLDER" in first_line(ending)
    assert ending.json["model"] == "ldm-emoji" and ending.json["model_sha256"] == tiny.state(boxed)["sha256"]
    assert tiny.ldm("sample", "--model", "ldm-emoji", *APPLE, "--out", "again").code == 0
    assert np.array_equal(tiny.pictures(Path("out")), tiny.pictures(Path("again")))
    assert contents(boxed) == before


def test_a_run_comes_before_it_and_its_name_before_a_folder(boxed, tiny_runs):
    shutil.copytree(tiny_runs["text"], "runs/mine")
    shutil.copytree(tiny_runs["text"], "ldm-emoji")
    mine = tiny.ldm("sample", *APPLE, "--out", "mine", "--json")
    named = tiny.ldm("sample", "--model", "ldm-emoji", *APPLE, "--out", "named", "--json")
    assert mine.json["model"] == "runs/mine" and "the newest diffusion run" in first_line(mine)
    assert mine.json["model_sha256"] != named.json["model_sha256"] == tiny.state(boxed)["sha256"]


COMMANDS = {
    "eval-fid": ("--metrics", "psnr", "--guide-factor", 4, "-n", 2, "--steps", 1, *tiny.SHAPES),
    "inpaint": ("photo.png", "--box", "4,4,8,8", "--prompt", "a red apple", "--steps", 1),
    "convert": ("DST", "--to", "run"),
    "report": ("--out", "out"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_takes_a_model_takes_it_by_name(boxed, command):
    before = contents(boxed)
    tiny.noisy_images(Path("pictures"), 1)[0].rename("photo.png")
    options = [Path("converted") if one == "DST" else one for one in COMMANDS[command]]
    if command in ("convert", "report"):
        options.insert(0, "ldm-emoji")
    else:
        options += ["--model", "ldm-emoji"]
    ending = tiny.ldm(command, *options)
    assert ending.code == 0, ending.stderr
    assert contents(boxed) == before
    if command == "convert":
        assert PACKED not in ldmcli.core.files.tensors_metadata(Path("converted/model.safetensors"))


def test_a_training_begins_with_it(boxed, tiny_runs, tmp_path):
    ending = tiny.train_ldm(
        tmp_path / "tuned", tiny_runs["kl"], "--init-from", "ldm-emoji", "--condition", "text", *tiny.ADAM, steps=1
    )
    assert "ldm-emoji" in ending.stderr
    before, after = run_folder.read(boxed).tensors, run_folder.read(tmp_path / "tuned").tensors
    fitting = [name for name in after if name in before and before[name].shape == after[name].shape]
    assert len(fitting) > 0.5 * len(after)
    assert all(float((after[name] - before[name]).abs().max()) < 0.05 for name in fitting)


def test_it_is_no_place_for_results(boxed):
    ending = tiny.ldm("report", "ldm-emoji")
    assert ending.code == 2 and "--out DIR" in ending.line
    assert runs.folder_for_results("ldm-emoji") is None
    shutil.copytree(boxed, "runs/mine")
    assert runs.folder_for_results("runs/mine") == Path("runs/mine")


# --- where it is missing or damaged -----------------------------------------------------------------------------------


def test_an_installation_without_it_says_so(unboxed):
    ending = tiny.ldm("sample", *APPLE)
    assert ending.code == 4 and ending.stderr.count("\n") == 1 and "no diffusion run with weights" in ending.line
    ending = tiny.ldm("sample", "--model", "ldm-emoji", *APPLE)
    assert ending.code == 4 and ending.stderr.count("\n") == 1 and "comes without its model" in ending.line


def damage_bytes(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a changed byte": lambda folder: damage_bytes(folder / "model.safetensors"),
    "a changed byte of the first stage": lambda folder: damage_bytes(folder / "autoencoder" / "model.safetensors"),
    "a cut file": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no settings": lambda folder: (folder / "config.toml").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_box_is_one_line_that_says_what_to_do(boxed, damage, tmp_path, monkeypatch):
    shutil.copytree(boxed, tmp_path / "damaged")
    DAMAGES[damage](tmp_path / "damaged")
    monkeypatch.setattr(box, "FOLDER", tmp_path / "damaged")
    ending = tiny.ldm("sample", "--model", "ldm-emoji", *APPLE)
    assert ending.code == 4 and ending.stderr.count("\n") == 1, ending.stderr
    assert ending.stderr.startswith("ldm: ldm-emoji: ") and "install it again" in ending.stderr
    assert not Path("outputs").exists() and console.clean("") == ""


# --- in a wheel -------------------------------------------------------------------------------------------------------

NO_NETWORK = """import socket
def refused(self, address): raise OSError(f"a network was asked for: {address}")
socket.socket.connect = socket.socket.connect_ex = refused
"""


def test_an_installed_wheel_draws_a_picture_without_a_network(made, tmp_path):
    pytest.importorskip("setuptools", "70.1")
    sources = copy_of_sources(tmp_path)
    shutil.rmtree(sources / "ldmcli/box" / box.NAME, ignore_errors=True)
    shutil.copytree(made, sources / "ldmcli/box" / box.NAME)
    wheel = build_wheel(sources)
    python = fresh_environment(tmp_path / "environment")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run(pip, check=True, capture_output=True)
    (tmp_path / "empty").mkdir()
    ended = subprocess.run(
        [python.with_name("ldm"), "sample", "--prompt", "a red apple"],
        cwd=tmp_path / "empty",
        env={name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.startswith("model: ldm-emoji (")
    [picture] = (tmp_path / "empty").rglob("000000.png")
    assert Image.open(picture).size == (20, 20)
    told = json.loads(Image.open(picture).text["ldm"])
    assert told["model_sha256"] == tiny.state(made)["sha256"] and told["prompt"] == "a red apple"


def fresh_environment(folder: Path) -> Path:
    """The Python of a new environment that has what ldm depends on, but no ldm and no network."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    [site] = (folder / "lib").glob("python*/site-packages")
    depended = {sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))}
    (site / "below.pth").write_text("\n".join(sorted(depended)) + "\n")
    (site / "sitecustomize.py").write_text(NO_NETWORK)
    return folder / "bin" / "python"


# --- the one in this checkout -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not box.is_there(), reason="this checkout has no model in its box")
def test_the_model_of_this_checkout_is_whole_small_and_says_whose_drawings_it_knows():
    bundle = run_folder.read(Path(box.NAME))
    assert bundle.fingerprint == tiny.state(box.FOLDER)["sha256"] and bundle.config.condition.kinds == ("text",)
    assert sum(path.stat().st_size for path in box.FOLDER.rglob("*") if path.is_file()) < 15.5e6
    notice = (box.FOLDER / "NOTICE").read_text()
    assert "CC-BY-4.0" in notice and "openmoji" not in notice
