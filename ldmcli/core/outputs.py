"""What a command may replace: files that `ldm` itself wrote, and nothing else.

A folder of results holds request.json: the request, and the SHA-256 of each file written for it. A picture that
was changed since then is the user's again. Sheets (grid.png, contact.png, what lies beside samples) also carry the
mark `Software: ldm`, and samples their settings, so that they are known without that file.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldmcli.core import files
from ldmcli.core.errors import ModelError, UsageError

RECORD = "request.json"
SHEET, CONTACT = "grid.png", "contact.png"  # of samples; of a data set
PROGRESS = {"row": "progress.png", "gif": "progress.gif"}  # how samples came about
SHEETS = (SHEET, CONTACT, *PROGRESS.values())
PAGES = ("report.html", "README.md")
MARK = "Software", "ldm"  # PNG text of every sheet
BESIDE = ("layout", "map")  # the value of a condition, as a picture beside a sample: 000000-map.png
MOST = 10_000_000  # pictures of a request
_DESCRIPTION = 0x010E  # EXIF tag of a sample's settings in formats other than PNG


def marked(path: Path) -> bool:
    """Whether a picture says of itself that `ldm` wrote it."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            text = getattr(image, "text", image.info)
            if text.get(MARK[0]) == MARK[1] or "ldm" in text:
                return True
            described = json.loads(image.getexif().get(_DESCRIPTION) or "null")
    except Exception:  # no picture, or a damaged one: Pillow raises whatever its reader met
        return False
    return isinstance(described, dict) and "ldm_version" in described


def beside(sample: Path, condition: str) -> Path:
    """Where the picture of a layout or map lies beside a sample."""
    return sample.with_name(f"{sample.stem}-{condition}.png")


def read_record(path: Path) -> dict[str, Any] | None:
    """A request.json that `ldm` wrote; None for any other file of that name, and where there is none."""
    try:
        found = files.read_json(path)
    except ModelError:
        return None
    wanted = {"model": str, "format": str, "total": int}
    if not isinstance(found, dict) or not all(
        isinstance(found.get(name), expected) for name, expected in wanted.items()
    ):
        return None
    listed = found.get("files", {})
    plain = isinstance(listed, dict) and all(Path(name).name == name for name in listed)
    return found if plain and found["total"] <= MOST else None


def _declared(out: Path, record: Mapping[str, Any] | None) -> dict[str, str]:
    """Names that a record speaks of, with their hashes; "" where it has none (a killed process, an older version)."""
    if record is None:
        return {}
    names = [out / f"{k:06d}.{record['format']}" for k in range(record["total"])]
    found = dict.fromkeys((name.name for name in names), "")
    if "files" not in record:
        found |= {beside(name, condition).name: "" for name in names for condition in BESIDE} | {SHEET: ""}
    return found | record.get("files", {})


def _is_ours(path: Path, declared: Mapping[str, str]) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    known = declared.get(path.name)
    if known:
        return files.sha256_file(path) == known
    return known == "" or marked(path)


def refuse_inputs(out: Path, targets: Iterable[Path], inputs: Sequence[Path]) -> None:
    """Raises UsageError where a file that the command reads is one that it would write."""
    read = {path.resolve(): path for path in inputs}
    for target in targets:
        if target.resolve() in read:
            raise UsageError(
                f"--out {out}: the result would replace {read[target.resolve()]}, which this command "
                "reads; choose another --out"
            )


def refuse_foreign(paths: Iterable[Path], declared: Mapping[str, str] | None = None) -> None:
    """Raises UsageError where one of the paths is there and not written by `ldm`."""
    foreign = [path for path in paths if os.path.lexists(path) and not _is_ours(path, declared or {})]
    if foreign:
        more = f" (nor {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise UsageError(
            f"{foreign[0]}: not written by ldm, or changed since{more}, so it is not replaced; move it "
            "away or choose another --out"
        )


def refuse_foreign_document(path: Path, kind: str) -> None:
    """Raises UsageError where a JSON file is there that is no document of this `kind`."""
    if not os.path.lexists(path):
        return
    try:
        found = files.read_json(path)
    except ModelError:
        found = None
    if not isinstance(found, dict) or found.get("kind") != kind:
        raise UsageError(f"{path}: not written by ldm, so it is not replaced; move it away or choose another --out")


