"""Which files the classes of other frameworks open and write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from formax import hub
from formax.conversion.checkpoint import FILES
from formax.core.config import Config
from formax.core.frameworks import FrameworkError, to_write
from formax.loading import log, read_config
from formax.model import Model

# Options of a `from_pretrained` that say where to look.
WHERE = ("revision", "cache_dir", "token", "local_files_only")


def config_of(path_or_repo: Any, options: Mapping[str, Any]) -> Config:
    """The configuration that an Auto class looks at: the one given, else the checkpoint's own."""
    given = options.get("config")
    if isinstance(given, Config):
        return given
    where = {name: options[name] for name in WHERE if name in options}
    return read_config(hub.snapshot(path_or_repo if given is None else given, ("config.json",), **where))


# What transformers' `save_pretrained` takes for `push_to_hub=True`.
OF_A_PUSH = {
    "commit_description", "commit_message", "create_pr", "organization", "private", "repo_id", "repo_name",
    "repo_path_or_name", "repo_url", "revision", "signature", "tags", "temp_dir", "token", "use_auth_token",
    "use_temp_dir", "version",
}  # fmt: skip


def check_of_a_push(given: Mapping[str, Any]) -> None:
    """Raises TypeError for a name that is no argument of pushing to a hub."""
    if unknown := given.keys() - OF_A_PUSH:
        raise TypeError(f"save_pretrained() got an unexpected keyword argument {min(unknown)!r}")


def save(model: Model, directory: str | Path, max_shard_size: int | str, format: str) -> list[Path]:
    """Saves for a framework; what its classes do not have is written as safetensors, and a warning says why."""
    if format != "pytorch":
        try:
            to_write(model.spec, model.family, model.architecture, model.config, format)
        except FrameworkError as error:
            log.warning("%s: written as safetensors under PyTorch's names, for %s", directory, error)
            format = "pytorch"
    return model.save_pretrained(directory, max_shard_size=max_shard_size, format=format)


def choice(
    framework: str,
    path_or_repo: str | Path,
    from_pt: bool,
    options: Mapping[str, Any],
    *,
    safetensors_first: bool = False,
) -> dict[str, Any]:
    """Which weights `load` is to take, as its argument: those of the framework, if there are any, else the first.

    `from_pt` asks for PyTorch's; with `safetensors_first` safetensors come before the framework's own.
    """
    if from_pt:
        return {"from_pt": True}
    where = {name: options[name] for name in WHERE if name in options}
    if safetensors_first:
        patterns = hub.WEIGHTS["pytorch"][0]
        folder = hub.snapshot(path_or_repo, (*hub.CONFIG_FILES, *patterns), **where)
        if any(any(folder.glob(pattern)) for pattern in patterns):
            return {}
    folder = hub.checkpoint(path_or_repo, framework, **where)
    return {f"from_{framework}": True} if any((folder / name).exists() for name in FILES[framework]) else {}
