"""Headers of safetensors files that cannot be."""

import json

import pytest

from raptax.io import safetensors as safetensors_file

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD = {
    "a number": (7, "no JSON object"),
    "a list": ([GOOD], "no JSON object"),
    "no entry": ({"w": 3}, "w is described as 3"),
    "dtype": ({"w": GOOD | {"dtype": ["F32"]}}, "w is described as"),
    "shape": ({"w": GOOD | {"shape": 2}}, "w is described as"),
    "axes": ({"w": GOOD | {"shape": ["2"]}}, "w is described as"),
    "half": ({"w": GOOD | {"shape": [2.0]}}, "w is described as"),
    "negative": ({"w": GOOD | {"shape": [-1, -2]}}, "w is described as"),
    "offsets": ({"w": GOOD | {"data_offsets": ["0", "8"]}}, "w is described as"),
    "three": ({"w": GOOD | {"data_offsets": [0, 4, 8]}}, "w is described as"),
    "half a byte": ({"w": GOOD | {"data_offsets": [0.0, 8.0]}}, "w is described as"),
    "huge": ({"w": GOOD | {"shape": [2**62, 2**62]}}, "does not fit its bytes"),
    "unknown": ({"w": GOOD | {"dtype": "F128"}}, "has dtype 'F128'"),
    "long": ({"w": GOOD | {"shape": ["x" * 10**6]}}, "w is described as"),
}


def written(path, header: str):
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    return path


@pytest.mark.parametrize(("header", "sentence"), BAD.values(), ids=BAD)
def test_bad_headers_say_why(tmp_path, header, sentence):
    path = written(tmp_path / "a.safetensors", json.dumps(header))
    with pytest.raises(ValueError, match=f"^{path}: .*{sentence}") as told:
        safetensors_file.read(path)
    assert len(str(told.value)) < 500


def test_a_header_that_is_nested_too_deeply(tmp_path):
    path = written(tmp_path / "a.safetensors", "[" * 10**5)
    with pytest.raises(ValueError, match=f"^{path}: the header is no JSON"):
        safetensors_file.read(path)


def test_a_good_header(tmp_path):
    path = written(tmp_path / "a.safetensors", json.dumps({"w": GOOD}))
    assert safetensors_file.read(path)["w"].tolist() == [0.0, 0.0]
