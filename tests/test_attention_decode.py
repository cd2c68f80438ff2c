"""A few queries against a long cache, and caches in pages, against the formula."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Sizes, check, draw, formula, lowering_for, numbers, options, qkv

from formax.layers.attention import (
    Mask,
    Pages,
    attention,
    compile_for,
    decode_gpu,
    decode_xla,
    explain_attention,
    paged_attention,
)

ONE = Sizes(b=3, t=1, s=288, h=6, k=2, d=24, dv=20)


CALLS = [
    ("all", "none", "plain", ONE),
    ("causal, aligned to the end", "alibi", "all three", ONE),
    ("offset by row", "alibi both ways", "softcap", ONE),
    ("window", "none", "sinks", Sizes(b=2, t=3, s=288, h=4, k=2)),
    ("causal segments and keys", "none", "sinks", Sizes(b=2, t=5, s=288, h=4, k=1)),
    ("an empty row", "none", "plain", Sizes(b=2, t=2, s=304, h=2, k=2)),
    ("lengths", "none", "sinks", ONE),
]
ALSO = [
    ("traced offset", "bucketed", "plain", ONE),
    ("prefix", "pairs", "all three", Sizes(b=2, t=4, s=101, h=4, k=2)),
    ("dense", "of keys", "plain", Sizes(b=2, t=2, s=101, h=4, k=2)),
    ("dilated window", "pairs, for all heads", "sinks", Sizes(b=2, t=3, s=101, h=2, k=2)),
]


def interpreted(*args: Any, **given: Any) -> Any:
    with compile_for("cuda", interpret=True):
        return attention(*args, backend="decode_gpu", **given)


@pytest.mark.parametrize(("mask", "bias", "more", "z"), CALLS)
def test_a_few_queries(mask: str, bias: str, more: str, z: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_gpu, "PROGRAMS", 20)  # several tiles for each part, not as many for the last
    check(interpreted, z, options(z, mask, bias, more), slopes=mask == "lengths")


@pytest.mark.parametrize(("mask", "bias", "more", "z"), [*CALLS, *ALSO])
def test_a_few_queries_on_a_cpu(mask: str, bias: str, more: str, z: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_xla, "BLOCK", 32)
    given = options(z, mask, bias, more)
    check(partial(attention, backend="decode_xla"), z, given, slopes=mask in ("lengths", "prefix"))


def test_what_is_not_filled_is_not_read() -> None:
    """What is not a number there would show up, were it multiplied by nothing."""
    z = Sizes(b=2, t=1, s=1024, h=2, k=1)
    q, k, v = (x.at[:, 512:].set(np.nan) if i else x for i, x in enumerate(qkv(z)))
    for mask in (Mask(causal=True, q_offset=jnp.asarray([100, 511])), Mask(kv_length=jnp.asarray([3, 400]))):
        assert np.isfinite(attention(q, k, v, mask=mask, backend="decode_xla")).all()
        assert "decode_xla   <- runs" in explain_attention(q, k, v, mask=mask)
    k, v = k.at[:, :256].set(np.nan), v.at[:, :256].set(np.nan)
    mask = Mask(causal=True, q_offset=500, window=(200, None))
    assert np.isfinite(attention(q, k, v, mask=mask, backend="decode_xla")).all()
    assert "decode_xla      supports this; all keys are seen" in explain_attention(q, k, v)


def pages_of(z: Sizes, page: int, lengths: list[int]) -> tuple[jax.Array, Pages]:
    """Queries, and a pool of pages that lie about in no order."""
    count = -(-z.s // page)
    order = np.random.default_rng(0).permutation(z.b * count + 3)[: z.b * count].reshape(z.b, count)
    _, k, v = qkv(Sizes(b=z.b * count + 3, t=1, s=page, h=z.h, k=z.k, d=z.d, dv=z.dv))
    q = draw(50, z.b, z.t, z.h, z.d)
    return q, Pages(k, v, jnp.asarray(order), jnp.asarray(lengths))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("backend", ["xla", "decode_gpu"])
def test_pages_are_read_in_order(backend: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_gpu, "PROGRAMS", 12)
    z = Sizes(b=3, t=2, s=96, h=4, k=2)
    q, pages = pages_of(z, 16, [2, 37, 96])
    sinks = draw(51, z.h)
    run = jax.jit(partial(paged_attention, window=window, softcap=2.0, sinks=sinks, backend=backend))
    with compile_for("cuda", interpret=True):
        out = run(q, pages)
    for i, length in enumerate(pages.length.tolist()):
        k, v = (np.concatenate(list(np.asarray(x)[pages.table[i]]))[None, :length] for x in (pages.k, pages.v))
        mask = Mask(causal=True, q_offset=length - z.t, window=None if window is None else (window - 1, None))
        given = {"mask": mask, "bias": None, "softcap": 2.0, "sinks": sinks}
        found = formula(q[i : i + 1], k, v, given, np.zeros((1, z.t, z.h, z.dv)))["out"]
        np.testing.assert_allclose(out[i : i + 1], found, rtol=1e-4, atol=1e-5)


def test_pages_beyond_the_length_are_not_looked_at() -> None:
    z = Sizes(b=2, t=1, s=64, h=2, k=1)
    q, pages = pages_of(z, 16, [16, 0])
    table = pages.table.at[:, 1:].set(10**6)  # no such page
    with compile_for("cuda", interpret=True):
        for backend in ("xla", "decode_gpu"):
            out = paged_attention(q, Pages(pages.k, pages.v, table, pages.length), backend=backend)
            assert np.isfinite(out).all()
            assert not out[1].any()


def test_what_does_not_fit_is_named() -> None:
    z = Sizes(b=2, t=1, s=64, h=2, k=1)
    q, pages = pages_of(z, 16, [16, 3])
    k, v, table, length = pages.k, pages.v, pages.table, pages.length
    for bad, message in (
        (Pages(k[0], v, table, length), r"keys \(16, 1, 8\) and values .* must be \[pages, page, heads, width\]"),
        (Pages(k, v[:, :8], table, length), r"keys .* and values \(11, 8, 1, 6\) must be"),
        (Pages(k[..., :4], v, table, length), r"q \(2, 1, 2, 8\) and pages of keys \(11, 16, 1, 4\) must agree"),
        (Pages(k, v, table[:1], length), r"table \(1, 4\) must be .* and length \(2,\) \[batch\], batch is 2"),
        (Pages(k, v, table, length[:1]), r"table \(2, 4\) must be .* and length \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_attention(q, bad)
    with pytest.raises(ValueError, match="pages have no backend 'cudnn'; there are decode_gpu, xla"):
        paged_attention(q, pages, backend="cudnn")
    with compile_for("cuda"), pytest.raises(NotImplementedError, match="pages of 12 positions are no power of two"):
        paged_attention(q, Pages(k[:, :12], v[:, :12], table, length), backend="decode_gpu")
    with pytest.raises(NotImplementedError, match="decode_gpu: runs on cuda, and this is cpu"):
        paged_attention(q, pages, backend="decode_gpu")


def test_decoding_is_for_few_queries_and_caches_of_whole_tiles() -> None:
    def told(t: int, s: int, **given: Any) -> str:
        q = jax.ShapeDtypeStruct((2, t, 8, 64), jnp.bfloat16)
        k = jax.ShapeDtypeStruct((2, s, 2, 64), jnp.bfloat16)
        with compile_for("cuda"):
            return explain_attention(q, k, k, **given)

    mask = Mask(causal=True, q_offset=numbers(0, 9, 2))
    assert "decode_gpu   <- runs" in told(1, 4096, mask=mask)
    assert "17 queries of 4 heads that share keys are more than 64 rows" in told(17, 4096, mask=mask)
    assert "4097 keys are no multiple of 16, so that the cache would be copied" in told(1, 4097, mask=mask)
    assert "64 keys are few" in told(1, 64, mask=mask)
    assert "adds up no bias but ALiBi's" in told(1, 4096, bias=jnp.zeros((8, 1, 4096)))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_decoding_lowers_for_cuda(head_dim: int) -> None:
    q = jax.ShapeDtypeStruct((2, 1, 8, head_dim), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((2, 1024, 2, head_dim), jnp.bfloat16)
    pool = jax.ShapeDtypeStruct((40, 64, 2, head_dim), jnp.bfloat16)
    table, length = jax.ShapeDtypeStruct((2, 16), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)

    def plain(q: Any, k: Any, v: Any, length: Any) -> Any:
        return attention(q, k, v, mask=Mask(kv_length=length), sinks=jnp.ones(8), softcap=3.0, backend="decode_gpu")

    def paged(q: Any, k: Any, v: Any, table: Any, length: Any) -> Any:
        return paged_attention(q, Pages(k, v, table, length), window=100, backend="decode_gpu")

    with lowering_for("cuda"):
        for traced in (
            jax.jit(plain).trace(q, cache, cache, length),
            jax.jit(paged).trace(q, pool, pool, table, length),
        ):
            assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
