"""Writes `tests/data/torch_bin/`: small checkpoints as `torch.save` makes them, for the reader that does without torch.

Run in the environment of `requirements.txt`: `python tests/oracle/make_torch_bin.py`. The values follow a rule that
`tests/test_torch_bin.py` repeats in NumPy, so the files come with no expected outputs. `bert/`, `bert_legacy/` and
`bert_shards/` are whole checkpoints, tied weights and all, with the weights of the golden `bert/act_relu`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `oracle` has the name that it has in the test suite

from oracle import weights

TESTS = Path(__file__).resolve().parent.parent
FOLDER = TESTS / "data" / "torch_bin"
GOLDEN = TESTS / "goldens" / "bert" / "act_relu.json"
SIGNED = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "complex64", "complex128")
SMALL = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
UNSIGNED = ("uint64", "uint32", "uint16", "uint8", "bool", "float8_e8m0fnu")


def values(dtype: str) -> torch.Tensor:
    """Twelve values that the dtype holds exactly, as (3, 4)."""
    index = torch.arange(12).reshape(3, 4)
    if dtype == "bool":
        return index % 3 == 0
    if dtype == "float8_e8m0fnu":
        return (2.0 ** (index % 5)).to(torch.float8_e8m0fnu)
    if dtype in UNSIGNED:
        return index.to(getattr(torch, dtype))
    if dtype.startswith("complex"):
        return torch.complex(index - 5.0, index + 1.0).to(getattr(torch, dtype))
    return (index - 5.0).to(getattr(torch, dtype))


def state_dict() -> dict[str, Any]:
    """One tensor of each dtype, and one of each way to lie in a storage."""
    matrix = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tied = torch.arange(10, dtype=torch.float32)
    tensors = {f"dtype.{dtype}": values(dtype) for dtype in (*SIGNED, *SMALL, *UNSIGNED)}
    return {
        **tensors,
        "transposed": matrix.T,
        "part": matrix[1:3, ::2],
        "tied.a": tied,
        "tied.b": tied,
        "expanded": torch.arange(3, dtype=torch.float32)[:, None].expand(3, 5),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(matrix.to(torch.bfloat16)),
        "no_tensor": "a string",
    }


def save(value: Any, name: str, **options: Any) -> None:
    """Saves one file and says so."""
    torch.save(value, FOLDER / name, **options)
    print(f"{name}: {(FOLDER / name).stat().st_size} bytes")


def main() -> None:
    """Writes all files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(2)).sum().backward()
    optimizer.step(lambda: None)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6.0).reshape(3, 2))
        layer.bias.copy_(torch.arange(3.0))

    save(state_dict(), "zip.bin")
    save(state_dict(), "legacy.bin", _use_new_zipfile_serialization=False)
    # A module's own state dict is an OrderedDict with attributes; protocol 4 has other instructions.
    save(layer.state_dict(), "protocol4.bin", pickle_protocol=4)
    nested = {
        "epoch": 3,
        "state_dict": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr": 0.5,
        "note": None,
    }
    save(nested, "nested.bin")
    save(nested, "nested_legacy.bin", _use_new_zipfile_serialization=False)
    save(layer, "module.bin")
    save({"state_dict": layer.state_dict(), "args": argparse.Namespace(lr=0.5)}, "namespace.bin")
    save({"weight": torch.tensor([1 + 2j]).conj()}, "conjugated.bin")
    save_model()


def save_model() -> None:
    """Writes a model as the reference saved models before safetensors: config.json and pytorch_model.bin."""
    golden = json.loads(GOLDEN.read_text())
    model = getattr(transformers, golden["architecture"])(transformers.BertConfig(**golden["config"]))
    found = {name: torch.from_numpy(weights.tensor(name, shape)) for name, (shape, _) in golden["keys"].items()}
    model.load_state_dict(found, strict=False)
    model.tie_weights()
    model.save_pretrained(FOLDER / "bert", safe_serialization=False)
    model.save_pretrained(FOLDER / "bert_shards", safe_serialization=False, max_shard_size="30KB")
    (FOLDER / "bert_legacy").mkdir(exist_ok=True)
    model.config.save_pretrained(FOLDER / "bert_legacy")
    save(model.state_dict(), "bert_legacy/pytorch_model.bin", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
