"""Digests of the native kernels' outputs: a change of form must change no bit.

Small problems are computed by every instruction set that RAPTAX_ISA can force here, each
in a process of its own, and the SHA-256 of the output bytes is compared with
data/native_digests.json. A change that is meant to alter bits stores them anew, from a
build that the other tests accept:

    python -m tests.test_native_digests --write

Bits follow from the instruction set, the vendor of the CPU (AVX-512 estimates reciprocals
to 14 bits, and the others are the vendor's own), the compiler (which decides where a * b
+ c is one rounding) and the C library (logf, for the log-sum-exp), so the file names the
last three, and others are skipped. Instruction sets that the machine lacks keep what is
stored. Left out, as they depend on more: mods that call sin, cos, pow, erf and the like
of the C library, whose variants follow the processor; gradients of a mod's own arrays,
which are XLA's; the payload of NaN. The number of threads changes nothing.
"""

import argparse
import functools
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raptax import ALiBi, Causal, Documents, SlidingWindow, SoftCap, Window
from raptax.kernels.cpu import library
from raptax.kernels.cpu.forward import native_attention
from raptax.kernels.paged import Pool, append_and_attend
from raptax.quant.rows import is_code
from tests.instruction_sets import GENERIC_FIRST, INSTRUCTION_SETS

pytestmark = pytest.mark.skipif(
    not library.available(), reason="the native library was not built"
)

ROOT = Path(__file__).parents[1]
STORED = Path(__file__).parent / "data" / "native_digests.json"
FLOATS = ("float32", "bfloat16", "float16")
CODES = ("int8", "float8_e4m3fn", "float8_e5m2")


# --------------------------------------------------------------------------- problems


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Multiples of 2^-11 in [-1, 1) from an integer hash, whatever NumPy's version."""
    x = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(seed << 32)
    for shift in (30, 27, 31):  # splitmix64 (Steele et al. 2014)
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(0xBF58476D1CE4E5B9)
    return ((x >> np.uint64(52)).astype(np.float32) / 2048 - 1).reshape(shape)


def array(seed: int, dtype: str, *shape: int) -> jax.Array:
    return jnp.asarray(numbers(seed, *shape)).astype(dtype)


def mixed(b, h, q, k):
    return ((q * 3 + k) % 5 < 3) & (k // 4 != h)


def squashed(x, b, h, q, k):
    near = jnp.exp(-jnp.abs(q - k).astype(x.dtype) / 64)
    return jnp.tanh(x * 0.5) + jax.nn.sigmoid(x) * near - jnp.log1p(x * x)


H, K, B, T, S, D, E = 4, 2, 2, 70, 300, 20, 24
SLOPES = jnp.array([0.5, 0.25, 0.125, 0.0625], jnp.float32)
IDS = jnp.asarray(np.arange(S)[None] // 29 + np.arange(B)[:, None], jnp.int32)
SINKS = jnp.array([0.5, -1.0, 0.0, 2.0], jnp.float32)
DENSE: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": dict(mask_mod=Causal()),
    "window": dict(mask_mod=SlidingWindow(40)),
    "two sides": dict(mask_mod=Window(100, 9)),
    "documents": dict(mask_mod=Documents(IDS) & Causal()),
    "mask program": dict(mask_mod=mixed),
    "mask": dict(mask=jnp.asarray(numbers(9, B, H, T, S) > 0)),
    "bias": dict(bias=jnp.asarray(4 * numbers(8, 1, H, T, S)), mask_mod=Causal()),
    "soft cap": dict(score_mod=SoftCap(2.0)),
    "alibi": dict(score_mod=ALiBi(SLOPES), mask_mod=Causal()),
    "score program": dict(score_mod=squashed),
    "sinks": dict(sinks=SINKS, mask_mod=Causal()),
    "dropout": dict(
        dropout_rng=jnp.array([3, 7], jnp.uint32),
        dropout_rate=0.25,
        deterministic=False,
        mask_mod=Causal(),
    ),
}
SIZES = {"tiles": (1, 2, 1, 530, 530, 64, 64), "decode": (2, 4, 2, 1, 520, 33, 7)}


def dense(name: str, dtype: str) -> dict[str, list[jax.Array]]:
    """Output and log-sum-exp, then the gradients of all arrays that have one in C++."""
    sizes = SIZES.get(name, (B, H, K, T, S, D, E))
    b, h, k, t, s, d, e = sizes
    options = DENSE.get(name, dict(mask_mod=Causal()))
    learned = {n: options[n] for n in ("bias", "sinks") if n in options}
    shapes = (b, h, t, d), (b, k, s, d), (b, k, s, e)
    inputs = [array(n, dtype, *shape) for n, shape in enumerate(shapes)]

    def attend(inputs, learned):
        kwargs = options | learned
        return native_attention(*inputs, scale=0.375, return_lse=True, **kwargs)

    found, pull = jax.vjp(attend, inputs, learned)
    pushed = array(3, dtype, b, h, t, e), array(4, "float32", b, h, t)
    return {"forward": [*found], "gradients": jax.tree.leaves(pull(pushed))}


PAGED: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": dict(mask_mod=SlidingWindow(21)),
    "mods": dict(mask_mod=Causal() & mixed, score_mod=SoftCap(2.0)),
    "alibi and sinks": dict(score_mod=ALiBi(SLOPES), sinks=SINKS),
}


