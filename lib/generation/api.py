"""`generate`, `stream` and `astream`: a model writes."""

from __future__ import annotations

import asyncio
import importlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial, wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from formax.generation import assisted, beams, contrastive, groups, sampling
from formax.generation.config import GenerationConfig, GenerationMode
from formax.generation.task import Task, task_of
from formax.model import Model

F = TypeVar("F", bound=Callable[..., Any])
# Families that have a `generate` of their own, which makes use of that of all models: a module with functions
# `generate` and `prompted`.
OWN = {"whisper": "formax.generation.whisper"}


def own_way(model: Model) -> Any:
    """The module in which the family of a model that writes has a `generate` of its own; None if there is none."""
    name = OWN.get(model.family.model_type)
    whole = model.architecture.writes and "decoder_input_ids" in model.input_names
    return importlib.import_module(name) if name and whole else None


def _by_family(plain: F) -> F:
    """`generate`, by way of that of the model's family where there is one."""

    @wraps(plain)
    def generate(model: Model, inputs: Any = None, generation_config: Any = None, **arguments: Any) -> Any:
        own = own_way(model)
        if own is None:
            return plain(model, inputs, generation_config, **arguments)
        return own.generate(plain, model, inputs, generation_config, **arguments)

    return generate  # type: ignore[return-value]


@_by_family
def generate(
    model: Model,
    inputs: Any = None,
    generation_config: GenerationConfig | None = None,
    *,
    logits_processor: Sequence[Any] = (),
    stopping_criteria: Sequence[Any] = (),
    prefix_allowed_tokens_fn: Callable[[int, np.ndarray], Sequence[int]] | None = None,
    assistant_model: Model | None = None,
    streamer: Any = None,
    negative_prompt_ids: Any = None,
    negative_prompt_attention_mask: Any = None,
    use_model_defaults: bool | None = None,
    tokenizer: Any = None,
    cache: Any = None,
    key: jax.Array | None = None,
    **arguments: Any,
) -> Any:
    """Writes a text for every row of the inputs.

    Whisper has more arguments, and returns transcripts alone: `formax.generation.whisper.generate`.

    In a function under `jax.jit`, `jax.pmap` and the like, greedy search, sampling and beams are part of its program.
    Texts are then as long as they may become, filled up with the padding token, and values of inputs are not checked.

    Args:
        model: a model with a head for the next token.
        inputs: its first input: `input_ids` [B, T] of a text model, `input_features` of one that hears.
        generation_config: settings; what they leave at the defaults is as the model's own `generation_config` has it.
        logits_processor: further rules for scores (`formax.generation.processors`), functions (state, scores), or
            objects whose `rule` is one (`formax.compat.generation`).
        stopping_criteria: likewise for the end (`formax.generation.stopping`), `MaxTime` among them.
        prefix_allowed_tokens_fn: a function of (row, tokens so far) that gives the tokens which may follow.
        assistant_model: a smaller model of the same vocabulary that proposes tokens.
        streamer: an object with `put(tokens)` and `end()` that is handed every token (`formax.generation.streamers`).
        negative_prompt_ids: [B, N] the prompt that `guidance_scale` leads away from; the last token by default.
        negative_prompt_attention_mask: [B, N] which of these are no padding.
        use_model_defaults: False takes nothing but the special tokens from the model's own settings.
        tokenizer: for `stop_strings`.
        cache: what was returned as `cache` by a call about the beginning of these inputs, which is not read again. One
            row serves any number of them.
        key: a `jax.random.key` for what is drawn; without one it is another every time.
        **arguments: settings by name (`max_new_tokens`, `num_beams`, ...) and further inputs of the model
            (`attention_mask`, ...).

    Returns:
        int32 [B * num_return_sequences, T + new tokens], rows that ended early filled with the padding token; with
        `return_dict_in_generate=True` one of `formax.generation.outputs`.

    Raises:
        TypeError: a model that does not write, an argument that nobody knows.
        ValueError: inputs that do not fit the model or the settings.
        ConfigError: a setting that is impossible, alone or beside the others.
        TypeError: in a trace, a way of generating that looks at its tokens on the way.
    """
    task = task_of(
        model,
        inputs,
        generation_config,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        assisted=assistant_model is not None,
        use_model_defaults=use_model_defaults,
        tokenizer=tokenizer,
        cache=cache,
        given=arguments,
    )
    negative = negative_prompt_ids, negative_prompt_attention_mask
    return run(task, key, streamer, negative, assistant_model, {"inputs": inputs, "given": arguments})


# That of all models, also where the family has its own.
plain: Callable[..., Any] = generate.__wrapped__  # type: ignore[attr-defined]


# Ways that have no place for guidance.
UNGUIDED = {
    GenerationMode.ASSISTED,
    GenerationMode.CONSTRAINED_BEAM,
    GenerationMode.CONTRASTIVE,
    GenerationMode.GROUP_BEAM,
}


