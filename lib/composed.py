"""Models made of two that are trained already: `encoder_decoder` and `dual_encoder`.

Which composite family it is follows from what the encoder reads. What neither part has (cross-attention, the map
between two sizes, projections into a common space) is initialised.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from formax.core import registry
from formax.core import spec as specs
from formax.core.config import Config
from formax.loading import generation_config, load
from formax.model import Model

log = logging.getLogger("formax")

# What an encoder reads -> the family of models that write about it.
READING = {
    "input_ids": "encoder-decoder",
    "pixel_values": "vision-encoder-decoder",
    "input_values": "speech-encoder-decoder",
}


def encoder_decoder(
    encoder: Model | str | Path, decoder: Model | str | Path, *, key: jax.Array | None = None, **changes: Any
) -> Model:
    """A model whose decoder writes about what its encoder reads.

    Args:
        encoder: a bare model of texts, images or speech, or a checkpoint of one.
        decoder: a model with a head for the next word, or a checkpoint that has or gets one.
        key: random key for cross-attention, which most decoders lack, and for the map between two sizes.
        **changes: fields of the configuration (`decoder_start_token_id`, `pad_token_id`, `eos_token_id`, ...).

    Returns:
        An EncoderDecoderModel, VisionEncoderDecoderModel or SpeechEncoderDecoderModel. Its parts share their arrays
        with the models that were given.

    Raises:
        ValueError: an encoder that reads something else.
        ConfigError: parts that do not fit together.
    """
    reads, writes = _opened(encoder, "", key), _opened(decoder, "ForCausalLM", key)
    first = reads.input_names[0]
    if first not in READING:
        raise ValueError(f"{reads.architecture.name} reads {first}; an encoder reads one of {', '.join(READING)}")
    written = writes.config.replace(is_decoder=True, add_cross_attention=True)
    parts: Any = {"encoder": reads.config, "decoder": written}
    config = registry.family(READING[first]).config(**parts, **changes)
    return _joined(config, {"encoder": reads.params, "decoder": writes.params}, key)


def dual_encoder(
    vision: Model | str | Path, text: Model | str | Path, *, key: jax.Array | None = None, **changes: Any
) -> Model:
    """Two towers whose vectors are to meet in a common space: a VisionTextDualEncoderModel.

    Args:
        vision: a bare model of images, or a checkpoint of one.
        text: a bare model of texts, or a checkpoint of one.
        key: random key for the two projections.
        **changes: fields of the configuration (`projection_dim`, ...).

    Raises:
        ValueError: a tower that reads something else.
    """
    towers = {"vision": _opened(vision, "", key), "text": _opened(text, "", key)}
    for name, first in (("vision", "pixel_values"), ("text", "input_ids")):
        if towers[name].input_names[0] != first:
            raise ValueError(f"the {name} tower reads {first}; {towers[name].architecture.name} does not")
    own: Any = {f"{name}_config": tower.config for name, tower in towers.items()}
    config = registry.family("vision-text-dual-encoder").config(**own, **changes)
    return _joined(config, {name: tower.params for name, tower in towers.items()}, key)


def _opened(model: Model | str | Path, task: str, key: jax.Array | None) -> Model:
    return model if isinstance(model, Model) else load(model, task, key=key)


def _joined(config: Config, parts: Mapping[str, Any], key: jax.Array | None) -> Model:
    """The composite model of these parts, and of new parameters where they have none."""
    family = registry.family(config.model_type)
    architecture = family.architectures[0]
    held = {(name, *path): leaf for name, part in parts.items() for path, leaf in specs.flatten(part).items()}
    entries = specs.table(architecture.spec(config)).entries
    new = [entry for entry in entries if entry.path not in held]
    if new:
        log.warning("%s: %s are new, and initialised", architecture.name, ", ".join(entry.key for entry in new))
    dtype = next(iter(held.values())).dtype
    made = specs.init_entries(new, jax.random.key(0) if key is None else key, dtype)
    found = {entry.path: held[entry.path] if entry.path in held else made[entry.path] for entry in entries}
    own = generation_config(architecture, config)
    return Model(specs.unflatten(found), config, architecture, family, generation_config=own)
