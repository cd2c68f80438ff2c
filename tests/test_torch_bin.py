"""PyTorch checkpoints without PyTorch: every dtype and layout it writes, and every way to abuse a pickle."""

import os
import pickle
import random
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formax.conversion import torch_bin, torch_pickle
from formax.conversion.checkpoint import Checkpoint, CheckpointError, open_checkpoint

DATA = Path(__file__).parent / "data" / "torch_bin"
INDEX = np.arange(12).reshape(3, 4)
MATRIX = np.arange(24, dtype=np.float32).reshape(4, 6)
DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    *("uint64", "uint32", "uint16", "uint8", "bool", "float8_e8m0fnu"),
]


def expected(dtype: str) -> np.ndarray:
    """The rule of `oracle/make_torch_bin.py`."""
    if dtype == "bool":
        return INDEX % 3 == 0
    if dtype == "float8_e8m0fnu":
        return (2.0 ** (INDEX % 5)).astype(ml_dtypes.float8_e8m0fnu)
    if dtype.startswith("uint"):
        return INDEX.astype(dtype)
    if dtype.startswith("complex"):
        return ((INDEX - 5.0) + 1j * (INDEX + 1.0)).astype(dtype)
    return (INDEX - 5.0).astype(getattr(ml_dtypes, dtype, None) or dtype)


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    return found.dtype == wanted.dtype and found.shape == wanted.shape and found.tobytes() == wanted.tobytes()


# An assembler for pickles that PyTorch would not write.


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return pickle.LONG1 + bytes([size]) + value.to_bytes(size, "little", signed=True)