def run(
    task: Task,
    key: jax.Array | None,
    streamer: Any = None,
    negative: tuple[Any, Any] = (None, None),
    assistant_model: Model | None = None,
    what: dict[str, Any] | None = None,
) -> Any:
    """Does what `generate` is asked for.

    Args:
        task: what is generated.
        key: random key.
        streamer: as in `generate`, and so on:
        negative: the prompt that guidance leads away from, and its mask.
        assistant_model: a smaller model that proposes tokens.
        what: its inputs, as they were given for the task.
    """
    key = _key(task, key)
    if task.mode in UNGUIDED and (negative[0] is not None or "unconditional" in task.process.needs):
        raise ValueError(
            "guidance_scale and negative_prompt_ids go with greedy search, sampling and beams, not with "
            f"{task.mode.value}"
        )
    match task.mode:
        case GenerationMode.BEAM | GenerationMode.BEAM_SAMPLE:
            own: Callable[[], Any] = partial(beams.write, task, key, *negative)
        case GenerationMode.GROUP_BEAM | GenerationMode.CONSTRAINED_BEAM:
            own = partial(groups.write, task)
        case GenerationMode.CONTRASTIVE:
            own = partial(contrastive.write, task)
        case GenerationMode.ASSISTED:
            return assisted.write(task, key, assistant_model, what or {}, streamer)
        case _:
            return sampling.write(task, key, streamer, *negative)
    if streamer is not None:
        raise ValueError(f"{task.mode.value} knows its text only at the end: it has nothing to stream")
    return own()


def stream(
    model: Model, inputs: Any = None, generation_config: GenerationConfig | None = None, **arguments: Any
) -> Iterator[np.ndarray]:
    """Writes a text for every row of the inputs, token by token.

    The arguments are those of `generate`. The program is that of `generate`, too; only that it comes back after every
    token.

    Yields:
        int32 [B], the next token of every row; of rows that have ended, the padding token.

    Raises:
        ValueError: as `generate`, and settings that choose between whole texts (beams).
    """
    if (way := own_way(model)) is not None:
        arguments, inputs = way.prompted(model, inputs, generation_config, arguments), None
    names = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "use_model_defaults", "tokenizer")
    own = {name: arguments.pop(name) for name in (*names, "cache") if name in arguments}
    key, negative = arguments.pop("key", None), arguments.pop("negative_prompt_ids", None)
    negative_mask = arguments.pop("negative_prompt_attention_mask", None)
    task = task_of(model, inputs, generation_config, **own, given=arguments)
    if task.traced:
        raise TypeError(
            "stream() hands out tokens, which a trace (jax.jit, jax.pmap, ...) does not have: call generate()"
        )
    if task.mode not in (GenerationMode.GREEDY, GenerationMode.SAMPLE, GenerationMode.DOLA):
        raise ValueError(
            f"{task.mode.value} knows its text only at the end: stream() is for greedy search and sampling"
        )
    return sampling.tokens_of(task, _key(task, key), negative, negative_mask)


async def astream(
    model: Model, inputs: Any = None, generation_config: GenerationConfig | None = None, **arguments: Any
) -> AsyncIterator[np.ndarray]:
    """As `stream`, for `async for`: a thread of its own computes, so that the event loop goes on meanwhile.

    Where the loop is left, or its task cancelled, the step that is being computed is the last.

    Yields:
        int32 [B], the next token of every row; of rows that have ended, the padding token.

    Raises:
        TypeError: as `generate`, with the first token.
        ValueError: as `stream`, likewise.
    """
    loop, context = asyncio.get_running_loop(), copy_context()
    # One thread: what is asked of it last, to close the stream, it does after the step that it is at.
    worker = ThreadPoolExecutor(1, "formax-stream")
    begin = partial(stream, model, inputs, generation_config, **arguments)
    tokens: Iterator[np.ndarray] | None = None
    try:
        tokens = await loop.run_in_executor(worker, context.run, begin)
        step = partial(next, tokens, None)
        while (token := await loop.run_in_executor(worker, context.run, step)) is not None:
            yield token
    finally:
        worker.submit(lambda: tokens is not None and tokens.close())  # type: ignore[attr-defined]
        worker.shutdown(wait=False)


def _key(task: Task, key: Any) -> jax.Array | None:
    """The random key, if anything is drawn."""
    if key is not None and not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        if getattr(key, "shape", None) == (2,) and key.dtype == jnp.uint32:
            key = jax.random.wrap_key_data(key)
        else:
            raise TypeError(f"key must be a jax.random.key, got {type(key).__name__}; write key=jax.random.key(0)")
    if not task.config.do_sample:
        return None
    if key is None and task.traced:
        raise TypeError(
            "in a trace (jax.jit, jax.pmap, ...) a key is needed: one drawn here would be the same at each call"
        )
    return jax.random.key(secrets.randbits(63)) if key is None else key
