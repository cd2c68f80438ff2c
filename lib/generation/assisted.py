"""Assisted generation: tokens that are guessed cheaply, and read all at once by the model that decides.

The guesses come from a smaller model (Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318) or
from the text itself, where it has said the same before (Saxena 2023, prompt lookup decoding). Whatever the guesses are,
the texts are those of greedy search, and samples have the distribution that they have without.

Rows of a batch go on together: by as many tokens as are right in all of them.

B rows, G guesses, L columns of the buffer, V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from formax.generation import sampling, state
from formax.generation.answer import answer, to_the_end
from formax.generation.config import GenerationConfig
from formax.generation.decoding import Context, Feed, read
from formax.generation.sampling import Rules, noted, read_last, written
from formax.generation.state import Tokens
from formax.generation.task import Task, task_of
from formax.layers.seq2seq import states_of
from formax.model import HEAD_MASKS, Model


@dataclass(frozen=True)
class How(sampling.How):
    """As in `sampling.How`.

    Attributes:
        guesses: most tokens that are guessed at once.
        draft: how the assistant is given tokens; None to look in the text.
        grows: whether their number follows from how many were right.
        ngram: to look in the text: most tokens of a place that must be as the last ones.
    """

    guesses: int = 1
    draft: Feed | None = None
    grows: bool = False
    ngram: int = 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Texts:
    """Texts that are being written; as `sampling.Texts`.

    Attributes:
        tokens: the texts so far.
        context: what the model knows of all but their last token.
        draft: what the assistant knows of them.
        done: bool [B].
        key: random key, if anything is drawn.
        record: what is kept of every step.
        number: int32, how many tokens are guessed next.
    """

    tokens: Tokens
    context: Context
    draft: Context | None
    done: Array
    key: Array | None
    record: dict[str, Any]
    number: Array


@partial(jax.jit, static_argnames=("how",), donate_argnames=("texts",))
def go(
    model: Model, assistant: Model | None, texts: Texts, rules: Rules, threshold: Array, until: Array, *, how: How
) -> tuple[Texts, Array]:
    """Writes on until the column `until`, or until all texts have ended: the texts, and whether they have.

    Guessing stops where the assistant gives its own guess a probability below `threshold`.
    """

    def unfinished(texts: Texts) -> Array:
        return ~texts.done.all() & (texts.tokens.length < until)

    def step(texts: Texts) -> Texts:
        most = jnp.minimum(texts.number, until - texts.tokens.length - 1)
        guessed = _guess(assistant, texts, rules, threshold, most, how)
        return _judge(model, texts, rules, guessed, how)

    texts = jax.lax.while_loop(unfinished, step, texts)
    return texts, texts.done.all()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Guessed:
    """Guesses int32 [B, G], how many there are, the assistant's scores [G, B, V] (None for none), what it knows."""

    ids: Array
    count: Array
    scores: Array | None
    draft: Context | None
    key: Array | None


def _guess(assistant: Model | None, texts: Texts, rules: Rules, threshold: Array, most: Array, how: How) -> _Guessed:
    if assistant is None or texts.draft is None or how.draft is None:
        ids, count = lookup(texts.tokens, how.guesses, how.ngram)
        return _Guessed(ids, jnp.minimum(count, most), None, None, texts.key)
    feed, known, rows = how.draft, texts.draft, len(texts.done)
    first = texts.tokens.length

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens, context, key, scores, sure = carry
        logits, context, _ = read_last(assistant, feed, context, tokens)
        its = rules.process(tokens, logits)
        if key is not None:
            key, own = jax.random.split(key)
            chosen = jax.random.categorical(own, its).astype(jnp.int32)
            scores = jax.lax.dynamic_update_index_in_dim(scores, its, tokens.length - first, axis=0)
        else:
            chosen = jnp.argmax(its, axis=-1).astype(jnp.int32)
        likely = jnp.take_along_axis(jax.nn.softmax(its, axis=-1), chosen[:, None], axis=1)[:, 0]
        # A guess that is not sure is the last one, of one row as of all.
        sure = sure & ((likely >= threshold) | texts.done).all()
        return written(tokens, chosen), context, key, scores, sure

    def goes_on(carry: tuple[Any, ...]) -> Array:
        return (carry[0].length - first < most) & carry[-1]

    size = jax.eval_shape(lambda: read_last(assistant, feed, known, texts.tokens)[0]).shape[-1]
    scores = jnp.zeros((0 if texts.key is None else how.guesses, rows, size))
    start = (texts.tokens, known, texts.key, scores, jnp.ones((), bool))
    tokens, context, key, scores, _ = jax.lax.while_loop(goes_on, step, start)
    # It has not read its last guess, and will have to if that is right.
    _, context, _ = read_last(assistant, feed, context, tokens)
    ids = jax.lax.dynamic_slice_in_dim(tokens.ids, first, how.guesses, axis=1)
    return _Guessed(ids, jnp.asarray(tokens.length - first), None if key is None else scores, context, key)


