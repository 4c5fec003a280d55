"""Make the model in the box, `ldm-emoji`, of a run: its averaged weights in little room, with a card and a notice.

    python docs/measure/make_box.py runs/emoji-box-text --data emoji-box --out ldmcli/box/ldm-emoji

--data names the pictures that the run was trained on, where they lie now. They must be those (by their fingerprint),
and each of a style in box_data.py; other data need --notice FILE, the words on their licences that are to stand in the
box. Weights are stored as `ldmcli/formats/packed_weights.py` says. Printed: the size of each part, and how far pictures
of the box are from those of the run, in grey levels.

The card shows what lies in the box: name documents of `ldm eval-fid --json` with --evaluation. Measure the box itself,
which is a run folder as any other, and make it again with its figures.
"""

import argparse
import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from box_data import SOURCES, parquet_files, styles_of

from ldmcli import load
from ldmcli.core import files, runs
from ldmcli.core.settings import DataSettings
from ldmcli.evaluation.reference_statistics import open_reference
from ldmcli.formats import run_folder
from ldmcli.formats.bundle import DiffusionBundle
from ldmcli.formats.packed_weights import KINDS
from ldmcli.reports.card import NOTICE, write_card

ROOM = 15.5e6  # bytes of the box, so that the whole wheel stays within 16 MB
PROMPTS = ("a red apple", "a heart", "a house with garden", "a cat face", "a grinning face", "the flag of Norway")
SAMPLING = ("steps", "guidance", "temperature")  # what may be given
SEEDS = range(4)
# of a run's run.json, as it stands there
KEPT = ("step", "seed", "trained_seconds", "begun_from", "metrics", "machine", "version", "best", "weights")
MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE."""


def trained_on(run: Path, data: Path) -> Counter:
    """Training rows by style. Raises SystemExit where `data` are not the run's, or hold other styles."""
    source, stated = read_source(run), runs.read_run(run).get("data") or {}
    rows = open_reference(replace(source, source=str(data)), "train")[0]
    if rows.fingerprint != stated.get("fingerprint"):
        sys.exit(f"{data}: not the rows that {run} was trained on; name those with --data")
    found: Counter = Counter()
    for path in parquet_files(data):
        found += Counter(styles_of(pq.read_table(path), path))
    others = sorted(set(found) - set(SOURCES))
    if others:
        sys.exit(
            f"{data}: holds {', '.join(others)}, of no style in box_data.py; leave them out, or give --notice FILE"
        )
    return found


def read_source(run: Path) -> DataSettings:
    """The settings of a run's data."""
    return run_folder.read_config("diffusion", run).data


def notice_of(styles: Counter) -> str:
    """Whose drawings were learned from, under which licences."""
    lines = [
        "The weights were learned from drawings of others. They were rasterised at 64 px on white; nothing else was",
        "changed, and no picture of theirs is in the weights as a file. Pictures (training and validation) by vendor:",
        "",
    ]
    for style, count in styles.most_common():
        one = SOURCES[style]
        lines += [f"- {one.title} ({style}), {count:,} pictures. {one.by}. {one.licence}. {one.where}"]
    lines += [
        "",
        "Names and keywords in captions: Unicode CLDR short names, through emojibase-data by Miles Johnson, MIT.",
        "The weights themselves are under Apache-2.0, as ldm is. Drawings that come close to one of the above remain",
        "under its licence.",
    ]
    if any(SOURCES[style].licence == "MIT" for style in styles):
        lines += ["", "The MIT licence:", "", MIT]
    return "\n".join(lines)


def without_places(command: str) -> str:
    """A command line without the folders of the machine on which it ran."""
    return re.sub(r"(?<![\w.])/(?:[^\s/]+/)+", "", command)


def read_model(run: Path, sampling: dict[str, Any]) -> DiffusionBundle:
    """The run's averaged weights. Raises SystemExit for what is no text model in latents."""
    bundle = run_folder.read(run)
    if not isinstance(bundle, DiffusionBundle) or bundle.tokenizer is None or bundle.autoencoder is None:
        sys.exit(f"{run}: the box is for a text model in latents")
    named = {"source": Path(bundle.config.data.source).name, "cache_dir": ""}
    config = replace(
        bundle.config, data=replace(bundle.config.data, **named), sample=replace(bundle.config.sample, **sampling)
    )
    stage = bundle.autoencoder
    stage = replace(stage, config=replace(stage.config, data=replace(stage.config.data, **named)))
    return replace(bundle, config=config, autoencoder=stage)


