"""How the classes of composite families are made of two checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax

from formax import composed
from formax.loading import load
from formax.model import Model


def _part(name: str, path: str | Path, task: str, options: dict[str, Any]) -> Model:
    """The model of a part, opened with the options whose names begin with that of the part, which are taken out."""
    own = {key: options.pop(key) for key in list(options) if key.startswith(f"{name}_")}
    return load(path, task, **{key.removeprefix(f"{name}_"): value for key, value in own.items()})


class Composed:
    """What classes have whose models are made of two. `_of` gives the class with a model inside."""

    _of: ClassVar[Callable[[Model], Any]]


class FromEncoderDecoder(Composed):
    """Encoder-decoders of any families."""

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder_pretrained_model_name_or_path: str | Path,
        decoder_pretrained_model_name_or_path: str | Path,
        *,
        seed: int = 0,
        **options: Any,
    ) -> Any:
        """A model of two checkpoints; see `formax.encoder_decoder`.

        Args:
            encoder_pretrained_model_name_or_path: a folder, or a repository of the hub.
            decoder_pretrained_model_name_or_path: likewise.
            seed: of parameters that neither has.
            **options: with "encoder_" or "decoder_" before them those of `formax.loading.load`
                (`encoder_from_pt=True`); else fields of the configuration.
        """
        encoder = _part("encoder", encoder_pretrained_model_name_or_path, "", options)
        named = {name: options.pop(name) for name in ("decoder_start_token_id",) if name in options}
        decoder = _part("decoder", decoder_pretrained_model_name_or_path, "ForCausalLM", options)
        return cls._of(composed.encoder_decoder(encoder, decoder, key=jax.random.key(seed), **named, **options))


class FromVisionText(Composed):
    """Two towers of any families."""

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str | Path,
        text_model_name_or_path: str | Path,
        *,
        seed: int = 0,
        **options: Any,
    ) -> Any:
        """A model of two checkpoints; see `formax.dual_encoder`.

        Args:
            vision_model_name_or_path: a folder, or a repository of the hub.
            text_model_name_or_path: likewise.
            seed: of the projections.
            **options: with "vision_" or "text_" before them those of `formax.loading.load`; else fields of the
                configuration (`projection_dim`).
        """
        towers = (
            _part("vision", vision_model_name_or_path, "", options),
            _part("text", text_model_name_or_path, "", options),
        )
        return cls._of(composed.dual_encoder(*towers, key=jax.random.key(seed), **options))


# Model types whose classes have more than the others.
OF_TWO: Mapping[str, type] = {
    "encoder-decoder": FromEncoderDecoder,
    "speech-encoder-decoder": FromEncoderDecoder,
    "vision-encoder-decoder": FromEncoderDecoder,
    "vision-text-dual-encoder": FromVisionText,
}
