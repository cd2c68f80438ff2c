"""What a search hands back: the texts, and for those who ask what was seen on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from formax.generation.legacy import to_legacy_cache
from formax.generation.outputs import (
    GenerateBeamDecoderOnlyOutput,
    GenerateBeamEncoderDecoderOutput,
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
)
from formax.generation.task import Task
from formax.layers.attention.cache import can_rewind

S = TypeVar("S")
# Tokens between two looks at the clock.
BETWEEN = 8


def to_the_end(task: Task, go: Callable[[S, jax.Array], tuple[S, jax.Array]], search: S) -> tuple[S, Any]:
    """A search that has begun, at its end or when the time is over; and whether it has ended, an array in a trace.

    Args:
        task: what is generated.
        go: goes on until a column: the search, and whether it is over.
        search: the search.
    """
    start = int(task.prompt.length)
    end = start + task.most
    if task.traced:
        return go(search, jnp.int32(end))
    columns = [end] if task.clock is None else [*range(min(start + BETWEEN, end), end, BETWEEN), end]
    for until in columns:
        search, over = go(search, jnp.int32(until))
        if over or task.late():
            break
    return search, bool(over) or until == end


def answer(task: Task, texts: Any, seen: dict[str, Any], branches: int = 1) -> Any:
    """What is returned of texts that were written token by token.

    Args:
        task: what was generated.
        texts: the texts: `tokens`, `context`, `record`.
        seen: what was seen of the prompt.
        branches: texts for each prompt.
    """
    start = int(task.prompt.length)
    length = start + task.most if task.traced else int(texts.tokens.length)
    new = texts.tokens.ids[:, start:length]
    if task.traced:  # as long as the text may be, for how long it is shows only when the program runs
        new = jnp.where(jnp.arange(start, length) < texts.tokens.length, new, task.pad)
    shown = jnp.repeat(jnp.asarray(task.shown), branches, axis=0)
    sequences = jnp.concatenate([shown, new], axis=1)
    if not task.config.return_dict_in_generate:
        return sequences
    cache = texts.context.cache
    # The last token has not been read, or not by all.
    context = texts.context.rewound(length - 1) if cache is not None and can_rewind(cache) else texts.context
    found = steps_of(task, texts.record, seen, length - start, branches)
    kind = GenerateEncoderDecoderOutput if task.is_encoder_decoder else GenerateDecoderOnlyOutput
    return kind(sequences=sequences, cache=_returned(task, context.cache), **found)


def _returned(task: Task, cache: Any) -> Any:
    """Caches in the form that is asked for."""
    return to_legacy_cache(cache) if task.config.return_legacy_cache and cache is not None else cache


def beam_answer(
    task: Task, search: Any, seen: dict[str, Any], sequences: jax.Array, scores: jax.Array, parents: jax.Array
) -> Any:
    """What is returned of beams.

    Args:
        task: what was generated.
        search: the search at its end: `tokens`, `context`, `record`.
        seen: what was seen of the prompt.
        sequences: the texts that are returned, int32 [B, T].
        scores: theirs [B].
        parents: int32 [B, N], the row that each token was chosen from, -1 after the end.
    """
    c = task.config
    if not c.return_dict_in_generate:
        return sequences
    kind = GenerateBeamEncoderDecoderOutput if task.is_encoder_decoder else GenerateBeamDecoderOnlyOutput
    return kind(
        sequences=sequences,
        sequences_scores=scores if c.output_scores else None,
        beam_indices=parents[:, : longest(task, parents)],
        cache=_returned(task, search.context.cache),
        **steps_of(task, search.record, seen, 0 if task.traced else int(search.tokens.new()), c.num_beams),
    )


def longest(task: Task, parents: jax.Array) -> int:
    """New tokens of the longest of these texts; in a trace, as many as there may be."""
    return task.most if task.traced else int((parents >= 0).sum(-1).max())


def steps_of(task: Task, record: dict[str, Any], seen: dict[str, Any], steps: int, times: int) -> dict[str, Any]:
    """What was recorded, as a tuple with an entry a token; what was seen of the prompt comes first.

    Args:
        task: what was generated.
        record: arrays [N, rows, ...], of which the first `steps` hold something.
        seen: what was seen of the prompt, of its rows.
        steps: new tokens.
        times: rows of the record for each of the prompt.
    """
    start = int(task.prompt.length)
    first = start - task.shown.shape[1] if task.shown.shape[1] else 0

    def at(name: str, x: jax.Array, step: int) -> jax.Array:
        """Entry of a step, without the columns that only fill."""
        x = x[step] if step else jnp.repeat(x, times, axis=0)
        if "attentions" in name and name != "cross_attentions":
            x = x[..., first : start + step]
        if step:
            return x
        return x[:, :, first:start] if "attentions" in name else x[:, first:start]

    out: dict[str, Any] = {}
    for name in task.keeps:
        if name in ("scores", "logits"):
            out[name] = tuple(record[name][:steps])
        elif name in record:
            following = [tuple(at(name, x, step) for x in record[name]) for step in range(1, steps)]
            out[name] = (tuple(at(name, x, 0) for x in seen[name]), *following)
    if task.is_encoder_decoder:
        for name in ("attentions", "hidden_states"):
            if f"encoder_{name}" in seen and f"decoder_{name}" in task.keeps:
                out[f"encoder_{name}"] = seen[f"encoder_{name}"]
    return out
