"""GGUF files: what is read from good ones, and what is said about bad ones."""

import random
import struct

import gguf as oracle
import jax.numpy as jnp
import numpy as np
import pytest

from raptax.io.gguf import GGUFFile
from raptax.quant.gguf import Encoding, dequantize

FLOATS = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
HEADER = struct.pack("<4sIQQ", b"GGUF", 3, 0, 0)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    """A small file with every kind of field and four encodings."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = oracle.GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 255)
    writer.add_int8("a.i8", -128)
    writer.add_uint16("a.u16", 65535)
    writer.add_int16("a.i16", -5)
    writer.add_uint32("a.u32", 2**32 - 1)
    writer.add_int32("a.i32", -7)
    writer.add_uint64("a.u64", 2**64 - 1)
    writer.add_int64("a.i64", -(2**63))
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "späße ▁")
    writer.add_array("a.words", ["", "Ġthe", "世界"])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -1.5])
    writer.add_array("a.bools", [True, False])
    writer.add_tensor("norm", FLOATS[0])
    writer.add_tensor("half", FLOATS.astype(np.float16))
    for kind in (oracle.GGMLQuantizationType.Q8_0, oracle.GGMLQuantizationType.BF16):
        raw = oracle.quants.quantize(FLOATS, kind)
        writer.add_tensor(kind.name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture
def reading(tmp_path):
    """Opens bytes as a file."""

    def opened(data: bytes) -> GGUFFile:
        path = tmp_path / "model.gguf"
        path.unlink(missing_ok=True)  # an earlier one may still be mapped
        path.write_bytes(data)
        return GGUFFile(path)

    return opened


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def file_of(fields: list[bytes] = (), tensors: list[bytes] = (), data=b"") -> bytes:
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(fields))
    body = header + b"".join(fields) + b"".join(tensors)
    return body + bytes(-len(body) % 32) + data


def tensor(name="w", shape=(32,), encoding=0, offset=0) -> bytes:
    layout = f"<I{len(shape)}QIQ"
    return text(name) + struct.pack(layout, len(shape), *shape, encoding, offset)


def test_fields(good, reading):
    fields = reading(good).fields
    assert fields["general.architecture"] == "llama"
    assert {key: value for key, value in fields.items() if key.startswith("a.")} == {
        "a.u8": 255,
        "a.i8": -128,
        "a.u16": 65535,
        "a.i16": -5,
        "a.u32": 2**32 - 1,
        "a.i32": -7,
        "a.u64": 2**64 - 1,
        "a.i64": -(2**63),
        "a.f32": 0.5,
        "a.f64": 0.1,
        "a.bool": True,
        "a.text": "späße ▁",
        "a.words": ["", "Ġthe", "世界"],
        "a.ints": [1, -2, 3],
        "a.floats": [0.5, -1.5],
        "a.bools": [True, False],
    }
    assert fields["a.bool"] is True


def test_tensors(good, reading):
    tensors = reading(good).tensors
    assert list(tensors) == ["norm", "half", "Q8_0", "BF16"]
    assert tensors["norm"].shape == (64,)
    np.testing.assert_array_equal(tensors["norm"].floats, FLOATS[0])
    np.testing.assert_array_equal(tensors["half"].floats, FLOATS.astype(np.float16))
    assert tensors["BF16"].floats.dtype == jnp.bfloat16
    np.testing.assert_allclose(tensors["BF16"].floats.astype("f4"), FLOATS, rtol=0.01)

    eight = tensors["Q8_0"]
    assert (eight.shape, eight.encoding) == ((4, 64), Encoding.Q8_0)
    assert eight.blocks.shape == (4, 2, 34)
    numbers = dequantize(jnp.asarray(eight.blocks), eight.encoding)
    np.testing.assert_allclose(numbers, FLOATS, atol=0.02)
    assert repr(eight) == "Tensor(Q8_0, (4, 64), Q8_0)"
    with pytest.raises(ValueError, match="Q8_0, which is blocks, not floats"):
        _ = eight.floats


def test_version_2_and_alignment(reading):
    field = text("general.alignment") + struct.pack("<II", 4, 64)
    table = [tensor("a", (1,)), tensor("b", (1,), offset=64)]
    data = file_of([field], table)
    data += bytes(-len(data) % 64) + struct.pack("<f60xf", 1, 2)
    tensors = reading(data[:4] + b"\2" + data[5:]).tensors
    assert [float(tensors[name].floats[0]) for name in "ab"] == [1, 2]


def test_real_file_reads_as_gguf_does(smollm2_path):
    ours, theirs = GGUFFile(smollm2_path), oracle.GGUFReader(smollm2_path)
    for key, field in theirs.fields.items():
        assert key.startswith("GGUF.") or ours.fields[key] == field.contents()
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(map(int, tensor.shape[::-1]))
        assert mine.encoding.name == tensor.tensor_type.name
        assert mine.raw.tobytes() == tensor.data.tobytes()


FIELD = text("k") + struct.pack("<I", 4) + b"1234"
BAD = {
    "empty": (b"", "is empty"),
    "another format": (b"PK\3\4" + HEADER[4:], r"is not a GGUF file.*b'PK"),
    "version 1": (HEADER[:4] + b"\1" + HEADER[5:], "is GGUF version 1; .* 2 and 3"),
    "big-endian": (b"GGUF\0\0\0\3" + HEADER[8:], "is big-endian"),
    "half a header": (HEADER[:20], "ends inside the header: needs 24 .* cut short"),
    "many fields": (
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**64 - 1) + FIELD,
        "ends inside a field's name",
    ),
    "many tensors": (
        struct.pack("<4sIQQ", b"GGUF", 3, 2**64 - 1, 0),
        "ends inside a tensor's name",
    ),
    "long name": (
        file_of([struct.pack("<Q", 2**63) + FIELD]),
        "ends inside a field's name: needs 92.* It is damaged",
    ),
    "long array": (
        file_of([text("k") + struct.pack("<IIQ", 9, 5, 2**61)]),
        "ends inside the field 'k': needs .* It is damaged",
    ),
    "long list of strings": (
        file_of([text("k") + struct.pack("<IIQ", 9, 8, 2**61)]),
        "ends inside the field 'k'",
    ),
    "type": (file_of([text("k") + struct.pack("<I", 13)]), "'k' has type 13"),
    "nested": (
        file_of([text("k") + struct.pack("<IIQ", 9, 9, 1)]),
        "'k' is an array of arrays",
    ),
    "field twice": (file_of([FIELD, FIELD]), "two fields named 'k'"),
    "name's text": (
        file_of([struct.pack("<Q", 1) + b"\xff" + FIELD[9:]]),
        "a field's name is not UTF-8",
    ),
    "alignment": (
        file_of([text("general.alignment") + struct.pack("<II", 4, 33)]),
        "alignment=33 must be a power of two",
    ),
    "alignment's type": (
        file_of([text("general.alignment") + struct.pack("<I", 8) + text("32")]),
        "alignment='32' must be",
    ),
    "tensor twice": (file_of([], [tensor()] * 2, bytes(128)), "two tensors named 'w'"),
    "tensors overlap": (
        file_of([], [tensor("a"), tensor("b", offset=32)], bytes(256)),
        "a and b overlap",
    ),
    "misaligned": (
        file_of([], [tensor(offset=8)], bytes(256)),
        "w starts at byte 8 of the data.*alignment 32",
    ),
    "cut short": (
        file_of([], [tensor("blk.0.w")], bytes(100)),
        r"ends inside blk.0.w: needs 192 bytes, has 164. Was its download cut short\?",
    ),
    "axes": (file_of([], [tensor(shape=())]), "w has 0 axes"),
    "no rows": (file_of([], [tensor(shape=(32, 0))]), r"w has shape \(0, 32\)"),
    "half a block": (
        file_of([], [tensor(shape=(33, 2), encoding=8)]),
        r"\(2, 33\), whose rows are not whole Q8_0 blocks of 32",
    ),
}


@pytest.mark.parametrize(("data", "sentence"), BAD.values(), ids=BAD)
def test_bad_files_say_why(reading, data, sentence):
    with pytest.raises(ValueError, match=rf"model\.gguf .*{sentence}"):
        reading(data)


@pytest.mark.parametrize(
    ("number", "stored"), [(17, "IQ2_XS"), (26, "I32"), (99, "encoding 99")]
)
def test_tensors_of_other_encodings_stop_no_file(reading, number, stored):
    """They are kept apart, so that a loader that needs one refuses it by name."""
    table = [tensor("a", (256,), number), tensor("b", offset=32)]
    file = reading(file_of([], table, bytes(256)))
    assert (list(file.tensors), file.unreadable) == (["b"], {"a": stored})
    with pytest.raises(ValueError, match="two tensors named 'a'"):
        reading(file_of([], [table[0], table[0]], bytes(256)))


def test_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        GGUFFile(tmp_path / "none.gguf")


def complaint(reading, data: bytes) -> str | None:
    """What a file's ValueError says, or None if all of it could be used."""
    try:
        for tensor in reading(data).tensors.values():
            tensor.blocks.sum()
            if tensor.encoding.is_plain:
                assert tensor.floats.shape == tensor.shape
    except ValueError as error:
        return str(error)
    return None


def test_cut_short_anywhere(good, reading):
    for size in range(len(good)):
        said = complaint(reading, good[:size])
        if said is None:  # only padding was lost
            assert good[size:].strip(b"\0") == b""
        else:
            assert "model.gguf" in said


def test_bits_flipped_anywhere(good, reading):
    rng = random.Random(0)
    said = []
    for _ in range(1000):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 4, 16))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        said.append(complaint(reading, bytes(data)))
    assert 100 < said.count(None) < 900
    assert all("model.gguf" in sentence for sentence in said if sentence)
