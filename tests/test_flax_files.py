"""Flax's checkpoints: the tensors and names that the reference saves, the bytes that Flax writes, and broken files."""

import json
import random
import re
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from battery.goldens import Golden
from oracle.compare import error
from oracle.frameworks import CASES, Case, model_from, path_of

import formax
from formax.conversion import flax_msgpack
from formax.conversion.checkpoint import CheckpointError, open_checkpoint, write_checkpoint
from formax.conversion.mapped import Region
from formax.core.frameworks import FrameworkError
from formax.inspection import inspect_table

KEPT = [case for case in CASES["flax"] if case.kept]


def bits(x: Any) -> list[Any]:
    """Shape, dtype and checksum."""
    return [list(x.shape), x.dtype.name, zlib.crc32(np.ascontiguousarray(x).tobytes())]


def tensors_in(folder: Path) -> dict[str, list[Any]]:
    """What a folder's files hold, by names without collections."""
    with open_checkpoint(folder) as opened:
        return {name: bits(opened.read(name)) for name in opened}


def stored(folder: Path) -> dict[str, list[Any]]:
    """What msgpack finds in a folder's files: arrays by their full names."""
    msgpack = pytest.importorskip("msgpack")

    def array(code: int, data: bytes) -> Any:
        shape, dtype, content = msgpack.unpackb(data)
        return bits(np.frombuffer(content, dtype).reshape(shape))

    def flat(tree: Any, name: str) -> dict[str, list[Any]]:
        if isinstance(tree, list):
            return {name: tree}
        return {key: x for part in tree for key, x in flat(tree[part], f"{name}/{part}" if name else part).items()}

    found: dict[str, list[Any]] = {}
    for path in sorted(folder.glob("*.msgpack")):
        found |= flat(msgpack.unpackb(path.read_bytes(), ext_hook=array), "")
    return found


def assert_equal(found: Any, expected: Any) -> None:
    assert found.architecture is expected.architecture
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


@pytest.mark.parametrize("case", CASES["flax"], ids=lambda case: case.name)
def test_written_as_the_reference_writes_it_and_read_back(case: Case, tmp_path: Path) -> None:
    model = model_from(case, tmp_path / "pytorch", formax)
    written = model.save_pretrained(tmp_path / "flax", format="flax", max_shard_size=case.shard_size)
    assert {path.name for path in written} >= {"config.json"}
    record = json.loads(path_of("flax", case).read_text())["tensors"]
    assert stored(tmp_path / "flax") == record
    assert tensors_in(tmp_path / "flax") == {flax_msgpack.plain_name(name): one for name, one in record.items()}
    found, report = formax.from_pretrained(tmp_path / "flax", output_loading_info=True)
    assert (report.initialised, report.mismatched, report.left_out) == ((), (), ())
    # Counts of batches no other framework keeps; Pegasus's positions are computed there, and here nonsense.
    if model.config.model_type not in ("resnet", "regnet", "pegasus"):
        assert_equal(found, model)


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
def test_a_file_of_the_reference_opens(case: Case, tmp_path: Path) -> None:
    model = model_from(case, tmp_path / "pytorch", formax)
    folder = path_of("flax", case).with_suffix("")
    found, report = formax.from_pretrained(folder, output_loading_info=True)
    assert (report.initialised, report.mismatched, report.left_out) == ((), (), ())
    again = tmp_path / "again"
    found.save_pretrained(again, format="flax", max_shard_size=case.shard_size)
    assert stored(again) == stored(folder)
    if model.config.model_type != "resnet":
        assert_equal(found, model)


@pytest.mark.parametrize("name", ["bert/masked_lm", "gpt2/lm_head", "t5/encoder", "resnet/image_classification"])
def test_outputs_are_the_goldens(name: str, tmp_path: Path) -> None:
    golden = Golden(*name.split("/"))
    expected, _ = golden.open(tmp_path)
    expected.save_pretrained(tmp_path / "flax", format="flax")
    out = formax.from_pretrained(tmp_path / "flax")(**golden.inputs)
    checked = {field: value for field, value in golden.outputs.items() if "." not in field}
    for field, value in checked.items():
        assert error(value, np.asarray(getattr(out, field))) < 1e-4, field
    assert checked


