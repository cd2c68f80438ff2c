"""What is to be generated: from the arguments of `generate` to settings, a prompt and rules that fit each other.

Everything that can be wrong is found here, on the host, before anything is compiled. Of inputs that are traced (in a
function under `jax.jit`) the shapes are known; their values are taken as they are.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from formax.core import registry
from formax.core.config import ConfigError
from formax.core.frozen import FrozenDict
from formax.generation import processors, stopping
from formax.generation.cache_kinds import Sinks, as_kind, kind_held, kind_of
from formax.generation.config import OUTPUT_FLAGS, GenerationConfig, GenerationMode
from formax.generation.decoding import SEEN, Feed, Known, Prompt, bucket, has_cache, prefill, rewinds
from formax.generation.dola import layers_of
from formax.generation.healing import healed
from formax.generation.legacy import from_legacy_cache, is_legacy
from formax.generation.state import Rule, known
from formax.layers.attention import cache as caches
from formax.layers.seq2seq import states_of
from formax.model import HEAD_MASKS, Model, table_size

log = logging.getLogger("formax")

# Tokens that are written when nobody says how many.
DEFAULT_LENGTH = 20


@dataclass(frozen=True)
class Task:
    """What is to be generated.

    Attributes:
        model: by which model.
        config: settings, with all lengths decided.
        mode: the way of generating.
        feed: how the model is given tokens.
        prompt: what it is given.
        shown: int32 [B, T], the prompt as it is returned.
        count: columns of the prompt that are read.
        room: columns of the buffer.
        steps: size of a record.
        process: what is done to scores.
        criteria: when a text ends.
        clock: when all is over.
        pad: the token after the end.
        keeps: what is recorded.
        layers: of DoLa, the candidates that the last layer is contrasted with.
        rewinds: whether tokens that were read can be taken back.
        traced: whether it is part of another program, in which nothing can be looked at on the way.
    """

    model: Model
    config: GenerationConfig
    mode: GenerationMode
    feed: Feed
    prompt: Prompt
    shown: np.ndarray
    count: int
    room: int
    steps: int
    process: Rule
    criteria: Rule
    clock: stopping.MaxTime | None
    pad: int
    keeps: tuple[str, ...]
    layers: tuple[int, ...] = ()
    rewinds: bool = False
    traced: bool = False

    @property
    def most(self) -> int:
        """How many tokens can be new."""
        return _decided(self.config.max_new_tokens)

    def known(self, room: int | None = None) -> Known:
        """What the model makes of the prompt, with its own or another room for the text."""
        return prefill(self.model, self.feed, self.prompt, self.room if room is None else room, self.count)

    def late(self) -> bool:
        """Whether the time is over."""
        return self.clock is not None and self.clock()

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the text is a decoder's, about what an encoder read."""
        return self.feed.ids == "decoder_input_ids"


def settings_of(
    model: Model, given: GenerationConfig | None, overrides: Mapping[str, Any], use_model_defaults: bool | None
) -> tuple[GenerationConfig, set[str]]:
    """The settings of a call, and the names of those that it gave itself.

    What the call says counts most, then what `given` says beside the defaults, then the model's own settings.

    Raises:
        ConfigError: an impossible setting.
    """
    own = model.generation_config or GenerationConfig.from_model_config(model.config)
    if own.cache_implementation == "hybrid":  # was needed for windows once, and is no wish
        own = own.replace(cache_implementation=None)
    if given is None:
        base = own
    else:
        default = GenerationConfig()
        names = [
            f.name for f in dataclasses.fields(GenerationConfig) if not f.name.startswith("_") and f.name != "extra"
        ]
        if use_model_defaults is False:
            names = ["bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"]
        taken = {name: getattr(own, name) for name in names if getattr(given, name) == getattr(default, name)}
        base = dataclasses.replace(given, **taken, extra=FrozenDict({**own.extra, **given.extra}))
        if given.temperature == 0.0:
            base = base.replace(do_sample=False, temperature=1.0)
    return base.replace(**overrides), set(overrides)


