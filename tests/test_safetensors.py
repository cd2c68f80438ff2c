"""The safetensors format: the same bytes as the library writes, every dtype, and headers that lie."""

import json
import math
import random
import tracemalloc
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.numpy import load_file, save_file

from formax.conversion import mapped, safetensors
from formax.conversion.checkpoint import CheckpointError, open_checkpoint, write_checkpoint
from formax.conversion.safetensors import DTYPES, SUB_BYTE

Arrays = Mapping[str, np.ndarray]


def write(path: Path, tensors: Arrays, metadata: Mapping[str, str] | None = None) -> Path:
    """Writes one file with the writer under test."""
    declared = {name: safetensors.check_storable(name, array) for name, array in tensors.items()}
    with path.open("wb") as file:
        safetensors.write_safetensors(file.write, declared, tensors.__getitem__, metadata or {})
    return path


def raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """Writes a file with any header."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def bits(array: np.ndarray) -> tuple[np.dtype, tuple[int, ...], bytes]:
    return array.dtype, array.shape, array.tobytes()


def sample(dtype: np.dtype, shape: tuple[int, ...] = (3, 5)) -> np.ndarray:
    """All sorts of bits, also those of NaN; for bool only the two that mean something."""
    content = np.random.default_rng(0).integers(0, 256, math.prod(shape) * dtype.itemsize, np.uint8)
    return (content % 2 if dtype == np.bool_ else content).view(dtype).reshape(shape)


def test_same_bytes_as_the_library(tmp_path: Path) -> None:
    tensors = {
        "b.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "a.bias": np.ones(3, np.float32),
        "scalar": np.array(2, np.float32),
        "none": np.zeros((0, 4), np.float32),
        'odd "name"\n\té\x01': np.zeros(1, np.float32),
    }
    for metadata in ({"format": "pt"}, None):
        save_file(tensors, tmp_path / "theirs", metadata=metadata)
        assert write(tmp_path / "ours", tensors, metadata).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_same_order_as_the_library(tmp_path: Path) -> None:
    # Its NumPy side knows these; how it ranks the others was read off its low-level interface.
    known = [dtype for dtype in DTYPES.values() if dtype.kind in "biufc" and dtype.type.__module__ == "numpy"]
    tensors = {f"{part}.{dtype.name}": sample(dtype) for part in "zab" for dtype in known}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert write(tmp_path / "ours", tensors, {"format": "pt"}).read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype(tmp_path: Path, code: str) -> None:
    array = sample(DTYPES[code])
    path = write(tmp_path / "a.safetensors", {"w": array})
    assert json.loads(path.read_bytes()[8:].split(b"}}")[0] + b"}}")["w"]["dtype"] == code
    opened = open_checkpoint(path)
    assert opened["w"].dtype == array.dtype
    assert bits(opened.read("w")) == bits(array)


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = {"w": np.arange(6, dtype=np.float16).reshape(2, 3), "n": np.array(3, np.int64)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "np", "by": "me"})
    opened = open_checkpoint(tmp_path / "a.safetensors")
    assert opened.format == "safetensors"
    assert opened.metadata == {"format": "np", "by": "me"}
    assert {name: bits(opened.read(name)) for name in opened} == {name: bits(array) for name, array in tensors.items()}
    assert list(opened) == ["n", "w"], "in the order of the file"
    assert opened["w"].file == tmp_path / "a.safetensors"


def test_reads_views(tmp_path: Path) -> None:
    opened = open_checkpoint(write(tmp_path / "a.safetensors", {"w": np.arange(6, dtype=np.float32)}))
    view = opened.read("w")
    assert not view.flags.writeable
    assert np.shares_memory(view, opened.read("w"))
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


@pytest.mark.parametrize("code", ["F32", "BF16", "F8_E4M3", "I64"])
def test_unaligned_data(tmp_path: Path, code: str) -> None:
    array = sample(DTYPES[code])
    header = json.dumps({"w": entry(code, array.shape, (0, array.nbytes))}).encode()
    for padding in range(8):
        path = raw(tmp_path / "a.safetensors", header + b" " * padding, array.tobytes())
        view = open_checkpoint(path).read("w")
        assert bits(view) == bits(array)
        assert bits(np.ascontiguousarray(view.T)) == bits(np.ascontiguousarray(array.T))


names = st.text(min_size=0, max_size=8).filter(lambda name: name != "__metadata__" and name.isprintable())
arrays = st.sampled_from(list(DTYPES.values())).flatmap(
    lambda dtype: npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5).map(
        lambda shape: sample(dtype, shape)
    )
)


@given(tensors=st.dictionaries(names, arrays, max_size=6), metadata=st.dictionaries(names, st.text(), max_size=2))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, tensors: Arrays, metadata: dict[str, str]) -> None:
    metadata = {key: value for key, value in metadata.items() if value.isprintable()}
    path = write(tmp_path_factory.getbasetemp() / "round.safetensors", tensors, metadata)
    opened = open_checkpoint(path)
    assert opened.metadata == metadata
    assert {name: bits(opened.read(name)) for name in opened} == {name: bits(array) for name, array in tensors.items()}
    begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert begin % 8 == 0


@given(seed=st.integers(0, 2**32))
def test_damaged_headers_never_crash(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    chance = random.Random(seed)
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    tensors = {name: np.zeros((2, 3), np.float32) for name in ("a", "b")}
    content = bytearray(write(path, tensors, {"format": "pt"}).read_bytes())
    for _ in range(chance.choice([1, 1, 2, 10])):
        where = chance.randrange(len(content) - 48)
        content[where] = chance.choice([*b'0123456789{}[]",:-.eE \\u', chance.randrange(256)])
    path.write_bytes(content)
    try:
        opened = open_checkpoint(path)
    except CheckpointError:
        return
    for name in opened:
        np.array(opened.read(name))


def test_truncated_files(tmp_path: Path) -> None:
    path = write(tmp_path / "cut.safetensors", {"w": np.zeros(6, np.float32)})
    content = path.read_bytes()
    for length in range(1, len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors: "):
            open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"'w': its data end at byte \d+ and the file at byte \d+; .* truncated"):
        open_checkpoint(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(CheckpointError, match="the tensors end at byte"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"w": entry("F99")}, "tensor 'w': unknown dtype 'F99'; known are BOOL"),
        ({"w": entry(["F32"])}, "unknown dtype"),
        ({"w": entry(None)}, "unknown dtype"),
        *(({"w": entry(code)}, f"tensor 'w': dtype {code} packs several elements") for code in SUB_BYTE),
        ({"w": entry(shape=[3])}, r"shape \[3\] of F32 takes 12 bytes, its data_offsets span 8"),
        ({"w": entry(shape=[-2])}, "none negative"),
        ({"w": entry(shape=[-2, -1])}, "none negative"),
        ({"w": entry(shape=[2.0])}, "none negative"),
        ({"w": entry(shape=[True, 2])}, "none negative"),
        ({"w": entry(shape="2")}, "none negative"),
        ({"w": entry(shape=2)}, "none negative"),
        ({"w": entry(shape=[1] * 65)}, "65 dimensions"),
        ({"w": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}, "larger than any memory"),
        ({"w": entry(shape=[2**64 + 2])}, "larger than any memory"),
        ({"w": entry(offsets=[0])}, "two integers"),
        ({"w": entry(offsets=[0, "8"])}, "two integers"),
        ({"w": entry(offsets=[8, 0])}, "ascending"),
        ({"w": entry(offsets=[-8, 0])}, "ascending"),
        ({"w": entry(shape=[4], offsets=[0, 16])}, "truncated"),
        ({"w": entry(shape=[1], offsets=[0, 4])}, "the tensors end at byte"),
        ({"w": entry(shape=[1], offsets=[4, 8])}, "tensor 'w' leaves a hole before it"),
        ({"v": entry(), "w": entry()}, "tensor 'w' overlaps the one before it"),
        ({"v": entry(), "w": entry(shape=[1], offsets=[4, 8])}, "tensor 'w' overlaps the one before it"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "must hold 'dtype', 'shape' and 'data_offsets'"),
        ({"w": [1]}, "must hold 'dtype', 'shape' and 'data_offsets'"),
        ({"__metadata__": {"a": 1}, "w": entry()}, "'__metadata__' must map strings to strings"),
        ({"__metadata__": "a", "w": entry()}, "'__metadata__' must map strings to strings"),
        ([], "must be a JSON object, not list"),
        (b'{"w":1,"w":2}', "holds the key 'w' twice"),
        (b'{"w":{"shape":1,"shape":2}}', "holds the key 'shape' twice"),
        (b'{"w":', "not valid JSON"),
        (b'{"\xff":1}', "not valid JSON"),
        (b'{"a":' + b"[" * 100_000, "not valid JSON"),
        (b'{"a":' + b"1" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"a.safetensors: .*{message}"):
        open_checkpoint(raw(tmp_path / "a.safetensors", header, bytes(8)))


def test_header_lengths_that_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    for length in (100_000_001, 2**63, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(CheckpointError, match=f"header would be {length} bytes long"):
            open_checkpoint(path)
    path.write_bytes((100).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="the header ends at byte 108 and the file at byte 10"):
        open_checkpoint(path)
    assert len(open_checkpoint(raw(path, {}))) == 0
    monkeypatch.setattr(safetensors, "MAX_HEADER", 100)
    with pytest.raises(CheckpointError, match="the header of 2 tensors is"):
        write(path, {name: np.zeros(1) for name in "ab"})


def test_fields_of_later_versions_are_ignored(tmp_path: Path) -> None:
    path = raw(tmp_path / "a.safetensors", {"w": entry() | {"note": 1}}, bytes(8))
    assert list(open_checkpoint(path)) == ["w"]


def test_writes_strided_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = np.arange(4 * 6 * 5).reshape(4, 6, 5).astype(ml_dtypes.bfloat16)
    tensors = {
        "transposed": base.T,
        "permuted": base.transpose(1, 0, 2),
        "reversed": base[:, ::-1],
        "part": base[1:3, ::2, 1:],
        "broadcast": np.broadcast_to(base[:, :1], (4, 6, 5)),
        "none": base[:, :0].T,
    }
    wanted = {name: bits(array) for name, array in tensors.items()}
    for block in (1, 30, 100, 2**20):
        monkeypatch.setattr(safetensors, "BLOCK", block)
        opened = open_checkpoint(write(tmp_path / "a.safetensors", tensors))
        assert {name: bits(opened.read(name)) for name in tensors} == wanted


def test_strided_arrays_are_not_copied_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "BLOCK", 2**16)
    array = np.ones((1024, 1024), np.float32)
    for strided in (array.T, array.T[None]):
        tracemalloc.start()
        try:
            write(tmp_path / "a.safetensors", {"w": strided})
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < array.nbytes / 4


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def fetch(name: str) -> np.ndarray:
        assert not any(reference() is not None for reference in alive), "an earlier tensor is still held"
        array = np.full(10, ord(name), np.float32)
        alive.append(weakref.ref(array))
        return array

    write_checkpoint(tmp_path / "new", {name: np.empty(10, np.float32) for name in "abc"}, fetch, max_shard_size=80)
    assert len(alive) == 3
    assert open_checkpoint(tmp_path / "new").read("c").tolist() == [99] * 10


@pytest.mark.parametrize(
    ("fetched", "message"),
    [
        (np.zeros(3, np.float32), r"tensor 'w': declared as float32\[2\], but it is float32\[3\]"),
        (np.zeros(2, np.float16), r"tensor 'w': declared as float32\[2\], but it is float16\[2\]"),
        (np.zeros(2, ">f4"), r"tensor 'w': declared as float32\[2\], but it is >f4\[2\]"),
        (np.zeros((2, 1), np.float32), r"but it is float32\[2, 1\]"),
    ],
)
def test_fetched_tensors_are_checked(tmp_path: Path, fetched: np.ndarray, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(tmp_path / "new", {"w": np.zeros(2, np.float32)}, lambda _: fetched)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("w", np.complex128, "tensor 'w': safetensors cannot hold dtype complex128"),
        ("w", ml_dtypes.int4, "tensor 'w': safetensors cannot hold dtype int4"),
        ("w", ml_dtypes.float8_e4m3, "tensor 'w': safetensors cannot hold dtype float8_e4m3,"),
        ("w", np.dtype(">f4"), "tensor 'w': safetensors cannot hold dtype >f4"),
        ("w", object, "tensor 'w': safetensors cannot hold dtype object"),
        ("__metadata__", np.float32, "cannot be named '__metadata__'"),
    ],
)
def test_what_cannot_be_stored(tmp_path: Path, name: str, dtype: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(tmp_path / "new", {name: np.zeros(2, dtype)}, lambda _: np.zeros(2))
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_dtype(tmp_path: Path) -> None:
    class Declared:
        shape = (2,)
        dtype = "key<fry>"

    with pytest.raises(CheckpointError, match="tensor 'w': key<fry> is not a dtype that a file can hold"):
        write_checkpoint(tmp_path / "new", {"w": Declared()}, lambda _: np.zeros(2))


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray] = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.arange(3)}
    (path,) = write_checkpoint(tmp_path / "new", tensors, tensors.__getitem__)
    assert {name: bits(array) for name, array in load_file(path).items()} == {
        name: bits(array) for name, array in tensors.items()
    }


def test_empty_arrays_of_any_map(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"none": np.zeros((0, 3), np.float32)})
    file = mapped.MappedFile(path)
    region = safetensors.read_safetensors(file).tensors["none"]
    assert region.offset == file.size
    assert file.array(region).shape == (0, 3)
    file.release(region)