def test_the_same_bytes_as_flax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths around every limit of MessagePack; arrays in pieces; every dtype."""
    serialization = pytest.importorskip("flax.serialization")
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 4096)
    monkeypatch.setattr(flax_msgpack, "CHUNK", 4096)
    random_bits = np.random.default_rng(0)
    leaves: dict[str, Any] = {
        f"n{size}": random_bits.integers(0, 9, size).astype(np.int8) for size in (0, 1, 2, 225, 240, 255, 256, 999)
    }
    leaves |= {
        f"{name}": np.ones((2, 3), dtype) for name, dtype in flax_msgpack.DTYPES.items() if name != "float8_e5m2"
    }
    leaves |= {"scalar": np.array(3, np.float32), "x" * 40: np.zeros((300, 1)), "y" * 300: np.zeros((70000, 0))}
    leaves |= {"pieces": random_bits.standard_normal((3, 700)).astype(np.float32)}
    tree: dict[str, Any] = {"a": {"b": leaves, "empty" * 2: {str(i): np.array([i], np.float16) for i in range(20)}}}
    flat = {f"a/{outer}/{name}": leaf for outer, inner in tree["a"].items() for name, leaf in inner.items()}
    path = tmp_path / "flax_model.msgpack"
    with path.open("wb") as file:
        regions = {name: Region(leaf.shape, leaf.dtype, 0) for name, leaf in flat.items()}
        flax_msgpack.write_flax(file.write, regions, lambda name: flat[name])
    assert path.read_bytes() == serialization.to_bytes(tree)
    with open_checkpoint(path) as opened:
        assert list(opened) == list(flat)
        for name, leaf in flat.items():
            assert bits(opened.read(name)) == bits(leaf)
            opened.release(name)


def test_inspecting_names_what_is_in_the_file() -> None:
    text = inspect_table(path_of("flax", KEPT[0]).with_suffix(""))
    assert re.search(
        r"layers\.0\.mlp\.down\.kernel +7 x 12 +float32 .* bert/encoder/layer/0/output/dense/kernel\n", text
    )
    assert "initialised" not in text


def test_shards_and_what_is_removed(tmp_path: Path) -> None:
    tensors = {f"layer/{i}/kernel": np.full((4, 4), i, np.float32) for i in range(5)}
    write_checkpoint(tmp_path, tensors, tensors.__getitem__, max_shard_size=130, framework="flax")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [*(f"flax_model-0000{i}-of-00003.msgpack" for i in (1, 2, 3)), "flax_model.msgpack.index.json"]
    with open_checkpoint(tmp_path) as opened:
        assert (opened.format, opened.framework, len(opened)) == ("flax", "flax", 5)
    (tmp_path / "model.safetensors").write_bytes(b"another format's")
    write_checkpoint(tmp_path, tensors, tensors.__getitem__, framework="flax")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flax_model.msgpack", "model.safetensors"]


def test_flax_weights_in_safetensors(tmp_path: Path) -> None:
    """As the reference's Flax classes save them with `safe_serialization=True`."""
    from safetensors.numpy import save_file

    case = KEPT[0]
    model = model_from(case, tmp_path / "pytorch", formax)
    folder = path_of("flax", case).with_suffix("")
    with open_checkpoint(folder) as opened:
        tensors = {name.replace("/", "."): np.array(opened.read(name)) for name in opened}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "flax"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert_equal(formax.from_pretrained(tmp_path), model)


