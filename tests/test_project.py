"""The whole package: imports go down, sizes stay small, importing touches nothing."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from raptax import info
from raptax.kernels.cpu import library as native

ROOT = Path(__file__).parents[1]
PYTHON = "src", "tests", "tools", "benchmarks"

IMPORT_EVERYTHING = """
import importlib, pkgutil, raptax
for module in pkgutil.walk_packages(raptax.__path__, "raptax."):
    importlib.import_module(module.name)
"""


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_imports_only_go_down():
    result = tool("check_layers.py")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "slip",
    [
        "from ..nn import Linear",
        "from .. import nn",
        "from ..nn.linear import Linear",
        "from raptax.nn import Linear",
        "from raptax import nn",
        "import raptax.nn.linear",
        "def lazily():\n    from ..nn import Linear",
    ],
)
def test_a_climbing_import_is_named(tmp_path, slip):
    (tmp_path / "kernels").mkdir()
    planted = tmp_path / "kernels" / "native.py"
    planted.write_text(f"from .._core.types import B\nfrom . import paged\n{slip}\n")
    result = tool("check_layers.py", tmp_path)
    assert result.returncode == 1, result.stderr
    line = 3 + slip.count("\n")
    expected = (
        f"{planted}:{line}: kernels (level 3) imports nn (level 6), a level above it\n"
    )
    assert result.stdout == expected


@pytest.mark.parametrize("slip", ["import raptax", "from raptax import Causal"])
def test_importing_the_package_itself_is_named(tmp_path, slip):
    (tmp_path / "mods.py").write_text(slip)
    result = tool("check_layers.py", tmp_path)
    assert (result.returncode, "on no level" in result.stdout) == (1, True)


def test_a_module_without_a_level_is_named(tmp_path):
    (tmp_path / "attic.py").touch()
    result = tool("check_layers.py", tmp_path)
    assert (result.returncode, "attic is on no level" in result.stdout) == (1, True)


@pytest.mark.parametrize("name", ["architecture", "glossary", "max"])
def test_documents_name_files_that_are_there(name):
    text = (ROOT / "docs" / f"{name}.md").read_text()
    files = [p.as_posix() for top in PYTHON for p in (ROOT / top).rglob("*.py")]
    for path in re.findall(r"[\w/]+\.py\b", text):
        assert any(file.endswith(f"/{path}") for file in files), path


def test_the_architecture_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "src" / "raptax").rglob("*.py"):
        assert path.name == "__init__.py" or re.search(rf"\b{path.name}\b", text), path


def test_includes_of_c_plus_plus_only_go_down():
    result = tool("check_includes.py")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("slip", "complaint"),
    [
        ("attention/forward.h", "of a folder above it"),
        ("runtime/pool.h", "which is no path below"),
        ("gemm/pack.cc", "which is compiled by itself"),
    ],
)
def test_a_climbing_include_is_named(tmp_path, slip, complaint):
    for name in ("attention/forward.h", "gemm/pack.cc", "simd/vec.h"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    planted = tmp_path / "gemm" / "gemm.h"
    planted.write_text(f'#include <cmath>\n#include "simd/vec.h"\n#include "{slip}"\n')
    result = tool("check_includes.py", tmp_path)
    assert result.returncode == 1, result.stderr
    assert result.stdout.startswith(f"{planted}:3: gemm includes {slip}, {complaint}")


LISTING = """
avx512.cc.o:
0000000000000000 V DW.ref.__gxx_personality_v0
0000000000000000 W raptax::avx512::Runner::begin(long, long)
                 U raptax::Buffer::Buffer(unsigned long)
0000000000000000 t raptax::avx512::forward(raptax::ForwardParams const&)
{slip}
scratch.cc.o:
0000000000000000 W std::vector<int>::~vector()
"""


@pytest.mark.parametrize(
    ("slip", "complaint"),
    [
        ("", "no weak function leaves its instruction set"),
        (
            "0000000000000000 W raptax::PagedParams::first(long) const",
            "avx512.cc: raptax::PagedParams::first(long) const is a weak symbol outside "
            "raptax::avx512",
        ),
        (
            "0000000000000000 W raptax::avx2::max(long, long)",
            "avx512.cc: raptax::avx2::max(long, long) is a weak symbol outside "
            "raptax::avx512",
        ),
    ],
)
def test_a_weak_function_of_an_instruction_set_is_named(tmp_path, slip, complaint):
    nm = tmp_path / "nm"
    nm.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING.format(slip=slip)}\nEND\n")
    nm.chmod(0o755)
    result = tool("check_symbols.py", nm, "kernels.a")
    assert result.stdout == complaint + "\n"
    assert result.returncode == bool(slip)


def test_symbols_of_nothing_are_no_success(tmp_path):
    result = tool("check_symbols.py", "true", "kernels.a")
    assert (result.returncode, "no object of" in result.stdout) == (1, True)


def test_sizes_are_within_budget():
    result = tool("check_size.py")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("slip", "complaint"),
    [
        ("def f():\n" + "    x = 1\n" * 45, "1 of 1 functions are long"),
        ("def f(a, b, c, d, e, f, g, h): ...", "8 positional parameters"),
        ("x = 1\n" * 601, "601 lines"),
    ],
)
def test_a_size_over_budget_is_named(tmp_path, slip, complaint):
    (tmp_path / "planted.py").write_text(slip)
    result = tool("check_size.py", tmp_path)
    assert (result.returncode, complaint in result.stdout) == (1, True)


def test_docstrings_are_not_counted(tmp_path):
    text = 'def f():\n    """Says.\n' + "\n" * 700 + '    """\n'
    (tmp_path / "planted.py").write_text(text)
    assert tool("check_size.py", tmp_path).returncode == 0


def starts_backend(code: str) -> bool:
    asks = "from jax._src.xla_bridge import backends_are_initialized as started"
    command = [sys.executable, "-c", f"{code}\n{asks}; print(started())"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"True": True, "False": False}[result.stdout.split()[-1]]


def test_importing_touches_no_device():
    assert starts_backend("import jax; jax.devices()")  # so that the next line can fail
    assert not starts_backend(IMPORT_EVERYTHING)


def test_importing_does_not_load_the_native_library():
    loaded = "from raptax.kernels.cpu.library import missing_reason as missing"
    shown = f"{IMPORT_EVERYTHING}\n{loaded}; print(missing.cache_info())"
    command = [sys.executable, "-c", shown]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "currsize=0" in result.stdout


@pytest.mark.skipif(not native.available(), reason=str(native.missing_reason()))
def test_a_jitted_program_reaches_the_native_library():
    x = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    np.testing.assert_array_equal(jax.jit(native.probe)(x), np.asarray(x) + 1)
    assert "raptax_probe" in jax.jit(native.probe).lower(x).as_text()


def test_a_missing_native_library_is_explained(monkeypatch):
    reason = "no compiler was found"
    monkeypatch.setattr(native, "missing_reason", lambda: reason)
    assert not native.available()
    assert f"native kernels  no: {reason}" in info.report()
    with pytest.raises(NotImplementedError, match=reason):
        native.probe(jnp.zeros(3, jnp.int32))


def test_shapes_in_annotations_are_checked():
    with pytest.raises(TypeCheckError, match="Int32"):
        native.probe(jnp.zeros(3, jnp.float32))


def test_info_names_versions_and_devices():
    report = info.report()
    assert f"jax             {jax.__version__}\n" in report
    assert str(jax.devices()[1]) in report
