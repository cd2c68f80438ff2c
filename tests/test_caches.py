"""Kinds of caches: rings, few bits, the host's memory. Each is measured by what the full cache does."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import formax
from formax.core.config import ConfigError
from formax.generation.cache_kinds import FULL, FewBits, OnHost, Rings, as_kind, kind_of, windows_of
from formax.generation.config import GenerationConfig, GenerationMode
from formax.generation.legacy import from_legacy_cache, to_legacy_cache
from formax.generation.task import task_of
from formax.layers.attention import ALiBi, Bucketed, KVCache, Mask
from formax.layers.attention.cache import caches_of, rewind, take_rows
from formax.layers.attention.offloaded import OffloadedCache
from formax.layers.attention.quantised import Quantised, QuantisedCache
from formax.layers.attention.ring import RingCache
from formax.layers.attention.sink import SinkCache
from formax.model import Model

WINDOW = 7
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # so that tokens decide what follows
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def llama() -> Model:
    config = formax.AutoConfig.for_model("llama", **SIZES)
    return formax.AutoModelForCausalLM.from_config(config, key=jax.random.key(1))


@pytest.fixture(scope="module")
def windowed() -> Model:
    config = formax.AutoConfig.for_model("mixtral", **SIZES, sliding_window=WINDOW, num_local_experts=2)
    return formax.AutoModelForCausalLM.from_config(config, key=jax.random.key(2))


def ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 61, (rows, length))


def size_of(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


# ---------------------------------------------------------------------------------------------------------------- rings


def test_ring_writes_what_the_full_cache_writes(windowed: Model) -> None:
    asked: Any = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_scores": True}
    # Shorter and longer than the window, filled up to 16 for the same program; row 0 is padded on the left.
    for length in (5, 14):
        prompt = ids(2, length)
        prompt[0, :2] = 0
        full = windowed.generate(prompt, **asked)
        ring = windowed.generate(prompt, cache_implementation="sliding_window", **asked)
        np.testing.assert_array_equal(ring.sequences, full.sequences)
        np.testing.assert_allclose(jnp.stack(ring.scores), jnp.stack(full.scores), atol=2e-4)
        assert all(isinstance(one, RingCache) and one.k.shape[1] == WINDOW for one in caches_of(ring.cache))
        assert int(ring.cache[0].length) == length + 11
    # A cache is gone on with.
    longer = np.concatenate([np.asarray(ring.sequences), ids(2, 3, 1)], axis=1)
    again = windowed(longer[:, 25:], cache=ring.cache).logits[1, -1]
    np.testing.assert_allclose(again, windowed(longer).logits[1, -1], atol=2e-4)
    task = task_of(windowed, longer, cache=ring.cache, given={"max_new_tokens": 4})
    assert (int(task.prompt.start), isinstance(task.prompt.cache[0], RingCache)) == (25, True)


def attended(cache: Any, pieces: list[int], mask: Any, bias: Any = None) -> np.ndarray:
    """Attention of a text of 23 positions in `pieces`, through a cache: [2, 23, 4, 8]."""
    total = sum(pieces)
    q, k, v = (jax.random.normal(jax.random.key(i), (2, total, h, 8)) for i, h in ((0, 4), (1, 2), (2, 2)))
    out, start = [], 0
    attend = jax.jit(lambda cache, q, k, v: cache.attend(q, k, v, mask=mask(cache), bias=bias))
    for n in pieces:
        x, cache = attend(cache, *(x[:, start : start + n] for x in (q, k, v)))
        out.append(x)
        start += n
    return np.asarray(jnp.concatenate(out, axis=1))


SEEN = jnp.ones((2, 23), bool).at[0, :3].set(False).at[1, 9].set(False)
SLOPES = jnp.array([0.5, 0.25, 0.125, 0.1])


@pytest.mark.parametrize(
    ("what", "bias"),
    [
        ({"keys": SEEN}, ALiBi(SLOPES)),
        (
            {"segments": (jnp.zeros((1, 1), int), jnp.where(SEEN, 0, 1))},
            Bucketed(jax.random.normal(jax.random.key(5), (8, 4)), 16, False),
        ),
        (
            {"dense": jax.random.bernoulli(jax.random.key(3), 0.8, (2, 4, 1, 23))},
            jax.random.normal(jax.random.key(4), (4, 1, 23)),
        ),
    ],
    ids=["keys", "segments", "dense"],
)
def test_ring_translates_masks_and_biases(what: dict[str, Any], bias: Any) -> None:
    def mask(cache: Any) -> Mask:
        return Mask(causal=True, window=(WINDOW - 1, None), q_offset=cache.length, **what)

    pieces = [1, 1, 9, 1, 1, 9, 1] if "segments" not in what else [1] * 23
    full = attended(KVCache.empty(2, 23, 2, 8), pieces, mask, bias)
    ring = attended(RingCache.empty(2, 23, 2, 8, window=WINDOW), pieces, mask, bias)
    np.testing.assert_allclose(ring, full, atol=1e-5)


def test_ring_grows_and_branches() -> None:
    @partial(jax.jit, static_argnums=(1, 2))
    def after(cache: Any, start: int, end: int) -> tuple[jax.Array, Any]:
        mask = Mask(causal=True, window=(WINDOW - 1, None), q_offset=cache.length)
        return cache.attend(q[:, start:end], k[:, start:end], v[:, start:end], mask=mask)

    q, k, v = (jax.random.normal(jax.random.key(i), (2, 9, 2, 8)) for i in range(3))
    _, ring = after(RingCache.empty(2, 4, 2, 8, window=WINDOW), 0, 4)
    assert ring.k.shape[1] == 4
    x, _ = after(ring.grown(14), 4, 9)
    y, _ = after(after(KVCache.empty(2, 14, 2, 8), 0, 4)[1], 4, 9)
    np.testing.assert_allclose(x, y, atol=1e-5)
    # As beams do: other texts go on from these rows.
    rows = take_rows((ring,), jnp.array([1, 1]))[0]
    z, _ = after(rows.grown(14), 4, 9)
    assert rows.window == WINDOW
    np.testing.assert_array_equal(rows.k[0], ring.k[1])
    assert np.abs(z[0] - x[0]).max() > 1e-2
    assert ring.grown(6).k.shape[1] == 6
    assert ring.grown(14).k.shape[1] == WINDOW


def test_masks_of_other_positions() -> None:
    """What lies beyond a padding mask is no padding, beyond pairs there are none."""
    keys, positions = jnp.array([[True, False, True]]), jnp.array([1, 2, 5])
    assert np.asarray(Mask(keys=~keys).picked(positions).keys).tolist() == [[True, False, True]]
    assert np.asarray(Mask(dense=keys[:, None, None]).picked(positions).dense).tolist() == [[[[False, True, False]]]]
    moved = Mask(causal=True, q_offset=4, kv_length=jnp.array([4]), prefix=jnp.array([1])).since(jnp.int32(2), 3)
    assert [np.asarray(x).tolist() for x in (moved.q_offset, moved.kv_length, moved.prefix)] == [2, [2], [0]]
    assert np.asarray(Mask(keys=keys).since(jnp.int32(-1), 3).keys).tolist() == [[False, True, False]]


def test_ring_refuses_what_it_cannot_see() -> None:
    x = jnp.ones((1, 1, 2, 8))
    ring = RingCache.empty(1, 9, 2, 8, window=WINDOW)
    with pytest.raises(ValueError, match="keeps 7 positions, the layer's mask lets a position see 8"):
        ring.attend(x, x, x, mask=Mask(causal=True, window=(7, None)))
    with pytest.raises(ValueError, match="see all before it"):
        ring.attend(x, x, x, mask=Mask(causal=True))
    with pytest.raises(NotImplementedError, match="does not know this bias"):
        ring.attend(x, x, x, mask=Mask(causal=True, window=(6, None)), bias=lambda q, k: None)
    with pytest.raises(TypeError, match="RingCache cannot go back"):
        rewind((ring,), 3)
    with pytest.raises(ValueError, match="window=0"):
        RingCache.empty(1, 9, 2, 8, window=0)


# ------------------------------------------------------------------------------------------------------------- few bits


@pytest.mark.parametrize(("bits", "steps"), [(8, 254), (4, 15), (2, 3)])
def test_few_bits_are_off_by_half_a_step(bits: int, steps: int) -> None:
    x = 3 * jax.random.normal(jax.random.key(0), (2, 5, 3, 32)) + (bits < 8)
    few = Quantised.of(x, bits, 16, jnp.float32)
    parts = np.asarray(x).reshape(2, 5, 3, 2, 16)
    spread = 2 * np.abs(parts).max(-1) if bits == 8 else parts.max(-1) - parts.min(-1)
    error = np.abs(np.asarray(few.numbers(jnp.float32)).reshape(parts.shape) - parts).max(-1)
    assert (error <= spread / steps / 2 * 1.001 + 1e-6).all()
    assert error.max() > spread.min() / steps / 5  # they are few
    assert few.codes.shape[-1] == 32 * bits // 8
    assert jnp.all(Quantised.of(jnp.zeros((1, 16)), bits, 16, jnp.float32).numbers(jnp.float32) == 0)


@pytest.mark.parametrize(("bits", "bytes_each"), [(8, 2 * (128 + 2 * 2)), (4, 2 * (64 + 2 * 4)), (2, 2 * (32 + 2 * 4))])
def test_few_bits_take_few_bytes(bits: int, bytes_each: int) -> None:
    """Of a position and a head of 128 channels in bfloat16, which take 512 bytes as they are."""
    empty = {"bits": bits, "residual": 0}
    small, large = (size_of(QuantisedCache.empty(1, n, 1, 128, jnp.bfloat16, **empty)) for n in (1000, 2000))
    assert (large - small) / 1000 == bytes_each
    kept = size_of(QuantisedCache.empty(1, 1000, 1, 128, jnp.bfloat16, bits=bits, residual=100)) - small
    assert kept == 100 * (512 + 4)


def test_few_bits_see_the_newest_as_they_are() -> None:
    def mask(cache: Any) -> Mask:
        return Mask(causal=True, q_offset=cache.length, window=(4, None))

    pieces = [9, 1, 1, 1, 9, 1, 1]
    full = attended(KVCache.empty(2, 23, 2, 8), pieces, mask)
    few = {"bits": 2, "group": 8}
    exact = attended(QuantisedCache.empty(2, 23, 2, 8, residual=4, **few), pieces, mask)
    np.testing.assert_allclose(exact, full, atol=1e-5)
    rough = attended(QuantisedCache.empty(2, 23, 2, 8, residual=3, **few), pieces, mask)
    assert np.abs(rough - full).max() > 1e-2


def test_few_bits_go_back_and_grow() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 20, 2, 8)) for i in range(3))
    other = jax.random.normal(jax.random.key(9), (2, 20, 2, 8))

    @partial(jax.jit, static_argnums=(2, 3))
    def after(cache: Any, x: jax.Array, start: int, end: int) -> tuple[jax.Array, Any]:
        mask = Mask(causal=True, q_offset=cache.length)
        return cache.attend(q[:, start:end], x[:, start:end], v[:, start:end], mask=mask)

    empty = QuantisedCache.empty(2, 20, 2, 8, bits=4, group=8, residual=5)
    _, straight = after(empty, k, 0, 8)
    _, strayed = after(straight, other, 8, 12)
    back = strayed.rewound(8)
    assert (back.room, back.grown(21).room, back.grown(3).room) == (20, 21, 20)
    assert int(back.length) == 8
    # Four of the five newest were overwritten: they are read in few bits now, and never as what overwrote them.
    x, _ = after(back, k, 8, 20)
    y, _ = after(straight, k, 8, 20)
    full = KVCache.empty(2, 20, 2, 8).append(k[:, :8], v[:, :8])
    z, _ = after(full, k, 8, 20)
    assert 0 < np.abs(x - y).max() < 0.2
    assert np.abs(x - z).max() < 0.2
    assert sorted(back.held[0].tolist()) == [-1, -1, -1, -1, 7]
    # What is known to be filling does not take the place of the newest.
    _, filled = after(empty.until(8), k, 0, 12)
    assert sorted(filled.rewound(8).held[0].tolist()) == [3, 4, 5, 6, 7]
    rows = take_rows((back,), jnp.array([1, 1, 0]))[0]
    np.testing.assert_array_equal(rows.k.numbers(jnp.float32)[2], back.k.numbers(jnp.float32)[0])


def test_few_bits_write_nearly_the_same(llama: Model) -> None:
    prompt = ids(4, 30)
    prompt[1, :5] = 0
    asked: Any = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_scores": True}
    full = llama.generate(prompt, **asked)
    few = {"nbits": 4, "q_group_size": 8, "residual_length": 4}
    out = llama.generate(prompt, cache_implementation="quantized", cache_config=few, **asked)
    assert all(isinstance(one, QuantisedCache) and one.k.bits == 4 for one in caches_of(out.cache))
    np.testing.assert_allclose(out.scores[0], full.scores[0], atol=1e-4)  # the prompt is seen as it is
    # As long as a text is the same, its scores are nearly the same.
    same = np.cumprod(np.asarray(out.sequences == full.sequences)[:, 30:-1], axis=1).T.astype(bool)
    near, exact = jnp.stack(out.scores)[1:][same], jnp.stack(full.scores)[1:][same]
    assert same.sum() >= 8
    error = float(jnp.abs(near - exact).mean() / exact.std())
    assert 1e-5 < error < 0.2


# ------------------------------------------------------------------------------------------- the host, and choosing


def test_offloaded_is_the_full_cache_elsewhere(llama: Model) -> None:
    prompt = ids(2, 5)
    out = llama.generate(prompt, max_new_tokens=4, cache_implementation="offloaded", return_dict_in_generate=True)
    np.testing.assert_array_equal(out.sequences, llama.generate(prompt, max_new_tokens=4))
    cache = out.cache[0]
    assert isinstance(cache, OffloadedCache)
    moved = (cache.take(jnp.array([1])), cache.grown(99))
    for one in (cache, *moved):
        assert one.k.sharding.memory_kind == one.v.sharding.memory_kind == "pinned_host"
    assert moved[0].k.shape[0] == 1
    assert moved[1].room == 99


# ---------------------------------------------------------------------------------------------------------------- sinks

FEW = {"window_length": 9, "num_sink_tokens": 3}


def kept_tokens(text: np.ndarray) -> np.ndarray:
    """What a cache of `FEW` has of a text."""
    return text if text.shape[1] <= 9 else np.concatenate([text[:, :3], text[:, -6:]], axis=1)


def test_sinks_and_window_are_a_text_of_their_own(llama: Model) -> None:
    """With one layer, keys and values are of single tokens: so each step sees a text of those that are kept."""
    for length in (2, 6, 13):  # filled up to 16, beyond the window
        out = llama.generate(
            ids(2, length),
            max_new_tokens=16,
            cache_implementation="sink",
            cache_config=FEW,
            return_dict_in_generate=True,
            output_logits=True,
        )
        text = np.asarray(out.sequences)
        for step, logits in enumerate(out.logits):
            seen = text[:, : length + step]
            alike = llama(kept_tokens(seen) if step else seen).logits[:, -1]  # a prompt is seen as a whole
            np.testing.assert_allclose(logits, alike, atol=2e-4)
        (cache,) = out.cache
        assert (type(cache), cache.window, cache.sinks, int(cache.length)) == (SinkCache, 9, 3, length + 15)
    # The cache goes on with several tokens at once, and is measured by its last one.
    longer = np.concatenate([text, ids(2, 2, 1)], axis=1)
    again = llama.generate(longer, cache=out.cache, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
    np.testing.assert_allclose(again.logits[0], llama(kept_tokens(longer)).logits[:, -1], atol=2e-4)


@pytest.mark.parametrize("sinks", [0, 3])
def test_sinks_are_kept_however_a_text_comes(llama: Model, sinks: int) -> None:
    keys = jax.random.normal(jax.random.key(0), (2, 23, 2, 8))

    @jax.jit
    def attend(cache: SinkCache, x: Any) -> SinkCache:
        return cache.attend(x, x, x, mask=Mask(causal=True, q_offset=cache.length))[1]

    ends = []
    for pieces in ([1] * 21, [2, 1, 6, 12], [14, 7], [21]):
        cache, start = SinkCache.empty(2, 7, sinks, 2, 8, rope=llama.config.rope), 0
        for n in pieces:
            cache = attend(cache, keys[:, start : start + n])
            start += n
        ends.append(take_rows(cache.grown(40), jnp.array([1])))
        assert (cache.k.shape[1], int(cache.length)) == (7, 21)
    # Read along and not kept: two columns that only fill.
    ends.append(take_rows(attend(SinkCache.empty(2, 7, sinks, 2, 8, rope=cache.rope).until(21), keys), jnp.array([1])))
    for one in ends[1:]:
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), one, replace(ends[0], stop=one.stop))


def test_sinks_refuse_what_they_cannot_keep(llama: Model, windowed: Model) -> None:
    sink: Any = {"cache_implementation": "sink", "max_new_tokens": 2}
    padded = ids(2, 5)
    padded[0, 0] = 0
    with pytest.raises(ValueError, match="give rows of one length, without padding"):
        llama.generate(padded, **sink)
    with pytest.raises(ConfigError, match=r"rotary positions, without windows of their own.* not for this mixtral"):
        windowed.generate(ids(1, 3), **sink)
    with pytest.raises(ConfigError, match="window_length=4 must be a whole number, 5 or more"):
        llama.generate(ids(1, 3), cache_config={"window_length": 4}, **sink)
    with pytest.raises(ConfigError, match="has no 'sinks'"):
        llama.generate(ids(1, 3), cache_config={"sinks": 4}, **sink)
    with pytest.raises(ConfigError, match="keeps a window of 256 positions and cannot go back"):
        llama.generate(ids(1, 3), prompt_lookup_num_tokens=2, **sink)
    cache = SinkCache.empty(1, 7, 2, 2, 8, rope=llama.config.rope)
    q = jnp.ones((1, 1, 2, 8))
    with pytest.raises(NotImplementedError, match="rows without padding"):
        cache.attend(q, q, q, mask=Mask(causal=True, keys=jnp.ones((1, 7), bool)))
    with pytest.raises(ValueError, match="sinks=7 must be 0 or more, and fewer than window=7"):
        SinkCache.empty(1, 7, 7, 2, 8, rope=cache.rope)


# ----------------------------------------------------------------------------------------------------- tuples of arrays


def test_tuples_of_arrays_are_caches_too(llama: Model) -> None:
    prompt = ids(2, 6)
    out = llama.generate(prompt, max_new_tokens=5, return_dict_in_generate=True, return_legacy_cache=True)
    ((k, v),) = out.past_key_values
    assert k.shape == v.shape == (2, 2, 10, 8)  # the last token has not been read
    held = llama(out.sequences[:, :10], cache=llama.init_cache(2, 10)).cache[0]
    np.testing.assert_allclose(k, held.k.swapaxes(1, 2), atol=1e-5)
    longer = np.concatenate([np.asarray(out.sequences), ids(2, 2, 1)], axis=1)
    on = llama.generate(longer, cache=out.past_key_values, max_new_tokens=4)
    np.testing.assert_array_equal(on, llama.generate(longer, max_new_tokens=4))
    np.testing.assert_array_equal(to_legacy_cache(from_legacy_cache(llama, [[k, v]]))[0][1], v)


def test_tuples_of_an_encoder_decoder() -> None:
    config = formax.AutoConfig.for_model(
        "bart", vocab_size=61, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=20, max_position_embeddings=40,
    )  # fmt: skip
    bart = formax.AutoModelForSeq2SeqLM.from_config(config, key=jax.random.key(3))
    cache = bart(input_ids=ids(2, 7), decoder_input_ids=ids(2, 5), cache=bart.init_cache(2, 9, 7)).cache
    past = to_legacy_cache(cache)
    assert [[x.shape for x in layer] for layer in past] == [[(2, 4, 5, 4)] * 2 + [(2, 4, 7, 4)] * 2] * 2
    again = from_legacy_cache(bart, past)
    jax.tree.map(np.testing.assert_array_equal, to_legacy_cache(again), past)
    with pytest.raises(ValueError, match="has 1 layers, not those of this BartForConditionalGeneration"):
        from_legacy_cache(bart, past[:1])
    with pytest.raises(ValueError, match="past_key_values: KVCache"):
        from_legacy_cache(bart, [[x[:, :2] for x in layer] for layer in past])


def test_tuples_are_keys_and_values_of_all(llama: Model) -> None:
    with pytest.raises(TypeError, match="a RingCache is not keys and values of all positions"):
        to_legacy_cache((RingCache.empty(1, 9, 1, 4, window=3),))
    rows = KVCache(jnp.ones((2, 9, 1, 4)), jnp.ones((2, 9, 1, 4)), jnp.array([3, 4]))
    with pytest.raises(ValueError, match="texts of different lengths"):
        to_legacy_cache((rows,))
    with pytest.raises(ValueError, match="two or four arrays"):
        from_legacy_cache(llama, [jnp.ones(3)])


def test_kinds_follow_from_settings(llama: Model, windowed: Model) -> None:
    def kind(name: str | None, model: Model = llama, mode: Any = GenerationMode.GREEDY, **few: Any) -> Any:
        return kind_of(GenerationConfig(cache_implementation=name, cache_config=few or None), model.config, mode)

    assert kind(None) == kind("static") == kind("dynamic") == kind("hybrid") == kind("sliding_window") == FULL
    assert kind("hybrid", windowed) == kind("hybrid_chunked", windowed) == Rings((WINDOW,))
    assert kind("offloaded_static") == kind("offloaded_hybrid") == kind("offloaded") == OnHost()
    assert kind("quantized") == FewBits(bits=4, group=64, residual=128)
    assert kind("quantized", nbits=8, residual_length=3, backend="quanto").residual == 3
    with pytest.raises(ConfigError, match="has no 'nbit'; did you mean nbits"):
        kind("quantized", nbit=8)
    with pytest.raises(ConfigError, match="nbits=3 is none of 8, 4, 2"):
        kind("quantized", nbits=3)
    with pytest.raises(ConfigError, match="residual_length=-1 must be a whole number, 0 or more"):
        kind("quantized", residual_length=-1)
    with pytest.raises(ConfigError, match="cannot go back over tokens that the assistant got wrong"):
        kind("sliding_window", windowed, GenerationMode.ASSISTED)
    ring = (RingCache.empty(1, 9, 1, 4, window=WINDOW),)
    with pytest.raises(ConfigError, match="the cache that is given keeps a window of 7 positions"):
        kind_of(GenerationConfig(), windowed.config, GenerationMode.ASSISTED, ring)


def test_layers_have_windows_of_their_own(windowed: Model) -> None:
    config = windowed.config
    assert windows_of(config) == (WINDOW,)
    assert windows_of(config.replace(sliding_window=None)) == (None,)

    class Layered:
        sliding_window, layer_types = 4, ("sliding_attention", "full_attention")

    assert windows_of(Layered()) == (4, None)  # type: ignore[arg-type]
    made = as_kind((KVCache.empty(1, 9, 1, 4), KVCache.empty(1, 9, 1, 4)), Rings((4, None)))
    assert [type(one) for one in made] == [RingCache, KVCache]
    with pytest.raises(ValueError, match="windows of 2 layers, the cache has 1"):
        as_kind((KVCache.empty(1, 9, 1, 4),), Rings((4, None)))


def test_channels_that_do_not_fill_bytes() -> None:
    with pytest.raises(ValueError, match="heads of 3 channels do not fill whole bytes with 4 bits"):
        QuantisedCache.empty(1, 9, 1, 3, bits=4)
    with pytest.raises(ValueError, match="nbits=5"):
        QuantisedCache.empty(1, 9, 1, 8, bits=5)
    with pytest.raises(ValueError, match="residual_length=-1"):
        QuantisedCache.empty(1, 9, 1, 8, residual=-1)
