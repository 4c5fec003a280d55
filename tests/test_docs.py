"""Documentation keeps its word: command lines, Python, links, file names and generated pages.

Each line of a `bash` block in README.md, CONTRIBUTING.md, docs/, recipes/ and examples/ is run as typed, with small
networks, in a folder with the pictures that it names. What cannot run here stands in PARSED with the reason, and goes
through the real parser and the real configuration. Commands inside sentences and tables are parsed.
"""

import contextlib
import io
import json
import re
import runpy
import shlex
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import typed_lines
from PIL import Image

from ldmcli import cli
from ldmcli.core import config

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "recipes/README.md",
    ROOT / "examples/README.md",
]
PAGES = [*WRITTEN, *sorted((ROOT / "docs" / "commands").glob("*.md"))]
LANGUAGES = {"bash", "python", "json", "toml", "text"}

# a line that holds one of these is parsed, not run, because of
PARSED = {
    r"\b(emoji64|photos256|layout128)\b": "other pictures; test_recipe_steps takes a step with each recipe",
    r"runs/(emoji|photos|layout128)": "a model of such pictures; test_edit and test_tasks use tiny ones of every task",
    r"--recipe shapes|runs/shapes": "minutes of training; test_recipe_steps takes a step with each recipe",
    r"/model\.ckpt|sd-v1\.ckpt|runs/(celeba|sd-vae)": "published checkpoints; test_compvis reads small ones",
    r"--to compvis": "the paper's networks; test_convert writes small ones",
    r"--compile|--micro-batch": "a compiler, much memory; test_micro_batch splits batches",
    r"--gpus|torchrun|accelerate launch|^srun": "several processes; test_two_processes and test_launch start them",
    r"^ldm bench": "published sizes, or a file of before; tests/bench measures small ones",
    r"^ldm demo": "test_help_examples runs a demo",
    r"^ldm distill runs/(demo|few)": "ten minutes of training before it; test_distilled_training has tiny ones",
    r"--max-hours|--max-minutes|max_minutes": "hours; test_resume ends a run by --max-hours",
    r"reference\.npz": "one line reads what the other writes; test_reference does both",
    r"runs/imagenet-ldm4": "50,000 samples; test_protocols measures by a small protocol",
    r"my-other-ae": "two autoencoders; test_several measures a KL and a VQ one",
    r"eval_samples|runs/my-measured": "a thousand samples an evaluation; test_sample_quality draws a few",
    r"--metrics novelty": "twenty held-out pictures and more; test_novelty reads samples of small runs",
    r"runs/study|answers\.json": "minutes of training, answers of people; test_study and test_ab have small ones",
    r"--preset (base|large)": "networks for GPUs; test_presets counts them, test_devices and test_fake_cuda pass them",
    r"\$seed": "one of many seeds",
    r"ldm-emoji": "the model that comes with releases; test_box draws with a small one",
}
# lines of other programs, and where they are looked at
OTHERS = {
    r"^make ([\w-]+)": "a target of the Makefile",
    r"^python (\S+\.py)": "a file of this repository",
    r"^python -m ldmcli bench": "needs a GPU; tests/bench runs the suite with tiny networks",
    r"^python -c": "a measurement of this machine",
    r"^#SBATCH|^export MASTER": "for Slurm",
}
PLACEHOLDERS = {"$seed": "0", "$data": "shapes", "SRC": "runs/a", "DST": "runs/b"}


# --- what stands in the pages -------------------------------------------------------------------------------------


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def lines_of(block: str) -> list[str]:
    """Commands of a block, each on one line, without comments."""
    lines = [re.sub(r"\s+#.*$", "", line).strip() for line in block.replace("\\\n", " ").splitlines()]
    lines = [" ".join(line.split()) for line in lines if line and (not line.startswith("#") or "SBATCH" in line)]
    return [piece for line in lines for piece in split_loop(line)]


def split_loop(line: str) -> list[str]:
    """A line of a shell loop as the commands in it."""
    return [] if re.match(r"(for|done)\b", line) else [line.removeprefix("exec ")]


def command_lines() -> dict[str, Path]:
    """Every line of the `bash` blocks and the page where it stands first."""
    found: dict[str, Path] = {}
    for page in WRITTEN:
        for language, text in blocks(page):
            for line in lines_of(text) if language == "bash" else ():
                found.setdefault(line, page)
    return found


LINES = command_lines()


def why_parsed(line: str) -> str:
    """The reason why a line is not run here; "" where it is."""
    return next((reason for pattern, reason in PARSED.items() if re.search(pattern, line)), "")


RUN = [line for line in LINES if line.startswith("ldm ") and not why_parsed(line)]


# --- the real parser ----------------------------------------------------------------------------------------------


def words_of(line: str) -> list[str]:
    """The words after `ldm`, or after `-m ldmcli` of a launcher; placeholders are replaced."""
    line = line.partition(" > ")[0]
    for placeholder, value in PLACEHOLDERS.items():
        line = re.sub(rf"(?<!\w){re.escape(placeholder)}\b", value, line)
    words = shlex.split(line)
    start = words.index("-m") + 2 if "-m" in words and "ldmcli" in words else 1
    return words[start:]


