"""What encoder-decoders have in common."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


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


def eos_states(x: jax.Array, input_ids: jax.Array | None, eos: Any) -> jax.Array:
    """The states at each row's last end-of-text token, [B, T, E] and ids [B, T] -> [B, E].

    Raises:
        ValueError: no ids, in which the token could be looked for.
    """
    if input_ids is None:
        raise ValueError("a text is classified by its end-of-text token: give input_ids, not inputs_embeds")
    last = x.shape[1] - 1 - jnp.argmax((input_ids == eos)[:, ::-1], axis=-1)
    return x[jnp.arange(len(x)), last]
