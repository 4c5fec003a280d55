"""The run folder: who writes in it, what it holds, and checkpoints that are complete or not there.

Layout (contract): config.toml, run.json, model.safetensors, checkpoints/step-NNNNNNNN/, metrics.jsonl, samples/,
tokenizer/, stats.json, report.html, README.md. Nothing in it refers to an absolute path that use needs.
"""

import json
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldmcli.core import box, files
from ldmcli.core.errors import LdmError, ModelError
from ldmcli.core.locks import LOCK, OWNER, FolderLock
from ldmcli.core.outputs import PAGES, page_is_ours

_STEP_NAME = re.compile(r"^step-(\d{8,})$")


_PART = r"(config\.toml|run\.json|model\.safetensors|stats\.json)"
_WRITTEN = re.compile(
    "|".join(
        [
            _PART,
            rf"autoencoder/{_PART}",
            r"guiding\.safetensors",
            r"metrics\.jsonl",
            r"bad-batch\.json",
            r"\.lock(-owner)?",
            r"samples/step-\d+\.png",
            r"neighbours/neighbours\.(png|json)",
            r"novelty\.(png|json)",
            r"checkpoints/step-\d+/([\w.-]+\.safetensors|state\.json|manifest\.json)",
            r"tokenizer/(vocab\.(txt|json)|merges\.txt|(tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json)",
            r"tensorboard/(.+/)?(events\.out\.tfevents\..+|hparams\.yml)",
            r"wandb/.+",
        ]
    )
)


def own_files(path: Path) -> list[Path]:
    """The files of a run folder that `ldm` writes in one; a report or card only as it was written."""
    found = files.files_below(path)
    pages = [one for one in found if one.parent == path and one.name in PAGES and page_is_ours(one)]
    return [*pages, *(one for one in found if _WRITTEN.fullmatch(one.relative_to(path).as_posix()))]


