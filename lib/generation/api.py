"""`generate` and `stream`: a model writes."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from formax.generation import assisted, beams, contrastive, sampling
from formax.generation.config import GenerationConfig, GenerationMode
from formax.generation.outputs import (
    GenerateBeamDecoderOnlyOutput,
    GenerateBeamEncoderDecoderOutput,
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
)
from formax.generation.task import Task, negative_of, task_of
from formax.layers.attention.cache import can_rewind
from formax.model import Model

# Tokens between two looks at the clock.
BETWEEN = 8


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

    Args:
        model: a model with a head for the next token.
        inputs: its first input: `input_ids` [B, T] of a text model, `input_features` of one that hears.
        generation_config: settings; what they leave at the defaults is as the model's own `generation_config` has it.
        logits_processor: further rules for scores (`formax.generation.processors`), or functions (state, scores).
        stopping_criteria: further rules for the end (`formax.generation.stopping`), or functions (state, scores).
        prefix_allowed_tokens_fn: a function of (row, tokens so far) that gives the tokens which may follow.
        assistant_model: a smaller model of the same vocabulary that proposes tokens.
        streamer: an object with `put(tokens)` and `end()` that is handed every token.
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
    key = _key(task, key)
    match task.mode:
        case GenerationMode.GREEDY | GenerationMode.SAMPLE | GenerationMode.DOLA:
            return _one_by_one(task, key, streamer, negative_prompt_ids, negative_prompt_attention_mask)
        case GenerationMode.BEAM | GenerationMode.BEAM_SAMPLE:
            return _beams(task, key)
        case GenerationMode.ASSISTED:
            given = {"inputs": inputs, "use_model_defaults": use_model_defaults, "given": arguments}
            return _assisted(task, key, assistant_model, given, streamer)
        case GenerationMode.CONTRASTIVE:
            return _contrastive(task)
        case _:
            raise NotImplementedError(f"{task.mode.value} is not there yet")


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
    names = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "use_model_defaults", "tokenizer")
    own = {name: arguments.pop(name) for name in (*names, "cache") if name in arguments}
    key, negative = arguments.pop("key", None), arguments.pop("negative_prompt_ids", None)
    negative_mask = arguments.pop("negative_prompt_attention_mask", None)
    task = task_of(model, inputs, generation_config, **own, given=arguments)
    if task.mode not in (GenerationMode.GREEDY, GenerationMode.SAMPLE):
        raise ValueError(f"{task.mode.value} knows its text only at the end: stream() is for greedy search and sampling")
    return _tokens(task, _key(task, key), negative, negative_mask)


def _tokens(task: Task, key: Any, negative: Any, negative_mask: Any) -> Iterator[np.ndarray]:
    how, rules = _how(task), _rules(task)
    other, how = _negative(task, how, negative, negative_mask)
    texts, _ = sampling.begin(task.model, task.prompt, rules, key, other, how=how)
    until = int(task.prompt.length) + 1
    texts, over, last = sampling.go(task.model, texts, rules, jnp.int32(until), how=how)
    while True:
        until += 1
        # The next token is on its way while this one is looked at.
        ahead = sampling.go(task.model, texts, rules, jnp.int32(until), how=how)
        yield np.asarray(last)
        if over or (task.clock is not None and task.clock()):
            return
        texts, over, last = ahead


def _one_by_one(task: Task, key: Any, streamer: Any, negative: Any, negative_mask: Any) -> Any:
    """Greedy search and sampling."""
    how, rules = _how(task), _rules(task)
    other, how = _negative(task, how, negative, negative_mask)
    if streamer is not None:
        streamer.put(task.shown)
    texts, seen = sampling.begin(task.model, task.prompt, rules, key, other, how=how)
    start = int(task.prompt.length)
    end = start + int(task.config.max_new_tokens or 0)
    stride = 1 if streamer is not None else BETWEEN if task.clock is not None else end
    until = start + 1 if streamer is not None else min(start + stride, end)
    while True:
        texts, over, last = sampling.go(task.model, texts, rules, jnp.int32(until), how=how)
        if streamer is not None:
            streamer.put(np.asarray(last))
        if until >= end or over or (task.clock is not None and task.clock()):
            break
        until = min(until + stride, end)
    if streamer is not None:
        streamer.end()
    return _answer(task, texts, seen, how.branches)


def _assisted(task: Task, key: Any, assistant: Model | None, given: dict[str, Any], streamer: Any) -> Any:
    """Assisted generation, by another model, by this one's lower layers, or by the text itself."""
    c, model = task.config, task.model
    _without_guidance(task)
    if task.layers or c.num_return_sequences > 1:
        raise ValueError("assisted generation writes one text for every input, without dola_layers")
    if not (_can_rewind(task)):
        raise ValueError(f"{model.architecture.name} cannot take back tokens that were wrong: it needs a cache that can")
    if assistant is None and c.assistant_early_exit is not None:
        assistant = lower_layers(model, c.assistant_early_exit)
    its = c
    draft, its_prompt = None, None
    if assistant is not None:
        check_assistant(model, assistant)
        own = assistant.generation_config or GenerationConfig()
        its = own if c.assistant_early_exit is None else c
        names = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")
        lengths = {name: getattr(c, name) for name in names}
        arguments = {**given["given"], "decoder_start_token_id": c.decoder_start_token_id, "bos_token_id": c.bos_token_id}
        arguments |= {"pad_token_id": c.pad_token_id, "eos_token_id": c.eos_token_id, **lengths}
        arguments = {name: x for name, x in arguments.items() if not name.startswith(("output_", "prompt_", "assist"))}
        other = task_of(assistant, given["inputs"], given=arguments | {"return_dict_in_generate": False})
        if not _can_rewind(other) or other.prompt.ids.shape != task.prompt.ids.shape:
            raise ValueError(f"{assistant.architecture.name} reads this prompt in another way, so it cannot assist")
        assistant, its_prompt, draft = other.model, other.prompt, (other.feed, other.count)
    guesses = c.prompt_lookup_num_tokens if assistant is None else its.num_assistant_tokens
    guesses = max(int(guesses or 0), 1)
    grows = assistant is not None and its.num_assistant_tokens_schedule in ("heuristic", "heuristic_transient")
    most = min(2 * guesses if grows else guesses, max(int(c.max_new_tokens or 1) - 1, 1))
    how = assisted.How(
        **vars(_how(task)) | {"room": task.room + most + 1},
        guesses=most,
        draft=draft,
        grows=grows,
        ngram=c.max_matching_ngram_size or 2,
    )
    rules = _rules(task)
    if streamer is not None:
        streamer.put(task.shown)
    number = jnp.int32(min(guesses, most))
    texts, seen = assisted.begin(model, task.prompt, rules, key, assistant, its_prompt, number, how=how)
    at = int(task.prompt.length)
    sure = jnp.float32(its.assistant_confidence_threshold or 0.0)
    end = at + int(c.max_new_tokens or 0)
    until, over = (end if streamer is None else at + 1), False
    while not over:
        if streamer is None:
            stopping_at = stops(task, at)
        else:
            stopping_at = [min(until + how.guesses, end)]
        for until in stopping_at:
            texts, done = assisted.go(model, assistant, texts, rules, sure, jnp.int32(until), how=how)
            over = bool(done) or until >= end or (task.clock is not None and task.clock())
            if over:
                break
        if streamer is not None:
            for column in range(at, int(texts.tokens.length)):
                streamer.put(np.asarray(texts.tokens.ids[:, column]))
            at = int(texts.tokens.length)
    if streamer is not None:
        streamer.end()
    return _answer(task, texts, seen, 1)