def split_arguments(model: Model, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments of `generate`: (settings, the model's inputs).

    Raises:
        TypeError: a name that is neither, with the nearest ones.
    """
    settings = {f.name for f in dataclasses.fields(GenerationConfig)} - {"extra"}
    if model.generation_config is not None:
        settings |= set(model.generation_config.extra)
    names = set(model.input_names) | set(HEAD_MASKS)
    names -= {"cache", "logits_to_keep", "position_ids", "decoder_position_ids"}
    for name in given:
        if name not in settings and name not in names:
            near = difflib.get_close_matches(name, sorted(settings | names), n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise TypeError(f"generate() takes no {name!r}: it is no setting and no input of the model{hint}")
    own = {name: value for name, value in given.items() if name in settings}
    return own, {name: value for name, value in given.items() if name not in settings and value is not None}


def task_of(
    model: Model,
    inputs: Any = None,
    generation_config: GenerationConfig | None = None,
    *,
    logits_processor: Sequence[Any] = (),
    stopping_criteria: Sequence[Any] = (),
    prefix_allowed_tokens_fn: Callable[..., Any] | None = None,
    assisted: bool = False,
    use_model_defaults: bool | None = None,
    tokenizer: Any = None,
    cache: Any = None,
    given: Mapping[str, Any],
) -> Task:
    """What a call of `generate` asks for.

    Raises:
        TypeError: a model that writes no text, or an argument that nobody knows.
        ValueError: inputs that do not fit the model or the settings.
        ConfigError: an impossible setting.
    """
    if not model.architecture.writes:
        raise TypeError(
            f"{model.architecture.name} has no scores of a next token, so it cannot generate; open the checkpoint with "
            "AutoModelForCausalLM, AutoModelForSeq2SeqLM or another Auto class of a model that writes"
        )
    overrides, own = split_arguments(model, given)
    config, said = settings_of(model, generation_config, overrides, use_model_defaults)
    config.check()
    mode = config.mode(assistant=assisted)
    traced = not all(map(known, jax.tree.leaves((model.params, inputs, cache, dict(given)))))
    if traced:
        _check_traced(config, mode, cache)
    vocabulary = _vocabulary(model, config, said)
    seq2seq = "decoder_input_ids" in model.input_names
    main = model.input_names[0]
    if inputs is not None:
        if own.get(main) is not None:
            raise ValueError(f"the first argument is {main}, and {main}= is given as well; give one of them")
        own[main] = inputs
    if seq2seq:
        ids, mask, first = _decoder_prompt(model, config, own, main)
    else:
        ids, mask, first = _text_prompt(config, own)
    _check_range("the prompt", ids, vocabulary)
    vectors = not seq2seq and "inputs_embeds" in first
    wordless = vectors and own.get("input_ids") is None
    if config.token_healing:
        if seq2seq or vectors or not known(ids):
            raise ValueError("token_healing is for decoders of texts that are given as input_ids, outside of a trace")

        def scores_of(ids: Any, mask: Any) -> Any:
            one = {"attention_mask": mask, "max_new_tokens": 1, "token_healing": False}
            return task_of(model, ids, given=one).known().logits

        ids = healed(ids, mask, tokenizer, scores_of)
    shown, length = ids[:, :0] if wordless else ids, ids.shape[1]
    if mask is not None and not seq2seq and not vectors:
        ids, mask = _aligned(ids, mask)
    config = _with_lengths(model, config, said, length, wordless)

    cached = config.use_cache is not False and has_cache(model)
    if is_legacy(cache):
        cache = from_legacy_cache(model, cache)
    if cached:
        model.check_unstacked()
    if cache is not None and not cached:
        raise ValueError("a cache is given, but use_cache=False")
    if vectors and not cached:
        raise ValueError(
            "inputs_embeds are read once and kept in a cache, which use_cache=False forbids; give input_ids"
        )
    asked = {name for name in OUTPUT_FLAGS if config.return_dict_in_generate and getattr(config, name) is True}
    seen = tuple(name for name in ("output_attentions", "output_hidden_states") if name in asked)
    back = cached and rewinds(model)
    if mode in (GenerationMode.CONTRASTIVE, GenerationMode.DOLA):
        seen = tuple(dict.fromkeys((*seen, "output_hidden_states")))
    layers: tuple[int, ...] = ()
    if mode is GenerationMode.DOLA:
        if seq2seq:
            raise ValueError(
                "dola_layers is for decoders alone: the layers of an encoder-decoder are not like its last"
            )
        depth, tied = model.config.num_hidden_layers, model.config.tie_word_embeddings
        layers = layers_of(config.dola_layers or (), depth, tied)
    mask = None if mask is None or (known(mask) and mask.all()) else mask
    if cached and not back and cache is None and mask is None and "attention_mask" in model.input_names:
        mask = np.ones(ids.shape, bool)  # hides what fills the prompt up
    if mask is None and model.family.counts_tokens:
        mask = np.ones(ids.shape, bool)  # so that positions are given
    feed = Feed.of(model, padded=mask is not None, cached=cached, seen=seen)
    feed = dataclasses.replace(feed, kind=kind_of(config, model.config, mode, cache))
    if isinstance(feed.kind, Sinks) and feed.mask is not None:
        raise ValueError(
            "cache_implementation='sink' keeps the first tokens of a text: give rows of one length, without padding"
        )
    if seq2seq:
        first = _to_encode(model, config, first, main, fill=not seen and _fills(model))
    encoder_length = _encoder_length(model, first, seq2seq)
    prompt, feed, count = _prompt(model, feed, ids, mask, first, cache, encoder_length, wordless, back)
    keeps = tuple(name for name in ("scores", "logits") if f"output_{name}" in asked and not traced)
    keeps += tuple(name for name, switch in SEEN.items() if switch in asked)
    encoder_ids = own.get("input_ids") if seq2seq else ids
    if encoder_ids is None:
        config = _without_words(config)
    rules = processors.processors_of(
        config,
        encoder_ids=encoder_ids,
        prefix_allowed=prefix_allowed_tokens_fn,
        also=[_as_rule(_ruled(one), "logits_processor", processors.custom) for one in logits_processor],
    )
    ends, clock = stopping.criteria_of(config, tokenizer=tokenizer)
    own_ends = [_ruled(one) for one in stopping_criteria]
    clocks = [one for one in (clock, *own_ends) if isinstance(one, stopping.MaxTime)]
    clock = min(clocks, key=lambda one: one.start + one.seconds, default=None)
    ends += tuple(
        _as_rule(one, "stopping_criteria", stopping.custom) for one in own_ends if not isinstance(one, stopping.MaxTime)
    )
    pad = config.pad_token_id if config.pad_token_id is not None else (config.eos_token_ids or (0,))[0]
    return Task(
        model=dataclasses.replace(model, generation_config=None),
        config=config,
        mode=mode,
        feed=feed,
        prompt=prompt,
        shown=shown,
        count=count,
        room=_room(model, feed, int(prompt.start) + count + bucket(_decided(config.max_length) - length)),
        steps=bucket(_decided(config.max_length) - length),
        process=processors.then(*rules),
        criteria=stopping.any_of(*ends),
        clock=clock,
        pad=pad,
        keeps=keeps,
        layers=layers,
        rewinds=back,
        traced=traced,
    )


# Ways whose whole course is one program.
IN_A_TRACE = (GenerationMode.GREEDY, GenerationMode.SAMPLE, GenerationMode.BEAM, GenerationMode.BEAM_SAMPLE)


def _check_traced(config: GenerationConfig, mode: GenerationMode, cache: Any) -> None:
    """Raises TypeError for what cannot be done while a function is traced."""
    # Scores are those of beams, which are of one size.
    kept = [name for name in OUTPUT_FLAGS if name != "output_scores" and getattr(config, name) is True]
    why = None
    if mode not in IN_A_TRACE:
        why = f"{mode.value} looks at its tokens on the way; greedy search, sampling and beams can be traced"
    elif cache is not None:
        why = "a cache tells by its values how much it holds"
    elif config.max_time is not None:
        why = "max_time looks at the clock on the way"
    elif kept:
        why = f"how many steps {kept[0]} is about is known at the end; leave it out"
    if why is not None:
        raise TypeError(f"generate() is called in a trace (jax.jit, jax.pmap, ...), where this cannot be: {why}")


def negative_of(task: Task, ids: Any, mask: Any) -> tuple[Prompt, tuple[Feed, int, int]]:
    """The prompt that guidance leads away from, by default the last token of the prompt alone; and how it is given.

    Raises:
        ValueError: another number of rows, or a task that has no guidance.
    """
    if task.is_encoder_decoder or task.prompt.cache is not None or not task.shown.size:
        raise ValueError("guidance_scale is for decoders of texts that are given as input_ids, without a cache")
    if ids is None:
        ids, mask = np.asarray(task.prompt.ids)[:, int(task.prompt.length) - 1 :][:, :1], None
    ids = _ids("negative_prompt_ids", ids)
    if len(ids) != len(task.shown):
        raise ValueError(f"negative_prompt_ids has {len(ids)} rows, the prompt has {len(task.shown)}")
    mask = _mask("negative_prompt_attention_mask", ids, mask, None)
    if mask is not None:
        ids, mask = _aligned(ids, mask)
    feed = dataclasses.replace(
        Feed.of(task.model, padded=mask is not None, cached=task.feed.cached), kind=task.feed.kind
    )
    limit, length = positions_of(task.model), ids.shape[1]
    if limit is not None and length + task.most > limit:
        raise ValueError(
            f"{length} tokens of negative_prompt_ids and {task.most} new ones are more than the {limit} positions of "
            "the model"
        )
    prompt, feed, count = _prompt(task.model, feed, ids, mask, {}, None, 0, False, task.rewinds)
    return prompt, (feed, _room(task.model, feed, count + task.steps), count)


def _room(model: Model, feed: Feed, columns: int) -> int:
    """Columns of a buffer. Without a cache the model reads all of them, so there are no more than it has positions."""
    limit = positions_of(model)
    return columns if feed.cached or limit is None else min(columns, limit)


# ----------------------------------------------------------------------------------------------------------- the prompt


def _aligned(ids: Any, mask: Any) -> tuple[Any, Any]:
    """Tokens and what is no padding among them, with all padding on the left."""
    order = _on(mask).argsort(mask, axis=1, stable=True)
    return tuple(_on(x, mask).take_along_axis(x, order, axis=1) for x in (ids, mask))


def _on(*arrays: Any) -> Any:
    """NumPy; JAX's where an array is traced."""
    return np if all(map(known, arrays)) else jnp


def _check_range(name: str, ids: Any, vocabulary: int | None) -> None:
    if vocabulary is not None and known(ids) and ids.size and (ids.min() < 0 or ids.max() >= vocabulary):
        raise ValueError(f"{name} holds tokens {ids.min()} to {ids.max()}, the vocabulary has {vocabulary}")


def _text_prompt(config: GenerationConfig, own: dict[str, Any]) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
    """Of a decoder: its tokens [B, T], which of them are no padding, and its other inputs."""
    first = dict(own)
    ids, mask, embeds = first.pop("input_ids", None), first.pop("attention_mask", None), first.get("inputs_embeds")
    if embeds is not None:
        if np.ndim(embeds) != 3:
            raise ValueError(f"inputs_embeds must be [batch, length, size], got shape {np.shape(embeds)}")
        shape = np.shape(embeds)[:2]
        if ids is None:
            ids = np.zeros(shape, np.int32)
        elif np.shape(ids) != shape:
            raise ValueError(
                f"input_ids are the words of inputs_embeds, and so must be of shape {shape}, got {np.shape(ids)}"
            )
    if ids is None:
        if config.bos_token_id is None:
            raise ValueError("there is no prompt, and no bos_token_id to begin with: give input_ids")
        rows = next((len(x) for x in first.values() if np.ndim(x) > 1), 1)
        ids = np.full((rows, 1), config.bos_token_id, np.int32)
    ids = _ids("input_ids", ids)
    return ids, _mask("attention_mask", ids, mask, None if embeds is not None else config), first


def _decoder_prompt(
    model: Model, config: GenerationConfig, own: dict[str, Any], main: str
) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
    """Of an encoder-decoder: the decoder's tokens [B, T], which are no padding, and all other inputs."""
    first = dict(own)
    read = next((name for name in (main, "inputs_embeds", "encoder_outputs") if first.get(name) is not None), None)
    if read is None:
        raise ValueError(f"{model.architecture.name} writes about what it reads: give {main}")
    rows = np.shape(states_of(first[read]) if read == "encoder_outputs" else first[read])[0]
    if first.get("encoder_outputs") is not None and (made := np.shape(states_of(first["encoder_outputs"]))[0]) != rows:
        raise ValueError(f"encoder_outputs has {made} rows, {read} has {rows}")
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
    if start is None:
        raise ValueError("the decoder begins with a token: decoder_start_token_id or bos_token_id must be set")
    starts = np.broadcast_to(np.asarray(start, np.int32).reshape(-1, 1), (rows, 1)) if np.ndim(start) == 0 else None
    if starts is None:
        if len(start) != rows:  # type: ignore[arg-type]
            raise ValueError(f"decoder_start_token_id has {len(start)} tokens for {rows} rows")  # type: ignore[arg-type]
        starts = np.asarray(start, np.int32).reshape(-1, 1)
    ids, mask = first.pop("decoder_input_ids", None), first.pop("decoder_attention_mask", None)
    if ids is None:
        return np.array(starts), None, first
    ids = _ids("decoder_input_ids", ids)
    if len(ids) != rows:
        raise ValueError(f"decoder_input_ids has {len(ids)} rows, {read} has {rows}")
    # Whisper's prompts begin with other tokens than its start. Of traced ones nobody knows: they are whole.
    if model.family.model_type != "whisper" and known(ids) and (ids[:, 0] != starts[:, 0]).all():
        ids = np.concatenate([starts, ids], axis=1)
        if mask is not None:
            mask = np.concatenate([np.ones((rows, 1), bool), np.asarray(mask, bool)], axis=1)
    return ids, _mask("decoder_attention_mask", ids, mask, None), first


def _to_encode(
    model: Model, config: GenerationConfig, first: dict[str, Any], main: str, *, fill: bool
) -> dict[str, Any]:
    """What the encoder reads: with the padding that its tokens show, and filled up to a size that is compiled for."""
    if main != "input_ids" or "encoder_outputs" in first or first.get("input_ids") is None:
        return first
    ids = _ids("input_ids", first["input_ids"])
    _check_range("input_ids", ids, table_size(model.config, "input_ids"))
    mask = _mask("attention_mask", ids, first.get("attention_mask"), config)
    most = positions_of(model)
    if most is not None and ids.shape[1] > most:
        raise ValueError(f"input_ids has {ids.shape[1]} positions, the model has {most}; truncate the input")
    size = bucket(ids.shape[1]) if most is None else min(bucket(ids.shape[1]), most)
    more = size - ids.shape[1] if fill else 0
    if more and mask is None:
        mask = np.ones(ids.shape, bool)
    made = {**first, "input_ids": _on(ids).pad(ids, ((0, 0), (0, more)))}
    for name, x in first.items():  # what else is said of each of its tokens, such as their types
        own = name not in ("input_ids", "attention_mask", *HEAD_MASKS) and not name.startswith("decoder_")
        if own and np.shape(x) == ids.shape:
            made[name] = _on(x).pad(x, ((0, 0), (0, more)))
    if mask is not None:
        made["attention_mask"] = _on(mask).pad(mask, ((0, 0), (0, more))).astype(np.int32)
    return made


def _fills(model: Model) -> bool:
    """Whether the text that an encoder reads may be filled up."""
    parts = [registry.family(config.model_type) for _, config in model.family.parts(model.config)]
    return all(family.fills for family in parts or [model.family])


def _without_words(config: GenerationConfig) -> GenerationConfig:
    """Settings for an encoder that reads no words: those that look at them have no effect, which is said."""
    nothing = {"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0}
    for name, value in nothing.items():
        if getattr(config, name) not in (None, value):
            log.warning("%s looks at the words that the encoder reads, input_ids: there are none", name)
    return config.replace(**nothing)


def _encoder_length(model: Model, first: Mapping[str, Any], seq2seq: bool) -> int:
    """How many states the decoder looks at."""
    if not seq2seq:
        states = first.get("encoder_hidden_states", first.get("encoder_outputs"))  # by either name
        return 0 if states is None else int(states_of(states).shape[-2])
    if "encoder_outputs" in first:
        return int(states_of(first["encoder_outputs"]).shape[-2])
    encoder = model.as_method("encode")
    own = {name: x for name, x in first.items() if name in encoder.input_names}
    arrays, static = encoder.sort_inputs(own)
    return int(_encoded.eval_shape(encoder, arrays, tuple(static.items())).last_hidden_state.shape[1])


@partial(jax.jit, static_argnums=2)  # for its shapes, which are found once
def _encoded(encoder: Model, arrays: dict[str, Any], static: tuple[tuple[str, Any], ...]) -> Any:
    return encoder(**arrays, **dict(static))


def _prompt(
    model: Model,
    feed: Feed,
    ids: np.ndarray,
    mask: np.ndarray | None,
    first: dict[str, Any],
    cache: Any,
    encoder_length: int,
    wordless: bool,
    back: bool,
) -> tuple[Prompt, Feed, int]:
    """The prompt, filled up to a size that is compiled for; the feed, and how many columns are read."""
    rows, length = ids.shape
    factors = {name: jnp.asarray(first[name], jnp.float32) for name in HEAD_MASKS if name in first}
    arrays, static = model.sort_inputs({name: x for name, x in first.items() if name not in HEAD_MASKS})
    arrays |= factors
    feed = dataclasses.replace(feed, static=tuple(static.items()))
    start = 0
    if cache is not None:
        start = int(_one_length(cache))
        if not 0 <= start < length:
            raise ValueError(
                f"the cache holds {start} positions, of a prompt of {length}: input_ids is the whole text, and at "
                "least one token of it must be new"
            )
        cache = _fitting(model, cache, rows, encoder_length)
    limit = positions_of(model)
    count = length - start if not feed.cached else bucket(length - start)
    if limit is not None:
        count = min(count, limit - start)
    if feed.cached and not back and (cache is not None or feed.mask is None):
        count = length - start  # nothing hides what is read beyond the prompt, nor undoes it
    more = start + count - length
    before, after = (0, more) if back or not feed.cached else (more, 0)
    by_token = {name: x for name, x in arrays.items() if feed.is_by_token(name) and np.shape(x)[:2] == (rows, length)}
    for name, x in by_token.items():  # types of tokens, vectors
        arrays[name] = jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))
    memory = {name: arrays.pop(name) for name in feed.of_memory if name in arrays}
    memory |= {name: x[:, -1:] for name, x in by_token.items() if x.ndim == 2}
    if mask is not None:
        pad = _on(mask).pad
        mask = pad(pad(mask, ((0, 0), (before, 0))), ((0, 0), (0, after)), constant_values=True)
    return (
        Prompt(
            ids=jnp.asarray(_on(ids).pad(ids, ((0, 0), (before, after))), jnp.int32),
            # Numbers of the host, for they are known in a trace as well.
            length=np.int32(length + before),
            begins=np.int32(length if wordless else before),
            start=np.int32(start),
            mask=None if mask is None else jnp.asarray(mask),
            memory=memory,
            first=arrays,
            cache=cache,
            encoder_length=encoder_length,
        ),
        feed,
        count,
    )


def _one_length(cache: Any) -> int:
    held = caches.caches_of(cache)
    if not held:
        raise TypeError(
            f"cache must be what a model's call or generate() returned as its cache, got {type(cache).__name__}"
        )
    length = next(one for one in held if not isinstance(one, caches.CrossCache)).length
    if length.ndim:
        raise ValueError("this cache holds texts of different lengths, which generate() does not go on with")
    return int(length)


def _fitting(model: Model, cache: Any, rows: int, encoder_length: int) -> Any:
    """A cache for so many rows, of which it has as many, or one that is for all.

    Raises:
        ValueError: the cache of another model, or of other rows.
    """
    own = jax.eval_shape(lambda: as_kind(model.init_cache(rows, 1, encoder_length), kind_held(cache)))
    if str(jax.tree.structure(own)) != str(jax.tree.structure(cache)):
        raise ValueError("the cache is another model's: it has other layers than this one")
    for held, made in zip(jax.tree.leaves(cache), jax.tree.leaves(own), strict=True):
        if held.ndim != made.ndim or held.shape[2:] != made.shape[2:]:
            raise ValueError(f"the cache is another model's: it holds {held.shape}, this one {made.shape}")
    there = {x.shape[0] for x in jax.tree.leaves(cache) if x.ndim}
    if there == {1} and rows > 1:
        return caches.take_rows(cache, jnp.zeros(rows, jnp.int32))
    if there != {rows}:
        raise ValueError(f"the cache holds {min(there)} rows, the prompt has {rows}")
    return cache


def _ids(name: str, given: Any) -> Any:
    try:
        ids = np.asarray(given) if known(given) else given
    except ValueError:
        raise ValueError(
            f"{name} has rows of different lengths; pad them to one (tokenizer(..., padding=True))"
        ) from None
    if ids.dtype.kind not in "iu":
        if ids.size:
            raise ValueError(f"{name} must hold token ids (whole numbers), it holds {ids.dtype}")
        ids = ids.astype(np.int32)
    if ids.ndim != 2:
        raise ValueError(f"{name} must be [batch, length], got shape {ids.shape}")
    if not ids.size:
        raise ValueError(f"{name} of shape {ids.shape} is empty: give at least one token a row")
    return ids.astype(np.int32)


def _mask(name: str, ids: np.ndarray, given: Any, config: GenerationConfig | None) -> np.ndarray | None:
    """Which tokens are no padding; told from the padding token if there is a `config` and nothing is given."""
    if given is None:
        if config is None or config.pad_token_id is None or config.pad_token_id in config.eos_token_ids:
            return None
        mask = ids != config.pad_token_id
        if known(mask) and mask.all():
            return None
    else:
        mask = (np.asarray(given) if known(given) else given).astype(bool)
        if mask.shape != ids.shape:
            raise ValueError(f"{name} must be [batch, length] as the tokens {ids.shape}, got {mask.shape}")
    if known(mask) and not mask.any(axis=1).all():
        empty = np.flatnonzero(~mask.any(axis=1))
        raise ValueError(f"row {empty[0]} of the prompt is padding throughout: give at least one token a row")
    return mask


# ---------------------------------------------------------------------------------------------------------- the lengths


def positions_of(model: Model) -> int | None:
    """Positions that the model has, where they are rows of a table; None where they are not."""
    config = model.config
    if hasattr(config, "rope_parameters"):
        return None
    return getattr(config, "max_target_positions", None) or getattr(config, "max_position_embeddings", None)


def _with_lengths(
    model: Model, config: GenerationConfig, said: set[str], length: int, wordless: bool
) -> GenerationConfig:
    """Settings whose `max_length`, `max_new_tokens` and `min_length` are all about this prompt of `length` tokens.

    Of a prompt without words all three count its vectors, though they are no tokens of the text.
    """
    limit = positions_of(model)
    if limit is not None and length >= limit:
        raise ValueError(f"the prompt has {length} tokens, the model {limit} positions: none is left for a new token")
    by_default = "max_length" not in said and config.max_length == DEFAULT_LENGTH
    if config.max_new_tokens is not None:
        most = length + config.max_new_tokens
    elif config.max_length is None or (by_default and not wordless):
        most = length + DEFAULT_LENGTH
        most = most if limit is None else min(most, limit)
    else:
        most = config.max_length
    if length >= most:
        raise ValueError(
            f"the prompt has {length} tokens and max_length={config.max_length} counts them: nothing is left to "
            "generate; raise it, or give max_new_tokens"
        )
    if limit is not None and most > limit:
        raise ValueError(
            f"{length} tokens of the prompt and {most - length} new ones are more than the {limit} positions of the "
            "model"
        )
    least = config.min_length or 0
    min_length = max(least - length, 0) if wordless else least
    if config.min_new_tokens is not None:  # which has a rule of its own
        if "min_length" in said and least:
            log.warning("min_new_tokens and min_length are both set: min_new_tokens=%d counts", config.min_new_tokens)
        least, min_length = config.min_new_tokens + length, 0
    if least > most:
        log.warning("the text shall have %d tokens at least and %d at most: it ends at the latter", least, most)
    if config.max_new_tokens is not None and "max_new_tokens" in said and "max_length" in said:
        log.warning("max_new_tokens and max_length are both set: max_new_tokens=%d counts", config.max_new_tokens)
    return config.replace(max_length=most, max_new_tokens=most - length, min_length=min_length)


def _decided(value: int | None) -> int:
    assert value is not None
    return value


# ------------------------------------------------------------------------------------------------------------- the rest


def _vocabulary(model: Model, config: GenerationConfig, said: set[str]) -> int | None:
    """How many tokens there are; special ones that the call names must be among them.

    Of the model's own, those that are not are never chosen, and so do no harm.
    """
    size = table_size(model.config, "decoder_input_ids" if "decoder_input_ids" in model.input_names else "input_ids")
    if size is None:
        return None
    special = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id")
    for name in (one for one in special if one in said):
        value = getattr(config, name)
        for one in (value,) if isinstance(value, int) else value or ():
            if not 0 <= one < size and not (name == "pad_token_id" and one < 0):
                raise ConfigError(f"{name}={value} is no token of the model: its vocabulary has {size}")
    return int(size)


def _ruled(one: Any) -> Any:
    """What an object has as its `rule`; else the object."""
    rule = getattr(one, "rule", None)
    return one if rule is None else rule


def _as_rule(one: Any, name: str, wrap: Callable[[Any], Rule]) -> Rule:
    if isinstance(one, Rule):
        return one
    if not callable(one):
        raise TypeError(f"{name} takes rules of formax.generation, or functions (state, scores), got {one!r}")
    return wrap(one)
