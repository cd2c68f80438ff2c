"""What is done to scores before a token is chosen: pure functions, alone and inside `jit`.

    process = then(temperature(0.7), top_p(0.9))
    scores = process(state, scores)             # scores [B, V], state: formax.generation.state.Tokens

Every constructor checks its settings and gives a `Rule`: `(state, scores [B, V] float32) -> scores [B, V]`. Nothing in
it grows with the square of the text, and no program is compiled again because the text became longer. Numbers that a
docstring calls a strength may be traced.

B rows, L columns of the buffer, V tokens of the vocabulary.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from formax.generation.config import GenerationConfig, SynthIDTextWatermarkingConfig
from formax.generation.state import Number, Rule, Tokens, in_vocabulary, known, number, rule, token_ids, whole

NEVER = -jnp.inf


# ------------------------------------------------------------------------------------------------------------- together


def then(*processors: Rule) -> Rule:
    """One processor that applies others in their order; each gets what it needs of what the call hands in.

    Raises:
        TypeError: something that is no processor.
    """
    for one in processors:
        if not isinstance(one, Rule):
            raise TypeError(f"then() takes processors, such as temperature(0.7), got {one!r}")
    needs = tuple(dict.fromkeys(name for one in processors for name in one.needs))
    return rule("then", _then, {"processors": tuple(processors)}, needs=needs)


def _then(state: Tokens, scores: Array, *, processors: tuple[Rule, ...], **given: Any) -> Array:
    for one in processors:
        scores = one(state, scores, **{name: given[name] for name in one.needs})
    return scores


def custom(function: Callable[[Tokens, Array], Array], name: str = "custom") -> Rule:
    """A processor of your own: `function(state, scores [B, V]) -> scores [B, V]`, which JAX must be able to trace."""
    return rule(name, function)


# ------------------------------------------------------------------------------------------------------- length and end


def min_length(length: Number, eos_token_id: int | Sequence[int]) -> Rule:
    """No end before the text, prompt included, has `length` tokens (a strength)."""
    return rule(
        "min_length",
        _min_length,
        {"least": whole("min_length", length)},
        {"eos": token_ids("eos_token_id", eos_token_id)},
    )


def _min_length(state: Tokens, scores: Array, *, least: Any, eos: tuple[int, ...]) -> Array:
    return jnp.where(_listed("min_length", eos, scores) & (state.count() < least), NEVER, scores)


def min_new_tokens(count: Number, eos_token_id: int | Sequence[int]) -> Rule:
    """No end before there are `count` new tokens (a strength)."""
    return rule(
        "min_new_tokens",
        _min_new_tokens,
        {"least": whole("min_new_tokens", count)},
        {"eos": token_ids("eos_token_id", eos_token_id)},
    )


def _min_new_tokens(state: Tokens, scores: Array, *, least: Any, eos: tuple[int, ...]) -> Array:
    return jnp.where(_listed("min_new_tokens", eos, scores) & (state.new() < least), NEVER, scores)


def forced_bos(token_id: int) -> Rule:
    """The first token after a single one (an encoder-decoder's start token) is `token_id`."""
    return rule("forced_bos", _forced_bos, None, {"ids": token_ids("forced_bos_token_id", token_id, several=False)})


def _forced_bos(state: Tokens, scores: Array, *, ids: tuple[int, ...]) -> Array:
    return _force(scores, state.count() == 1, _listed("forced_bos", ids, scores))


def forced_tokens(tokens: Mapping[int, int]) -> Rule:
    """A token for each of some places in the text: {how long the text is before it: token id}."""
    places = tuple(int(whole("a place of forced_tokens", place)) for place in tokens)
    return rule("forced_tokens", _forced_tokens, None, {"places": places, "ids": token_ids("ids", tokens.values())})


def _forced_tokens(state: Tokens, scores: Array, *, places: tuple[int, ...], ids: tuple[int, ...]) -> Array:
    in_vocabulary("forced_tokens", ids, scores.shape[-1])
    now = state.count() == np.asarray(places)
    token = jnp.where(now, np.asarray(ids), 0).sum()
    return _force(scores, now.any(), jnp.arange(scores.shape[-1]) == token)


def forced_eos(
    token_id: int | Sequence[int], *, max_length: Number | None = None, max_new_tokens: Number | None = None
) -> Rule:
    """The last token that there is room for is `token_id`, or one of several, all with the score 0.

    Args:
        token_id: the end.
        max_length: how long the text can become, prompt included (a strength); or
        max_new_tokens: how many tokens can be new (a strength).

    Raises:
        ValueError: neither, or both, of the lengths.
    """
    if (max_length is None) == (max_new_tokens is None):
        raise ValueError("forced_eos needs either max_length or max_new_tokens")
    ids = {"ids": token_ids("forced_eos_token_id", token_id)}
    if max_new_tokens is not None:
        return rule("forced_eos", _forced_eos_new, {"most": whole("max_new_tokens", max_new_tokens, 1)}, ids)
    return rule("forced_eos", _forced_eos, {"most": whole("max_length", max_length, 1)}, ids)


def _forced_eos(state: Tokens, scores: Array, *, most: Any, ids: tuple[int, ...]) -> Array:
    return _force(scores, state.count() == most - 1, _listed("forced_eos", ids, scores))


def _forced_eos_new(state: Tokens, scores: Array, *, most: Any, ids: tuple[int, ...]) -> Array:
    return _force(scores, state.new() == most - 1, _listed("forced_eos", ids, scores))


def exponential_decay_length(start: Number, factor: Number, eos_token_id: int | Sequence[int]) -> Rule:
    """The end becomes likelier with every token after the first `start` new ones, by powers of `factor`.

    Both numbers are strengths. A factor below 1 makes the end less likely.
    """
    return rule(
        "exponential_decay_length",
        _exponential_decay_length,
        {
            "start": number("start", start, math.isfinite, "a number of tokens"),
            "factor": number("factor", factor, math.isfinite, "a finite number"),
        },
        {"eos": token_ids("eos_token_id", eos_token_id)},
    )


def _exponential_decay_length(state: Tokens, scores: Array, *, start: Any, factor: Any, eos: tuple[int, ...]) -> Array:
    over = state.new() - start
    grown = jnp.asarray(factor, scores.dtype) ** jnp.maximum(over, 0).astype(scores.dtype) - 1
    # What is ruled out stays so: minus infinity and what would be added to it are no number.
    ends = _listed("exponential_decay_length", eos, scores) & (over > 0) & (scores > NEVER)
    return jnp.where(ends, scores + jnp.abs(scores) * grown, scores)


# -------------------------------------------------------------------------------------------------------- sharp or flat


def temperature(value: Number) -> Rule:
    """Scores divided by `value` (a strength): below 1 sharper, above 1 flatter."""
    right = "a number above 0 (for the most likely token always, do_sample=False)"
    return rule("temperature", _temperature, {"value": number("temperature", value, lambda v: v > 0, right)})


def _temperature(state: Tokens, scores: Array, *, value: Any) -> Array:
    return scores / value


def renormalize() -> Rule:
    """Scores as logarithms of probabilities that add up to 1."""
    return rule("renormalize", lambda state, scores: jax.nn.log_softmax(scores, axis=-1))


def remove_invalid() -> Rule:
    """NaN becomes 0, the infinities the largest and the smallest finite number."""
    return rule("remove_invalid", _remove_invalid)


def _remove_invalid(state: Tokens, scores: Array) -> Array:
    limits = jnp.finfo(scores.dtype)
    return jnp.nan_to_num(scores, nan=0.0, posinf=float(limits.max), neginf=float(limits.min))


# ------------------------------------------------------------------------------------------------------ fewer to choose


def top_k(k: Number, *, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> Rule:
    """The k most likely tokens; ties with the last of them stay too (Fan et al. 2018, https://arxiv.org/abs/1805.04833).

    k is a strength; while it is known, the whole vocabulary need not be sorted.
    """
    whole("top_k", k, 1)
    return rule("top_k", _top_k, {"k": k}, _filter(filter_value, min_tokens_to_keep))


def _top_k(state: Tokens, scores: Array, *, k: Any, filter_value: float, keep: int) -> Array:
    size = scores.shape[-1]
    if isinstance(k, int | np.integer):
        least = jax.lax.top_k(scores, min(max(int(k), keep), size))[0][:, -1:]
    else:
        place = size - jnp.clip(jnp.maximum(k, keep), 1, size)
        least = jnp.take(jnp.sort(scores, axis=-1), jnp.asarray(place, jnp.int32)[None], axis=-1)
    return jnp.where(scores < least, filter_value, scores)


def top_p(p: Number, *, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> Rule:
    """The fewest tokens that have the probability `p` together (Holtzman et al. 2020, https://arxiv.org/abs/1904.09751).

    p is a strength between 0 and 1.
    """
    number("top_p", p, lambda v: 0 <= v <= 1, "a number between 0 and 1")
    return rule("top_p", _top_p, {"p": p}, _filter(filter_value, min_tokens_to_keep))


def _top_p(state: Tokens, scores: Array, *, p: Any, filter_value: float, keep: int) -> Array:
    order = jnp.argsort(scores, axis=-1)
    ascending = jnp.take_along_axis(scores, order, axis=-1)
    below = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - p
    below = below & (jnp.arange(scores.shape[-1]) < scores.shape[-1] - keep)
    return jnp.where(_unsort(below, order), filter_value, scores)


def min_p(p: Number, *, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> Rule:
    """Tokens at least `p` times as likely as the most likely one (Nguyen et al. 2024, https://arxiv.org/abs/2407.01082).

    p is a strength between 0 and 1.
    """
    number("min_p", p, lambda v: 0 <= v <= 1, "a number between 0 and 1")
    return rule("min_p", _min_p, {"p": p}, _filter(filter_value, min_tokens_to_keep))


def _min_p(state: Tokens, scores: Array, *, p: Any, filter_value: float, keep: int) -> Array:
    probabilities = jax.nn.softmax(scores, axis=-1)
    removed = probabilities < p * probabilities.max(-1, keepdims=True)
    return jnp.where(removed & ~_best(scores, keep), filter_value, scores)


def typical(mass: Number = 0.9, *, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> Rule:
    """The tokens whose information is nearest to the expected one, until they have the probability `mass` together.

    Locally typical sampling (Meister et al. 2022, https://arxiv.org/abs/2202.00666). mass is a strength, between 0
    and 1 and neither of them.
    """
    number("typical_p", mass, lambda v: 0 < v < 1, "a number between 0 and 1, and neither of them")
    return rule("typical", _typical, {"mass": mass}, _filter(filter_value, min_tokens_to_keep))


def _typical(state: Tokens, scores: Array, *, mass: Any, filter_value: float, keep: int) -> Array:
    logs = jax.nn.log_softmax(scores, axis=-1)
    distance = jnp.abs(-logs - _entropy(logs))
    order = jnp.argsort(distance, axis=-1)
    nearest = jnp.take_along_axis(distance, order, axis=-1)
    sums = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(scores, order, axis=-1), axis=-1), axis=-1)
    last = jnp.minimum((sums < mass).sum(-1, keepdims=True), scores.shape[-1] - 1)
    removed = nearest > jnp.take_along_axis(nearest, last, axis=-1)
    removed = removed & (jnp.arange(scores.shape[-1]) >= keep)
    return jnp.where(_unsort(removed, order), filter_value, scores)


def epsilon(cutoff: Number, *, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> Rule:
    """Tokens with a probability of at least `cutoff` (Hewitt et al. 2022, https://arxiv.org/abs/2210.15191).

    cutoff is a strength, between 0 and 1 and neither of them.
    """
    number("epsilon_cutoff", cutoff, lambda v: 0 < v < 1, "a number between 0 and 1, and neither of them")
    return rule("epsilon", _epsilon, {"cutoff": cutoff}, _filter(filter_value, min_tokens_to_keep))


def _epsilon(state: Tokens, scores: Array, *, cutoff: Any, filter_value: float, keep: int) -> Array:
    removed = jax.nn.softmax(scores, axis=-1) < cutoff
    return jnp.where(removed & (scores < _kth(scores, keep)), filter_value, scores)


def eta(cutoff: Number, *, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> Rule:
    """As `epsilon`, with a threshold that falls where the distribution is flat (Hewitt et al. 2022).

    The threshold is min(cutoff, sqrt(cutoff) * exp(-entropy)). cutoff is a strength, between 0 and 1 and neither of
    them.
    """
    number("eta_cutoff", cutoff, lambda v: 0 < v < 1, "a number between 0 and 1, and neither of them")
    return rule("eta", _eta, {"cutoff": cutoff}, _filter(filter_value, min_tokens_to_keep))


def _eta(state: Tokens, scores: Array, *, cutoff: Any, filter_value: float, keep: int) -> Array:
    logs = jax.nn.log_softmax(scores, axis=-1)
    threshold = jnp.minimum(cutoff, jnp.sqrt(cutoff) * jnp.exp(-_entropy(logs)))
    removed = jax.nn.softmax(scores, axis=-1) < threshold
    return jnp.where(removed & (scores < _kth(scores, keep)), filter_value, scores)


def suppress_tokens(ids: Sequence[int]) -> Rule:
    """These tokens never."""
    return rule("suppress_tokens", _suppress_tokens, None, {"ids": token_ids("suppress_tokens", ids)})


def _suppress_tokens(state: Tokens, scores: Array, *, ids: tuple[int, ...]) -> Array:
    return jnp.where(_listed("suppress_tokens", ids, scores), NEVER, scores)


def suppress_at_begin(ids: Sequence[int], *, begin: Number | None = None, after_forced_bos: bool = False) -> Rule:
    """These tokens not where the new text begins.

    Args:
        ids: the tokens.
        begin: how long the text is there, as the reference counts (a strength); the prompt's length by default.
        after_forced_bos: where the prompt is a single token, begin one later, since the first one is forced.
    """
    if begin is not None:
        whole("begin", begin)
    return rule(
        "suppress_at_begin",
        _suppress_at_begin,
        {"begin": begin},
        {"ids": token_ids("begin_suppress_tokens", ids), "later": bool(after_forced_bos)},
    )


def _suppress_at_begin(state: Tokens, scores: Array, *, begin: Any, ids: tuple[int, ...], later: bool) -> Array:
    if begin is None:
        prompt = jnp.asarray(state.prompt - state.first)
        begin = prompt + ((prompt <= 1) & later)
    return jnp.where(_listed("suppress_at_begin", ids, scores) & (state.count() == begin), NEVER, scores)


def prefix_allowed_tokens(allowed: Callable[[int, np.ndarray], Sequence[int]], num_beams: int = 1) -> Rule:
    """Only the tokens that a function of yours allows after the text so far.

    The function is Python, so each step goes from the device to the host and back (`jax.pure_callback`): it is slow
    beside everything else here, and it must give the same answer for the same text.

    Args:
        allowed: `(index of the input in the batch, its text as int32 [T]) -> token ids`; never none.
        num_beams: rows for each input.
    """
    whole("num_beams", num_beams, 1)
    if not callable(allowed):
        raise ValueError(f"prefix_allowed_tokens needs a function (input, text) -> token ids, got {allowed!r}")
    return rule("prefix_allowed_tokens", _prefix_allowed_tokens, None, {"allowed": allowed, "beams": num_beams})


def _prefix_allowed_tokens(
    state: Tokens, scores: Array, *, allowed: Callable[[int, np.ndarray], Sequence[int]], beams: int
) -> Array:
    size = scores.shape[-1]

    def ask(ids: Any, first: Any, length: Any) -> np.ndarray:
        out = np.zeros((len(ids), size), bool)
        for row, text in enumerate(np.asarray(ids)[:, int(first) : int(length)]):
            found = list(allowed(row // beams, text))
            if not found:
                raise ValueError(f"prefix_allowed_tokens: no token is allowed for input {row // beams} after {text}")
            in_vocabulary("prefix_allowed_tokens", found, size)
            out[row, found] = True
        return out

    shape = jax.ShapeDtypeStruct(scores.shape, np.bool_)
    return jnp.where(
        jax.pure_callback(ask, shape, state.ids, state.first, state.length, vmap_method="sequential"), scores, NEVER
    )


# ----------------------------------------------------------------------------------------------------------- repetition


def repetition_penalty(penalty: Number, *, prompt_ignore_length: Number = 0) -> Rule:
    """Tokens of the text become less likely (Keskar et al. 2019, https://arxiv.org/abs/1909.05858).

    Args:
        penalty: what negative scores are multiplied with and others divided by (a strength).
        prompt_ignore_length: this many tokens at the start of the text do not count (a strength).
    """
    return rule(
        "repetition_penalty",
        _repetition_penalty,
        {
            "penalty": number("repetition_penalty", penalty, lambda v: v > 0, "a number above 0"),
            "ignored": whole("prompt_ignore_length", prompt_ignore_length),
        },
    )


def _repetition_penalty(state: Tokens, scores: Array, *, penalty: Any, ignored: Any) -> Array:
    counts = state.written() & (jnp.arange(state.ids.shape[1]) >= state.first + ignored)
    return _penalised(scores, _occurring(state.ids, counts, scores), penalty)


def encoder_repetition_penalty(penalty: Number, encoder_ids: Any) -> Rule:
    """Tokens of the encoder's input become likelier, for penalties above 1.

    Args:
        penalty: what negative scores are divided by and others multiplied with (a strength).
        encoder_ids: int [B, S], the inputs of the encoder, one row for each row of scores (a strength). Ids below 0
            are not looked at.
    """
    return rule(
        "encoder_repetition_penalty",
        _encoder_repetition_penalty,
        {
            "penalty": number("encoder_repetition_penalty", penalty, lambda v: v > 0, "a number above 0"),
            "encoder_ids": _rows("encoder_ids", encoder_ids),
        },
    )


def _encoder_repetition_penalty(state: Tokens, scores: Array, *, penalty: Any, encoder_ids: Any) -> Array:
    ids = _spread("encoder_repetition_penalty", encoder_ids, scores)
    return _penalised(scores, _occurring(ids, ids >= 0, scores), 1 / penalty)


def no_repeat_ngram(size: int) -> Rule:
    """No n-gram of `size` tokens twice."""
    return rule("no_repeat_ngram", _no_repeat_ngram, None, {"size": _known_size("no_repeat_ngram_size", size)})


def _no_repeat_ngram(state: Tokens, scores: Array, *, size: int) -> Array:
    columns = jnp.arange(max(state.ids.shape[1] - size + 1, 0))
    inside = (columns >= state.first) & (columns + size <= state.length)
    return _without_ngrams(state, scores, state.ids, inside, size)


def encoder_no_repeat_ngram(size: int, encoder_ids: Any) -> Rule:
    """No n-gram of `size` tokens that is in the encoder's input.

    Args:
        size: n.
        encoder_ids: int [B, S], or one row for each input where scores have several (beams); a strength. Ids below 0
            are not looked at.
    """
    return rule(
        "encoder_no_repeat_ngram",
        _encoder_no_repeat_ngram,
        {"encoder_ids": _rows("encoder_ids", encoder_ids)},
        {"size": _known_size("encoder_no_repeat_ngram_size", size)},
    )


def _encoder_no_repeat_ngram(state: Tokens, scores: Array, *, encoder_ids: Any, size: int) -> Array:
    ids = _spread("encoder_no_repeat_ngram", encoder_ids, scores)
    windows = max(ids.shape[1] - size + 1, 0)
    inside = jnp.ones((ids.shape[0], windows), bool)
    for i in range(size):
        inside &= ids[:, i : i + windows] >= 0
    return _without_ngrams(state, scores, ids, inside & (state.count() >= size - 1), size)


def _without_ngrams(state: Tokens, scores: Array, ids: Array, inside: Array, size: int) -> Array:
    """Bans the last token of every n-gram of `ids` [B, S] that begins as the text ends; `inside` [.., windows]."""
    windows = ids.shape[1] - size + 1
    if windows < 1:
        return scores
    end = state.last(size - 1)
    banned = jnp.broadcast_to(inside, (ids.shape[0], windows))
    for i in range(size - 1):
        banned = banned & (ids[:, i : i + windows] == end[:, i, None])
    return jnp.where(_occurring(ids[:, size - 1 :], banned, scores), NEVER, scores)


def sequence_bias(bias: Mapping[Any, float] | Sequence[Any]) -> Rule:
    """Adds to the score of a token that would complete a sequence.

    Args:
        bias: {sequence of token ids: bias}, or [[sequence, bias], ...] as JSON has it. The biases are strengths.

    Raises:
        ValueError: an empty sequence, ids that are none, or a bias that is no number.
    """
    pairs = _bias_pairs(bias)
    if not pairs:
        raise ValueError("sequence_bias must name a sequence, got none")
    return _sequence_rule("sequence_bias", pairs)


def bad_words(words: Sequence[Sequence[int]], eos_token_id: int | Sequence[int] | None = None) -> Rule:
    """None of these sequences of tokens; the end alone is never banned.

    Args:
        words: sequences of token ids.
        eos_token_id: the end, or several.

    Raises:
        ValueError: no words, an empty one, or ids that are none.
    """
    if not _is_list(words) or not words:
        raise ValueError(f"bad_words_ids must be a list of lists of token ids, got {words!r}")
    for word in words:
        if not _is_list(word):
            raise ValueError(f"bad_words_ids must be a list of lists of token ids, got {word!r} in it")
    ends = {(one,) for one in token_ids("eos_token_id", eos_token_id)} if eos_token_id is not None else set()
    banned = dict.fromkeys(token_ids("bad_words_ids", word) for word in words)
    return _sequence_rule("bad_words", {word: -math.inf for word in banned if word not in ends})


def _sequence_rule(name: str, pairs: Mapping[tuple[int, ...], float]) -> Rule:
    biases = np.asarray(list(pairs.values()), np.float32)
    return rule(name, _sequence_bias, {"biases": biases}, {"sequences": tuple(pairs), "name": name})


def _sequence_bias(
    state: Tokens, scores: Array, *, biases: Any, sequences: tuple[tuple[int, ...], ...], name: str
) -> Array:
    in_vocabulary(name, (one for sequence in sequences for one in sequence), scores.shape[-1])
    if not sequences:
        return scores
    # Right-aligned: what must come before the last token, in as many columns as the longest sequence needs.
    width = max(map(len, sequences)) - 1
    before = np.full((len(sequences), width), -1, np.int32)
    for i, sequence in enumerate(sequences):
        before[i, width - len(sequence) + 1 :] = sequence[:-1]
    lengths = np.asarray([len(sequence) for sequence in sequences])
    fits = (state.last(width, missing=-2)[:, None] == before) | (before < 0)
    # As the reference, which wants the text as long as the whole sequence, its last token included.
    fits = fits.all(-1) & ((lengths == 1) | (lengths <= state.count()))
    added = jnp.where(fits, biases, 0.0).astype(scores.dtype)
    last = np.asarray([sequence[-1] for sequence in sequences])
    return scores + jnp.zeros_like(scores).at[:, last].add(added)


def _bias_pairs(bias: Any) -> dict[tuple[int, ...], float]:
    if isinstance(bias, Mapping):
        items = list(bias.items())
    elif isinstance(bias, Sequence) and not isinstance(bias, str):
        items = []
        for pair in bias:
            if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise ValueError(f"sequence_bias must be pairs of a sequence and its bias, got {pair!r}")
            items.append((pair[0], pair[1]))
    else:
        raise ValueError(f"sequence_bias must be an object or a list of pairs, got {bias!r}")
    out = {}
    for sequence, value in items:
        if isinstance(sequence, str):  # A key of JSON: "(5, 7)".
            try:
                sequence = ast.literal_eval(sequence)
            except (ValueError, SyntaxError):
                raise ValueError(f"sequence_bias: {sequence!r} is no sequence of token ids") from None
        right = "a number"
        out[token_ids("sequence_bias", sequence)] = number("a bias of sequence_bias", value, lambda v: v == v, right)
    return out


def hamming_diversity(penalty: Number, num_beams: int, num_beam_groups: int) -> Rule:
    """A group of beams avoids what the groups before it chose at this step (https://arxiv.org/abs/1610.02424).

    The processor needs `current_tokens`, int [batch * num_beams], and `beam_group`, the number of the group whose
    scores [batch * beams of a group, V] these are (it may be traced).

    Args:
        penalty: how much for each beam that chose a token (a strength).
        num_beams: beams of all groups.
        num_beam_groups: groups, of equal size.
    """
    number("diversity_penalty", penalty, lambda v: v > 0, "a number above 0")
    whole("num_beams", num_beams, 2)
    whole("num_beam_groups", num_beam_groups, 2)
    if num_beam_groups > num_beams:
        raise ValueError(f"num_beam_groups={num_beam_groups} is more than the num_beams={num_beams} that there are")
    return rule(
        "hamming_diversity",
        _hamming_diversity,
        {"penalty": penalty},
        {"beams": num_beams, "size": num_beams // num_beam_groups},
        ("current_tokens", "beam_group"),
    )


def _hamming_diversity(
    state: Tokens, scores: Array, *, penalty: Any, beams: int, size: int, current_tokens: Any, beam_group: Any
) -> Array:
    tokens = jnp.asarray(current_tokens).reshape(-1, beams)
    chosen = jnp.arange(beams) < jnp.asarray(beam_group) * size
    inputs, vocabulary = tokens.shape[0], scores.shape[-1]
    places = jnp.where(chosen, tokens, vocabulary)
    counts = jnp.zeros((inputs, vocabulary), scores.dtype)
    counts = counts.at[jnp.arange(inputs)[:, None], places].add(1, mode="drop")
    return scores - penalty * jnp.repeat(counts, scores.shape[0] // inputs, axis=0)


# ------------------------------------------------------------------------------------------------------------- guidance


def guidance(scale: Number) -> Rule:
    """Classifier-free guidance with log-probabilities (Sanchez et al. 2023, https://arxiv.org/abs/2306.17806).

    The processor needs `unconditional`, float [B, V]: the scores without the prompt, or with a negative one. At scale 1
    nothing is added to the normalised scores. scale is a strength.
    """
    number("guidance_scale", scale, math.isfinite, "a finite number")
    return rule("guidance", _guidance, {"scale": scale}, None, ("unconditional",))


def _guidance(state: Tokens, scores: Array, *, scale: Any, unconditional: Any) -> Array:
    with_prompt, without = jax.nn.log_softmax(scores, axis=-1), jax.nn.log_softmax(unconditional, axis=-1)
    return jnp.where(jnp.asarray(scale) == 1, with_prompt, scale * (with_prompt - without) + without)


def guidance_of_halves(scale: Number) -> Rule:
    """Classifier-free guidance between the halves of a batch (Copet et al. 2023, https://arxiv.org/abs/2306.05284).

    Scores [2B, V] become [B, V]; the first half has the prompt, the second has not. scale is a strength above 1.
    """
    number("guidance_scale", scale, lambda v: v > 1, "a number above 1")
    return rule("guidance_of_halves", _guidance_of_halves, {"scale": scale})


def _guidance_of_halves(state: Tokens, scores: Array, *, scale: Any) -> Array:
    with_prompt, without = _halves("guidance_of_halves", state, scores)
    return without + (with_prompt - without) * scale


def dia_guidance(scale: Number, top_k: int | None = None) -> Rule:
    """Dia's guidance between the halves of a batch: scores [2B, V] become [B, V].

    Args:
        scale: a strength above 1.
        top_k: the guided scores choose this many tokens, whose scores stay those with the prompt.
    """
    number("guidance_scale", scale, lambda v: v > 1, "a number above 1")
    if top_k is not None:
        _known_size("guidance_top_k", top_k)
    return rule("dia_guidance", _dia_guidance, {"scale": scale}, {"top_k": top_k})


def _dia_guidance(state: Tokens, scores: Array, *, scale: Any, top_k: int | None) -> Array:
    with_prompt, without = _halves("dia_guidance", state, scores)
    guided = with_prompt + (with_prompt - without) * scale
    return guided if top_k is None else jnp.where(_best(guided, top_k), with_prompt, NEVER)


def _halves(name: str, state: Tokens, scores: Array) -> tuple[Array, Array]:
    rows = state.ids.shape[0]
    if scores.shape[0] != 2 * rows:
        raise ValueError(
            f"{name} takes scores for both halves, {2 * rows} rows for {rows} rows of text, got {scores.shape[0]}"
        )
    return scores[:rows], scores[rows:]


# -------------------------------------------------------------------------------------------------------- speech, sound


def whisper_timestamps(
    no_timestamps_token_id: int,
    eos_token_id: int,
    begin: Number,
    *,
    max_initial_timestamp_index: int | None = None,
    detect_from_logprob: bool = True,
) -> Rule:
    """Whisper's rules: timestamps in pairs, never falling, one first (Radford et al. 2022, section 4.5).

    Args:
        no_timestamps_token_id: the token before the timestamps, which are all that follow it in the vocabulary.
        eos_token_id: the end; text tokens are the ids below it.
        begin: how long the text is where the transcript begins, as the reference counts (a strength).
        max_initial_timestamp_index: how late the first timestamp may be.
        detect_from_logprob: take a timestamp wherever all of them together are likelier than the likeliest other token.
    """
    return rule(
        "whisper_timestamps",
        _whisper_timestamps,
        {"begin": whole("begin", begin)},
        {
            "no_timestamps": token_ids("no_timestamps_token_id", no_timestamps_token_id, several=False)[0],
            "eos": token_ids("eos_token_id", eos_token_id, several=False)[0],
            "latest": max_initial_timestamp_index,
            "detect": bool(detect_from_logprob),
        },
    )


def _whisper_timestamps(
    state: Tokens, scores: Array, *, begin: Any, no_timestamps: int, eos: int, latest: int | None, detect: bool
) -> Array:
    size = scores.shape[-1]
    in_vocabulary("whisper_timestamps", (no_timestamps, eos), size)
    start = no_timestamps + 1
    vocabulary = jnp.arange(size)
    stamps = vocabulary >= start
    scores = jnp.where(vocabulary == no_timestamps, NEVER, scores)

    columns = jnp.arange(state.ids.shape[1])
    transcript = (columns >= state.first + begin) & (columns < state.length)
    said = jnp.maximum(state.count() - begin, 0)
    last = state.last(2)
    last_is = ((said >= 1) & (last[:, 1] >= start))[:, None]
    before_is = ((said < 2) | (last[:, 0] >= start))[:, None]
    scores = jnp.where(last_is & before_is & stamps, NEVER, scores)
    scores = jnp.where(last_is & ~before_is & (vocabulary < eos), NEVER, scores)

    # Timestamps never fall, and one that was the end of a segment does not come again as an end.
    places = jnp.where(transcript & (state.ids >= start), columns, -1).max(-1)
    latest_stamp = jnp.take_along_axis(state.ids, jnp.maximum(places, 0)[:, None], axis=1)
    lowest = latest_stamp + ~(last_is & ~before_is)
    scores = jnp.where((places >= 0)[:, None] & stamps & (vocabulary < lowest), NEVER, scores)

    allowed = stamps if latest is None else stamps & (vocabulary <= start + latest)
    scores = jnp.where((state.count() == begin) & ~allowed, NEVER, scores)
    if not detect or start >= size:
        return scores
    logs = jax.nn.log_softmax(scores, axis=-1)
    together = jax.nn.logsumexp(logs[:, start:], axis=-1)
    likelier = together > logs[:, :start].max(-1)
    return jnp.where(likelier[:, None] & ~stamps, NEVER, scores)


def no_speech_probability(scores: Array, token_id: int, *, are_logprobs: bool = False) -> Array:
    """The probability [B] that Whisper gives to silence, from the scores [B, V] at the start of a transcript."""
    in_vocabulary("no_speech_probability", token_ids("no_speech_token", token_id, several=False), scores.shape[-1])
    return (jnp.exp(scores) if are_logprobs else jax.nn.softmax(scores, axis=-1))[:, token_id]


def alternating_codebooks(start: Number, semantic_vocab_size: int, codebook_size: int) -> Rule:
    """Bark's coarse tokens: the first and the second codebook by turns.

    Args:
        start: how long the text is where they begin, as the reference counts (a strength).
        semantic_vocab_size: ids before the first codebook.
        codebook_size: ids of the first codebook; the second follows it.
    """
    return rule(
        "alternating_codebooks",
        _alternating_codebooks,
        {"start": whole("start", start)},
        {
            "before": _known_size("semantic_vocab_size", semantic_vocab_size),
            "size": _known_size("codebook_size", codebook_size),
        },
    )


def _alternating_codebooks(state: Tokens, scores: Array, *, start: Any, before: int, size: int) -> Array:
    ids = jnp.arange(scores.shape[-1])
    is_first = (state.count() - start) % 2 == 0
    allowed = jnp.where(is_first, (ids >= before) & (ids < before + size), ids >= before + size)
    return jnp.where(allowed, scores, NEVER)


def bark_eos(eos_token_id: int | Sequence[int], min_probability: Number) -> Rule:
    """The end, and nothing else, where its probability is above `min_probability` (a strength)."""
    return rule(
        "bark_eos",
        _bark_eos,
        {"least": number("min_eos_p", min_probability, lambda v: v > 0, "a number above 0")},
        {"eos": token_ids("eos_token_id", eos_token_id)},
    )


def _bark_eos(state: Tokens, scores: Array, *, least: Any, eos: tuple[int, ...]) -> Array:
    ends = _listed("bark_eos", eos, scores)
    over = (jnp.where(ends, jax.nn.softmax(scores, axis=-1), 0) > least).any(-1, keepdims=True)
    return jnp.where(over & ~ends, NEVER, scores)


def dia_eos_filter(num_channels: int, eos_token_id: int) -> Rule:
    """Dia ends in its first channel alone, and where the end is likeliest there.

    Scores are [batch * num_channels, V], the channels of an input together.
    """
    return rule(
        "dia_eos_filter",
        _dia_eos_filter,
        None,
        {
            "channels": _known_size("num_channels", num_channels),
            "eos": token_ids("eos_token_id", eos_token_id, several=False)[0],
        },
    )


def _dia_eos_filter(state: Tokens, scores: Array, *, channels: int, eos: int) -> Array:
    in_vocabulary("dia_eos_filter", (eos,), scores.shape[-1])
    ids = jnp.arange(scores.shape[-1])
    channel = jnp.arange(scores.shape[0]) % channels
    scores = jnp.where((ids > eos) | ((ids == eos) & (channel > 0)[:, None]), NEVER, scores)
    ends = (scores.argmax(-1) == eos)[:, None]
    return jnp.where(jnp.where(ends, ids < eos, ids == eos), NEVER, scores)


def dia_eos_delay(delay_pattern: Sequence[int], eos_token_id: int, max_length: Number) -> Rule:
    """Once Dia's first channel ends, each other one ends as many steps later as its delay says.

    Whether an input has ended is read from its text: its first channel, which ends at once, has the end there. So the
    first delay must be 0, and `dia_eos_filter` goes before it.

    Args:
        delay_pattern: steps, one a channel.
        eos_token_id: the end.
        max_length: how long the text can become (a strength).
    """
    delays = tuple(int(delay) for delay in delay_pattern)
    if not delays or delays[0] != 0 or min(delays) < 0:
        raise ValueError(f"delay_pattern must begin with 0 and have nothing below it, got {list(delay_pattern)}")
    return rule(
        "dia_eos_delay",
        _dia_eos_delay,
        {"most": whole("max_length", max_length, 1)},
        {"delays": delays, "eos": token_ids("eos_token_id", eos_token_id, several=False)[0]},
    )


def _dia_eos_delay(state: Tokens, scores: Array, *, most: Any, delays: tuple[int, ...], eos: int) -> Array:
    in_vocabulary("dia_eos_delay", (eos,), scores.shape[-1])
    channels = len(delays)
    columns = jnp.arange(state.ids.shape[1])
    new = (columns >= state.prompt) & (columns < state.length)
    ended = jnp.where(new & (state.ids[::channels] == eos), columns, state.ids.shape[1]).min(-1)
    now = (scores[::channels].argmax(-1) == eos) | (state.count() == most - max(delays) - 1)
    ended = jnp.minimum(ended, jnp.where(now, state.length, state.ids.shape[1]))
    since = jnp.where(ended < state.ids.shape[1], state.length - ended, -1)
    since = jnp.where((ended == state.length) & ~now, -1, since)
    forced = (since[:, None] == np.asarray(delays)).reshape(-1)
    return _force(scores, forced[:, None], jnp.arange(scores.shape[-1]) == eos)


# ------------------------------------------------------------------------------------------------------------- the list


def processors_of(
    config: GenerationConfig,
    *,
    encoder_ids: Any = None,
    prefix_allowed: Callable[[int, np.ndarray], Sequence[int]] | None = None,
    also: Sequence[Rule] = (),
) -> tuple[Rule, ...]:
    """The processors that settings ask for, in the reference's order.

    What needs something of the call says so in `needs`: with a `guidance_scale` the call hands in `unconditional`.

    Args:
        config: the settings.
        encoder_ids: int [B, S], the inputs of the encoder (of a decoder: the prompt), for the settings that look at it.
        prefix_allowed: a function for `prefix_allowed_tokens`.
        also: processors of your own; they come after the others and before those of sampling.

    Raises:
        ValueError: a setting that its processor cannot work with, or one that needs `encoder_ids` or the end.
    """
    c, out = config, list[Rule]()
    eos = c.eos_token_ids
    if c.guidance_scale is not None and c.guidance_scale != 1:
        out.append(guidance(c.guidance_scale))
    if c.sequence_bias is not None:
        out.append(sequence_bias(c.sequence_bias))
    if c.num_beam_groups > 1 and c.diversity_penalty is not None and c.diversity_penalty > 0:
        out.append(hamming_diversity(c.diversity_penalty, c.num_beams, c.num_beam_groups))
    if c.encoder_repetition_penalty is not None and c.encoder_repetition_penalty != 1.0:
        out.append(encoder_repetition_penalty(c.encoder_repetition_penalty, _needed(encoder_ids)))
    if c.repetition_penalty is not None and c.repetition_penalty != 1.0:
        out.append(repetition_penalty(c.repetition_penalty))
    if c.no_repeat_ngram_size is not None and c.no_repeat_ngram_size > 0:
        out.append(no_repeat_ngram(c.no_repeat_ngram_size))
    if c.encoder_no_repeat_ngram_size is not None and c.encoder_no_repeat_ngram_size > 0:
        out.append(encoder_no_repeat_ngram(c.encoder_no_repeat_ngram_size, _needed(encoder_ids)))
    if c.bad_words_ids is not None:
        out.append(bad_words(c.bad_words_ids, eos or None))
    if c.min_length is not None and c.min_length > 0 and eos:
        out.append(min_length(c.min_length, eos))
    if c.min_new_tokens is not None and c.min_new_tokens > 0 and eos:
        out.append(min_new_tokens(c.min_new_tokens, eos))
    if prefix_allowed is not None:
        out.append(prefix_allowed_tokens(prefix_allowed, c.num_beams))
    if c.forced_bos_token_id is not None:
        out.append(forced_bos(c.forced_bos_token_id))
    if c.forced_eos_token_id is not None:
        if c.max_new_tokens is not None:
            out.append(forced_eos(c.forced_eos_token_id, max_new_tokens=c.max_new_tokens))
        else:
            out.append(forced_eos(c.forced_eos_token_id, max_length=c.max_length))
    if c.remove_invalid_values is True:
        out.append(remove_invalid())
    if c.exponential_decay_length_penalty is not None:
        if len(c.exponential_decay_length_penalty) != 2:
            told = list(c.exponential_decay_length_penalty)
            raise ValueError(f"exponential_decay_length_penalty must be [start, factor], got {told}")
        if not eos:
            raise ValueError("exponential_decay_length_penalty needs an eos_token_id")
        start, factor = c.exponential_decay_length_penalty
        out.append(exponential_decay_length(int(start), factor, eos))
    if c.suppress_tokens:
        out.append(suppress_tokens(c.suppress_tokens))
    if c.begin_suppress_tokens:
        forced = c.forced_bos_token_id is not None
        out.append(suppress_at_begin(c.begin_suppress_tokens, after_forced_bos=forced))
    out.extend(also)
    if c.do_sample:
        out.extend(_sampling(c))
    if c.watermarking_config is not None:
        from formax.generation import watermark

        if isinstance(c.watermarking_config, SynthIDTextWatermarkingConfig):
            out.append(watermark.synthid(c.watermarking_config))
        else:
            out.append(watermark.green_list(c.watermarking_config))
    if c.renormalize_logits is True:
        out.append(renormalize())
    return tuple(out)


def _sampling(c: GenerationConfig) -> list[Rule]:
    # Beams need one token that goes on beside those that end.
    keep = (len(c.eos_token_ids) or 1) + 1 if c.num_beams > 1 else 1
    out = []
    if c.temperature is not None and c.temperature != 1.0:
        out.append(temperature(c.temperature))
    if c.top_k is not None and c.top_k != 0:
        out.append(top_k(c.top_k, min_tokens_to_keep=keep))
    if c.top_p is not None and c.top_p != 1.0:
        out.append(top_p(c.top_p, min_tokens_to_keep=keep))
    if c.min_p is not None:
        out.append(min_p(c.min_p, min_tokens_to_keep=keep))
    if c.typical_p is not None and c.typical_p != 1.0:
        out.append(typical(c.typical_p, min_tokens_to_keep=keep))
    if c.epsilon_cutoff is not None and c.epsilon_cutoff != 0.0:
        out.append(epsilon(c.epsilon_cutoff, min_tokens_to_keep=keep))
    if c.eta_cutoff is not None and c.eta_cutoff != 0.0:
        out.append(eta(c.eta_cutoff, min_tokens_to_keep=keep))
    return out


# -------------------------------------------------------------------------------------------------------------- helpers


def _listed(name: str, ids: tuple[int, ...], scores: Array) -> Array:
    """Bool [V]: the tokens of a list.

    Raises:
        ValueError: one that the vocabulary does not have.
    """
    size = scores.shape[-1]
    in_vocabulary(name, ids, size)
    out = np.zeros(size, bool)
    out[list(ids)] = True
    return jnp.asarray(out)


def _force(scores: Array, now: Any, ids: Array) -> Array:
    """Scores [B, V] with 0 for `ids` [V] and nothing else where `now`."""
    return jnp.where(now, jnp.where(ids, 0.0, NEVER).astype(scores.dtype), scores)


def _occurring(ids: Array, counts: Array, scores: Array) -> Array:
    """Bool [B, V]: the tokens of `ids` [B, S], at the places where `counts` [S] or [B, S] says so."""
    rows, size = scores.shape
    places = jnp.where(counts, ids, size)
    return jnp.zeros((rows, size), bool).at[jnp.arange(rows)[:, None], places].set(True, mode="drop")


def _penalised(scores: Array, which: Array, penalty: Any) -> Array:
    return jnp.where(which, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def _kth(scores: Array, k: int) -> Array:
    """[B, 1]: the k-th largest score."""
    return jax.lax.top_k(scores, min(k, scores.shape[-1]))[0][:, -1:]


def _best(scores: Array, k: int) -> Array:
    """Bool [B, V]: k tokens, the likeliest; of equal ones those with the smaller ids."""
    rows = jnp.arange(scores.shape[0])[:, None]
    places = jax.lax.top_k(scores, min(k, scores.shape[-1]))[1]
    return jnp.zeros(scores.shape, bool).at[rows, places].set(True)


def _unsort(values: Array, order: Array) -> Array:
    """Puts values [B, V] that are in the order `order` [B, V] back where they were."""
    return jnp.put_along_axis(jnp.zeros_like(values), order, values, axis=-1, inplace=False)


def _entropy(logs: Array) -> Array:
    """[B, 1]: the entropy of log-probabilities [B, V], in nats."""
    return -jnp.where(jnp.isneginf(logs), 0.0, logs * jnp.exp(logs)).sum(-1, keepdims=True)


def _filter(filter_value: float, min_tokens_to_keep: int) -> dict[str, Any]:
    return {
        "filter_value": float(number("filter_value", filter_value, lambda v: v == v, "a number")),
        "keep": _known_size("min_tokens_to_keep", min_tokens_to_keep),
    }


def _known_size(name: str, value: Any) -> int:
    if not known(value):
        raise ValueError(f"{name} decides shapes: it must be a whole number that is known, and is traced")
    return int(whole(name, value, 1))


def _rows(name: str, ids: Any) -> Any:
    if getattr(ids, "ndim", None) is None:
        ids = np.asarray(ids, np.int32)
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2:
        raise ValueError(f"{name} must be [rows, tokens], got the shape {ids.shape}")
    return ids


def _spread(name: str, ids: Any, scores: Array) -> Array:
    """The rows of `ids`, each repeated for the beams of its input."""
    ids = jnp.asarray(ids, jnp.int32)
    beams, rest = divmod(scores.shape[0], ids.shape[0])
    if rest or not beams:
        raise ValueError(f"{name}: {scores.shape[0]} rows of scores are no multiple of {ids.shape[0]} rows of inputs")
    return jnp.repeat(ids, beams, axis=0)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _needed(encoder_ids: Any) -> Any:
    if encoder_ids is None:
        raise ValueError("these settings look at the encoder's input: pass encoder_ids")
    return encoder_ids
