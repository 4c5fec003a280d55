"""Environments that containers, schedulers and pipes make: no home folder, no cache, streams that are closed, full or
of few characters, links, read-only runs, names of every kind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import QUIET_LOOP, SHAPES, UNET, ldm, noisy_images, pictures, train_ae

from ldmcli.core import console, files
from ldmcli.data.cache import cache_root

ROOT = Path(__file__).resolve().parents[2]
FAST = ("--steps", 2, "--sampler", "ddim")


@pytest.fixture(scope="module")
def models(tiny_runs) -> dict[str, Path]:
    return {name: tiny_runs[name] for name in ("kl", "plain", "text")}


@pytest.fixture
def homeless(monkeypatch):
    """No $HOME and no entry among the users, as in a container with `--user 54321`."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)


def no_writing(monkeypatch, tmp_path) -> None:
    """$LDM_CACHE below a file, where even root cannot make a folder."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "file" / "cache"))


@pytest.mark.parametrize("place", ["no home", "below a file"])
def test_without_a_cache_the_work_is_done_and_a_warning_says_what_to_set(models, tmp_path, monkeypatch, request, place):
    if place == "no home":
        request.getfixturevalue("homeless")
        monkeypatch.delenv("LDM_CACHE", raising=False)
    else:
        no_writing(monkeypatch, tmp_path)
    noisy_images(tmp_path / "in", 5)
    train = (
        "train-ldm",
        "--autoencoder",
        models["kl"],
        *SHAPES,
        *UNET,
        *QUIET_LOOP,
        "--steps",
        1,
        "--out",
        tmp_path / "run",
    )
    measure = ("eval-fid", "--images", tmp_path / "in", "--data", tmp_path / "in")
    for asked in (train, measure):
        ending = ldm(*asked)
        assert ending.code == 0, ending.stderr
        assert ending.stderr.count("LDM_CACHE or data.cache_dir") == 1


def test_a_cache_that_is_named_is_used_and_one_that_can_be_made_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "a" / "b"))
    assert cache_root("") == tmp_path / "a" / "b" and (tmp_path / "a" / "b").is_dir()
    assert cache_root(str(tmp_path / "c")) == tmp_path / "c"
    assert not list((tmp_path / "c").iterdir())


def test_a_damaged_entry_of_the_cache_is_computed_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    for name in ("in", "others"):
        noisy_images(tmp_path / name, 6)
    asked = ("eval-fid", "--images", tmp_path / "in", "--data", tmp_path / "others", "--split", "all", "--json")
    first = ldm(*asked).json["metrics"]
    (entry,) = (tmp_path / "cache" / "features").glob("*.npz")
    entry.write_bytes(entry.read_bytes()[:200])
    assert ldm(*asked).json["metrics"] == first
    entry.write_bytes(b"")
    assert ldm(*asked).json["metrics"] == first


def test_a_home_of_nobody_is_a_path_as_it_stands(homeless, tmp_path):
    assert files.home() is None and files.expanded(Path("~/x")) == Path("~/x")
    ending = ldm("data", "~nobody-of-that-name/pictures", "--out", tmp_path / "out")
    assert ending.code == 3 and "no such file or folder" in ending.line


# --- streams ------------------------------------------------------------------------------------------------------


def shell(line: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """A line of bash in which `ldm` is this package."""
    script = f'set -o pipefail; ldm() {{ "{sys.executable}" -m ldmcli "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", script],
        cwd=cwd,
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        timeout=300,
    )


@pytest.fixture
def named(tmp_path) -> Path:
    """Runs whose data have names that few encodings hold."""
    for k, name in enumerate(["naïve “quotes”", "日本語", "emoji 🙂"]):
        run = tmp_path / "runs" / f"r{k}"
        run.mkdir(parents=True)
        (run / "run.json").write_text(
            json.dumps({"kind": "autoencoder", "state": "finished", "step": k, "data": {"source": name}})
        )
    return tmp_path


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "ascii:strict"])
def test_what_stdout_cannot_show_is_replaced_and_json_loses_nothing(named, encoding):
    done = shell("ldm runs && ldm runs --json > out.json", named, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stderr == "" and "r2" in done.stdout
    text = (named / "out.json").read_bytes().decode(encoding.partition(":")[0])
    assert [row["data"] for row in json.loads(text)["runs"]] == ["naïve “quotes”", "日本語", "emoji 🙂"]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("ldm runs >&-", 0),
        ("ldm runs --json >&-", 0),
        ("ldm runs 2>&-", 0),
        ("ldm runs >&- 2>&- <&-", 0),
        ("ldm nonsense 2>&-", 2),
        ("ldm nonsense >&- 2>&-", 2),
        ("ldm nonsense 2>/dev/full", 2),
        ("ldm runs >/dev/full", 6),
        ("ldm data nowhere 2>&1 | true", 3),
        ("ldm runs | true", 0),
        ("ldm --help | head -1", 0),
    ],
)
def test_closed_and_full_streams_change_no_exit_code(named, line, code):
    done = shell(line, named)
    assert done.returncode == code and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_file_never_becomes_a_closed_stdout(models, tmp_path):
    """With stdout closed the next file that is opened would get its number, and what is printed would land in it."""
    draw = f'ldm sample --model "{models["plain"]}" -n 1 --steps 1 --out'
    done = shell(f"{draw} a >&- 2>&-; echo $?; {draw} b; ", tmp_path)
    assert done.stdout.split()[0] == "0"
    assert np.array_equal(pictures(tmp_path / "a")[0], pictures(tmp_path / "b")[0])
    assert {path.name for path in (tmp_path / "a").iterdir()} == {path.name for path in (tmp_path / "b").iterdir()}


@pytest.mark.parametrize("columns", ["0", "1", "-3", "many", "100000"])
def test_terminals_of_any_width_get_their_page(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "dumb")
    for asked in (("sample", "--help"), ("presets",), ("recipes",), ("doctor",)):
        assert ldm(*asked).code == 0


def test_progress_on_a_terminal_without_any_characters_of_lines(monkeypatch):
    """rich draws a bar on a TTY that shows ASCII only."""
    import io

    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", Terminal(raw, encoding="ascii"))
    monkeypatch.setenv("TERM", "xterm")
    console.open_streams()
    console.set_verbosity(quiet=False, verbose=False)
    with console.progress(3, "drawing “things”") as bar:
        bar.advance(3)
    assert b"drawing" in raw.getvalue()


# --- links, files in the way, read-only runs ----------------------------------------------------------------------


def test_runs_that_are_links_are_listed_found_and_used(models, tmp_path, monkeypatch):
    """A link to a folder, one to nothing, one to what lies above, and a run.json that leads nowhere."""
    monkeypatch.chdir(tmp_path)
    Path("runs/empty").mkdir(parents=True)
    Path("runs/mine").symlink_to(models["plain"])
    Path("runs/gone").symlink_to("nowhere")
    Path("runs/loop").symlink_to("..")
    Path("runs/empty/run.json").symlink_to("/nowhere/run.json")
    assert {row["path"] for row in ldm("runs", "--json").json["runs"]} == {"runs/mine"}
    ending = ldm("sample", *FAST, "-n", 1, "--out", "out")
    assert ending.code == 0 and "model: runs/mine" in ending.stderr, ending.stderr
    assert ldm("sample", "--model", "runs/gone", "--out", "other").code == 4


def test_a_run_folder_that_is_a_link_is_trained_in(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    train_ae(tmp_path / "run", steps=1)
    train_ae(tmp_path / "run", steps=2)
    assert (tmp_path / "run").is_symlink() and json.loads((tmp_path / "disk" / "run.json").read_text())["step"] == 2


IN_THE_WAY = {
    "sample": lambda models: ("sample", "--model", models["plain"], "-n", 1),
    "inpaint": lambda models: ("inpaint", "photo.png", "--box", "1,1,3,3", "--model", models["plain"]),
    "reconstruct": lambda models: ("reconstruct", "photo.png", "--autoencoder", models["kl"]),
    "data": lambda models: ("data", "shapes", "--limit", 4),
    "report": lambda models: ("report", models["kl"]),
    "train-ae": lambda models: ("train-ae", *SHAPES, "--steps", 1),
    "demo": lambda models: ("demo", "--minutes", 1),
}


@pytest.mark.parametrize("name", IN_THE_WAY)
@pytest.mark.parametrize("out", ["file", "file/below", "broken", "x" * 300])
def test_an_out_that_is_no_folder_is_code_2_in_one_line(models, tmp_path, monkeypatch, name, out):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("broken").symlink_to("nowhere")
    noisy_images(tmp_path, 1)[0].rename("photo.png")
    ending = ldm(*IN_THE_WAY[name](models), "--out", out)
    assert ending.code == 2 and ending.line.startswith("ldm: ") and out[:20] in ending.line, ending.stderr
    assert Path("file").read_text() == "mine" and Path("broken").is_symlink() and not Path("nowhere").exists()


def test_a_read_only_run_is_used_and_its_report_goes_elsewhere(models, tmp_path, monkeypatch):
    """Nothing is written in it; permission bits do not stop root, so writing there is made to fail."""
    import errno

    run = tmp_path / "run"
    shutil.copytree(models["plain"], run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    replace = os.replace

    def read_only(source, target):
        if run in Path(target).parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", read_only)
    noisy_images(tmp_path / "in", 3)
    assert ldm("sample", "--model", run, *FAST, "-n", 1, "--out", tmp_path / "out").code == 0
    assert ldm("eval-fid", "--model", run, "-n", 3, "--steps", 1, "--data", tmp_path / "in").code == 0
    ending = ldm("report", run)
    assert ending.code == 2 and "cannot be written" in ending.line and "--out" in ending.line
    assert ldm("report", run, "--out", tmp_path / "page").code == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")}.items() >= before.items()


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "-x.png",
        "--out.png",
        "two\nlines.png",
        "tab\t.png",
        "ünï 日本.png",
        "[red]b.png",
        "\udcff\udcfe.png",
        "%s{0}.png",
        "n" * 240 + ".png",
    ],
)
def test_pictures_of_any_name_are_read_and_told(models, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(Path(name), "PNG")
    ending = ldm("reconstruct", "--autoencoder", models["kl"], "--out", "a", "--json", "--", name)
    assert ending.code == 0, ending.stderr
    assert ending.json["images"][0]["image"] == name
    ending = ldm("inpaint", "--box", "2,2,5,5", "--model", models["plain"], *FAST, "--out", "b", "--json", "--", name)
    assert ending.code == 0 and len(pictures(tmp_path / "b")) == 1, ending.stderr
    ending = ldm("sample", "--model", models["plain"], *FAST, "-n", 1, "--init-image", name, "--out", "c")
    assert ending.code == 0, ending.stderr


@pytest.mark.parametrize("prompt", ["-5 degrees", "--steps", "a\nb", "\udcff bytes", "“quotes” 🙂", "-"])
def test_prompts_of_any_text_are_drawn(models, tmp_path, prompt):
    ending = ldm("sample", "--model", models["text"], *FAST, "--prompt", prompt, "--out", tmp_path / "out")
    assert ending.code == 0, ending.stderr
    assert ldm("sample", "--model", models["text"], *FAST, f"--prompt={prompt}", "--out", tmp_path / "out").code == 0
    told = json.loads(Image.open(tmp_path / "out" / "000000.png").text["ldm"])["prompt"]
    assert told == prompt


@pytest.mark.parametrize(
    "asked",
    [
        ("data",),
        ("sample", "--layout"),
        ("sample", "--init-image"),
        ("convert",),
        ("reconstruct",),
        ("eval-fid", "--images"),
    ],
)
def test_a_name_that_is_too_long_is_one_line(tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    ending = ldm(*asked, "y" * 5000, *(("out",) if asked == ("convert",) else ()))
    assert ending.code in (2, 3, 4) and len(ending.line) < 6000 and "fault" not in ending.line


def test_names_as_long_as_the_file_system_allows_are_written(tmp_path):
    for name in ("n" * 255, "ü" * 127):
        files.write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"
    assert len(list(tmp_path.iterdir())) == 2


def test_json_on_disk_keeps_names_whose_bytes_are_no_text(tmp_path):
    files.write_json(tmp_path / "a.json", {"file": "\udcff.png", "more": "ü"})
    assert files.read_json(tmp_path / "a.json") == {"file": "\udcff.png", "more": "ü"}