def _contrastive(task: Task) -> Any:
    """Contrastive search."""
    _without_guidance(task)
    if not task.feed.cached:
        raise ValueError("contrastive search reads every candidate after the same text: it needs use_cache=True")
    own = _how(task)
    how = contrastive.How(**vars(own) | {"candidates": int(task.config.top_k or 0), "branches": 1})
    rules = contrastive.Rules(_rules(task), jnp.float32(task.config.penalty_alpha))
    texts, seen = contrastive.begin(task.model, task.prompt, how=how)
    for until in stops(task, int(task.prompt.length)):
        texts, over, _ = contrastive.go(task.model, texts, rules, jnp.int32(until), how=how)
        if over or (task.clock is not None and task.clock()):
            break
    rows = jnp.arange(len(texts.done)) * how.candidates
    return _answer(task, replace(texts, context=texts.context.take(rows)), seen, 1)


def _without_guidance(task: Task) -> None:
    if task.process.needs:
        raise ValueError(f"guidance_scale goes with greedy search and sampling, not with {task.mode.value}")


def _beams(task: Task, key: Any) -> Any:
    """Beam search."""
    c = task.config
    _without_guidance(task)
    ends = c.eos_token_ids
    how = beams.How(
        feed=task.feed,
        room=task.room,
        steps=task.steps,
        count=task.count,
        keeps=task.keeps,
        beams=c.num_beams,
        candidates=max(2, 1 + len(ends)) * c.num_beams,
        samples=bool(c.do_sample),
        early=c.early_stopping,
    )
    # The reference's: a padding token 0 does not count as one.
    fill = (c.pad_token_id or ends[0]) if ends else -1
    most = int(c.max_new_tokens or 0)
    power = 1.0 if c.length_penalty is None else c.length_penalty
    rules = beams.Rules(task.process, task.criteria, jnp.int32(fill), jnp.float32(power), jnp.int32(most))
    found, seen = beams.begin(task.model, task.prompt, rules, key, how=how)
    start = int(task.prompt.length)
    for until in stops(task, start):
        found, over = beams.go(task.model, found, rules, jnp.int32(until), how=how)
        if over or (task.clock is not None and task.clock()):
            break
    best = jax.tree.map(lambda x: x[:, : c.num_return_sequences].reshape(-1, *x.shape[2:]), found.aside)
    steps = int((best.parents >= 0).sum(-1).max())
    shown = jnp.repeat(jnp.asarray(task.shown), c.num_return_sequences, axis=0)
    sequences = jnp.concatenate([shown, best.ids[:, start : start + steps]], axis=1)
    if not c.return_dict_in_generate:
        return sequences
    kind = GenerateBeamEncoderDecoderOutput if task.is_encoder_decoder else GenerateBeamDecoderOnlyOutput
    return kind(
        sequences=sequences,
        sequences_scores=best.scores if c.output_scores else None,
        beam_indices=best.parents[:, :steps],
        cache=found.context.cache,
        **steps_of(task, found.record, seen, int(found.tokens.new()), how.beams),
    )


