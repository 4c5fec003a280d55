"""Small runs that many tests read: each is trained once in all processes of a test session, when it is first asked for.

`tiny_runs["text"]` is a run folder. A test that changes a run copies it first. What a test has patched must not reach a
training: take runs from fixtures of session or module scope, which come before a test's own.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tiny

# name → what `ldm train-ldm` is given beside tiny.UNET, and the number of steps; "kl" is their first stage
MODELS = {
    "plain": ((), 3),
    "text": (("--condition", "text"), 12),
    "class": (("--condition", "class"), 3),
    "layout": (("--condition", "layout", "--data", "shapes:2"), 3),
    "map": (("--condition", "map"), 3),
    "sr": (("--task", "sr", "--scale", 2), 3),
    "inpaint": (("--task", "inpaint"), 3),
}


class TinyRuns:
    """The runs below `folder`, which all processes of a test session share."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def __getitem__(self, name: str) -> Path:
        run, listing = self.folder / name, self.folder / f"{name}.json"
        with _locked(self.folder / f"{name}.lock"):
            if not listing.exists():  # never trained, or the process that trained it has died
                shutil.rmtree(run, ignore_errors=True)
                self._train(name, run)
                listing.write_text(json.dumps(_files(run)))
        return run

    def changed(self) -> list[str]:
        """Names of the runs in which a test has written."""
        listings = sorted(self.folder.glob("*.json"))
        return [one.stem for one in listings if json.loads(one.read_text()) != _files(self.folder / one.stem)]

    def _train(self, name: str, run: Path) -> None:
        if name == "kl":
            tiny.train_ae(run)
            return
        options, steps = MODELS[name]
        cache = ("--set", f"data.cache_dir={self.folder / 'caches' / name}")
        tiny.train_ldm(run, self["kl"], *tiny.ADAM, *options, *cache, steps=steps)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, also by a kill
        yield


def _files(run: Path) -> dict[str, list[int]]:
    """Size and time of each file of a run."""
    stats = {path.relative_to(run).as_posix(): path.stat() for path in sorted(run.rglob("*")) if path.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
