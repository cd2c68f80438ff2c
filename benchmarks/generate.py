"""Tokens of GPT-2 small at batch 1, beside the time that reading the weights takes.

Every new token needs all matrices of the model once, so with one row a step takes at least as long as they take to come
out of memory, at the speed of the best matrix-vector product measured in the same run.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from benchmarks.forward import measure_peak
from benchmarks.harness import FLAX, FORMAX, PLAIN, TORCH, Lab, run, tell
from benchmarks.tables import Section, Spread, target

PROMPT, NEW = 16, 64
FLOAT32 = 4
# Asked for: case -> {contestant: its time over formax's}.
TARGETS: Mapping[str, Mapping[str, float]] = {
    "greedy": {TORCH.name: 1.5, FLAX.name: 4.0},
    "4 beams": {TORCH.name: 1.5},
}


@dataclass(frozen=True)
class Way:
    """A way of generating.

    Attributes:
        settings: of `generate`, beside the number of tokens.
        flax: whether transformers' Flax classes have it.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    flax: bool = True


WAYS: Mapping[str, Way] = {
    "greedy": Way(),
    "4 beams": Way({"num_beams": 4}),
    # transformers looks for an end in what it guesses, also where there is none; this text does not come to it.
    "assisted by the text itself": Way({"prompt_lookup_num_tokens": 4, "eos_token_id": 1}, flax=False),
}
SIZES: Mapping[str, Mapping[str, int]] = {
    "base": {},
    "tiny": {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 1000},
}


def weight_bytes(size: Mapping[str, int]) -> int:
    """Bytes of the matrices of a GPT-2 that every token reads: those of the layers, and the word table as the head."""
    width, layers = size.get("n_embd", 768), size.get("n_layer", 12)
    return FLOAT32 * (layers * 12 * width * width + size.get("vocab_size", 50257) * width)


def measure(lab: Lab) -> Section:
    """Times all contestants at every way, and formax at buffers of several lengths."""
    config = SIZES[lab.size]
    path = str(lab.folder / "gpt2-GPT2LMHeadModel-generate")
    made = {"checkpoint": path, "model_type": "gpt2", "architecture": "GPT2LMHeadModel"}
    new = NEW if lab.size == "base" else 8
    options = {**made, "inputs": {"input_ids": ("ids", (1, PROMPT))}, "vocabulary": 1000}
    rows, targets, data = [], [], []
    with ExitStack() as stack:
        formax, torch, flax, plain = (
            stack.enter_context(lab.worker(contestant)) for contestant in (FORMAX, TORCH, FLAX, PLAIN)
        )
        lab.prepare(formax, "checkpoint", {**made, "config": dict(config)})
        formax.time(1)
        peak = measure_peak(lab, (plain, formax, torch))
        floor = new * weight_bytes(config) / peak.bandwidth
        for name, way in WAYS.items():
            tell(f"generate, {name}")
            settings = {"max_new_tokens": new, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
            workers = (formax, torch, flax) if way.flax else (formax, torch)
            seconds = lab.compare(workers, "generate", {**options, "settings": {**settings, **way.settings}})
            for contestant, found in seconds.items():
                spread, ratio = Spread.of(found), Spread.of_ratios(found, seconds[FORMAX.name])
                rate = f"{new / spread.median:.1f}"
                rows.append((name, contestant, spread.seconds(), rate, f"{ratio.median:.2f}"))
                asked = TARGETS.get(name, {}).get(contestant)
                if asked is not None and lab.size == "base":
                    targets.append(target(f"{name}, {contestant} / formax", ratio.median, asked, at_least=True))
            data.append({"way": name, "seconds": seconds})
        rows.append(("greedy", "floor", f"{1000 * floor:.3g} ms", f"{new / floor:.1f}", ""))
        tell("generate, buffers of several lengths")
        lengths = {}
        for room in (128, 512, 960) if lab.size == "base" else (32, 64):
            alone = lab.compare((formax,), "generate_in_room", {**options, "room": room, "new": new})
            lengths[room] = alone[FORMAX.name]
            rows.append((f"greedy, room for {room}", FORMAX.name, Spread.of(lengths[room]).seconds(), "", ""))
    notes = [
        f"{PROMPT} tokens of prompt and {new} new ones. Best bandwidth in this run: {peak.bandwidth / 1e9:.1f} GB/s."
    ]
    return Section(
        "Generate",
        ("", "", "time", "tokens / s", "time / formax"),
        rows,
        {"peak": vars(peak), "floor": floor, "ways": data, "rooms": lengths},
        [*notes, "\n".join(targets)] if targets else notes,
    )


if __name__ == "__main__":
    run({"generate": measure})
