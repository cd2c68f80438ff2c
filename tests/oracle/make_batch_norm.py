"""Writes `tests/data/batch_norm.npz`: a tiny ResNet trained for three steps by PyTorch, batch norms included.

Run in the environment of `requirements.txt`: `python tests/oracle/make_batch_norm.py`, or with `--check` to compare.
The first weights are those of `oracle.weights`; the file holds the configuration, the images and labels of every step,
the losses, and every tensor after the last step (weights, running statistics, counters) under its name on disk. The
optimiser is SGD with the momentum and rate stored beside them.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `oracle` has the name that it has in the test suite

from oracle import weights

FILE = Path(__file__).resolve().parent.parent / "data" / "batch_norm.npz"
SIZES: dict[str, Any] = {
    "num_channels": 3,
    "embedding_size": 6,
    "hidden_sizes": [8, 12],
    "depths": [2, 1],
    "num_labels": 3,
}
RATE, MOMENTUM, STEPS, ROWS = 0.05, 0.9, 3, 4


def trained() -> dict[str, Any]:
    """What the file holds."""
    torch.set_num_threads(1)
    config = transformers.ResNetConfig(**SIZES)
    model = transformers.ResNetForImageClassification(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            kind = "int64" if name.endswith("num_batches_tracked") else "float32"
            tensor.copy_(torch.from_numpy(weights.tensor(name, tuple(tensor.shape), kind)))
    config.architectures = ["ResNetForImageClassification"]
    draw = np.random.RandomState(0)
    images = (draw.randint(-3, 4, (STEPS, ROWS, 3, 34, 45)) / 2).astype(np.float32)
    labels = draw.randint(0, 3, (STEPS, ROWS))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    losses = []
    for pixels, classes in zip(images, labels, strict=True):
        optimizer.zero_grad()
        loss = model(pixel_values=torch.from_numpy(pixels), labels=torch.from_numpy(classes)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = {f"after.{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    return {
        "config": np.asarray(json.dumps(config.to_dict(), sort_keys=True)),
        "pixel_values": (images * 2).astype(np.int8),  # halves, kept small
        "labels": labels,
        "losses": np.asarray(losses, np.float32),
        "rate": np.asarray(RATE),
        "momentum": np.asarray(MOMENTUM),
        **after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    made = trained()
    if not parser.parse_args().check:
        np.savez_compressed(FILE, **made)
        return
    with np.load(FILE) as stored:
        assert stored.files == list(made)
        for name in stored.files:
            if made[name].dtype.kind == "f":
                np.testing.assert_allclose(made[name], stored[name], rtol=1e-5, atol=1e-6, err_msg=name)
            else:
                np.testing.assert_array_equal(made[name], stored[name], err_msg=name)


if __name__ == "__main__":
    main()
