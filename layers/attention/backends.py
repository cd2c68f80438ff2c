"""Which backend computes a call of attention, and why not another."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from formax.core import mesh
from formax.layers.attention.bias import ALiBi, Bucketed, Indexed
from formax.layers.attention.problem import Problem, names, problem, target


class Backend(Protocol):
    """A module of this folder that computes attention.

    `supports` says why a backend cannot do something, `suits` why it should not where nobody asks for it by name; None
    says that it can, and should.
    """

    __name__: str

    @staticmethod
    def supports(p: Problem) -> str | None: ...

    @staticmethod
    def suits(p: Problem) -> str | None: ...

    @staticmethod
    def attention(p: Problem) -> jax.Array: ...


# In the order in which they are asked: {name: platform it is for, None for all}. Modules are imported when asked.
BACKENDS: dict[str, str | None] = {
    "decode_gpu": "cuda",
    "cudnn": "cuda",
    "mosaic_gpu": "cuda",
    "pallas_gpu": "cuda",
    "decode_tpu": "tpu",
    "pallas_tpu": "tpu",
    "decode_xla": "cpu",
    "xla_chunked": None,
    "xla": None,
}
# The compiler splits these itself.
SPLIT_BY_XLA = ("xla", "cudnn")
# These read keys and values in pages; the others are given what was copied together.
READ_PAGES = ("decode_gpu", "decode_tpu")


def module(name: str) -> Any:
    """The backend of that name."""
    return importlib.import_module(f"formax.layers.attention.{name}")


def unsupported(name: str, p: Problem) -> str | None:
    """Why the backend cannot do this here; None if it can."""
    platform, here = BACKENDS[name], target()
    if platform is not None and platform != here.platform:
        return f"runs on {platform}, and this is {here.platform}"
    if platform in ("cuda", "tpu") and 0 in (*p.q.shape, *p.v.shape):
        return "there is nothing to compute"
    if p.watched and name != "xla":
        return "somebody looks at the scores or weights, of which it makes no table"
    found: str | None = module(name).supports(as_read(name, p))
    return found


def unsuited(name: str, p: Problem) -> str | None:
    """Why the backend should not do this, though it can; None if it should."""
    found: str | None = module(name).suits(as_read(name, p))
    return found


def as_read(name: str, p: Problem) -> Problem:
    """The call as the backend is asked about it: shapes alone, of whole texts unless it reads pages."""
    return p if p.table is None or name in READ_PAGES else jax.eval_shape(Problem.gathered, p)


def choose(p: Problem, name: str | None) -> Backend:
    """The backend of that name, else the first that can do this and is worth it.

    Raises:
        ValueError: there is no such backend.
        NotImplementedError: it cannot do this, with the reason.
    """
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"attention has no backend {name!r}; there are {', '.join(BACKENDS)}")
        reason = unsupported(name, p)
        if reason is not None:
            raise NotImplementedError(f"attention backend {name}: {reason}")
        return module(name)
    found = next(one for one in BACKENDS if unsupported(one, p) is None and unsuited(one, p) is None)
    return module(found)


def run(p: Problem, name: str | None) -> jax.Array:
    """Attention by the backend of that name, or by the one that `choose` finds.

    Under a mesh each device attends with its own rows and heads: a kernel is nothing that the compiler could split.
    """
    backend, placing = choose(p, name), mesh.current()
    name = backend.__name__.rpartition(".")[2]
    p = p if name in READ_PAGES else p.gathered()
    if placing is None or name in SPLIT_BY_XLA:
        return backend.attention(p)
    return over_mesh(backend, p, placing)


def over_mesh(backend: Backend, p: Problem, placing: mesh.Placing) -> jax.Array:
    """Attention with the rows and heads of a batch split over a mesh, as far as they divide."""
    q = placing.partition(("batch", None, "heads", None), p.q.shape)
    in_pages = p.table is not None  # of one pool for all rows
    k = placing.partition((None if in_pages else "batch", None, "kv_heads", None), p.k.shape)
    rows, heads = q[0], q[2] if q[2] == k[2] else None  # a head's keys are where it is

    def pairs(x: Any) -> PartitionSpec:
        """[B or 1, H or 1, T, S], or without the first of these."""
        where = (rows, heads, None, None)[4 - x.ndim :]
        return PartitionSpec(*(at if n > 1 else None for at, n in zip(where, x.shape, strict=True)))

    def by_row(x: Any) -> PartitionSpec:
        """[B or 1, ...], or one number."""
        return PartitionSpec(rows) if jnp.ndim(x) and x.shape[0] > 1 else PartitionSpec()

    put: Any = replace  # partitions stand where arrays are, which types do not say
    m, of_bias = p.mask, None
    match p.bias:
        case ALiBi():
            of_bias = put(p.bias, slopes=PartitionSpec(heads))
        case Bucketed():
            of_bias = put(p.bias, table=PartitionSpec(None, heads))
        case Indexed():
            of_bias = put(p.bias, table=PartitionSpec(None, heads), index=PartitionSpec())
        case None:
            pass
        case _:
            of_bias = pairs(p.bias)
    of_mask = put(jax.tree.map(by_row, replace(m, dense=None)), dense=None if m.dense is None else pairs(m.dense))
    both = PartitionSpec(rows, None, heads, None)
    keys = PartitionSpec(k[0], None, heads, None)
    sinks, key = (None if x is None else at for x, at in ((p.sinks, PartitionSpec(heads)), (p.key, PartitionSpec())))
    table = None if p.table is None else PartitionSpec(rows)
    specs = put(p, q=both, k=keys, v=keys, mask=of_mask, bias=of_bias, sinks=sinks, key=key, table=table)
    names = [name for at in (rows, heads) for name in ((at,) if isinstance(at, str) else at or ())]

    def own(p: Problem) -> jax.Array:
        if p.key is not None and names:  # each device drops weights of its own
            p = replace(p, key=jax.random.fold_in(p.key, jax.lax.axis_index(tuple(names))))
        return backend.attention(p)

    return jax.shard_map(own, mesh=placing.mesh, in_specs=(specs,), out_specs=both, check_vma=False)(p)


def explain_attention(q: Any, k: Any, v: Any, **options: Any) -> str:
    """Which backend `attention` takes for these arguments, and why not the others, as a table.

    The arguments are those of `attention`; arrays may be `jax.ShapeDtypeStruct`, of which nothing is computed. With
    `compile_for` it answers for another platform.
    """
    named = options.pop("backend", None)
    return explain(problem(q, k, v, **options), named)


def explain(p: Problem, named: str | None) -> str:
    """The table of `explain_attention`."""
    chosen = choose(p, named)
    rows = []
    for name in BACKENDS:
        reason = unsupported(name, p)
        if reason is None and module(name) is not chosen:
            better = unsuited(name, p)
            reason = "supports this, too; another comes first" if better is None else f"supports this; {better}"
        rows.append((name, "<- runs" if reason is None else f"   {reason}"))
    width = max(map(len, BACKENDS))
    pages = "" if p.table is None else f" in pages, table {p.table.shape}"
    lines = [
        f"attention on {target().platform}: q {p.q.shape}, k {p.k.shape}, v {p.v.shape}{pages}, {p.q.dtype}",
        f"mask: {names(p.mask)}; bias: {names(p.bias)}; softcap: {p.softcap}; sinks: {p.sinks is not None}; "
        f"dropout: {p.dropout}",
        *(f"  {name:<{width}}  {text}" for name, text in rows),
    ]
    return "\n".join(lines)
