"""tokamax's attention, with the implementation that it chooses itself."""

from __future__ import annotations

from typing import Any

import jax
import tokamax

from benchmarks.contestants.with_formax import attention_inputs, attention_task
from benchmarks.task import Options, Task, UnavailableError


def versions() -> dict[str, str]:
    return {"tokamax": getattr(tokamax, "__version__", "unknown"), "jax": jax.__version__}


def attention(options: Options) -> Task:
    for name in ("sinks", "segments"):
        if options.get(name):
            raise UnavailableError(f"tokamax has no {name}")
    window = options.get("window")

    def attend(q: Any, k: Any, v: Any) -> Any:
        return tokamax.dot_product_attention(
            q,
            k,
            v,
            is_causal=bool(options.get("causal")),
            local_window_size=None if window is None else (window - 1, 0),
            logits_soft_cap=options.get("softcap"),
        )

    return attention_task(attend, attention_inputs(options), options)


TASKS = {"attention": attention}