def paged(name: str, dtype: str, pages: str) -> dict[str, list[jax.Array]]:
    """Appends chunks and single tokens to sequences that hold keys already."""
    held, new, size, layers, d, e = (37, 0, 700, 5), (1, 40, 3, 0), 16, 2, 48, 40
    width = max(-(-(h + n) // size) for h, n in zip(held, new, strict=True))
    count, rows = width * len(held), sum(new) + 2  # the last two belong to no sequence
    table = np.arange(count, dtype=np.int32).reshape(len(held), -1)[:, ::-1]
    if is_code(pages):
        stored = [
            jnp.asarray(120 * numbers(n, layers, count, K, size, w)).astype(pages)
            for n, w in ((5, d), (6, e))
        ]
        scales = [
            jnp.asarray(numbers(n, layers, count, K, size) / 128 + 0.0078125)
            for n in (7, 8)
        ]
    else:
        shapes = (layers, count, K, size, d), (layers, count, K, size, e)
        stored = [array(n + 5, pages, *shape) for n, shape in enumerate(shapes)]
        scales = [None, None]
    out, pool = append_and_attend(
        array(1, dtype, rows, H, d),
        array(2, dtype, rows, K, d),
        array(3, dtype, rows, K, e),
        Pool(*stored, *scales),
        table=jnp.asarray(table),
        lengths=jnp.array(held, jnp.int32),
        row_offsets=jnp.asarray(np.cumsum([0, *new]), jnp.int32),
        layer=jnp.int32(1),
        scale=0.375,
        return_lse=True,
        kernel="native",
        **(dict(mask_mod=Causal()) | PAGED[name]),
    )
    return {"attended": [*out], "pages": [x for x in pool if x is not None]}


# Each rule in float32, and the shapes of products in every type.
DENSE_CASES = [
    *((name, "float32") for name in (*DENSE, *SIZES)),
    *((name, "bfloat16") for name in ("causal", "bias", "alibi", "dropout", *SIZES)),
    *((name, "float16") for name in ("causal", "tiles")),
]
PAGED_CASES = [
    *((name, "float32", "float32") for name in PAGED),
    *((name, "bfloat16", "bfloat16") for name in ("causal", "mods")),
    ("causal", "float16", "float16"),
    ("causal", "float32", "bfloat16"),
    *(("causal", "bfloat16", pages) for pages in CODES),
    ("mods", "float32", "int8"),
]


# ---------------------------------------------------------------------------- digests


def digest(arrays: list[jax.Array]) -> str:
    total = hashlib.sha256()
    for x in map(np.asarray, arrays):
        total.update(f"{x.dtype}{x.shape}".encode())
        clean = (
            x if x.dtype == np.int8 else np.where(x == x, x, np.full_like(x, np.nan))
        )
        total.update(np.ascontiguousarray(clean).tobytes())
    return total.hexdigest()


def digests() -> dict[str, str]:
    """Runs in the process that `of_isa` starts."""
    found = {}
    for function, cases in ((dense, DENSE_CASES), (paged, PAGED_CASES)):
        for case in cases:
            run = jax.jit(functools.partial(function, *case))
            for part, arrays in run().items():
                name = "/".join((function.__name__, *case, part))
                found[name] = digest(arrays)
    return found


def of_isa(isa: str) -> dict[str, str] | None:
    """The digests that an instruction set gives; None if the machine lacks it."""
    script = (
        "import json; from tests import test_native_digests as t;"
        "print(json.dumps(t.digests()))"
    )
    env = os.environ | dict(RAPTAX_ISA=isa, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    if "RAPTAX_ISA names nothing that runs here" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def build() -> dict[str, str]:
    """What bits depend on beside the instruction set."""
    built = resources.files("raptax_native") / "raptax_native.so"
    made_by = re.search(rb"(GCC: \(|clang version )[^\0]*", built.read_bytes())
    return {
        "machine": platform.machine(),
        "compiler": made_by[0].decode() if made_by else "unknown",
        "C library": " ".join(platform.libc_ver()),
        "vendor": vendor(),
    }


def vendor() -> str:
    """Of the CPU, as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2] for line in lines if line.startswith("vendor_id"))
    return next(names, "unknown").strip()


@functools.cache
def stored() -> dict[str, Any]:
    return json.loads(STORED.read_text())


@pytest.mark.parametrize("isa", GENERIC_FIRST)
def test_no_bit_has_changed(isa):
    if (here := build()) != (there := stored()["build"]):
        pytest.skip(f"the stored digests are of {there}, and this build is {here}")
    if isa not in stored()["digests"]:
        pytest.skip(
            f"no digests are stored for {isa}: see --write, on a machine with it"
        )
    found = of_isa(isa)
    if found is None:
        pytest.skip(f"this machine has no {isa}")
    assert found == stored()["digests"][isa]


def write() -> None:
    """Stores what this build computes, and says which instruction sets are absent."""
    before = json.loads(STORED.read_text()) if STORED.exists() else {"build": build()}
    kept = before.get("digests", {}) if before["build"] == build() else {}
    for isa in INSTRUCTION_SETS:
        if (found := of_isa(isa)) is None:
            print(f"{isa}: absent on this machine, so not renewed")
        else:
            kept[isa] = found
            print(f"{isa}: {len(found)} digests")
    text = json.dumps({"build": build(), "digests": kept}, indent=1)
    STORED.write_text(text + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    write()
