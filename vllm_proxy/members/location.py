"""Where a member's files are: in a local directory, or on the hub."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from vllm_proxy.config.schema import Member

# Files that a check may download: everything except weights.
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.py", "*.tiktoken", "*.txt")


class Unreadable(Exception):
    """A member cannot be used. The message does not name the member; the caller does."""


@dataclass(frozen=True, slots=True)
class Files:
    """A member's directory: local, or a copy of its small files from the hub."""

    directory: Path
    from_hub: bool


def locate(member: Member) -> Files:
    """Find a member's directory; download it from the hub, without weights, if it is not local.

    Raises:
        Unreadable: the member does not exist, or the hub cannot be reached.
    """
    path = Path(member.model)
    if path.is_dir():
        return Files(path, from_hub=False)
    if path.exists():
        raise Unreadable("it is a file; give the directory that holds config.json and weights")
    first, *others = member.model.split("/")
    # A hub id is `name` or `owner/name`. Path("") is the working directory, so `/x` is not an id.
    if first.startswith("~") or len(others) > 1 or Path(first).is_dir():
        hint = " (`~` is not expanded)" if first.startswith("~") else ""
        raise Unreadable(f"no such directory{hint}; check the path")
    return Files(_hub_directory(member), from_hub=True)


def on_this_machine(model: str, revision: str | None) -> Path:
    """Return the directory of a model that was downloaded before, or is local.

    Raises:
        OSError, ValueError: it was not.
    """
    from huggingface_hub import snapshot_download

    if Path(model).is_dir():
        return Path(model)
    return Path(snapshot_download(model, revision=revision, local_files_only=True))


def _hub_directory(member: Member) -> Path:
    """Return a local copy of a hub model's small files; one attempt, no retries."""
    from huggingface_hub import HfApi, snapshot_download

    model, revision = member.model, member.revision
    errors: tuple[type[Exception], ...] = (OSError, ValueError, *_http_errors())
    try:
        # One request: a download would try six times, for half a minute.
        HfApi().model_info(model, revision=revision, timeout=5)
        return Path(snapshot_download(model, revision=revision, allow_patterns=[*_SMALL_FILES]))
    except errors as error:
        reason = _hub_reason(error)
    with contextlib.suppress(OSError, ValueError):
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    raise Unreadable(f"neither a local directory nor a model on the hub ({reason}); check the path")


def _http_errors() -> Iterator[type[Exception]]:
    """Yield the base errors of the HTTP clients that versions of huggingface_hub use."""
    for client in ("httpx", "httpx2"):
        with contextlib.suppress(ImportError):
            yield import_module(client).HTTPError


def _hub_reason(error: Exception) -> str:
    from huggingface_hub import errors

    known = {
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set",
        errors.HFValidationError: "this cannot be a hub id",
        errors.GatedRepoError: "access is gated: accept its terms and log in",
        errors.RepositoryNotFoundError: "no such model, or a private one",
        errors.RevisionNotFoundError: "no such revision",
    }
    for kind, reason in known.items():
        if isinstance(error, kind):
            return reason
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]
