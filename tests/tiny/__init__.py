"""Small BERT checkpoints, as the reference lays them out, for the tests of opening and saving.

Names, layouts and files are written down here by hand and not taken from formax, so that the two can disagree.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from oracle import weights

Arrays = dict[str, np.ndarray]

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
}
CODES: dict[np.dtype[Any], str] = {
    np.dtype(dtype): code
    for code, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "BOOL": np.bool_,
    }.items()
}
DTYPES = {code: dtype for dtype, code in CODES.items()}


def config(architecture: str = "BertModel", **changes: Any) -> dict[str, Any]:
    """The content of a config.json."""
    return {"model_type": "bert", "architectures": [architecture], **SIZES, **changes}


def shapes(architecture: str = "BertModel", **changes: Any) -> dict[str, tuple[int, ...]]:
    """What `save_pretrained` of the reference writes for this architecture: names and shapes."""
    c = {"num_labels": 2, **config(architecture, **changes)}
    hidden, wide = c["hidden_size"], c["intermediate_size"]
    base: dict[str, tuple[int, ...]] = {}

    def linear(into: dict[str, tuple[int, ...]], name: str, rows: int, columns: int) -> None:
        into |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    def norm(into: dict[str, tuple[int, ...]], name: str) -> None:
        into |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}

    for table, rows in (("word", "vocab_size"), ("position", "max_position_embeddings"), ("token_type", "")):
        base[f"embeddings.{table}_embeddings.weight"] = (c[rows or "type_vocab_size"], hidden)
    norm(base, "embeddings.LayerNorm")
    for layer in (f"encoder.layer.{i}" for i in range(c["num_hidden_layers"])):
        for name in ("query", "key", "value"):
            linear(base, f"{layer}.attention.self.{name}", hidden, hidden)
        linear(base, f"{layer}.attention.output.dense", hidden, hidden)
        norm(base, f"{layer}.attention.output.LayerNorm")
        linear(base, f"{layer}.intermediate.dense", wide, hidden)
        linear(base, f"{layer}.output.dense", hidden, wide)
        norm(base, f"{layer}.output.LayerNorm")

    head: dict[str, tuple[int, ...]] = {}
    if architecture in ("BertForPreTraining", "BertForMaskedLM", "BertLMHeadModel"):
        head["cls.predictions.bias"] = (c["vocab_size"],)
        linear(head, "cls.predictions.transform.dense", hidden, hidden)
        norm(head, "cls.predictions.transform.LayerNorm")
    if architecture in ("BertForPreTraining", "BertForNextSentencePrediction"):
        linear(head, "cls.seq_relationship", 2, hidden)
    if architecture in ("BertForSequenceClassification", "BertForTokenClassification"):
        linear(head, "classifier", c["num_labels"], hidden)
    if architecture == "BertForMultipleChoice":
        linear(head, "classifier", 1, hidden)
    if architecture == "BertForQuestionAnswering":
        linear(head, "qa_outputs", c["num_labels"], hidden)

    no_pooler = ("MaskedLM", "LMHeadModel", "TokenClassification", "QuestionAnswering")
    if not architecture.endswith(no_pooler):
        linear(base, "pooler.dense", hidden, hidden)
    if architecture != "BertModel":
        base = {f"bert.{name}": shape for name, shape in base.items()}
    return base | head


def tensors(architecture: str = "BertModel", dtype: Any = np.float32, **changes: Any) -> Arrays:
    """Tensors of these names and shapes; equal names have equal values."""
    wanted = shapes(architecture, **changes)
    return {name: weights.tensor(name, shape, np.float32).astype(dtype) for name, shape in wanted.items()}


def noise(arrays: Mapping[str, np.ndarray], dtype: Any, seed: int = 0) -> Arrays:
    """Tensors of these shapes made of random bits: NaNs of all payloads, infinities, denormals, both zeros."""
    draw = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    out = {}
    for name, array in arrays.items():
        out[name] = draw.integers(0, 256, array.size * kind.itemsize, np.uint8).view(kind).reshape(array.shape)
        out[name].reshape(-1)[:1] = -0.0
    return out


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray], *, align: int = 8, offset: int = 0) -> None:
    """Writes a safetensors file whose elements begin `offset` bytes past a multiple of `align`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": CODES[array.dtype], "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * ((offset - 8 - len(text)) % align)
    content = (np.ascontiguousarray(array).tobytes() for array in arrays.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(content))


def read_tensors(path: Path) -> Arrays:
    """Reads a safetensors file, copying everything."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    assert header.pop("__metadata__", {"format": "pt"}) == {"format": "pt"}
    out = {}
    for name, entry in header.items():
        start, stop = (begin + offset for offset in entry["data_offsets"])
        out[name] = np.frombuffer(data[start:stop], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return out


def write(folder: Path, content: Mapping[str, Any], arrays: Mapping[str, np.ndarray], shards: int = 1) -> Path:
    """Writes config.json and the weights, in one file or in several with an index; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    if shards == 1:
        write_tensors(folder / "model.safetensors", arrays)
        return folder
    names, size = list(arrays), math.ceil(len(arrays) / shards)
    places: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        some = names[i * size : (i + 1) * size]
        write_tensors(folder / file, {name: arrays[name] for name in some})
        places |= dict.fromkeys(some, file)
    total = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def checkpoint(folder: Path, architecture: str = "BertModel", dtype: Any = np.float32, **changes: Any) -> Path:
    """Writes the checkpoint of an architecture; returns the folder."""
    return write(folder, config(architecture, **changes), tensors(architecture, dtype, **changes))


def bits(arrays: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What must be equal when arrays are to be the same to the last bit."""
    return {name: (str(array.dtype), tuple(array.shape), np.asarray(array).tobytes()) for name, array in arrays.items()}
