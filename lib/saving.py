"""Writing a model as a Hugging Face checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import jax

from formax.conversion.checkpoint import write_checkpoint
from formax.conversion.load import stored_tensors
from formax.model import Model


def save(model: Model, directory: Path, max_shard_size: int | str) -> list[Path]:
    """See `Model.save_pretrained`."""
    if model.interventions:
        raise ValueError(
            "this model carries interventions, which no checkpoint can hold; save the one it was made from"
        )
    tensors, fetch = stored_tensors(model.spec, model.params)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(model.params)}
    config = model.config.replace(
        architectures=(model.architecture.name,), dtype=dtypes.pop() if len(dtypes) == 1 else model.config.dtype
    )
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
    return write_checkpoint(
        directory.expanduser(), tensors, fetch, max_shard_size=max_shard_size, files={"config.json": text.encode()}
    )