def lookup(tokens: Tokens, guesses: int, ngram: int) -> tuple[Array, Array]:
    """What followed where the text has said its last tokens before: (ids [B, G], how many there are in all rows).

    The longest sequence of at most `ngram` tokens is looked for, and the first place of it; rows without any have -1.
    """
    rows, size = tokens.ids.shape
    columns = jnp.arange(size)
    place, found = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
    for n in range(ngram, 0, -1):
        last = tokens.last(n)
        same = jnp.ones((rows, size), bool)  # whether the n columns up to this one are as the last ones
        for i in range(n):
            same &= jnp.roll(tokens.ids, n - 1 - i, axis=1) == last[:, i, None]
        same &= (columns >= tokens.first + n - 1) & (columns < tokens.length - 1)
        here = same.any(-1) & ~found
        place = jnp.where(here, jnp.argmax(same, axis=-1) + 1, place)
        found |= here
    ids = jnp.take_along_axis(tokens.ids, jnp.minimum(place[:, None] + jnp.arange(guesses), size - 1), axis=1)
    there = jnp.where(found, jnp.minimum(tokens.length - place, guesses), 0)
    ids = jnp.where(jnp.arange(guesses) < there[:, None], ids, -1)
    return ids, there.max()


def _judge(model: Model, texts: Texts, rules: Rules, guessed: _Guessed, how: How) -> Texts:
    """Reads the guesses and writes those that are right, and one token more."""
    tokens, g = texts.tokens, how.guesses
    read_ids = jax.lax.dynamic_update_slice_in_dim(tokens.ids, jnp.maximum(guessed.ids, 0), tokens.length, axis=1)
    ahead = replace(tokens, ids=read_ids)
    logits, context, seen = read(model, how.feed, texts.context, ahead, tokens.length - 1, g + 1)
    logits = jnp.moveaxis(logits, 1, 0)

    def processed(i: Array) -> Array:
        return rules.process(state.replace(ahead, length=tokens.length + i), logits[i])

    scores = jax.lax.map(processed, jnp.arange(g + 1))  # [G + 1, B, V]
    right, chosen, key = _right(scores, guessed, how)
    places = jnp.arange(g) < guessed.count
    right = jnp.cumprod((right & places) | texts.done[:, None], axis=1).sum(1)
    matched = jnp.minimum(right.min(), guessed.count)

    def goes_on(carry: tuple[Array, Texts]) -> Array:
        return (carry[0] <= matched) & ~carry[1].done.all()

    def write(carry: tuple[Array, Texts]) -> tuple[Array, Texts]:
        i, texts = carry
        entries: dict[str, Any] = {"scores": scores[i], "logits": logits[i]}
        for name, value in seen.items():
            at = partial(jax.lax.dynamic_slice_in_dim, start_index=i, slice_size=1, axis=_axis(name))
            entries[name] = jax.tree.map(at, value)
        record = noted(texts.record, entries, texts.tokens)
        # Rows whose guess at this place is right take it, also where others' is not.
        own = jnp.where((i < right) & (i < g), guessed.ids[:, jnp.minimum(i, g - 1)], chosen[:, i])
        if how.pads:
            own = jnp.where(texts.done, rules.pad, own)
        after = written(texts.tokens, own)
        return i + 1, replace(texts, tokens=after, done=texts.done | rules.criteria(after, scores[i]), record=record)

    _, texts = jax.lax.while_loop(goes_on, write, (jnp.zeros((), jnp.int32), replace(texts, key=key)))
    known = texts.tokens.length - 1
    number = texts.number
    if how.grows:
        number = jnp.where(matched == guessed.count, jnp.minimum(number + 2, g), jnp.maximum(number - 1, 1))
    draft = None if guessed.draft is None else guessed.draft.rewound(known)
    return replace(texts, context=context.rewound(known), draft=draft, number=number)