def write_page(path: Path, text: str) -> None:
    """Writes a page of text (HTML or Markdown) that ends in a comment with its own hash. Raises UsageError where a page
    is there that was changed by hand, or never was one of these."""
    if os.path.lexists(path) and not page_is_ours(path):
        raise UsageError(f"{path}: not written by ldm, or changed since, so it is kept; move it away for a new one")
    files.write_text(path, f"{text}{_signature(text)}\n")


def page_is_ours(path: Path) -> bool:
    """Whether a page is as `write_page` left it, or a report of a version before it signed pages."""
    if path.is_symlink() or not path.is_file():
        return False
    signed = _as_signed(path)
    return signed if signed is not None else "<footer>Written by ldm " in _text(path)


def card_is_models(path: Path) -> bool:
    """Whether a README.md is the card of a model (it has the hub's front matter) that was not changed by hand."""
    return _as_signed(path) is not False and _text(path).startswith("---\n")


def _as_signed(path: Path) -> bool | None:
    """Whether a page is what its signature says; None where it has none."""
    text = _text(path)
    body, begin, _ = text.rpartition("<!-- ldm ")
    return text == f"{body}{_signature(body)}\n" if begin else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _signature(text: str) -> str:
    return f"<!-- ldm {hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()} -->"


class Results:
    """The results of one request in a folder, while they are written. A context manager: request.json is complete
    after it, however it ends.

    names: the pictures, in order; sheets: names of what shows several of them; todo: which pictures are missing. Raises
    UsageError, before anything is touched, where the folder holds what would be lost: an input of the command, a file
    of the user's, samples of another request.
    """

    def __init__(
        self,
        out: Path,
        names: list[Path],
        wanted: dict[str, Any],
        *,
        conditions: Sequence[str] = (),
        inputs: Sequence[Path] = (),
        sheets: Sequence[str] = (SHEET,),
        overwrite: bool = False,
    ):
        self.out, self.names, self.wanted = out, names, wanted
        self.sheets = [out / name for name in sheets]
        record = read_record(out / RECORD)
        declared = _declared(out, record)
        earlier = [out / name for name in declared]
        beside_files = [beside(name, condition) for name in names for condition in conditions]
        own = [*names, *beside_files, *self.sheets]
        refuse_inputs(out, [*own, *earlier, out / RECORD], inputs)
        if record is None and os.path.lexists(out / RECORD):
            refuse_foreign([out / RECORD])
        self.files: dict[str, str] = {}
        if overwrite:
            refuse_foreign(own, declared)
            for path in {*own, *earlier}:
                if os.path.lexists(path) and _is_ours(path, declared):
                    path.unlink()
        else:
            self._go_on(record, declared, beside_files)
        self.todo = [k for k, name in enumerate(names) if not name.exists()]
        anew = [names[k] for k in self.todo]
        anew += [beside(name, condition) for name in anew for condition in conditions]
        gone = {SHEET, *(path.name for path in anew)}
        self.files = {name: known for name, known in self.files.items() if name not in gone}
        files.write_json(out / RECORD, {**wanted, "files": self.files})

    def _go_on(self, record: Mapping[str, Any] | None, declared: Mapping[str, str], beside_files: list[Path]) -> None:
        there = [name for name in self.names if os.path.lexists(name)]
        mine = record is not None and {k: v for k, v in record.items() if k != "files"} == self.wanted
        held = [name for name in declared if name not in SHEETS and os.path.lexists(self.out / name)]
        if held and not mine:
            raise UsageError(f"{self.out}: holds samples of another request; choose another --out or add --overwrite")
        if there and not mine:
            raise UsageError(
                f"{self.out}: holds images already ({there[0].name} …); choose another --out or add --overwrite"
            )
        refuse_foreign(
            [*self.sheets, *(path for path in beside_files if not mine or path.name not in declared)], declared
        )
        self.files = {name: known for name, known in declared.items() if mine and known}

    def write(self, path: Path, data: bytes) -> None:
        """Writes a file of the request, whole or not at all."""
        files.write_bytes(path, data)
        self.files[path.name] = hashlib.sha256(data).hexdigest()

    def add(self, hashes: Mapping[str, str]) -> None:
        """Files of the request that others have written: their SHA-256 by name."""
        self.files |= hashes

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        files.write_json(self.out / RECORD, {**self.wanted, "files": dict(sorted(self.files.items()))})
