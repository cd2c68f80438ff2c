"""Attention by its formula, in float64, and calls of it with every feature: what all backends are held against."""

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from formax.layers.attention import ALiBi, Bucketed, Indexed, Mask, compile_for

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sizes:
    """B rows, T queries, S keys, H heads of queries, K of keys, D and DV channels."""

    b: int = 2
    t: int = 37
    s: int = 45
    h: int = 4
    k: int = 2
    d: int = 8
    dv: int = 6


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def numbers(seed: int, high: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, size=shape), jnp.int32)


def qkv(z: Sizes, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    shapes = (z.b, z.t, z.h, z.d), (z.b, z.s, z.k, z.d), (z.b, z.s, z.k, z.dv)
    q, k, v = (draw(i, *shape).astype(dtype) for i, shape in enumerate(shapes))
    return 1.5 * q, k, v


def exist(z: Sizes) -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).random((z.b, z.s)) < 0.7)


def runs(seed: int, rows: int, length: int) -> jax.Array:
    """Ids that stay the same for a while, as those of texts that share a row."""
    steps = np.random.default_rng(seed).random((rows, length)) < 0.15
    return jnp.asarray(steps.cumsum(1), jnp.int32)


MASKS: Mapping[str, Callable[[Sizes], Mask]] = {
    "all": lambda z: Mask(),
    "causal": lambda z: Mask(causal=True),
    "causal, aligned to the end": lambda z: Mask(causal=True, q_offset=z.s - z.t),
    "traced offset": lambda z: Mask(causal=True, q_offset=jnp.asarray(4)),
    "offset by row": lambda z: Mask(causal=True, q_offset=numbers(4, max(1, z.s - z.t + 1), z.b)),
    "window": lambda z: Mask(window=(9, 3), q_offset=3),
    "window to the left": lambda z: Mask(causal=True, window=(11, None)),
    "window to the right": lambda z: Mask(window=(None, 5)),
    "dilated window": lambda z: Mask(window=(12, 12), dilation=3),
    "keys": lambda z: Mask(keys=exist(z)),
    "causal and keys": lambda z: Mask(causal=True, keys=exist(z), q_offset=z.s - z.t),
    "lengths": lambda z: Mask(kv_length=jnp.minimum(numbers(5, z.s + 1, z.b), z.s - 5)),
    "an empty row": lambda z: Mask(kv_length=jnp.asarray([0] + [z.s] * (z.b - 1))),
    "segments": lambda z: Mask(segments=(runs(6, z.b, z.t), runs(7, z.b, z.s))),
    "causal segments and keys": lambda z: Mask(
        causal=True, segments=(runs(6, z.b, z.t), runs(6, z.b, max(z.t, z.s))[:, : z.s]), keys=exist(z)
    ),
    "prefix": lambda z: Mask(causal=True, prefix=numbers(8, z.s, z.b)),
    "dense": lambda z: Mask(dense=draw(9, z.b, z.h, z.t, z.s) > 0),
    "dense, of keys": lambda z: Mask(dense=draw(9, 1, 1, 1, z.s) > 0),
    "dense, for all heads": lambda z: Mask(causal=True, dense=draw(9, z.b, 1, z.t, z.s) > -0.5),
}
BIASES: Mapping[str, Callable[[Sizes], Any]] = {
    "none": lambda z: None,
    "alibi": lambda z: ALiBi(jnp.abs(draw(20, z.h)) / 8),
    "alibi both ways": lambda z: ALiBi(jnp.abs(draw(20, z.h)) / 8, both_ways=True),
    "bucketed": lambda z: Bucketed(draw(21, 8, z.h), 20, both_ways=False),
    "bucketed both ways": lambda z: Bucketed(draw(22, 14, z.h), 24, both_ways=True),
    "indexed": lambda z: Indexed(draw(23, 30, z.h), numbers(24, 30, z.t, z.s)),
    "pairs": lambda z: draw(25, z.b, z.h, z.t, z.s),
    "pairs, for all rows": lambda z: draw(26, 1, z.h, z.t, z.s),
    "pairs, for all heads": lambda z: draw(27, z.t, z.s),
    "of keys": lambda z: draw(28, z.b, 1, 1, z.s),
}
NUMBERS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.21},
    "softcap": {"softcap": 1.7},
    "sinks": {"sinks": True},
    "all three": {"scale": 0.5, "softcap": 3.0, "sinks": True},
}


def options(z: Sizes, mask: str, bias: str, more: str) -> dict[str, Any]:
    """Arguments of `attention` beside q, k and v."""
    found: dict[str, Any] = {**NUMBERS[more], "mask": MASKS[mask](z), "bias": BIASES[bias](z)}
    return found | ({"sinks": draw(30, z.h)} if "sinks" in found else {})


