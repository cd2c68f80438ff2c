"""Where checkpoints come from: a local folder, the hub's cache, or the hub itself, through huggingface_hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CONFIG_FILES = ("*.json", "*.txt", "*.model", "*/config.json")
WEIGHTS = (("model.safetensors", "model-*.safetensors"), ("pytorch_model.bin", "pytorch_model-*.bin"))


class HubError(OSError):
    """A repository or folder that cannot be had; the message says what was tried."""


def snapshot(
    path_or_repo: str | Path,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """The local folder that holds the files of a repository which match `patterns`.

    Args:
        path_or_repo: an existing folder, returned as it is, or a hub id such as "google-bert/bert-base-uncased".
        patterns: glob patterns of the files wanted.
        revision: branch, tag or commit.
        cache_dir: the hub's cache; huggingface_hub's own by default (HF_HOME).
        local_files_only: use the cache alone (as HF_HUB_OFFLINE=1 does for everything).
        token: access token for private repositories.

    Raises:
        HubError: no such folder, or the repository cannot be reached and is not in the cache.
    """
    folder = Path(path_or_repo).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_repo)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or folder.exists():
        what = "is a file, a checkpoint is a folder" if folder.exists() else "does not exist"
        raise HubError(f"{name} {what}")

    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = huggingface_hub.snapshot_download(
            name,
            allow_patterns=list(patterns),
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
    except HFValidationError as error:
        raise HubError(f"{name!r} is neither a folder here nor a valid repository name: {error}") from None
    except LocalEntryNotFoundError:
        raise HubError(
            f"{name} is no folder here, is not in the hub cache, and the hub was not asked or not reached (offline)"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise HubError(f"{name} is no folder here and could not be had from the hub: {error}") from None
    return Path(found)


def checkpoint(path_or_repo: str | Path, **where: object) -> Path:
    """The local folder of a whole checkpoint: configuration, tokenizer and weights, safetensors before pickles."""
    folder = snapshot(path_or_repo, CONFIG_FILES, **where)  # type: ignore[arg-type]
    for patterns in WEIGHTS:
        if Path(path_or_repo).expanduser().is_dir() or any(next(folder.glob(pattern), None) for pattern in patterns):
            break
        folder = snapshot(path_or_repo, (*CONFIG_FILES, *patterns), **where)  # type: ignore[arg-type]
    return folder