def _right(scores: Array, guessed: _Guessed, how: How) -> tuple[Array, Array, Array | None]:
    """Of each guess whether it is right (bool [B, G]), and the token to write where it is not (int32 [B, G + 1])."""
    ids, key = guessed.ids, guessed.key
    if key is None:
        chosen = jnp.argmax(scores, axis=-1).T.astype(jnp.int32)
        return ids == chosen[:, :-1], chosen, key
    key, first, second = jax.random.split(key, 3)
    if guessed.scores is None:
        # Nobody drew the guesses: draw as always, and see whether they are the same.
        chosen = jax.random.categorical(first, scores).T.astype(jnp.int32)
        return ids == chosen[:, :-1], chosen, key
    p, q = jax.nn.softmax(scores, axis=-1), jax.nn.softmax(guessed.scores, axis=-1)
    at = ids.T[..., None]
    share = jnp.take_along_axis(p[:-1], at, axis=-1)[..., 0] / jnp.take_along_axis(q, at, axis=-1)[..., 0]
    right = jax.random.uniform(first, share.shape) < share
    # What the guesses leave of the distribution; beyond the last of them, all of it.
    rest = jnp.maximum(p[:-1] - q, 0)
    rest = jnp.where((jnp.arange(how.guesses) < guessed.count)[:, None, None], rest, p[:-1])
    rest = jnp.concatenate([jnp.where(rest.sum(-1, keepdims=True) > 0, rest, p[:-1]), p[-1:]])
    return right.T, jax.random.categorical(second, jnp.log(rest)).T.astype(jnp.int32), key


def _axis(name: str) -> int:
    """The axis of positions, of what was seen of several."""
    return 2 if "attentions" in name else 1


def write(task: Task, key: Array | None, assistant: Model | None, given: dict[str, Any], streamer: Any) -> Any:
    """Assisted generation, from the prompt to what `generate` returns.

    Args:
        task: what is generated.
        key: random key, if anything is drawn.
        assistant: the model that proposes tokens; None for this one's lower layers, or the text itself.
        given: arguments of `task_of` that say what is read.
        streamer: as in `generate`.

    Raises:
        ValueError: settings that do not go together, or an assistant that cannot propose tokens to this model.
    """
    c = task.config
    if task.layers or c.num_return_sequences > 1:
        raise ValueError("assisted generation writes one text for every input, without dola_layers")
    if not task.rewinds:
        raise ValueError(f"{task.model.architecture.name} cannot take back tokens that were wrong: no cache can")
    its, other = c, None
    if assistant is None and c.assistant_early_exit is not None:
        other = _its_task(task, lower_layers(task.model, c.assistant_early_exit), given)
    elif assistant is not None:
        check_assistant(task.model, assistant)
        its, other = assistant.generation_config or GenerationConfig(), _its_task(task, assistant, given)
    guesses = max(int((c.prompt_lookup_num_tokens if other is None else its.num_assistant_tokens) or 0), 1)
    grows = other is not None and its.num_assistant_tokens_schedule in ("heuristic", "heuristic_transient")
    most = min(2 * guesses if grows else guesses, max(task.most - 1, 1))
    how = How(
        **vars(sampling.how_of(task)),
        guesses=most,
        draft=None if other is None else other.feed,
        grows=grows,
        ngram=c.max_matching_ngram_size or 2,
    )
    rules, sure = sampling.rules_of(task), jnp.float32(its.assistant_confidence_threshold or 0.0)
    room = task.room + most + 1  # guesses are read beyond the end
    known = task.known(room)
    first = sampling.begin(task.model, known, rules, key, how=sampling.how_of(task))
    draft = None if other is None else other.model
    context = None if other is None else other.known(room).context
    number = jnp.int32(min(guesses, most))
    texts = Texts(first.tokens, first.context, context, first.done, first.key, first.record, number)

    def on(texts: Texts, until: Array) -> tuple[Texts, Array]:
        return go(task.model, draft, texts, rules, sure, until, how=how)

    if streamer is None:
        return answer(task, to_the_end(task, on, texts)[0], known.seen)
    streamer.put(task.shown)
    at = int(task.prompt.length)
    end, over = at + task.most, False
    while not over:
        length = int(texts.tokens.length)
        for column in range(at, length):
            streamer.put(np.asarray(texts.tokens.ids[:, column]))
        at, over = length, bool(texts.done.all()) or length >= end or task.late()
        if not over:
            texts, _ = on(texts, jnp.int32(min(length + 1 + most, end)))
    streamer.end()
    return answer(task, texts, known.seen)


