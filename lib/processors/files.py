"""What image processors and feature extractors share: their batches, their file, and whose it is.

`preprocessor_config.json` says how a checkpoint's inputs are made. Newer checkpoints keep the same inside
`processor_config.json`, under "image_processor" or "feature_extractor"; the oldest do not name their type, which then
follows from the model type in config.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from formax import hub
from formax.text.files import parse_json

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
# What a download fetches to open an image processor or a feature extractor.
HUB_PATTERNS = (PREPROCESSOR, PROCESSOR, "config.json", "tokenizer_config.json")
_WHERE = ("revision", "cache_dir", "local_files_only", "token")
TENSOR_TYPES = ("np", "jax")


class UnknownProcessorError(ValueError):
    """A type of processor that formax does not have; the message names those there are."""


class BatchFeature(dict[str, Any]):
    """A dictionary of model inputs whose entries are attributes too: `model(**batch)`, `batch.pixel_values`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this batch has no {name!r}; it has {', '.join(self)}") from None


def as_batch(data: Mapping[str, list[np.ndarray]], return_tensors: str | None, hint: str) -> BatchFeature:
    """Makes one array of the rows of each entry.

    Args:
        data: name -> one array a row.
        return_tensors: "np" or "jax"; None for NumPy arrays, where rows that differ in shape stay a list.
        hint: what makes the rows equal, for the message when they are not.

    Raises:
        ValueError: an unknown kind, or rows that make no array.
    """
    if return_tensors not in (None, *TENSOR_TYPES):
        raise ValueError(f"return_tensors={return_tensors!r}: use 'np', 'jax' or None")
    batch = BatchFeature()
    for name, rows in data.items():
        shapes = sorted({row.shape for row in rows})
        if len(shapes) > 1 and return_tensors is not None:
            raise ValueError(f"{name!r} has rows of shapes {_some(shapes)}, which make no array: {hint}")
        batch[name] = np.stack(rows) if len(shapes) == 1 else rows
    if return_tensors == "jax":
        import jax.numpy as jnp

        # Masks are int32, as jax counts.
        return BatchFeature(
            {
                name: jnp.asarray(value, jnp.int32) if value.dtype == np.int64 else jnp.asarray(value)
                for name, value in batch.items()
            }
        )
    return batch


def _some(values: Iterable[Any]) -> str:
    texts = [str(value) for value in values]
    return ", ".join(texts[:3]) + (", ..." if len(texts) > 3 else "")


def folder_of(path_or_repo: str | Path, patterns: Iterable[str] = HUB_PATTERNS, **where: Any) -> Path:
    """The local folder with the files of processors; `where` is as in `formax.hub.snapshot`."""
    return hub.snapshot(path_or_repo, tuple(patterns), **where)


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a `from_pretrained` as (where to look, settings to replace).

    Raises:
        RemoteCodeError: `trust_remote_code=True`.
    """
    hub.refuse_code(options.get("trust_remote_code"))
    where = {key: value for key, value in options.items() if key in _WHERE}
    silent = (*_WHERE, "trust_remote_code")
    return where, {key: value for key, value in options.items() if key not in silent}


def read(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a folder; {} where there is no such file."""
    path = folder / name
    return parse_json(path.read_bytes(), path) if path.is_file() else {}


def settings_of(folder: Path, part: str) -> tuple[dict[str, Any], Path]:
    """The settings of the "image_processor" or "feature_extractor" of a folder, and the file they are from.

    Raises:
        FileNotFoundError: neither file is there, or says anything about that part.
    """
    if (folder / PREPROCESSOR).is_file():
        return read(folder, PREPROCESSOR), folder / PREPROCESSOR
    found = read(folder, PROCESSOR).get(part)
    if isinstance(found, dict):
        return found, folder / PROCESSOR
    raise FileNotFoundError(f"{folder} has no {PREPROCESSOR} (and no {PROCESSOR} with {part!r} in it)")


def type_of(values: Mapping[str, Any], folder: Path, by_model_type: Mapping[str, str]) -> str:
    """The name of a type as the settings, else config.json, say it; "" where nothing does."""
    named = values.get("image_processor_type") or values.get("feature_extractor_type")
    if named:
        return str(named)
    config = read(folder, "config.json")
    named = config.get("image_processor_type") or config.get("feature_extractor_type")
    return str(named or by_model_type.get(str(config.get("model_type")), ""))


def unknown(name: str, where: Path | str, there_are: Iterable[str], what: str) -> UnknownProcessorError:
    """The error for a type that is not there."""
    said = f"formax has no {what} {name!r}" if name else f"nothing says which {what} this is"
    return UnknownProcessorError(f"{where}: {said}; there are {', '.join(sorted(there_are))}")


def save(folder: str | Path, name: str, values: Mapping[str, Any]) -> str:
    """Writes one JSON file, whole or not at all, and returns its path.

    Raises:
        CheckpointError: it cannot be written; then nothing in the folder was changed.
    """
    from formax.conversion.atomic import Staging

    content = json.dumps(dict(values), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with Staging(Path(folder)) as staging:
        with staging.open(name) as write:
            write(content.encode())
        staging.commit([("place", name)])
    return str(Path(folder) / name)