class RunFolder:
    """A run folder opened for writing by one process (the lock goes with the process, however it ends)."""

    def __init__(self, path: Path):
        self.path = path
        self.begun = False  # whether run.json says of this process that it is training
        self._lock = FolderLock(path)
        self._made = False  # by this process
        self._updating = threading.Lock()  # of run.json: a checkpoint's writer changes it beside the loop

    def acquire(self) -> None:
        """Creates the folder and becomes its only writer. Raises UsageError when another process is."""
        with files.writing(self.path):
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()

    def release(self) -> None:
        """Lets another writer in. A folder that was made here, and in which nothing was written, goes."""
        try:
            empty = self._made and {path.name for path in self.path.iterdir()} <= {LOCK, OWNER}
            if empty:
                (self.path / LOCK).unlink(missing_ok=True)
            self._lock.release()
            if empty:
                self.path.rmdir()
        except OSError:
            self._lock.release()  # the folder is gone, or another process has begun in it

    def clear(self) -> None:
        """Removes an earlier run's files (for --fresh); files that are not a run's stay, wherever they lie in it."""
        if is_run(self.path):  # it goes last and promises nothing: a kill in between leaves a run that begins anew
            try:
                self.update(state="interrupted", step=0, checkpoint=0, reason="begun anew with --fresh")
            except ModelError:
                pass  # run.json is damaged, and gone in a moment
        ours = [path for path in own_files(self.path) if path.name not in (LOCK, OWNER)]
        for path in sorted(ours, key=lambda path: path == self.path / "run.json"):
            path.unlink(missing_ok=True)
        below = {folder for path in ours for folder in path.parents if self.path in folder.parents}
        for folder in sorted(below, key=lambda folder: -len(folder.parts)):
            try:
                folder.rmdir()
            except OSError:
                pass  # something of the user's lies in it, or it is a link to a folder elsewhere

    def update(self, **changes: Any) -> None:
        """Merges `changes` into run.json, replacing it atomically."""
        with self._updating:
            files.write_json(self.path / "run.json", {**self.state(), **changes, "updated": _now()})

    def state(self) -> dict[str, Any]:
        """The content of run.json; {} where there is none."""
        path = self.path / "run.json"
        return files.read_json(path) if path.exists() else {}

    def log(self, **values: Any) -> None:
        """Appends one JSON object to metrics.jsonl. Values that JSON cannot hold (NaN, Inf) are written as text."""
        clean = {
            k: repr(v) if isinstance(v, float) and (v != v or v in (float("inf"), -float("inf"))) else v
            for k, v in values.items()
        }
        path = self.path / "metrics.jsonl"
        with files.writing(path), open(path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(clean, ensure_ascii=False) + "\n")

    def trim_log(self, step: int, *, ended: bool = False) -> None:
        """Drops log lines of steps after `step`: they will be trained again. A line cut by a crash goes, too.

        ended: `step` is the last, so its evaluation is repeated and goes as well.
        """
        path = self.path / "metrics.jsonl"
        if path.exists():
            kept = [
                line
                for line in read_log(self.path)
                if line.get("step", 0) <= step
                and not (ended and line.get("step") == step and any(name.startswith("val/") for name in line))
            ]
            files.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl; lines cut short by a crash are left out."""
    lines = []
    log = path / "metrics.jsonl"
    for text in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def machine(gpu: str = "", processes: int = 1) -> dict[str, Any]:
    """What stands in run.json of the machine: no host name, no paths. gpu: its name, "" for a training on the CPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device_type": "gpu" if gpu else "cpu",
        "device": gpu or _cpu_name(),
        "cpu_count": cores,  # those that this process may use
        "processes": processes,
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    """The processor's model as the system calls it; its architecture where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model", "Hardware")))
    return next((name for name in named if name), platform.processor() or platform.machine())


# ---------------------------------------------------------------- checkpoints


def write_checkpoint(
    run: RunFolder,
    step: int,
    tensors: dict[str, dict],
    state: dict[str, Any],
    keep: int,
    best: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Writes checkpoints/step-NNNNNNNN: one safetensors file an entry of `tensors`, state.json, manifest.json.

    Each byte is hashed once, while it is written. Everything is flushed under a temporary name, the manifest last,
    then one rename. Older checkpoints beyond `keep` are removed only after the new one is there, in its full size; that
    of step `best` stays. `check()` may raise between two files, to give the checkpoint up. Raises ResourceError when
    the disk is full: the earlier checkpoints then stand as they were.
    """
    root = run.path / "checkpoints"
    final = root / f"step-{step:08d}"
    if _step_of(final) == step and not problems(final):
        rotate_checkpoints(run, final, keep, best)
        return final
    temporary = root / f".step-{step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    try:
        with files.writing(final, needed):
            temporary.mkdir(parents=True)
            files.require_space(root, needed)
        hashes = {}
        for name, group in tensors.items():
            check()
            hashes[f"{name}.safetensors"] = files.save_listed_tensors(temporary / f"{name}.safetensors", group)
            _pause(f"after {name}")
        files.write_json(temporary / "state.json", {**state, "step": step})
        hashes["state.json"] = files.sha256_file(temporary / "state.json")
        listed = {name: {"size": (temporary / name).stat().st_size, "sha256": found} for name, found in hashes.items()}
        _pause("before manifest")
        check()
        files.write_json(temporary / "manifest.json", {"step": step, "files": listed})
        _pause("before rename")
        with files.writing(final):
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
            files.flush_folder(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    rotate_checkpoints(run, final, keep, best)
    return final


def _pause(point: str) -> None:
    """Test hook: LDM_DEBUG_PAUSE="before rename=5" sleeps there, so that a test can kill the process at that point."""
    wanted, _, seconds = os.environ.get("LDM_DEBUG_PAUSE", "").partition("=")
    if wanted == point:
        time.sleep(float(seconds or 60))


def rotate_checkpoints(run: RunFolder, newest: Path, keep: int, best: int | None = None) -> None:
    """Removes all but the `keep` newest checkpoints and that of step `best`, once `newest` is whole."""
    if problems(newest, hashes=False):
        return
    others = [path for step, path in _named(run.path / "checkpoints") if path != newest and step != best]
    for path in others[max(keep - 1, 0) :]:
        shutil.rmtree(path, ignore_errors=True)


def _named(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything named like a checkpoint, the highest step first."""
    found = [path for path in root.iterdir() if _STEP_NAME.match(path.name)] if root.is_dir() else []
    return sorted(((_step_of(path), path) for path in found), reverse=True)


def _step_of(checkpoint: Path) -> int:
    """The step stored in a checkpoint; what its name says where that cannot be read, and -1 where nothing is there."""
    if not checkpoint.is_dir():
        return -1
    try:
        return int(files.read_json(checkpoint / "manifest.json")["step"])
    except (LdmError, KeyError, TypeError, ValueError):
        return int(checkpoint.name.removeprefix("step-"))


def checkpoint_steps(path: Path) -> list[int]:
    """Steps of all that is named like a checkpoint in a run folder, in order."""
    return sorted(step for step, _ in _named(path / "checkpoints"))


def problems(checkpoint: Path, *, hashes: bool = True) -> str:
    """'' when a checkpoint is complete and its hashes (or, without `hashes`, its sizes) agree, else what is wrong."""
    try:
        manifest = files.read_json(checkpoint / "manifest.json")
        for name, entry in manifest["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            whole = path.stat().st_size == entry["size"]
            if not whole or (hashes and files.sha256_file(path) != entry["sha256"]):
                return f"{name} is damaged"
    except (LdmError, KeyError, TypeError, AttributeError) as error:
        return f"no valid manifest ({error})"
    return ""


def checkpoint_tensors(checkpoint: Path, name: str) -> dict:
    """Tensors of a file of a checkpoint, by the file's name without its ending. Raises ModelError where it is missing,
    is not what was written, or holds NaN or Inf."""
    file = f"{name}.safetensors"
    try:
        listed = files.read_json(checkpoint / "manifest.json")["files"][file]["sha256"]
    except (KeyError, TypeError) as error:
        raise ModelError(f"{checkpoint / file}: missing, or not in manifest.json") from error
    return files.load_tensors(checkpoint / file, sha256=listed)[0]


def newest_checkpoint(path: Path, warn=lambda text: None) -> Path | None:
    """The complete checkpoint with the highest step (as stored inside), or None. Damaged and stray ones are named."""
    root = path / "checkpoints"
    for stray in root.iterdir() if root.is_dir() else []:
        if not _STEP_NAME.match(stray.name) and not stray.name.startswith("."):
            warn(f"{stray}: not a checkpoint of this run, left alone")
    for _, candidate in _named(root):
        wrong = problems(candidate)
        if not wrong:
            return candidate
        warn(f"{candidate}: {wrong}; the checkpoint before it is used")
    return None


def sweep_unfinished(run: RunFolder, warn=lambda text: None) -> None:
    """Removes what a killed process left half-written in checkpoints/ and beside the run's files."""
    for path in (run.path / "checkpoints").glob(".step-*.tmp"):
        warn(f"{path.name}: an unfinished checkpoint, removed")
        shutil.rmtree(path, ignore_errors=True)
    for path in [*run.path.glob(".*.tmp"), *run.path.glob("*/.*.tmp")]:
        if files.is_temporary(path):
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------- finding runs


def is_run(path: Path) -> bool:
    """Whether `path` looks like a run folder."""
    return (path / "run.json").is_file()


def read_run(path: Path) -> dict[str, Any]:
    """run.json of a run folder. Raises ModelError when `path` is none."""
    if not path.is_dir():
        raise ModelError(f"{path}: no such run folder; `ldm runs` lists those there are")
    if not is_run(path):
        raise ModelError(f"{path}: not a run folder (no run.json in it)")
    return files.read_json(path / "run.json")


def locate(path: Path) -> tuple[Path, Path | None]:
    """(run folder, checkpoint) that a name means: RUN, RUN@STEP, RUN@best, or RUN/checkpoints/step-STEP.

    The checkpoint is None for RUN, whose weights for use are meant, and for what is no run. What exists under the very
    name comes first; only `box.NAME` means the model that comes with the package whatever lies here. Raises ModelError
    where there is no such checkpoint, naming those there are, and where the package came without its model.
    """
    if box.is_meant(path):
        return box.folder(), None
    place = path.absolute()
    if _STEP_NAME.match(path.name) and place.parent.name == "checkpoints" and is_run(place.parent.parent):
        return place.parent.parent, _checkpoint_at(place.parent.parent, path.name.removeprefix("step-"))
    name, _, wanted = path.name.rpartition("@")
    if not name or path.exists() or not is_run(path.with_name(name)):
        return path, None
    run = path.with_name(name)
    return run, _checkpoint_at(run, wanted)


def origin(source: Path) -> dict[str, Any]:
    """What run.json says of the run that another one began with the weights of: its name, and the updates and seconds
    that are in those weights, with all runs before it. Seconds are None where a run on the way does not tell them."""
    run, checkpoint = locate(source)
    state = read_run(run) if is_run(run) else {}
    before = state.get("begun_from") or {"steps": 0, "seconds": 0.0}
    last = int(state.get("step") or 0)
    step = _step_of(checkpoint) if checkpoint is not None else last
    seconds, earlier = state.get("trained_seconds"), before["seconds"]
    total = None if seconds is None or earlier is None else seconds * step / max(last, 1) + earlier
    return {"name": run.name, "steps": step + int(before["steps"]), "seconds": total}


def _checkpoint_at(run: Path, wanted: str) -> Path:
    found = dict(_named(run / "checkpoints"))
    steps = ", ".join(map(str, checkpoint_steps(run)))
    there_are = f"its checkpoints are of step {steps}" if found else "it has no checkpoints"
    step = (read_run(run).get("best") or {}).get("step", -1) if wanted == "best" else None
    if step == -1:
        raise ModelError(f"{run}@best: it kept no best checkpoint (train.keep_best = METRIC keeps one); {there_are}")
    if step is None and not wanted.isdecimal():
        raise ModelError(f"{run}@{wanted}: behind the @ belongs a step, or best; {there_are}")
    step = int(wanted) if step is None else step
    if step not in found:
        raise ModelError(f"{run}: no checkpoint of step {step}; {there_are}")
    return found[step]


def folder_for_results(name: str | Path) -> Path | None:
    """The run folder that a name means, where results about a run are kept; None for what is no run, and for the model
    that comes with the package, in which nothing is written."""
    if box.is_meant(Path(name)):
        return None
    run = locate(Path(name))[0]
    return run if is_run(run) else None


def step_document(path: Path) -> dict[str, int]:
    """What documents say of the checkpoint that a name means (`locate`): {"step": …}; {} where it means none."""
    checkpoint = locate(path)[1]
    return {} if checkpoint is None else {"step": _step_of(checkpoint)}


def list_runs(root: Path = Path("runs"), copies: bool = False) -> list[dict[str, Any]]:
    """Runs below `root`, newest last: path, kind, state, step, data, newest and best evaluation, last change.

    copies: instead the autoencoders inside other runs, which were trained elsewhere."""
    rows = []
    markers = [path for path in files.files_below(root) if path.name == "run.json" and path.is_file()]
    listed = [path for path in markers if _is_copy(path.parent) == copies]
    for marker in sorted(listed, key=lambda path: path.stat().st_mtime):
        try:
            state = files.read_json(marker)
        except ModelError:
            continue
        rows.append(
            {
                "path": str(marker.parent),
                "kind": state.get("kind"),
                "state": state.get("state"),
                "step": state.get("step"),
                "data": (state.get("data") or {}).get("source"),
                "metrics": state.get("metrics") or {},
                **({"best": state["best"]} if state.get("best") else {}),
                "updated": state.get("updated"),
            }
        )
    return rows


def _is_copy(run: Path) -> bool:
    """Whether a run is the autoencoder of the run around it: no training logged anything in it."""
    return run.name == "autoencoder" and is_run(run.parent) and not (run / "metrics.jsonl").exists()


def newest_run(run_kind: str, root: Path = Path("runs")) -> Path:
    """The run of `kind` with weights that changed last; where there is none the newest copy inside another run. Raises
    ModelError when there is neither."""
    for row in [*reversed(list_runs(root)), *reversed(list_runs(root, copies=True))]:
        if row["kind"] == run_kind and (Path(row["path"]) / "model.safetensors").exists():
            return Path(row["path"])
    command = {"autoencoder": "ldm train-ae", "classifier": "ldm train-classifier"}.get(run_kind, "ldm train-ldm")
    raise ModelError(
        f"no {run_kind} run with weights below {root}/: train one with `{command}` or name one with --model"
    )
