"""Forward passes of one family of every kind, at published sizes, beside PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness import COMPILED, FORMAX, TORCH, Lab, run, tell
from benchmarks.tables import Section, Spread, target

# Asked for: speed relative to torch eager.
TARGET = 1.3


@dataclass(frozen=True)
class Case:
    """A model and what it is called with.

    Attributes:
        model_type: the family, whose default configuration is the published size.
        architecture: the class in both libraries.
        inputs: {name: (kind, shape)}; kinds are "ids" (below `vocabulary`), "ones" and "floats".
        output: the field that is compared.
        config: what differs from the default configuration.
        vocabulary: see above.
    """

    model_type: str
    architecture: str
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]
    output: str
    config: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: int = 1000


def text(batch: int, length: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Ids and a mask of ones."""
    return {"input_ids": ("ids", (batch, length)), "attention_mask": ("ones", (batch, length))}


IMAGES = {"pixel_values": ("floats", (8, 3, 224, 224))}
SPEECH = {"input_features": ("floats", (1, 80, 3000)), "decoder_input_ids": ("ids", (1, 32))}
CASES: Mapping[str, Case] = {
    "GPT-2 small 8x128": Case("gpt2", "GPT2LMHeadModel", text(8, 128), "logits"),
    "GPT-2 small 1x128": Case("gpt2", "GPT2LMHeadModel", text(1, 128), "logits"),
    "T5 small 8x128 -> 8x32": Case(
        "t5",
        "T5ForConditionalGeneration",
        {**text(8, 128), "decoder_input_ids": ("ids", (8, 32))},
        "logits",
    ),
    "ViT base 8x224x224": Case("vit", "ViTModel", IMAGES, "last_hidden_state"),
    "ResNet-50 8x224x224": Case("resnet", "ResNetForImageClassification", IMAGES, "logits", {"num_labels": 1000}),
    "Whisper tiny 1x3000 -> 1x32": Case("whisper", "WhisperForConditionalGeneration", SPEECH, "logits"),
}
# For trying it out: the same kinds, small.
TINY: Mapping[str, Case] = {
    "GPT-2": Case(
        "gpt2", "GPT2LMHeadModel", text(2, 16), "logits", {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 1000}
    ),
    "ResNet": Case(
        "resnet",
        "ResNetForImageClassification",
        {"pixel_values": ("floats", (1, 3, 32, 32))},
        "logits",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]},
    ),
}


def measure(lab: Lab) -> Section:
    """Times formax and PyTorch, as it comes and compiled, on every case."""
    rows, targets, data = [], [], []
    for name, case in (CASES if lab.size == "base" else TINY).items():
        path = str(lab.folder / f"{case.model_type}-{case.architecture}")
        tell(name)
        with ExitStack() as stack:
            workers = [stack.enter_context(lab.worker(contestant)) for contestant in (FORMAX, TORCH, COMPILED)]
            made = {"checkpoint": path, "model_type": case.model_type, "architecture": case.architecture}
            lab.prepare(workers[0], "checkpoint", {**made, "config": dict(case.config)})
            workers[0].time(1)
            options = {**made, "inputs": case.inputs, "output": case.output, "vocabulary": case.vocabulary}
            seconds = lab.compare(workers, "call", options)
        for contestant, found in seconds.items():
            spread, ratio = Spread.of(found), Spread.of_ratios(found, seconds[FORMAX.name])
            rows.append((name, contestant, spread.seconds(), f"{ratio:.2f}"))
            if contestant == TORCH.name and lab.size == "base":
                targets.append(target(f"{name}, torch eager / formax", ratio.median, TARGET, at_least=True))
        data.append({"case": name, "seconds": seconds})
    notes = ["\n".join(targets)] if targets else []
    return Section("Archetypes", ("case", "", "time", "time / formax"), rows, {"cases": data}, notes)


if __name__ == "__main__":
    run({"archetypes": measure})
