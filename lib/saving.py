"""Writing a model as a Hugging Face checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

import jax

from formax.conversion.checkpoint import CANDIDATES, FILES, FORMATS, write_checkpoint
from formax.conversion.load import stored_tensors
from formax.conversion.tf_h5 import Keras, model_name
from formax.core import frameworks
from formax.model import Model

log = logging.getLogger("formax")


def save(model: Model, directory: Path, max_shard_size: int | str, format: str = "pytorch") -> list[Path]:
    """See `Model.save_pretrained`."""
    if model.interventions:
        raise ValueError(
            "this model carries interventions, which no checkpoint can hold; save the one it was made from"
        )
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is none of {', '.join(map(repr, FORMATS))}")
    model = model.unstack_layers()
    spec = model.spec
    left_out: frozenset[str] = frozenset()
    copies: Mapping[str, str] = {}
    keras = None
    if format != "pytorch":
        there = frameworks.port(model.family, format)
        keras = Keras(model_name(model.architecture.name), there.repeats, there.own) if format == "tf" else None
        copies = there.copies
        spec, left_out = frameworks.to_write(spec, model.family, model.architecture, model.config, format)
    tensors, fetch = stored_tensors(spec, model.params)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    tensors |= {copy: tensors[name] for copy, name in copies.items() if name in tensors}
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(model.params)}
    config = model.config.replace(
        architectures=(model.architecture.name,), dtype=dtypes.pop() if len(dtypes) == 1 else model.config.dtype
    )
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
    files = {"config.json": text.encode()}
    if model.generation_config is not None and not model.generation_config._from_model_config:
        files["generation_config.json"] = model.generation_config.to_json_string().encode()
    directory = directory.expanduser()
    written = write_checkpoint(
        directory,
        tensors,
        lambda name: fetch(copies.get(name, name)),
        max_shard_size=max_shard_size,
        files=files,
        framework=format,
        keras=keras,
    )
    for name in takewhile(lambda name: name not in FILES[format], CANDIDATES):
        if (directory / name).exists():
            log.warning("%s still holds %s, which is opened in the place of what was saved just now", directory, name)
    return written
