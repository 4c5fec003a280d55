"""What a picture in a folder is: one answer for every command that is given a folder.

A picture is a file with one of the endings in `EXTENSIONS`. Passed over, whatever their ending: hidden files and
folders, what `ldm` itself wrote (runs, results, sheets, and what lies beside samples), and masks that lie beside or
below the pictures that they belong to; but for hidden files, notes count them. The folder that a user names is taken as
it is: samples are pictures where somebody names their folder, and only there.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ldmcli.core import console, outputs
from ldmcli.core.errors import InputError
from ldmcli.data.decode import EXTENSIONS, BadImage, decode, probe, sanitise

UNREAD = frozenset(
    ".heic .heif .hif .jxl .tga .svg .svgz .psd .psb .xcf .kra .ai .eps .ico .icns .cur .exr .hdr .pfm .dds .pcx .sgi "
    ".wmf .emf .pdf .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .raw .srw .pef .x3f .mp4 .mov .avi .mkv .webm .m4v .mpg "
    ".mpeg .wmv .flv .3gp .zip .tgz .gz .bz2 .xz .zst .rar .7z .npy .npz".split()
)
DATA_FILES = (".parquet", ".arrow", ".tar")
TABLES = (".csv", ".tsv", ".jsonl", ".json")
TEXTS = (".txt", ".caption", ".text")  # endings of captions beside pictures
SYSTEM = frozenset(("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"))
SHOWN_NAMES = 5

_METADATA = re.compile(r"metadata\.(csv|tsv|jsonl|json)", re.IGNORECASE)
_RECORDS = ("run.json", outputs.RECORD)  # of a run, of samples and other results
_RESULTS = ("runs", "outputs")  # where commands write without --out
_OWN_NAME = re.compile(r"(\d{6}(-\w+)?|grid|contact|progress|step-\d{8,})\.(png|jpg|webp|gif)")
_SHEETS = outputs.SHEETS
_COMPANION = re.compile(rf"(\d{{6}})-({'|'.join(outputs.BESIDE)})\.png")
_MASK_FOLDER = re.compile(r"mask|segment|matte|trimap|label_?map|annot|^(maps?|segs?|labels?|gt)$", re.IGNORECASE)
_MASK_NAME = re.compile(r"[-_.](mask|seg|matte|trimap)[-_]?\d*$", re.IGNORECASE)
_IMAGE_FOLDER = re.compile(r"(jpeg)?(images?|imgs?|pictures?|photos?|inputs?|rgb)", re.IGNORECASE)
_CHECKED_MASKS = 6
_FEW_COLOURS = 32
_MAGIC = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")


def is_metadata(path: Path) -> bool:
    """Whether a file is called metadata.csv, .tsv, .jsonl or .json, in whatever case."""
    return _METADATA.fullmatch(path.name) is not None


def is_hidden(name: str) -> bool:
    """Files and folders that systems and tools keep for themselves."""
    return name.startswith(".") or name.lower() in SYSTEM


def first_few(names: Iterable) -> str:
    """The first few names, and how many more there are."""
    names = [sanitise(name, 80, end=True) for name in names]
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


@dataclass
class Found:
    """What a folder holds, each list in the order of `os.walk` with sorted names. `texts` are files that may be
    captions beside pictures; `outside` are links that lead out of the folder, which are in no other list."""

    root: Path
    pictures: list[Path] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    data: list[Path] = field(default_factory=list)
    texts: list[Path] = field(default_factory=list)
    outside: list[Path] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)
    masks: list[Path] = field(default_factory=list)
    unread: list[Path] = field(default_factory=list)
    nameless: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)

    def names(self, paths: Iterable[Path]) -> str:
        """Relative paths, the first few."""
        return first_few(path.relative_to(self.root).as_posix() + "/" * path.is_dir() for path in paths)

    def notes(self) -> list[str]:
        """What is there and is not taken, a line a kind."""
        notes = []
        if self.unread:
            notes.append(
                f"{len(self.unread)} files of formats that are not read passed over: {_endings(self.unread)} "
                f"({self.names(self.unread)}); convert them to PNG or JPEG"
            )
        stems = {(path.parent, path.stem) for path in self.pictures} if self.others else set()
        beside = [path for path in self.others if (path.parent, path.stem) in stems]
        if beside:
            notes.append(
                f"{len(beside)} files beside pictures are not read: {_endings(beside)} ({self.names(beside)}); "
                f"captions are read from {', '.join(TEXTS)} and .json"
            )
        if self.nameless:
            notes.append(
                f"{len(self.nameless)} pictures whose names have no ending of a picture passed over "
                f"({self.names(self.nameless)}); rename them"
            )
        if self.written:
            notes.append(f"what ldm itself wrote is passed over ({self.names(self.written)})")
        if self.masks:
            folders = sorted({path.parent for path in self.masks})
            notes.append(
                f"{len(self.masks)} masks or maps of pictures in {self._folders(folders)} passed over "
                f"({self.names(self.masks)})"
            )
        return notes

    def _folders(self, folders: Sequence[Path]) -> str:
        return first_few(f"{folder.relative_to(self.root).as_posix()}/" for folder in folders)


def _endings(paths: Sequence[Path]) -> str:
    counts = Counter(path.suffix.lower() for path in paths)
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common())


def find(root: Path, *, besides: Sequence[Path] = ()) -> Found:
    """Looks through a folder and all below it, links to folders excepted.

    besides: files or folders that the same command uses for something else, as masks, and that are no pictures here.
    """
    found, real_root = Found(root), root.resolve()
    apart = {path.resolve() for path in besides}
    for folder, below, names in os.walk(root):
        here = Path(folder)
        below[:] = sorted(name for name in below if not is_hidden(name) and (here / name).resolve() not in apart)
        names = sorted(name for name in names if not is_hidden(name))
        if here != root and _is_result(here, names):
            found.written.append(here)
            below.clear()
            continue
        for name in names:
            path = here / name
            if not _inside(path, real_root):
                found.outside += [path] * (_list_of(found, path) is not found.others)
            elif _is_written(path, names):
                found.written.append(path)
            elif not apart or path.resolve() not in apart:
                _list_of(found, path).append(path)
        found.outside += [here / name for name in below if not _inside(here / name, real_root)]
    _set_masks_aside(found)
    return found


def _list_of(found: Found, path: Path) -> list[Path]:
    ending = path.suffix.lower()
    if is_metadata(path):
        return found.metadata
    for endings, wanted in (
        (EXTENSIONS, found.pictures),
        (TABLES, found.tables),
        (DATA_FILES, found.data),
        (TEXTS, found.texts),
        (UNREAD, found.unread),
    ):
        if ending in endings:
            return wanted
    return found.nameless if _begins_like_a_picture(path) else found.others


def _begins_like_a_picture(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(16)
        return head.startswith(_MAGIC) or head.startswith(b"RIFF") and head[8:12] == b"WEBP"
    except OSError:
        return False


def _inside(path: Path, real_root: Path) -> bool:
    """Links are followed to their end; a link to nothing stays inside when its target would."""
    return not path.is_symlink() or path.resolve().is_relative_to(real_root)


# --- what ldm wrote ---------------------------------------------------------------------------------------------------


def _is_result(folder: Path, names: Sequence[str]) -> bool:
    if any(name in names for name in _RECORDS):
        return True
    return folder.name in _RESULTS and not any(_is_picture_name(name) for name in names) and _holds_results(folder)


def _holds_results(folder: Path) -> bool:
    """Whether a folder called runs or outputs is ours: something in it says so, or all pictures have our names."""
    pictures = []
    for _, below, names in os.walk(folder):
        below[:] = [name for name in below if not is_hidden(name)]
        if any(name in _RECORDS for name in names):
            return True
        pictures += [name for name in names if _is_picture_name(name) and not is_hidden(name)]
    return bool(pictures) and all(map(_OWN_NAME.fullmatch, pictures))


def _is_picture_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _is_written(path: Path, names: Sequence[str]) -> bool:
    """Whether a file is a sheet of ours, or the layout or map of a sample beside it."""
    beside = _COMPANION.fullmatch(path.name)
    if beside:
        return any(f"{beside[1]}.{ending}" in names for ending in ("png", "jpg", "webp"))
    if path.name not in _SHEETS:
        return False
    stems = [os.path.splitext(name)[0] for name in names if _is_picture_name(name) and name not in _SHEETS]
    numbered = any(map(str.isdecimal, stems)) and all(stem.partition("-")[0].isdecimal() for stem in stems)
    return numbered or outputs.RECORD in names or outputs.marked(path)


# --- masks ------------------------------------------------------------------------------------------------------------


def _set_masks_aside(found: Found) -> None:
    """Moves pictures to `masks` that are called masks, belong to another picture by name and size, and look like masks.

    A few of each folder are looked at; a class folder that happens to be called so keeps its pictures.
    """
    groups: dict[tuple, list[Path]] = {}
    partners: dict[tuple, Path] = {}
    for path in found.pictures:
        folders, stem = path.relative_to(found.root).parts[:-1], path.stem
        kept = tuple(part for part in folders if not _MASK_FOLDER.search(part))
        short = _MASK_NAME.sub("", stem)
        if kept != folders or short != stem:
            groups.setdefault((path.parent, kept, kept == folders), []).append(path)
        else:
            partners.setdefault((_without_images(folders), stem), path)
    aside = set()
    for (_, kept, _), paths in groups.items():
        pairs = [(path, partners.get((_without_images(kept), _MASK_NAME.sub("", path.stem)))) for path in paths]
        paired = [(path, picture) for path, picture in pairs if picture is not None]
        looked = paired[:: max(len(paired) // _CHECKED_MASKS, 1)][:_CHECKED_MASKS]
        if len(paired) * 2 >= len(paths) and looked and all(_is_mask(path, picture) for path, picture in looked):
            aside.update(paths)
    if aside:
        found.masks = [path for path in found.pictures if path in aside]
        found.pictures = [path for path in found.pictures if path not in aside]


def _without_images(folders: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part for part in folders if not _IMAGE_FOLDER.fullmatch(part))


def _is_mask(path: Path, picture: Path) -> bool:
    """Black and white, or of few colours where the picture has many; both of one size."""
    try:
        if probe(path) != probe(picture):
            return False
        pixels = np.asarray(decode(path, background="black")).reshape(-1, 3)
        own, others = (len(np.unique(p, axis=0)) for p in (pixels, np.asarray(decode(picture)).reshape(-1, 3)))
    except BadImage:
        return False
    grey = np.ptp(pixels.astype(np.int16), axis=1) <= 8
    extreme = (pixels[:, 0] < 24) | (pixels[:, 0] > 231)
    black_and_white = bool(grey.all()) and extreme.mean() > 0.97
    return black_and_white or own <= _FEW_COLOURS and others > 4 * own


# --- for commands -----------------------------------------------------------------------------------------------------


def image_files(paths: Sequence[Path], *, besides: Sequence[Path] = ()) -> list[Path]:
    """Pictures as a command is given them: files as they are, and of each folder its pictures by relative path. What a
    folder holds beside them is said.

    besides: as for `find`. Raises InputError: nothing of that name, no pictures there.
    """
    files: list[Path] = []
    notes: list[str] = []
    for path in paths:
        if path.is_dir():
            found = find(path, besides=besides)
            linked = [one for one in found.outside if one.is_file() and one.suffix.lower() in EXTENSIONS]
            files += sorted([*found.pictures, *linked], key=lambda one: one.relative_to(path).parts)
            away = [one for one in found.outside if one.is_dir()]
            notes += [f"{sanitise(path)}: {note}" for note in found.notes()]
            notes += [f"{sanitise(path)}: links to folders are not followed ({found.names(away)})"] * bool(away)
        elif path.exists():
            files.append(path)
        else:
            raise InputError(f"{sanitise(path)}: no such file or folder")
    if not files:
        raise no_pictures(paths[0], [note.removeprefix(f"{sanitise(paths[0])}: ") for note in notes])
    for note in notes:
        console.say_once(note)
    return files


def no_pictures(root: Path, notes: Sequence[str]) -> InputError:
    """What is said of a folder that holds nothing to take."""
    return InputError(f"{sanitise(root)}: no pictures in this folder" + "".join(f"; {note}" for note in notes))


def pair_name(folder: Path, path: Path) -> str:
    """Relative path without extension: what a pair of images has in common."""
    return path.relative_to(folder).with_suffix("").as_posix()


def by_pair_name(folder: Path, found: list[Path]) -> dict[str, Path]:
    """Pictures of a folder by relative path without extension. Raises InputError where two share one."""
    named: dict[str, Path] = {}
    for path in found:
        first = named.setdefault(pair_name(folder, path), path)
        if first != path:
            raise InputError(f"{first} and {path.name}: two images of one name; pairs share path and name, so keep one")
    return named