def test_picking_a_kind_of_weights(tmp_path: Path) -> None:
    case = KEPT[0]
    first = model_from(case, tmp_path / "both", formax)
    second = first.replace(params=jax.tree.map(lambda x: x + 1, first.params))
    second.save_pretrained(tmp_path / "both", format="flax")
    assert_equal(formax.from_pretrained(tmp_path / "both"), first)
    assert_equal(formax.from_pretrained(tmp_path / "both", from_pt=True), first)
    assert_equal(formax.from_pretrained(tmp_path / "both", from_flax=True), second)
    with pytest.raises(CheckpointError, match=r"expected one of tf_model\.h5.*without from_pt=.*model\.safetensors"):
        formax.from_pretrained(tmp_path / "both", from_tf=True)
    with pytest.raises(ValueError, match="at most one"):
        formax.from_pretrained(tmp_path / "both", from_tf=True, from_flax=True)


def test_a_head_that_should_be_tied(tmp_path: Path) -> None:
    """Flax's Llama ties nothing: a head in its file counts, and is not passed over where a configuration ties it."""
    model_from(Case("llama/old_names"), tmp_path / "model", formax).save_pretrained(tmp_path / "flax", format="flax")
    with pytest.raises(CheckpointError, match="unexplained: 'lm_head/kernel'"):
        formax.from_pretrained(tmp_path / "flax", tie_word_embeddings=True)


def test_what_flax_does_not_have(tmp_path: Path) -> None:
    def refuse(name: str, match: str, **changes: Any) -> None:
        model = model_from(Case(name, changes), tmp_path / str(len(list(tmp_path.iterdir()))), formax)
        with pytest.raises(FrameworkError, match=match):
            model.save_pretrained(tmp_path / "refused", format="flax")

    refuse("mamba/model", "mamba does not exist in Flax; it exists in PyTorch")
    refuse("gpt2/sequence_classification", "exists in PyTorch and TensorFlow: format='pytorch' or 'tf'")
    refuse("llama/tied", "llama with .*tie_word_embeddings=True does not exist in Flax")
    refuse("bert/relative_key", r"no place for layers\.0\.attn\.distance\.embedding")
    refuse("vit/pruned_heads", "pruned_heads=")
    assert not (tmp_path / "refused").exists()
    model = model_from(KEPT[0], tmp_path / "model", formax)
    with pytest.raises(ValueError, match="format='jax' is none of 'pytorch', 'flax', 'tf'"):
        model.save_pretrained(tmp_path / "refused", format="jax")


def test_what_is_missing_has_the_frameworks_name(tmp_path: Path) -> None:
    folder = path_of("flax", KEPT[0]).with_suffix("")
    with open_checkpoint(folder) as opened:
        tensors = {name: np.array(opened.read(name)) for name in opened}
    kernel = "bert/encoder/layer/0/output/dense/kernel"
    tensors["bert/encoder/layer/0/output/dens/kernel"] = tensors.pop(kernel)
    config = {"config.json": (folder / "config.json").read_bytes()}
    write_checkpoint(tmp_path, tensors, tensors.__getitem__, framework="flax", files=config)
    with pytest.raises(CheckpointError, match=rf"missing: '{kernel}' \(nearest: '.*dens/kernel'\)"):
        formax.from_pretrained(tmp_path)


# --- broken files


