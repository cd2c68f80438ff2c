"""Mistral: Llama's decoder with grouped heads, whose attention may be to a window of positions.

Jiang et al. 2023, arXiv:2310.06825; original code mistralai/mistral-inference. Zephyr and many others are this family,
too. Through several layers a position sees further than the window of one, and a cache need not keep what lies before
it (`layers.attention.ring`); later checkpoints have no window.
"""

from dataclasses import replace
from typing import Any, ClassVar

from formax.core.config import ConfigError, config
from formax.core.family import Architecture, Family, Port
from formax.layers import decoder, heads
from formax.models.text.llama import ROPE, LlamaConfig, block, model_spec


@config
class MistralConfig(LlamaConfig):
    """`config.json` of model type "mistral"."""

    model_type: ClassVar[str] = "mistral"
    implemented: ClassVar = {"attention_bias": (False,), "mlp_bias": (False,)}  # Llama's alone

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 4096 * 32
    sliding_window: int | None = 4096

    def check(self) -> None:
        super().check()
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"sliding_window={self.sliding_window} must be null, or at least 1")


def decode(
    p: Any,
    c: MistralConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    inputs_embeds: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Any:
    """Embeddings, all layers and the last norm: ids [B, T] -> (states [B, T, E], cache)."""
    inputs = input_ids, attention_mask, position_ids, inputs_embeds
    return decoder.decode(block, p, c, *inputs, cache, key, window=c.sliding_window)


def _tf_lacks(c: MistralConfig) -> dict[str, bool]:
    """Its attention has no window."""
    return {
        "rope_parameters": c.rope_parameters["rope_type"] != "default",
        "head_dim": c.head_size * c.num_attention_heads != c.hidden_size,
        "sliding_window": c.sliding_window is not None and c.sliding_window < c.max_position_embeddings,
        "tie_word_embeddings": c.tie_word_embeddings,
    }


def _flax_lacks(c: MistralConfig) -> dict[str, bool]:
    """Its window is longer by one position, and where there should be none, it is one position long."""
    no_window = c.sliding_window is None
    return {**_tf_lacks(c), "rope_parameters": c.rope_parameters != ROPE, "sliding_window": no_window}


_words, *_labels = heads.decoder_heads("Mistral", "model", model_spec, decode)

FAMILY = Family(
    "mistral",
    MistralConfig,
    base="model",
    inputs=decode,
    relative="llama",
    init_cache=decoder.init_cache,
    architectures=(
        Architecture("MistralModel", "", model_spec, heads.bare(decode)),
        replace(_words, spec=heads.with_heads("model", model_spec, heads.lm_head(tf=None))),
        *_labels,
    ),
    flax=Port(("MistralModel", "MistralForCausalLM"), lacks=_flax_lacks),
    tf=Port(("MistralModel", "MistralForCausalLM", "MistralForSequenceClassification"), numbered=".", lacks=_tf_lacks),
)