def _its_task(task: Task, assistant: Model, given: dict[str, Any]) -> Task:
    """The same task for the assistant; a decoder alone looks at what the model's own encoder makes of the inputs."""
    names = ("max_new_tokens", "decoder_start_token_id", "bos_token_id", "pad_token_id", "eos_token_id")
    own = {name: x for name, x in given["given"].items() if name in set(assistant.input_names) | set(HEAD_MASKS)}
    inputs = given["inputs"]
    if (memory := _memory_input(task.model, assistant)) is not None:
        own, inputs = {memory: _memory(task.model, given), "attention_mask": np.ones(task.shown.shape)}, task.shown
    settings = {name: getattr(task.config, name) for name in names}
    other = task_of(assistant, inputs, GenerationConfig(), use_model_defaults=False, given=own | settings)
    if not other.rewinds or other.prompt.ids.shape != task.prompt.ids.shape:
        raise ValueError(f"{assistant.architecture.name} reads this prompt in another way, so it cannot assist")
    return other


def _memory_input(model: Model, assistant: Model) -> str | None:
    """By which name a decoder alone is given the states of an encoder; None if it is like the model."""
    if "decoder_input_ids" not in model.input_names or "decoder_input_ids" in assistant.input_names:
        return None
    return next((name for name in ("encoder_hidden_states", "encoder_outputs") if name in assistant.input_names), None)


def _memory(model: Model, given: dict[str, Any]) -> Array:
    """The encoder's states [B, S, E] of the inputs, or those that are given.

    Raises:
        ValueError: some of the inputs are padding, which the decoder would have to be told.
    """
    own = {name: x for name, x in given["given"].items() if x is not None}
    if own.get("attention_mask") is not None and not np.all(own["attention_mask"]):
        raise ValueError("an assistant that is a decoder alone looks at all states: give inputs without padding")
    if own.get("encoder_outputs") is not None:
        return states_of(own["encoder_outputs"])
    encoder = model.as_method("encode")
    own |= {} if given["inputs"] is None else {model.input_names[0]: given["inputs"]}
    return encoder(**{name: x for name, x in own.items() if name in encoder.input_names}).last_hidden_state


def check_assistant(model: Model, assistant: Model) -> None:
    """Raises ValueError for a model that cannot propose tokens to this one."""
    sizes = [getattr(one.config, "vocab_size", None) for one in (model, assistant)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the assistant has a vocabulary of {sizes[1]}, the model one of {sizes[0]}: they must be the same tokens"
        )
    alike = model.input_names[0] == assistant.input_names[0]
    alike &= ("decoder_input_ids" in model.input_names) == ("decoder_input_ids" in assistant.input_names)
    if not alike and _memory_input(model, assistant) is None:
        raise ValueError(f"{assistant.architecture.name} takes other inputs than {model.architecture.name}")
    widths = [getattr(one.config, "hidden_size", None) for one in (model, assistant)]
    if not alike and widths[0] != widths[1]:
        raise ValueError(
            f"the assistant's decoder looks at {widths[1]} channels, and the model's encoder has {widths[0]}"
        )


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
