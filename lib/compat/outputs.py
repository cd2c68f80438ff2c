"""Outputs under the names of transformers' Flax and TensorFlow: what decoding goes on from is `past_key_values`.

So are what `generate` gives back, from `FlaxGreedySearchOutput` to `TFContrastiveSearchEncoderDecoderOutput`.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax

from formax.core.outputs import Output
from formax.generation import outputs as generated

# Fields of a decoder in an encoder-decoder's output -> as an output of the decoder alone has them.
DECODER = {
    "logits": "logits",
    "last_hidden_state": "last_hidden_state",
    "past_key_values": "past_key_values",
    "decoder_hidden_states": "hidden_states",
    "decoder_attentions": "attentions",
    "cross_attentions": "cross_attentions",
}
# What `generate` of TensorFlow gives back, by the way of generating; of decoders and of encoder-decoders.
TF_KINDS = ("GreedySearch", "Sample", "ContrastiveSearch", "BeamSearch", "BeamSample")
TF_PARTS = ("DecoderOnly", "EncoderDecoder")
# What `generate` of formax has besides.
NOT_IN_TF = {"logits", "cache"}
# Output of `generate` -> its fields.
WRITTEN: dict[str, tuple[str, ...]] = {
    "FlaxGreedySearchOutput": ("sequences",),
    "FlaxSampleOutput": ("sequences",),
    "FlaxBeamSearchOutput": ("sequences", "scores"),
    **{
        f"TF{kind}{part}Output": tuple(
            field.name
            for field in dataclasses.fields(getattr(generated, f"{kind}{part}Output"))
            if field.name not in NOT_IN_TF
        )
        for kind in TF_KINDS
        for part in TF_PARTS
    },
}


@cache
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


def written(name: str) -> Any:
    """The class of an output of `generate`; None if there is none of that name."""
    return _made(name, WRITTEN[name]) if name in WRITTEN else None


def of_decoder(out: Any, prefix: str) -> Any:
    """A renamed output of an encoder-decoder as one of its decoder."""
    fields = {name: getattr(out, field) for field, name in DECODER.items() if hasattr(out, field)}
    return _made(f"{prefix}DecoderOutput", tuple(fields))(**fields)


def as_tuple(out: Any) -> tuple[Any, ...]:
    """The fields that are set, those of outputs within likewise."""
    return tuple(as_tuple(value) if isinstance(value, Output) else value for value in out.to_tuple())
