"""Model folders to the hub."""

import re
from pathlib import Path

from ldmcli.core.errors import InputError, LdmError, UsageError

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_NEVER = (".git", ".lock", "__pycache__")


def uploads(folder: Path) -> list[Path]:
    """What `push` would send, relative to the folder: all but hidden files, and no links that lead out of it.

    Raises UsageError for a folder that is none, or empty.
    """
    root = folder.resolve()
    found = [
        path.relative_to(folder)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.resolve().is_relative_to(root)
    ]
    found = [path for path in found if not any(part in _NEVER or part.startswith(".") for part in path.parts)]
    if not found:
        raise UsageError(f"{folder}: nothing in it that could be pushed")
    return found


def push(folder: str | Path, hub_id: str, endpoint: str | None = None) -> str:
    """Creates the model `hub_id` where it does not exist, uploads the folder in one commit, and returns its address.

    endpoint: another server than the hub. The token is that of `hf auth login` or HF_TOKEN. Raises UsageError for a
    name that is none or a missing login, InputError where the server refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    folder = Path(folder)
    if not _ID.fullmatch(hub_id) or ".." in hub_id:
        raise UsageError(f"--push-to {hub_id}: a name on the hub is NAME or OWNER/NAME")
    chosen = [path.as_posix() for path in uploads(folder)]
    api = HfApi(endpoint=endpoint, library_name="ldm")
    try:
        found = api.create_repo(hub_id, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=found.repo_id,
            folder_path=folder,
            repo_type="model",
            allow_patterns=chosen,
            commit_message="Model exported by ldm",
        )
    except (LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise UsageError(f"--push-to {hub_id}: {_line(error)}; log in with `hf auth login`") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = "; log in with `hf auth login`" if status in (401, 403) else ""
        raise InputError(f"--push-to {hub_id}: refused ({_line(error)}){hint}") from error
    except LdmError:
        raise
    except Exception as error:  # no connection: the class depends on the transport below
        raise InputError(f"--push-to {hub_id}: could not be uploaded ({_line(error)})") from error
    return str(found)


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
