"""What encoder-decoders have in common: the way from the encoder's inputs to the decoder's states, and caches.

A family has `encode(p, c, ..., key) -> BaseModelOutput` and `decode(p, c, ..., cache, key) -> (states, cache)`; `both`
runs them one after the other for texts. `layers/transformer.py` has the layers of most of these families,
`layers/seq2seq_heads.py` their heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from formax.core.outputs import BaseModelOutput, Seq2SeqOutput
from formax.core.rng import split
from formax.layers.attention import CrossCache, KVCache


def shift_right(ids: jax.Array, start: int | None, pad: int | None) -> jax.Array:
    """What a decoder reads in order to write `ids` [B, T]: a start token, then all but the last; -100 becomes `pad`.

    Raises:
        ValueError: no start token, or no token for padding.
    """
    if start is None or pad is None:
        missing = "decoder_start_token_id" if start is None else "pad_token_id"
        raise ValueError(f"the decoder's inputs are made from other ids, for which the configuration needs {missing}")
    first = jnp.full((len(ids), 1), start, ids.dtype)
    shifted = jnp.concatenate([first, ids[:, :-1]], axis=1)
    return jnp.where(shifted == -100, pad, shifted)


def states_of(encoder_outputs: Any) -> jax.Array:
    """The encoder's states [B, S, E]: given as such, as an output, its dict, or a tuple (an array [1, ...]) of them."""
    if hasattr(encoder_outputs, "last_hidden_state"):
        return encoder_outputs.last_hidden_state
    if isinstance(encoder_outputs, Mapping):
        return encoder_outputs["last_hidden_state"]
    in_tuple = isinstance(encoder_outputs, tuple | list) or encoder_outputs.ndim == 4
    return encoder_outputs[0] if in_tuple else encoder_outputs


def memory_of(
    encode: Callable[[], BaseModelOutput], inputs: Sequence[Any], encoder_outputs: Any, cache: Any
) -> jax.Array | None:
    """The encoder's states [B, S, E]: those that are given, else what it makes of its `inputs`.

    None without inputs, where the cache holds the keys and values that the decoder made of them.

    Raises:
        ValueError: neither states nor inputs, and a cache without room for them.
    """
    if encoder_outputs is not None:
        return states_of(encoder_outputs)
    if cache is None or any(given is not None for given in inputs):
        return encode().last_hidden_state
    if cache[0]["cross"] is None:
        raise ValueError("the cache has no room for the encoder's states: make it with their encoder_length")
    return None


def after_start(c: Any, input_ids: Any) -> jax.Array:
    """What a decoder reads that is to write the text again: `shift_right` by the configuration's tokens.

    Raises:
        ValueError: no text, or a token that is missing.
    """
    if input_ids is None:
        raise ValueError("without input_ids the decoder needs decoder_input_ids or decoder_inputs_embeds")
    return shift_right(input_ids, c.decoder_start_token_id, c.pad_token_id)


def wrap_right(ids: jax.Array, pad: int | None) -> jax.Array:
    """What a decoder reads in order to write `ids` [B, T] that end with their language: that token, then the others.

    The last of them is told by counting those that are no padding, which must stand at the end; -100 is padding, too.

    Raises:
        ValueError: no token for padding.
    """
    if pad is None:
        raise ValueError("the decoder's inputs are made from other ids, for which the configuration needs pad_token_id")
    ids = jnp.where(ids == -100, pad, ids)
    last = (ids != pad).sum(1, keepdims=True) - 1
    return jnp.concatenate([jnp.take_along_axis(ids, last, axis=1), ids[:, :-1]], axis=1)


def after_language(c: Any, input_ids: Any) -> jax.Array:
    """What a decoder reads that is to write the text again, whose last token is its language: `wrap_right`.

    Raises:
        ValueError: no text, or no token for padding.
    """
    if input_ids is None:
        raise ValueError("without input_ids the decoder needs decoder_input_ids or decoder_inputs_embeds")
    return wrap_right(input_ids, c.pad_token_id)


def both(
    encode: Callable[..., BaseModelOutput],
    decode: Callable[..., Any],
    *,
    shifted: Callable[[Any, Any], jax.Array] | None = None,
) -> Callable[..., Seq2SeqOutput]:
    """Encoder, then decoder, of texts.

    Args:
        encode: `encode(p, c, input_ids, attention_mask, inputs_embeds, key)`.
        decode: `decode(p, c, input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask, inputs_embeds,
            cache, key)`.
        shifted: `shifted(c, input_ids)` makes the decoder's ids where it has no inputs of its own (`after_start`,
            `after_language`);
            None where it must have some.
    """

    def run_both(
        p: Any,
        c: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        encoder_outputs: Any = None,
        inputs_embeds: Any = None,
        decoder_inputs_embeds: Any = None,
        cache: Any = None,
        key: Any = None,
    ) -> Seq2SeqOutput:
        """Encoder and decoder: ids [B, S] and [B, T] -> the decoder's states [B, T, E].

        In the place of `input_ids` the encoder's states [B, S, E] may be given, or a cache that has seen them.
        """
        k_encoder, k_decoder = split(key, 2)
        if shifted is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = shifted(c, input_ids)
        read = partial(encode, p, c, input_ids, attention_mask, inputs_embeds, k_encoder)
        memory = memory_of(read, (input_ids, inputs_embeds), encoder_outputs, cache)
        own = decoder_input_ids, decoder_attention_mask
        x, cache = decode(p, c, *own, memory, attention_mask, decoder_inputs_embeds, cache, k_decoder)
        return Seq2SeqOutput(last_hidden_state=x, encoder_last_hidden_state=memory, cache=cache)

    return run_both


def caches(
    heads: Sequence[int],
    batch: int,
    length: int,
    encoder_length: int | None,
    dtype: Any,
    *,
    head_dim: int,
    cross_heads: int,
) -> tuple[dict[str, KVCache | None], ...]:
    """Empty caches, one a layer with so many `heads`: room for `length` positions in each.

    With an `encoder_length` also for so many states of an encoder, in `cross_heads` heads.
    """

    def layer(count: int) -> dict[str, KVCache | None]:
        size: dict[str, Any] = {"head_dim": head_dim, "dtype": dtype}
        cross = None if encoder_length is None else CrossCache.empty(batch, encoder_length, cross_heads, **size)
        return {"attn": KVCache.empty(batch, length, count, **size), "cross": cross}

    return tuple(map(layer, heads))


def eos_states(x: jax.Array, input_ids: jax.Array | None, eos: int | tuple[int, ...] | None) -> jax.Array:
    """The states at each row's last end-of-text token, [B, T, E] and ids [B, T] -> [B, E].

    `eos` may be several tokens, each of which ends a text. A row without one has no such state: it gives NaN, for what
    ids hold is known only when the program runs, where nothing can be raised. (The reference raises, and also where
    rows have different numbers of these tokens, which does no harm here.)

    Raises:
        ValueError: no ids, in which the token could be looked for, or no token.
    """
    if eos is None:
        raise ValueError("a text is classified by its end-of-text token: the configuration needs eos_token_id")
    if input_ids is None:
        raise ValueError("a text is classified by its end-of-text token: give input_ids, not inputs_embeds")
    ends = jnp.isin(input_ids, jnp.asarray(eos))
    last = x.shape[1] - 1 - jnp.argmax(ends[:, ::-1], axis=-1)
    return jnp.where(ends.any(-1, keepdims=True), x[jnp.arange(len(x)), last], jnp.nan)
