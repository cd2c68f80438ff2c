"""Outputs under the names of transformers' Flax and TensorFlow: what decoding goes on from is `past_key_values`."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import jax

from formax.core.outputs import Output

# Fields of a decoder in an encoder-decoder's output -> as an output of the decoder alone has them.
DECODER = {
    "logits": "logits",
    "last_hidden_state": "last_hidden_state",
    "past_key_values": "past_key_values",
    "decoder_hidden_states": "hidden_states",
    "decoder_attentions": "attentions",
    "cross_attentions": "cross_attentions",
}


@lru_cache(maxsize=128)
def _made(name: str, fields: tuple[str, ...]) -> Any:
    """A class of outputs with these fields, a pytree; one for each name and fields."""
    spec = [(field, Any, dataclasses.field(default=None)) for field in fields]
    return jax.tree_util.register_dataclass(dataclasses.make_dataclass(name, spec, bases=(Output,), frozen=True))


def renamed(out: Any, prefix: str) -> Any:
    """An output of formax with `past_key_values` in the place of `cache`; anything else as it is."""
    if not isinstance(out, Output) or not hasattr(out, "cache"):
        return out
    fields = {field.name: getattr(out, field.name) for field in dataclasses.fields(out)}  # type: ignore[arg-type]
    fields = {("past_key_values" if name == "cache" else name): value for name, value in fields.items()}
    return _made(f"{prefix}{type(out).__name__}", tuple(fields))(**fields)


def of_decoder(out: Any, prefix: str) -> Any:
    """A renamed output of an encoder-decoder as one of its decoder."""
    fields = {name: getattr(out, field) for field, name in DECODER.items() if hasattr(out, field)}
    return _made(f"{prefix}DecoderOutput", tuple(fields))(**fields)


def as_tuple(out: Any) -> tuple[Any, ...]:
    """The fields that are set, those of outputs within likewise."""
    return tuple(as_tuple(value) if isinstance(value, Output) else value for value in out.to_tuple())
