"""Attention alone, every backend of formax beside the others, forward and with gradients, on a CPU or a GPU.

    python -m benchmarks.attention --rounds 5                                        on a CPU
    JAX_PLATFORMS=cuda CUDA_VISIBLE_DEVICES=0 XLA_PYTHON_CLIENT_PREALLOCATE=false \
        python -m benchmarks.attention --python torch=... --rounds 5                 on a GPU

On a GPU `FORMAX_GPU=h100` (or h200, a100) adds the share of the peak on its data sheet: of the tensor cores, and in
decoding of the memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness import Contestant, Lab, run, tell
from benchmarks.tables import Section, Spread, target

DEFAULT = Contestant("formax", "formax", "with_formax")
BACKENDS = {
    "cpu": ("xla", "xla_chunked"),
    "cuda": ("xla_chunked", "decode_gpu", "pallas_gpu", "mosaic_gpu", "cudnn"),
}
TORCH = Contestant("torch SDPA", "torch", "with_torch")
TOKAMAX = Contestant("tokamax", "formax", "with_tokamax", optional=True)
# Half-precision operations and bytes per second, dense, from NVIDIA's data sheets.
PEAKS = {"h100": (989e12, 3.35e12), "h200": (989e12, 4.8e12), "a100": (312e12, 2.04e12)}


@dataclass(frozen=True)
class Case:
    """A call: sizes, and what is not plain about it."""

    batch: int
    length: int
    heads: int
    head_dim: int
    kv_heads: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    slopes: bool = False
    queries: int | None = None

    def __str__(self) -> str:
        of = f" (queries {self.queries})" if self.queries else ""
        said = [f"{self.batch}x{self.length}{of}, {self.heads} heads of {self.head_dim}"]
        said += [f"{self.kv_heads} of keys"] if self.kv_heads else []
        said += [name if value is True else f"{name} {value}" for name, value in self.options.items()]
        return ", ".join(said) + (", with gradients" if self.slopes else "")

    @property
    def flops(self) -> float:
        """Floating-point operations of the matrix products; half of them under a causal mask."""
        window = self.options.get("window") or self.length
        pairs = (self.queries or self.length) * min(window, self.length)
        if self.options.get("causal") and window >= self.length:
            pairs //= 2
        return (2 if not self.slopes else 7) * 2.0 * self.batch * self.heads * self.head_dim * pairs

    @property
    def bytes(self) -> float:
        """Keys and values in half precision, read once: what decoding cannot do without."""
        return 2.0 * 2 * self.batch * self.length * (self.kv_heads or self.heads) * self.head_dim

    def asked(self, dtype: str) -> dict[str, Any]:
        """Options of the contestants' task."""
        q = [self.batch, self.queries or self.length, self.heads, self.head_dim]
        k = [self.batch, self.length, self.kv_heads or self.heads, self.head_dim]
        return {"q": q, "k": k, "dtype": dtype, "slopes": self.slopes, **self.options}


CAUSAL = {"causal": True}
CPU = [
    Case(8, 128, 12, 64),
    Case(4, 512, 12, 64),
    Case(1, 1500, 6, 64),
    Case(1, 4096, 8, 64),
    Case(1, 4096, 8, 64, options=CAUSAL),
    Case(1, 4096, 8, 64, options={"causal": True, "window": 256}),
    Case(4, 4096, 2, 64, options=CAUSAL),
    Case(1, 2048, 8, 64, options=CAUSAL, slopes=True),
]
ODD = {"causal": True, "window": 1024, "softcap": 30.0, "sinks": True}
GPU = [
    *(
        Case(max(1, 16384 // length), length, 16, head_dim, options=CAUSAL, slopes=slopes)
        for slopes in (False, True)
        for head_dim in (64, 128, 256)
        for length in (1024, 4096, 8192, 16384, 32768)
    ),
    *(Case(2, 8192, 32, 128, 8, options, slopes) for slopes in (False, True) for options in (
        CAUSAL, {"causal": True, "window": 1024}, {"causal": True, "softcap": 30.0}, {"causal": True, "sinks": True},
        {"causal": True, "segments": 4}, ODD,
    )),
]  # fmt: skip
GPU += [Case(batch, length, 32, 128, 8, queries=1) for batch in (1, 8, 64) for length in (8192, 32768)]
TINY = [Case(1, 64, 2, 16, options=CAUSAL), Case(1, 64, 2, 16, slopes=True)]


def measure(lab: Lab) -> Section:
    """Times every contestant on every case."""
    platform = os.environ.get("JAX_PLATFORMS", "cpu")
    dtype = "float32" if platform == "cpu" else "bfloat16"
    cases = TINY if lab.size == "tiny" else CPU if platform == "cpu" else GPU
    named = [Contestant(f"formax {name}", "formax", "with_formax", {"backend": name}, optional=True)
             for name in BACKENDS[platform]]  # fmt: skip
    contestants = [DEFAULT, *named, TORCH, *([] if platform == "cpu" else [TOKAMAX])]
    peak = next((speed for name, speed in PEAKS.items() if name in os.environ.get("FORMAX_GPU", "")), None)
    rows, data, targets = [], [], []
    with ExitStack() as stack:
        workers = [stack.enter_context(lab.worker(one)) for one in contestants]
        for case in cases:
            tell(str(case))
            # Half precision rounds the weights before they meet the values.
            agreement = 1e-3 if dtype == "float32" else 5e-2
            seconds = lab.compare(workers, "attention", case.asked(dtype), agreement=agreement)
            for name, found in seconds.items():
                spread, ratio = Spread.of(found), Spread.of_ratios(found, seconds[DEFAULT.name])
                speed, unit = (case.bytes, "GB/s") if case.queries else (case.flops, "GFLOP/s")
                speed /= spread.median
                share = f", {100 * speed / peak[bool(case.queries)]:.0f} %" if peak else ""
                rows.append((str(case), name, spread.seconds(), f"{ratio:.2f}", f"{speed / 1e9:.0f} {unit}{share}"))
            data.append({"case": str(case), "flops": case.flops, "seconds": seconds})
            if platform == "cpu" and lab.size == "base" and case.length >= 4096:
                ratio = Spread.of_ratios(seconds["formax xla"], seconds["formax xla_chunked"])
                targets.append(target(f"{case}, xla / xla_chunked", ratio.median, 1.0, at_least=True))
    header = ("case", "", "time", "time / formax", "speed, share of the peak")
    return Section("Attention", header, rows, {"cases": data}, ["\n".join(targets)] if targets else [])


if __name__ == "__main__":
    run({"attention": measure})
