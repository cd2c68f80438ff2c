"""The forward pass of BERT at four shapes, beside the least time that this machine could take.

That floor is the larger of two: the arithmetic at the speed of the best matrix product measured in the same run, and
reading the weights once at the speed of the best matrix-vector product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks.harness import COMPILED, FLAX, FORMAX, PLAIN, TORCH, Lab, Worker, run, tell
from benchmarks.tables import Section, Spread, target

SHAPES = ((8, 128), (1, 128), (1, 1), (4, 512))
FLOAT32 = 4
# Asked for: shape -> speed relative to torch eager.
TARGETS = {(8, 128): 1.7, (1, 128): 1.7}


@dataclass(frozen=True)
class Peak:
    """What the machine can do at best: floating-point operations and bytes read, per second."""

    flops: float
    bandwidth: float

    def floor(self, config: Mapping[str, int], shape: tuple[int, int]) -> float:
        """Seconds that a forward pass takes at least."""
        return max(flops(config, *shape) / self.flops, weight_bytes(config) / self.bandwidth)


def flops(config: Mapping[str, int], batch: int, length: int) -> int:
    """Floating-point operations of the matrix products of a forward pass; everything else is small beside them."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    projections = 2 * length * (4 * hidden * hidden + 2 * hidden * inner)
    attention = 2 * 2 * length * length * hidden
    pooler = 2 * hidden * hidden
    return batch * (config["num_hidden_layers"] * (projections + attention) + pooler)


def weight_bytes(config: Mapping[str, int]) -> int:
    """Bytes of the matrices that a forward pass reads whole, in float32."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    layer = 4 * hidden * hidden + 2 * hidden * inner
    return FLOAT32 * (config["num_hidden_layers"] * layer + hidden * hidden)


def measure_peak(lab: Lab, workers: Sequence[Worker]) -> Peak:
    """The best that any of these reached in any call."""
    n, rows, columns = (2048, 16384, 4096) if lab.size == "base" else (256, 1024, 512)
    tell("the machine's peak")
    products = lab.compare(workers, "matmul", {"n": n}, of=min)
    streams = lab.compare(workers, "stream", {"rows": rows, "columns": columns}, of=min)
    return Peak(
        2 * n**3 / min(min(seconds) for seconds in products.values()),
        FLOAT32 * rows * columns / min(min(seconds) for seconds in streams.values()),
    )


def measure(lab: Lab) -> Section:
    """Times every contestant at every shape."""
    cases: dict[tuple[int, int], dict[str, list[float]]] = {}
    with ExitStack() as stack:
        formax, torch, compiled, flax, plain = (
            stack.enter_context(lab.worker(contestant)) for contestant in (FORMAX, TORCH, COMPILED, FLAX, PLAIN)
        )
        # Before and after: a machine that was disturbed at one time would give a floor that is too high.
        peaks = [measure_peak(lab, (plain, formax, torch))]
        for shape in lab.shapes or SHAPES:
            tell(f"forward {shape[0]}x{shape[1]}")
            cases[shape] = lab.compare((formax, torch, compiled, flax), "forward", lab.options(shape))
        peaks.append(measure_peak(lab, (plain, formax, torch)))
    peak = Peak(max(one.flops for one in peaks), max(one.bandwidth for one in peaks))

    rows, targets = [], []
    for shape, seconds in cases.items():
        case, floor = f"{shape[0]}x{shape[1]}", peak.floor(lab.config, shape)
        for name, found in seconds.items():
            spread, ratio = Spread.of(found), Spread.of_ratios(found, seconds[FORMAX.name])
            rows.append((case, name, spread.seconds(), f"{ratio:.2f}", f"{100 * floor / spread.median:.0f} %"))
            if name == TORCH.name and shape in TARGETS and lab.size == "base":
                targets.append(target(f"{case}, torch eager / formax", ratio.median, TARGETS[shape], at_least=True))
        share = floor / Spread.of(seconds[FORMAX.name]).median
        rows.append((case, "floor", f"{1000 * floor:.3g} ms", f"{share:.2f}", ""))
    notes = [f"Peak of this machine in this run: {peak.flops / 1e9:.0f} GFLOP/s, {peak.bandwidth / 1e9:.1f} GB/s."]
    data = [
        {
            "shape": shape,
            "floor": peak.floor(lab.config, shape),
            "flops": flops(lab.config, *shape),
            "seconds": seconds,
        }
        for shape, seconds in cases.items()
    ]
    return Section(
        "Forward",
        ("batch x length", "", "time", "time / formax", "share of the floor"),
        rows,
        {"peak": vars(peak), "cases": data},
        [*notes, "\n".join(targets)] if targets else notes,
    )


if __name__ == "__main__":
    run({"forward": measure})
