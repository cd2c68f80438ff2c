"""Which backend computes a call of attention, and why not another."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import jax

from formax.layers.attention.problem import Problem, names, problem, target


class Backend(Protocol):
    """A module of this folder that computes attention.

    `supports` says why a backend cannot do something, `suits` why it should not where nobody asks for it by name; None
    says that it can, and should.
    """

    @staticmethod
    def supports(p: Problem) -> str | None: ...

    @staticmethod
    def suits(p: Problem) -> str | None: ...

    @staticmethod
    def attention(p: Problem) -> jax.Array: ...


# In the order in which they are asked: {name: platform it is for, None for all}. Modules are imported when asked.
BACKENDS: dict[str, str | None] = {
    "pallas_gpu": "cuda",
    "pallas_tpu": "tpu",
    "xla_chunked": None,
    "xla": None,
}


def module(name: str) -> Any:
    """The backend of that name."""
    return importlib.import_module(f"formax.layers.attention.{name}")


def unsupported(name: str, p: Problem) -> str | None:
    """Why the backend cannot do this here; None if it can."""
    platform, here = BACKENDS[name], target()
    if platform is not None and platform != here.platform:
        return f"runs on {platform}, and this is {here.platform}"
    if p.watched and name != "xla":
        return "somebody looks at the scores or weights, of which it makes no table"
    found: str | None = module(name).supports(p)
    return found


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
    found = next(one for one in BACKENDS if unsupported(one, p) is None and module(one).suits(p) is None)
    return module(found)


def explain_attention(q: Any, k: Any, v: Any, **options: Any) -> str:
    """Which backend `attention` takes for these arguments, and why not the others, as a table.

    The arguments are those of `attention`; arrays may be `jax.ShapeDtypeStruct`, of which nothing is computed. With
    `compile_for` it answers for another platform.
    """
    named = options.pop("backend", None)
    p = problem(q, k, v, **options)
    chosen = choose(p, named)
    rows = []
    for name in BACKENDS:
        reason = unsupported(name, p)
        if reason is None and module(name) is not chosen:
            better = module(name).suits(p)
            reason = "supports this, too; another comes first" if better is None else f"supports this; {better}"
        rows.append((name, "<- runs" if reason is None else f"   {reason}"))
    width = max(map(len, BACKENDS))
    lines = [
        f"attention on {target().platform}: q {p.q.shape}, k {p.k.shape}, v {p.v.shape}, {p.q.dtype}",
        f"mask: {names(p.mask)}; bias: {names(p.bias)}; softcap: {p.softcap}; sinks: {p.sinks is not None}; "
        f"dropout: {p.dropout}",
        *(f"  {name:<{width}}  {text}" for name, text in rows),
    ]
    return "\n".join(lines)
