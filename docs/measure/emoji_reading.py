"""Do samples of an emoji model show what their prompts name? A judge reads them that knows the real drawings.

The judge is linear discriminant analysis on features of all real pictures, a class a name (1,754 in emoji64), and says
of a sample the names that are nearest. "Right" is a name whose head has the prompt's words, as "red apple" and "green
apple" for "a red apple": the nearest name (top 1), or one of the five nearest. Beside it stands what the judge makes
of real pictures that it does not know: each vendor's drawings are read by a judge of all other vendors' drawings.
Chance is the share of names that are right. A colour in a prompt is looked for among the dominant colours.

    python docs/measure/emoji_reading.py runs/emoji-text --data emoji64 --prompts "a red apple" "a heart" "a house"
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import ldmcli
from ldmcli.core.allocator import keep_freed_memory
from ldmcli.core.settings import DataSettings
from ldmcli.data.sources import open_rows
from ldmcli.evaluation.extractors import Extractor, open_extractor
from ldmcli.evaluation.features import extract
from ldmcli.maths.colour_words import COLOUR_WORDS, colour_words

BLOCK = 128
TOP = 5
SHRINKAGE = 0.1  # of the covariance within names towards a sphere
NAMED = ("a red apple", "a heart", "a house", "a cat")
SKIPPED = {"a", "an", "the", "symbol", *COLOUR_WORDS}


@dataclass(frozen=True)
class Real:
    """All real pictures: features (n, d), and of each its name, its vendor and its colours."""

    features: np.ndarray
    names: list[str]
    styles: list[str]
    colours: list[list[str]]


@dataclass(frozen=True)
class Judge:
    """Whitening (d, d), and the whitened mean of each name, of length 1 (c, d)."""

    names: list[str]
    whitening: np.ndarray
    mean: np.ndarray
    means: np.ndarray

    def read(self, features: np.ndarray) -> list[list[str]]:
        """The TOP nearest names of each picture, the nearest first."""
        likeness = unit((features - self.mean) @ self.whitening) @ self.means.T
        return [[self.names[k] for k in row] for row in np.argsort(-likeness, axis=1)[:, :TOP]]


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def trained(features: np.ndarray, names: Sequence[str]) -> Judge:
    """The judge of pictures (n, d) with these names."""
    known, label = np.unique(np.asarray(names), return_inverse=True)
    means = np.zeros((len(known), features.shape[1]))
    np.add.at(means, label, features)
    means /= np.bincount(label)[:, None]
    inner = features - means[label]
    covariance = inner.T @ inner / max(len(features) - len(known), 1)
    covariance *= 1 - SHRINKAGE
    covariance += SHRINKAGE * np.trace(covariance) / (1 - SHRINKAGE) / len(covariance) * np.eye(len(covariance))
    values, vectors = np.linalg.eigh(covariance)
    whitening = (vectors / np.sqrt(values)) @ vectors.T
    mean = features.mean(axis=0)
    return Judge(known.tolist(), whitening, mean, unit((means - mean) @ whitening))


def wanted_words(prompt: str) -> set[str]:
    """The words of a prompt that a right name has: no articles, no colours, nothing of the style behind a comma."""
    return set(re.findall(r"[^\W_]+", prompt.lower().partition(",")[0])) - SKIPPED


def is_right(name: str, words: set[str]) -> bool:
    """Whether the head of a name, what stands before "with", has the words: a face with heart-eyes is no heart."""
    return words <= set(re.findall(r"[^\W_]+", name.lower().partition(" with ")[0]))


def shares(read: list[list[str]], words: set[str]) -> tuple[float, float]:
    """(share whose nearest name is right, share with a right one among the nearest TOP)."""
    right = [[is_right(name, words) for name in names] for names in read]
    return float(np.mean([row[0] for row in right])), float(np.mean([any(row) for row in right]))


def real_pictures(data: str, size: int, extractor: Extractor, kept: Path) -> Real:
    """Every picture of both splits; features are kept in a file."""
    parts = [open_rows(DataSettings(source=data, size=(size, size)), split=split) for split in ("train", "validation")]
    where = [(rows, i) for rows in parts for i in range(len(rows))]
    images = [rows.pixels(i, (size, size)) for rows, i in where]
    if kept.is_file():
        features = np.load(kept)
    else:
        blocks = []
        for start in range(0, len(images), BLOCK):
            blocks.append(extract(images[start : start + BLOCK], extractor).features)
            print(f"\rreal pictures: {start + len(blocks[-1])} of {len(images)}", end="", flush=True)
        print()
        features = np.concatenate(blocks)
        np.save(kept, features)
    names, styles = ([" ".join(rows.words(i, column)) for rows, i in where] for column in ("name", "style"))
    return Real(features.astype(np.float64), names, styles, [colour_words(image) for image in images])


def read_by_others(real: Real) -> list[list[str]]:
    """What a judge of all other vendors' drawings makes of each real picture; [] where it does not know the name."""
    read: list[list[str]] = [[] for _ in real.names]
    for style in sorted(set(real.styles)):
        others = [k for k, own in enumerate(real.styles) if own != style]
        known = {real.names[k] for k in others}
        own = [k for k, one in enumerate(real.styles) if one == style and real.names[k] in known]
        judge = trained(real.features[others], [real.names[k] for k in others])
        for k, names in zip(own, judge.read(real.features[own])):
            read[k] = names
    return read


