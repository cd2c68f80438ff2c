"""Opening a checkpoint in a fresh process: time beside plain reading of its file, and peak memory beside its size.

Every turn is a process of its own, which has imported its framework before the clock starts. "Warm" means that the file
is in the system's page cache, "cold" that it was dropped from it just before the turn.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from benchmarks.harness import FLAX, FORMAX, PLAIN, TORCH, Contestant, Lab, Turn, run, tell
from benchmarks.tables import Section, Spread, target

CONTESTANTS = (PLAIN, FORMAX, TORCH, FLAX)
NAMES = {PLAIN.name: "reading the file"}
# Asked for: time relative to reading the file, peak memory relative to its size.
SLOWEST, LARGEST = 1.5, 1.25


def evict(path: Path) -> None:
    """Drops a file from the system's page cache (its dirty pages are written first)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def open_once(lab: Lab, contestant: Contestant, *, cold: bool) -> Turn | None:
    """One load in a fresh process; None if this contestant cannot."""
    checkpoint = lab.checkpoint()
    with lab.worker(contestant) as worker:
        if lab.prepare(worker, "load", {"checkpoint": str(checkpoint)}) is None:
            return None
        if cold:
            evict(checkpoint / "model.safetensors")
        return worker.time(1)


def grown(turn: Turn) -> int | None:
    """Bytes that memory grew by at its peak."""
    return None if turn.peak is None or turn.resident is None else turn.peak - turn.resident


def measure(lab: Lab) -> Section:
    """Lets every contestant open the checkpoint, warm and cold."""
    rows, cases, targets = [], [], []
    size = (lab.checkpoint() / "model.safetensors").stat().st_size
    # An unrecorded load of each: it compiles bytecode, warms the page cache, and shows who can take part.
    able = [contestant for contestant in CONTESTANTS if open_once(lab, contestant, cold=False) is not None]
    states = {"warm": False, "cold": True} if hasattr(os, "posix_fadvise") else {"warm": False}
    for state, cold in states.items():
        tell(f"load, {state}")
        turns = lab.rounds_of({one.name: partial(open_once, lab, one, cold=cold) for one in able})
        kept = {name: [turn for turn in found if turn is not None] for name, found in turns.items()}
        seconds = {name: [turn.seconds[0] for turn in found] for name, found in kept.items()}
        growth = {name: [grown(turn) for turn in found] for name, found in kept.items()}
        for name, found in seconds.items():
            ratio = Spread.of_ratios(found, seconds[PLAIN.name])
            known = [bytes_ / size for bytes_ in growth[name] if bytes_ is not None]
            peak = Spread.of(known) if known else None
            rows.append(
                (
                    state,
                    NAMES.get(name, name),
                    Spread.of(found).seconds(),
                    f"{ratio:.2f}",
                    f"{peak:.2f}" if peak else "",
                )
            )
            if name == FORMAX.name and lab.size == "base":
                targets.append(target(f"{state}, time / reading the file", ratio.median, SLOWEST, at_least=False))
                if peak:
                    targets.append(target(f"{state}, peak memory / file", peak.high, LARGEST, at_least=False))
        cases.append({"state": state, "seconds": seconds, "peak_bytes": growth})
    return Section(
        f"Load of {size / 1e6:.3g} MB",
        ("page cache", "", "time", "time / reading the file", "peak memory / file"),
        rows,
        {"file_bytes": size, "cases": cases},
        ["\n".join(targets)] if targets else [],
    )


if __name__ == "__main__":
    run({"load": measure})