def parse(line: str) -> None:
    """Fails as the command would where it refuses an option, a value or a setting."""
    name, *rest = words_of(line)
    command = cli.load(name.replace("_", "-"))
    if not rest:
        return
    with command.make_context(name, rest) as context:
        given = {param.opts[-1]: context.params[param.name] for param in command.params if param.name in context.params}
        for param in command.params:
            check_choice(param, context.params.get(param.name))
    if name in ("train-ae", "train-ldm"):
        resolve("autoencoder" if name == "train-ae" else "diffusion", given)


def check_choice(param, value) -> None:
    """Fails for a value that is none of the words that help shows."""
    words = (param.metavar or "").split("|")
    if len(words) > 1 and not any(word != word.lower() for word in words) and value is not None:
        assert str(value) in words, f"{param.opts[0]} {value}: {param.metavar}"


def resolve(kind: str, given: dict) -> None:
    """The configuration of a training command's options; UsageError where it would be refused."""
    options = {option: path for path, (option, _) in generator()["setting_options"]().items()}
    named = [(name, {options[name]: value}) for name, value in given.items() if name in options and value is not None]
    layers = config.gather(
        kind,
        preset=given.get("--preset") or "",
        recipe=recipe_file(given.get("--recipe") or ""),
        environ={},
        named=named,
        assignments=given.get("--set") or (),
    )
    config.resolve(kind, layers)


def recipe_file(name: str) -> str:
    """A recipe's name; a file of one's own is not there."""
    return "" if name.endswith(".toml") else name


@cache
def generator() -> dict:
    """What docs/generate.py defines."""
    return runpy.run_path(str(ROOT / "docs" / "generate.py"))


# --- a folder to type in ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled_folder(tmp_path_factory):
    """The folders of pictures that the pages speak of, and small settings."""
    with typed_lines.small_networks(tmp_path_factory.mktemp("docs")) as folder:
        tiny.noisy_images(Path("my-photos"), 12)
        rows = [json.dumps({"file_name": f"{k:02d}.png", "caption": f"a bicycle, number {k}"}) for k in range(12)]
        Path("my-photos", "metadata.jsonl").write_text("\n".join(rows))
        for name in ("cat", "dog"):
            tiny.noisy_images(Path("my-classes", name), 6)
        tiny.noisy_images(Path("outputs/mine"), 4)
        yield folder


_ended: dict[str, tiny.Ending] = {}


def results_of(line: str) -> list[str]:
    """What a line writes: its --out, DST of `ldm convert`, and a file that it is sent to."""
    words = shlex.split(line)
    found = [words[k + 1] for k, word in enumerate(words[:-1]) if word in ("--out", ">")]
    return found + (words[3:4] if words[1] == "convert" else [])


def ending_of(line: str) -> tiny.Ending:
    """How a line ends, after those whose results it names; each is run once."""
    if line not in _ended:
        words, own = shlex.split(line), results_of(line)
        for other in RUN:
            if other != line and any(f"{word}/".startswith(f"{out}/") for out in results_of(other) for word in words):
                if not set(results_of(other)) & set(own):
                    ending_of(other)
        _ended[line] = tiny.ldm(*words_of(line))
        if ">" in words:
            Path(words[words.index(">") + 1]).write_text(_ended[line].stdout)
    return _ended[line]


# --- the tests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", RUN)
def test_a_line_of_the_pages_works_as_it_is_typed(line, filled_folder):
    ending = ending_of(line)
    assert ending.code == 0, f"{name_of(LINES[line])}: {line}\n{ending.stderr}"
    for result in results_of(line):
        path = Path(result)
        assert path.is_file() or any(file.is_file() for file in path.rglob("*")), result


def test_a_dozen_captioned_pictures_are_enough_for_the_five_lines(filled_folder):
    """As somebody tries it first: too few for a held-out part of two, which the last line says."""
    lines = next(lines_of(text) for _, text in blocks(ROOT / "README.md") if text.startswith("ldm data my-photos"))
    assert [line.split()[1] for line in lines] == ["data", "train-ae", "train-ldm", "sample", "eval-fid"]
    *_, last = [ending_of(line) for line in lines]
    assert last.json["metrics"] and "too few images are held out" in last.stderr
    assert 8 in [len(tiny.pictures(samples)) for samples in Path("outputs").glob("a-red-bicycle-*")]


def test_no_two_lines_write_the_same():
    written = [result for line in RUN for result in results_of(line)]
    assert len(written) == len(set(written)), sorted(written)