@contextmanager
def lowering_for(platform: str) -> Iterator[None]:
    """Programs that are traced inside are lowered for the platform, which is not at hand."""
    # jax 0.12 wants to know for which GPU, and says of the way to Triton that it is deprecated; there is no other.
    h100 = jax.sharding.AbstractDevice("NVIDIA H100", 132, "gpu") if platform == "cuda" else None
    mesh = jax.sharding.AbstractMesh((1,), ("all",), abstract_device=h100)
    with compile_for(platform), jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        yield


NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, which has the compiler, is not here"
)


def temporary_bytes_of_a_tpu(monkeypatch: pytest.MonkeyPatch, run: Any, *shapes: Any) -> int:
    """Compiles a program for the chip with the smallest memory, and tells what it needs beside what goes in and out."""
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    # Whoever opens the library keeps a chip to itself; here is no chip, but another worker who compiles.
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    chip = topologies.get_topology_desc(platform="tpu", topology_name="v4:2x2x1").devices[0]
    where = jax.sharding.SingleDeviceSharding(chip)
    with compile_for("tpu"):
        traced = jax.jit(run, in_shardings=where, out_shardings=where).trace(*shapes)
    told = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    assert told is not None
    return told.temp_size_in_bytes


# --- the formula


def _allowed(m: Mask, b: int, t: int, s: int) -> Array:
    """[B, H or 1, T, S], pair by pair as the documentation of `Mask` has it."""
    i = np.arange(t)[:, None] + np.broadcast_to(np.asarray(m.q_offset), b).reshape(b, 1, 1, 1)
    j = np.arange(s)
    out = np.ones((b, 1, t, s), bool)
    if m.causal:
        prefix = np.zeros(b) if m.prefix is None else np.asarray(m.prefix)
        out &= (j <= i) | (j < prefix.reshape(b, 1, 1, 1))
    left, right = m.window or (None, None)
    out &= (j >= i - (10**9 if left is None else left)) & (j <= i + (10**9 if right is None else right))
    out &= (i - j) % m.dilation == 0
    if m.kv_length is not None:
        out &= j < np.asarray(m.kv_length).reshape(b, 1, 1, 1)
    if m.keys is not None:
        out &= np.asarray(m.keys)[:, None, None]
    if m.segments is not None:
        a, c = (np.asarray(x) for x in m.segments)
        out &= (a[:, :, None] == c[:, None])[:, None]
    return out if m.dense is None else out & np.asarray(m.dense)


def _distances(m: Mask, b: int, t: int, s: int) -> Array:
    """How far each key is after each query: [B, T, S]."""
    return np.arange(s) - np.arange(t)[:, None] - np.broadcast_to(np.asarray(m.q_offset), b).reshape(b, 1, 1)


def _buckets(bias: Bucketed, ahead: Array) -> Array:
    """The row of the table for each distance."""
    count = bias.table.shape[0] // 2 if bias.both_ways else bias.table.shape[0]
    distance = np.abs(ahead) if bias.both_ways else np.maximum(-ahead, 0)
    exact = count // 2
    far = exact + np.log(np.maximum(distance, 1) / exact) / np.log(bias.max_distance / exact) * (count - exact)
    found = np.where(distance < exact, distance, np.minimum(far.astype(int), count - 1))
    return found + np.where(ahead > 0, count, 0) * bias.both_ways


