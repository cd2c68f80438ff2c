"""No framework: what NumPy and the file system do alone, as a scale for the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.task import Options, Task, sample, square, tall


def versions() -> dict[str, str]:
    return {"numpy": np.__version__}


def matmul(options: Options) -> Task:
    a = square(options)
    return Task(lambda: a @ a, sample(a @ a))


def stream(options: Options) -> Task:
    a, x = tall(options)
    return Task(lambda: a @ x, sample(a @ x))


def load(options: Options) -> Task:
    """The bytes of the checkpoint's file, in one go."""
    path = Path(options["checkpoint"]) / "model.safetensors"
    return Task(path.read_bytes)


TASKS = {"matmul": matmul, "stream": stream, "load": load}