def packed(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(data)
    return path


def array(shape: bytes = b"\x91\x02", dtype: bytes = b"\xa7float32", data: bytes = b"\xc4\x08" + bytes(8)) -> bytes:
    inner = b"\x93" + shape + dtype + data
    return b"\xc7" + bytes([len(inner)]) + b"\x01" + inner


GOOD = b"\x81\xa1w" + array()


def test_the_hand_made_file_is_good(tmp_path: Path) -> None:
    with open_checkpoint(packed(tmp_path, GOOD)) as opened:
        assert opened.read("w").tolist() == [0, 0]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\x81\xa1w" + array(shape=b"\x91\x03"), "'w': float32 of shape .3,. takes 12 bytes, there are 8"),
        (b"\x81\xa1w" + array(shape=b"\x92\xcf" + b"\xff" * 8 + b"\x02"), "'w': its shape is larger than any memory"),
        (b"\x81\xa1w" + array(shape=b"\x91\xff"), "'w': its shape must be a list of integers, none negative"),
        (b"\x81\xa1w" + array(shape=b"\x91\xa1x"), "'w': an integer is needed"),
        (b"\x81\xa1w" + array(shape=b"\x02"), "'w': its shape must be a list"),
        (b"\x81\xa1w" + array(dtype=b"\xa6object"), "'w': its dtype is 'object'"),
        (b"\x81\xa1w" + array(data=b"\xc6\xff\xff\xff\xff"), "'w': float32 of shape"),
        (b"\x81\xa1w\xc9\xff\xff\xff\xff\x01\x93", "'w': its 4294967295 bytes end behind the file"),
        (b"\x81\xa1w\xd6\x05abcd", "'w': it is an extension value of type 5"),
        (b"\x81\xa1w\xc1", "'w': the byte 0xc1 begins no value"),
        (b"\x81\xa1w\xdd\xff\xff\xff\xff", "'w': an array or a map is needed, there is a value of the kind 'array'"),
        (b"\x81\xa1w\x05", "'w': an array or a map is needed, there is a value of the kind 'int'"),
        (b"\xdf\xff\xff\xff\xff" + GOOD[1:], "byte .* is needed"),
        (b"\x82" + GOOD[1:] + GOOD[1:], "it holds the name 'w' twice"),
        (GOOD + b"\x00", "1 bytes follow the tree"),
        (b"\x81\xa3a/b" + array(), "'a/b': a name must not be empty or hold a slash"),
        (b"\x81\xa1\xff" + array(), "a name is not UTF-8"),
        (b"\x81\xa1a" * 70 + b"\x80", "more than 64 deep"),
        (b"\x81\xa1a\x83\xb9__msgpack_chunked_array__\xc2", "must be true"),
        (
            b"\x81\xa1a\x83\xb9__msgpack_chunked_array__\xc3\xa5shape\x81\xa10\x05\xa6chunks\x81\xa10" + array(),
            "'a': its pieces do not make up the shape .5,.",
        ),
        (
            b"\x81\xa1a\x83\xb9__msgpack_chunked_array__\xc3\xa5shape\x81\xa11\x05",
            "'a/shape/1': the entry 0 is called '1'",
        ),
        (b"\x81\xa1a\x81\xb9__msgpack_chunked_array__\xc3", "'a': an array in pieces needs a shape"),
        (b"\x82\xa6params" + GOOD + b"\xabbatch_stats" + GOOD, "two collections hold 'w'"),
    ],
)
def test_a_broken_file_is_refused(data: bytes, match: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"flax_model\.msgpack: .*{match}"):
        open_checkpoint(packed(tmp_path, data))


def test_truncated_or_damaged_anywhere(tmp_path: Path) -> None:
    """A part of a file is refused; one with wrong bytes is, too, or holds arrays that lie inside it."""
    tensors = {f"a/b/{i}": np.arange(i, dtype=ml_dtypes.bfloat16) for i in range(1, 9)}
    write_checkpoint(tmp_path, tensors, tensors.__getitem__, framework="flax")
    path = tmp_path / "flax_model.msgpack"
    whole = path.read_bytes()
    for end in range(len(whole)):
        with pytest.raises(CheckpointError, match="flax_model"):
            open_checkpoint(packed(tmp_path, whole[:end]))
    numbers = random.Random(0)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(numbers.randrange(1, 4)):
            data[numbers.randrange(len(data))] = numbers.randrange(256)
        try:
            with open_checkpoint(packed(tmp_path, bytes(data))) as opened:
                assert all(opened.read(name).nbytes <= len(whole) for name in opened)
        except CheckpointError as problem:
            assert "flax_model" in str(problem)  # noqa: PT017


def test_memory_is_not_what_the_file_says(tmp_path: Path) -> None:
    path = packed(tmp_path, b"\x81\xa1w\xc9" + struct.pack(">I", 2**31) + b"\x01\x93\xdd\x7f\xff\xff\xff")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="end behind the file"):
            open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