def formula(q: Any, k: Any, v: Any, given: Mapping[str, Any], slope: Any) -> tuple[dict[str, Array], float]:
    """Attention in the words of the documentation, and its slopes for one of the output: in float64, of NumPy.

    Also how large the slopes of the bias would be if nothing in the sums that they are cancelled out.
    """
    q, k, v, slope = (np.asarray(x, np.float64) for x in (q, k, v, slope))
    (b, t, h, d), (s, heads) = q.shape, k.shape[1:3]
    kk, vv = (np.repeat(x, h // heads, axis=2) for x in (k, v))
    scale, cap, mask, bias = given.get("scale"), given.get("softcap"), given["mask"], given["bias"]
    scale = d**-0.5 if scale is None else scale
    capped = np.einsum("bthd,bshd->bhts", q, kk) * scale
    capped = capped if cap is None else cap * np.tanh(capped / cap)
    ahead, array = _distances(mask, b, t, s), np.asarray(learned(given), np.float64)
    match bias:
        case None:
            added: Any = 0.0
        case ALiBi():
            far = -np.abs(ahead) if bias.both_ways else ahead
            added = array[:, None, None] * far[:, None]
        case Bucketed() | Indexed():
            rows = _buckets(bias, ahead) if isinstance(bias, Bucketed) else np.asarray(bias.index)[None]
            rows = np.broadcast_to(rows, (b, t, s))
            added = np.moveaxis(array[rows], -1, 1)
        case _:
            added = array
    allowed = np.broadcast_to(_allowed(mask, b, t, s), capped.shape)
    sinks = None if given.get("sinks") is None else np.asarray(given["sinks"], np.float64)
    grown = np.where(allowed, np.exp(capped + added), 0)
    total = grown.sum(-1, keepdims=True) + (0 if sinks is None else np.exp(sinks)[:, None, None])
    total = np.where(total > 0, total, 1)
    weights = grown / total
    out = np.einsum("bhts,bshd->bthd", weights, vv)

    dw = np.einsum("bthd,bshd->bhts", slope, vv)
    own = (weights * dw).sum(-1, keepdims=True)
    ds = weights * (dw - own)
    found = {"out": out}
    du = ds * scale if cap is None else ds * scale * (1 - (capped / cap) ** 2)
    found["q"] = np.einsum("bhts,bshd->bthd", du, kk)
    for name, x in (("k", np.einsum("bhts,bthd->bshd", du, q)), ("v", np.einsum("bhts,bthd->bshd", weights, slope))):
        found[name] = x.reshape(b, s, heads, h // heads, -1).sum(3)

    def summed(x: Array, power: int = 1) -> Array:
        """What the bias gathers of one number per pair."""
        match bias:
            case ALiBi():
                return (x * far[:, None] ** power).sum((0, 2, 3))
            case Bucketed() | Indexed():
                table = np.zeros_like(array)
                np.add.at(table, rows, np.moveaxis(x, 1, -1))
                return table
            case _:
                shape = (1,) * (4 - array.ndim) + array.shape
                return x.sum(tuple(a for a in range(4) if shape[a] == 1), keepdims=True).reshape(array.shape)

    uncancelled = 0.0
    if bias is not None:
        found["bias"] = summed(ds)
        uncancelled = np.sqrt(summed((weights * dw) ** 2, 2).mean())
    if sinks is not None:
        found["sinks"] = -(np.exp(sinks)[:, None, None] / total * own).sum((0, 2, 3))
    return found, uncancelled


def learned(given: Mapping[str, Any]) -> Any:
    """The floating-point array of a bias, or None."""
    bias = given["bias"]
    return getattr(bias, "slopes", getattr(bias, "table", bias))


def with_learned(given: Mapping[str, Any], array: Any, sinks: Any) -> dict[str, Any]:
    """The arguments with other numbers in their bias and sinks."""
    leaves, tree = jax.tree.flatten(given["bias"])
    bias = jax.tree.unflatten(tree, [array if leaf is learned(given) else leaf for leaf in leaves])
    return {**given, "bias": bias, "sinks": sinks}


def check(
    attend: Callable[..., Any],
    z: Sizes,
    given: Mapping[str, Any],
    *,
    tolerance: float = 2e-5,
    slopes: bool = True,
    dtype: Any = jnp.float32,
    hasty: bool = False,
    fixed: tuple[str, ...] = (),
) -> None:
    """Holds values, and with `slopes` all gradients but of what is `fixed`, of `attend(q, k, v, **given)` against the
    formula.

    `hasty` is for kernels that are interpreted: what they are made of is large and runs once.
    """
    q, k, v = qkv(z, dtype)
    arrays = {"q": q, "k": k, "v": v, "bias": learned(given), "sinks": given.get("sinks")}
    live = {name: x for name, x in arrays.items() if x is not None and name not in fixed}
    slope = draw(40, z.b, z.t, z.h, z.dv)

    def total(live: Any) -> Any:
        a = arrays | live
        out = attend(a["q"], a["k"], a["v"], **with_learned(given, a["bias"], a["sinks"]))
        return (out * slope).sum(), out

    how = {"xla_backend_optimization_level": "0"} if hasty and jax.default_backend() == "cpu" else {}
    if slopes:
        (_, out), found = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=how)(live)
    else:
        out, found = jax.jit(total, compiler_options=how)(live)[1], {}
    expected, uncancelled = formula(q, k, v, given, slope)
    for name, mine in {"out": out, **found}.items():
        # Slopes that cancel out are sums of numbers of the order of one; of a bias, of thousands of them, and times the
        # distance for ALiBi: what is left of such a sum may be smaller than its terms' last bits.
        size = max(np.sqrt(np.mean(expected[name] ** 2)), 0.1, uncancelled if name == "bias" else 0)
        far = np.abs(np.asarray(mine, np.float64) - expected[name]).max() / size
        assert far < tolerance, f"{name}: off by {far:.2e} of its size"  # nor is it no number