@pytest.mark.parametrize("line", [line for line in LINES if line not in RUN])
def test_a_line_that_is_not_run_is_parsed_or_of_another_program(line):
    other = next((re.search(pattern, line) for pattern in OTHERS if re.search(pattern, line)), None)
    if other is None:
        assert why_parsed(line), f"{name_of(LINES[line])}: neither run nor in PARSED: {line}"
        parse(line)
    elif line.startswith("make"):
        assert f"\n{other[1]}:" in (ROOT / "Makefile").read_text()
    elif line.startswith("python -c"):
        compile(shlex.split(line)[2], line, "exec")
    elif line.startswith("python -m ldmcli"):
        parse(line.replace("python -m ldmcli", "ldm", 1))
    elif line.startswith("python"):
        assert (ROOT / other[1]).is_file()


def test_reasons_for_not_running_are_needed():
    for pattern in [*PARSED, *OTHERS]:
        assert any(re.search(pattern, line) for line in LINES), pattern


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_commands_inside_sentences_and_tables_parse(page):
    for span in re.findall(r"`(ldm [^`]*)`", " ".join(prose(page).split())):
        if "COMMAND" not in span and "…" not in span:
            parse(span.replace("\\|", "|"))


def python_of(page: Path) -> str:
    """The Python of a page, without comments."""
    return re.sub(r" *#.*", "", "\n".join(text for language, text in blocks(page) if language == "python"))


def test_python_of_the_pages_runs(filled_folder):
    for line in RUN:
        if {"runs/my-ae", "runs/my-model"} & set(results_of(line)):
            assert ending_of(line).code == 0
    page = ROOT / "docs" / "python.md"
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(python_of(page), name_of(page), "exec"), names)
    assert len(names["images"]) == 4 and isinstance(names["images"][0], Image.Image)
    assert names["eps"].shape == names["z"].shape and names["pixels"].shape[-2:] == (64, 64)
    known = np.ones((64, 64), bool)
    known[16:40, 16:40] = False
    photo = np.asarray(names["photo"])
    assert all(np.array_equal(np.asarray(answer)[known], photo[known]) for answer in names["answers"])


def test_python_of_the_readme_is_that_of_its_page():
    assert python_of(ROOT / "README.md").strip() in python_of(ROOT / "docs" / "python.md")


def unindented(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines())


def test_code_for_extending_is_that_of_tests_that_use_it():
    page = ROOT / "docs" / "extending.md"
    names = re.findall(r"`(tests/[\w./]+\.py)`", prose(page))
    tests = [unindented((ROOT / name).read_text(encoding="utf-8")) for name in names]
    for language, text in blocks(page):
        assert language == "python" and any(unindented(text) in test for test in tests), text


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_files_that_a_page_names_exist(page):
    text = prose(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if not target.startswith(("http://", "https://")):
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target
    for file in re.findall(r"`((?:docs|ldmcli|recipes|tests|examples)/[\w./-]*[\w/])`", text):
        assert (ROOT / file).exists(), file


def anchors(page: Path) -> set[str]:
    """Names of a page's headings as links have them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_reads_well_as_text(page):
    text = page.read_text(encoding="utf-8")
    assert all(language in LANGUAGES for language, _ in blocks(page)) and text.count("\n```") % 2 == 0
    long = [line for line in prose(page).splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long, long
    assert not re.search(r"/(work|home|root|tmp)/", text)


def test_the_readme_is_short_and_every_page_is_linked_from_it():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in text, page.name


def test_pages_that_the_code_tells_are_up_to_date():
    """`make docs` writes them."""
    for name, text in generator()["pages"]().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, f"docs/{name} is stale: run `make docs`"


def test_every_setting_is_explained():
    """By a comment beside it, or the help of its option."""
    items = re.findall(
        r"^- (`\w+\.\w+`.*(?:\n  .*)*)", (ROOT / "docs" / "settings.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(items) > 100 and not [item for item in items if "): " not in " ".join(item.split())]


def test_every_metric_and_sampler_is_on_its_page():
    from ldmcli.diffusion.samplers import SAMPLERS
    from ldmcli.evaluation.metrics import METRICS

    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert not [name for name in METRICS if f"`{name}`" not in text]
    text = (ROOT / "docs" / "train-on-my-images.md").read_text(encoding="utf-8")
    assert not [name for name in SAMPLERS if f"`{name}`" not in text]


def scenarios() -> dict[int, str]:
    """The entries of the list in docs/reliability.md by number."""
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    entries = re.findall(r"^(\d+)\. (.*?)(?=\n\d+\. |\n#|\Z)", text, re.DOTALL | re.MULTILINE)
    return {int(number): entry for number, entry in entries}


def named_scenarios(path: Path) -> list[tuple[int, str]]:
    """(number, file) of the scenarios that docstrings and headings of a file of tests name."""
    lists = re.findall(r"(?:# --- r|\"\"\"R)eliability (\d+(?:(?:,| and) \d+)*)", path.read_text(encoding="utf-8"))
    return [(int(number), str(path.relative_to(ROOT))) for each in lists for number in re.findall(r"\d+", each)]


def test_scenarios_that_tests_name_are_in_the_list_with_their_file():
    listed = scenarios()
    assert list(listed) == list(range(1, 41))
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for number, name in named_scenarios(path):
            assert f"`{name}`" in listed[number], f"{name}: reliability {number}"
