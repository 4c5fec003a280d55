"""Files that are whole or absent: atomic writes, content hashes, disk-space checks, self-verifying safetensors."""

import errno
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldmcli.core import tensor_stream
from ldmcli.core.errors import LdmError, ModelError, ResourceError, UsageError

_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_UNUSABLE = (
    errno.ENOENT,  # of a folder that nothing can be made in, as below /proc
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


def home() -> Path | None:
    """The user's folder; None where there is none: neither $HOME nor an entry among the users, as in containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def expanded(path: Path) -> Path:
    """~/x and ~name/x as the shell reads them; as it stands where there is no such folder or user."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def free_bytes(path: Path) -> int:
    """Bytes that an ordinary user may still write on the disk of `path` (or of its nearest existing parent)."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def require_space(path: Path, needed: int) -> None:
    """Raises ResourceError unless `needed` bytes (plus 1 %) fit on the disk of `path`."""
    free = free_bytes(path)
    if free < needed * 1.01:
        raise ResourceError(
            f"{path}: {human_bytes(needed)} are needed and {human_bytes(free)} are free; "
            "make room or choose another --out"
        )


@contextmanager
def writing(path: Path, needed: int = 0):
    """Turns what the system says of a failed write into one of our errors, naming path and sizes."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            size = f"{human_bytes(needed)} to write, " if needed else ""
            raise ResourceError(
                f"{path}: the disk (or a file-size limit) is full: {size}{human_bytes(free_bytes(path.parent))} free; "
                "make room and run the same command again"
            ) from error
        if error.errno in _UNUSABLE:
            raise UsageError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
        raise


def flush_folder(folder: Path) -> None:
    """The names in a folder are on the disk when this returns."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, through links to folders as well, each folder once."""
    found, seen = [], set()
    for here, below, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(here))
        below[:] = sorted(name for name in below if os.path.realpath(os.path.join(here, name)) not in seen)
        found += [Path(here, name) for name in sorted(names)]
    return found


def temporary_path(path: Path) -> Path:
    """Where what will be `path` is written; its name is cut where it would become too long for a file system."""
    name = os.fsencode(path.name)
    short = path.name if len(name) < 200 else hashlib.sha256(name).hexdigest()[:16]
    return path.with_name(f".{short}.{os.getpid()}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether a file has a name that `temporary_path` gives."""
    return re.fullmatch(r"\..+\.\d+\.tmp", path.name) is not None


@contextmanager
def atomic_path(path: Path, needed: int = 0, *, folder_too: bool = True):
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed, else removed. folder_too:
    whether its new name is flushed as well; of many files in one folder that is done once (`flush_folder`)."""
    temporary = temporary_path(path)
    with writing(path, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
            if folder_too:
                flush_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, *, folder_too: bool = True) -> None:
    """Replaces `path` by `data`, whole or not at all. folder_too as `atomic_path`."""
    with atomic_path(path, len(data), folder_too=folder_too) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by UTF-8 `text`, whole or not at all. Bytes of file names that are no text become "?"."""
    write_bytes(path, text.encode("utf-8", "replace"))


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as indented JSON."""
    write_text(path, json_text(value, indent=1) + "\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON without NaN; readable, unless it holds file names whose bytes are no text, which need JSON's own escapes."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent, allow_nan=False)
    return text


def read_json(path: Path) -> Any:
    """The JSON value of `path`. Raises ModelError when it is absent or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: damaged or unreadable ({error})") from error


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def tensors_hash(tensors: dict) -> str:
    """Hex SHA-256 over names, dtypes, shapes and bytes of tensors, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        for _ in tensor_stream.hashed_pieces(name, tensors[name], digest):
            pass
    return digest.hexdigest()


def plain_name(name: str) -> str:
    """A tensor's name without what DistributedDataParallel and torch.compile put into it."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def require_finite(tensors: dict, where: Path | str, error: type[LdmError] = ModelError) -> None:
    """Raises `error`, naming them, where tensors hold NaN or Inf: samples of a model with such weights are black."""
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not is_finite(tensor)]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise error(
            f"{where}: NaN or Inf in {', '.join(bad[:3])}{more} ({len(bad)} of {len(tensors)} tensors); "
            "get an intact copy, or a checkpoint from before it was spoilt"
        )


def is_finite(tensor) -> bool:
    """Whether a tensor of floating-point numbers holds no NaN and no Inf."""
    # a sum is quicker than a look at each number, and only finite where all are; large finite ones may overflow it
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def save_tensors(path: Path, tensors: dict, metadata: dict[str, str] | None = None) -> str:
    """Writes tensors as safetensors with the hash of their content in the metadata; returns the hash."""

    def described(content: str) -> dict[str, str]:
        return {"format": "pt", "content_sha256": content, **(metadata or {})}

    with _new_tensor_file(path, tensors) as file:
        return tensor_stream.write_named(file, tensors, described)


def save_listed_tensors(path: Path, tensors: dict) -> str:
    """Writes tensors as safetensors whose hash stands elsewhere, in a list of files; returns the file's SHA-256."""
    with _new_tensor_file(path, tensors) as file:
        return tensor_stream.write_plain(file, tensors, {"format": "pt"})


@contextmanager
def _new_tensor_file(path: Path, tensors: dict):
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with writing(path, size):
        require_space(path, size)
    with atomic_path(path, size) as temporary, open(temporary, "wb") as file:
        yield file


def tensors_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors. Raises ModelError when it cannot be read."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.metadata() or {}
    except Exception as error:
        raise ModelError(f"{path}: damaged, not a readable safetensors file ({error})") from error


def load_tensors(
    path: Path, *, verify: bool = True, finite: bool = True, sha256: str = ""
) -> tuple[dict, dict[str, str]]:
    """(tensors on the CPU, metadata) of a file written by `save_tensors`, or by `save_listed_tensors`.

    sha256: of the file, as a list of files has it; without one the file says its content's hash itself. Raises
    ModelError when the file is missing, cut, or (verify) its content is not what was written, or (verify and finite)
    holds NaN or Inf.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError as error:
        raise ModelError(f"{path}: missing") from error
    except Exception as error:
        raise ModelError(f"{path}: damaged, not a readable safetensors file ({error})") from error
    if verify and not (sha256_file(path) == sha256 if sha256 else _is_named(tensors, metadata)):
        raise ModelError(f"{path}: damaged, its content does not match its hash; restore it from a copy")
    if verify and finite:
        require_finite(tensors, path)
    return tensors, metadata


def _is_named(tensors: dict, metadata: dict[str, str]) -> bool:
    return metadata.get("content_sha256", "") == tensors_hash(tensors)
