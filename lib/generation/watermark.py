"""Watermarks: scores that carry a secret pattern, and the detectors that find it.

`green_list` is the watermark of Kirchenbauer et al. (2023, https://arxiv.org/abs/2301.10226), found by
`WatermarkDetector`. `synthid` is that of Dathathri et al. (2024, https://www.nature.com/articles/s41586-024-08025-4),
found by `SynthIDDetector`. Texts are marked as the reference marks them on a CPU: a detector here finds its texts and
the other way round. For that, its random numbers (the Mersenne Twister) and its 64-bit hashes are computed here with
32-bit integers, on the device and without 64-bit mode.

B rows, L columns of the buffer, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from formax.generation.config import SynthIDTextWatermarkingConfig, WatermarkingConfig
from formax.generation.state import Rule, Tokens, rule

# Of the hash table by which "selfhash" scatters token ids.
TABLE = 1_000_003
# How many of the likeliest tokens "selfhash" looks at.
CANDIDATES = 40
_WORDS, _MIDDLE = 624, 397
_MULTIPLIER = 6364136223846793005


# ------------------------------------------------------------------------------------------------- the Mersenne Twister


def _draws(seeds: Array, count: int) -> Array:
    """uint32 [N, count]: the first numbers of a Mersenne Twister for each of N seeds (uint32)."""

    def grow(word: Array, i: Array) -> tuple[Array, Array]:
        word = jnp.uint32(1812433253) * (word ^ (word >> 30)) + i
        return word, word

    _, rest = jax.lax.scan(grow, seeds, jnp.arange(1, _WORDS, dtype=jnp.uint32))
    words = jnp.concatenate([seeds[None], rest])

    def step(words: Array, _: None) -> tuple[Array, Array]:
        words = _twist(words)
        return words, _tempered(words)

    _, out = jax.lax.scan(step, words, None, length=-(-count // _WORDS))
    return out.reshape(-1, seeds.shape[0])[:count].T


def _twist(words: Array) -> Array:
    """The next 624 words [624, N]; those that depend on new ones come in four parts, each computed at once."""

    def mixed(high: Array, low: Array) -> Array:
        y = (high & jnp.uint32(0x80000000)) | (low & jnp.uint32(0x7FFFFFFF))
        return (y >> 1) ^ jnp.where(y & 1, jnp.uint32(0x9908B0DF), jnp.uint32(0))

    step = mixed(words[:-1], words[1:])
    ahead = _WORDS - _MIDDLE
    a = words[_MIDDLE:] ^ step[:ahead]
    b = a ^ step[ahead : 2 * ahead]
    c = b[: _WORDS - 1 - 2 * ahead] ^ step[2 * ahead :]
    last = b[_MIDDLE - 1 - ahead] ^ mixed(words[-1], a[0])
    return jnp.concatenate([a, b, c, last[None]])


def _tempered(y: Array) -> Array:
    y = y ^ (y >> 11)
    y = y ^ ((y << 7) & jnp.uint32(0x9D2C5680))
    y = y ^ ((y << 15) & jnp.uint32(0xEFC60000))
    return y ^ (y >> 18)


def shuffled(seeds: Array, size: int, count: int) -> Array:
    """The first `count` numbers of a shuffle of 0..size-1, int32 [N, count], for each of N seeds (uint32).

    The shuffle is that of Fisher and Yates: step i swaps the places i and i + (draw mod (size - i)). Its steps are not
    taken one after the other. Step i moves to its target what stood at i, so what stands anywhere is found by following
    the swaps back, for all steps at once, along a chain that every round makes twice as short.
    """
    if count == 0:
        return jnp.zeros((seeds.shape[0], 0), jnp.int32)
    steps = jnp.arange(count, dtype=jnp.int32)
    draws = _draws(seeds, count) % (size - steps).astype(jnp.uint32)
    targets = draws.astype(jnp.int32) + steps
    return jax.vmap(partial(_followed, count=count))(targets)


def _followed(targets: Array, *, count: int) -> Array:
    steps = jnp.arange(count, dtype=jnp.int32)
    # The step that last put something at place j before step j; j itself if none did.
    moved = jnp.where(targets > steps, targets, count)
    source = jnp.full(count, -1, jnp.int32).at[moved].max(steps, mode="drop")
    source = jnp.where(source < 0, steps, source)
    # A loop, since XLA would fuse look-ups in look-ups into one expression that doubles with every one of them.
    source = jax.lax.fori_loop(0, max(count - 1, 1).bit_length(), lambda _, chain: chain[chain], source)
    # The step before i with the same target: it left there what stood at its own place.
    order = jnp.argsort(targets, stable=True)
    same = targets[order[1:]] == targets[order[:-1]]
    before = jnp.full(count, -1, jnp.int32).at[order[1:]].set(jnp.where(same, order[:-1].astype(jnp.int32), -1))
    return jnp.where(before < 0, targets, source[jnp.maximum(before, 0)])


@lru_cache(maxsize=8)
def _table(key: int) -> np.ndarray:
    """int32 [TABLE]: a shuffle of 0..TABLE-1."""
    twister = np.random.MT19937()
    twister._legacy_seeding(key & 0xFFFFFFFF)
    steps = np.arange(TABLE - 1)
    targets = (steps + twister.random_raw(TABLE - 1).astype(np.int64) % (TABLE - steps)).tolist()
    values = list(range(TABLE))
    for i, j in enumerate(targets):
        values[i], values[j] = values[j], values[i]
    return np.asarray(values, np.int32)


# ------------------------------------------------------------------------------------------ 64-bit numbers in two words

Long = tuple[Array, Array]
"""A 64-bit number: its high and its low word, uint32."""


def _long(value: int) -> Long:
    value %= 2**64
    return jnp.uint32(value >> 32), jnp.uint32(value & 0xFFFFFFFF)


def _spread(a: Long, shape: tuple[int, ...]) -> Long:
    return jnp.broadcast_to(a[0], shape), jnp.broadcast_to(a[1], shape)


def _add(a: Long, b: Long) -> Long:
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]).astype(jnp.uint32), low


def _multiply(a: Long, b: Long) -> Long:
    half = jnp.uint32(0xFFFF)
    a1, a0, b1, b0 = a[1] >> 16, a[1] & half, b[1] >> 16, b[1] & half
    low = a0 * b0
    middle = a1 * b0 + (low >> 16)
    other = a0 * b1 + (middle & half)
    high = a1 * b1 + (middle >> 16) + (other >> 16)
    return high + a[0] * b[1] + a[1] * b[0], a[1] * b[1]


def _remainder(a: Long, size: int) -> Array:
    """A signed number modulo `size`, at most 2^24, as Python has it; int32."""
    m = jnp.uint32(size)
    out = jnp.zeros_like(a[0])
    for word in a:
        for shift in (24, 16, 8, 0):
            out = ((out << 8) | ((word >> shift) & jnp.uint32(0xFF))) % m
    below = m - jnp.uint32(2**64 % size)
    return jnp.where(a[0] >> 31, (out + below) % m, out).astype(jnp.int32)


def _hashed(a: Long, b: Long) -> Long:
    """One more number in a hash: (a + b) * multiplier + 1."""
    return _add(_multiply(_add(a, b), _long(_MULTIPLIER)), _long(1))


# ---------------------------------------------------------------------------------------------------------- green lists


def green_list(config: WatermarkingConfig) -> Rule:
    """Adds `bias` (a strength) to a share of the vocabulary that the tokens before decide.

    With "selfhash" a token takes part in deciding whether it is green itself; the 40 likeliest are tried.

    Raises:
        ConfigError: settings that make no watermark.
        ValueError: a share that leaves all or nothing green, or a key that is too large.
    """
    config.check()
    _check_green(config)
    return rule(
        "green_list",
        _green_list,
        {"bias": config.bias},
        {
            "ratio": config.greenlist_ratio,
            "key": config.hashing_key,
            "own": config.seeding_scheme == "selfhash",
            "width": config.context_width,
        },
    )


def _check_green(config: WatermarkingConfig) -> None:
    if not 0 < config.greenlist_ratio < 1:
        raise ValueError(f"greenlist_ratio must be between 0 and 1, and neither, got {config.greenlist_ratio!r}")
    if not 0 < config.hashing_key < 2**32:
        raise ValueError(f"hashing_key must be between 1 and 2^32 - 1, got {config.hashing_key!r}")


def _green_list(state: Tokens, scores: Array, *, bias: Any, ratio: float, key: int, own: bool, width: int) -> Array:
    rows, size = scores.shape
    if own:
        count = min(CANDIDATES, size)
        candidates = jnp.argsort(-scores, axis=-1)[:, :count].astype(jnp.int32)
        before = jnp.broadcast_to(state.last(width - 1, missing=0)[:, None], (rows, count, width - 1))
        texts = jnp.concatenate([before, candidates[..., None]], axis=-1).reshape(rows * count, width)
        seeds = _self_seeds(texts, key)
        green = _is_green(seeds, candidates.reshape(-1), size, int(size * ratio)).reshape(rows, count)
        places = jnp.where(green, candidates, size)
    else:
        places = shuffled(_left_seeds(state.last(1, missing=0)[:, 0], key), size, int(size * ratio))
    chosen = jnp.zeros(scores.shape, bool).at[jnp.arange(rows)[:, None], places].set(True, mode="drop")
    return jnp.where(chosen & (state.count() >= width), scores + bias, scores)


def _left_seeds(tokens: Array, key: int) -> Array:
    # Of the product only the low word becomes a seed.
    return jnp.uint32(key) * tokens.astype(jnp.uint32)


def _self_seeds(texts: Array, key: int) -> Array:
    """uint32 [N]: the seeds after texts [N, width] whose last token is the one in question."""
    table = jnp.asarray(_table(key))
    a = (table[texts % TABLE] + 1).astype(jnp.uint32)
    zero = jnp.zeros_like(a)
    product = _multiply(_multiply((zero, jnp.full_like(a, key)), (zero, a)), (zero, a[:, -1:]))
    # The smallest of the products as signed numbers: the sign bit turned, unsigned order is signed order.
    high, low = product[0] ^ jnp.uint32(0x80000000), product[1]
    least = high.min(-1, keepdims=True)
    low = jnp.where(high == least, low, jnp.uint32(0xFFFFFFFF)).min(-1)
    # Taken modulo 2^64 - 1: what is below zero loses one.
    return low - ((least[:, 0] ^ jnp.uint32(0x80000000)) >> 31)


def _is_green(seeds: Array, tokens: Array, size: int, count: int) -> Array:
    """Bool [N]: whether a token [N] is in the green list of `count` tokens that its seed [N] gives."""
    return (shuffled(seeds, size, count) == tokens[:, None]).any(-1)


@dataclass(frozen=True)
class WatermarkReport:
    """What a detector found, one number a row.

    Attributes:
        num_tokens_scored: tokens that could be green.
        num_green_tokens: those that are.
        green_fraction: their share.
        z_score: how many standard deviations above what chance gives.
        p_value: how likely chance gives as much.
        prediction: whether the text carries the watermark.
        confidence: 1 - p_value.
    """

    num_tokens_scored: np.ndarray
    num_green_tokens: np.ndarray
    green_fraction: np.ndarray
    z_score: np.ndarray
    p_value: np.ndarray
    prediction: np.ndarray
    confidence: np.ndarray


@dataclass(frozen=True)
class WatermarkDetector:
    """Tells texts with the watermark of `green_list` from others.

    Attributes:
        config: the settings with which the text was made.
        vocab_size: of the model that made it.
        bos_token_id: a first token that is left out; of an encoder-decoder, its decoder_start_token_id.
        ignore_repeated_ngrams: count every sequence of tokens once.
    """

    config: WatermarkingConfig
    vocab_size: int
    bos_token_id: int | None = None
    ignore_repeated_ngrams: bool = False

    def __post_init__(self) -> None:
        self.config.check()
        _check_green(self.config)

    def __call__(self, input_ids: Any, z_threshold: float = 3.0) -> WatermarkReport:
        """Looks at texts.

        Args:
            input_ids: int [B, T].
            z_threshold: above it a text counts as watermarked.

        Raises:
            ValueError: not two axes, a token outside the vocabulary, or texts too short to be scored.
        """
        ids = np.asarray(input_ids)
        if ids.ndim != 2:
            raise ValueError(f"input_ids must be [rows, tokens], got the shape {ids.shape}")
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise ValueError(f"input_ids has tokens outside the vocabulary of {self.vocab_size}")
        if ids.size and ids[0, 0] == self.bos_token_id:
            ids = ids[:, 1:]
        width = self.config.context_width
        if ids.shape[1] - width < 1:
            raise ValueError(f"a text of {ids.shape[1]} tokens is too short: the first {width} of it cannot be scored")
        own = self.config.seeding_scheme == "selfhash"
        texts = np.lib.stride_tricks.sliding_window_view(ids, width if own else width + 1, axis=1)
        shape = len(ids), -1
        flat, where = np.unique(texts.reshape(-1, texts.shape[2]), axis=0, return_inverse=True)
        green = self._green(flat)[where.reshape(-1)].reshape(shape)
        if self.ignore_repeated_ngrams:
            firsts = [np.unique(row, return_index=True)[1] for row in where.reshape(shape)]
            scored = np.asarray([len(row) for row in firsts], float)
            found = np.asarray([green[i, row].sum() for i, row in enumerate(firsts)], float)
        else:
            scored = np.full(len(ids), float(green.shape[1]))
            found = green.sum(1).astype(float)
        ratio = self.config.greenlist_ratio
        z = (found - ratio * scored) / np.sqrt(scored * ratio * (1 - ratio))
        p = 1 - 0.5 * (1 + np.sign(z) * (1 - np.exp(-2 * z**2 / np.pi)))
        return WatermarkReport(scored, found, found / scored, z, p, z > z_threshold, 1 - p)

    def _green(self, texts: np.ndarray) -> np.ndarray:
        """Bool [N]: whether the last tokens of texts [N, n] are green."""
        key, size = self.config.hashing_key, self.vocab_size
        tokens = jnp.asarray(texts, jnp.int32)
        own = self.config.seeding_scheme == "selfhash"
        seeds = _self_seeds(tokens, key) if own else _left_seeds(tokens[:, -2], key)
        count = int(size * self.config.greenlist_ratio)
        # A few at a time: each of them is a shuffle of the vocabulary. One compiled shape for all lengths.
        step, n = 32, len(texts)
        pad = -n % step
        seeds = jnp.pad(seeds, (0, pad)).reshape(-1, step)
        last = jnp.pad(tokens[:, -1], (0, pad)).reshape(-1, step)
        return np.concatenate([_some_green(s, t, size, count) for s, t in zip(seeds, last, strict=True)])[:n]


_some_green = jax.jit(_is_green, static_argnums=(2, 3))


# -------------------------------------------------------------------------------------------------------------- SynthID


def synthid(config: SynthIDTextWatermarkingConfig) -> Rule:
    """Scores after a tournament of tokens, whose coin flips the tokens before decide.

    A context that was there before is left alone. What was there is read from the text, so nothing is carried along.

    Raises:
        ConfigError: settings that make no watermark.
        ValueError: sequences of fewer than 2 tokens, or no keys.
    """
    config.check()
    _check_synthid(config)
    return rule("synthid", _synthid, {"table": _flips(config)}, {"config": config})


def _check_synthid(config: SynthIDTextWatermarkingConfig) -> None:
    if config.ngram_len < 2:
        raise ValueError(f"ngram_len must be 2 or more tokens, got {config.ngram_len!r}")
    if not config.keys or not all(-(2**63) <= key < 2**63 for key in config.keys):
        raise ValueError(f"keys must be numbers of at most 64 bits, one or more, got {list(config.keys)}")
    if config.sampling_table_size < 1 or config.context_history_size < 1:
        raise ValueError("sampling_table_size and context_history_size must be 1 or more")


def _flips(config: SynthIDTextWatermarkingConfig) -> np.ndarray:
    """int8 [table size]: coin flips."""
    twister = np.random.MT19937()
    twister._legacy_seeding(config.sampling_table_seed & 0xFFFFFFFF)
    return (twister.random_raw(config.sampling_table_size) % 2).astype(np.int8)


def _synthid(state: Tokens, scores: Array, *, table: Any, config: SynthIDTextWatermarkingConfig) -> Array:
    rows, size = scores.shape
    if config.debug_mode:
        scores = jnp.ones_like(scores)
    width = config.ngram_len - 1

    # The hash of the context before every column of the new text (whose beginning is filled with zeros), and of the
    # column after the buffer.
    places = jnp.arange(state.ids.shape[1] + 1)
    hashes = _spread(_long(1), (rows, places.size))
    for back in range(width, 0, -1):
        column = places - back
        there = (column >= state.prompt) & (column < state.length)
        ids = jnp.where(there, jnp.take(state.ids, jnp.clip(column, 0, state.ids.shape[1] - 1), axis=1), 0)
        hashes = _hashed(hashes, (jnp.zeros_like(ids, jnp.uint32), ids.astype(jnp.uint32)))
    now = jnp.take(hashes[0], state.length, axis=1), jnp.take(hashes[1], state.length, axis=1)

    earliest = state.prompt + (width if config.skip_first_ngram_calls else 0)
    recorded = (places >= jnp.maximum(earliest, state.length - config.context_history_size)) & (places < state.length)
    same = (hashes[0] == now[0][:, None]) & (hashes[1] == now[1][:, None])
    repeated = (same & recorded).any(-1)
    # The reference's memory is full of zeros at first.
    repeated |= (now[0] == 0) & (now[1] == 0) & (recorded.sum() < config.context_history_size)

    of_tokens = _hashed((now[0][:, None], now[1][:, None]), (jnp.uint32(0), jnp.arange(size, dtype=jnp.uint32)[None]))
    keys = np.asarray([key % 2**64 for key in config.keys], np.uint64)
    words = (
        jnp.asarray((keys >> np.uint64(32)).astype(np.uint32)),
        jnp.asarray((keys & np.uint64(0xFFFFFFFF)).astype(np.uint32)),
    )

    def layer(probabilities: Array, key: Long) -> tuple[Array, None]:
        # The hash of one key more, not of all keys so far: every layer begins anew.
        flips = jnp.asarray(table)[_remainder(_hashed(of_tokens, key), len(table))].astype(probabilities.dtype)
        mass = (flips * probabilities).sum(-1, keepdims=True)
        return probabilities * (1 + flips - mass), None

    probabilities, _ = jax.lax.scan(layer, jax.nn.softmax(scores, axis=-1), words)
    logs = jnp.log(probabilities)
    logs = jnp.where(jnp.isfinite(logs), logs, jnp.finfo(logs.dtype).min)
    asleep = config.skip_first_ngram_calls & (state.new() + 1 < config.ngram_len)
    return jnp.where(repeated[:, None] | asleep, scores, logs)


@dataclass(frozen=True)
class SynthIDDetector:
    """How likely texts carry the watermark of `synthid`, by a small model of what it leaves behind.

    Attributes:
        config: the settings with which the text was made.
        beta: float [depth], depth being the number of keys; trained.
        delta: float [depth, depth]; trained.
        prior: how likely a text is watermarked before it is seen; trained.
        eos_token_id: what follows it does not count.
    """

    config: SynthIDTextWatermarkingConfig
    beta: np.ndarray
    delta: np.ndarray
    prior: float
    eos_token_id: int

    def __post_init__(self) -> None:
        self.config.check()
        _check_synthid(self.config)
        depth = len(self.config.keys)
        for name, shape in (("beta", (depth,)), ("delta", (depth, depth))):
            value = np.asarray(getattr(self, name), np.float32)
            if value.size != math.prod(shape):
                raise ValueError(f"{name} must have the shape {shape} for {depth} keys, got {value.shape}")
            object.__setattr__(self, name, value.reshape(shape))

    def __call__(self, input_ids: Any) -> np.ndarray:
        """The probability of a watermark, float32 [B], in texts int [B, T].

        Raises:
            ValueError: not two axes, or texts shorter than `ngram_len`.
        """
        ids = np.asarray(input_ids, np.int64)
        before_end = (np.cumsum(ids == self.eos_token_id, axis=1) == 0)[:, self.config.ngram_len - 1 :]
        return self.posterior(g_values(self.config, ids), unrepeated(self.config, ids) & before_end)

    def posterior(self, flips: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The probability [B] of a watermark, from coin flips [B, T', depth] where `mask` [B, T'] says they count."""
        earlier = np.tril(np.broadcast_to(flips[..., None, :], (*flips.shape, flips.shape[-1])), -1)
        logits = (self.delta * earlier).sum(-1) + self.beta
        two = 1 / (1 + np.exp(-logits.astype(np.float32)))
        marked = 0.5 * ((flips + 0.5) * two + (1 - two))
        odds = np.log(np.maximum(marked, 1e-30)) - np.log(0.5)
        prior = min(max(self.prior, 1e-5), 1 - 1e-5)
        surprise = (odds * mask[..., None]).sum((1, 2)) + math.log(prior) - math.log(1 - prior)
        return np.asarray(1 / (1 + np.exp(-surprise)), np.float32)