def make(run: Path, out: Path, kind: str, notice: str, evaluations: list[Path], sampling: dict[str, Any]) -> None:
    """Writes the box whole, or not at all."""
    bundle, folder = read_model(run, sampling), runs.locate(run)[0]
    stage = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(stage, ignore_errors=True)
    place = stage / out.name
    fingerprint = run_folder.write(bundle, place, {"name": run.name, "format": "run"}, kind)
    for path in (Path(), Path("autoencoder")):
        describe(folder / path, place / path)
    runs.RunFolder(place).update(sha256=fingerprint, **runs.step_document(run))
    for path in evaluations:
        files.write_json(place / f"eval-{path.stem.removeprefix('eval-')}.json", json.loads(path.read_text()))
    for name in ("novelty.json", "novelty.png"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, place / name)
    files.write_text(place / NOTICE, notice.rstrip("\n") + "\n")
    write_card(place)
    shutil.rmtree(out, ignore_errors=True)
    place.rename(out)
    stage.rmdir()


def describe(run: Path, place: Path) -> None:
    """Adds to a folder of the box what the run says of itself: how it was trained, on what, at which size."""
    state, stats = runs.read_run(run), files.read_json(place / "stats.json")
    files.write_json(place / "stats.json", stats | {**files.read_json(run / "stats.json"), **hash_of_stage(stats)})
    data = dict(state.get("data") or {})
    if "source" in data:
        data["source"] = Path(data["source"]).name
    described = {name: state[name] for name in KEPT if name in state}
    command = without_places(str(state.get("command") or ""))
    runs.RunFolder(place).update(**described, data=data, command=command)


def hash_of_stage(stats: dict[str, Any]) -> dict[str, Any]:
    """The hash of the first stage as it is stored here; {} in its own folder."""
    return {name: stats[name] for name in ("autoencoder",) if name in stats}


def distance(first: Any, second: Any, sampling: dict[str, Any]) -> np.ndarray:
    """|difference| in grey levels of the pictures of two models, (n, H, W, 3)."""
    drawn = [[model.sample(prompt=list(PROMPTS), seed=seed, **sampling) for seed in SEEDS] for model in (first, second)]
    a, b = (np.array([np.asarray(one, np.int16) for images in each for one in images]) for each in drawn)
    return np.abs(a - b)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="run of train-ldm, or RUN@STEP")
    parser.add_argument("--data", type=Path, help="the pictures that it was trained on")
    parser.add_argument("--notice", type=Path, help="text on the licences of other data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--packed", choices=KINDS, default="int8")
    parser.add_argument("--evaluation", type=Path, action="append", default=[], help="a document of eval-fid --json")
    parser.add_argument("--steps", type=int, help="of sampling, as the box does it by default")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--overwrite", action="store_true")
    given = parser.parse_args()
    if given.out.exists() and not (given.overwrite and runs.is_run(given.out)):
        sys.exit(f"{given.out}: exists; --overwrite replaces a box")
    run = runs.locate(given.run)[0]
    if given.notice:
        notice = given.notice.read_text(encoding="utf-8")
    elif given.data:
        notice = notice_of(trained_on(run, given.data))
    else:
        sys.exit("name the pictures of the run with --data, or their licences with --notice FILE")
    sampling = {name: value for name in SAMPLING if (value := getattr(given, name)) is not None}
    make(given.run, given.out, given.packed, notice, given.evaluation, sampling)
    found = {path.relative_to(given.out): path.stat().st_size for path in files.files_below(given.out)}
    for name, size in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{size / 1e6:8.3f} MB  {name}")
    print(f"{sum(found.values()) / 1e6:8.3f} MB  in all")
    apart = distance(load(given.run), load(given.out), sampling)
    print(
        f"{len(PROMPTS) * len(SEEDS)} pictures of run and box: mean difference {apart.mean():.3f} grey levels, "
        f"99.9 % below {np.quantile(apart, 0.999):.0f}, most {apart.max()}"
    )
    if sum(found.values()) > ROOM:
        sys.exit(f"{given.out}: more than {ROOM / 1e6:.1f} MB; take a smaller network or --packed int8")


if __name__ == "__main__":
    main()