def stops(task: Task, start: int) -> list[int]:
    """Columns at which one looks up from a compiled loop: the last, and some before if there is a clock to look at."""
    end = start + int(task.config.max_new_tokens or 0)
    return [end] if task.clock is None else [*range(min(start + BETWEEN, end), end, BETWEEN), end]


def _answer(task: Task, texts: Any, seen: dict[str, Any], branches: int) -> Any:
    start, length = int(task.prompt.length), int(texts.tokens.length)
    new = texts.tokens.ids[:, start:length]
    shown = jnp.repeat(jnp.asarray(task.shown), branches, axis=0)
    sequences = jnp.concatenate([shown, new], axis=1)
    if not task.config.return_dict_in_generate:
        return sequences
    context = texts.context.rewound(length - 1) if _rewinds(texts) else texts.context
    found = steps_of(task, texts.record, seen, length - start, branches)
    kind = GenerateEncoderDecoderOutput if task.is_encoder_decoder else GenerateDecoderOnlyOutput
    return kind(sequences=sequences, cache=context.cache, **found)


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
        return x if step or name.endswith("scores") else x[:, :, first:start] if "attentions" in name else x[:, first:start]

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


def _rewinds(texts: Any) -> bool:
    return texts.context.cache is not None and can_rewind(texts.context.cache)


def _can_rewind(task: Task) -> bool:
    return task.feed.cached and can_rewind(jax.eval_shape(lambda: task.model.init_cache(1, 1, 1)))


def check_assistant(model: Model, assistant: Model) -> None:
    """Raises ValueError for a model that cannot propose tokens to this one."""
    sizes = [getattr(one.config, "vocab_size", None) for one in (model, assistant)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the assistant has a vocabulary of {sizes[1]}, the model one of {sizes[0]}: they must be the same tokens"
        )
    if model.input_names[0] != assistant.input_names[0] or ("decoder_input_ids" in model.input_names) != (
        "decoder_input_ids" in assistant.input_names
    ):
        raise ValueError(f"{assistant.architecture.name} takes other inputs than {model.architecture.name}")


def lower_layers(model: Model, count: int) -> Model:
    """The model without its upper layers (Elhoushi et al. 2024, arXiv:2404.16710); it shares all arrays.

    Raises:
        ValueError: it has no stack of layers, or not so many.
    """
    layers = model.params.get("layers")
    inner = next((name for name, part in model.params.items() if isinstance(part, dict) and "layers" in part), None)
    if not isinstance(layers, tuple) or not 0 < count < len(layers):
        have = len(layers) if isinstance(layers, tuple) else f"none at the top of its tree ({inner or 'no stack'})"
        raise ValueError(f"assistant_early_exit={count} must be below the number of layers, {have}")
    config = model.config.replace(num_hidden_layers=count)
    return model.replace(params={**model.params, "layers": layers[:count]}, config=config)


def _how(task: Task) -> sampling.How:
    return sampling.How(
        feed=task.feed,
        room=task.room,
        steps=task.steps if task.keeps else 0,
        count=task.count,
        samples=bool(task.config.do_sample),
        pads=bool(task.config.eos_token_ids),
        keeps=task.keeps,
        branches=task.config.num_return_sequences,
        layers=task.layers,
    )


def _rules(task: Task) -> sampling.Rules:
    return sampling.Rules(task.process, task.criteria, jnp.int32(task.pad))


def _negative(task: Task, how: sampling.How, ids: Any, mask: Any) -> tuple[Any, sampling.How]:
    """The prompt for guidance, if there is guidance."""
    if "unconditional" not in task.process.needs:
        if ids is not None:
            raise ValueError("negative_prompt_ids has an effect only with a guidance_scale other than 1")
        return None, how
    prompt, feed = negative_of(task, ids, mask)
    return prompt, replace(how, negative=feed)


def _key(task: Task, key: jax.Array | None) -> jax.Array | None:
    """The random key, if anything is drawn."""
    if key is not None and not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        if getattr(key, "shape", None) == (2,) and key.dtype == jnp.uint32:
            key = jax.random.wrap_key_data(key)
        else:
            raise TypeError(f"key must be a jax.random.key, got {type(key).__name__}; write key=jax.random.key(0)")
    if not task.config.do_sample:
        return None
    return jax.random.key(secrets.randbits(63)) if key is None else key
