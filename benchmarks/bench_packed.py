"""Products with packed weights: shares of the machine's read rate and product rate.

    python -m benchmarks.bench_packed [--rows 16384] [--repeats 9]

A product of one row reads every byte of the weight once, so its yardstick is how fast
the machine reads: a float32 sum over 400 MB, in turns with the products. That of 512
rows is bound by arithmetic, and its yardstick is XLA's float32 matrix product. Prints
medians; bytes are those of the file's blocks, which packing may make a few more. Exits
with 1 if a result is wrong.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bench_engines import cpu_name
from benchmarks.machine import matmul_rate, seconds
from raptax.kernels.cpu.packed_linear import packed_linear
from raptax.quant.gguf import Encoding
from raptax.quant.packed import Packed, pack

INPUTS = 8192
ENCODINGS = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
FLOATS = dict(Q4_1=(0, 2), Q5_0=(0,), Q4_0=(0,), Q8_0=(0,), Q6_K=(208,))


def random_weight(name: str, rows: int) -> tuple[Packed, int]:
    """Random codes with scales of 0.01, and the bytes of the file's blocks."""
    encoding, rng = Encoding[name], np.random.default_rng(0)
    shape = rows, INPUTS // encoding.values, encoding.bytes
    blocks = rng.integers(0, 256, shape, np.uint8)
    for at in FLOATS.get(name, (0, 2)):
        blocks[..., at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    return pack(jnp.asarray(blocks), encoding), blocks.nbytes


def right(weight: Packed, x: jax.Array, y: jax.Array, precision: str) -> bool:
    """A few outputs against float64."""
    some = np.arange(0, weight.out_features, weight.out_features // 16)
    W = np.asarray(weight.rows(jnp.asarray(some)), np.float64)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)[:, some]
    size = np.abs(x) @ np.abs(W).T
    return bool(
        (np.abs(y - x @ W.T) <= size * dict(float32=1e-6, int8=5e-3)[precision]).all()
    )


def measure(name: str, precision: str, rows: int, repeats: int, product: float) -> bool:
    """Prints a line, and says whether the results are right."""
    weight, size = random_weight(name, rows)
    rng, read = np.random.default_rng(1), jnp.ones(100_000_000, jnp.float32)
    one, four, many = (
        jnp.asarray(rng.normal(size=(M, INPUTS)), jnp.float32) for M in (1, 4, 512)
    )
    call = jax.jit(lambda x, w: packed_linear(x, [w], precision=precision))
    total = jax.jit(jnp.sum)
    calls = {
        "1": lambda: call(one, weight),
        "4": lambda: call(four, weight),
        "read": lambda: total(read),
    }
    times = seconds(calls, repeats) | seconds({"512": lambda: call(many, weight)}, 3)
    taken = {key: np.median(found) for key, found in times.items()}
    rate, work = size / taken["1"], 512 * rows * INPUTS / taken["512"]
    print(
        f"{name:8} {precision:8} {taken['1'] * 1e3:6.2f} ms {rate / 1e9:6.1f} "
        f"{rate * taken['read'] / read.nbytes:8.0%} {taken['4'] * 1e3:7.2f} ms "
        f"{taken['512'] * 1e3:7.0f} ms {work / 1e9:7.0f} {work / product:11.2f}",
        flush=True,
    )
    return all(right(weight, x, call(x, weight), precision) for x in (one, four, many))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    product = matmul_rate() / 2
    print(
        f"{cpu_name()}; {options.rows} x {INPUTS}; float32 {product / 1e9:.0f} GMAC/s"
    )
    print(
        "encoding inputs      1 row   GB/s  of read    4 rows   512 rows GMAC/s float32s"
    )
    wrong = [
        f"{name} {precision}"
        for name in ENCODINGS
        for precision in ("float32", "int8")
        if not measure(name, precision, options.rows, options.repeats, product)
    ]
    print("\n".join(f"wrong: {name}" for name in wrong) or "all results are right")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