def name(module: str, attribute: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def sequence(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def numbers(*items: int) -> bytes:
    return sequence(*(number(item) for item in items))


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + sequence(*arguments) + pickle.REDUCE


def mapping(**items: bytes) -> bytes:
    pairs = b"".join(text(key) + value for key, value in items.items())
    return pickle.EMPTY_DICT + pickle.MARK + pairs + pickle.SETITEMS


def storage(numel: int = 6, kind: str = "FloatStorage", key: str = "0", view: bytes | None = None) -> bytes:
    identifier = [text("storage"), name("torch", kind), text(key), text("cpu"), number(numel)]
    return sequence(*identifier, *([] if view is None else [view])) + pickle.BINPERSID


def tensor(stored: bytes, offset: bytes, shape: bytes, strides: bytes) -> bytes:
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, stored, offset, shape, strides, pickle.NEWFALSE, call(name("collections", "OrderedDict")))


GOOD = tensor(storage(), number(0), numbers(2, 3), numbers(3, 1))
SIX = np.arange(6, dtype="<f4")


def program(body: bytes) -> bytes:
    return pickle.PROTO + b"\x02" + body + pickle.STOP


def archive(path: Path, body: bytes, records: dict[str, bytes] | None = None, compression: int = 0) -> Path:
    """Writes the zip format around a pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", body)
        for key, content in ({"data/0": SIX.tobytes()} if records is None else records).items():
            file.writestr(f"archive/{key}", content)
    return path


def stream(path: Path, body: bytes, keys: list[str], elements: bytes, little_endian: bool = True) -> Path:
    """Writes the format from before 1.6 around a pickle."""
    system = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {}}
    head = [torch_bin.MAGIC_NUMBER, torch_bin.PROTOCOL_VERSION, system]
    pickles = [pickle.dumps(value, protocol=2) for value in head] + [body, pickle.dumps(keys, protocol=2)]
    path.write_bytes(b"".join(pickles) + elements)
    return path


@pytest.fixture(params=["zip", "legacy"])
def fixture(request: pytest.FixtureRequest) -> Checkpoint:
    return open_checkpoint(DATA / f"{request.param}.bin")


def test_every_dtype_and_layout(fixture: Checkpoint) -> None:
    tied = np.arange(10, dtype=np.float32)
    wanted = {f"dtype.{dtype}": expected(dtype) for dtype in DTYPES} | {
        "transposed": MATRIX.T,
        "part": MATRIX[1:3, ::2],
        "tied.a": tied,
        "tied.b": tied,
        "expanded": np.broadcast_to(np.arange(3, dtype=np.float32)[:, None], (3, 5)),
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
        "parameter": MATRIX.astype(ml_dtypes.bfloat16),
    }
    assert list(fixture) == list(wanted)
    assert fixture.format == "torch"
    assert fixture.metadata == {"no_tensor": "a string"}
    for key, value in wanted.items():
        assert fixture[key].shape == value.shape
        assert fixture[key].dtype == value.dtype
        assert same(fixture.read(key), value), key
        assert not fixture.read(key).flags.writeable


def test_tensors_are_views_into_the_file(fixture: Checkpoint) -> None:
    assert fixture.read("transposed").strides == (4, 24)
    assert fixture.read("part").strides == (24, 8)
    assert np.shares_memory(fixture.read("tied.a"), fixture.read("tied.b"))


@pytest.mark.parametrize("file", ["nested.bin", "nested_legacy.bin", "protocol4.bin"])
def test_state_dict_is_found(file: str) -> None:
    opened = open_checkpoint(DATA / file)
    assert list(opened) == ["weight", "bias"]
    assert opened.read("weight").tolist() == [[0, 1], [2, 3], [4, 5]]
    assert opened.read("bias").tolist() == [0, 1, 2]
    beside = {"epoch": "3", "optimizer": "dict of length 2", "lr": "0.5", "note": "None"}
    assert opened.metadata == ({} if file == "protocol4.bin" else beside)


def test_entries_beside_the_tensors(tmp_path: Path) -> None:
    small = pickle.BININT + struct.pack("<i", -3)
    body = mapping(small=small, w=GOOD, big=number(2**80), half=pickle.BINFLOAT + struct.pack(">d", 0.5), s=storage())
    opened = open_checkpoint(archive(tmp_path / "a.bin", program(body)))
    assert opened.metadata == {"small": "-3", "big": str(2**80), "half": "0.5", "s": "storage"}


def test_one_of_several_state_dicts(tmp_path: Path) -> None:
    body = mapping(ema=mapping(w=GOOD), state_dict=mapping(w=GOOD, v=GOOD))
    assert list(open_checkpoint(archive(tmp_path / "a.bin", program(body)))) == ["w", "v"]
    body = mapping(ema=mapping(w=GOOD), average=mapping(w=GOOD))
    with pytest.raises(CheckpointError, match=r"a\.bin: holds several dicts of tensors, 'ema', 'average'"):
        open_checkpoint(archive(tmp_path / "a.bin", program(body)))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("module.bin", r"module\.bin: the pickle names torch\.nn\.modules\.linear\.Linear"),
        ("namespace.bin", r"namespace\.bin: at key 'args': the pickle names argparse\.Namespace"),
        ("conjugated.bin", r"conjugated\.bin: at key 'weight': the tensor is lazily conjugated"),
    ],
)
def test_what_is_no_state_dict_is_refused(file: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(DATA / file)


# Pickles that want to do something.


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("form", ["zip", "stream", "bare"])
def test_nothing_is_called(tmp_path: Path, protocol: int, form: str) -> None:
    target = tmp_path / "made"
    body = pickle.dumps({"first": 1, "encoder.weight": Evil(target)}, protocol=protocol)
    path = tmp_path / "evil.bin"
    if form == "zip":
        archive(path, body)
    elif form == "stream":
        stream(path, body, [], b"")
    else:
        path.write_bytes(body)
    # Protocols 0 and 1 have instructions of their own for plain values, and no magic byte to tell what the file is.
    named = "at key 'encoder.weight': the pickle names posix.mkdir" if protocol >= 2 else ""
    with pytest.raises(CheckpointError, match=f"evil.bin.*{named}"):
        open_checkpoint(path)
    assert not target.exists()
    pickle.loads(body)
    assert target.exists(), "the pickle was harmless and proved nothing"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"(" + text("touch x") + b"iposix\nsystem\n", "names posix.system"),
        (b"(" + text("x") + b"icollections\nOrderedDict\n", "creates an instance of collections.OrderedDict"),
        (text("posix") + text("system") + pickle.STACK_GLOBAL, "names posix.system"),
        (name("builtins", "eval"), "names builtins.eval"),
        (name("torch._utils", "_rebuild_tensor_v2.__globals__"), "names torch._utils._rebuild_tensor_v2.__globals__"),
        (name("torch", "load"), "names torch.load"),
        (name("collections", "OrderedDict") + sequence() + pickle.NEWOBJ, r"instruction b'\\x81'"),
        (pickle.EXT1 + b"\x01", r"instruction b'\\x82'"),
        (name("collections", "OrderedDict") + mapping(fromkeys=number(1)) + pickle.BUILD, "treats a Label as a dict"),
        (call(name("torch", "FloatStorage"), number(10)), "calls storage with arguments that PyTorch does not write"),
        (call(number(1)), "calls a int"),
        (sequence(text("module"), number(1)) + pickle.BINPERSID, "not the storage of a tensor"),
        (text("storage") + pickle.BINPERSID, "not the storage of a tensor"),
        (call(name("torch", "Size"), number(3)), "calls Size with arguments"),
        (call(name("collections", "OrderedDict"), sequence(number(3))), "made of something else than pairs"),
    ],
)
def test_labels_have_no_power(tmp_path: Path, body: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(archive(tmp_path / "a.bin", program(mapping(w=body))))


def test_the_key_at_fault_is_named(tmp_path: Path) -> None:
    evil = name("posix", "system")
    for body in (
        mapping(a=text("b"), right=evil),
        mapping(a=text("b"), right=text("c") + evil + pickle.TUPLE2),
        mapping(a=text("b"), right=sequence(text("c"), number(1), evil)),
        mapping(a=mapping(b=GOOD), right=tensor(storage(), evil, numbers(2), numbers(1))),
        mapping(a=mapping(b=GOOD, right=evil)),
        pickle.EMPTY_DICT + text("right") + text("c") + evil + pickle.TUPLE2 + pickle.SETITEM,
    ):
        with pytest.raises(CheckpointError, match=r"at key 'right': the pickle names posix\.system"):
            open_checkpoint(archive(tmp_path / "a.bin", program(body)))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (pickle.BINUNICODE8 + struct.pack("<Q", 2**60), "string of 1152921504606846976 bytes"),
        (pickle.BINUNICODE + struct.pack("<I", 2**20), "truncated"),
        (pickle.BINUNICODE + struct.pack("<I", 1) + b"\xff", "not UTF-8"),
        (pickle.FRAME + b"\xff", "truncated"),
        (b"cos", "does not end"),
        (pickle.TUPLE, "did not open"),
        (pickle.EMPTY_DICT + pickle.MARK + pickle.REDUCE, "more from its stack"),
        (number(1) + number(2) + pickle.APPEND, "treats a int as a list"),
        (pickle.BINGET + b"\x07", "recalls value 7"),
        (pickle.EMPTY_DICT + pickle.MARK + number(1) + pickle.SETITEMS, "without a value"),
        (pickle.EMPTY_DICT + pickle.EMPTY_LIST + number(1) + pickle.SETITEM, "a key of type list"),
        (b"", "more from its stack"),
    ],
)
def test_damaged_pickles(tmp_path: Path, body: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(archive(tmp_path / "a.bin", program(body)))


def test_bombs_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Sixty tuples that each hold the one before twice: hashing or printing the last would take 2^60 steps.
    tower = pickle.EMPTY_TUPLE + pickle.BINPUT + b"\0"
    tower += (pickle.BINGET + b"\0" + pickle.TUPLE2 + pickle.BINPUT + b"\0") * 60
    with pytest.raises(CheckpointError, match="a key of type tuple"):
        open_checkpoint(archive(tmp_path / "a.bin", program(pickle.EMPTY_DICT + tower + number(1) + pickle.SETITEM)))
    with pytest.raises(CheckpointError, match="holds a tuple of length 2"):
        open_checkpoint(archive(tmp_path / "a.bin", program(tower)))
    # A memo index of 2^32 - 1 makes Python's own machine allocate a table of that size.
    far = pickle.LONG_BINPUT + b"\xff\xff\xff\xff"
    assert list(open_checkpoint(archive(tmp_path / "a.bin", program(mapping(w=GOOD) + far)))) == ["w"]
    monkeypatch.setattr(torch_pickle, "MAX_INSTRUCTIONS", 1000)
    with pytest.raises(CheckpointError, match="more than 1000 instructions"):
        open_checkpoint(archive(tmp_path / "a.bin", program(pickle.NONE * 1001)))
    monkeypatch.setattr(torch_bin, "MAX_PICKLE", 1000)
    with pytest.raises(CheckpointError, match="at most 1000 are read"):
        open_checkpoint(archive(tmp_path / "a.bin", program(pickle.NONE * 1001)))


# Tensors that do not lie where they should.


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "message"),
    [
        (number(1), numbers(2, 3), numbers(3, 1), "reach outside"),
        (number(0), numbers(2, 3), numbers(4, 1), "reach outside"),
        (number(0), numbers(7), numbers(1), "reach outside"),
        (number(0), numbers(2), numbers(2**61), "reach outside"),
        (number(6), numbers(), numbers(), "reach outside"),
        (number(-1), numbers(2), numbers(1), "offset"),
        (text("0"), numbers(2), numbers(1), "offset"),
        (pickle.NEWTRUE, numbers(2), numbers(1), "offset"),
        (number(5), numbers(2), numbers(-1), "strides must be integers"),
        (number(0), numbers(2), sequence(text("1")), "strides must be integers"),
        (number(0), numbers(2), pickle.NONE, "strides must be integers"),
        (number(0), numbers(2), numbers(1, 1), "1 dimensions and 2 strides"),
        (number(0), numbers(-2), numbers(1), "none negative"),
        (number(0), number(2), numbers(1), "none negative"),
        (number(0), numbers(*[1] * 65), numbers(*[1] * 65), "65 dimensions"),
        (number(0), numbers(2**40), numbers(0), "expanded"),
        (number(0), numbers(2**62), numbers(0), "larger than any memory"),
        (number(0), numbers(0, 2**62), numbers(1, 1), "larger than any memory"),
    ],
)
def test_no_tensor_reaches_outside_its_storage(
    tmp_path: Path, offset: bytes, shape: bytes, strides: bytes, message: str
) -> None:
    body = program(mapping(w=tensor(storage(), offset, shape, strides)))
    with pytest.raises(CheckpointError, match=f"a.bin: tensor 'w': .*{message}"):
        open_checkpoint(archive(tmp_path / "a.bin", body))


def test_the_last_element_is_inside(tmp_path: Path) -> None:
    body = mapping(
        last=tensor(storage(), number(5), numbers(), numbers()),
        ends=tensor(storage(), number(0), numbers(2), numbers(5)),
        # The stride along an axis of one element means nothing; NumPy could not even hold this one.
        one=tensor(storage(), number(3), numbers(1, 3), numbers(2**70, 1)),
        end=tensor(storage(), number(6), numbers(0), numbers(1)),
    )
    opened = open_checkpoint(archive(tmp_path / "a.bin", program(body)))
    assert {key: opened.read(key).tolist() for key in opened} == {
        "last": 5,
        "ends": [0, 5],
        "one": [[3, 4, 5]],
        "end": [],
    }


def test_storages_are_checked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor 'w': its storage '0' is not in the file"):
        open_checkpoint(archive(tmp_path / "a.bin", program(mapping(w=GOOD)), {}))
    with pytest.raises(CheckpointError, match="tensor 'w': its storage '0' has 20 bytes, 24 are needed"):
        open_checkpoint(archive(tmp_path / "a.bin", program(mapping(w=GOOD)), {"data/0": bytes(20)}))


def test_views_of_storages_in_old_files(tmp_path: Path) -> None:
    elements = struct.pack("<q", 6) + SIX.tobytes()
    view = sequence(text("1"), number(2), number(3))
    whole = tensor(storage(view=pickle.NONE), number(0), numbers(2, 3), numbers(3, 1))
    part = tensor(storage(view=view), number(1), numbers(2), numbers(1))
    opened = open_checkpoint(stream(tmp_path / "a.bin", program(mapping(whole=whole, part=part)), ["0"], elements))
    assert opened.read("whole").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert opened.read("part").tolist() == [3, 4]
    outside = tensor(storage(view=view), number(1), numbers(3), numbers(1))
    with pytest.raises(CheckpointError, match=r"tensor 'w': .* reach outside"):
        open_checkpoint(stream(tmp_path / "a.bin", program(mapping(w=outside)), ["0"], elements))
    beyond = storage(view=sequence(text("1"), number(4), number(3)))
    with pytest.raises(CheckpointError, match="at key 'w': storage '0' is a view that does not lie in its 6 elements"):
        open_checkpoint(stream(tmp_path / "a.bin", program(mapping(w=beyond)), ["0"], elements))


def test_the_oldest_way_to_rebuild(tmp_path: Path) -> None:
    rebuild = call(name("torch._utils", "_rebuild_tensor"), storage(), number(0), numbers(6), numbers(1))
    pairs = pickle.EMPTY_LIST + pickle.EMPTY_LIST + text("w") + pickle.APPEND + rebuild + pickle.APPEND + pickle.APPEND
    body = program(call(name("collections", "OrderedDict"), pairs))
    assert open_checkpoint(archive(tmp_path / "a.bin", body)).read("w").tolist() == SIX.tolist()


@pytest.mark.parametrize(
    ("keys", "elements", "message"),
    [
        (["0"], struct.pack("<q", 6) + SIX.tobytes()[:-1], "storage '0' ends at byte .* it is truncated"),
        (["0"], struct.pack("<q", 5) + SIX.tobytes(), "storage '0' has 5 elements, the pickle says 6"),
        (["0", "0"], (struct.pack("<q", 6) + SIX.tobytes()) * 2, "storage '0' is listed twice"),
        (["0", "1"], (struct.pack("<q", 6) + SIX.tobytes()) * 2, "storage '1' is listed twice or used by no tensor"),
        ([], b"", "tensor 'w': its storage '0' is not in the file"),
        ([0], b"", "must hold strings"),
    ],
)
def test_old_files_are_checked(tmp_path: Path, keys: list[Any], elements: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(stream(tmp_path / "a.bin", program(mapping(w=GOOD)), keys, elements))


# Files that are damaged, or something else.


def test_archives_that_torch_does_not_write(tmp_path: Path) -> None:
    path, body = tmp_path / "a.bin", program(mapping(w=GOOD))
    data = {"data/0": SIX.tobytes()}
    assert open_checkpoint(archive(path, body)).read("w").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert list(open_checkpoint(archive(path, body, data | {"byteorder": b"little"}))) == ["w"]
    with pytest.raises(CheckpointError, match="big-endian"):
        open_checkpoint(archive(path, body, data | {"byteorder": b"big"}))
    with pytest.raises(CheckpointError, match="TorchScript"):
        open_checkpoint(archive(path, body, data | {"constants.pkl": b""}))
    with pytest.raises(CheckpointError, match=r"record 'archive/data.pkl' is compressed"):
        open_checkpoint(archive(path, body, data, zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match=r"2 records named 'data.pkl'"):
        open_checkpoint(archive(path, body, data | {"b/data.pkl": body}))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("word/document.xml", "<xml/>")
    with pytest.raises(CheckpointError, match=r"0 records named 'data.pkl'"):
        open_checkpoint(path)
    with zipfile.ZipFile(path, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file.writestr("archive/data.pkl", body)
        file.writestr("archive/data.pkl", body)
    with pytest.raises(CheckpointError, match=r"record 'archive/data.pkl' twice"):
        open_checkpoint(path)


def test_a_record_longer_than_the_file(tmp_path: Path) -> None:
    body = program(mapping(w=tensor(storage(600), number(0), numbers(600), numbers(1))))
    path = archive(tmp_path / "a.bin", body, {"data/0": SIX.tobytes()})
    content = path.read_bytes()
    sizes = struct.pack("<II", 24, 24)
    assert content.count(sizes) == 2, "in the local header and in the directory"
    path.write_bytes(content.replace(sizes, struct.pack("<II", 2400, 2400)))
    with pytest.raises(CheckpointError, match=r"record 'archive/data/0' ends at byte \d+, the file at byte \d+"):
        open_checkpoint(path)


def test_streams_that_torch_does_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(pickle.dumps({"w": [1.0, 2.0]}, protocol=2))
    with pytest.raises(CheckpointError, match=r"not one that torch.save wrote"):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match="big-endian"):
        open_checkpoint(stream(path, program(mapping(w=GOOD)), [], b"", little_endian=False))
    monkeypatch.setattr(torch_bin, "PROTOCOL_VERSION", 1002)
    with pytest.raises(CheckpointError, match="not version 1002"):
        open_checkpoint(DATA / "legacy.bin")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (GOOD, "holds a tensor, not a dict of tensors"),
        (pickle.EMPTY_LIST + GOOD + pickle.APPEND, "holds a list of length 1, not a dict"),
        (mapping(a=number(1), b=mapping(c=mapping(d=GOOD))), "holds no dict of tensors; its keys are 'a', 'b'"),
        (pickle.EMPTY_DICT, "its keys are none"),
        (pickle.EMPTY_DICT + number(3) + GOOD + pickle.SETITEM, "a tensor has the key 3"),
    ],
)
def test_values_that_are_no_state_dict(tmp_path: Path, body: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(archive(tmp_path / "a.bin", program(body)))


@pytest.mark.parametrize("file", ["zip.bin", "legacy.bin"])
def test_truncated_files(tmp_path: Path, file: str) -> None:
    content = (DATA / file).read_bytes()
    path = tmp_path / "cut.bin"
    # Ending a legacy file behind its last byte of data is the only harmless cut; 31 is coprime to every alignment.
    for length in [*range(1, len(content), 31), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.bin"):
            open_checkpoint(path)


@pytest.mark.parametrize("file", ["zip.bin", "legacy.bin", "nested_legacy.bin", "protocol4.bin"])
@settings(max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_damaged_files_never_crash(tmp_path_factory: pytest.TempPathFactory, file: str, seed: int) -> None:
    content = bytearray((DATA / file).read_bytes())
    chance = random.Random(seed)
    for _ in range(chance.choice([1, 1, 2, 10])):
        content[chance.randrange(len(content))] = chance.choice([0, 0xFF, chance.randrange(256)])
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    path.write_bytes(content)
    try:
        opened = open_checkpoint(path)
    except CheckpointError:
        return
    for key in opened:
        np.array(opened.read(key))


def test_torch_is_not_imported() -> None:
    assert "torch" not in sys.modules