def judged_real(prompt: str, real: Real, read: list[list[str]]) -> dict:
    """What a prompt asks of a sample, of the real pictures that show it, read by judges that do not know them, and of a
    name that is picked at random."""
    words, names = wanted_words(prompt), sorted(set(real.names))
    found: dict = {"prompt": prompt, "chance": sum(is_right(name, words) for name in names) / len(names)}
    colour = next((word for word in COLOUR_WORDS if word in prompt.lower().split()), None)
    theirs = [k for k, name in enumerate(real.names) if is_right(name, words) and read[k]]
    if theirs:
        found["real_top1"], found["real_top5"] = shares([read[k] for k in theirs], words)
        found["real_pictures"] = len(theirs)
    if coloured := [k for k in theirs if colour in real.names[k].lower().split()]:
        found["real_colour"] = float(np.mean([colour in real.colours[k] for k in coloured]))
    return found | ({"asked_colour": colour} if colour else {})


def judged(images: list[np.ndarray], judge: Judge, extractor: Extractor, asked: dict) -> dict:
    """The samples of a prompt, beside `judged_real` of it, and the names that they were taken for."""
    seen = judge.read(extract(images, extractor).features.astype(np.float64))
    top, five = shares(seen, wanted_words(asked["prompt"]))
    found = {**asked, "top1": top, "top5": five, "read_as": [names[0] for names in seen]}
    if colour := asked.get("asked_colour"):
        found["colour"] = float(np.mean([colour in colour_words(image) for image in images]))
    return found


def show(found: dict) -> None:
    """A prompt in two or three lines."""
    lines = [f"{found['prompt']}: chance {found['chance']:.4f}"]
    if "real_top1" in found:
        real = f"right {found['real_top1']:.2f}, among five {found['real_top5']:.2f}"
        colour = f", the colour {found['real_colour']:.2f}" if "real_colour" in found else ""
        lines.append(f"  {found['real_pictures']} real pictures of unknown vendors: {real}{colour}")
    if "top1" in found:
        colour = f", the colour {found['colour']:.2f}" if "colour" in found else ""
        lines.append(f"  samples: right {found['top1']:.2f}, among five {found['top5']:.2f}{colour}")
        common = Counter(found["read_as"]).most_common(4)
        lines.append(f"  read as {', '.join(f'{name} ({count})' for name, count in common)}")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", metavar="RUN", nargs="?", help="without one the judge alone is measured")
    parser.add_argument("--data", required=True)
    parser.add_argument("--prompts", nargs="+", default=NAMED)
    parser.add_argument("-n", type=int, default=32, help="samples of each prompt")
    parser.add_argument("--steps", type=int, help="of the sampler; as the run says")
    parser.add_argument("--guidance", type=float, help="as the run says")
    parser.add_argument("--features", default="effnet-lite0")
    parser.add_argument("--pixels", type=int, default=96, help="side of what the network sees")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/emoji-reading"), help="where features are kept")
    given = parser.parse_args()
    keep_freed_memory()
    given.out.mkdir(parents=True, exist_ok=True)
    extractor = open_extractor(given.features)
    extractor = replace(extractor, network=replace(extractor.network, size=given.pixels))
    real = real_pictures(given.data, given.size, extractor, given.out / f"{given.features}-{given.pixels}.npy")
    read = read_by_others(real)
    known = [k for k, names in enumerate(read) if names]
    first = np.mean([read[k][0] == real.names[k] for k in known])
    five = np.mean([real.names[k] in read[k] for k in known])
    count = len(set(real.names))
    print(
        f"judge of {count} names, on {len(known)} real pictures of vendors that it does not know: the name is the "
        f"nearest of {first:.3f}, among the nearest {TOP} of {five:.3f} (chance {1 / count:.4f}, {TOP / count:.4f})"
    )
    judge, table = trained(real.features, real.names), []
    model = ldmcli.load(given.run) if given.run else None
    options = {name: getattr(given, name) for name in ("steps", "guidance") if getattr(given, name) is not None}
    for prompt in given.prompts:
        table.append(judged_real(prompt, real, read))
        if model is not None:
            samples = [np.asarray(image) for image in model.sample(prompt, n=given.n, seed=given.seed, **options)]
            table[-1] = judged(samples, judge, extractor, table[-1])
        show(table[-1])
    if model is not None:
        mean = {key: float(np.mean([row[key] for row in table])) for key in ("top1", "top5", "chance")}
        print(f"mean of {len(table)} prompts: right {mean['top1']:.3f}, among five {mean['top5']:.3f}")
        (given.out / "reading.json").write_text(json.dumps({"run": given.run, "prompts": table}, indent=1))
