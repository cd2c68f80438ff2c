"""Models made of models: one of any family that reads, and one of any family that writes about it; or two towers.

Rothe et al. 2020, arXiv:1907.12461, began text encoder-decoders from BERT and GPT-2 checkpoints in this way. Which
families are inside is said by `model_type` of the configurations inside. In the tree the parts are `params["encoder"]`
and `params["decoder"]`, each as its family has it; `params["bridge"]` maps states of the one to the size of the other.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import field, replace
from typing import Any, ClassVar

import jax

from formax.core import registry, tap
from formax.core.config import Config, ConfigError, config
from formax.core.family import Architecture, Family
from formax.core.outputs import BaseModelOutput, Seq2SeqLogitsOutput
from formax.core.spec import At, Param, Path, Spec, Tied, dotted, inside, normal, table
from formax.layers.linear import linear, linear_spec


@config
class AnyConfig(Config):
    """A configuration of whichever family its `model_type` names."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config", **overrides: Any) -> Any:
        """Reads a configuration of that family; see `Config.from_dict`.

        Raises:
            ConfigError: no `model_type`, or one that is not known.
        """
        name = values.get("model_type")
        if not isinstance(name, str):
            raise ConfigError(f"{source} says by its model_type which family it is of; it has {name!r}")
        try:
            family = registry.family(name)
        except registry.UnknownModelTypeError as error:
            raise ConfigError(f"{source}: {error}") from None
        return family.config.from_dict(values, source=source, **overrides)


def bert(**changes: Any) -> Config:
    """A part that nobody has named, in a configuration without arguments."""
    return registry.family("bert").config(**changes)


@config
class CompositeConfig(Config):
    """A configuration made of others, all of which a file must have."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config", **overrides: Any) -> Any:
        missing = [name for name in cls.sub_configs if name not in {**values, **overrides}]
        if missing:
            raise ConfigError(f"{source}: {cls.model_type} is made of {' and '.join(cls.sub_configs)}; no {missing[0]}")
        return super().from_dict(values, source=source, **overrides)


@config
class EncoderDecoderConfig(CompositeConfig):
    """An `encoder` and a `decoder`."""

    sub_configs: ClassVar = {"encoder": AnyConfig, "decoder": AnyConfig}

    encoder: Config = field(default_factory=bert)
    decoder: Config = field(default_factory=lambda: bert(is_decoder=True, add_cross_attention=True))
    is_encoder_decoder: bool = True
    tie_encoder_decoder: bool = False

    def check(self) -> None:
        if self.encoder.is_encoder_decoder:
            raise ConfigError(f"encoder: {self.encoder.model_type} is an encoder-decoder itself")
        if not self.decoder.add_cross_attention:
            raise ConfigError("decoder: it looks at the encoder's states, so add_cross_attention must be true")
        told = self.decoder.extra.get("cross_attention_hidden_size")
        if told not in (None, self.encoder_size):
            raise ConfigError(f"decoder: cross_attention_hidden_size={told} is not the encoder's {self.encoder_size}")
        writer(self.decoder)

    @property
    def encoder_size(self) -> int:
        """Size of the encoder's states."""
        return getattr(self.encoder, "output_hidden_size", None) or size_of(self.encoder)

    @property
    def vocab_size(self) -> int | None:
        return getattr(self.encoder, "vocab_size", None)

    @property
    def written_vocab_size(self) -> int:
        """Words of the decoder."""
        return self.decoder.vocab_size

    @property
    def has_bridge(self) -> bool:
        """Whether the encoder's states are mapped to the decoder's size."""
        told = self.decoder.extra.get("cross_attention_hidden_size")
        return told is None and self.encoder_size != size_of(self.decoder)


def size_of(c: Config) -> int:
    """Size of a model's states, by whichever name its family has for it."""
    return getattr(c, c.attribute_map.get("hidden_size", "hidden_size"))


def reader(c: Config) -> Architecture:
    """The bare model of a configuration's family."""
    return _family(c).architectures[0]


