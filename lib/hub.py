"""Where checkpoints come from: a local folder, the hub's cache, or the hub itself, through huggingface_hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIG_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*/config.json")
WEIGHTS = {
    "pytorch": (("model.safetensors", "model-*.safetensors"), ("pytorch_model.bin", "pytorch_model-*.bin")),
    "flax": (("flax_model.msgpack", "flax_model-*.msgpack"),),
    "tf": (("tf_model.h5", "tf_model-*.h5"),),
}


class HubError(OSError):
    """A repository or folder that cannot be had; the message says what was tried."""


class RemoteCodeError(ValueError):
    """Code of a checkpoint was to be run."""


def refuse_code(trust_remote_code: Any) -> None:
    """Raises RemoteCodeError where `trust_remote_code` is true: a checkpoint is data, and its code is never run."""
    if trust_remote_code:
        raise RemoteCodeError(
            "trust_remote_code=True: formax never runs code out of a checkpoint. Leave it out where the model is one "
            "of formax's families; a model of your own is made known by formax.register, see 'A family of your own' "
            "in the documentation"
        )


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
    name = str(path_or_repo)
    try:
        folder = Path(path_or_repo).expanduser()
    except RuntimeError as error:
        raise HubError(f"{name} does not exist: {error}") from None
    if not name:
        raise HubError("the path or repository name is empty")
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or folder.exists():
        what = "is a file, a checkpoint is a folder" if folder.exists() else "does not exist"
        raise HubError(f"{name} {what}")

    import huggingface_hub
    from huggingface_hub import errors

    wanted = name if revision is None else f"{name} (revision {revision!r})"
    try:
        found = huggingface_hub.snapshot_download(
            name,
            allow_patterns=list(patterns),
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
    except errors.HFValidationError as error:
        raise HubError(f"{name!r} is neither a folder here nor a valid repository name: {error}") from None
    except errors.LocalEntryNotFoundError as error:
        if hasattr(error, "snapshot_path"):  # IncompleteSnapshotError, which huggingface_hub 1 did not have
            raise HubError(_one_line(f"{wanted} is in the hub cache in part only: {error}")) from None
        raise HubError(
            f"{wanted} is no folder here, is not in the hub cache, and the hub was not asked or not reached (offline)"
        ) from None
    except errors.GatedRepoError:
        raise HubError(
            f"{name} is a gated repository: ask for access on its page on the hub, then give your token="
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{name} is no folder here and no repository of the hub, or a private one that needs another token="
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{name} has no revision {revision!r}; give a branch, a tag or a commit") from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise HubError(_one_line(f"{wanted} is no folder here and could not be had from the hub: {error}")) from error
    return Path(found)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def checkpoint(path_or_repo: str | Path, framework: str | None = None, **where: Any) -> Path:
    """The local folder of a whole checkpoint: configuration, tokenizer and weights, safetensors before all others.

    A repository is always asked for all weights of a kind, so that a download that broke off is completed.

    Args:
        path_or_repo: as for `snapshot`.
        framework: whose weights to take ("pytorch", "flax", "tf"); the first there are, by default.
        **where: its other arguments.
    """
    kinds = sum(WEIGHTS.values(), ()) if framework is None else WEIGHTS[framework]
    for patterns in kinds:
        folder = snapshot(path_or_repo, (*CONFIG_FILES, *patterns), **where)
        if any(any(folder.glob(pattern)) for pattern in patterns):
            break
    return folder