def _windows(config: SynthIDTextWatermarkingConfig, ids: Any, width: int) -> np.ndarray:
    ids = np.asarray(ids, np.int64)
    if ids.ndim != 2 or ids.shape[1] < width:
        raise ValueError(f"texts must be [rows, tokens] with {config.ngram_len} tokens or more, got {ids.shape}")
    return np.lib.stride_tricks.sliding_window_view(ids, width, axis=1)


def _hash(start: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """uint64: the hashes `start` with the numbers of texts [.., n] in them too."""
    for i in range(texts.shape[-1]):
        start = (start + texts[..., i].astype(np.uint64)) * np.uint64(_MULTIPLIER) + np.uint64(1)
    return start


def g_values(config: SynthIDTextWatermarkingConfig, input_ids: Any) -> np.ndarray:
    """The coin flips of every token that has enough before it: int64 [B, T - ngram_len + 1, number of keys]."""
    texts = _windows(config, input_ids, config.ngram_len)
    hashes = _hash(np.ones(texts.shape[:2], np.uint64), texts)
    keys = np.asarray(config.keys, np.int64).astype(np.uint64)
    hashes = _hash(hashes[..., None], np.broadcast_to(keys[:, None], (*hashes.shape, len(keys), 1)))
    return _flips(config)[hashes.astype(np.int64) % config.sampling_table_size].astype(np.int64)


def unrepeated(config: SynthIDTextWatermarkingConfig, input_ids: Any) -> np.ndarray:
    """Which tokens have a context that was not there before: bool [B, T - ngram_len + 1]."""
    texts = _windows(config, input_ids, config.ngram_len)[..., :-1]
    hashes = _hash(np.ones(texts.shape[:2], np.uint64), texts)
    out = np.ones(hashes.shape, bool)
    for row, values in enumerate(hashes):
        seen: dict[int, int] = {}
        for i, value in enumerate(values.tolist()):
            out[row, i] = i - seen.get(value, -math.inf) > config.context_history_size
            seen[value] = i
    return out