def writer(c: Config) -> Architecture:
    """The decoder with a head for the next word of a configuration's family.

    Raises:
        ConfigError: there is none.
    """
    found = _family(c).for_task("ForCausalLM")
    if found is None:
        raise ConfigError(f"{c.model_type} has no ForCausalLM: it cannot be a decoder")
    return found


def parts(c: EncoderDecoderConfig) -> tuple[tuple[Architecture, Config], ...]:
    """The architectures inside, each with its configuration."""
    return (reader(c.encoder), c.encoder), (writer(c.decoder), c.decoder)


def lacks(c: EncoderDecoderConfig) -> dict[str, bool]:
    """What composites of other frameworks do not implement."""
    return {"tie_encoder_decoder": c.tie_encoder_decoder}


def _family(c: Config) -> Family:
    return registry.family(c.model_type)


def model_spec(c: EncoderDecoderConfig) -> dict[str, Spec]:
    """Both, and the map between them if their sizes differ."""
    own = writer(c.decoder).spec(c.decoder)
    reads, writes = inside("encoder", reader(c.encoder).spec(c.encoder)), inside("decoder", own)
    if c.tie_encoder_decoder:
        reads = shared(reads, {entry.path for entry in table(own).entries})
    spec: dict[str, Spec] = {
        "encoder": At("encoder", reads, family=c.encoder.model_type),
        "decoder": At("decoder", writes, family=c.decoder.model_type),
    }
    if c.has_bridge:
        init = normal(getattr(c.encoder, "initializer_range", 0.02))
        sizes = size_of(c.encoder), size_of(c.decoder)
        spec["bridge"] = linear_spec("enc_to_dec_proj", *sizes, ("embed", None), init=init)
    return spec


def shared(spec: Spec, held: Container[Path], path: Path = ()) -> Spec:
    """An encoder's spec without what the decoder has at the same paths: its names stand for the decoder's leaves."""
    if isinstance(spec, Param):
        return Tied(spec.name, f"decoder.{dotted(path)}") if path in held else spec
    if isinstance(spec, At):
        return replace(spec, spec=shared(spec.spec, held, path))
    if isinstance(spec, Mapping):
        return {key: shared(part, held, (*path, key)) for key, part in spec.items()}
    return tuple(shared(part, held, (*path, i)) for i, part in enumerate(spec)) if isinstance(spec, tuple) else spec


def over(own: Any, other: Any) -> Any:
    """A tree of parameters, and what it lacks from another."""
    if isinstance(own, Mapping) and isinstance(other, Mapping):
        return {key: over(own.get(key), other.get(key)) for key in {**other, **own}}
    if isinstance(own, tuple) and isinstance(other, tuple):
        return tuple(map(over, own, other))
    return other if own is None else own


def read(p: Any, c: EncoderDecoderConfig, key: Any, **inputs: Any) -> BaseModelOutput:
    """What the encoder makes of its inputs: states [B, S, E]."""
    given = {name: x for name, x in inputs.items() if x is not None}
    own = over(p.get("encoder"), p["decoder"]) if c.tie_encoder_decoder else p["encoder"]
    with tap.scope("encoder"):
        return reader(c.encoder).apply(own, c.encoder, **given, key=key)


def write(p: Any, c: EncoderDecoderConfig, memory: jax.Array | None, key: Any, **inputs: Any) -> Seq2SeqLogitsOutput:
    """What the decoder says next about the encoder's states [B, S, E]: logits [B, T, V].

    Without states its cache has what it made of them.
    """
    states = linear(p["bridge"], memory) if memory is not None and "bridge" in p else memory
    given = {name: x for name, x in inputs.items() if x is not None}
    with tap.scope("decoder"):
        out = writer(c.decoder).apply(p["decoder"], c.decoder, encoder_hidden_states=states, **given, key=key)
    return Seq2SeqLogitsOutput(logits=out.logits, encoder_last_hidden_state=memory, cache=out.cache)


def init_cache(c: EncoderDecoderConfig, batch: int, length: int, encoder_length: int, dtype: Any) -> Any:
    """The decoder's empty caches."""
    make = _family(c.decoder).init_cache
    return None if make is None else make(c.decoder, batch, length, encoder_length, dtype)
