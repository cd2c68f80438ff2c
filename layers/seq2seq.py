"""What encoder-decoders have in common."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from formax.layers.attention import Mask, from_attention_mask


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
    """The encoder's states [B, S, E], given as such, as an output, or as a tuple (an array [1, ...]) that begins so."""
    if hasattr(encoder_outputs, "last_hidden_state"):
        return encoder_outputs.last_hidden_state
    in_tuple = isinstance(encoder_outputs, tuple | list) or encoder_outputs.ndim == 4
    return encoder_outputs[0] if in_tuple else encoder_outputs


def decoder_mask(attention_mask: Any, cache: Any) -> Mask:
    """What a decoder's positions see of each other: those of its padding mask [B, S], up to themselves.

    With a cache of layers ({"attn": KVCache, ...} each) the first position comes after those it holds: `q_offset`.
    """
    offset, room = (0, None) if cache is None else (cache[0]["attn"].length, cache[0]["attn"].k.shape[1])
    return from_attention_mask(attention_mask, causal=True, q_offset=offset, keys=room)


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
