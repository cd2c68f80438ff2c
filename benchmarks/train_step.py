"""One step of masked-language-model training: forward, backward, and the update of AdamW on all parameters.

The loss is taken over all positions. Without dropout the losses of the first steps are compared, so that all are known
to do the same work; with dropout (0.1, as BERT was trained) each draws its own random numbers, which is part of the
time.
"""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.harness import COMPILED, FLAX, FORMAX, TORCH, Lab, run, tell
from benchmarks.tables import Section, Spread

SHAPES = ((8, 128),)
RATES = (0.0, 0.1)


def measure(lab: Lab) -> Section:
    """Times every contestant at every shape, without and with dropout."""
    rows, cases = [], []
    with ExitStack() as stack:
        workers = [stack.enter_context(lab.worker(contestant)) for contestant in (FORMAX, TORCH, COMPILED, FLAX)]
        for shape in lab.shapes or SHAPES:
            for rate in RATES:
                case = "x".join(map(str, shape)) + (f", dropout {rate}" if rate else "")
                tell(f"train step {case}")
                options = lab.options(shape, dropout=rate)
                seconds = lab.compare(workers, "train_step", options, same=not rate)
                for name, found in seconds.items():
                    ratio = Spread.of_ratios(found, seconds[FORMAX.name])
                    rows.append((case, name, Spread.of(found).seconds(), f"{ratio:.2f}"))
                cases.append({"shape": shape, "dropout": rate, "seconds": seconds})
    return Section("Training step", ("batch x length", "", "time", "time / formax"), rows, {"cases": cases})


if __name__ == "__main__":
    run({"train_step": measure})
