"""The golden net: a record of what users can see, to be compared before and after a rearrangement of the code.

    python tests/golden_net.py record DIR              writes DIR: a text file a case, in a folder a part
    python tests/golden_net.py compare DIR             runs all again, prints every difference, ends with 1 if any
    python tests/golden_net.py compare DIR --only help,refused        some parts (what they need is run, not recorded)

A case of the command line is recorded as exit code, stdout, stderr, and every file below its `--out`: text as it
stands, of pictures a hash of their pixels, of weights a hash of each tensor by its name. What differs by nature (times,
rates, memory, process ids, versions) is masked. Nothing but the command line and the Python interface of the contract
is used, so the net holds wherever modules lie. The record belongs to one machine and one version of torch: bits of
floating-point results depend on both.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

for _name in [name for name in os.environ if name.startswith("LDM_")]:
    del os.environ[_name]
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
                  COLUMNS="80", NO_COLOR="1", LDM_TRAIN_EVAL_FRECHET="false", LDM_CACHE="cache")  # fmt: skip

import numpy as np  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from golden_cases import DATA, shared  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors import safe_open  # noqa: E402

import ldmcli  # noqa: E402

NEEDS = {"help": (), "ae": (), "ldm": ("ae",), "sample": ("ldm",), "edit": ("ldm",), "measure": ("sample",),
         "convert": ("ldm",), "look": ("ldm",), "refused": ("sample",), "python": ("ldm",)}  # fmt: skip

# --- the cases ----------------------------------------------------------------------------------------------------

COMMANDS = ("train-ae", "train-ldm", "demo", "sample", "inpaint", "upscale", "reconstruct", "eval-fid", "convert",
            "data", "report", "runs", "recipes", "presets", "doctor")  # fmt: skip
_LOOP = shlex.join(map(str, (*tiny.QUIET_LOOP, "--steps", 2)))
WORDS = {  # what {name} stands for in a case
    "shapes": shlex.join(map(str, tiny.SHAPES)),
    "own": "--data own --size 16 --val-fraction 0.34",
    "ae": f"train-ae {shlex.join(tiny.AE_NETWORK)} {_LOOP}",
    "ldm": f"train-ldm {shlex.join(tiny.UNET)} {_LOOP} --set data.cache_dir=cache",
    "adam": shlex.join(tiny.ADAM),
    "paper_ae": "--set autoencoder.channels=32 --set autoencoder.num_res_blocks=1 --set loss.perceptual_weight=0 "
    "--set loss.disc_layers=1 --size 24 --lr 1e-3",
    "paper": "--set diffusion.channels=32 --set diffusion.channel_mult=1,1 --set diffusion.num_res_blocks=1 "
             "--set diffusion.attention_resolutions=1 --set diffusion.groups=32",
    "all": "--prompt 'a red star' --class star --layout layout.json --map map.png",
    "eval": "eval-fid --data own --split all --size 16 --features effnet-lite0",
}  # fmt: skip


def cases(part: str) -> Iterator[tuple[str, list[str]]]:
    """Name and words of each case of a part, in order."""
    if part == "help":
        yield from (("ldm", ["--help"]), ("nothing", []), *((name, [name, "--help"]) for name in COMMANDS))
    text = (Path(__file__).parent / "golden_net.txt").read_text(encoding="utf-8").replace("\n ", " ")
    _, _, table = text.partition(f"\n[{part}]\n")
    for line in table.partition("\n\n")[0].splitlines():
        name, *words = shlex.split(line.format(**WORDS))
        plain = part == "refused" or "--no-json" in words or ("--plan" in words and "--json" not in words)
        words = [word.replace("out/no", f"out/{name}") for word in words if word not in ("--json", "--no-json")]
        yield name, words if plain else [*words, "--json"]


def lay_down() -> None:
    """The files that cases name, in the current folder; the runs among them are made by the cases."""
    Path("broken").symlink_to(DATA / "broken")
    for name in ("unet_uncond", "unet_class_crossattn", "unet_text_bert", "full_checkpoint"):
        shutil.copytree(shared("golden", name), f"golden/{name}")
    tiny.noisy_images(Path("a"), 8)
    for path in tiny.noisy_images(Path("b"), 8):
        Image.fromarray(np.asarray(Image.open(path)) // 2 + 40).save(path)
    draw, own, names = np.random.default_rng(5), [], ("circle", "star")
    Path("own").mkdir()
    for k in range(12):
        x, y, w, h = (*draw.integers(0, 12, 2), *draw.integers(4, 12, 2))
        pixels, index = draw.integers(0, 90, (24, 24, 3), dtype=np.uint8), np.zeros((24, 24), np.uint8)
        pixels[y : y + h, x : x + w], index[y : y + h, x : x + w] = draw.integers(90, 256, 3), 1 + k % 2
        Image.fromarray(pixels).save(f"own/{k:02d}.png")
        Image.fromarray(index).save(f"own/map{k:02d}.png")
        objects = {"bbox": [[int(x), int(y), int(w), int(h)]], "category": [names[k % 2]]}
        own.append({"file_name": f"{k:02d}.png", "map_file_name": f"map{k:02d}.png", "text": f"a {names[k % 2]} at {x}",
                    "label": names[k % 2], "objects": objects})  # fmt: skip
    Path("own/metadata.jsonl").write_text("\n".join(map(json.dumps, own)))
    np.savez("set.npz", arr_0=draw.integers(0, 256, (9, 16, 16, 3), dtype=np.uint8))
    Image.fromarray(draw.integers(0, 256, (31, 44, 3), dtype=np.uint8)).save("photo.png")
    hole = np.zeros((31, 44), np.uint8)
    hole[8:19, 12:30] = 255
    Image.fromarray(hole).save("mask.png")
    Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8)).save("small.png")
    Path("masks").mkdir()
    for path in Path("b").iterdir():
        Image.fromarray(hole[4:24, 8:28]).save(Path("masks", path.name))
    for name, size in (("map", (16, 16)), ("map20", (20, 20)), ("map57", (31, 44))):
        Image.fromarray((np.indices(size).sum(0) // 7 % 3).astype(np.uint8)).save(f"{name}.png")
    box = {"bbox": [0.1, 0.2, 0.5, 0.6], "category": "star"}
    Path("layout.json").write_text(json.dumps({"objects": [box]}))
    Path("unknown.json").write_text(json.dumps({"objects": [box | {"category": "teapot"}]}))
    Path("prompts.txt").write_text('# two\na red star\n{"prompt": "a circle", "n": 2}\n')
    Path("blank.txt").write_text("# none\n")
    Path("empty").mkdir()
    Path("old.json").write_text(json.dumps({"metrics": {"psnr": 50.0, "ssim": 0.1}}))
    torch.save({"state_dict": Path("x")}, "evil.ckpt")
    shutil.copy("golden/unet_uncond/model.safetensors", "lone.safetensors")


def spoil() -> None:
    """Runs that are not whole, for `refused`."""
    for name in ("raw", "weights", "cut", "config"):
        shutil.copytree("runs/none", f"spoilt/{name}")
    shutil.rmtree("spoilt/raw/checkpoints")
    Path("spoilt/weights/model.safetensors").unlink()
    weights = Path("spoilt/cut/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    Path("spoilt/config/config.toml").unlink()


# --- what is recorded ---------------------------------------------------------------------------------------------

VOLATILE = re.compile(
    r"seconds|_s$|per_s|tflops|mfu|wait|memory|time$|^pid$|^versions$|^host|machine|^version$|started|ended|date|"
    r"created|updated|hours|minutes|duration|^size_bytes$|^bytes$|free|available|_version$"
)
MASKS = tuple(
    (re.compile(pattern), mask)
    for pattern, mask in (
        (r"(?<=\.)\d+(?=\.tmp)", "<pid>"),
        (r"ETA [\d:]+", "ETA <time>"),
        (r"(?<=recipe )\S+?(\.toml|…)", "<recipe>"),
        (r"\d+:\d\d of training", "<time> of training"),
        (
            r"(?s)<figcaption><b>(Throughput|Waiting for data|tflops_per_s|Model FLOPs utilisation|Peak memory)</b>"
            r".*?</figure>",
            r"<chart \1></figure>",
        ),
        (r"[\w.]+(?=: holds several frames)", "<the first>"),
        (r"MFU \d+ %  data-wait \d+ %", "data-wait <share>"),
        (r"(?m)^time  +from .*", "time <time>"),
        (r"<!-- ldm \w{64} -->", "<hash>"),
        (r"((?:Throughput|Training time|Peak memory)</div><div class=\"value\">)[^<]*(<small> \w+)?", r"\1<number>"),
        (r"data:image/\w+;base64,[\w+/=]+", "<image>"),
        (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\.\d+)?(Z|\+\d\d:?\d\d)?", "<date>"),
        (r"(?<![\w.])[\d.,]+ ?(ms|s|seconds|min|minutes|h|hours|days)(?![\w-])", "<time>"),
        (r"(?<![\w.])[\d.,]+( [kMGTP]?i?B|[ \xa0]?[KMGT]iB)(?!\w)", "<bytes>"),
        (r"(?<![\w.])[\d.,e+-]+ ?(images/s|img/s|[kMGTP]FLOP/s)", "<rate>"),
    )
)


def masked(text: str) -> str:
    """Text without what differs by nature."""
    for pattern, mask in MASKS:
        text = pattern.sub(mask, text)
    return text.replace(os.getcwd(), "<here>").replace(str(DATA), "<data>")


def talk(text: str) -> str:
    """What was said on stderr; lines of progress, which come by the clock, once each at the end."""
    lines = masked(text).rstrip().splitlines()
    progress = {line.partition(":")[0] for line in lines if re.fullmatch(r"[\w -]+: \d+/\d+", line)}
    plain = [line for line in lines if not re.fullmatch(r"[\w -]+: \d+/\d+", line)]
    return "\n".join([*plain, *(f"{name}: <progress>" for name in sorted(progress))])


def document(value: Any, key: str = "") -> Any:
    """A JSON value, its volatile parts masked; keys stay in their order."""
    if isinstance(value, dict):
        return {name: document(one, str(name)) for name, one in value.items()}
    if value is not None and VOLATILE.search(key):
        return f"<{type(value).__name__}>"
    if isinstance(value, list):
        return [document(one, key) for one in value]
    return masked(value) if isinstance(value, str) else value


def as_text(value: Any) -> str:
    """JSON, numbers exactly."""
    return json.dumps(document(value), indent=1, ensure_ascii=False)


def digest(value: Any) -> str:
    """Type, shape and hash of a tensor or an array; of several, of each."""
    if isinstance(value, (list, tuple)):
        return "\n".join(map(digest, value))
    if isinstance(value, Image.Image):
        value = np.asarray(value)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float() if value.dtype == torch.bfloat16 else value.detach().cpu()
        value = value.numpy()
    value = np.ascontiguousarray(value)
    return f"{value.dtype}{list(value.shape)} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"


def tensors(path: Path) -> list[str]:
    """A line a tensor of a .safetensors file or a .ckpt, sorted by name, after its metadata."""
    if path.suffix == ".ckpt":
        held, about = torch.load(path, weights_only=True)["state_dict"], {}
    else:
        with safe_open(path, "pt") as file:
            held, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    return [
        f"metadata {json.dumps(document(dict(sorted(about.items()))))}",
        *(f"{name} {digest(held[name])}" for name in sorted(held)),
    ]


def picture(path: Path) -> list[str]:
    """Format, mode, pixels and written words of a picture."""
    with Image.open(path) as image:
        words = {
            name: json.loads(text) if text.startswith("{") else text
            for name, text in getattr(image, "text", {}).items()
        }
        exif = {str(tag): str(value) for tag, value in image.getexif().items()}
        return [f"{image.format} {image.mode} {digest(image)} {json.dumps(document(words | exif), ensure_ascii=False)}"]


def content(path: Path) -> list[str]:
    """What a file holds, as lines."""
    if path.suffix in (".safetensors", ".ckpt"):
        return tensors(path)
    if path.suffix in (".png", ".jpg", ".webp"):
        return picture(path)
    if path.suffix == ".npz":
        return [f"{name} {digest(array)}" for name, array in np.load(path).items()]
    if path.name == "manifest.json":
        return sorted(json.loads(path.read_text())["files"])
    if path.suffix == ".json":
        return as_text(json.loads(path.read_text())).splitlines()
    if path.suffix == ".jsonl":
        return [json.dumps(document(json.loads(line))) for line in path.read_text().splitlines()]
    if path.suffix in (".toml", ".md", ".txt", ".yaml", ".py", ".html"):
        text = masked(path.read_text())
        return (text.replace("><", ">\n<") if path.suffix == ".html" else text).splitlines()
    return [f"{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"]


def written(words: list[str]) -> list[str]:
    """Every file below the `--out` of a command, or at the target of `convert`, with its content."""
    target = words[words.index("--out") + 1] if "--out" in words else words[2] if words[0] == "convert" else "nowhere"
    root, lines = Path(target), []
    for path in [root] if root.is_file() else sorted(root.rglob("*")):
        if path.is_file() and not path.name.endswith(".lock"):
            lines += [f"--- {path}", *content(path)]
    return lines


def run_case(part: str, name: str, words: list[str]) -> str:
    """What one command does, as text."""
    ending = tiny.ldm(*words)
    if "--json" in words and ending.stdout:
        said = as_text({key: "" for key in ending.json} if name == "doctor" else ending.json)
    else:
        said = masked(ending.stdout)
    files = written(words) if part not in ("help", "refused") else []
    lines = [
        f"$ ldm {shlex.join(words)}",
        f"exit {ending.code}",
        "--- stdout",
        said.rstrip(),
        "--- stderr",
        talk(ending.stderr),
        *files,
    ]
    if part == "refused" and not name.startswith(f"{ending.code}-"):
        print(f"refused/{name}: exit {ending.code}: {ending.stderr.strip()[-300:]}", file=sys.stderr)
    elif part != "refused" and ending.code not in (0, 8) and name != "nothing":
        print(f"{part}/{name}: exit {ending.code}: {ending.stderr.strip()[-300:]}", file=sys.stderr)
    return "\n".join(lines) + "\n"


# --- Python -------------------------------------------------------------------------------------------------------


def python_calls() -> dict[str, Callable[[], Any]]:
    """Name → a call of the Python interface; what it gives is hashed, or written where it is a dict."""
    model = {path.name: ldmcli.load(str(path)) for path in sorted(Path("runs").iterdir())}
    return stage_calls(model["kl"], model["vq"]) | model_calls(model) | metric_calls()


def stage_calls(kl: Any, vq: Any) -> dict[str, Callable[[], Any]]:
    draw = np.random.default_rng(3)
    z, images = draw.normal(size=(2, 3, 5, 5)).astype("float32"), draw.integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    return {
        "encode": lambda: kl.encode(images),
        "encode sample": lambda: kl.encode(images, torch.manual_seed(1)),
        "moments": lambda: kl.moments(images),
        "decode": lambda: kl.decode(z),
        "decode_unscaled": lambda: kl.decode_unscaled(z),
        "vq encode": lambda: vq.encode(images),
        "vq moments": lambda: vq.moments(images),
        "vq quantize": lambda: vq.quantize(z),
        "vq decode": lambda: vq.decode(z),
        "refused latents": lambda: kl.decode(z[:, :2]),
        "refused quantize": lambda: kl.quantize(z),
    }


def model_calls(model: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    draw = np.random.default_rng(4)
    z, images = draw.normal(size=(2, 3, 5, 5)).astype("float32"), draw.integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    tokens, planes = draw.normal(size=(2, 4, 16)).astype("float32"), draw.normal(size=(2, 15, 5, 5)).astype("float32")
    layout = {"objects": [{"bbox": [0.1, 0.2, 0.5, 0.6], "category": "star"}]}
    index, hole = np.indices((20, 20)).sum(0) // 7 % 3, np.zeros((20, 20), bool)
    hole[5:12, 6:15] = True
    text, classes, sr = model["text"], model["class"], model["sr"]
    settings = {"steps": 5, "context": tokens, "uncond": 0 * tokens, "guidance": 3.0}
    samplers = {f"sample_latents {name}": lambda name=name: classes.sample_latents(z, sampler=name, **settings)
                for name in ("ddim", "ddpm", "plms", "euler", "heun", "dpm++")}  # fmt: skip
    return samplers | {
        "class_names": lambda: {"class": classes.class_names},
        "embed prompt": lambda: text.embed(["a star", "a red circle"]).context,
        "embed tokens": lambda: text.embed(tokens=[[1, 2, 3], [4, 0, 1]]).context,
        "embed class": lambda: classes.embed(classes=["star", 1]).context,
        "embed layout": lambda: model["layout"].embed(layout=layout).context,
        "embed map": lambda: model["map"].embed(map=index).concat,
        "predict": lambda: text.predict(z, [3, 500], tokens),
        "predict class": lambda: classes.predict(z, 7, classes=[1, 2]),
        "predict planes": lambda: sr.predict(z, 7, concat=planes),
        "predict published": lambda: ldmcli.load("golden/unet_uncond/model.safetensors").predict(z[..., :4, :4], 9),
        "sample_latents planes": lambda: sr.sample_latents(z, concat=planes, steps=2, sampler="ddim", eta=0.5),
        "sample": lambda: text.sample(prompt=["a star"] * 2, steps=2, guidance=3.0, seed=4),
        "sample layout": lambda: model["layout"].sample(layout=layout, n=2, steps=2),
        "inpaint": lambda: classes.inpaint(images[0], hole, classes=2, steps=2, resample=2),
        "upscale": lambda: sr.upscale(images, steps=2),
        "alphas_cumprod": lambda: [model["v"].schedule.alphas_cumprod, classes.schedule.alphas_cumprod],
        "autoencoder": lambda: text.autoencoder.encode(images),
        "refused class": lambda: classes.sample(classes=[99]),
        "refused planes": lambda: sr.predict(z, 1),
    }


def metric_calls() -> dict[str, Callable[[], Any]]:
    draw = np.random.default_rng(5)
    features, others, logits = draw.normal(size=(40, 8)), draw.normal(0.3, 1.2, (50, 8)), draw.normal(size=(40, 5))
    a, b = draw.integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    chosen = {"metrics": ["fid", "kid", "pr", "is"], "logits": logits, "kid_subsets": 5, "kid_subset_size": 20}
    return {
        "names": lambda: {"ldmcli": dir(ldmcli)},
        "metrics_from_features": lambda: ldmcli.metrics_from_features(features, others, **chosen),
        "frechet": lambda: {"": ldmcli.frechet(features[0], np.cov(features.T), others[0], np.cov(others.T))},
        "image_metrics": lambda: ldmcli.image_metrics(a, b),
        "evaluate": lambda: ldmcli.evaluate(pairs=("a", "b"), metrics=["psnr", "ssim"]),
        "refused images": lambda: ldmcli.image_metrics(a, b[:8]),
    }


def python_case(call: Callable[[], Any]) -> str:
    try:
        value = call()
    except Exception as error:  # a refusal is a result, too
        return f"{type(error).__name__}: {masked(str(error))}\n"
    return (as_text(value) if isinstance(value, dict) else digest(value)) + "\n"


# --- recording and comparing --------------------------------------------------------------------------------------


def results(parts: list[str]) -> Iterator[tuple[str, str]]:
    """(path, text) of each case of these parts, run in the current folder with all that they need."""
    wanted = set(parts)
    while more := {need for part in wanted for need in NEEDS[part]} - wanted:
        wanted |= more
    lay_down()
    for part in [part for part in NEEDS if part in wanted]:
        if part == "refused":
            spoil()
        if part == "python":
            found = ((name, python_case(call)) for name, call in python_calls().items())
        else:
            found = ((name, run_case(part, name, words)) for name, words in cases(part))
        for name, text in found:
            if part in parts:
                yield f"{part}/{name.replace('/', '-')}.txt", text


def record(target: Path, parts: list[str]) -> None:
    """Writes a file a case below `target`; parts that are recorded anew are removed first."""
    here, target = Path.cwd(), target.resolve()
    for part in parts:
        shutil.rmtree(target / part, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="golden-net-") as work:
        os.chdir(work)
        try:
            for name, text in results(parts):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_text(text, encoding="utf-8")
        finally:
            os.chdir(here)


def differences(before: Path, after: Path, parts: list[str]) -> Iterator[str]:
    """Unified diffs of the cases of these parts, and the names of those that are on one side only."""
    sides = [{path.relative_to(root).as_posix(): path.read_text(encoding="utf-8").splitlines()
              for part in parts for path in (root / part).rglob("*.txt")} for root in (before, after)]  # fmt: skip
    for name in sorted(sides[0].keys() | sides[1].keys()):
        old, new = (side.get(name, []) for side in sides)
        yield from difflib.unified_diff(old, new, f"before/{name}", f"after/{name}", lineterm="", n=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--only", default=",".join(NEEDS), metavar="PART,…", help="%(default)s")
    given = parser.parse_args()
    parts = given.only.split(",")
    if unknown := set(parts) - NEEDS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    if given.action == "record":
        record(given.folder, parts)
        return 0
    with tempfile.TemporaryDirectory(prefix="golden-net-") as after:
        record(Path(after), parts)
        found = list(differences(given.folder, Path(after), parts))
    print("\n".join(found) if found else "no difference")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
